"""Rows of the benchmark compared with counts by hand, on a tiny backbone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import data, methods, models
from lit_spu.data.batching import BucketSampler, Examples, Loader
from lit_spu.data.text import Tokens
from lit_spu.measure import MIB
from lit_spu.study.steps import batch_of
from lit_spu.tasks import TASKS


@pytest.mark.slow
def test_every_config_of_a_method_has_a_row(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    from transformers import DistilBertConfig

    config = DistilBertConfig(
        vocab_size=1000, dim=64, hidden_dim=128, n_layers=5, n_heads=2, dropout=0.0, attention_dropout=0.0
    )
    task = TASKS["sst2"]
    found = methods.build_methods(models.save(config, tmp_path, task), task)
    batch = batch_of(32, 32, task)
    rows = {cost.name: cost for cost in methods.measure_costs(found, batch, rounds=1)}
    named = {path.stem for path in methods.CONFIGS.glob("*.yaml") if "class_path" in path.read_text()}
    peers = {*(f"{name} (peft)" for name in methods.PEERS), "mezo (published)"}
    assert {name.partition(",")[0] for name in rows} == named | {"forward"} | peers
    for name in methods.PEERS:
        assert rows[name].trainable == rows[f"{name} (peft)"].trainable
        assert rows[name].above_mib <= rows[f"{name} (peft)"].above_mib
    full, forward = rows["full"], rows["forward"]
    backbone = sum(parameter.numel() for parameter in found["full"].backbone.parameters())
    assert full.trainable == backbone
    assert (full.to_full, full.memory_to_full, forward.to_forward) == (1.0, 1.0, 1.0)
    assert full.above_mib > 2 * 4 * backbone / MIB  # two moments per weight, and activations
    assert forward.above_mib < rows["lst"].above_mib < 0.5 * full.above_mib
    assert 0 < forward.to_full < 1
    largest = max(parameter.numel() for parameter in found["full"].backbone.parameters())
    assert rows["mezo"].above_mib < forward.above_mib + (4 * largest + 2**20) / MIB


def test_the_published_algorithm_is_a_step_of_mezo(tmp_path: Path) -> None:
    """It moves along z by the slope of the loss, up to the rounding errors of writing the weights four times."""
    from transformers import DistilBertConfig

    config = DistilBertConfig(vocab_size=1000, dim=64, hidden_dim=128, n_layers=5, n_heads=4)
    task = TASKS["sst2"]
    method = methods.build_methods(models.save(config, tmp_path, task), task)["mezo (published)"]
    batch = batch_of(4, 8, task)
    before = [parameter.detach().clone() for parameter in method.parameters()]
    loss = method.eval().loss(batch)
    gradients = torch.autograd.grad(loss, list(method.parameters()), allow_unused=True, materialize_grads=True)
    torch.manual_seed(0)
    noise = [torch.randn_like(weight) for weight in before]
    slope = sum(float((z * g).sum()) for z, g in zip(noise, gradients, strict=True))
    methods.make_published_step(method, batch, lr=1e-2)()
    moved = [after.detach() - weight for after, weight in zip(method.parameters(), before, strict=True)]
    for change, z in zip(moved, noise, strict=True):
        torch.testing.assert_close(change, -1e-2 * slope * z, rtol=0.05, atol=0.02 * abs(slope) * 1e-2)


def test_padding_is_counted() -> None:
    lengths = np.array([2, 4, 4, 8])
    tokens = Tokens(np.zeros(18, dtype=np.int32), np.array([0, 2, 6, 10, 18]), None)
    loader = Loader(
        Examples(tokens, [0] * 4, pad_id=0), batch_size=None, sampler=BucketSampler(lengths, 2, shuffle=False)
    )
    found = data.measure("four", loader, lengths, batch_size=2)
    assert found.bucketed == (8 + 8 + 4 + 4) / 18
    assert found.to_max_length == 4 * 128 / 18
    assert found.longest_in_batch == 24 / 18  # in any order
