"""The contract of all methods, which are found by discovery: a new method is tested without a line here."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from lit_spu import registry
from lit_spu.methods.base import Method
from tests.conftest import encode
from tests.ddp import run_both
from tests.runs import METHODS, fit, made

ROOT = Path(__file__).parents[1]
CLASSES = [
    cls for cls in registry.classes("lit_spu.methods") if issubclass(cls, Method) and not inspect.isabstract(cls)
]
FAMILIES = ("bert", "t5", "gpt2")

Tiny = Callable[[str], str]

pytestmark = pytest.mark.filterwarnings("ignore:The number of training batches")


def test_there_are_methods() -> None:
    assert METHODS
    assert CLASSES


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_a_method_has_a_config_a_test_and_a_page(cls: type[Method]) -> None:
    paths = {cls.__name__, f"{cls.__module__}.{cls.__name__}"}
    settings = [yaml.safe_load(path.read_text()) for path in (ROOT / "configs").rglob("*.yaml")]
    configured = {one["model"].get("class_path") for one in settings if "model" in one}
    assert configured & paths, "no config"
    assert (ROOT / "tests" / "methods" / f"test_{cls.__module__.rpartition('.')[2]}.py").is_file()
    assert (ROOT / "docs" / "methods" / f"{cls.__module__.rpartition('.')[2]}.md").is_file()
    assert inspect.getmodule(cls).__doc__
    page = cls.__doc__ or ""
    for name, parameter in inspect.signature(cls.__init__).parameters.items():
        if name != "self" and parameter.kind is not parameter.VAR_KEYWORD:
            assert f"{name}:" in page, f"{cls.__name__} does not document {name}"


@pytest.mark.parametrize("config", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_trained_moves_and_what_is_frozen_stays(tiny: Tiny, tmp_path: Path, config: str, family: str) -> None:
    method = made(config, tiny(family))
    trained = {name for name, p in method.named_parameters() if p.requires_grad}
    assert trained
    before = {name: p.detach().clone() for name, p in method.named_parameters()}
    global_step = fit(method, tmp_path, max_steps=3).global_step
    assert global_step == 3
    moved = {name for name, p in method.named_parameters() if not torch.equal(p, before[name])}
    assert moved <= trained
    assert len(moved) > len(trained) / 2
    for name, parameter in method.named_parameters():
        assert name in trained or parameter.grad is None, name


@pytest.mark.parametrize("config", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_reloaded_method_answers_the_same(tiny: Tiny, tmp_path: Path, config: str, family: str) -> None:
    method = made(config, tiny(family))
    fit(method, tmp_path, max_steps=3).save_checkpoint(tmp_path / "x.ckpt")
    torch.manual_seed(1)
    again = type(method).load_from_checkpoint(tmp_path / "x.ckpt").eval()
    batch = encode(method.backbone)
    with torch.no_grad():
        scores = method.eval()(batch)
        assert torch.equal(again(batch), scores)
    assert scores.shape == (4, 2)


@pytest.mark.parametrize("config", METHODS)
def test_a_seed_decides_a_run(tiny: Tiny, tmp_path: Path, config: str) -> None:
    runs = []
    for _ in range(2):
        method = made(config, tiny("bert"))
        fit(method, tmp_path, max_steps=3)
        runs.append(method.state_dict())
    assert all(torch.equal(tensor, runs[1][name]) for name, tensor in runs[0].items())


@pytest.mark.xdist_group("two processes")  # two such tests at once may pick the same port
@pytest.mark.slow
@pytest.mark.parametrize("config", METHODS)
def test_two_processes_equal_one(tiny: Tiny, tmp_path: Path, config: str, request: pytest.FixtureRequest) -> None:
    """Two ranks of 4 examples train on the same global batches as one of 8, and score each validation example once."""
    if config == "lst_distill":
        reason = "its distances are means over the real tokens of each rank's own batch, not of the global one"
        request.applymarker(pytest.mark.xfail(strict=True, reason=reason))
    one, two = run_both(METHODS[config], tiny("bert"), tmp_path)
    for name, tensor in one["weights"].items():
        torch.testing.assert_close(two["weights"][name], tensor, atol=2e-5, rtol=1e-4, msg=name)
    assert two["metrics"]["val/accuracy"] == pytest.approx(one["metrics"]["val/accuracy"], abs=1e-6)
    assert two["metrics"]["val/loss"] == pytest.approx(one["metrics"]["val/loss"], abs=1e-4)
