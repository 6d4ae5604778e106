"""Folders that cannot be used are refused in a line with the cause, before training."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_spu.backbones import load_backbone
from lit_spu.errors import UserError
from lit_spu.methods.lst_distill import LSTDistillation
from lit_spu.methods.teacher import Teacher
from lit_spu.tasks import TASKS
from tests.conftest import WORDS, tiny_byte_tokenizer, tiny_model, tiny_tokenizer

Tiny = Callable[[str], str]
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 123\n"


def steps(*actions: Callable[[Path], Any]) -> Callable[[Path], None]:
    """Do several things to a folder."""

    def all_of_them(folder: Path) -> None:
        for action in actions:
            action(folder)

    return all_of_them


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def change(folder: Path, file: str = "config.json", **values: Any) -> None:
    path = folder / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def shards(folder: Path) -> list[Path]:
    """Replace the weights by several files."""
    (folder / "model.safetensors").unlink()
    tiny_model("bert").save_pretrained(folder, max_shard_size="20KB")
    return sorted(folder.glob("model-*"))


def without_tokenizer(folder: Path) -> None:
    for file in folder.glob("tok*"):
        file.unlink()


def remote_code(folder: Path, file: str) -> None:
    change(folder, file, auto_map={"AutoConfig": "own.Config", "AutoTokenizer": ["own.Tokenizer", None]})
    (folder / "own.py").write_text(f"open({str(folder / 'ran')!r}, 'w')")


def pickled(folder: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(folder / "ran"),)

    (folder / "model.safetensors").unlink()
    torch.save({"a": Evil()}, folder / "pytorch_model.bin")


def adapter(folder: Path) -> None:
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "a/base"}))


def add_token(folder: Path) -> None:
    tokenizer = tiny_tokenizer("bert")
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(folder)


def template_ids(folder: Path) -> None:
    """The ids of the special tokens are written in tokenizer.json twice; here they differ."""
    state = json.loads((folder / "tokenizer.json").read_text())
    state["post_processor"]["special_tokens"]["[SEP]"]["ids"] = [99]
    (folder / "tokenizer.json").write_text(json.dumps(state))


BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "pointer": (lambda f: (f / "model.safetensors").write_text(POINTER), "model.safetensors is a pointer of git-lfs"),
    "pointer of the tokenizer": (lambda f: (f / "tokenizer.json").write_text(POINTER), "tokenizer.json is a pointer"),
    "cut": (
        lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-500]),
        "model.safetensors is damaged or cut short",
    ),
    "empty": (lambda f: (f / "model.safetensors").write_bytes(b""), "model.safetensors is damaged or cut short"),
    "shard": (lambda f: shards(f)[1].unlink(), "lacks model-00002-of-"),
    "shard cut": (lambda f: shards(f)[1].write_bytes(b"12345678"), "model-00002-of-.* is damaged"),
    "index": (steps(shards, lambda f: (f / "model.safetensors.index.json").write_text("{")), "cannot be read as JSON"),
    "no index": (steps(shards, remove("model.safetensors.index.json")), "no index of their parts; it"),
    "other framework": (lambda f: (f / "model.safetensors").rename(f / "tf_model.h5"), "it holds tf_model.h5"),
    "pickle": (pickled, "a pickle of other objects than tensors"),
    "gptq": (lambda f: change(f, quantization_config={"quant_method": "gptq", "bits": 4}), r"quantised \(gptq\)"),
    "bitsandbytes": (lambda f: change(f, quantization_config={"load_in_4bit": True}), "its weights are quantised"),
    "adapter": (steps(adapter, remove("config.json")), r"Give it as --model.adapter .*\(a/base\)"),
    "model and adapter": (adapter, "holds a model and also an adapter of peft"),
    "config": (lambda f: (f / "config.json").write_text("{"), "config.json cannot be read as JSON"),
    "config list": (lambda f: (f / "config.json").write_text("[1]"), "config.json holds no mapping"),
    "unknown type": (lambda f: change(f, model_type="martian"), "cannot be loaded: .*model type `martian`"),
    "other type": (
        lambda f: change(f, model_type="vit"),
        "of the family 'vit', which lit_spu does not support. Supported",
    ),
    "text width": (lambda f: change(f, hidden_size="32"), "cannot be loaded: .*'hidden_size' expected int"),
    "heads": (lambda f: change(f, num_attention_heads=5), "cannot be loaded: The hidden size"),
    "activation": (lambda f: change(f, hidden_act="wow"), "cannot be loaded: KeyError: 'wow'"),
    "deeper": (lambda f: change(f, num_hidden_layers=6), "lacks 32 of the weights"),
    "shallower": (lambda f: change(f, num_hidden_layers=2), "weights of blocks that its config.json does not have"),
    "wider": (lambda f: change(f, intermediate_size=128), r"has the shape \[64\], and config.json needs \[128\]"),
    "code": (lambda f: remote_code(f, "config.json"), "needs code of its own, which lit_spu never runs"),
    "tokenizer's code": (lambda f: remote_code(f, "tokenizer_config.json"), "needs code of its own"),
    "no tokenizer": (without_tokenizer, "it has 5 tokens, and knows 0 of 12"),
    "tokenizer": (lambda f: (f / "tokenizer.json").write_text("{"), "tokenizer.json cannot be read as JSON"),
    "added token": (add_token, "the token '<new>' has the id 38, and the model has embeddings for the ids 0 to 37"),
    "other tokenizer": (steps(without_tokenizer, lambda f: tiny_byte_tokenizer().save_pretrained(f)), "has the id 209"),
    "template": (template_ids, "has the id 99"),
    "tokenizer's length": (
        lambda f: change(f, "tokenizer_config.json", model_max_length=[160]),
        "cannot be loaded: TypeError",
    ),
    "vocabulary": (lambda f: change(f, vocab_size=20), "the token 'bad' has the id 37"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_folder_is_refused_in_a_line(
    tiny: Tiny, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse_input(*args: Any) -> str:
        raise AssertionError("transformers asks whether to run code")

    monkeypatch.setattr("builtins.input", refuse_input)
    folder = tmp_path / "model"
    shutil.copytree(tiny("bert"), folder)
    damage, says = BROKEN[kind]
    damage(folder)
    with pytest.raises(UserError, match=says) as found:
        load_backbone(str(folder), TASKS["sst2"])
    assert len(str(found.value).splitlines()) == 1
    assert len(str(found.value)) < 600
    assert not (folder / "ran").exists()


@pytest.mark.parametrize("family", ["roberta", "distilbert", "deberta-v2", "t5", "gpt2", "llama", "qwen2"])
def test_no_family_runs_on_a_made_up_tokenizer(tiny: Tiny, tmp_path: Path, family: str) -> None:
    shutil.copytree(tiny(family), tmp_path / "model")
    without_tokenizer(tmp_path / "model")
    with pytest.raises(UserError, match=r"and its tokenizer do not fit|cannot be loaded"):
        load_backbone(str(tmp_path / "model"), TASKS["sst2"])


@pytest.mark.parametrize(("family", "file"), [("deberta-v2", "spm.model"), ("t5", "spiece.model")])
def test_missing_packages_of_a_tokenizer_are_named(
    tiny: Tiny, tmp_path: Path, family: str, file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lit_spu.backbones import model_files

    monkeypatch.setattr(model_files, "find_spec", lambda name: None)
    folder = tmp_path / "model"
    shutil.copytree(tiny(family), folder)
    without_tokenizer(folder)
    (folder / file).write_bytes(b"not a model")
    with pytest.raises(UserError, match=r"sentencepiece and protobuf is not installed: pip install 'lit-spu\[sentence"):
        load_backbone(str(folder), TASKS["sst2"])


def test_a_token_that_causal_models_get_behind_the_text_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    from tokenizers import processors

    shutil.copytree(tiny("llama"), tmp_path / "model")
    tokenizer = tiny_tokenizer("llama")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", WORDS.index("</s>"))]
    )
    tokenizer.save_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match="appends </s> after a text, where a causal model answers"):
        load_backbone(str(tmp_path / "model"), TASKS["sst2"])


def test_a_padding_token_behind_the_embeddings_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    shutil.copytree(tiny("llama"), tmp_path / "model")
    tokenizer = tiny_tokenizer("llama")
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.save_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match="the token '<pad>' has the id 38"):
        load_backbone(str(tmp_path / "model"), TASKS["sst2"])


def test_token_types_that_the_model_lacks_are_refused_for_pairs(tmp_path: Path) -> None:
    from transformers import BertTokenizer

    make: Any = BertTokenizer
    make(vocab={word: number for number, word in enumerate(WORDS)}).save_pretrained(tmp_path)
    model = tiny_model("bert")
    model.config.type_vocab_size = 1
    type(model)(model.config).save_pretrained(tmp_path)
    load_backbone(str(tmp_path), TASKS["sst2"])
    with pytest.raises(UserError, match="by the token type 1, and the model has 1"):
        load_backbone(str(tmp_path), TASKS["mrpc"])


def test_a_prompt_needs_a_mask_token(tiny: Tiny, tmp_path: Path) -> None:
    shutil.copytree(tiny("bert"), tmp_path / "model")
    change(tmp_path / "model", "tokenizer_config.json", mask_token=None)
    load_backbone(str(tmp_path / "model"), TASKS["sst2"])
    with pytest.raises(UserError, match=r"it has no mask token, which model\.head=prompt needs"):
        load_backbone(str(tmp_path / "model"), TASKS["sst2"], "prompt")


@pytest.mark.parametrize("name", ["nobody/nothing", "a/b/c", "", "/no/such/folder", "some model", "bert-base-uncased"])
def test_names_of_no_model_are_refused(name: str) -> None:
    with pytest.raises(UserError, match=r"is no embedded model \(mini-bert, mini-t5\), no folder"):
        load_backbone(name, TASKS["sst2"])


def classifier(folder: Path, labels: tuple[str, ...], family: str = "bert", kind: str = "Sequence") -> str:
    """Write a classifier with labels of these names."""
    import transformers

    names = {"bert": "Bert", "roberta": "Roberta", "distilbert": "DistilBert"}
    tiny_tokenizer(family).save_pretrained(folder)
    config = tiny_model(family).config
    config.id2label = dict(enumerate(labels))
    torch.manual_seed(3)
    getattr(transformers, f"{names[family]}For{kind}Classification")(config).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    ("labels", "kind", "says"),
    [
        (("LABEL_0", "LABEL_1"), "Sequence", None),
        (("Negative", "POSITIVE"), "Sequence", None),
        (("POSITIVE", "NEGATIVE"), "Sequence", "has 2 labels (POSITIVE, NEGATIVE)"),
        (("LABEL_1", "LABEL_0"), "Sequence", "has 2 labels"),
        (("cat", "dog"), "Sequence", "has 2 labels"),
        (tuple("12345"), "Sequence", "has 5 labels (1, 2, 3, 4, 5)"),
        (("score",), "Sequence", "has 1 labels"),
        (tuple("123456789"), "Token", "is new: the model is a BertForTokenClassification"),
        (("O", "B"), "Token", "is new: the model is a BertForTokenClassification"),
    ],
)
@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_a_head_of_other_labels_is_replaced_and_said(
    tmp_path: Path, labels: tuple[str, ...], kind: str, says: str | None, family: str, capture_info: list[str]
) -> None:
    folder = classifier(tmp_path, labels, family, kind)
    backbone = load_backbone(folder, TASKS["sst2"])
    assert backbone.head_is_pretrained == (says is None)
    assert bool(capture_info) == (says is not None)
    weight = [p for p in backbone.head_modules.parameters() if p.ndim > 1][-1]
    assert len(weight) == 2
    stored = load_backbone(folder, replace(TASKS["sst2"], labels=labels)) if len(labels) == 2 else None
    if stored is not None and kind == "Sequence":
        same = [p for p in stored.head_modules.parameters() if p.ndim > 1][-1]
        assert torch.equal(same, weight) == (says is None)
    if says is not None:
        assert says.replace("Bert", "Roberta" if family == "roberta" else "Bert") in capture_info[0]
        with pytest.raises(
            UserError, match=r"model\.logits_weight=1\.0: the classification head of .*" + re.escape(says[:8])
        ):
            LSTDistillation(backbone=folder, logits_weight=1.0, reduction=2)
    if kind == "Sequence" and says is not None:
        with pytest.raises(UserError, match=r"model\.teacher: the classification head of .* has"):
            Teacher(folder, TASKS["sst2"])
    elif says is None:
        LSTDistillation(backbone=folder, logits_weight=1.0, reduction=2)
        Teacher(folder, TASKS["sst2"])


@pytest.fixture
def capture_info(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The messages of loading."""
    said: list[str] = []
    monkeypatch.setattr("lit_spu.backbones.load.rank_zero_info", said.append)
    return said


def test_no_code_of_a_model_is_ever_run(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers is told so for the config, the tokenizer and the weights: also a hub's model runs none."""
    import transformers

    told = []
    for name in ("AutoConfig", "AutoTokenizer", "AutoModelForSequenceClassification"):
        auto = getattr(transformers, name)

        def load(*args: Any, original: Any = auto.from_pretrained, **options: Any) -> Any:
            told.append(options.get("trust_remote_code"))
            return original(*args, **options)

        monkeypatch.setattr(auto, "from_pretrained", load)
    load_backbone(tiny("bert"), TASKS["sst2"])
    assert len(told) >= 3  # the tokenizer and the model read the config again
    assert not any(told)
    assert None not in told
