"""LST distillation: the student learns from a teacher that learns nothing, and then does without it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer

from lit_spu.__main__ import main
from lit_spu.backbones import load_backbone
from lit_spu.data.glue import GLUE
from lit_spu.errors import UserError
from lit_spu.export.student import score
from lit_spu.methods.lst_distill import LSTDistillation
from tests.conftest import FAMILIES, encode

Tiny = Callable[[str], str]
Run = Callable[..., Trainer]


@pytest.mark.parametrize("family", ["bert", "t5", "gpt2", "electra", "llama"])
@pytest.mark.parametrize("distance", ["mse", "cosine", "relation"])
def test_a_student_that_is_its_teacher_has_nothing_to_learn_of_it(tiny: Tiny, family: str, distance: Any) -> None:
    settings = {"backbone": tiny(family), "reduction": 1, "head": "prompt", "distance": distance}
    method = LSTDistillation(hidden_states_weight=3.0, logits_weight=2.0, **settings).double().eval()
    method.student.load_state_dict(method.backbone.state_dict())
    method.down.copy_(torch.eye(*method.down.shape))
    batch = encode(method.backbone)
    task = method.student.loss(method.student(batch), batch)
    torch.testing.assert_close(method.loss(batch), task, atol=1e-10, rtol=0)
    with torch.no_grad():
        for parameter in method.student.blocks[1].parameters():
            parameter.mul_(1.5)
    assert method.loss(batch) > method.student.loss(method.student(batch), batch) + 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_the_teacher_learns_nothing_and_the_student_all(tiny: Tiny, family: str) -> None:
    method = LSTDistillation(backbone=tiny(family), reduction=2, drop_layers=[1], head="prompt", logits_weight=1.0)
    method.train().loss(encode(method.backbone)).backward()
    assert all(p.grad is None and not p.requires_grad for p in method.backbone.parameters())
    vocabulary = [*dict.fromkeys((*method.student.head_modules.parameters(), *method.student.parameters()))]
    without = [name for name, p in method.student.named_parameters() if p.grad is None]
    assert len(without) < 0.1 * len(vocabulary), without  # of a vocabulary's bias, only the label words' is read


@pytest.mark.parametrize("family", FAMILIES)
def test_the_student_answers_without_its_teacher(tiny: Tiny, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    method = LSTDistillation(backbone=tiny(family), reduction=2, drop_layers=[1]).eval()
    batch = encode(method.backbone)

    def forbidden(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("the teacher ran")

    monkeypatch.setattr(method.backbone.base_model.model, "forward", forbidden)
    for block in method.backbone.blocks:
        block.register_forward_pre_hook(forbidden)
    torch.testing.assert_close(method(batch), method.student(batch), atol=0, rtol=0)


def test_each_block_of_the_student_follows_its_own_of_the_teacher(tiny: Tiny) -> None:
    method = LSTDistillation(backbone=tiny("bert"), reduction=2, drop_layers=[0, 2]).double().eval()
    batch = encode(method.backbone)
    (taught,), (own,) = method.backbone.hidden_states(batch), method.student.hidden_states(batch)
    real = batch["attention_mask"].bool()
    expected = [(0, 1), (1, 3)]
    errors = []
    for n, i in expected:
        target = (taught.blocks[i] @ method.down.T)[real]
        errors.append(((own.blocks[n][real] - target) ** 2).mean() / target.var(unbiased=False))
    task = method.student.loss(method.student(batch), batch)
    torch.testing.assert_close(method.loss(batch), task + sum(errors) / 2, atol=1e-12, rtol=0)


def test_a_new_head_has_nothing_to_teach(tiny: Tiny) -> None:
    with pytest.raises(UserError, match=r"model.logits_weight=1.0: the classification head .* is new"):
        LSTDistillation(backbone=tiny("bert"), reduction=2, logits_weight=1.0)
    LSTDistillation(backbone=tiny("t5"), reduction=2, logits_weight=1.0, head="names")  # answers by words that it knows


def test_two_methods_made_alike_have_the_same_targets(tiny: Tiny) -> None:
    """A checkpoint does not hold what is fixed, so it must come out the same again, whatever the seed."""
    for start in ("magnitude", "random"):
        torch.manual_seed(1)
        one = LSTDistillation(backbone=tiny("bert"), reduction=2, init=start)
        torch.manual_seed(2)
        assert torch.equal(one.down, LSTDistillation(backbone=tiny("bert"), reduction=2, init=start).down)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pruned_student_begins_where_its_targets_do(tiny: Tiny, family: str) -> None:
    """Its embeddings are the teacher's at the places that D picks."""
    method = LSTDistillation(backbone=tiny(family), reduction=2, init="magnitude").eval()
    assert bool((method.down.sum(1) == 1).all())
    words = method.backbone.model.get_input_embeddings().weight
    narrow = method.student.model.get_input_embeddings().weight
    if words.shape[1] == method.down.shape[1]:  # not the embeddings of an ELECTRA, which are narrower
        assert torch.equal(narrow, words @ method.down.T)


def test_a_regression_is_taught_its_numbers(tiny: Tiny) -> None:
    method = LSTDistillation(
        backbone=tiny("bert"), task="stsb", reduction=2, head="prompt", hidden_states_weight=0.0, logits_weight=2.0
    ).eval()
    batch = encode(method.backbone)
    own, taught = method.student(batch), method.backbone(batch)
    wanted = method.student.loss(own, batch) + 2 * ((own - taught) ** 2).mean()
    torch.testing.assert_close(method.loss(batch), wanted)


@pytest.mark.filterwarnings("ignore:The number of training batches")
def test_separated_it_is_a_model_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import AutoModelForSequenceClassification

    config = Path(__file__).parents[2] / "configs" / "lst_distill.yaml"
    common = ["--data.limit_train=64", "--data.limit_validation=50", "--trainer.max_epochs=1"]
    main(["fit", f"--config={config}", *common, f"--run_dir={tmp_path}/run", f"--data.cache={tmp_path}"])
    capsys.readouterr()
    main(["separate", f"--ckpt_path={tmp_path}/run", f"--output={tmp_path}/student"])
    shown = capsys.readouterr().out
    assert "head untrained" in shown  # the teacher's
    import lit_spu

    method = lit_spu.load(tmp_path / "run")
    assert isinstance(method, LSTDistillation)
    data = GLUE(limit_validation=50, cache=str(tmp_path))
    data.encoding = method.encoding
    data.setup("validate")
    batches = list(data.val_dataloader()[0])
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "student").eval()
    inputs = {name: batches[0][name] for name in ("input_ids", "attention_mask", "token_type_ids")}
    with torch.no_grad():
        torch.testing.assert_close(plain(**inputs).logits, method(batches[0]), atol=1e-6, rtol=0)
    again = load_backbone(str(tmp_path / "student"), method.task)
    assert again.head_is_pretrained
    found = f"{score(again.eval(), batches):.4f}"
    assert found in shown
    assert f"on validation: {found}" in (tmp_path / "student" / "README.md").read_text()
    with pytest.raises(SystemExit):
        main(["separate", f"--ckpt_path={tmp_path}/run", f"--output={tmp_path}/student"])
    assert "is not an empty folder" in capsys.readouterr().err
