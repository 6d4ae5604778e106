"""Exported methods give the same logits in other tools, and when they are loaded again."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification

import lit_spu
from lit_spu.__main__ import main
from lit_spu.backbones import Backbone, load_backbone
from lit_spu.checkpoints import trained_weights
from lit_spu.errors import UserError
from lit_spu.export import writers
from lit_spu.methods.base import Method
from lit_spu.methods.bitfit import BitFit
from lit_spu.methods.full import FullFineTuning
from lit_spu.methods.head import HeadOnly
from lit_spu.methods.ia3 import IA3
from lit_spu.methods.kladder import KLadder
from lit_spu.methods.ladder import LadderSideTuning
from lit_spu.methods.lora import LoRA
from lit_spu.methods.side_lora import SideLoRA
from tests.conftest import encode

Tiny = Callable[[str], str]
FAMILIES = ("bert", "roberta", "distilbert", "deberta-v2", "t5", "gpt2", "llama")


def disturbed(method: Any, seed: int = 1) -> Any:
    """Return the method with noise on its trained weights, in evaluation mode."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in method.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return method.eval()


@torch.no_grad()
def answers(answering: Method | Backbone, batch: dict[str, Tensor]) -> Tensor:
    scores: Tensor = answering.eval()(batch)
    return scores


MADE: dict[str, Callable[..., Method]] = {
    "lora": lambda **kw: LoRA(norms=True, **kw),
    "siva": lambda **kw: LoRA(init="svd", rank=3, **kw),
    "ia3": IA3,
}


@pytest.mark.parametrize("kind", MADE)
@pytest.mark.parametrize("family", FAMILIES)
def test_peft_gives_the_same_logits_and_loads_back(tiny: Tiny, tmp_path: Path, family: str, kind: str) -> None:
    """The folder gives the same logits in the peft library, and as the initial adapter of a method."""
    peft = pytest.importorskip("peft")
    method = disturbed(MADE[kind](backbone=tiny(family)))
    batch = encode(method.backbone)
    expected = answers(method, batch)
    writers.write_peft(method, tmp_path / "out")
    plain = load_backbone(tiny(family), method.task)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft warns about its own settings
        twin = peft.PeftModel.from_pretrained(plain.model, str(tmp_path / "out")).eval()
    with torch.no_grad():  # the library replaces the head of the plain model
        assert twin.base_model.model is plain.model
        theirs = plain.reference_logits(batch) if plain.has_classifier else answers(plain, batch)
    torch.testing.assert_close(theirs, expected, atol=2e-6, rtol=1e-5)
    if kind == "siva":  # the export adds the factors that SVD removed: twice the rank
        back: Method = LoRA(rank=6, alpha=16, adapter=str(tmp_path / "out"), backbone=tiny(family))
        assert back.is_trained
    else:
        back = MADE[kind](adapter=str(tmp_path / "out"), backbone=tiny(family))
    torch.testing.assert_close(answers(back, batch), expected, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("stable", [False, True])
def test_a_folder_of_peft_is_an_initial_adapter(tiny: Tiny, tmp_path: Path, stable: bool) -> None:
    peft = pytest.importorskip("peft")
    plain = load_backbone(tiny("gpt2"), LoRA(backbone=tiny("gpt2")).task, "prompt")
    config = peft.LoraConfig(r=2, lora_alpha=6, target_modules=["c_attn"], fan_in_fan_out=True, use_rslora=stable)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft warns about its own settings
        twin = peft.get_peft_model(plain.model, config)
    torch.manual_seed(2)
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    twin.save_pretrained(tmp_path / "peft")
    method = LoRA(
        rank=2,
        alpha=6,
        rank_stabilised=stable,
        roles=("query", "key", "value"),
        adapter=str(tmp_path / "peft"),
        backbone=tiny("gpt2"),
        head="prompt",
    )
    batch = encode(method.backbone)
    torch.testing.assert_close(answers(method, batch), answers(plain, batch), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"rank": 2}, "--model.rank=4 --model.alpha=8"),
        ({"alpha": 4.0}, "--model.rank=4 --model.alpha=8"),
        ({"roles": ("query", "value")}, "for those of the roles query, key, value, output, up, down"),
        ({"norms": False}, "also holds encoder.layer.0"),
        ({"task": "trec"}, "Use the task and the settings of that run"),
        ({"init": "svd"}, "use one of them"),
        ({"adapter": "nowhere"}, "nowhere is no adapter folder"),
    ],
)
def test_an_adapter_folder_with_other_settings_is_refused(
    tiny: Tiny, tmp_path: Path, settings: dict[str, Any], says: str
) -> None:
    writers.write_peft(disturbed(LoRA(norms=True, backbone=tiny("bert"))), tmp_path / "out")
    given = {"norms": True, "adapter": str(tmp_path / "out"), "backbone": tiny("bert"), **settings}
    with pytest.raises(UserError, match=re.escape(says).replace(r"holds\ encoder", r"holds\ \S*encoder")):
        LoRA(**given)


def test_an_adapter_folder_of_another_kind_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    writers.write_peft(disturbed(IA3(backbone=tiny("bert"))), tmp_path / "out")
    with pytest.raises(UserError, match="holds IA3, but this method needs LORA"):
        LoRA(adapter=str(tmp_path / "out"), backbone=tiny("bert"))


@pytest.mark.parametrize("make", [LoRA, IA3, BitFit, FullFineTuning, HeadOnly])
@pytest.mark.parametrize("family", ["bert", "distilbert", "gpt2", "llama"])
def test_transformers_loads_a_merged_model(
    tiny: Tiny, tmp_path: Path, family: str, make: Callable[..., Method]
) -> None:
    method = disturbed(make(backbone=tiny(family)))
    batch = encode(method.backbone)
    expected = answers(method, batch)
    if make is BitFit and family == "llama":
        with pytest.raises(UserError, match="BitFit trained weights that LlamaForSequenceClassification does not have"):
            writers.write_merged(method, tmp_path / "out")
        return
    writers.write_merged(method, tmp_path / "out")
    torch.manual_seed(5)  # a head that is not loaded would differ
    again = load_backbone(str(tmp_path / "out"), method.task)
    torch.testing.assert_close(answers(again, batch), expected, atol=2e-6, rtol=1e-5)
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        theirs = plain(**method.backbone.model_inputs(batch)).logits
    torch.testing.assert_close(theirs, expected, atol=2e-6, rtol=1e-5)
    assert plain.config.id2label == {0: "negative", 1: "positive"}


def test_the_card_of_a_t5_classifier_has_the_code_for_its_logits(tiny: Tiny, tmp_path: Path) -> None:
    """The forward pass of transformers' class reads another state."""
    method = disturbed(HeadOnly(backbone=tiny("t5")))
    writers.write_folder(tmp_path / "out", method, None, "merged", lambda folder: writers.write_merged(method, folder))
    card = (tmp_path / "out" / "README.md").read_text()
    assert "a text in the task's template (the named format)" in card
    (code,) = re.findall(r"the logits are `(.*)`, where", card)
    inputs = method.backbone.model_inputs(encode(method.backbone))
    start = inputs.pop("decoder_input_ids")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        logits = eval(code, {"model": model, "inputs": inputs, "start": start})
    torch.testing.assert_close(logits, answers(method, encode(method.backbone)), atol=2e-6, rtol=1e-5)


def test_label_words_rows_apart_from_a_tied_vocabulary_are_not_merged(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="HeadOnly trained weights that GPT2LMHeadModel does not have"):
        writers.write_merged(HeadOnly(backbone=tiny("gpt2"), head="prompt"), tmp_path / "out")


EVERY: tuple[Callable[..., Method], ...] = (LoRA, IA3, BitFit, HeadOnly, SideLoRA, KLadder)


@pytest.mark.parametrize("make", EVERY)
@pytest.mark.parametrize("family", ["bert", "t5"])
def test_trained_weights_load_back_bitwise(
    tiny: Tiny, tmp_path: Path, family: str, make: Callable[..., Method]
) -> None:
    own = {"reduction": 2} if make is KLadder else {}
    method = disturbed(make(backbone=tiny(family), **own))
    writers.write_trained_weights(method, tmp_path / "out")
    learned = sum(p.nbytes for p in method.parameters() if p.requires_grad)
    assert (tmp_path / "out" / trained_weights.WEIGHTS).stat().st_size < learned + 20_000
    again = lit_spu.load(tmp_path / "out")
    batch = encode(method.backbone)
    assert type(again) is type(method)
    assert torch.equal(answers(again, batch), answers(method, batch))


def test_weights_of_another_backbone_and_broken_files_are_refused(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "out"
    method = IA3(backbone=tiny("bert"))
    method.backbone.fingerprint = "0" * 16
    writers.write_trained_weights(method, folder)
    with pytest.raises(UserError, match=rf"trained on the backbone '{tiny('bert')}' \(fingerprint 0000000000000000\)"):
        lit_spu.load(folder)
    method = IA3(backbone=tiny("bert"))
    writers.write_trained_weights(method, folder)
    tensors = load_file(folder / trained_weights.WEIGHTS)
    description = {
        "lit_spu": json.dumps({**trained_weights.read_weights(folder / trained_weights.WEIGHTS), "state_dict": None})
    }
    save_file({**tensors, "nonsense": torch.zeros(1)}, folder / trained_weights.WEIGHTS, description)
    with pytest.raises(UserError, match="1 of the weights do not match"):
        lit_spu.load(folder)
    save_file(tensors, folder / trained_weights.WEIGHTS)
    with pytest.raises(UserError, match="was not written by lit-spu export"):
        lit_spu.load(folder)
    (folder / trained_weights.WEIGHTS).write_bytes(b"nothing")
    with pytest.raises(UserError, match="was not written by lit-spu export"):
        lit_spu.load(folder)


@pytest.mark.parametrize("make", [SideLoRA, KLadder, BitFit])
def test_peft_export_of_other_methods_is_refused(tiny: Tiny, tmp_path: Path, make: Callable[..., Method]) -> None:
    own = {"reduction": 2} if make is KLadder else {}
    with pytest.raises(UserError, match=f"peft library cannot represent {make.__name__}"):
        writers.write_peft(make(backbone=tiny("bert"), **own), tmp_path / "out")


def test_peft_export_of_untied_label_word_rows_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    method = LoRA(backbone=tiny("t5"), head="names")
    method.backbone.untie_head()
    with pytest.raises(UserError, match="were trained apart from the vocabulary"):
        writers.write_peft(method, tmp_path / "out")


@pytest.mark.filterwarnings("ignore:The number of training batches")  # a run of two steps
def test_export_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = Path(__file__).parents[1] / "configs" / "ia3.yaml"
    small = ["--data.limit_train=64", "--data.limit_validation=50", "--trainer.max_epochs=1"]
    main(["fit", f"--config={config}", *small, f"--run_dir={tmp_path}/run", f"--data.cache={tmp_path}"])
    for form in ("peft", "merged", "safetensors"):
        out = tmp_path / form
        main(["export", f"--ckpt_path={tmp_path}/run", f"--output={out}", f"--format={form}"])
        assert f"IA3 as {form}" in capsys.readouterr().out
        card = (out / "README.md").read_text()
        assert "base_model: mini-bert" in card
        assert "best accuracy on validation: 0." in card
        assert str(out) in card
    answers = [tmp_path / f"{made}.tsv" for made in ("run", "safetensors")]
    for file in answers:
        given = [f"--ckpt_path={file.with_suffix('')}", f"--output={file}", f"--data.cache={tmp_path}"]
        main(["predict", *given, f"--run_dir={tmp_path}/predict_{file.stem}"])
    assert answers[0].read_text() == answers[1].read_text()
    assert "before any training" not in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["fit", f"--ckpt_path={tmp_path}/safetensors", f"--run_dir={tmp_path}/more"])
    assert "not a run that can continue" in capsys.readouterr().err
    for arguments, says in (
        (["--output", str(tmp_path / "peft")], "is not an empty folder"),
        (["--output", str(tmp_path / "new"), "--format", "onnx"], "onnx"),
        (["--ckpt_path", "nowhere", "--output", str(tmp_path / "new")], "nowhere is no checkpoint and no run"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(["export", f"--ckpt_path={tmp_path}/run", *arguments])
        assert stop.value.code == 2
        message = capsys.readouterr().err
        assert says in message
        assert "Traceback" not in message


def test_methods_loaded_together_share_one_backbone(tiny: Tiny, tmp_path: Path) -> None:
    made = {
        "lora": LoRA(backbone=tiny("bert")),
        "ia3": IA3(backbone=tiny("bert"), task="trec"),
        "ladder": LadderSideTuning(backbone=tiny("bert"), reduction=2),
    }
    for name, method in made.items():
        writers.write_trained_weights(disturbed(method), tmp_path / name)
    expected = {name: answers(method, encode(method.backbone)) for name, method in made.items()}
    together = lit_spu.load_together({name: tmp_path / name for name in made})
    frozen = {p.data_ptr() for m in together.values() for p in m.backbone.parameters() if not p.requires_grad}
    assert len(frozen) == len([p for p in made["lora"].backbone.parameters() if not p.requires_grad])
    for name in (*made, *made):  # in any order, several times
        assert torch.equal(answers(together[name], encode(together[name].backbone)), expected[name])
    together["lora"].merge()  # must not change the others
    assert torch.equal(answers(together["ladder"], encode(together["ladder"].backbone)), expected["ladder"])
    together["lora"].unmerge()
    assert torch.equal(answers(together["lora"], encode(together["lora"].backbone)), expected["lora"])


def test_methods_of_different_backbones_are_not_loaded_together(tiny: Tiny, tmp_path: Path) -> None:
    for family in ("bert", "roberta"):
        writers.write_trained_weights(IA3(backbone=tiny(family)), tmp_path / family)
    with pytest.raises(UserError, match=r"'roberta' .* which is not the same backbone"):
        lit_spu.load_together({family: tmp_path / family for family in ("bert", "roberta")})
