"""The methods to set beside one another, and the runs that this takes."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from glob import glob
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import yaml

from lit_spu import registry
from lit_spu.errors import UserError, did_you_mean
from lit_spu.methods.base import Method


@dataclass(frozen=True)
class Study:
    """What to compare: every row on every task and backbone, with every seed.

    Args:
        configs: Config files of methods, or patterns of such (`configs/*.yaml`); each is a row of its name.
        variants: More rows: their flags, of which the first is `--config=…`.
        reference: The row that costs are ratios to; without training it is the zero-shot row.
        tasks: Names of tasks, or YAML files of one's own.
        backbones: Embedded models, Hugging Face names or folders.
        seeds: Seeds of the runs.
        rates: Factors of each row's own learning rate; the best on validation is reported, for every row alike.
        flags: Flags of `lit-spu fit` for all runs. `{seed}` and `{task}` in one stand for the run's own.
        flags_for: More flags, for the runs of a row, a task or a backbone of that name.
        score: What is reported: the best score on validation, or that of the same checkpoint on test.
    """

    configs: list[str]
    variants: dict[str, list[str]] = field(default_factory=dict)
    reference: str = "full"
    tasks: list[str] = field(default_factory=lambda: ["sst2"])
    backbones: list[str] = field(default_factory=lambda: ["mini-bert"])
    seeds: list[int] = field(default_factory=lambda: [1, 2, 3])
    rates: list[float] = field(default_factory=lambda: [1.0])
    flags: list[str] = field(default_factory=list)
    flags_for: dict[str, list[str]] = field(default_factory=dict)
    score: Literal["validation", "test"] = "validation"

    def rows(self) -> dict[str, list[str]]:
        """The flags of every row, by its name.

        Raises:
            UserError: if a file is missing, or the reference or a name in `flags_for` belongs to nothing.
        """
        rows = {name: [f"--config={path}"] for name, path in method_configs(self.configs).items()}
        for name, flags in self.variants.items():
            if not flags or not flags[0].startswith("--config="):
                raise UserError(f"variants: {name!r} must start with --config=…, got {flags}.")
            method_configs([flags[0].removeprefix("--config=")])
        rows |= self.variants
        if self.reference not in rows:
            raise UserError(f"reference: there is no row {self.reference!r}. {did_you_mean(self.reference, rows)}")
        known = {*rows, *map(short, self.tasks), *map(short, self.backbones)}
        for name in self.flags_for:
            if name not in known:
                raise UserError(f"flags_for: {name!r} is no row, task or backbone. {did_you_mean(name, known)}")
        return rows

    def cells(self) -> list[Cell]:
        """Every run, seed by seed, so that all rows have one result before any has two."""
        rows = self.rows()
        grid = [(task, backbone) for task in self.tasks for backbone in self.backbones]
        zero_shot = [self._cell(ZERO_SHOT, rows[self.reference], *where, self.seeds[0], 1.0) for where in grid]
        trained = [
            self._cell(row, flags, task, backbone, seed, rate)
            for seed in self.seeds
            for task, backbone in grid
            for rate in self.rates
            for row, flags in rows.items()
        ]
        return zero_shot + trained

    def _cell(self, row: str, flags: Sequence[str], task: str, backbone: str, seed: int, rate: float) -> Cell:
        more = [
            *self.flags,
            *(flag for name in (row, short(task), short(backbone)) for flag in self.flags_for.get(name, [])),
        ]
        own = [f"--data.task={task}", f"--model.backbone={backbone}", f"--seed_everything={seed}"]
        command, tested = "fit", self.score == "test"
        if row == ZERO_SHOT:
            command = "test" if tested else "validate"
            own.append("--model.head=prompt")
        elif rate != 1:
            own.append(f"--model.lr={rate * _learning_rate([*flags, *more]):.6g}")
        args = (arg.replace("{seed}", str(seed)).replace("{task}", short(task)) for arg in (*flags, *more, *own))
        return Cell(row, short(task), short(backbone), seed, rate, (command, *args), tested)


ZERO_SHOT = "zero-shot"
"""The row of the backbone without training, asked by its prompt."""


@dataclass(frozen=True)
class Cell:
    """One run: its place in the grid, and its command line without the run directory."""

    row: str
    task: str
    backbone: str
    seed: int
    rate: float
    args: tuple[str, ...]
    tested: bool = False
    """Whether its score is that on test, of what was best on validation."""

    @property
    def optional(self) -> bool:
        """Whether it may have no result: not every backbone can be asked without training."""
        return self.row == ZERO_SHOT

    @property
    def command(self) -> str:
        """Its command line as a user would write it."""
        then = " && lit-spu test" if self.tested and self.args[0] == "fit" else ""
        return " ".join(("lit-spu", *self.args)) + then

    @property
    def folder(self) -> str:
        """A name for its directory that other flags would change."""
        digest = hashlib.sha256("\0".join((*self.args, *("test",) * self.tested)).encode()).hexdigest()[:8]
        words = "-".join((self.row, self.task, self.backbone, f"seed{self.seed}"))
        return f"{re.sub('[^A-Za-z0-9]+', '-', words).strip('-')}-{digest}"

    def __str__(self) -> str:
        rate = "" if self.rate == 1 else f", {self.rate:g} x lr"
        return f"{self.row}, {self.task}, {self.backbone}, seed {self.seed}{rate}"


def short(name: str) -> str:
    """A task's or backbone's name, or the last part of its path."""
    return Path(name).stem if name.endswith((".yaml", ".yml")) else Path(name).name


def _learning_rate(flags: Sequence[str]) -> float:
    """The learning rate that these flags set."""
    rate = registry.settings(Method)["lr"][1].default
    for name, _, value in (flag.partition("=") for flag in flags):
        if name == "--config":
            rate = _model(Path(value)).get("init_args", {}).get("lr", rate)
        elif name in ("--model.lr", "--model.init_args.lr"):
            rate = value
    return float(rate)


def method_configs(patterns: Sequence[str]) -> dict[str, Path]:
    """The config files of methods that the patterns match, by name; files that set no method are passed over.

    Raises:
        UserError: if a pattern matches no file, or none of its files sets a method.
    """
    found: dict[str, Path] = {}
    for pattern in patterns:
        files = [Path(file) for file in sorted(glob(pattern))]
        methods = {file.stem: file for file in files if "class_path" in _model(file)}
        if not methods:
            which = "no file" if not files else f"{len(files)} files, none of which sets a method"
            raise UserError(
                f"configs: {pattern!r} matches {which}. Give files like configs/lst.yaml, or 'configs/*.yaml'."
            )
        found |= methods
    return found


def build(config: Path, **settings: Any) -> Method:
    """The method of a config file, with other settings where it has such."""
    model = _model(config)
    module, _, name = str(model["class_path"]).rpartition(".")
    classes = {cls.__name__: cls for cls in registry.classes("lit_spu.methods")}
    cls = getattr(import_module(module), name) if module else classes.get(name)
    if cls is None:
        raise UserError(f"{config}: there is no method {name!r}. {did_you_mean(name, classes)}")
    own = {key: value for key, value in settings.items() if key in registry.settings(cls)}
    method: Method = cls(**model.get("init_args", {}) | own)
    return method


def _model(config: Path) -> Mapping[str, Any]:
    try:
        settings = yaml.safe_load(config.read_text())
    except yaml.YAMLError as error:
        raise UserError(f"{config}: {' '.join(str(error).split())}") from error
    model = settings.get("model") if isinstance(settings, dict) else None
    return model if isinstance(model, dict) else {}
