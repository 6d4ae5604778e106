"""LR distillation: the learning rate of a step, skipped backward passes, the control, and kinds of teachers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer

from lit_spu.__main__ import main
from lit_spu.backbones import load_backbone
from lit_spu.callbacks.latency import Latency
from lit_spu.data import text
from lit_spu.data.glue import GLUE
from lit_spu.errors import UserError
from lit_spu.methods.full import FullFineTuning
from lit_spu.methods.lr_distillation import LRDistillation
from lit_spu.methods.teacher import Teacher
from lit_spu.tasks import load_task
from tests.ddp import quiet_trainer
from tests.runs import StopBehind, same, weights

Run = Callable[..., Trainer]
Data = Callable[..., GLUE]
Tiny = Callable[[str], str]

pytestmark = pytest.mark.filterwarnings("ignore:The number of training batches")


class Watch(Callback):
    """Records the learning rate and the distance of every step."""

    def __init__(self) -> None:
        self.lrs: list[float] = []
        self.distances: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if trainer.global_step == len(self.lrs):
            return  # gradients are accumulated
        self.lrs.append(float(trainer.callback_metrics["lr"]))
        if "distance" in trainer.callback_metrics:
            self.distances.append(float(trainer.callback_metrics["distance"]))


def made(backbone: str, cls: Any = LRDistillation, **settings: Any) -> Any:
    torch.manual_seed(1)
    return cls(backbone=backbone, **{"lr": 1e-3, **settings})


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
def test_a_factor_of_one_is_plain_training_bit_for_bit(data: Data, fit: Run, tiny: Tiny, optimizer: str) -> None:
    plain = made(tiny("bert"), FullFineTuning, optimizer=optimizer, weight_decay=0.1)
    ours = made(tiny("bert"), teacher="mini-t5", min_factor=1.0, max_factor=1.0, optimizer=optimizer, weight_decay=0.1)
    for method in (plain, ours):
        torch.manual_seed(2)
        fit(method, data(), max_epochs=2)
    assert same(weights(plain), weights(ours))


def test_learning_rates_are_scaled_by_the_clipped_distance(data: Data, fit: Run, tiny: Tiny) -> None:
    """The factor is the distance over the mean of the first three, clipped."""
    plain, ours = Watch(), Watch()
    fit(made(tiny("bert"), FullFineTuning), data(), plain, max_epochs=3)
    method = made(tiny("bert"), teacher="mini-t5", reference_steps=3, min_factor=0.9, max_factor=1.05)
    fit(method, data(), ours, max_epochs=3)
    first = ours.distances[:3]
    references = [sum(first[: n + 1]) / len(first[: n + 1]) for n in range(len(ours.distances))]
    factors = [min(1.05, max(0.9, d / d_0)) for d, d_0 in zip(ours.distances, references, strict=True)]
    assert len(set(factors)) > 3
    assert ours.lrs == pytest.approx([factor * lr for factor, lr in zip(factors, plain.lrs, strict=True)], rel=1e-5)


def test_the_distance_alone_scales_a_constant_learning_rate(data: Data, fit: Run, tiny: Tiny) -> None:
    watch = Watch()
    method = made(tiny("bert"), teacher="mini-t5", schedule="constant", reference_steps=1)
    fit(method, data(), watch, max_epochs=2)
    assert watch.lrs == pytest.approx([1e-3 * min(2.0, d / watch.distances[0]) for d in watch.distances], rel=1e-5)


@pytest.mark.parametrize("distance", ["divergence", "mse", "cosine"])
def test_cached_teacher_logits_are_those_of_the_teacher(data: Data, fit: Run, tiny: Tiny, distance: Any) -> None:
    """The teacher has another family and tokenizer, and reads the same texts."""

    class Live(Callback):
        def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
            module: Any = trainer.datamodule  # type: ignore[attr-defined]
            rows = module.examples("train")
            texts = [text.render(template, {"sentence": rows[i]["sentence"]}, mask) for i in batch["index"].tolist()]
            inputs = teacher.encoding.tokenizer(texts, padding=True)
            with torch.no_grad():
                teacher_logits = teacher({name: torch.tensor(ids) for name, ids in inputs.items()})
                logits = pl_module(batch)
            soft = [(one / 2).softmax(-1) for one in (teacher_logits, logits)]
            self.expected = {
                "divergence": 4 * (soft[0] * (soft[0].log() - soft[1].log())).sum(-1).mean(),
                "mse": (logits - teacher_logits).square().mean(),
                "cosine": 1 - F.cosine_similarity(logits, teacher_logits).mean(),
            }[distance]

        def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
            torch.testing.assert_close(trainer.callback_metrics["distance"], self.expected, atol=1e-5, rtol=1e-4)

    teacher = load_backbone("mini-t5", load_task("sst2"), "prompt").eval()
    mask, template = teacher.encoding.mask, str(text.template_of(teacher.task, teacher.encoding))
    settings = {"distance": distance, "temperature": 2.0, "teacher": "mini-t5"}
    fit(made(tiny("bert"), **settings), data(), Live(), max_epochs=2)


def test_a_student_equal_to_its_teacher_does_not_change(data: Data, fit: Run, tiny: Tiny, tmp_path: Path) -> None:
    """The teacher is the student before training, so the distance is 0."""
    backbone = tmp_path / "trained"
    trained = FullFineTuning(backbone=tiny("bert"))
    fit(trained, data(), max_epochs=1)
    from lit_spu.export import writers

    writers.write_model(trained, trained.backbone, backbone)
    for skip, count in ((0.0, 8), (1e-3, 0)):
        method = made(str(backbone), teacher=str(backbone), skip_below=skip, weight_decay=0.1)
        before, latency = weights(method), Latency(warmup=0)
        trainer = fit(method, data(), latency, max_epochs=2)
        assert same(before, weights(method))
        assert latency.summary["passes/backward"] == count
        assert trainer.global_step == 8
        assert trainer.callback_metrics.get("train/skipped", 0) == 8 - count


def test_skipped_steps_change_nothing(data: Data, fit: Run, tiny: Tiny) -> None:
    class Steps(Callback):
        def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
            self.before = weights(pl_module)
            plain_lrs.append(trainer.optimizers[0].param_groups[0]["lr"])

        def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
            skipped.append(float(trainer.callback_metrics["distance"]) < threshold)
            scaled_lrs.append(0.0 if skipped[-1] else float(trainer.callback_metrics["lr"]))
            assert same(self.before, weights(pl_module)) == skipped[-1]

    watch, threshold, skipped = Watch(), 0.0, list[bool]()
    plain_lrs, scaled_lrs = list[float](), list[float]()
    fit(made(tiny("bert"), teacher="mini-t5"), data(), watch, max_epochs=2)
    threshold = sorted(watch.distances)[4]
    method = made(tiny("bert"), teacher="mini-t5", skip_below=threshold, weight_decay=0.1)
    trainer = fit(method, data(), Steps(), max_epochs=2)
    assert True in skipped
    assert False in skipped
    assert method.num_skipped == sum(skipped)
    assert trainer.callback_metrics["lr/mean_factor"] == pytest.approx(sum(scaled_lrs) / sum(plain_lrs), rel=1e-5)


def test_the_control_has_the_same_mean_learning_rate(tmp_path: Path) -> None:
    common = ["fit", "--config=configs/lr_distillation.yaml", "--data.limit_train=256", f"--data.cache={tmp_path}"]
    common += ["--trainer.max_epochs=2", "--data.limit_validation=50", "--trainer.log_every_n_steps=1"]
    main([*common, f"--run_dir={tmp_path}/run"])
    main([*common, f"--run_dir={tmp_path}/control", f"--model.control={tmp_path}/run"])
    means = []
    for name in ("run", "control"):
        header, *rows = (tmp_path / name / "metrics.csv").read_text().splitlines()
        column = header.split(",").index("lr")
        rates = [float(row.split(",")[column]) for row in rows if row.split(",")[column]]
        assert len(rates) == 16
        means.append(sum(rates) / len(rates))
    assert means[1] == pytest.approx(means[0], rel=1e-5)
    factor = json.loads((tmp_path / "control" / "summary.json").read_text())["metrics"]["lr/factor"]
    assert factor != pytest.approx(1, abs=0.01)


def test_a_resumed_run_equals_the_uninterrupted_one(data: Data, fit: Run, tiny: Tiny, tmp_path: Path) -> None:
    settings = {"teacher": "mini-t5", "reference_steps": 6}
    torch.manual_seed(2)
    whole = made(tiny("bert"), **settings)
    fit(whole, data(), max_epochs=3)

    fit(made(tiny("bert"), **settings), data(), StopBehind(0), max_epochs=3).save_checkpoint(tmp_path / "half.ckpt")
    rest = made(tiny("bert"), **settings)
    fit(rest, data(), max_epochs=3, ckpt_path=tmp_path / "half.ckpt")
    assert same(weights(whole), weights(rest))


def test_batches_of_a_step_use_their_mean_factor(data: Data, fit: Run, tiny: Tiny) -> None:
    plain, ours = Watch(), Watch()
    fit(made(tiny("bert"), FullFineTuning), data(), plain, max_epochs=1, accumulate_grad_batches=2)
    method, distances = made(tiny("bert"), teacher="mini-t5", reference_steps=1), list[float]()
    measure = method._distance

    def note(*args: Any) -> float:
        distances.append(measure(*args))
        return distances[-1]

    method._distance = note
    fit(method, data(), ours, max_epochs=1, accumulate_grad_batches=2)
    d = [one / distances[0] for one in distances]
    assert ours.lrs == pytest.approx([(d[0] + d[1]) / 2 * plain.lrs[0], (d[2] + d[3]) / 2 * plain.lrs[1]], rel=1e-5)


def test_a_teacher_can_be_a_run_a_checkpoint_or_an_export(data: Data, fit: Run, tiny: Tiny, tmp_path: Path) -> None:
    from lit_spu.export import writers

    method = FullFineTuning(backbone=tiny("bert"))
    trainer = fit(method, data(), max_epochs=1)
    trainer.save_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")
    writers.write_model(method, method.backbone, tmp_path / "merged")
    method.setup("export")
    writers.write_trained_weights(method, tmp_path / "weights")
    module = data()
    module.encoding = method.encoding
    sources = ("run", "run/checkpoints/last.ckpt", "merged", "weights")
    found = [Teacher(str(tmp_path / name), method.task).compute_logits(module, torch.device("cpu")) for name in sources]
    method.eval()
    for teacher_logits in found:
        for batch in module.as_read_by(method.encoding):
            with torch.no_grad():
                torch.testing.assert_close(teacher_logits[batch["index"]], method(batch), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("mnli", r"whose labels are negative, positive\. The labels of mnli are"),
        ("rte", "negative, positive"),
        ("stsb", "a number"),
    ],
)
def test_a_teacher_with_other_labels_is_refused(
    data: Data, fit: Run, tiny: Tiny, tmp_path: Path, task: str, message: str
) -> None:
    teacher = FullFineTuning(backbone=tiny("bert"))
    fit(teacher, data(), max_epochs=1).save_checkpoint(tmp_path / "sst2.ckpt")
    method = made(tiny("bert"), teacher=str(tmp_path / "sst2.ckpt"), task=task, distance="mse")
    before = weights(method)
    with pytest.raises(UserError, match=message):
        fit(method, data(task))
    assert same(before, weights(method))


def test_a_folder_with_other_labels_is_refused(data: Data, fit: Run, tiny: Tiny, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    for names, message in ((("good", "bad"), "good, bad"), (("a", "b", "c"), "3 labels")):
        folder = tmp_path / message
        model = AutoModelForSequenceClassification.from_pretrained(
            tiny("bert"), num_labels=len(names), id2label=dict(enumerate(names))
        )
        model.save_pretrained(folder)
        load_backbone(tiny("bert"), load_task("sst2")).encoding.tokenizer.save_pretrained(folder)
        with pytest.raises(UserError, match=message):
            fit(made(tiny("bert"), teacher=str(folder)), data())
    with pytest.raises(UserError, match=r"model\.teacher.*nowhere"):
        fit(made(tiny("bert"), teacher=str(tmp_path / "nowhere")), data())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"min_factor": 2.0, "max_factor": 1.0}, "model.min_factor=2.0"),
        ({"task": "stsb"}, "only mse"),
    ],
)
def test_wrong_settings_are_refused(tiny: Tiny, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        made(tiny("bert"), teacher="mini-t5", **settings)


def test_the_control_of_a_pattern_is_the_last_run(tiny: Tiny, tmp_path: Path) -> None:
    for name, factor in (("run-1", 0.25), ("run-2", 0.75)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "summary.json").write_text(json.dumps({"metrics": {"lr/mean_factor": factor}}))
    method = made(tiny("bert"), teacher="mini-t5", control=f"{tmp_path}/run-*")
    method.setup("fit")
    assert method.control_factor == 0.75


def test_skipping_on_several_devices_is_refused(tiny: Tiny) -> None:
    method = made(tiny("bert"), teacher="mini-t5", skip_below=0.1)
    method.trainer = quiet_trainer(devices=2, strategy="ddp")
    with pytest.raises(UserError, match=r"model\.skip_below=0\.1"):
        method.setup("fit")


def test_a_control_must_be_a_run(data: Data, fit: Run, tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model\.control"):
        fit(made(tiny("bert"), teacher="mini-t5", control=str(tmp_path)), data())
