"""Side models and students of unusual configs run, or are refused in a line."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lit_spu.backbones import load_backbone
from lit_spu.backbones.side_model import make_side_model, scaled_config
from lit_spu.errors import UserError
from lit_spu.methods.ladder import LadderSideTuning
from lit_spu.methods.lst_distill import LSTDistillation
from lit_spu.tasks import TASKS
from tests.conftest import encode, tiny_model, tiny_tokenizer


def write(folder: Path, family: str, **changes: Any) -> str:
    """Write a tiny model with a changed config."""
    tiny_tokenizer(family).save_pretrained(folder)
    model = tiny_model(family)
    type(model)(type(model.config).from_dict({**model.config.to_dict(), **changes})).save_pretrained(folder)
    return str(folder)


def rope(**values: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_theta": 10000.0, **values}}


LONG = rope(
    rope_type="longrope",
    short_factor=[1.0, 1.1, 1.2, 1.3],
    long_factor=[2.0, 2.1, 2.2, 2.3],
    factor=2.0,
    original_max_position_embeddings=68,
)
CONFIGS = [
    ("deberta-v2", {"attention_head_size": 8}),
    ("deberta-v2", {"conv_kernel_size": 3, "conv_act": "gelu"}),
    ("deberta-v2", {"embedding_size": 16}),
    ("llama", LONG),
    ("llama", rope(rope_type="dynamic", factor=2.0)),
    ("llama", {"head_dim": 16}),
    ("llama", {"num_key_value_heads": 1}),
    ("t5", {"d_kv": 16}),
    ("t5", {"num_decoder_layers": 2}),
    ("gpt2", {"n_inner": 48}),
]


@pytest.mark.parametrize(("family", "changes"), CONFIGS)
@pytest.mark.parametrize("method", [LadderSideTuning, LSTDistillation])
@pytest.mark.parametrize("reduction", [2, 4])
def test_narrow_models_of_unusual_configs_run_or_are_refused(
    tmp_path: Path, family: str, changes: dict[str, Any], method: Any, reduction: int
) -> None:
    folder = write(tmp_path, family, **changes)
    if "dynamic" in str(changes) and reduction == 4:  # its frequencies divide by the width of a head minus 2
        with pytest.raises(UserError, match=r"model\.reduction=4: a llama of this config does not run at 1/4"):
            method(backbone=folder, reduction=reduction)
        return
    for init in ("random", "magnitude"):
        trained = method(backbone=folder, reduction=reduction, init=init)
        batch = encode(trained.backbone)
        trained.loss(batch).backward()
        assert all(p.grad is not None for p in trained.parameters() if p.requires_grad)


def test_the_factors_of_narrow_heads_are_those_of_their_frequencies(tmp_path: Path) -> None:
    """The inverse frequencies of a narrow head are every r-th of the wide head's."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    backbone = load_backbone(write(tmp_path, "llama", **LONG), TASKS["sst2"]).base_model
    narrow = scaled_config(backbone, 2, [range(4)])
    for length in (10, 100):
        wide_frequencies, narrow_frequencies = (
            ROPE_INIT_FUNCTIONS["longrope"](config, "cpu", seq_len=length)[0]
            for config in (backbone.model.config, narrow)
        )
        torch.testing.assert_close(narrow_frequencies, wide_frequencies[::2])


def test_a_module_that_reads_the_embeddings_beside_the_blocks_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DeBERTa's convolution does. Without its place in the table it would read zeros."""
    backbone = load_backbone(write(tmp_path, "deberta-v2", conv_kernel_size=3), TASKS["sst2"]).base_model
    side = make_side_model(backbone, 2, [range(4)])
    assert side.model.encoder.conv is None
    monkeypatch.setattr(backbone, "family", replace(backbone.family, unused=()))
    with pytest.raises(UserError, match="reads its embeddings beside its blocks"):
        make_side_model(backbone, 2, [range(4)])


def test_a_student_keeps_the_convolution(tmp_path: Path) -> None:
    backbone = load_backbone(write(tmp_path, "deberta-v2", conv_kernel_size=3), TASKS["sst2"])
    assert isinstance(backbone.make_student(2, [range(4)]).base_model.model.encoder.conv, nn.Module)
