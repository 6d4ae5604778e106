"""The base class of the methods: optimizer, schedule, modes, metrics, checkpoints."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lit_spu.data.glue import GLUE
from lit_spu.errors import UserError
from lit_spu.methods.full import FullFineTuning
from lit_spu.methods.head import HeadOnly
from lit_spu.methods.ladder import LadderSideTuning
from lit_spu.methods.last_layers import LastLayers
from tests.ddp import quiet_trainer

pytestmark = pytest.mark.filterwarnings("ignore:The number of training batches")

Data = Callable[..., GLUE]
Run = Callable[..., Trainer]
Tiny = Callable[[str], str]


class Watch(Callback):
    """Keeps what happens at each step."""

    def __init__(self) -> None:
        self.rates: list[float] = []
        self.modes: list[dict[str, bool]] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])
        self.modes.append({name: module.training for name, module in pl_module.named_modules()})


def test_the_rate_rises_and_falls_by_step(tiny: Tiny, data: Data, fit: Run) -> None:
    watch = Watch()
    method = HeadOnly(backbone=tiny("bert"), lr=0.5, warmup=0.25)
    fit(method, data(limit_train=64), watch)
    assert watch.rates == pytest.approx([0.5 * f for f in (1 / 3, 2 / 3, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6)])


def test_gradients_are_dropped_after_a_step(tiny: Tiny, data: Data, fit: Run) -> None:
    """So that no gradient is held through the next forward pass. Steps over several batches add theirs up first."""
    held: list[bool] = []

    class Gradients(Callback):
        def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
            held.append(any(p.grad is not None for p in pl_module.parameters()))

    fit(HeadOnly(backbone=tiny("bert")), data(), Gradients())
    assert held == [False] * 4
    fit(HeadOnly(backbone=tiny("bert")), data(), Gradients(), accumulate_grad_batches=2)
    assert held[4:] == [True, False] * 2


def test_a_run_without_an_end_is_refused(tiny: Tiny, data: Data, fit: Run) -> None:
    with pytest.raises(UserError, match=r"--trainer.max_epochs or --trainer.max_steps"):
        fit(HeadOnly(backbone=tiny("bert")), data(), max_epochs=-1)


def test_biases_and_norms_are_not_decayed(tiny: Tiny, data: Data, fit: Run) -> None:
    trainer = fit(FullFineTuning(backbone=tiny("bert"), weight_decay=0.1), data(), max_steps=1)
    decayed, plain = trainer.optimizers[0].param_groups
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    assert {p.ndim for p in decayed["params"]} == {2}
    assert {p.ndim for p in plain["params"]} == {1}


def test_adafactor_is_torch_s(tiny: Tiny, data: Data, fit: Run) -> None:
    trainer = fit(HeadOnly(backbone=tiny("bert"), optimizer="adafactor"), data(), max_steps=1)
    assert isinstance(trainer.optimizers[0], torch.optim.Adafactor)


def test_what_learns_trains_and_what_is_frozen_does_not_drop(tiny: Tiny, data: Data, fit: Run) -> None:
    def modes(method: Any) -> dict[str, bool]:
        watch = Watch()
        fit(method, data(), watch, max_epochs=2)
        assert watch.modes[0] == watch.modes[-1]  # also after a validation
        return watch.modes[0]

    block = "backbone.model.bert.encoder.layer.{}.attention.output.dropout"
    full = modes(FullFineTuning(backbone=tiny("bert")))
    assert all(full[block.format(i)] for i in range(4))
    last = modes(LastLayers(layers=1, backbone=tiny("bert")))
    assert [last[block.format(i)] for i in range(4)] == [False, False, False, True]
    ladder = modes(LadderSideTuning(backbone=tiny("bert")))
    assert not any(ladder[block.format(i)] for i in range(4))
    assert all(training for name, training in ladder.items() if name.startswith("side.model.encoder"))
    assert ladder["backbone.model.dropout"]  # the new head's


@pytest.mark.parametrize("task", ["sst2", "cola", "mrpc", "mnli", "trec"])
def test_metrics_of_classes_equal_scikit_learn(tiny: Tiny, data: Data, fit: Run, task: str) -> None:
    from sklearn import metrics as oracle

    method = HeadOnly(backbone=tiny("bert"), task=task)
    module = data(task)
    trainer = fit(method, module, max_steps=1)
    logged = trainer.validate(method, module, verbose=False)
    for loader, name in zip(module.val_dataloader(), module.part_names("validation"), strict=True):
        batches = list(loader)
        labels = torch.cat([batch["labels"] for batch in batches])
        with torch.no_grad():
            scores = torch.cat([method.eval()(batch) for batch in batches])
        guess = scores.argmax(1)
        expected = {
            "accuracy": oracle.accuracy_score(labels, guess),
            "f1": oracle.f1_score(labels, guess, zero_division=0) if len(method.task.labels) == 2 else None,
            "matthews": oracle.matthews_corrcoef(labels, guess),
            "loss": torch.nn.functional.cross_entropy(scores, labels).item(),
        }
        for metric in (*method.task.metrics, "loss"):
            key = f"val/{name}_{metric}" if name else f"val/{metric}"
            assert {k: v for part in logged for k, v in part.items()}[key] == pytest.approx(expected[metric], abs=1e-5)


@pytest.mark.parametrize("family", ["bert", "t5", "gpt2"])
def test_untrained_label_words_have_a_calibrated_score_too(tiny: Tiny, data: Data, family: str) -> None:
    method, module = FullFineTuning(backbone=tiny(family), head="prompt"), data()
    (logged,) = quiet_trainer().validate(method, module, verbose=False)
    batches = list(module.val_dataloader()[0])
    labels = torch.cat([batch["labels"] for batch in batches]).numpy()
    with torch.no_grad():
        scores = torch.cat([method.eval()(batch) for batch in batches]).softmax(-1).numpy()
    assert logged["val/accuracy"] == pytest.approx((scores.argmax(1) == labels).mean())
    calibrated = (scores / scores.mean(0)).argmax(1)
    assert logged["val/accuracy_calibrated"] == pytest.approx((calibrated == labels).mean())
    assert len(set(calibrated)) == 2  # tiny models prefer one label word for all texts


def test_trained_methods_new_heads_and_regressions_have_no_calibrated_score(
    tiny: Tiny, data: Data, fit: Run, tmp_path: Path
) -> None:
    def logged(method: Any, task: str = "sst2", **settings: Any) -> set[str]:
        found = quiet_trainer().test(method, data(task, source="sample"), verbose=False, **settings)
        return {name for part in found for name in part}

    prompt: dict[str, Any] = {"backbone": tiny("bert"), "head": "prompt"}
    plain = {"test/accuracy", "test/loss"}
    assert logged(HeadOnly(**prompt)) == plain | {"test/accuracy_calibrated"}
    assert logged(HeadOnly(backbone=tiny("bert"))) == plain
    assert logged(LadderSideTuning(**prompt)) == plain
    assert logged(HeadOnly(**prompt, task="stsb"), "stsb") == {"test/pearson", "test/spearman", "test/loss"}
    method = HeadOnly(**prompt)
    fit(method, data(), max_steps=1).save_checkpoint(tmp_path / "trained.ckpt")
    assert logged(method) == plain
    assert logged(HeadOnly(**prompt), ckpt_path=tmp_path / "trained.ckpt") == plain


def test_metrics_of_regressions_equal_scipy(tiny: Tiny, data: Data, fit: Run) -> None:
    from scipy import stats

    method = HeadOnly(backbone=tiny("bert"), task="stsb")
    module = data("stsb")
    trainer = fit(method, module, max_steps=2)
    (logged,) = trainer.validate(method, module, verbose=False)
    batches = list(module.val_dataloader()[0])
    labels = torch.cat([batch["labels"] for batch in batches])
    with torch.no_grad():
        values = torch.cat([method.eval()(batch) for batch in batches]).squeeze(1)
    assert logged["val/pearson"] == pytest.approx(stats.pearsonr(values, labels).statistic, abs=1e-4)
    assert logged["val/spearman"] == pytest.approx(stats.spearmanr(values, labels).statistic, abs=1e-4)
    assert logged["val/loss"] == pytest.approx(float((values - labels).square().mean()), abs=1e-4)


@pytest.mark.parametrize("batch_size", [1, 2, 3])
@pytest.mark.parametrize("low", [0, -5])
def test_examples_without_a_score_are_not_scored(tiny: Tiny, tmp_path: Path, batch_size: int, low: int) -> None:
    from scipy import stats

    scores = ["1.5", "", "4", "2.5", "", "3"]
    lines = [f"{'good film ' * (i + 1)}\t{score}" for i, score in enumerate(scores)]
    (tmp_path / "test.tsv").write_text("\n".join(["text\tlabel", *lines]))
    task = {"name": "stars", "fields": ["text"], "score_range": [low, 5]}
    method = HeadOnly(backbone=tiny("bert"), task=task).eval()
    module = GLUE(task, str(tmp_path), batch_size=batch_size, cache=str(tmp_path))
    trainer = quiet_trainer()
    with pytest.warns(UserWarning, match=r"2 of 6 examples of the test split of stars have no label: not scored"):
        (logged,) = trainer.test(method, module, verbose=False)
    assert len(module.examples("test")) == 4
    batches = list(module.test_dataloader()[0])
    with torch.no_grad():
        values = torch.cat([method(batch) for batch in batches]).squeeze(1)
    labels = torch.cat([batch["labels"] for batch in batches])
    assert logged["test/pearson"] == pytest.approx(stats.pearsonr(values, labels).statistic, abs=1e-4)
    predicted: Any = trainer.predict(method, module)
    assert sorted(row for batch in predicted for row in batch["index"].tolist()) == list(range(6))


@pytest.mark.parametrize("column", ["", "\tlabel"])
@pytest.mark.parametrize("answers", [{"labels": ["bad", "good"]}, {"score_range": [-5, 5]}])
def test_a_test_split_without_labels_is_refused(
    tiny: Tiny, tmp_path: Path, column: str, answers: dict[str, Any]
) -> None:
    (tmp_path / "test.tsv").write_text(f"text{column}\na film\n".replace("film", "film\t" if column else "film"))
    task = {"name": "stars", "fields": ["text"], **answers}
    method = HeadOnly(backbone=tiny("bert"), task=task)
    with pytest.raises(UserError, match="None of the 1 examples of the test split of stars has a label: use predict"):
        quiet_trainer().test(method, GLUE(task, str(tmp_path), cache=str(tmp_path)), verbose=False)


def test_the_correlation_of_constant_predictions_is_undefined(tiny: Tiny, data: Data, fit: Run) -> None:
    method = HeadOnly(backbone=tiny("bert"), task="stsb")
    torch.nn.init.zeros_(method.backbone.model.classifier.weight)
    module = data("stsb")
    (logged,) = fit(method, module, max_steps=1, limit_train_batches=0).validate(method, module, verbose=False)
    assert math.isnan(logged["val/pearson"])
    assert math.isfinite(logged["val/loss"])


def test_a_checkpoint_holds_what_was_trained(tiny: Tiny, data: Data, fit: Run, tmp_path: Path) -> None:
    method = LadderSideTuning(backbone=tiny("bert"))
    path = tmp_path / "x.ckpt"
    fit(method, data()).save_checkpoint(path)
    checkpoint = torch.load(path, weights_only=True)
    trained = {name for name, p in method.named_parameters() if p.requires_grad}
    assert set(checkpoint["state_dict"]) == trained
    assert not any("encoder" in name for name in trained if name.startswith("backbone."))
    again = LadderSideTuning.load_from_checkpoint(path)
    batch = next(iter(data_of(method, data)))
    with torch.no_grad():
        assert torch.equal(again.eval()(batch), method.eval()(batch))


def data_of(method: Any, data: Data) -> Any:
    module = data()
    module.encoding = method.encoding
    module.setup("validate")
    return module.val_dataloader()[0]


def test_a_checkpoint_of_another_backbone_is_refused(tiny: Tiny, data: Data, fit: Run, tmp_path: Path) -> None:
    fit(HeadOnly(backbone=tiny("bert")), data()).save_checkpoint(tmp_path / "x.ckpt")
    with pytest.raises(UserError, match=r"trained on the backbone .*bert.* not on .*roberta"):
        HeadOnly.load_from_checkpoint(tmp_path / "x.ckpt", backbone=tiny("roberta"))


def test_a_checkpoint_of_another_method_is_refused(tiny: Tiny, data: Data, fit: Run, tmp_path: Path) -> None:
    trainer = fit(LadderSideTuning(backbone=tiny("bert")), data())
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    checkpoint = torch.load(tmp_path / "x.ckpt", weights_only=True)
    with pytest.raises(UserError, match="was not made by HeadOnly"):
        HeadOnly(backbone=tiny("bert")).on_load_checkpoint(checkpoint)
    with pytest.raises(UserError, match="do not match"):
        LadderSideTuning(backbone=tiny("bert"), drop_layers=(1,)).on_load_checkpoint(checkpoint)
    checkpoint["state_dict"]["nonsense"] = torch.zeros(1)
    with pytest.raises(UserError, match="nonsense"):
        LadderSideTuning(backbone=tiny("bert")).on_load_checkpoint(checkpoint)


def test_a_longer_resumed_run_says_that_its_schedule_changed(tiny: Tiny, data: Data, fit: Run, tmp_path: Path) -> None:
    fit(HeadOnly(backbone=tiny("bert")), data(), max_epochs=1).save_checkpoint(tmp_path / "x.ckpt")
    with pytest.warns(UserWarning, match="8 steps in total instead of 4"):
        fit(HeadOnly(backbone=tiny("bert")), data(), max_epochs=2, ckpt_path=tmp_path / "x.ckpt")
