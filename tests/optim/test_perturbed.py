"""Forward passes with perturbed weights: they are those of a copy with other weights, and no weight is written."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import masking_utils

from lit_spu.backbones import load_backbone
from lit_spu.errors import UserError
from lit_spu.methods.base import Method
from lit_spu.methods.bitfit import BitFit
from lit_spu.methods.ia3 import IA3
from lit_spu.methods.ladder import LadderSideTuning
from lit_spu.methods.lora import LoRA
from lit_spu.optim.mezo import MeZOOptimizer
from lit_spu.tasks import TASKS
from tests.conftest import FAMILIES, encode
from tests.tape import record

SCALE = 2.0**-7  # exact in every precision

METHODS: dict[str, Callable[..., Method]] = {
    "lora": lambda **kwargs: LoRA(norms=True, **kwargs),
    "ia3": IA3,
    "bitfit": BitFit,
    "ladder": lambda **kwargs: LadderSideTuning(reduction=2, **kwargs),
}


def make_optimizer(module: Any, backbone: Any, **settings: Any) -> MeZOOptimizer:
    named = [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]
    return MeZOOptimizer(named, epsilon=SCALE, blocks=backbone.blocks, table_readers=backbone.table_readers, **settings)


def with_perturbed_weights(module: Any, optimizer: MeZOOptimizer, scale: float = SCALE) -> Any:
    """Return a copy of a module with the perturbation added to its weights."""
    copied, z = copy.deepcopy(module), optimizer.sample()
    with torch.no_grad():
        for own, its in zip(module.parameters(), copied.parameters(), strict=True):
            if own in z:
                its.copy_(its.to(torch.promote_types(its.dtype, torch.float32)) + scale * z[own])
    return copied


def perturbed_values(optimizer: MeZOOptimizer, function: Callable[[], Tensor]) -> list[Tensor]:
    """Return a function's values at both points of a step that moves no weight."""
    values: list[Tensor] = []
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    optimizer.step(lambda: values.append(function()) or values[-1].sum())  # type: ignore[func-returns-value]
    return values


@pytest.mark.parametrize("kind", ["gaussian", "low_rank"])
@pytest.mark.parametrize("head", ["classifier", "prompt"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_backbone_reads_perturbed_weights(tiny: Callable[[str], str], family: str, head: Any, kind: str) -> None:
    """The logits equal those of a copy with the perturbation written into every weight, at both points of a step."""
    backbone = load_backbone(tiny(family), TASKS["sst2"], head).double().eval()
    batch, before = encode(backbone), {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    optimizer = make_optimizer(backbone, backbone, noise=kind)
    assert [len(units) for _, units in optimizer.layout.blocks] == [1] * len(backbone.blocks)
    with torch.no_grad():
        plain = backbone(batch)
        for values, scale in zip(perturbed_values(optimizer, lambda: backbone(batch)), (SCALE, -SCALE), strict=True):
            optimizer.param_groups[0]["step"] = 0
            expected = with_perturbed_weights(backbone, optimizer, scale)(batch)
            assert not torch.allclose(plain, expected, atol=1e-4)
            rounding = 1e-12 if kind == "gaussian" else 2e-6  # a product of factors is not rounded to fp32
            torch.testing.assert_close(values, expected, atol=rounding, rtol=rounding)
        assert torch.equal(backbone(batch), plain)
    assert all(torch.equal(tensor, before[name]) for name, tensor in backbone.state_dict().items())


class ScaledEmbedding(nn.Embedding):
    def forward(self, ids: Tensor) -> Tensor:
        return 2 * super().forward(ids)


def test_an_embedding_of_another_class_reads_perturbed_weights(tiny: Callable[[str], str]) -> None:
    """Also if a prompt's head selects rows of the same matrix."""
    backbone = load_backbone(tiny("bert"), TASKS["sst2"], "prompt").double().eval()
    backbone.model.get_input_embeddings().__class__ = ScaledEmbedding
    batch, optimizer = encode(backbone), make_optimizer(backbone, backbone, noise="rademacher")
    found = perturbed_values(optimizer, lambda: backbone(batch))[0]
    optimizer.param_groups[0]["step"] = 0
    torch.testing.assert_close(found, with_perturbed_weights(backbone, optimizer)(batch), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("family", ["bert", "t5", "gpt2"])
def test_a_method_reads_perturbed_weights(tiny: Callable[[str], str], family: str, name: str) -> None:
    """Only its trained weights are perturbed."""
    torch.manual_seed(0)  # the same weights in any order of tests
    method: Any = METHODS[name](backbone=tiny(family), head="prompt").double().eval()
    for parameter in method.parameters():
        if parameter.requires_grad and not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    batch = encode(method.backbone)
    optimizer = make_optimizer(method, method.backbone, noise="rademacher")
    found = perturbed_values(optimizer, lambda: method.loss(batch))[0]
    optimizer.param_groups[0]["step"] = 0
    with torch.no_grad():
        expected = with_perturbed_weights(method, optimizer).loss(batch)
        torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-9)
        assert abs(float(method.loss(batch) - expected)) > 1e-7


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_last_block_with_perturbed_weights_runs_at_the_answer_alone(
    tiny: Callable[[str], str], dtype: torch.dtype
) -> None:
    """In half precision, with weights of two dtypes and two groups in a block, equal to the bit."""
    backbone = load_backbone(tiny("bert"), TASKS["sst2"], "prompt").to(dtype).eval()
    backbone.blocks[0].get_submodule("output.LayerNorm").float()  # two units
    batch, hook = encode(backbone), Widths()
    named = list(backbone.named_parameters())
    groups = [{"params": [(n, p) for n, p in named if (p.ndim > 1) is is_matrix]} for is_matrix in (True, False)]
    optimizer = MeZOOptimizer(
        groups, epsilon=SCALE, lr=0.0, blocks=backbone.blocks, table_readers=backbone.table_readers
    )
    assert len(optimizer.layout.blocks[0][1]) == (2 if dtype is torch.float32 else 3)
    with torch.autocast("cpu", torch.bfloat16):  # whose cache knows weights by their identity
        expected = [with_perturbed_weights(backbone, optimizer, scale)(batch) for scale in (SCALE, -SCALE)]
        backbone.blocks[-1].get_submodule("output.dense").register_forward_hook(hook)
        found = perturbed_values(optimizer, lambda: backbone(batch))
    assert all(map(torch.equal, found, expected))
    assert not torch.equal(*found)
    assert hook.widths == [1, 1]


class Widths:
    """Hook that notes for how many positions of each text a module runs."""

    position_wise = True

    def __init__(self) -> None:
        self.widths: list[int] = []

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.widths.append(output.shape[1])


def test_a_weight_of_two_blocks_is_perturbed_in_both() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).double()
    model[1].weight = model[0].weight
    optimizer, x = MeZOOptimizer(model.named_parameters(), epsilon=SCALE, blocks=list(model)), torch.ones(2, 4).double()
    expected = with_perturbed_weights(model, optimizer)(x)
    torch.testing.assert_close(perturbed_values(optimizer, lambda: model(x))[0], expected, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_their_own_after_an_error_in_a_block(tiny: Callable[[str], str], dtype: torch.dtype) -> None:
    """To the bit, and in their own memory, from which they are moved and trained on."""
    backbone = load_backbone(tiny("t5"), TASKS["sst2"], "prompt").to(dtype).eval()
    batch, optimizer = encode(backbone), make_optimizer(backbone, backbone, lr=1e-2)
    before, places = copy.deepcopy(backbone.state_dict()), [p.data_ptr() for p in backbone.parameters()]
    with backbone.blocks[1].register_forward_pre_hook(stop), pytest.raises(KeyboardInterrupt):
        optimizer.step(lambda: backbone(batch).sum())
    assert all(torch.equal(tensor, before[name]) for name, tensor in backbone.state_dict().items())
    assert [p.data_ptr() for p in backbone.parameters()] == places
    assert not any("forward" in vars(module) for module in [*backbone.blocks, *backbone.base_model.embeddings])


@pytest.mark.parametrize("kind", ["gaussian", "low_rank"])
def test_evaluations_and_updates_can_be_captured(
    tiny: Callable[[str], str], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Recorded by the rules of CUDA graphs, and replayed with other keys, scales and slopes: equal to the bit."""
    monkeypatch.setattr("lit_spu.optim.noise.SMALL_DRAWS", ())
    monkeypatch.setattr(masking_utils, "is_tracing", lambda *_: True)  # otherwise it reads the mask's values
    backbones = [load_backbone(tiny("bert"), TASKS["sst2"], "prompt").eval() for _ in range(2)]
    backbones[1].load_state_dict(backbones[0].state_dict())
    batch, lr = encode(backbones[0]), 1e-2
    eager, replayed = (make_optimizer(backbone, backbone, lr=lr, noise=kind) for backbone in backbones)
    for optimizer, backbone in zip((eager, replayed), backbones, strict=True):
        for _ in range(3 if optimizer is eager else 1):
            optimizer.step(lambda: backbone.loss(backbone(batch), batch))  # noqa: B023
    noise, units, scale, steps = replayed.noise, replayed.layout.units, torch.zeros(1, 1), torch.zeros(1, 1)
    with torch.no_grad():
        noise.begin([0], scale)
        losses: list[Tensor] = []

        def evaluate() -> None:
            with replayed.perturbed.apply(set(units)):
                losses.append(backbones[1].loss(backbones[1](batch), batch))

        def move() -> None:
            for unit in units:
                replayed._update(unit, None)

        evaluation = record(evaluate)
        noise.begin([0], steps)
        update = record(move)  # by steps of zero
        for step in (1, 2):
            replayed.param_groups[0]["step"] = step
            found = []
            for sign in (1, -1):
                noise.begin([replayed._key(0)], scale.fill_(sign * SCALE))
                evaluation.replay()
                found.append(losses[0].double())
            slope = ((found[0] - found[1]) / (2 * SCALE)).float()
            noise.begin([replayed._key(0)], steps.copy_(torch.tensor(lr) * slope / -1))
            update.replay()
    assert all(map(torch.equal, backbones[0].parameters(), backbones[1].parameters()))


@pytest.mark.parametrize("kind", ["gaussian", "low_rank"])
def test_released_weights_have_memory_of_their_own(tiny: Callable[[str], str], kind: str) -> None:
    """A later step flattens them again, to the bit. Rounding errors are kept."""
    ends = []
    for releases in (False, True):
        torch.manual_seed(0)
        backbone = load_backbone(tiny("bert"), TASKS["sst2"], "prompt").bfloat16().eval()
        batch, optimizer = encode(backbone), make_optimizer(backbone, backbone, lr=1e-2, noise=kind)
        for _ in range(3):
            if releases:
                optimizer.release()
                assert all(p.untyped_storage().nbytes() == p.nbytes for p in backbone.parameters())
                assert not sum(unit.flat.numel() + unit.scratch.numel() for unit in optimizer.layout.units)
                assert not optimizer.noise._buffers
            optimizer.step(lambda: backbone.loss(backbone(batch), batch))  # noqa: B023
        ends.append(backbone.state_dict())
    assert all(torch.equal(tensor, ends[1][name]) for name, tensor in ends[0].items())


@pytest.mark.parametrize("then", [MeZOOptimizer.release, lambda optimizer: optimizer.apply_slopes([0.0])])
def test_weights_left_in_scratch_memory_are_restored(then: Callable[[MeZOOptimizer], None]) -> None:
    """As by a second Ctrl-C in an evaluation, which is not delayed."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    optimizer, before = MeZOOptimizer(model.named_parameters(), lr=0.1), copy.deepcopy(model.state_dict())
    for unit in optimizer.layout.units:
        unit.scratch.zero_()
        unit.swap()
    then(optimizer)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_weights_of_a_unit_that_differ_are_refused() -> None:
    """Before anything is moved: a copy into one buffer would cast them all."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    optimizer = MeZOOptimizer(model.named_parameters(), lr=0.1)
    model[1].bfloat16()
    with pytest.raises(UserError, match=r"1\.weight is torch.bfloat16 on cpu, and 0\.weight torch.float32 on cpu"):
        optimizer.step(lambda: model(torch.ones(1, 4)).sum())
    assert [p.dtype for p in model.parameters()] == [torch.float32] * 2 + [torch.bfloat16] * 2


def stop(*_: Any) -> None:
    raise KeyboardInterrupt


def test_weights_that_were_moved_are_trained_on(tiny: Callable[[str], str]) -> None:
    """Other data of a parameter, such as those on another device, move into a new buffer at the next step."""
    ends = []
    for moves in (False, True):
        torch.manual_seed(0)
        backbone = load_backbone(tiny("bert"), TASKS["sst2"], "prompt").eval()
        batch, optimizer = encode(backbone), make_optimizer(backbone, backbone, lr=1e-2)
        for _ in range(2):
            if moves:
                backbone.double().float()
                backbone.load_state_dict({name: tensor.clone() for name, tensor in backbone.state_dict().items()})
            optimizer.step(lambda: backbone.loss(backbone(batch), batch))  # noqa: B023
        ends.append(backbone.state_dict())
    assert all(torch.equal(tensor, ends[1][name]) for name, tensor in ends[0].items())
