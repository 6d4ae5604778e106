"""MeZO in the Trainer: no gradients, no dropout, one step a batch, and what it resumes to."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger

import lit_spu
from lit_spu.__main__ import main
from lit_spu.checkpoints.fingerprint import checksum
from lit_spu.data.glue import GLUE
from lit_spu.errors import NonFiniteError, UserError
from lit_spu.measure.saved import SavedForBackward
from lit_spu.methods.mezo import MeZO
from lit_spu.optim.trajectory import Trajectory
from tests.conftest import encode
from tests.ddp import run
from tests.runs import same, weights

Run = Callable[..., Trainer]
Tiny = Callable[[str], str]
CONFIG = Path(__file__).parents[2] / "configs" / "mezo.yaml"


class Rates(Callback):
    """The learning rate of every step."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self.seen.append(float(trainer.callback_metrics["lr"]))


def test_a_step_is_the_optimizers_and_keeps_nothing(data: Callable[..., GLUE], fit: Run) -> None:
    """Training is the optimizer's step on each batch, to the bit, with the loss in evaluation mode and no graph."""
    torch.manual_seed(0)
    method, small = MeZO(lr=1e-3), data()
    twin = MeZO(lr=1e-3)
    twin.load_state_dict(method.state_dict())
    seed, batches = torch.initial_seed(), []

    class Watch(Callback):
        def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, *args: Any) -> None:
            batches.append(batch)

    with SavedForBackward() as saved:
        trainer = fit(method, small, Watch())
    assert len(saved) == 0
    assert trainer.global_step == len(batches) == 4
    optimizer = twin.make_optimizer(seed=seed)
    twin.eval()
    for batch in batches:
        optimizer.step(lambda batch=batch: twin.loss(batch), num_examples=8)  # type: ignore[misc]
    assert all(torch.equal(p, twin.get_parameter(name)) for name, p in method.named_parameters())
    assert all(p.grad is None for p in method.parameters())


def test_dropout_is_off_also_in_training() -> None:
    method = MeZO().train()
    assert any(isinstance(module, torch.nn.Dropout) and module.p for module in method.modules())
    assert not any(module.training for module in method.modules())


def test_a_resumed_run_is_the_uninterrupted_one(data: Callable[..., GLUE], fit: Run, tmp_path: Path) -> None:
    weights = []
    for stopped in (False, True):
        torch.manual_seed(0)
        method = MeZO(lr=1e-3, directions=2)
        if stopped:
            fit(method, data()).save_checkpoint(tmp_path / "stopped.ckpt")
            torch.manual_seed(0)
            method = MeZO(lr=1e-3, directions=2)
        fit(method, data(), max_epochs=2, ckpt_path=tmp_path / "stopped.ckpt" if stopped else None)
        weights.append(method.state_dict())
    same = {name: torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items()}
    assert all(same.values())


@pytest.mark.parametrize(("schedule", "rates"), [("constant", [0.1] * 4), ("linear", [0.1, 0.075, 0.05, 0.025])])
def test_the_rate_is_constant_or_falls(data: Callable[..., GLUE], fit: Run, schedule: Any, rates: list[float]) -> None:
    watch = Rates()
    fit(MeZO(lr=0.1, schedule=schedule, warmup=0.0), data(), watch)
    assert watch.seen == pytest.approx(rates)


@pytest.mark.parametrize("setting", [{"gradient_clip_val": 1.0}, {"accumulate_grad_batches": 2}])
def test_what_has_no_meaning_without_gradients_is_refused(
    data: Callable[..., GLUE], fit: Run, setting: dict[str, Any]
) -> None:
    with pytest.raises(MisconfigurationException, match="manual optimization"):
        fit(MeZO(), data(), **setting)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"optimizer": "adafactor"}, "MeZO is the optimizer"),
        ({"objective": "acuracy"}, "Did you mean accuracy"),
        ({"rows": "seen", "trajectory": "there"}, "Use rows=all"),
    ],
)
def test_settings_that_cannot_be_are_refused(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        MeZO(**wrong)


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({"precision": "16-mixed"}, r"trainer\.precision=16-mixed: MeZO computes no gradients, and its scaler"),
        ({"strategy": "FSDPStrategy"}, "ddp exchanges three numbers per step"),
        ({"strategy": "deepspeed_stage_2"}, "each device must hold all weights"),
        ({"gradient_clip_val": 1.0}, "--model.normalize"),
        ({"accumulate_grad_batches": 4}, "larger --data.batch_size"),
    ],
)
def test_a_trainer_that_cannot_be_is_refused_before_a_model_is_loaded(setting: dict[str, Any], said: str) -> None:
    MeZO.check_trainer({"precision": "16-true", "strategy": "ddp", "gradient_clip_val": None})
    with pytest.raises(UserError, match=said):
        MeZO.check_trainer(setting)


def test_the_command_line_refuses_it_too_and_loads_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(MeZO, "__init__", lambda *_, **__: pytest.fail("made"))
    given = ["fit", "--model=MeZO", "--trainer.accumulate_grad_batches=2", f"--run_dir={tmp_path}"]
    with pytest.raises(SystemExit):
        main(given)
    assert "trainer.accumulate_grad_batches=2" in capsys.readouterr().err


# -- the objective -----------------------------------------------------------------------------------------------------


def test_a_metric_is_an_objective(tiny: Tiny) -> None:
    """1 − accuracy of the batch, as it is counted by hand; a label that is always answered has no correlation."""
    method = MeZO(backbone=tiny("bert"), objective="accuracy").eval()
    scores = torch.tensor([[2.0, 1.0], [0.0, 1.0], [3.0, 0.0], [1.0, 0.0]])
    labels = {"labels": torch.tensor([0, 1, 1, 1])}
    assert float(method.objective_from(scores, labels)) == 0.5
    cola = MeZO(backbone=tiny("bert"), task="cola", objective="matthews", head="classifier").eval()
    assert float(cola.objective_from(torch.tensor([[1.0, 0.0]] * 4), labels)) == 1.0
    batch = encode(method.backbone)
    assert float(method.objective_value(batch)) == 1 - float(
        (method(batch).argmax(-1) == batch["labels"]).float().mean()
    )


@pytest.mark.slow
def test_accuracy_itself_is_learnt(data: Callable[..., GLUE], fit: Run) -> None:
    """Its slope is zero or large; over a few steps of many directions it points uphill all the same."""
    torch.manual_seed(0)
    method, small = MeZO(objective="accuracy", lr=2e-4, epsilon=1e-2, directions=8), data(limit_train=64, batch_size=64)
    losses: list[float] = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
            losses.append(float(trainer.callback_metrics["train/loss"]))

    fit(method, small, Watch(), max_epochs=12)
    assert sum(losses[-3:]) < sum(losses[:3])


# -- before training ---------------------------------------------------------------------------------------------------


def test_the_zero_shot_score_is_told_and_that_of_validation(data: Callable[..., GLUE], fit: Run) -> None:
    method, small = MeZO(), data(limit_validation=100)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Before training")
        trainer = fit(method, small, num_sanity_val_steps=-1, max_steps=1)
    score, calibrated = (float(trainer.callback_metrics[f"zero_shot/accuracy{end}"]) for end in ("", "_calibrated"))
    validated = trainer.validate(MeZO(), small, verbose=False)[0]
    assert {"val/accuracy": score, "val/accuracy_calibrated": calibrated}.items() <= validated.items()
    assert score > 0.7


def test_one_at_chance_is_warned_of(data: Callable[..., GLUE], fit: Run) -> None:
    """A language-model head that was not loaded is the known trap."""
    method = MeZO()
    torch.nn.init.zeros_(method.backbone.model.get_submodule("cls").predictions.transform.dense.weight)
    with pytest.warns(
        UserWarning,
        match=r"Before training, accuracy is .* a constant answer has .* Check that the language-model head",
    ):
        fit(method, data(limit_validation=100), num_sanity_val_steps=-1, max_steps=1)


def test_a_part_of_the_validation_set_says_nothing(data: Callable[..., GLUE], fit: Run) -> None:
    trainer = fit(MeZO(), data(limit_validation=100), num_sanity_val_steps=2, max_steps=1)
    assert "zero_shot/accuracy" not in trainer.callback_metrics


# -- the trajectory ----------------------------------------------------------------------------------------------------


def trained_by(fit: Run, data: Callable[..., GLUE], folder: Path, **settings: Any) -> tuple[MeZO, Trainer]:
    torch.manual_seed(3)
    epochs = settings.pop("max_epochs", 2)
    method = MeZO(**{"lr": 1e-3, **settings})
    return method, fit(method, data(), max_epochs=epochs, **into(folder))


def into(folder: Path) -> dict[str, Any]:
    """Settings of a trainer that writes there."""
    return {"logger": CSVLogger(folder, name="", version=""), "log_every_n_steps": 1}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"noise": "low_rank", "directions": 2, "schedule": "linear"},
        {"weight_decay": 0.1, "share": 0.5, "normalize": True, "directions": 2},
        {"noise": "rademacher"},
    ],
)
def test_a_trajectory_leads_to_the_weights(
    fit: Run, data: Callable[..., GLUE], tmp_path: Path, settings: dict[str, Any]
) -> None:
    """To those of the end, bitwise, and by its first steps to those that a shorter run ends with."""
    method, trainer = trained_by(fit, data, tmp_path / "run", **settings)
    file = tmp_path / "run" / "trajectory.mezo"
    replayed = lit_spu.replay(tmp_path / "run")
    assert same(weights(replayed), weights(method))
    assert not replayed.is_zero_shot
    header, _, rest = file.read_bytes().partition(b"\n")
    groups = 2 if "weight_decay" in settings else 1
    assert len(rest) == 4 * (groups + settings.get("directions", 1)) * trainer.global_step == 4 * len(rest) // 4
    assert len(header) < 2000
    if settings.get("schedule") != "linear":  # whose rates depend on the length
        shorter, _ = trained_by(fit, data, tmp_path / "shorter", max_epochs=1, **settings)
        assert same(weights(lit_spu.replay(file, step=4)), weights(shorter))
    assert same(weights(lit_spu.replay(file, step=0)), weights(MeZO()))


@pytest.mark.parametrize("rounding", ["residual", "stochastic"])
def test_a_trajectory_leads_to_weights_in_half_precision(
    fit: Run, data: Callable[..., GLUE], tmp_path: Path, rounding: str
) -> None:
    """Bitwise, from a backbone that is loaded in fp32. Training in another precision does not continue it."""
    torch.manual_seed(3)
    method = MeZO(lr=1e-3, rounding=rounding)
    fit(method, data(), precision="bf16-true", **into(tmp_path / "run"))
    replayed = lit_spu.replay(tmp_path / "run")
    assert {p.dtype for p in replayed.parameters()} == {torch.bfloat16}
    assert same(weights(replayed), weights(method))
    with pytest.raises(UserError, match=r"weights in bfloat16, and here they are in float32.*--trainer\.precision"):
        fit(MeZO(lr=1e-3, rounding=rounding, trajectory=str(tmp_path / "run")), data())


def test_trained_weights_have_memory_of_their_own(fit: Run, data: Callable[..., GLUE]) -> None:
    """Views of a common buffer are saved with all of it."""
    method = MeZO(lr=1e-3)
    fit(method, data())
    assert all(p.untyped_storage().nbytes() == p.nbytes for p in method.parameters())


def test_an_error_is_not_hidden_by_one_in_writing_the_trajectory(
    fit: Run, data: Callable[..., GLUE], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A device that has failed gives no slopes."""

    def unreadable(recorder: object) -> None:
        raise OSError("no slopes")

    class Fails(Callback):
        def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, index: int) -> None:
            if index == 2:
                monkeypatch.setattr("lit_spu.optim.trajectory.Recorder.append", unreadable)
                raise RuntimeError("the device failed")

    with pytest.raises(RuntimeError, match="the device failed"):
        fit(MeZO(lr=1e-3), data(), Fails(), **into(tmp_path / "run"))


def test_training_goes_on_from_a_trajectory(fit: Run, data: Callable[..., GLUE], tmp_path: Path) -> None:
    """As if it had not stopped, to the bit, and writes all of its own; the loss is not looked at before."""
    whole, _ = trained_by(fit, data, tmp_path / "whole")
    trained_by(fit, data, tmp_path / "half", max_epochs=1)
    torch.manual_seed(3)
    method = MeZO(lr=1e-3, trajectory=str(tmp_path / "half"))
    looks: list[int] = []
    method.objective_value = lambda batch: looks.append(1) or MeZO.objective_value(method, batch)  # type: ignore[method-assign, func-returns-value]
    fit(method, data(), max_epochs=2, **into(tmp_path / "again"))
    assert same(weights(method), weights(whole))
    assert len(looks) == 2 * 4
    rows = [Trajectory.read(tmp_path / name).rows for name in ("whole", "again")]
    assert rows[0] == rows[1]


def test_a_run_along_a_trajectory_may_be_interrupted(fit: Run, data: Callable[..., GLUE], tmp_path: Path) -> None:
    whole, _ = trained_by(fit, data, tmp_path / "whole")
    torch.manual_seed(3)
    settings: dict[str, Any] = {"lr": 1e-3, "trajectory": str(tmp_path / "whole")}
    fit(MeZO(**settings), data()).save_checkpoint(tmp_path / "x.ckpt")
    method = MeZO(**settings)
    fit(method, data(), max_epochs=2, ckpt_path=tmp_path / "x.ckpt")
    assert same(weights(method), weights(whole))


@pytest.mark.parametrize("objective", ["loss", "accuracy"])
def test_logits_that_are_not_finite_stop_the_run(data: Callable[..., GLUE], fit: Run, objective: str) -> None:
    method = MeZO(objective=objective)
    next(method.parameters()).data.fill_(torch.nan)
    with pytest.raises(NonFiniteError, match=r"at step 1, learning rate 1e-05"):
        fit(method, data(), num_sanity_val_steps=0)


def test_a_direction_along_which_a_metric_is_undefined_is_skipped(
    data: Callable[..., GLUE], fit: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = MeZO(task="stsb", objective="pearson", lr=1.0)
    before = weights(method)
    monkeypatch.setattr(method.backbone, "predict", lambda logits: (torch.ones(len(logits)), logits))
    trainer = fit(method, data("stsb"))
    assert int(trainer.callback_metrics["train/left_out"]) == 4
    assert "train/loss" not in trainer.callback_metrics
    assert same(weights(method), before)


def test_a_resumed_run_writes_all_of_its_trajectory(fit: Run, data: Callable[..., GLUE], tmp_path: Path) -> None:
    _, trainer = trained_by(fit, data, tmp_path / "half", max_epochs=1)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    torch.manual_seed(8)  # of other directions, if it were asked
    method = MeZO(lr=1e-3)
    fit(method, data(), max_epochs=2, **into(tmp_path / "more"), ckpt_path=tmp_path / "x.ckpt")
    assert same(weights(lit_spu.replay(tmp_path / "more")), weights(method))
    assert Trajectory.read(tmp_path / "more").header["seed"] == 3


@pytest.mark.filterwarnings("ignore:The number of training batches")
def test_steps_are_written_in_epochs_of_fewer_steps(fit: Run, data: Callable[..., GLUE], tmp_path: Path) -> None:
    """Epochs of 4 steps, written every 5 steps."""
    written: list[int] = []

    class Watch(Callback):
        def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            written.append(len(Trajectory.read(tmp_path / "run").rows))

    fit(MeZO(lr=1e-3), data(), Watch(), max_epochs=3, **into(tmp_path / "run") | {"log_every_n_steps": 5})
    assert written == [1, 5, 10]


def test_a_row_that_was_cut_short_is_none(fit: Run, data: Callable[..., GLUE], tmp_path: Path) -> None:
    trained_by(fit, data, tmp_path / "run")
    file = tmp_path / "run" / "trajectory.mezo"
    file.write_bytes(file.read_bytes()[:-3])
    assert len(Trajectory.read(file).rows) == 7


def test_a_trajectory_of_something_else_is_refused(
    fit: Run, data: Callable[..., GLUE], tmp_path: Path, tiny: Tiny
) -> None:
    trained_by(fit, data, tmp_path / "run")
    trajectory = Trajectory.read(tmp_path / "run")
    wrong: list[tuple[MeZO, str]] = [
        (MeZO(backbone=tiny("bert")), "starts from the backbone 'mini-bert'"),
        (MeZO(noise="rademacher"), "the noise differs here"),
        (MeZO(rounding="nearest"), "the noise differs here"),
        (MeZO(share=0.5), "the noise differs here"),
    ]
    moved = MeZO()
    with torch.no_grad():
        next(moved.parameters()).add_(1)
    for method, said in [*wrong, (moved, "starts from other weights than these")]:
        with pytest.raises(UserError, match=said):
            method.replay(trajectory)
    with pytest.raises(UserError, match="has 8 steps"):
        MeZO().replay(trajectory, step=9)
    with pytest.raises(UserError, match="does not exist"):
        lit_spu.replay(tmp_path / "none")
    (tmp_path / "text").write_text("no trajectory")
    with pytest.raises(UserError, match="was not written by a run of MeZO"):
        lit_spu.replay(tmp_path / "text")


def test_rows_alone_leave_no_trajectory_nor_does_a_trainer_that_writes_nothing(
    fit: Run, data: Callable[..., GLUE], tmp_path: Path
) -> None:
    trained_by(fit, data, tmp_path / "run", rows="seen")
    fit(MeZO(), data())
    assert not list(tmp_path.rglob("trajectory.mezo"))


def test_replay_is_a_command(
    fit: Run, data: Callable[..., GLUE], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    method, _ = trained_by(fit, data, tmp_path / "run")
    main(["replay", f"--trajectory={tmp_path / 'run'}", f"--output={tmp_path / 'out'}"])
    assert "MeZO as safetensors" in capsys.readouterr().out
    assert same(weights(lit_spu.load(tmp_path / "out")), weights(method))


# -- several devices ---------------------------------------------------------------------------------------------------


@pytest.mark.xdist_group("two processes")  # two such tests at once may pick the same port
@pytest.mark.slow
@pytest.mark.parametrize(
    "settings", [{"rows": "seen"}, {"objective": "accuracy", "epsilon": 0.1}, {"normalize": True, "lr": 1e-6}]
)
def test_two_ranks_equal_one(tiny: Tiny, tmp_path: Path, settings: dict[str, Any]) -> None:
    """Rows that only one of them reads move on both."""
    changed = {"lr": 1e-3, **settings}
    one, two = (run(CONFIG, tiny("bert"), tmp_path, devices, **changed) for devices in (1, 2))
    for name, tensor in one["weights"].items():
        torch.testing.assert_close(two["weights"][name], tensor, atol=2e-5, rtol=1e-4, msg=name)


@pytest.mark.xdist_group("two processes")  # two such tests at once may pick the same port
@pytest.mark.slow
def test_ranks_that_look_along_directions_of_their_own_stay_equal(tiny: Tiny, tmp_path: Path) -> None:
    """They check it at every step; and what they do is not what one pair of directions for both would be."""
    own, shared = (
        run(CONFIG, tiny("bert"), tmp_path, 2, lr=1e-3, shard_directions=of_their_own) for of_their_own in (True, False)
    )
    assert not all(torch.equal(tensor, shared["weights"][name]) for name, tensor in own["weights"].items())


def test_ranks_that_differ_are_found(data: Callable[..., GLUE], fit: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    method = MeZO(lr=1e-3)
    monkeypatch.setattr(method, "check_every", 3)
    monkeypatch.setattr(Trainer, "world_size", 2)
    monkeypatch.setattr(method, "all_gather", lambda own: torch.stack([own, own + (method.trainer.global_step >= 3)]))
    with pytest.raises(RuntimeError, match="The weights differ between the ranks after step 3"):
        fit(method, data())


def test_a_checksum_sees_a_bit() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        tensors = [torch.ones(3, dtype=dtype), torch.zeros(2, 2, dtype=dtype).T]
        before = checksum(tensors)
        assert checksum(tensors[::-1]) != before
        tensors[1][0, 1] = -0.0
        assert checksum(tensors) != before
