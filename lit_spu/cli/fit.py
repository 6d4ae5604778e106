"""The subcommands that run a Trainer: LightningCLI over every method and GLUE, with one directory per run."""

from __future__ import annotations

import argparse
import inspect
import json
import signal
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from pathlib import Path
from pkgutil import resolve_name
from tempfile import TemporaryDirectory
from typing import Any

from jsonargparse import Namespace
from lightning.fabric.plugins import CheckpointIO
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.callbacks import ModelCheckpoint, ModelSummary, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.profilers import Profiler
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.utilities import rank_zero_only

from lit_spu import registry
from lit_spu.callbacks.finish_validation import FinishValidation
from lit_spu.callbacks.last_checkpoint import LastCheckpoint
from lit_spu.callbacks.predictions import Predictions
from lit_spu.callbacks.run_summary import RunSummary
from lit_spu.checkpoints import run_dir, trained_weights
from lit_spu.checkpoints.whole_files import WholeFiles
from lit_spu.cli.launch import HeldLogger, SaveRun
from lit_spu.cli.parser import Parser, limit_imports, put_configs_first
from lit_spu.cli.quiet import hide_callback_states, hide_expected_warnings
from lit_spu.cli.refusals import check_honoured
from lit_spu.cli.resume import Checkpoint, RecordRun, describe_run, open_checkpoint
from lit_spu.cli.subcommands import RUNS
from lit_spu.cli.trainer_settings import check_trainer_settings
from lit_spu.cli.user_errors import exit_on_user_error, print_to_stderr
from lit_spu.data.glue import GLUE
from lit_spu.errors import UserError
from lit_spu.files import check_writable, lock_folder
from lit_spu.methods.base import Method
from lit_spu.ranges import Seed, Text
from lit_spu.safe_yaml import read_mapping
from lit_spu.tasks import load_task

DEFAULTS = Path(__file__).with_name("defaults.yaml")
"""The settings below every config file and flag. In the package, so that they are found from any directory."""


RESUMED = "A run directory, to resume that run, or a checkpoint file, to continue from it in a new run directory."
EVALUATED = "A run directory (its best checkpoint), a checkpoint file, or a folder that `lit-spu export` wrote."
"""Help of `--ckpt_path`. Lightning's own help names keywords that this command line does not have."""


class SpuCLI(LightningCLI):
    """LightningCLI with fit, validate, test and predict for every method on every task.

    Settings come from defaults.yaml, the checkpoint of `--ckpt_path`, config files and flags; later ones override
    earlier ones. The task is given once, as `data.task`, and linked to the model.
    """

    def __init__(self, args: Sequence[str], resources: ExitStack) -> None:
        self._resources = resources  # what lasts until the run ends
        for package in ("methods", "callbacks"):  # jsonargparse resolves short names of imported classes only
            list(registry.classes(f"lit_spu.{package}"))
        self.args = Parser.command_line = list(args)
        self.flags = _parse_early(self.args)
        self.checkpoint: Checkpoint | None = None
        self.differences: list[str] = []  # settings that differ from the checkpoint's
        self.run_dir: Path | None = None
        defaults = [str(DEFAULTS)]
        super().__init__(
            Method,
            GLUE,
            save_config_callback=SaveRun,
            save_config_kwargs={"command": self.args},
            seed_everything_default=42,
            parser_kwargs={"prog": "lit-spu"}
            | {name: {"description": text, "default_config_files": defaults} for name, text in RUNS.items()},
            parser_class=Parser,
            subclass_mode_model=True,
            args=self.args,
            auto_configure_optimizers=False,
        )

    # -- settings ---------------------------------------------------------------------------------------------------

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--run_dir", type=Text, default=run_dir.PATTERN, help="Directory of all files of the run.")
        parser.link_arguments(("data.task", "model"), "model.init_args.task", compute_fn=self._link_task)

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> Any:
        parser: Any = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        parser.set_defaults({"weights_only": True})  # a checkpoint is data: it must not be able to run code
        ckpt_path = next(action for action in parser._actions if action.dest == "ckpt_path")
        ckpt_path.help = RESUMED if subcommand == "fit" else EVALUATED
        parser.hints["seed_everything"] = bool | Seed
        if subcommand in ("validate", "test"):
            parser.set_defaults({"verbose": False})  # RunSummary prints the same
        if subcommand == "predict":
            parser.set_defaults({"return_predictions": False})  # Predictions collects what it writes
            parser.add_argument(
                "--output",
                type=Text | None,
                help="File of predictions: .jsonl, or .tsv for the GLUE server. Default: both, in the run directory.",
            )
        return parser

    def _link_task(self, task: Any, model: Namespace | None) -> Any:
        """Return the task of the data, for the model; raise a UserError if the model is given another task."""
        if model is None:
            return task
        # a flag or a file may repeat the default, which the parsed settings do not distinguish from nothing given
        default = inspect.signature(Method).parameters["task"].default
        written = self.flags.model_task or next(filter(None, map(_model_task_in, self.flags.config)), None)
        given = written or model.init_args.get("task", default)
        if given != task and (written or given != default):
            raise UserError(
                f"--model.task: {given!r}, but the data's task is {task!r}. Give it once, for both: --data.task={given}"
            )
        return task

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse the arguments. Files and flags override the settings of a checkpoint."""
        limit_imports(self.args)
        position = next((number for number, arg in enumerate(self.args, 1) if arg in RUNS), len(self.args))
        start, given = self.args[:position], put_configs_first(self.args[position:])
        if self.flags.ckpt_path not in (None, "null"):
            self.checkpoint = open_checkpoint(self.flags.ckpt_path, start[-1])
            # as JSON, which quotes its strings: the parser would read a name like 1e-3 in YAML as a number
            given = ["--config", json.dumps(self.checkpoint.config), *given]
        self.config = parser.parse_args(start + given)

    def _parse_ckpt_path(self) -> None:
        """Compare the settings with the checkpoint's; in Lightning's own method the checkpoint wins silently."""
        subcommand = self.config.subcommand
        config = self.config[subcommand]
        if not config.ckpt_path:
            return
        # a config file may name the checkpoint, too
        checkpoint = self.checkpoint = self.checkpoint or open_checkpoint(config.ckpt_path, subcommand)
        config.ckpt_path = None if checkpoint.is_export else str(checkpoint.file)
        self._dump_config()
        self.differences = checkpoint.find_differences(self.config_dump["model"])
        if subcommand == "fit":
            checkpoint.check_resumable(self.differences + checkpoint.find_run_differences(self.config_dump))
        elif self.differences:
            print_to_stderr(f"These settings differ from the checkpoint's: {', '.join(self.differences)}")

    # -- the run ----------------------------------------------------------------------------------------------------

    def before_instantiate_classes(self) -> None:
        """Check the trainer's settings and the places to write, before any weights are loaded."""
        settings = vars(self._get(self.config, "trainer"))
        check_honoured(self.config[str(self.subcommand)], str(self.subcommand))
        method = resolve_name(self._get(self.config, "model").class_path)
        if self.subcommand == "fit":
            method.check_trainer(settings)
        check_trainer_settings(settings, method, self._get(self.config, "data").task)
        if self._get(self.config, "data").text is None:
            self.run_dir = self._open_run_dir()
        if self.subcommand == "predict":
            for file in self._output_files():
                check_writable(file, "--output")

    def instantiate_classes(self) -> None:
        """Create the trainer's parts, the data and the model. The error of a part's constructor becomes a UserError."""
        failed: list[UserError] = []

        def create(cls: type[Any], *args: Any, **kwargs: Any) -> Any:
            try:
                return cls(*args, **kwargs)
            except Exception as error:  # of any kind: the class may be a user's, or lack a library
                failed.append(UserError(f"--trainer: {cls.__name__} cannot be created: {' '.join(str(error).split())}"))
                raise failed[-1] from error

        for part in (Accelerator, Callback, Logger, Profiler, Strategy):
            self.parser.add_instantiator(create, part)
        try:
            super().instantiate_classes()
        except ValueError as error:  # jsonargparse's, which does not always name the constructor's
            if failed:
                raise failed[0] from error
            raise

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Return a trainer that writes into the run directory alone; with `--data.text`, one that writes nothing."""
        if self.run_dir:
            kwargs.update(self._trainer_of_run(self.run_dir))
        else:
            self.save_config_callback = None
            kwargs.update(logger=False, callbacks=[Predictions(self._output_files(), echo=True)])
            kwargs.update(enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False)
        try:
            trainer = super().instantiate_trainer(**kwargs)
        except (ValueError, TypeError, MisconfigurationException) as error:
            raise UserError(f"--trainer: {' '.join(str(error).split())}") from error
        if any(isinstance(callback, SaveRun) for callback in trainer.callbacks):  # type: ignore[attr-defined]
            trainer.loggers = list(map(HeldLogger, trainer.loggers))
        return trainer

    def _trainer_of_run(self, folder: Path) -> dict[str, Any]:
        """Return the trainer's settings that depend on the run directory: callbacks, loggers and directories."""
        settings: dict[str, Any] = {
            "default_root_dir": folder,
            "callbacks": _without_repeats([*self._given_callbacks(), *self._required_callbacks()]),
        }
        if self.subcommand != "fit":
            settings["enable_checkpointing"] = False  # otherwise Lightning adds a ModelCheckpoint even to evaluate
        settings["logger"] = self._loggers(folder)
        plugins = self._get(self.config_init, "trainer")["plugins"] or []
        plugins = plugins if isinstance(plugins, list) else [plugins]
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            settings["plugins"] = [*plugins, WholeFiles()]
        return settings

    def _loggers(self, folder: Path) -> list[Logger]:
        """Return a logger of metrics.csv, and the loggers of the settings or, if there are none, TensorBoard's."""
        given = self._get(self.config_init, "trainer")["logger"]
        if given is False:
            return []
        if given in (None, True):
            given = TensorBoardLogger(folder, "", "", sub_dir="tensorboard", default_hp_metric=False)
        # the first one's directory is trainer.log_dir, into which the callbacks write
        return [CSVLogger(folder, name="", version=""), *(given if isinstance(given, list) else [given])]

    def _open_run_dir(self) -> Path:
        """Return the run directory, locked: that of a resumed run, unless another is given, which has no results."""
        if self._get(self.config, "trainer").fast_dev_run:
            return Path(self._resources.enter_context(TemporaryDirectory()))
        pattern, resumed = self._get(self.config, "run_dir"), self.checkpoint and self.checkpoint.resumed_dir
        task = load_task(self._get(self.config, "data").task).name
        method = self._get(self.config, "model").class_path.rpartition(".")[2]
        seed = self._get(self.config, "seed_everything")
        path = run_dir.new_run_dir(pattern, task=task, method=method, seed=seed)
        if resumed and (pattern == run_dir.PATTERN or path.resolve() == resumed.resolve()):
            path = resumed
        lock = rank_zero_only(self._resources.enter_context)
        lock(lock_folder(path, "--run_dir"))
        if path != resumed:
            run_dir.check_unused(path)
        return path

    def _given_callbacks(self) -> list[Callback]:
        """Return the callbacks of the settings."""
        given = self._get(self.config_init, "trainer")["callbacks"] or []
        callbacks: list[Callback] = list(given) if isinstance(given, list) else [given]
        trainer = self._get(self.config, "trainer")
        hidden: list[type[Callback]] = [ProgressBar] * (trainer.enable_progress_bar is False)
        hidden += [ModelSummary] * (trainer.enable_model_summary is False)
        return [callback for callback in callbacks if not isinstance(callback, tuple(hidden))]

    def _required_callbacks(self) -> list[Callback]:
        """Return the callbacks of every run, whatever callbacks the settings name."""
        if self.subcommand == "predict":
            return [Predictions(self._output_files())]
        if self.subcommand != "fit":
            return [RunSummary()]
        if self._get(self.config, "trainer").enable_checkpointing is False:
            return [FinishValidation(), RunSummary()]
        folder = Path(str(self.run_dir), "checkpoints")  # explicit, so that Lightning makes it absolute
        return [
            ModelCheckpoint(
                folder,
                "best",
                self.model.task.monitor,
                mode="max",
                save_on_train_epoch_end=False,  # but after validation, because a resumed epoch may end without metrics
                enable_version_counter=False,
            ),
            LastCheckpoint(folder),
            RecordRun(describe_run(self.config[str(self.subcommand)])),
            FinishValidation(),
            RunSummary(),
        ]

    def _output_files(self) -> list[Path]:
        """Return the files that predictions are written to."""
        output = self._get(self.config, "output")
        if output is None:
            return [self.run_dir / "predictions.jsonl", self.run_dir / "predictions.tsv"] if self.run_dir else []
        if Path(output).suffix not in (".jsonl", ".tsv"):
            raise UserError(f"--output: {output!r} ends in neither .jsonl nor .tsv. Give a name with one of these.")
        return [Path(output)]

    def _run_subcommand(self, subcommand: str) -> None:
        checkpoint = self.checkpoint
        if checkpoint is None and subcommand != "fit":
            print_to_stderr("No --ckpt_path: this is the method before any training.")
        if checkpoint and checkpoint.is_export:
            trained_weights.restore_weights(self.model, checkpoint.file)
        with nullcontext() if subcommand == "fit" else hide_callback_states():
            self._run_trainer(subcommand)
        if subcommand == "predict" and self.run_dir is not None:
            print_to_stderr(f"Predictions: {', '.join(map(str, self._output_files()))}")

    def _run_trainer(self, subcommand: str) -> None:
        """Run the trainer, and turn an interruption or weights that do not fit into an exit or a UserError."""
        try:
            super()._run_subcommand(subcommand)
        except SystemExit:  # Lightning raises it after Ctrl-C, when callbacks and loggers have finished
            if Path(str(self.run_dir), "checkpoints", "last.ckpt").exists():
                print_to_stderr(f"Interrupted. Continue with: lit-spu fit --ckpt_path {self.run_dir}")
            signal_number = signal.SIGTERM if self.trainer.received_sigterm else signal.SIGINT
            raise SystemExit(128 + signal_number) from None
        except RuntimeError as error:
            if self.checkpoint and self.differences and "loading state_dict" in str(error):
                differences = ", ".join(self.differences)
                raise UserError(f"{self.checkpoint.file} does not fit these settings: {differences}.") from error
            raise


def _parse_early(args: Sequence[str]) -> argparse.Namespace:
    """Parse the few flags that are needed before the parser exists."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--ckpt_path")
    parser.add_argument("--model.task", "--model.init_args.task", dest="model_task")
    parser.add_argument("-c", "--config", action="append", default=[])
    return parser.parse_known_args(args)[0]


def _model_task_in(config_file: str) -> str | None:
    """Return the task that a config file sets for the model, if it sets one."""
    try:
        return str(read_mapping(config_file)["model"]["init_args"]["task"])
    except (UserError, KeyError, TypeError):  # the parser reports errors in the file
        return None


def _without_repeats(callbacks: Sequence[Callback]) -> list[Callback]:
    """Return the last callback of each class of lit_spu, as after `--trainer.callbacks+=Memory …`, and all others."""
    return [
        callback
        for i, callback in enumerate(callbacks)
        if not type(callback).__module__.startswith("lit_spu.")
        or all(type(later) is not type(callback) for later in callbacks[i + 1 :])
    ]


def run(args: Sequence[str]) -> None:
    """Run a command line."""
    with exit_on_user_error(), hide_expected_warnings(), ExitStack() as resources:
        SpuCLI(args, resources)
