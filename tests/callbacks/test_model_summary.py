"""Table of trainable parameters, with numbers counted by hand."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from lit_spu.callbacks.model_summary import TrainableParameters
from lit_spu.errors import UserError
from tests.callbacks.conftest import QUIET, MakeTrainer, Tiny, logged
from tests.runs import made

pytestmark = QUIET


class Backbone(nn.Module):
    """Embeddings that are tied to the head's output layer, two blocks and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 8)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.vocabulary = nn.Linear(8, 5, bias=False)
        self.vocabulary.weight = self.embedding.weight
        self.norm = nn.LayerNorm(8)

    @property
    def blocks(self) -> list[nn.Module]:
        return list(self.layers)

    @property
    def base_model(self) -> SimpleNamespace:
        return SimpleNamespace(embeddings=[self.embedding])


class WithSide(Tiny):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = Backbone()
        self.backbone.requires_grad_(False)
        self.backbone.norm.requires_grad_(True)


def rows(printed: str) -> dict[str, tuple[str, ...]]:
    cells = [re.split(r"\s*[│┃]\s*", line.strip("│┃ ")) for line in printed.splitlines() if line.startswith("│")]
    return {name: tuple(values) for name, *values in cells}


def test_parameters_are_counted_by_part(
    make_trainer: MakeTrainer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parameters = TrainableParameters()
    make_trainer(parameters, limit_val_batches=0).fit(WithSide())
    assert rows(capsys.readouterr().out) == {
        "embeddings": ("0", "40", "0.00"),
        "blocks": ("0", "144", "0.00"),
        "head": ("16", "16", "100.00"),
        "layer": ("18", "18", "100.00"),
        "all": ("34", "218", "15.60"),
    }
    assert parameters.summary == {"params/trainable": 34, "params/total": 218}
    assert logged(tmp_path, "params/trainable") == [34]


def test_parts_of_a_method_are_those_of_its_backbone(
    make_trainer: MakeTrainer, capsys: pytest.CaptureFixture[str]
) -> None:
    method = made("lst", "mini-bert")
    TrainableParameters().on_fit_start(make_trainer(logger=False), method)
    embeddings, *blocks = (sum(p.numel() for p in layer) for layer in method.parameters_by_depth)
    printed = rows(capsys.readouterr().out)
    assert list(printed) == ["embeddings", "blocks", "head", "side", "all"]
    assert printed["embeddings"][:2] == ("0", f"{embeddings:,}")
    assert printed["blocks"][:2] == ("0", f"{sum(blocks):,}")


def test_parts_of_other_modules_are_their_children(
    make_trainer: MakeTrainer, capsys: pytest.CaptureFixture[str]
) -> None:
    make_trainer(TrainableParameters(), limit_val_batches=0).fit(Tiny())
    assert set(rows(capsys.readouterr().out)) == {"layer", "all"}


def test_a_module_with_nothing_to_train_is_refused_before_its_optimizer(make_trainer: MakeTrainer) -> None:
    class Frozen(Tiny):
        def __init__(self) -> None:
            super().__init__()
            self.requires_grad_(False)

        def configure_optimizers(self) -> Any:
            raise AssertionError("too late")

    with pytest.raises(UserError, match="Frozen has nothing to train: all of its 18 parameters are frozen"):
        make_trainer(TrainableParameters()).fit(Frozen())
    make_trainer(TrainableParameters()).validate(Frozen(), verbose=False)  # validate needs nothing to train
