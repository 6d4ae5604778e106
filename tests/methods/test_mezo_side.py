"""MeZO over a ladder: how often the backbone runs, and what is learnt."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer

from lit_spu.backbones import Batch
from lit_spu.data.glue import GLUE
from lit_spu.errors import UserError
from lit_spu.methods.ladder import LadderSideTuning
from lit_spu.methods.mezo_side import MeZOSide
from lit_spu.optim.mezo import MeZOOptimizer
from tests.conftest import encode

Run = Callable[..., Trainer]


def runs_of(method: MeZOSide, batch: Batch, monkeypatch: pytest.MonkeyPatch) -> int:
    """Return the number of times that a step runs the backbone."""
    runs, hidden_states = [], method.backbone.hidden_states
    monkeypatch.setattr(method.backbone, "hidden_states", lambda *given: runs.append(1) or hidden_states(*given))  # type: ignore[func-returns-value]
    method.take_step(batch, MeZOOptimizer(method.perturbed_parameters(), directions=16, lr=1e-3))
    return len(runs)


def test_one_pass_of_the_backbone_serves_all_directions(monkeypatch: pytest.MonkeyPatch) -> None:
    method = MeZOSide(reduction=4).eval()
    before = {name: p.detach().clone() for name, p in method.named_parameters()}
    assert runs_of(method, encode(method.backbone), monkeypatch) == 1
    moved = {name for name, p in method.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if name.startswith("side.")}


def test_with_a_cache_none_does(data: Callable[..., GLUE], fit: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    method, runs = MeZOSide(reduction=4, activation_cache="memory", lr=1e-3, directions=4), []
    hidden_states = method.backbone.hidden_states
    monkeypatch.setattr(method.backbone, "hidden_states", lambda *given: runs.append(1) or hidden_states(*given))  # type: ignore[func-returns-value]
    fit(method, data(), limit_val_batches=0, num_sanity_val_steps=0, max_epochs=3)
    assert len(runs) == 4  # the batches of the first epoch


def test_a_step_is_that_of_the_plain_loss(data: Callable[..., GLUE]) -> None:
    """As if the backbone ran each time, to the bit."""
    ends = []
    for once in (True, False):
        torch.manual_seed(0)
        method = MeZOSide(reduction=4).eval()
        optimizer, batch = MeZOOptimizer(method.perturbed_parameters(), directions=3, lr=1e-2), encode(method.backbone)
        if once:
            method.take_step(batch, optimizer)
        else:
            optimizer.step(lambda: method.loss(batch))  # noqa: B023
        ends.append(method.side.state_dict())
    assert all(torch.equal(tensor, ends[1][name]) for name, tensor in ends[0].items())


def test_it_goes_on_from_a_ladder_that_gradients_trained(data: Callable[..., GLUE], fit: Run, tmp_path: Path) -> None:
    """With the task's metric as the objective, which has none."""
    ladder = LadderSideTuning(reduction=4, head="prompt", k=0, lr=3e-3)
    fit(ladder, data(limit_train=256), max_epochs=2).save_checkpoint(tmp_path / "ladder.ckpt")
    settings = {"reduction": 4, "k": 0, "objective": "accuracy", "weights": str(tmp_path / "ladder.ckpt")}
    method = MeZOSide(**settings)
    method.lr = 0.0  # no step moves a weight
    fit(method, data())
    learnt = ladder.side.state_dict()
    assert all(torch.equal(tensor, learnt[name]) for name, tensor in method.side.state_dict().items())
    with pytest.raises(UserError, match="was not made by MeZOSide with these settings"):
        fit(MeZOSide(**{**settings, "k": 1}), data())
    (tmp_path / "text.ckpt").write_text("nothing")
    with pytest.raises(UserError, match="is not the checkpoint"):
        fit(MeZOSide(**{**settings, "weights": str(tmp_path / "text.ckpt")}), data())


def test_initial_weights_of_another_tasks_head_are_refused(tmp_path: Path) -> None:
    """Its labels are as many, and mean something else."""
    from lit_spu.export import writers
    from lit_spu.methods.mezo_lora import MeZOLoRA

    writers.write_trained_weights(MeZOLoRA(task="mrpc", head="classifier"), tmp_path)
    method = MeZOLoRA(task="sst2", head="classifier", weights=str(tmp_path))
    with pytest.raises(UserError, match=r"model\.weights: .* was trained for mrpc, whose labels are not_equivalent"):
        method._load_initial_weights()
    MeZOLoRA(task="mrpc", head="classifier", weights=str(tmp_path))._load_initial_weights()
