"""A narrow T5's layers against transformers' own: results, gradients, dropout, and what they leave to it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lit_spu.backbones import attention, t5_layers
from lit_spu.backbones.families import FAMILIES
from lit_spu.backbones.seq2seq import Seq2SeqStacks
from lit_spu.measure.saved import SavedForBackward

WIDTH, HEADS, ALL_HEADS = 20, 2, 16


def t5(keep: bool = False, dropout: float = 0.0) -> Any:
    """Two encoder and two decoder blocks, whose layers are transformers' own."""
    from transformers import AutoModel, T5Config

    torch.manual_seed(0)
    sizes = {"d_model": WIDTH, "d_kv": 8, "d_ff": 24, "num_heads": HEADS, "num_layers": 2, "vocab_size": 4}
    model = AutoModel.from_config(T5Config(**sizes, dropout_rate=dropout))  # type: ignore[arg-type]
    attention.install(model, keep)
    for name, parameter in model.named_parameters():
        if "layer_norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model


def given(tokens: int, queries: int, padded: bool) -> dict[str, Any]:
    """The states of 5 texts for both stacks, which require gradients."""
    torch.manual_seed(1)
    lengths = torch.tensor([tokens, 3, 1, 5, tokens - 1] if padded else [tokens] * 5)
    return {
        "inputs_embeds": torch.randn(5, tokens, WIDTH, requires_grad=True),
        "decoder_inputs_embeds": torch.randn(5, queries, WIDTH, requires_grad=True),
        "attention_mask": (torch.arange(tokens) < lengths[:, None]).long(),
        "use_cache": False,
    }


def layers(model: Any) -> Iterator[Any]:
    """The layers of all blocks."""
    for stack in (model.encoder, model.decoder):
        for block in stack.block:
            yield from block.layer


def answer(model: Any, inputs: dict[str, Any]) -> list[Tensor]:
    """The states that come out, and the gradients of what went in and of each weight."""
    learned = [
        *(value for name, value in inputs.items() if name.endswith("embeds")),
        *(parameter for name, parameter in model.named_parameters() if "shared" not in name),
    ]
    out = model(**inputs).last_hidden_state
    torch.manual_seed(2)
    return [out, *torch.autograd.grad(out, learned, torch.randn_like(out))]


def nodes(out: Tensor) -> list[str]:
    """The names of the graph's nodes."""
    found, left = set(), [out.grad_fn]
    while left:
        node = left.pop()
        if node is not None and node not in found:
            found.add(node)
            left += [before for before, _ in node.next_functions]
    return [type(node).__name__ for node in found]


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("tokens", "queries"), [(12, 1), (12, 2), (40, 1), (12, 9)])
def test_they_are_transformers_own(tokens: int, queries: int, padded: bool, keep: bool) -> None:
    model, inputs = t5(keep), given(tokens, queries, padded)
    plain = answer(model, inputs)
    t5_layers.install(model)
    ours = answer(model, inputs)
    for one, other in zip(ours, plain, strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=2e-5)
    # all four blocks, but for the decoder's two where the queries are not few
    assert nodes(model(**inputs).last_hidden_state).count("_LayersBackward") == (2 if queries == 9 else 4)


def test_maps_that_are_kept_are_those_that_are_made_again_to_the_bit() -> None:
    """So a cached run, which keeps them, is an uncached one."""
    found = []
    for keep in (False, True):
        model, inputs = t5(keep), given(12, 1, padded=True)
        t5_layers.install(model)
        with SavedForBackward(model.parameters()) as saved:
            model(**inputs)
        found.append((saved.nbytes, answer(model, inputs)))
    (less, again), (more, kept) = found
    assert all(torch.equal(one, other) for one, other in zip(again, kept, strict=True))
    maps = 4 * 2 * 5 * HEADS * 12 * 12
    assert more - less == maps - 2 * 8  # in place of two seeds


def test_they_keep_less_for_the_backward_pass_than_transformers_own() -> None:
    model, inputs = t5(keep=True), given(12, 1, padded=False)
    kept = []
    for install in (False, True):
        if install:
            t5_layers.install(model)
        with SavedForBackward(model.parameters()) as saved:
            model(**inputs)
        kept.append(saved.nbytes)
    assert kept[1] < 0.75 * kept[0]


READS, ADDS = (ALL_HEADS, WIDTH), (WIDTH, ALL_HEADS)
PADDING = (torch.arange(5) < torch.tensor([5, 2, 3])[:, None])[:, None, None]
# how it is made, with what dropout; its tokens; how many linears read the state, and the shapes of all its weights
INNER: dict[str, tuple[Callable[[float], Any], int, int, tuple[tuple[int, ...], ...]]] = {
    "feed-forward": (t5_layers._FeedForward, 5, 1, ((24, WIDTH), (WIDTH, 24))),
    "alone": (lambda p: t5_layers._Alone(HEADS, p), 1, 1, (READS, ADDS, (3, 4))),
    "cross-attention": (
        lambda p: t5_layers._CrossAttention(HEADS, PADDING, p),
        2,
        1,
        (READS, ADDS, (3, 5, WIDTH), READS, READS),
    ),
} | {
    f"self-attention, {name}": (
        partial(lambda keep, p: t5_layers._SelfAttention(3, PADDING, p, keep), keep),
        5,
        3,
        (READS, READS, READS, ADDS, (1, HEADS, 5, 5)),
    )
    for name, keep in {"maps kept": True, "maps made again": False}.items()
}


def drawn(kind: str, dtype: torch.dtype) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """A layer of these dropouts inside and outside, and its state and weights."""
    make, tokens, entries, shapes = INNER[kind]
    torch.manual_seed(0)

    def run(inside: float, outside: float, x: Tensor, norm: Tensor, *weights: Tensor) -> Tensor:
        layer = t5_layers._Layer(make(inside), 0.1, outside, entries, 1 + len(weights))
        out: Tensor = t5_layers._Layers.apply([layer], x, norm, *weights)  # type: ignore[no-untyped-call]
        return out

    return run, [torch.randn(shape, dtype=dtype) for shape in ((3, tokens, WIDTH), (WIDTH,), *shapes)]


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("kind", INNER)
def test_gradients_are_those_of_finite_differences(kind: str, dropout: float) -> None:
    """In double precision, and with dropout: the backward pass drops what the forward pass did."""
    run, given = drawn(kind, torch.float64)

    def seeded(*given: Tensor) -> Tensor:
        torch.manual_seed(3)
        return run(dropout, dropout, *given)

    assert torch.autograd.gradcheck(seeded, [tensor.requires_grad_() for tensor in given], fast_mode=True)


@pytest.mark.parametrize("kind", INNER)
def test_dropout_leaves_out_a_share_and_the_mean_as_it_is(kind: str) -> None:
    run, (x, *others) = drawn(kind, torch.float32)
    plain = run(0.0, 0.0, x, *others) - x
    outside = torch.stack([run(0.0, 0.3, x, *others) - x for _ in range(100)])
    assert float((outside.abs() < 1e-4).float().mean()) == pytest.approx(0.3, abs=0.05)
    left = outside.abs() >= 1e-4
    torch.testing.assert_close(outside[left], (plain / 0.7).expand_as(outside)[left], atol=1e-4, rtol=1e-4)
    inside = torch.stack([run(0.3, 0.0, x, *others) - x for _ in range(3000)])  # is multiplied and added up, no more
    assert float((inside.mean(0) - plain).norm() / plain.norm()) < 0.05
    assert float((inside - plain).flatten(1).norm(dim=1).median() / plain.norm()) > 0.2


def test_a_trained_t5_drops_in_training_alone() -> None:
    model, inputs = t5(dropout=0.5), given(12, 1, padded=False)
    t5_layers.install(model)
    outs = [model(**inputs).last_hidden_state for _ in range(2)]
    assert not torch.allclose(*outs)
    outs = [model.eval()(**inputs).last_hidden_state for _ in range(2)]
    assert torch.equal(*outs)


def test_a_token_alone_asks_nothing_and_its_weights_have_gradients_all_the_same() -> None:
    """DDP takes a weight without one for a mistake."""
    model, inputs = t5(), given(12, 1, padded=False)
    t5_layers.install(model)
    model(**inputs).last_hidden_state.sum().backward()
    unasked = model.decoder.block[0].layer[0].SelfAttention
    for weight in (unasked.q.weight, unasked.k.weight, unasked.relative_attention_bias.weight):
        assert torch.equal(weight.grad, torch.zeros_like(weight))
    assert all(parameter.grad is not None for name, parameter in model.named_parameters() if name != "shared.weight")


def times(factor: float, out: Any) -> Any:
    return (factor * out[0], *out[1:]) if isinstance(out, tuple) else factor * out


def hooked(module: nn.Module) -> None:
    module.register_forward_hook(lambda _m, _args, out: times(2, out))


def replaced(module: nn.Module) -> None:
    inner = module.forward
    module.forward = lambda *args, **kwargs: times(3, inner(*args, **kwargs))


def biased(linear: nn.Module) -> None:
    linear.bias = nn.Parameter(torch.ones(linear.weight.shape[0]))  # type: ignore[arg-type, index]


def exchanged(model: Any, path: str) -> None:
    """Another module of the same kind, with other weights."""
    parent, _, name = path.rpartition(".")
    other = copy.deepcopy(model.get_submodule(path))
    for parameter in other.parameters():
        torch.nn.init.constant_(parameter, 0.1)
    setattr(model.get_submodule(parent), name, other)


LINEARS = (
    "encoder.block.0.layer.0.SelfAttention.v",
    "decoder.block.1.layer.0.SelfAttention.o",
    "decoder.block.0.layer.1.EncDecAttention.v",
    "encoder.block.1.layer.1.DenseReluDense.wo",
)
OTHERS = (
    "encoder.block.1.layer.0.layer_norm",
    "decoder.block.0.layer.2.layer_norm",
    "encoder.block.0.layer.1",
    "encoder.block.0.layer.1.DenseReluDense",
    "encoder.block.1.layer.0.SelfAttention",
    "decoder.block.1.layer.1.EncDecAttention",
)


@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize(
    ("path", "change"),
    [
        *((path, change) for path in LINEARS for change in (hooked, replaced, biased)),
        *((path, change) for path in OTHERS for change in (hooked, replaced)),
        ("encoder.block.0.layer.1.DenseReluDense.act", hooked),
        *((path, exchanged) for path in (*LINEARS, *OTHERS, "encoder.block.1.layer")),
    ],
)
def test_what_stands_at_a_module_runs(path: str, change: Callable[..., None], copied: bool) -> None:
    """Also where it came behind, and to a copy."""
    model, inputs = t5(), given(12, 1, padded=False)
    before = model(**inputs).last_hidden_state
    other = copy.deepcopy(model)
    t5_layers.install(other)
    other = copy.deepcopy(other) if copied else other
    for each in (model, other):
        change(each.get_submodule(path)) if change is not exchanged else exchanged(each, path)
    plain = model(**inputs).last_hidden_state
    ours = other(**inputs).last_hidden_state
    torch.testing.assert_close(ours, plain, atol=2e-5, rtol=2e-5)
    assert not torch.allclose(ours, before, atol=1e-3)
    assert nodes(ours).count("_LayersBackward") == 3


@pytest.mark.parametrize("change", [hooked, replaced, exchanged])
@pytest.mark.parametrize("path", ["encoder.final_layer_norm", "decoder.final_layer_norm", "decoder.dropout"])
def test_what_stands_behind_the_blocks_runs(path: str, change: Callable[..., None]) -> None:
    model, inputs = t5(), given(12, 1, padded=True)
    other = copy.deepcopy(model)
    t5_layers.install(other)
    assert nodes(other(**inputs).last_hidden_state).count("_RMSNormBackward") == 2
    for each in (model, other):
        change(each.get_submodule(path)) if change is not exchanged else exchanged(each, path)
    for ours, plain in zip(answer(other, inputs), answer(model, inputs), strict=True):
        torch.testing.assert_close(ours, plain, atol=2e-5, rtol=2e-5)


def test_all_that_a_stack_can_be_asked_for_is_answered() -> None:
    """A mask of the decoder's own, and each block's states."""
    model, inputs = t5(), given(12, 2, padded=True)
    masked = inputs | {"decoder_attention_mask": torch.tensor([[1, 1], [1, 0], [0, 1], [1, 1], [1, 0]])}
    questions = masked, inputs | {"output_hidden_states": True}, inputs | {"return_dict": False}
    plain = [model(**question) for question in questions]
    t5_layers.install(model)
    for question, expected in zip(questions, plain, strict=True):
        ours = model(**question)
        assert type(ours) is type(expected)
        torch.testing.assert_close(ours, expected, atol=2e-5, rtol=2e-5)  # all that they hold


@pytest.mark.parametrize("how", ["double", "bfloat16", "autocast"])
def test_another_precision_is_left_to_transformers(how: str) -> None:
    model, inputs = t5(), given(12, 2, padded=True)
    if how != "autocast":
        dtype = getattr(torch, how if how == "bfloat16" else "float64")
        model.to(dtype)
        inputs = {name: value.to(dtype) if name.endswith("embeds") else value for name, value in inputs.items()}
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        plain = model(**inputs).last_hidden_state
        t5_layers.install(model)
        ours = model(**inputs).last_hidden_state
    assert torch.equal(ours, plain)


def test_a_decoder_that_keeps_what_it_attended_to_is_left_to_transformers() -> None:
    model, inputs = t5(), given(12, 2, padded=True) | {"use_cache": True}
    plain = model(**inputs)
    t5_layers.install(model)
    ours = model(**inputs)
    assert ours.past_key_values.get_seq_length() == plain.past_key_values.get_seq_length() == 2
    torch.testing.assert_close(ours.last_hidden_state, plain.last_hidden_state, atol=2e-5, rtol=2e-5)
    assert nodes(ours.last_hidden_state).count("_LayersBackward") == 2  # the encoder's


def test_a_second_derivative_is_refused_and_not_wrong() -> None:
    model, inputs = t5(keep=True), given(12, 1, padded=False)
    t5_layers.install(model)
    out = model(**inputs).last_hidden_state
    (first,) = torch.autograd.grad(out.square().sum(), inputs["inputs_embeds"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_a_copy_has_weights_of_its_own() -> None:
    model, inputs = t5(), given(12, 1, padded=False)
    t5_layers.install(model)
    other = copy.deepcopy(model)
    for layer in layers(other):
        torch.nn.init.zeros_(layer.layer_norm.weight)
    before = model(**inputs).last_hidden_state
    assert torch.isfinite(before).all()
    out = other.encoder(inputs_embeds=inputs["inputs_embeds"]).last_hidden_state
    torch.testing.assert_close(out, other.encoder.final_layer_norm(inputs["inputs_embeds"]))  # nothing was added
    assert torch.equal(model(**inputs).last_hidden_state, before)


def test_a_side_network_runs_all_its_blocks_this_way() -> None:
    """Its decoder too, in which another forward stands for good."""
    trunk = Seq2SeqStacks(t5(), FAMILIES["t5"]).shrunk(2, ([0, 1], [0, 1]))
    texts = {
        "input_ids": torch.zeros(5, 12, dtype=torch.long),
        "decoder_input_ids": torch.zeros(5, 1, dtype=torch.long),
    }
    inputs = trunk.inputs_like(texts | {"attention_mask": torch.ones(5, 12)})
    out = trunk.run_at(inputs, torch.zeros(5, dtype=torch.long))
    assert nodes(out).count("_LayersBackward") == 4
