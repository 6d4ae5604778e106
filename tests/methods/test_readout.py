"""Read-outs, alone, with tuned blocks and with a ladder."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything
from torch import Tensor

from lit_spu.data.glue import GLUE
from lit_spu.errors import UserError
from lit_spu.methods.kladder import KLadder
from lit_spu.methods.readout import LinearReadOut
from lit_spu.methods.shared_trunk import SharedTrunk
from tests.conftest import FAMILIES, encode

Tiny = Callable[[str], str]
Run = Callable[..., Trainer]

WIDE = {"limit_train": 40, "limit_validation": 20, "batch_size": 8}
VARIANTS: dict[str, dict[str, Any]] = {
    "readout": {},
    "last": {"blocks": "last", "tokens": "answer"},
    "top 1": {"layers": 1},
    "top 2": {"layers": 2, "blocks": "all"},
    "ladder": {"k": 1, "reduction": 2},
    "ladder, top 2": {"k": 0, "layers": 2, "reduction": 2},
}


def make(backbone: str = "mini-bert", **settings: Any) -> LinearReadOut:
    torch.manual_seed(0)
    return (KLadder if "k" in settings else LinearReadOut)(backbone=backbone, **settings)


def randomise(readout: Any) -> None:
    torch.manual_seed(3)
    for parameter in readout.parameters():
        torch.nn.init.normal_(parameter)


@torch.no_grad()
@pytest.mark.parametrize("settings", [*VARIANTS.values()][:4], ids=[*VARIANTS][:4])
@pytest.mark.parametrize("family", FAMILIES)
def test_it_starts_as_the_readout(tiny: Tiny, family: str, settings: dict[str, Any]) -> None:
    """Equal to the bit to W·features of the whole backbone's states, the last one as the base model returns it."""
    method = make(tiny(family), **settings).eval()
    batch = encode(method.backbone)
    assert not method(batch).any()
    randomise(method.readout)
    states = method.backbone.hidden_states(batch)[-1]
    base_model = method.backbone.base_model
    if family == "opt-projected":  # its last hidden state is projected to another width after the norm
        last = base_model.model.decoder.final_layer_norm(states.blocks[-1])
    else:
        last = base_model.forward(method.backbone.model_inputs(batch))
    states = states._replace(blocks=(*states.blocks[:-1], last))
    features = method.readout.features(states, method.backbone.answer_position(batch))
    assert torch.equal(method(batch), method.readout(features))
    torch.testing.assert_close(method(encode(method.backbone, pad_to=20)), method(batch), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["bert", "t5", "llama"])
@pytest.mark.parametrize("layers", [0, 1, 3])
@pytest.mark.parametrize("ladder", [{}, {"k": 1, "reduction": 2}], ids=["", "ladder"])
def test_the_gradient_enters_the_tuned_blocks_only(
    tiny: Tiny, family: str, layers: int, ladder: dict[str, Any]
) -> None:
    method = make(tiny(family), blocks="all", layers=layers, **ladder).train()
    for module in method.modules():
        if hasattr(module, "linear"):
            randomise(module)
    entered: list[int] = []
    for number, block in enumerate(method.backbone.blocks):
        block.register_forward_hook(lambda _m, _i, out, n=number: _note(out, n, entered))
    method.loss(encode(method.backbone)).backward()
    depth = len(method.backbone.blocks)
    assert set(entered) == set(range(depth - layers, depth))
    trained = {name: p for name, p in method.named_parameters() if p.requires_grad}
    assert {name for name, p in method.named_parameters() if p.grad is not None} == trained.keys()
    head = {id(p) for p in method.backbone.head_modules.parameters()} if ladder else set()
    assert not any(name.startswith("backbone.") for name, p in trained.items() if id(p) not in head)


def _note(output: Any, number: int, entered: list[int]) -> None:
    state: Tensor = output[0] if isinstance(output, tuple) else output
    if state.requires_grad:
        entered.append(number)


@pytest.mark.parametrize(
    ("backbone", "kind"),
    [
        pytest.param("mini-bert", "ladder, top 2", marks=pytest.mark.slow),
        *(
            pytest.param(backbone, kind, marks=pytest.mark.slow)
            for backbone, kind in product(("mini-bert", "mini-t5"), ("readout", "top 1", "ladder"))
        ),
    ],
)
def test_cached_is_uncached_to_the_bit(data: Callable[..., GLUE], fit: Run, backbone: str, kind: str) -> None:
    ends = []
    for cache in (None, "memory"):
        method = make(backbone, lr=1e-2, activation_cache=cache, **VARIANTS[kind])
        scores = fit(method, data(same_batches=True, **WIDE), max_epochs=2).callback_metrics
        ends.append({name: p for name, p in method.named_parameters() if p.requires_grad} | scores)
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


@pytest.mark.slow
def test_a_fitted_readout_stays_if_its_rate_is_zero(data: Callable[..., GLUE], fit: Run) -> None:
    module = data(**WIDE)
    fitted = make(fit_readout=True, readout_lr=0.0)
    fit(fitted, module)
    before = make(fit_readout=True)
    module.setup("fit")
    before._fit_readout(module.draw(None, 32))
    assert before.readout.linear.weight.any()
    torch.testing.assert_close(fitted.readout.linear.weight, before.readout.linear.weight)
    ladder = make(k=0, reduction=4, fit_readout=True, readout_lr=0.0)
    fit(ladder, module)
    torch.testing.assert_close(ladder.readout.linear.weight, before.readout.linear.weight)


def test_the_readout_has_a_rate_of_its_own() -> None:
    method = make(k=0, reduction=4, layers=1, lr=1e-3, readout_lr=1e-2, weight_decay=0.1)
    groups = method.parameter_groups()
    assert groups[0]["lr"] == 1e-3  # the one that is logged
    rates = {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    names = {name: rates[id(p)] for name, p in method.named_parameters() if p.requires_grad}
    assert names["readout.linear.weight"] == (1e-2, 0.1)
    assert names["readout.linear.bias"] == (1e-2, 0.0)
    assert {rate for name, (rate, _) in names.items() if not name.startswith("readout.")} == {1e-3}


def test_a_readout_that_is_not_trained_has_no_dropout() -> None:
    assert make(dropout=0.3).readout.dropout.p == 0.3
    assert make(dropout=0.3, readout_lr=0.0).readout.dropout.p == 0.0


def test_only_what_is_read_is_computed_and_kept(tiny: Tiny) -> None:
    method = make(tiny("bert"), blocks=[1], tokens="answer")
    (states,) = method.hidden_states(encode(method.backbone))
    assert [state is not None for state in states.blocks] == [False, True, False, False]
    (wanted,) = make(tiny("bert"), blocks=[0, 3], layers=1).wanted_states()
    assert wanted == {1, 3}  # the output of block 0, and that of block 2, which block 3 reads
    encoder, decoder = make(tiny("t5"), blocks="last", layers=1).wanted_states()
    assert (encoder, decoder) == ({4}, {3})


def test_tuned_blocks_that_nothing_reads_are_refused(tiny: Tiny) -> None:
    with pytest.raises(UserError, match=r"model.layers=2: the read-out does not read the last block.*Add 3 to model"):
        make(tiny("bert"), blocks=[0, 2], layers=2)
    make(tiny("bert"), blocks=[0], layers=2, k=0, reduction=2)  # the ladder reads all blocks
    with pytest.raises(UserError, match=r"model.layers=1: the read-out does not read the last block"):
        make(tiny("bert"), blocks=[0], layers=1, k=0, reduction=2, drop_layers=[3])


@pytest.mark.parametrize("settings", [{}, {"layers": 1}, {"k": 0, "reduction": 2}])
def test_a_cached_batch_may_be_padded_beyond_its_longest_text(tiny: Tiny, settings: dict[str, Any]) -> None:
    method = make(tiny("bert"), **settings).eval()
    randomise(method.readout)
    longer = encode(method.backbone, pad_to=20)
    with torch.no_grad():
        expected = method(longer)
        method.cache = method.make_cache()
        torch.testing.assert_close(method(longer), expected)
        torch.testing.assert_close(method(encode(method.backbone)), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_siblings_with_tuned_blocks_become_what_they_become_alone(data: Callable[..., GLUE], fit: Run) -> None:
    siblings: dict[str, dict[str, Any]] = {"plain": {}, "tuned": {"layers": 1}}
    seed_everything(3, verbose=False)
    shared = SharedTrunk(siblings, side="LinearReadOut", settings={"lr": 1e-2, "fit_readout": True})
    fit(shared, data(**WIDE), max_epochs=2)
    for name, own in siblings.items():
        seed_everything(3, verbose=False)
        alone = LinearReadOut(lr=1e-2, fit_readout=True, **own)
        fit(alone, data(**WIDE), max_epochs=2)
        trained = dict(shared.siblings[name].named_parameters())
        for key, parameter in alone.named_parameters():
            if parameter.requires_grad:
                torch.testing.assert_close(parameter, trained[key])


@pytest.mark.slow
def test_a_number_is_fitted_by_ridge_regression(data: Callable[..., GLUE], fit: Run) -> None:
    method = make(task="stsb", fit_readout=True, readout_lr=0.0)
    scores = fit(method, data("stsb", limit_train=400, limit_validation=50), max_epochs=1).callback_metrics
    assert scores["val/pearson"] > 0.3
