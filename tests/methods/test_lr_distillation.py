"""LR distillation: the law of the step, skipped backward passes, the control, and teachers of every kind."""

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
from tests.runs import StopBehind, same, weights

Run = Callable[..., Trainer]
Data = Callable[..., GLUE]
Tiny = Callable[[str], str]

pytestmark = pytest.mark.filterwarnings("ignore:The number of training batches")


class Seen(Callback):
    """The learning rate and the distance of every step."""

    def __init__(self) -> None:
        self.rates: list[float] = []
        self.distances: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self.rates.append(float(trainer.callback_metrics["lr"]))
        if "distance" in trainer.callback_metrics:
            self.distances.append(float(trainer.callback_metrics["distance"]))


def made(backbone: str, cls: Any = LRDistillation, **settings: Any) -> Any:
    torch.manual_seed(1)
    return cls(backbone=backbone, **{"lr": 1e-3, **settings})


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
def test_a_factor_of_one_is_plain_training_to_the_bit(data: Data, fit: Run, tiny: Tiny, optimizer: str) -> None:
    plain = made(tiny("bert"), FullFineTuning, optimizer=optimizer, weight_decay=0.1)
    ours = made(tiny("bert"), teacher="mini-t5", min_factor=1.0, max_factor=1.0, optimizer=optimizer, weight_decay=0.1)
    for method in (plain, ours):
        torch.manual_seed(2)
        fit(method, data(), max_epochs=2)
    assert same(weights(plain), weights(ours))


def test_the_rate_follows_the_law(data: Data, fit: Run, tiny: Tiny) -> None:
    """Rates are those of the schedule times the clipped distance over the mean of the first three."""
    plain, ours = Seen(), Seen()
    fit(made(tiny("bert"), FullFineTuning), data(), plain, max_epochs=3)
    fit(
        made(tiny("bert"), teacher="mini-t5", reference_steps=3, min_factor=0.9, max_factor=1.05),
        data(),
        ours,
        max_epochs=3,
    )
    first = ours.distances[:3]
    starts = [sum(first[: n + 1]) / len(first[: n + 1]) for n in range(len(ours.distances))]
    factors = [min(1.05, max(0.9, d / d_0)) for d, d_0 in zip(ours.distances, starts, strict=True)]
    assert len(set(factors)) > 3
    assert ours.rates == pytest.approx([f * r for f, r in zip(factors, plain.rates, strict=True)], rel=1e-5)


def test_the_distance_alone_may_set_the_rate(data: Data, fit: Run, tiny: Tiny) -> None:
    seen = Seen()
    method = made(tiny("bert"), teacher="mini-t5", schedule="constant", reference_steps=1)
    fit(method, data(), seen, max_epochs=2)
    assert seen.rates == pytest.approx([1e-3 * min(2.0, d / seen.distances[0]) for d in seen.distances], rel=1e-5)


@pytest.mark.parametrize("distance", ["divergence", "mse", "cosine"])
def test_kept_answers_are_those_that_a_teacher_gives_live(data: Data, fit: Run, tiny: Tiny, distance: Any) -> None:
    """Of another family, with another tokenizer: it reads the same texts."""

    class Live(Callback):
        def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
            module: Any = trainer.datamodule  # type: ignore[attr-defined]
            rows = module.examples("train")
            texts = [text.render(template, {"sentence": rows[i]["sentence"]}, mask) for i in batch["index"].tolist()]
            inputs = teacher.encoding.tokenizer(texts, padding=True)
            with torch.no_grad():
                theirs = teacher({name: torch.tensor(ids) for name, ids in inputs.items()})
                ours = pl_module(batch)
            soft = [(scores / 2).softmax(-1) for scores in (theirs, ours)]
            self.wanted = {
                "divergence": 4 * (soft[0] * (soft[0].log() - soft[1].log())).sum(-1).mean(),
                "mse": (ours - theirs).square().mean(),
                "cosine": 1 - F.cosine_similarity(ours, theirs).mean(),
            }[distance]

        def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
            torch.testing.assert_close(trainer.callback_metrics["distance"], self.wanted, atol=1e-5, rtol=1e-4)

    teacher = load_backbone("mini-t5", load_task("sst2"), "prompt").eval()
    mask, template = teacher.encoding.mask, str(text.template_of(teacher.task, teacher.encoding))
    settings = {"distance": distance, "temperature": 2.0, "teacher": "mini-t5"}
    fit(made(tiny("bert"), **settings), data(), Live(), max_epochs=2)


def test_at_the_teacher_nothing_moves_and_backward_passes_may_be_left_out(
    data: Data, fit: Run, tiny: Tiny, tmp_path: Path
) -> None:
    """The teacher is the student as it starts: the distance is 0."""
    backbone = tmp_path / "trained"
    start = FullFineTuning(backbone=tiny("bert"))
    fit(start, data(), max_epochs=1)
    from lit_spu.export import writers

    writers.model_folder(start, start.backbone, backbone)
    for skip, count in ((0.0, 8), (1e-3, 0)):
        method = made(str(backbone), teacher=str(backbone), skip_below=skip, weight_decay=0.1)
        before, latency = weights(method), Latency(warmup=0)
        trainer = fit(method, data(), latency, max_epochs=2)
        assert same(before, weights(method))
        assert latency.summary["passes/backward"] == count
        assert trainer.global_step == 8
        assert trainer.callback_metrics.get("train/skipped", 0) == 8 - count


def test_what_is_left_out_moves_nothing_by_momentum_or_decay(data: Data, fit: Run, tiny: Tiny) -> None:
    class Steps(Callback):
        def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
            self.before = weights(pl_module)

        def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
            left_out.append(float(trainer.callback_metrics["distance"]) < threshold)
            assert same(self.before, weights(pl_module)) == left_out[-1]

    seen, threshold, left_out = Seen(), 0.0, list[bool]()
    fit(made(tiny("bert"), teacher="mini-t5"), data(), seen, max_epochs=2)
    threshold = sorted(seen.distances)[4]
    method = made(tiny("bert"), teacher="mini-t5", skip_below=threshold, weight_decay=0.1)
    fit(method, data(), Steps(), max_epochs=2)
    assert True in left_out
    assert False in left_out
    assert method.num_skipped == sum(left_out)


def test_the_control_has_the_same_mean_rate(tmp_path: Path) -> None:
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


def test_a_resumed_run_is_the_uninterrupted_one(data: Data, fit: Run, tiny: Tiny, tmp_path: Path) -> None:
    settings = {"teacher": "mini-t5", "reference_steps": 6}
    torch.manual_seed(2)
    whole = made(tiny("bert"), **settings)
    fit(whole, data(), max_epochs=3)

    fit(made(tiny("bert"), **settings), data(), StopBehind(0), max_epochs=3).save_checkpoint(tmp_path / "half.ckpt")
    rest = made(tiny("bert"), **settings)
    fit(rest, data(), max_epochs=3, ckpt_path=tmp_path / "half.ckpt")
    assert same(weights(whole), weights(rest))


def test_batches_of_a_step_share_their_mean_factor(data: Data, fit: Run, tiny: Tiny) -> None:
    plain, ours = Seen(), Seen()
    fit(made(tiny("bert"), FullFineTuning), data(), plain, max_epochs=1, accumulate_grad_batches=2)
    fit(made(tiny("bert"), teacher="mini-t5", reference_steps=1), data(), ours, max_epochs=1, accumulate_grad_batches=2)
    d = [one / ours.distances[0] for one in ours.distances]
    assert ours.rates[1::2] == pytest.approx(
        [(d[0] + d[1]) / 2 * plain.rates[1], (d[2] + d[3]) / 2 * plain.rates[3]], rel=1e-5
    )


def test_a_teacher_may_be_a_run_a_checkpoint_or_an_export(data: Data, fit: Run, tiny: Tiny, tmp_path: Path) -> None:
    from lit_spu.export import writers

    method = FullFineTuning(backbone=tiny("bert"))
    trainer = fit(method, data(), max_epochs=1)
    trainer.save_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")
    writers.model_folder(method, method.backbone, tmp_path / "merged")
    method.setup("export")
    writers.weights(method, tmp_path / "weights")
    module = data()
    module.encoding = method.encoding
    sources = ("run", "run/checkpoints/last.ckpt", "merged", "weights")
    found = [Teacher(str(tmp_path / name), method.task).compute_logits(module, torch.device("cpu")) for name in sources]
    method.eval()
    for answers in found:
        for batch in module.as_read_by(method.encoding):
            with torch.no_grad():
                torch.testing.assert_close(answers[batch["index"]], method(batch), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("task", "said"),
    [
        ("mnli", "whose labels are negative, positive; those of mnli are"),
        ("rte", "negative, positive"),
        ("stsb", "a number"),
    ],
)
def test_a_teacher_of_other_labels_is_refused(
    data: Data, fit: Run, tiny: Tiny, tmp_path: Path, task: str, said: str
) -> None:
    teacher = FullFineTuning(backbone=tiny("bert"))
    fit(teacher, data(), max_epochs=1).save_checkpoint(tmp_path / "sst2.ckpt")
    method = made(tiny("bert"), teacher=str(tmp_path / "sst2.ckpt"), task=task, distance="mse")
    before = weights(method)
    with pytest.raises(UserError, match=said):
        fit(method, data(task))
    assert same(before, weights(method))


def test_a_folder_of_other_labels_or_none_is_refused(data: Data, fit: Run, tiny: Tiny, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    for names, said in ((("good", "bad"), "good, bad"), (("a", "b", "c"), "3 labels")):
        folder = tmp_path / said
        model = AutoModelForSequenceClassification.from_pretrained(
            tiny("bert"), num_labels=len(names), id2label=dict(enumerate(names))
        )
        model.save_pretrained(folder)
        load_backbone(tiny("bert"), load_task("sst2")).encoding.tokenizer.save_pretrained(folder)
        with pytest.raises(UserError, match=said):
            fit(made(tiny("bert"), teacher=str(folder)), data())
    with pytest.raises(UserError, match=r"model\.teacher.*nowhere"):
        fit(made(tiny("bert"), teacher=str(tmp_path / "nowhere")), data())


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"min_factor": 2.0, "max_factor": 1.0}, "model.min_factor=2.0"),
        ({"reference_steps": 0}, "model.reference_steps=0"),
        ({"temperature": 0.0}, "model.temperature=0.0"),
        ({"task": "stsb"}, "only mse"),
    ],
)
def test_settings_that_cannot_be_are_refused(tiny: Tiny, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        made(tiny("bert"), teacher="mini-t5", **settings)


def test_a_control_must_be_a_run(data: Data, fit: Run, tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model\.control"):
        fit(made(tiny("bert"), teacher="mini-t5", control=str(tmp_path)), data())
