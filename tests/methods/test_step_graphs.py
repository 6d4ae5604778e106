"""Captured training steps compared with eager ones. A tape plays the graphs on a CPU, by the rules of a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.utils._python_dispatch import _disable_current_modes
from transformers import masking_utils

from lit_spu.backbones import activation_cache
from lit_spu.callbacks.latency import Latency
from lit_spu.callbacks.memory import Memory
from lit_spu.callbacks.policies import LossEMA
from lit_spu.callbacks.selective_update import SelectiveUpdate
from lit_spu.data.batching import Examples
from lit_spu.data.text import Tokens
from lit_spu.measure import Launches
from lit_spu.methods import step_graphs
from lit_spu.methods.base import Method
from lit_spu.methods.shared_trunk import SharedTrunk
from lit_spu.methods.step_graphs import CapturedSteps, Graphs
from tests.runs import METHODS, fit, made
from tests.tape import Tape, record

FIRST_ORDER = [name for name in METHODS if not name.startswith("mezo")]

Tiny = Callable[[str], str]


class Losses(Callback):
    """Notes the losses of a run."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any) -> None:
        self.losses.append(float(outputs["loss"]) if outputs else 0.0)  # a policy may skip the step


class Capture(Losses):
    """Plays the steps of a run on tapes."""

    graphs: Graphs

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, Method)
        self.graphs = pl_module.graphs = Graphs(pl_module, record)


class FreezeLater(Callback):
    """Freezes the embeddings and the lowest block in the third epoch."""

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, Method)
        if trainer.current_epoch == 2:
            for parameter in [p for depth in pl_module.parameters_by_depth[:2] for p in depth]:
                parameter.requires_grad_(False)


@pytest.fixture(autouse=True)
def capturing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let nothing look at the values of a mask or at tokens, as under capture, and pad batches as on CUDA."""
    monkeypatch.setattr(activation_cache, "_is_on_host", lambda _: False)
    monkeypatch.setattr(masking_utils, "is_tracing", lambda *_: True)
    monkeypatch.setattr(CapturedSteps, "length_multiple", 8)


def compare(config: str, backbone: str, folder: Path, *callbacks: Callable[[], Callback], **settings: Any) -> Graphs:
    """Train eagerly and with graphs, compare losses and weights, and return the graphs."""
    trainer_settings = {"max_epochs": 4} | settings.pop("trainer", {})
    found = []
    for capture in (Losses(), Capture()):
        method = made(config, backbone, **{"gradient_checkpointing": False, **settings})
        fit(method, folder, capture, *(make() for make in callbacks), **trainer_settings)
        found.append((capture, list(method.parameters())))
    (eager, eager_weights), (captured, weights) = found
    torch.testing.assert_close(captured.losses, eager.losses, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(weights, eager_weights, rtol=1e-5, atol=1e-6)
    assert isinstance(captured, Capture)
    return captured.graphs


@pytest.mark.slow
@pytest.mark.parametrize("config", FIRST_ORDER)
def test_every_method_is_captured(config: str, tmp_path: Path) -> None:
    graphs = compare(config, "mini-bert", tmp_path)
    if config == "lr_distillation":
        assert graphs.obstacle == "LRDistillation has its own kind of step"
    else:
        assert graphs.obstacle is None
        assert graphs.num_replays == 13  # of 16 steps, of three lengths


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings", [{"noise": "gaussian"}, {"noise": "low_rank", "directions": 2, "weight_decay": 0.1}]
)
def test_evaluations_and_updates_of_mezo_are_captured(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each evaluation and the update is a replay, with the noise of its own step."""
    monkeypatch.setattr("lit_spu.optim.noise.SMALL_DRAWS", ())  # as on CUDA
    graphs = compare("mezo", "mini-bert", tmp_path, **{"lr": 1e-3, "directions": 1, **settings})
    assert graphs.obstacle is None
    directions = settings.get("directions", 1)
    assert graphs.num_replays == 16 * (2 * directions + 1) - 2 * 2  # the first of each of two lengths are eager


@pytest.mark.slow
def test_steps_of_mezo_that_differ_are_eager(tmp_path: Path) -> None:
    for config, settings, reason in (
        ("mezo_side", {}, "MeZOSide has its own kind of step"),
        ("mezo_bitfit", {"share": 0.5}, "each step draws other weights (model.share)"),
    ):
        graphs = compare(config, "mini-bert", tmp_path / config, trainer={"max_epochs": 1}, **settings)
        assert graphs.obstacle == reason
        assert graphs.num_replays == 0


@pytest.mark.slow
@pytest.mark.parametrize("family", ["t5", "gpt2", "llama"])
@pytest.mark.parametrize("config", ["full", "lora", "kladder", "side_lora"])
def test_families_are_captured(config: str, family: str, tiny: Tiny, tmp_path: Path) -> None:
    assert compare(config, tiny(family), tmp_path).num_replays > 8


def test_masks_of_dropout_are_drawn_in_each_replay(tmp_path: Path) -> None:
    graphs = compare("lora", "mini-bert", tmp_path, dropout=0.3)
    assert graphs.num_replays == 13


@pytest.mark.slow
def test_a_step_is_captured_anew_when_other_weights_are_trained(tmp_path: Path) -> None:
    graphs = compare("full", "mini-bert", tmp_path, FreezeLater)
    assert 8 <= graphs.num_replays < 13  # the first step of each length is eager again


@pytest.mark.slow
def test_clipped_gradients_and_a_weight_without_gradient(tmp_path: Path) -> None:
    compare("lst", "mini-bert", tmp_path, trainer={"gradient_clip_val": 0.01})


def test_steps_on_cached_states_are_captured(tmp_path: Path) -> None:
    graphs = compare("lst", "mini-bert", tmp_path, activation_cache="memory")
    assert graphs.obstacle is None
    assert graphs.num_replays == 9  # of 12 steps after the first epoch, of three lengths


def test_few_launches_remain_outside_of_a_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One copies the batch, one replays, and the others are Lightning's, the log's and the optimizer's."""
    counts: list[tuple[Launches, int]] = []

    class Count(Capture):
        def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
            self.before = self.graphs.num_replays
            self.launches = Launches(trainer.optimizers).__enter__()

        def on_train_batch_end(self, *args: Any) -> None:
            self.launches.__exit__(None, None, None)
            counts.append((self.launches, self.graphs.num_replays - self.before))
            super().on_train_batch_end(*args)

    def replay(tape: Tape) -> None:
        with _disable_current_modes():  # the operators of a replay are one launch
            original(tape)

    original = Tape.replay
    monkeypatch.setattr(Tape, "replay", replay)
    monkeypatch.setattr(step_graphs, "is_in_torch_dispatch_mode", lambda: False)
    fit(made("lora", "mini-bert"), tmp_path, Count(), max_epochs=4, log_every_n_steps=100)
    for launches, replays in counts[12:15]:  # all lengths are captured, and the last step of the epoch logs
        assert replays == 1
        assert launches.total + 1 <= 10
        # on one CPU, a loss is read at once
        assert all(place.startswith("lit_spu/methods/finite.py") for place in launches.waits), launches.waits
        assert not launches.host_copies


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "trainer", "callbacks", "reason"),
    [
        ({"gradient_checkpointing": True}, {}, [], "blocks are recomputed"),
        ({}, {"accumulate_grad_batches": 2}, [], "gradients are accumulated"),
        ({}, {}, [lambda: SelectiveUpdate(policy=LossEMA())], "a callback wraps the training step"),
    ],
)
def test_steps_that_cannot_be_captured_run_as_usual(
    tmp_path: Path, settings: dict[str, Any], trainer: dict[str, Any], callbacks: list[Any], reason: str
) -> None:
    graphs = compare("full", "mini-bert", tmp_path, *callbacks, trainer={"max_epochs": 2} | trainer, **settings)
    assert graphs.num_replays == 0
    assert str(graphs.obstacle).startswith(reason)


@pytest.mark.slow
def test_a_hook_of_the_user_turns_graphs_off(tmp_path: Path) -> None:
    calls: list[int] = []
    method = made("head", "mini-bert")
    method.backbone.blocks[1].register_forward_hook(lambda *_: calls.append(1))
    fit(method, tmp_path, capture := Capture(), max_epochs=3)
    assert capture.graphs.num_replays == 0
    assert "layer.1 has a hook" in str(capture.graphs.obstacle)
    assert len(calls) == 18  # twelve steps, and two batches of each validation


def test_a_step_that_needs_a_value_turns_graphs_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    method = made("head", "mini-bert")
    loss = method.loss

    def needs_a_value(batch: Any) -> torch.Tensor:
        result = loss(batch)
        return result * (1 + (result.item() > 1e9))

    monkeypatch.setattr(method, "loss", needs_a_value)
    fit(method, tmp_path, capture := Capture(), max_epochs=3)
    assert capture.graphs.num_replays == 0
    assert "cannot be captured" in str(capture.graphs.obstacle)


@pytest.mark.slow
def test_a_counted_step_runs_eagerly(tmp_path: Path) -> None:
    """Live bytes are counted at each operator, which a replay would hide."""
    counted = []
    for capture in (Losses(), Capture()):
        memory = Memory()
        method = made("full", "mini-bert", gradient_checkpointing=False)
        fit(method, tmp_path, capture, memory, max_epochs=3)
        counted.append(memory.summary["memory/live_peak_mib"])
    assert counted[0] == counted[1]


@pytest.mark.slow
def test_passes_of_replays_are_counted_and_not_timed(tmp_path: Path) -> None:
    latency = Latency(warmup=0)
    fit(made("head", "mini-bert"), tmp_path, capture := Capture(), latency, max_epochs=3)
    assert latency.summary["passes/forward"] == latency.summary["passes/backward"] == 12
    num_eager = 12 - capture.graphs.num_replays
    assert len(latency._durations["forward"].seconds) == num_eager
    assert len(latency._durations["step"].seconds) == 12


def test_batches_are_padded_to_a_multiple() -> None:
    lengths = [3, 9, 13]
    starts = torch.tensor([0, *lengths]).cumsum(0).numpy()
    tokens = Tokens(torch.arange(25, dtype=torch.int32).numpy(), starts, None)
    examples = Examples(tokens, [0, 1, 0], pad_id=99, length_multiple=8)
    assert [examples[[i]]["input_ids"].shape[1] for i in range(3)] == [8, 13, 13]  # 16 is longer than any text
    first = examples[[0]]
    assert first["input_ids"].tolist() == [[0, 1, 2, 99, 99, 99, 99, 99]]
    assert first["attention_mask"].sum() == 3


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:This run is resumed with")
def test_a_run_resumed_within_an_epoch_has_the_same_obstacles(tmp_path: Path) -> None:
    accumulating: dict[str, Any] = {"accumulate_grad_batches": 2, "limit_val_batches": 0}
    first = fit(made("full", "mini-bert"), tmp_path, max_steps=3, max_epochs=-1, **accumulating)
    first.save_checkpoint(middle := tmp_path / "middle.ckpt")
    capture = Capture()
    fit(made("full", "mini-bert"), tmp_path, capture, ckpt_path=middle, max_epochs=4, **accumulating)
    assert capture.graphs.num_replays == 0
    assert "accumulated" in str(capture.graphs.obstacle)


@pytest.mark.slow
def test_siblings_that_draw_their_own_dropout_are_not_captured(tmp_path: Path) -> None:
    siblings = {"a": {"lr": 1e-3}, "b": {"lr": 3e-3}}
    found = []
    for capture in (Losses(), Capture()):
        torch.manual_seed(0)
        method = SharedTrunk(siblings, settings={"hidden_state_dropout": 0.3}, backbone="mini-bert")
        fit(method, tmp_path, capture, max_epochs=3)
        found.append(capture.losses)
        if isinstance(capture, Capture):
            assert "sets the random seed" in str(capture.graphs.obstacle)
    assert found[0] == found[1]


@pytest.mark.slow
def test_evaluation_mode_in_the_middle_of_a_run(tmp_path: Path) -> None:
    class EvaluateLater(Callback):
        def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            pl_module.train(trainer.current_epoch < 2)

    compare("lora", "mini-bert", tmp_path, EvaluateLater, dropout=0.3)


@pytest.mark.slow
def test_a_hook_added_later_is_called(tmp_path: Path) -> None:
    class HookLater(Callback):
        def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            assert isinstance(pl_module, Method)
            if trainer.current_epoch == 2:
                pl_module.backbone.blocks[1].register_forward_hook(lambda module, args, output: output * 0.5)

    compare("head", "mini-bert", tmp_path, HookLater)


def test_a_batch_of_more_than_tensors_is_not_captured() -> None:
    method = made("head", "mini-bert")
    graphs = Graphs(method, record)
    assert graphs.copy_batch({"labels": torch.zeros(2), "id": ["a", "b"]}) is None  # type: ignore[dict-item]
    assert graphs.obstacle


def test_gradients_are_those_of_the_first_graph(tmp_path: Path) -> None:
    """One set of gradients serves all lengths, and an eager step's is not kept."""
    capture = Capture()
    method = made("full", "mini-bert", gradient_checkpointing=False)
    fit(method, tmp_path, capture, max_epochs=4)
    assert method._gradients is None
    copies = [
        sum(func is torch.ops.aten._foreach_copy_.default for func, *_ in captured.graph.operators)  # type: ignore[attr-defined]
        for captured in capture.graphs._captured.values()
        if captured
    ]
    assert sorted(copies) == [0, 1, 1]
