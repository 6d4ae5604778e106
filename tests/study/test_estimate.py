"""Estimates from shapes against the live bytes of real steps."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_spu.backbones.load import ASSETS
from lit_spu.errors import UserError
from lit_spu.measure import Kind
from lit_spu.study.estimate import Estimate, Failure, estimates, largest_batch_size
from lit_spu.study.grid import build, method_configs
from lit_spu.study.steps import batch_of, live_bytes, training_step
from lit_spu.tasks import TASKS
from tests.conftest import FAMILIES

CONFIGS = method_configs([f"{Path(__file__).parents[2] / 'configs'}/*.yaml"])


def measured(config: Path, backbone: str, batch_size: int, length: int, **settings: Any) -> tuple[int, dict[Kind, int]]:
    """Measure a step on a batch with padding: without padding, transformers skips the attention mask."""
    method = build(config, backbone=backbone, **settings)
    batch = batch_of(batch_size, length, TASKS["sst2"])
    batch["attention_mask"][0, -1] = 0
    live = live_bytes(method, *training_step(method, batch))
    return live.peak_bytes, live.by_kind


def estimate(config: str, backbone: str, batch_size: int, length: int, **more: Any) -> Estimate:
    (found,) = estimates({config: CONFIGS[config]}, backbone, "sst2", batch_size, length, **more)
    assert isinstance(found, Estimate), found.reason
    return found


@pytest.mark.parametrize("backbone", ["mini-bert", pytest.param("mini-t5", marks=pytest.mark.slow)])
@pytest.mark.parametrize("config", CONFIGS)
def test_an_estimate_equals_a_real_step(config: str, backbone: str) -> None:
    """With dropout, where torch saves the masks."""
    settings = {"directions": 1}  # more of MeZO's take time, and no memory
    peak, by_kind = measured(CONFIGS[config], backbone, 8, 48, **settings)
    found = estimate(config, backbone, 8, 48, settings=settings)
    assert found.peak == pytest.approx(peak, rel=0.01)
    assert found.by_kind[Kind.ACTIVATIONS] == pytest.approx(by_kind[Kind.ACTIVATIONS], rel=0.03, abs=0.02 * peak)
    assert found.by_kind[Kind.WEIGHTS] == by_kind[Kind.WEIGHTS]
    assert sum(found.by_kind.values()) == found.peak


@pytest.mark.slow
def test_a_gpu_recomputes_no_blocks_of_a_ladder() -> None:
    def peaks(config: str) -> list[int]:
        return [estimate(config, "mini-bert", 8, 32, on_gpu=on_gpu).peak for on_gpu in (False, True)]

    on_cpu, on_gpu = peaks("lst")
    assert on_gpu > on_cpu
    assert len({*peaks("lora")}) == 1


@pytest.mark.parametrize("settings", [{"rows": "seen", "noise": "gaussian"}, {"rows": "seen"}, {"noise": "rademacher"}])
def test_estimates_of_mezo_settings(settings: dict[str, Any]) -> None:
    """MeZO reads values in its step: rows of the embedding and slopes."""
    settings = {"directions": 1, **settings}
    found = estimate("mezo", "mini-bert", 8, 48, settings=settings)
    peak, _ = measured(CONFIGS["mezo"], "mini-bert", 8, 48, **settings)
    assert found.peak == pytest.approx(peak, rel=0.01)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_estimated(tiny: Callable[[str], str], family: str) -> None:
    for config in ("full", "lst"):
        peak, _ = measured(CONFIGS[config], tiny(family), 16, 24)
        found = estimate(config, tiny(family), 16, 24)
        assert found.peak == pytest.approx(peak, rel=0.03), config


def test_no_weights_are_loaded(tiny: Callable[[str], str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A backbone's folder needs only its config and its tokenizer."""
    folder = Path(tiny("bert"))
    weights = folder / "model.safetensors"
    hidden = weights.rename(folder / "elsewhere")
    try:
        found = estimate("full", str(folder), 4, 16)
    finally:
        hidden.rename(weights)
    assert found.trainable == sum(p.numel() for p in build(CONFIGS["full"], backbone=str(folder)).parameters())


def test_a_method_that_fails_is_a_row_and_the_rest_is_estimated(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user's error and a crash."""
    monkeypatch.setattr("lit_spu.methods.full.FullFineTuning.loss", lambda self, batch: 1 / 0)
    configs = {name: CONFIGS[name] for name in ("lst", "full", "head")}
    lst, full, head = estimates(configs, "mini-bert", "sst2", 4, 16, settings={"reduction": 5})
    assert isinstance(lst, Failure)
    assert "reduction" in lst.reason
    assert full == Failure("full", "ZeroDivisionError: division by zero")
    assert isinstance(head, Estimate)


def test_what_no_method_can_do_is_refused_once() -> None:
    with pytest.raises(UserError, match=r"length=1000.*160"):
        estimates(CONFIGS, "mini-bert", "sst2", 4, 1000)
    with pytest.raises(UserError, match="mini-brt"):
        estimates(CONFIGS, "mini-brt", "sst2", 4, 16)


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float16", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "config", [c if c in ("full", "lst") else pytest.param(c, marks=pytest.mark.slow) for c in CONFIGS]
)
def test_a_config_in_half_precision_is_estimated_as_it_is_loaded(config: str, dtype: str, tmp_path: Path) -> None:
    folder = shutil.copytree(ASSETS / "mini-bert", tmp_path / dtype)
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, "dtype": dtype}))
    peak, by_kind = measured(CONFIGS[config], str(folder), 8, 48, directions=1)
    found = estimate(config, str(folder), 8, 48, settings={"directions": 1})
    assert found.peak == pytest.approx(peak, rel=0.01)
    assert found.by_kind[Kind.WEIGHTS] == by_kind[Kind.WEIGHTS]


@pytest.mark.slow
@pytest.mark.parametrize("budget", [0.02, 0.05, 0.3])
def test_the_largest_batch_fits_and_one_more_does_not(budget: float) -> None:
    num_bytes = int(budget * 2**30)
    found = estimate("lst", "mini-bert", 4, 32, budget=num_bytes)
    assert found.largest is not None
    peaks = [estimate("lst", "mini-bert", found.largest + more, 32).peak for more in (0, 1)]
    assert peaks[0] <= num_bytes < peaks[1]


@pytest.mark.parametrize(
    "peak",
    [lambda n: 100 + 7 * n, lambda n: max(500, 20 * n), lambda n: 50 * n + n * n, lambda n: 100 + 50 * (n // 3)],
    ids=["line", "flat at first", "curved", "steps"],
)
@pytest.mark.parametrize("budget", [10, 500, 777, 100_000])
def test_the_search_is_right_for_any_curve(peak: Callable[[int], int], budget: int) -> None:
    assert largest_batch_size(peak, budget) == max((n for n in range(1, 20_000) if peak(n) <= budget), default=0)


def test_estimating_leaves_no_fake_tensors_behind() -> None:
    for _ in estimates({"head": CONFIGS["head"]}, "mini-bert", "sst2", 4, 16):
        assert type(torch.ones(2)) is torch.Tensor
    assert torch.ones(2).sum().item() == 2
