"""Counts of operators compared with counts by hand, and with the table in the documentation."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks import launches, methods, models
from lit_spu.measure import Launches
from lit_spu.study.grid import build_for_gpu
from lit_spu.study.steps import batch_of
from lit_spu.tasks import TASKS

PAGE = Path(__file__).parents[2] / "docs" / "launches.md"


def test_operators_are_counted_by_phase() -> None:
    linear = nn.Linear(4, 4)
    optimizer = torch.optim.AdamW(linear.parameters(), fused=True)
    x = torch.ones(2, 3, 4)

    def step() -> None:
        linear(x).relu().flatten(1).sum().backward()  # linear, relu, sum, the gradient 1; flatten is a view
        optimizer.step()
        optimizer.zero_grad()

    step()
    with Launches([optimizer]) as counted:
        step()
    # relu's gradient, the weight's product and the bias's sum (a sum's gradient is a view); step count and update
    assert counted.by_phase == {"forward": 4, "backward": 3, "optimizer": 2}
    assert not counted.waits
    assert not counted.host_copies


def test_fused_functions_count_as_on_cuda() -> None:
    query = torch.randn(2, 3, 4, 5, requires_grad=True)
    mask = torch.zeros(2, 1, 4, 4, requires_grad=True)  # with this gradient, a CPU takes many operators
    weight = torch.ones(5, requires_grad=True)

    def compute() -> torch.Tensor:
        return F.rms_norm(F.scaled_dot_product_attention(query, query, query, attn_mask=mask), (5,), weight)

    expected = torch.autograd.grad(compute().square().sum(), (query, mask, weight))
    with Launches() as counted:
        found = torch.autograd.grad(compute().square().sum(), (query, mask, weight))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
    assert counted.by_operator["forward", "scaled_dot_product_attention"] == 1
    assert counted.by_operator["backward", "scaled_dot_product_attention_backward"] == 3
    assert counted.by_phase["forward"] == 5  # attention, norm, square, sum, the gradient 1


def test_waits_and_copies_are_found() -> None:
    x = torch.arange(4.0)
    with Launches() as counted:
        x.max().item()
        x[x > 1]
        x.unique()
        torch.tensor([1, 2])
        x.tolist()
        x.cpu()
        x[torch.arange(2)]  # an index of numbers: its shape is known
    assert counted.waits.total() == 5
    assert counted.host_copies.total() == 1
    assert counted.own_waits == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", models.narrow_configs())
def test_the_documentation_has_the_counts(tmp_path: Path, name: str) -> None:
    """The table is a bound: a change that launches more has to say so."""
    pytest.importorskip("peft")
    task = TASKS["sst2"]
    backbone = models.save(models.narrow_configs()[name], tmp_path, task)
    rows = methods.build_methods(backbone, task, make=build_for_gpu)
    counted = launches.make_table(name, launches.count_launches(rows, batch_of(32, 32, task)))

    def numbers(lines: list[str]) -> dict[str, list[str]]:
        cells = ([cell.strip() for cell in line.split("|")[1:-2]] for line in lines if line.startswith("|"))
        return {row: values for row, *values in cells}  # without the milliseconds

    section = PAGE.read_text().partition(f"| {name} |")[2].partition("\n\n")[0]
    assert numbers(counted[2:]) == numbers(section.splitlines()[2:])
