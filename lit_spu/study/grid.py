"""Define a study: a grid of methods, tasks, backbones and seeds, and the command line of each run."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from glob import escape, glob
from importlib import import_module
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, Literal

from lit_spu import registry
from lit_spu.errors import UserError, did_you_mean
from lit_spu.methods.base import Method
from lit_spu.ranges import Checked, Length, Positive, Seed, Text
from lit_spu.safe_yaml import read_mapping

PACKAGED_CONFIGS = (f"{escape(str(Path(__file__).parents[1] / 'configs'))}/*.yaml",)
"""Pattern of the config files that the package contains, one a method."""

ZERO_SHOT = "zero-shot"
"""Name of the row that evaluates the untrained backbone by its prompt."""

CALIBRATED_ZERO_SHOT = "zero-shot, calibrated"
"""Name of the row with the calibrated score of the same evaluation."""

MAJORITY = "majority"
"""Name of the row with the best constant answer."""

UNTRAINED = (ZERO_SHOT, CALIBRATED_ZERO_SHOT, MAJORITY)
"""Names of the rows that need no training."""

SET_BY_STUDY = {
    "--data.task": "Use --tasks",
    "--model.backbone": "Use --backbones",
    "--model.init_args.backbone": "Use --backbones",
    "--seed_everything": "Use --seeds",
    "--run_dir": "Use --out for all of them",
    "--ckpt_path": "A study trains from the pretrained weights",
}
"""Flags that the rows of a study cannot have, and what to do."""


@dataclass(frozen=True)
class Study(Checked):
    """Grid of runs: every row on every task and backbone, with every seed.

    Args:
        configs: Config files of methods, or glob patterns (`configs/*.yaml`). Each file is a row, named after the file.
        variants: Additional rows by name: a list of flags that starts with `--config=…`.
        reference: Row that ratios of costs are relative to. The zero-shot row evaluates its config without training.
        tasks: Names of tasks, or YAML files of custom tasks.
        backbones: Embedded models, Hugging Face names or folders.
        seeds: Random seeds of the runs.
        rates: Factors that multiply each row's own learning rate. A row reports the factor with the best score.
        flags: Flags of `lit-spu fit` for all runs. `{seed}` and `{task}` are replaced by those of the run.
        flags_for: Additional flags for the runs of one row, task or backbone, by its name.
        score: Reported score: the best on validation, or the score of the same checkpoint on test.
    """

    configs: Annotated[list[Text], Length(1)]
    variants: dict[Text, Annotated[list[Text], Length(1, unique=False)]] = field(default_factory=dict)
    reference: Text = "full"
    tasks: Annotated[list[Text], Length(1)] = field(default_factory=lambda: ["sst2"])
    backbones: Annotated[list[Text], Length(1)] = field(default_factory=lambda: ["mini-bert"])
    seeds: Annotated[list[Seed], Length(1)] = field(default_factory=lambda: [1, 2, 3])
    rates: Annotated[list[Positive], Length(1)] = field(default_factory=lambda: [1.0])
    flags: Annotated[list[Text], Length(unique=False)] = field(default_factory=list)
    flags_for: dict[Text, Annotated[list[Text], Length(unique=False)]] = field(default_factory=dict)
    score: Literal["validation", "test"] = "validation"

    def rows(self) -> dict[str, list[str]]:
        """Return the flags of every row, by the row's name.

        Raises:
            UserError: If a file is missing, or if the reference or a name in `flags_for` is unknown.
        """
        rows = {name: [f"--config={path}"] for name, path in method_configs(self.configs).items()}
        for name, flags in self.variants.items():
            if not flags or not flags[0].startswith("--config="):
                raise UserError(f"--variants: the flags of {name!r} must start with --config=…, got {flags}.")
            if name in (*rows, *UNTRAINED):
                raise UserError(f"--variants: there is a row {name!r} already. Give this variant another name.")
            method_configs([flags[0].removeprefix("--config=")])
        rows |= self.variants
        if self.reference not in rows:
            raise UserError(f"--reference: no row is named {self.reference!r}. {did_you_mean(self.reference, rows)}")
        known = {*rows, *map(short_name, self.tasks), *map(short_name, self.backbones)}
        for name in self.flags_for:
            if name not in known:
                raise UserError(f"--flags_for: no row, task or backbone is named {name!r}. {did_you_mean(name, known)}")
        return rows

    def cells(self) -> list[Cell]:
        """Return every run, ordered by seed: all rows have one result before any row has two.

        Raises:
            UserError: As `rows`; and if two tasks or backbones have one name, or a flag is one that the study sets.
        """
        _refuse_shared_names("tasks", self.tasks)
        _refuse_shared_names("backbones", self.backbones)
        for flag in chain(self.flags, *self.variants.values(), *self.flags_for.values()):
            if (name := flag.partition("=")[0]) in SET_BY_STUDY:
                raise UserError(f"{name} is set for each run of a study. {SET_BY_STUDY[name]}.")
        rows = self.rows()
        grid = [(task, backbone) for task in self.tasks for backbone in self.backbones]
        zero_shot = [self._make_cell(ZERO_SHOT, rows[self.reference], *place, self.seeds[0], 1.0) for place in grid]
        trained = [
            self._make_cell(row, flags, task, backbone, seed, rate)
            for seed in self.seeds
            for task, backbone in grid
            for rate in self.rates
            for row, flags in rows.items()
        ]
        return zero_shot + trained

    def _make_cell(self, row: str, flags: Sequence[str], task: str, backbone: str, seed: int, rate: float) -> Cell:
        shared = [
            *self.flags,
            *(flag for name in (row, short_name(task), short_name(backbone)) for flag in self.flags_for.get(name, [])),
        ]
        place = [f"--data.task={task}", f"--model.backbone={backbone}", f"--seed_everything={seed}"]
        command, tested = "fit", self.score == "test"
        if row == ZERO_SHOT:
            command = "test" if tested else "validate"
            place.append("--model.head=prompt")
        elif rate != 1:
            place.append(f"--model.lr={rate * _find_learning_rate([*flags, *shared]):.6g}")
        arguments = (*flags, *shared, *place)
        args = (arg.replace("{seed}", str(seed)).replace("{task}", short_name(task)) for arg in arguments)
        return Cell(row, short_name(task), short_name(backbone), seed, rate, (command, *args), tested)


@dataclass(frozen=True)
class Cell:
    """One run of a study: its place in the grid, and its command line without the run directory."""

    row: str
    task: str
    backbone: str
    seed: int
    rate: float
    args: tuple[str, ...]
    tested: bool = False
    """True if the score is that of the best checkpoint on test, False if it is the best score on validation."""

    @property
    def optional(self) -> bool:
        """True if the run may fail: not every backbone can be evaluated without training."""
        return self.row == ZERO_SHOT

    @property
    def command(self) -> str:
        """Command line as a user would write it."""
        test = " && lit-spu test" if self.tested and self.args[0] == "fit" else ""
        return " ".join(("lit-spu", *self.args)) + test

    @property
    def folder(self) -> str:
        """Name of the cell's directory: readable words and a hash of all flags."""
        digest = hashlib.sha256("\0".join((*self.args, *("test",) * self.tested)).encode()).hexdigest()[:8]
        words = "-".join((self.row, self.task, self.backbone, f"seed{self.seed}"))
        return f"{re.sub('[^A-Za-z0-9]+', '-', words).strip('-')}-{digest}"

    def __str__(self) -> str:
        rate = "" if self.rate == 1 else f", {self.rate:g} x lr"
        return f"{self.row}, {self.task}, {self.backbone}, seed {self.seed}{rate}"


def _refuse_shared_names(flag: str, values: Sequence[str]) -> None:
    """Raise a UserError if two tasks or backbones have one short name: their runs would be averaged."""
    names = list(map(short_name, values))
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"--{flag}: two have the name {name!r} in the results. Rename the file or folder of one.")


def short_name(name: str) -> str:
    """Return the name of a task or backbone; of a path, the last part without `.yaml`."""
    return Path(name).stem if name.endswith((".yaml", ".yml")) else Path(name).name


def _find_learning_rate(flags: Sequence[str]) -> float:
    """Return the learning rate that these flags set: the last one, or the default of all methods."""
    rate = registry.settings(Method)["lr"][1].default
    configs_first = sorted(flags, key=lambda flag: not flag.startswith("--config="))  # as in the command line's parser
    for name, _, value in (flag.partition("=") for flag in configs_first):
        if name == "--config":
            rate = _init_args(Path(value)).get("lr", rate)
        elif name in ("--model.lr", "--model.init_args.lr"):
            rate = value
    try:
        return float(rate)
    except (TypeError, ValueError) as error:
        raise UserError(f"--rates multiplies the learning rate of {' '.join(flags)}, which is {rate!r}.") from error


def method_configs(patterns: Sequence[str]) -> dict[str, Path]:
    """Return the config files that match the patterns, by name. Files without a method are skipped.

    Raises:
        UserError: If a pattern matches no file, or if none of its files sets a method.
    """
    found: dict[str, Path] = {}
    for pattern in patterns:
        files = [Path(file) for file in sorted(glob(pattern))]
        methods = {file.stem: file for file in files if "class_path" in _read_model_section(file)}
        for name, file in methods.items():
            if not file.samefile(found.get(name, file)):
                raise UserError(f"--configs: {found[name]} and {file} would be one row, {name!r}. Rename one of them.")
        if not methods:
            problem = f"matches {len(files)} files, but none of them sets a method" if files else "matches no file"
            raise UserError(f"--configs: {pattern!r} {problem}. Give files like configs/lst.yaml, or 'configs/*.yaml'.")
        found |= methods
    return found


def build(config: Path, **settings: Any) -> Method:
    """Build the method of a config file.

    Args:
        config: Config file with a `model` section.
        **settings: Values that replace those of the config. Settings that the method does not have are ignored.

    Raises:
        UserError: If the file is not valid YAML, or if its method or one of its settings does not exist.
    """
    model = _read_model_section(config)
    module, _, name = str(model["class_path"]).rpartition(".")
    classes = {cls.__name__: cls for cls in registry.classes("lit_spu.methods")}
    try:
        cls = getattr(import_module(module), name, None) if module else classes.get(name)
    except (ImportError, ValueError) as error:
        raise UserError(f"{config}: model.class_path: {error}. {did_you_mean(name, classes)}") from error
    if not (isinstance(cls, type) and issubclass(cls, Method)):
        raise UserError(f"{config}: model.class_path: {name!r} is no method. {did_you_mean(name, classes)}")
    known, given = registry.settings(cls), _init_args(config)
    for key in given:
        if key not in known:
            raise UserError(f"{config}: {name} has no setting {key!r}. {did_you_mean(str(key), known)}")
    return cls(**given | {key: value for key, value in settings.items() if key in known})


def build_for_gpu(config: Path, **settings: Any) -> Method:
    """Build the method of a config file as it trains on a GPU, where ladders recompute no blocks by default.

    See `build` for the arguments and errors.
    """
    method = build(config, **settings)
    if method.hparams.get("gradient_checkpointing", False) is None:
        return build(config, **settings | {"gradient_checkpointing": False})
    return method


def _read_model_section(config: Path) -> Mapping[str, Any]:
    """Return the `model` section of a config file, or an empty mapping if it has none."""
    model = read_mapping(config).get("model")
    return model if isinstance(model, dict) else {}


def _init_args(config: Path) -> dict[str, Any]:
    """Return the settings of the method in a config file."""
    settings = _read_model_section(config).get("init_args") or {}
    if not isinstance(settings, dict):
        raise UserError(f"{config}: model.init_args must be settings by name, got {settings!r}.")
    return settings
