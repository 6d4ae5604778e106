"""Checks of the Trainer's settings before a model is loaded. Lightning finds some of them only while it trains."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal

from jsonargparse import Namespace
from lightning.pytorch import Trainer

from lit_spu.errors import UserError, did_you_mean
from lit_spu.ranges import Count, CountOrZero, PositiveOrZero, Range, Refusal, Share, allows
from lit_spu.tasks import load_task

_FromMinusOne = Annotated[int, Range(-1)]

RANGES: Mapping[str, Any] = {
    "accumulate_grad_batches": Count,
    "barebones": Literal[False],  # a run always logs, and Lightning refuses both together
    "check_val_every_n_epoch": Count | None,
    "fast_dev_run": bool | CountOrZero,
    "gradient_clip_val": PositiveOrZero | None,
    "limit_predict_batches": CountOrZero | Share | None,
    "limit_test_batches": CountOrZero | Share | None,
    "limit_train_batches": CountOrZero | Share | None,
    "limit_val_batches": CountOrZero | Share | None,
    "log_every_n_steps": CountOrZero | None,
    "max_epochs": _FromMinusOne | None,
    "max_steps": _FromMinusOne,
    "min_epochs": CountOrZero | None,
    "min_steps": CountOrZero | None,
    "num_nodes": Count,
    "num_sanity_val_steps": _FromMinusOne | None,
    "reload_dataloaders_every_n_epochs": CountOrZero,
    "val_check_interval": Count | Annotated[float, Range(0, 1, without_low=True)] | str | dict[str, int] | None,
}

_NOT_CREATED = ("callbacks", "default_root_dir", "enable_checkpointing", "enable_progress_bar", "logger")


def check_trainer_settings(settings: Mapping[str, Any], method: type, task: Any) -> None:
    """Check the Trainer's settings, also by creating a Trainer without callbacks and loggers.

    Args:
        settings: The settings by name; classes are namespaces.
        method: The class of the method.
        task: The task, as `load_task` takes it.

    Raises:
        UserError: If one is not allowed.
    """
    for name, hint in RANGES.items():
        if name in settings and not allows(hint, settings[name]):
            raise UserError(f"--{Refusal(f'trainer.{name}', settings[name], hint)}")
    _check_processes(settings.get("strategy"))
    if settings.get("gradient_clip_algorithm") and not settings.get("gradient_clip_val"):
        raise UserError(
            f"--trainer.gradient_clip_algorithm={settings['gradient_clip_algorithm']} has no effect without"
            " --trainer.gradient_clip_val. Give both."
        )
    _check_monitors(settings.get("callbacks"), method, task)
    _create_trainer(settings)


def _check_processes(strategy: Any) -> None:
    """Refuse strategies that start processes with copies of this one's objects, which cannot be copied."""
    given = strategy.init_args.get("start_method") if _is_class(strategy) and "init_args" in strategy else strategy
    if isinstance(given, str) and any(word in given for word in ("spawn", "fork", "notebook")):
        raise UserError(
            f"--trainer.strategy={given}: the processes cannot be started from within this one. Use"
            f" --trainer.strategy={'ddp_find_unused_parameters_true' if 'unused' in given else 'ddp'}, which starts"
            " each by the command line."
        )


def _check_monitors(callbacks: Any, method: type, task: Any) -> None:
    """Check that the metrics that callbacks monitor exist; Lightning does so after the first validation."""
    given = [callback for callback in (callbacks or []) if _is_class(callback)] if isinstance(callbacks, list) else []
    owners = [method.__module__, *(callback.class_path for callback in given)]
    if not all(owner.startswith(("lit_spu.", "lightning.")) for owner in owners):
        return  # a user's own class may log other metrics
    known = [*_metrics(task), "train/loss", "lr"]
    for callback in given:
        monitor = callback.init_args.get("monitor") if "init_args" in callback else None
        if not isinstance(monitor, str) or ("/" in monitor and not monitor.startswith(("val/", "test/"))):
            continue  # none, or that of another callback
        without_sibling = monitor.rpartition("/")[0]  # the metrics of siblings are val/<metric>/<name>
        if not {monitor, without_sibling} & set(known):
            name = callback.class_path.rpartition(".")[2]
            raise UserError(
                f"--trainer: {name}: no metric {monitor!r} is logged to monitor. {did_you_mean(monitor, known)}"
            )


def _metrics(task: Any) -> Iterable[str]:
    """Return the names of the metrics of a task on its validation sets."""
    loaded = load_task(task)
    parts = ["", *(f"{part}_" for part in (loaded.files.parts if loaded.files else ()) if part)]
    return [f"val/{part}{name}" for part in parts for name in (*loaded.metrics, "loss")]


def _create_trainer(settings: Mapping[str, Any]) -> None:
    """Let Lightning check what a Trainer checks when it is created: devices, strategy, precision and more."""
    plain = {
        name: value
        for name, value in settings.items()
        if name not in _NOT_CREATED and not any(map(_is_class, value if isinstance(value, list) else [value]))
    }
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.ERROR)  # the real Trainer says the same
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            Trainer(**plain, logger=False, enable_checkpointing=False, enable_progress_bar=False)
    except Exception as error:  # Lightning raises many kinds
        raise UserError(f"--trainer: {' '.join(str(error).split())}") from error
    finally:
        logger.setLevel(level)


def _is_class(value: Any) -> bool:
    return isinstance(value, Namespace) and "class_path" in value
