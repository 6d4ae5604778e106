"""A pruned start: what is kept, against a slow reference, and what the kept parts compute."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lit_spu.backbones import Backbone, Role, load_backbone
from lit_spu.backbones.families import FAMILIES as RECORDS
from lit_spu.backbones.side_model import make_side_model
from lit_spu.backbones.stacks import TransformerStacks
from lit_spu.errors import UserError
from lit_spu.nn import pruning
from lit_spu.tasks import TASKS
from tests.conftest import FAMILIES, encode

Tiny = Callable[[str], str]
Array = Any
ROLES: tuple[Role, ...] = ("query", "key", "value")


def load(folder: str) -> Backbone:
    torch.manual_seed(3)
    return load_backbone(folder, TASKS["sst2"], "prompt").double().eval()


def everything(backbone: Backbone) -> list[list[int]]:
    return [list(range(stack.depth)) for stack in backbone.stacks]


def largest(scores: Array, count: int) -> Array:
    """By a plain sort: the greatest, and of equal ones the first."""
    return np.array(sorted(sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:count]))


@pytest.mark.parametrize("order", ["residual", "published"])
@pytest.mark.parametrize("family", FAMILIES)
def test_at_full_width_it_is_the_backbone(tiny: Tiny, family: str, order: Any) -> None:
    backbone = load(tiny(family))
    for reduced in (
        make_side_model(backbone.base_model, 1, everything(backbone)),
        backbone.make_student(1, everything(backbone)).base_model,
    ):
        reduced.model.double()
        if order == "published" and family in ("llama", "qwen2"):
            with pytest.raises(UserError, match="as many heads of keys"):
                pruning.init_from_pruned(
                    reduced, backbone.base_model, everything(backbone), pruning.magnitude(backbone.base_model), order
                )
            continue
        pruning.init_from_pruned(
            reduced, backbone.base_model, everything(backbone), pruning.magnitude(backbone.base_model), order
        )
        theirs = dict(backbone.base_model.model.named_parameters())
        for name, parameter in reduced.model.named_parameters():
            assert torch.equal(parameter, theirs[name]), name


@pytest.mark.parametrize("family", FAMILIES)
def test_every_weight_is_the_backbones_own(tiny: Tiny, family: str) -> None:
    """At half the width: each row of numbers is one that the backbone has, and nothing is left as it was made."""
    backbone = load(tiny(family))
    side = backbone.make_student(2, [[0, 2, 3]] * len(backbone.stacks)).base_model
    side.model.double()
    with torch.no_grad():
        for parameter in side.model.parameters():
            parameter.fill_(torch.nan)
    pruning.init_from_pruned(
        side, backbone.base_model, [[0, 2, 3]] * len(backbone.stacks), pruning.magnitude(backbone.base_model)
    )
    known = torch.cat([p.flatten() for p in backbone.base_model.model.parameters()])
    assert all(bool(torch.isin(p, known).all()) for p in side.model.parameters())


# -- what is kept ---------------------------------------------------------------------------------------------------


def t5_reference(model: Any, order: str, heads: int, inner: int, width: int, wide: int) -> dict[str, Array]:
    """The side network's weights of a T5 in plain numpy, one part after the other, as lists of kept places."""
    weights = {name: p.detach().numpy() for name, p in model.named_parameters()}
    score = {name: abs(w).astype(np.float32).astype(np.float64) for name, w in weights.items()}
    embedded = score["shared.weight"].sum(0)
    if order == "residual":
        for name, s in score.items():
            if name.endswith((".o.weight", ".wo.weight")):
                embedded = embedded + s.sum(1)
    current = largest(embedded, width)
    made = {}

    def attend(at: str, norm: str) -> None:
        nonlocal current
        q, k, v = (score[f"{at}.{part}.weight"][:, current] for part in "qkv")
        joint = (q * k * v).sum(1)
        if order == "published":
            rows = largest(joint, inner)
        else:
            per, size = inner // heads, len(joint) // heads
            rows = np.concatenate([h * size + largest(joint[h * size :][:size], per) for h in range(heads)])
        made[norm] = weights[norm][current]
        for part in "qkv":
            made[f"{at}.{part}.weight"] = weights[f"{at}.{part}.weight"][np.ix_(rows, current)]
        out = f"{at}.o.weight"
        if order == "published":
            current = largest(score[out][:, rows].sum(1), width)
        made[out] = weights[out][np.ix_(current, rows)]

    for stack, depth in (("encoder", 4), ("decoder", 4)):
        for i in range(depth):
            layers = f"{stack}.block.{i}.layer"
            attend(f"{layers}.0.SelfAttention", f"{layers}.0.layer_norm.weight")
            if stack == "decoder":
                attend(f"{layers}.1.EncDecAttention", f"{layers}.1.layer_norm.weight")
            last = 1 if stack == "encoder" else 2
            ff, norm = f"{layers}.{last}.DenseReluDense", f"{layers}.{last}.layer_norm.weight"
            ups = [name for name in weights if name.startswith(f"{ff}.wi")]
            rows = largest(sum(score[up][:, current].sum(1) for up in ups), wide)
            made[norm] = weights[norm][current]
            for up in ups:
                made[up] = weights[up][np.ix_(rows, current)]
            down = f"{ff}.wo.weight"
            if order == "published":
                current = largest(score[down][:, rows].sum(1), width)
            made[down] = weights[down][np.ix_(current, rows)]
        made[f"{stack}.final_layer_norm.weight"] = weights[f"{stack}.final_layer_norm.weight"][current]
        bias = f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        made[bias] = weights[bias]
    return made


@pytest.mark.parametrize("order", ["residual", "published"])
@pytest.mark.parametrize("family", ["t5", "t5-gated"])
def test_a_t5_is_pruned_as_by_hand(tiny: Tiny, family: str, order: Any) -> None:
    backbone = load(tiny(family))
    with torch.no_grad():
        for parameter in backbone.base_model.model.parameters():  # norms start at one, and tell no places apart
            parameter.add_(0.1 * torch.randn_like(parameter))
    side = make_side_model(backbone.base_model, 2, everything(backbone))
    side.model.double()
    pruning.init_from_pruned(
        side, backbone.base_model, everything(backbone), pruning.magnitude(backbone.base_model), order
    )
    wanted = t5_reference(backbone.base_model.model, order, heads=4, inner=16, width=16, wide=32)
    found = {name: p.detach().numpy() for name, p in side.model.named_parameters()}
    assert found.keys() == wanted.keys()
    for name, weight in wanted.items():
        np.testing.assert_array_equal(found[name], weight, err_msg=name)


def test_a_dropped_block_gives_nothing_and_its_stack_keeps_its_positions(tiny: Tiny) -> None:
    backbone = load(tiny("t5"))
    some = [[1, 3], [2]]
    whole, part = (
        make_side_model(backbone.base_model, 2, everything(backbone)),
        make_side_model(backbone.base_model, 2, some),
    )
    for side, kept in ((whole, everything(backbone)), (part, some)):
        side.model.double()
        pruning.init_from_pruned(side, backbone.base_model, kept, pruning.magnitude(backbone.base_model), "published")
    for stream, numbers in enumerate(some):
        for place, number in enumerate(numbers):
            theirs = dict(whole.stacks[stream].blocks[number].named_parameters())
            for name, parameter in part.stacks[stream].blocks[place].named_parameters():
                other = theirs.get(
                    name, dict(whole.stacks[stream].blocks[0].named_parameters())[name] if place == 0 else None
                )
                assert other is not None
                assert torch.equal(parameter, other), name


def test_heads_that_share_keys_and_turned_pairs_stay_together(tiny: Tiny) -> None:
    """Llama: a group of queries keeps the places of its keys, and of each pair i and i + width/2 both or none."""
    backbone = load(tiny("llama"))
    side = make_side_model(backbone.base_model, 2, everything(backbone))
    side.model.double()
    pruning.init_from_pruned(side, backbone.base_model, everything(backbone), pruning.magnitude(backbone.base_model))
    theirs, ours = (
        {s.role: s.weight for s in base_model.block_target_linears(0, 1, *ROLES)}
        for base_model in (backbone.base_model, side)
    )

    def places(narrow: Tensor, wide: Tensor) -> list[int]:
        """Return the rows that were kept, from the columns that all of them share."""
        rows = []
        for row in narrow:
            (found,) = [i for i, other in enumerate(wide) if bool(torch.isin(row, other).all())]
            rows.append(found)
        return rows

    queries, keys, values = (places(ours[role], theirs[role]) for role in ROLES)
    assert keys == values
    size, narrow = 8, 4
    for group in range(2):
        own = [row - group * size for row in keys[group * narrow :][:narrow]]
        assert own[2:] == [place + size // 2 for place in own[:2]]
        for head in (2 * group, 2 * group + 1):
            assert [row - head * size for row in queries[head * narrow :][:narrow]] == own


def test_what_a_narrow_t5_computes_is_what_the_kept_places_compute(tiny: Tiny) -> None:
    """A T5 all of whose other weights are zero gives the same states, but for what its norms divide by."""
    backbone = load(tiny("t5"))
    generator = torch.Generator().manual_seed(5)

    def some(count: int, of: int) -> Tensor:
        return torch.randperm(of, generator=generator)[:count].sort().values

    def only(weight: Tensor, rows: Tensor, columns: Tensor) -> None:
        kept = torch.zeros_like(weight)
        kept[rows.unsqueeze(1), columns] = weight[rows.unsqueeze(1), columns]
        weight.copy_(kept)

    residual, vocabulary = some(16, 32), torch.arange(backbone.base_model.model.shared.num_embeddings)
    with torch.no_grad():
        only(backbone.base_model.model.shared.weight, vocabulary, residual)
        for stream, stack in enumerate(backbone.base_model.stacks):
            for number in range(stack.depth):
                parts = {
                    r: backbone.base_model.block_target_linears(stream, number, r)
                    for r in backbone.base_model.family.target_linears
                }
                for query, key, value, output in zip(
                    *(parts[role] for role in ("query", "key", "value", "output")), strict=True
                ):
                    rows = torch.cat([8 * head + some(4, 8) for head in range(4)])
                    for target in (query, key, value):
                        only(target.weight, rows, residual)
                    only(output.weight, residual, rows)
                (up,), (down,) = parts["up"], parts["down"]
                rows = some(32, 64)
                only(up.weight, rows, residual)
                only(down.weight, residual, rows)
    student = backbone.make_student(2, everything(backbone)).double().eval()
    kept = pruning.init_from_pruned(
        student.base_model, backbone.base_model, everything(backbone), pruning.magnitude(backbone.base_model)
    )
    assert torch.equal(kept, residual)
    with torch.no_grad():
        for name, parameter in student.base_model.model.named_parameters():
            if name.endswith("layer_norm.weight"):
                parameter.mul_(2**0.5)  # the mean square is over half as many places
        batch = encode(backbone)
        wide, narrow = (one.base_model.forward(one.model_inputs(batch)) for one in (backbone, student))
    torch.testing.assert_close(narrow, wide[..., residual], atol=1e-6, rtol=1e-6)  # eps is added in another place


# -- importance -----------------------------------------------------------------------------------------------------


def test_of_equal_ones_the_first_are_kept() -> None:
    assert pruning.top_indices(torch.tensor([1.0, 2.0, 1.0, 1.0, 2.0]), 3).tolist() == [0, 1, 4]
    assert pruning.top_indices(torch.full((5,), -torch.inf), 2).tolist() == [0, 1]


def test_products_of_tiny_scores_are_told_apart(tiny: Tiny) -> None:
    backbone = load(tiny("bert"))
    scores = pruning.magnitude(backbone.base_model)
    made = []
    for size in (1.0, 1e-30):  # whose cubes no fp32 holds
        side = make_side_model(backbone.base_model, 2, everything(backbone))
        pruning.init_from_pruned(
            side, backbone.base_model, everything(backbone), {name: size * s for name, s in scores.items()}
        )
        made.append(torch.cat([p.flatten() for p in side.model.parameters()]))
    assert torch.equal(*made)


def test_fisher_is_the_sum_of_squared_gradients_of_single_examples(tiny: Tiny) -> None:
    backbone = load(tiny("bert"))
    backbone.freeze()
    batch = encode(backbone)
    singles = [{name: tensor[i : i + 1] for name, tensor in batch.items()} for i in range(3)]
    before = [p.requires_grad for p in backbone.parameters()]
    scores = pruning.fisher(backbone, singles)
    assert before == [p.requires_grad for p in backbone.parameters()]
    assert all(p.grad is None for p in backbone.parameters())
    name = "encoder.layer.2.attention.self.value.weight"
    weight = backbone.base_model.model.get_parameter(name)
    step, wanted = 1e-5, torch.zeros(3, 2)
    with torch.no_grad():
        for i in range(3):
            for j in range(2):
                for single in singles:
                    weight[i, j] += step
                    up = backbone.loss(backbone(single), single)
                    weight[i, j] -= 2 * step
                    down = backbone.loss(backbone(single), single)
                    weight[i, j] += step
                    wanted[i, j] += ((up - down) / (2 * step)) ** 2
    torch.testing.assert_close(scores[name][:3, :2], wanted.double(), atol=0, rtol=1e-3)


def test_what_cannot_be_narrowed_is_told(tiny: Tiny) -> None:
    import transformers

    config = transformers.Qwen3Config(
        vocab_size=40, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=64, head_dim=8, pad_token_id=0,
    )  # fmt: skip
    base_model = TransformerStacks(transformers.Qwen3Model(config), RECORDS["qwen3"])
    with pytest.raises(UserError, match=r"model.init: self_attn.q_norm.weight of a qwen3 would shrink from 8 to 4"):
        pruning.init_from_pruned(
            make_side_model(base_model, 2, [[0, 1]]), base_model, [[0, 1]], pruning.magnitude(base_model)
        )
