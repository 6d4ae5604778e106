"""A record that would compute another function than transformers does is refused when a model of it is loaded."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lit_spu.backbones import families, load, load_backbone
from lit_spu.backbones.family import Family
from lit_spu.errors import UserError
from lit_spu.tasks import TASKS
from tests.conftest import FAMILIES, WORDS, tiny_tokenizer

LLAMA, GPT2, BERT = (families.FAMILIES[name] for name in ("llama", "gpt2", "bert"))
SMALL: dict[str, Any] = {
    "vocab_size": len(WORDS),
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 5,
    "eos_token_id": 5,
}
NEOX = replace(
    LLAMA,
    embeddings=("embed_in",),
    final_modules=("final_layer_norm",),
    vocabulary=("lm_head",),
    target_linears={
        "query": ("attention.query_key_value:0/3",),
        "key": ("attention.query_key_value:1/3",),
        "value": ("attention.query_key_value:2/3",),
        "output": ("attention.dense",),
        "up": ("mlp.dense_h_to_4h",),
        "down": ("mlp.dense_4h_to_h",),
    },
)
PHI3 = replace(
    LLAMA,
    target_linears={
        "query": ("self_attn.qkv_proj:0/3",),
        "key": ("self_attn.qkv_proj:1/3",),
        "value": ("self_attn.qkv_proj:2/3",),
        "output": ("self_attn.o_proj",),
        "up": ("mlp.gate_up_proj",),
        "down": ("mlp.down_proj",),
    },
)
REFUSED: dict[str, tuple[str, Family, dict[str, Any]]] = {
    "soft cap": ("Gemma2ForCausalLM", LLAMA, {"head_dim": 8, "num_key_value_heads": 4}),
    "divided logits": ("GraniteForCausalLM", LLAMA, {"logits_scaling": 8.0}),
    "scaled logits": ("CohereForCausalLM", LLAMA, {"logit_scale": 0.5}),
    "interleaved parts": ("GPTNeoXForCausalLM", NEOX, {}),
    "unequal parts": ("Phi3ForCausalLM", PHI3, {"num_key_value_heads": 2}),
    "no final norm": ("LlamaForCausalLM", replace(LLAMA, final_modules=()), {}),
}


def write(folder: Path, model: str, **changes: Any) -> str:
    import transformers

    cls = getattr(transformers, model)
    tiny_tokenizer("llama").save_pretrained(folder)
    torch.manual_seed(0)
    cls(cls.config_class(**{**SMALL, **changes})).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("kind", REFUSED)
def test_a_record_that_lacks_a_step_is_refused(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, record, changes = REFUSED[kind]
    folder = write(tmp_path, model, **changes)
    model_type = load.find_model(folder).config.model_type
    monkeypatch.setattr(load, "FAMILIES", {model_type: record})
    with pytest.raises(UserError, match="it would compute another function"):
        load_backbone(folder, TASKS["sst2"], "prompt")


def test_parts_that_are_in_order_are_accepted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write(tmp_path, "Phi3ForCausalLM")
    monkeypatch.setattr(load, "FAMILIES", {"phi3": PHI3})
    load_backbone(folder, TASKS["sst2"])


def test_the_last_position_stands_back_for_a_rotary_encoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    config = transformers.ModernBertConfig(**{**SMALL, "cls_token_id": 2, "sep_token_id": 3})
    tiny_tokenizer("bert").save_pretrained(tmp_path)
    transformers.ModernBertForMaskedLM(config).save_pretrained(tmp_path)
    record = replace(
        BERT,
        stacks=("layers",),
        classifier=(),
        vocabulary=("head", "decoder"),
        final_modules=("final_norm",),
        self_attention="attn",
        unused=(),
        target_linears={"query": ("attn.Wqkv:0/3",), "key": ("attn.Wqkv:1/3",), "value": ("attn.Wqkv:2/3",)},
    )
    monkeypatch.setattr(load, "FAMILIES", {"modernbert": record})
    backbone = load_backbone(str(tmp_path), TASKS["sst2"], "prompt")  # compares the logits
    assert not backbone.base_model.runs_at_position


@pytest.mark.parametrize("head", ["classifier", "prompt"])
@pytest.mark.parametrize("family", FAMILIES)
def test_known_families_are_accepted_for_any_task(tiny: Any, family: str, head: Any) -> None:
    for task in ("sst2", "stsb"):
        backbone = load_backbone(tiny(family), TASKS[task], head)
        assert backbone.task is TASKS[task]
        assert backbone.training


@pytest.mark.parametrize("head", ["classifier", "prompt"])
@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_weights_that_are_not_finite_are_not_taken_for_another_function(
    tiny: Any, family: str, head: Any, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny(family), tmp_path / family))
    weights = load_file(folder / "model.safetensors")
    norm = next(name for name in weights if name.endswith(("LayerNorm.weight", "ln_1.weight")))
    weights[norm][0] = torch.nan
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="its logits are not finite"):
        load_backbone(str(folder), TASKS["sst2"], head)
