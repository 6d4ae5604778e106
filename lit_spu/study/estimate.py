"""Peak memory of a training step, from shapes alone: no weights are loaded and nothing is computed.

A step runs on PyTorch's fake tensors, which have a shape and no values, under the counter of real steps
(`lit_spu.measure.LiveBytes`). Estimates and measurements therefore differ only where memory depends on values. Example:
a batch without padding needs no attention mask, which an estimate counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch._subclasses import FakeTensorMode

from lit_spu import registry
from lit_spu.backbones.load import load_backbone, only_shapes
from lit_spu.errors import UserError, did_you_mean
from lit_spu.measure import Kind
from lit_spu.methods.base import Method
from lit_spu.study.grid import build, build_for_gpu
from lit_spu.study.shapes import AssumedValues
from lit_spu.study.steps import batch_of, live_bytes, training_step
from lit_spu.tasks import load_task


@dataclass(frozen=True)
class Estimate:
    """Estimated memory of one method's training step, in bytes.

    Attributes:
        name: Name of the method's config.
        trainable: Number of trainable parameters.
        peak: Peak of live tensors.
        by_kind: Bytes of each kind at the peak; they add up to `peak`.
        largest: The largest batch size within the budget, 0 if none fits; None without a budget.
    """

    name: str
    trainable: int
    peak: int
    by_kind: Mapping[Kind, int]
    largest: int | None


@dataclass(frozen=True)
class Failure:
    """Reason, in one line, why one method has no estimate."""

    name: str
    reason: str


def estimates(
    configs: Mapping[str, Path],
    backbone: str,
    task: str,
    batch_size: int,
    length: int,
    budget: int | None = None,
    settings: Mapping[str, Any] | None = None,
    on_gpu: bool = False,
) -> Iterator[Estimate | Failure]:
    """Check the settings, and return an iterator that estimates one method after another.

    A method that fails does not end the others.

    Args:
        configs: Config files of methods, by name.
        backbone: An embedded model, or a Hugging Face name or folder. Only its config and tokenizer are read.
        task: The task, which sets the width of the head and the label words.
        batch_size: Number of texts in a batch.
        length: Number of tokens in every text.
        budget: Bytes available to the largest batch.
        settings: Settings of the methods. They override the configs of all methods that have them.
        on_gpu: Estimate the defaults of a GPU instead of those of a CPU.

    Returns:
        The estimate of each method, or why it has none, in the order of the configs.

    Raises:
        UserError: If no method has one of the settings, or no method can be estimated with this backbone, task or
            length.
    """
    known = {name for cls in registry.classes("lit_spu.methods") for name in registry.settings(cls)}
    for name in settings or ():
        if name not in known:
            raise UserError(f"--settings: no method has a setting {name!r}. {did_you_mean(name, known)}")
    with _shapes(1):
        max_tokens = load_backbone(backbone, load_task(task)).encoding.max_tokens
    if max_tokens is not None and length > max_tokens:
        raise UserError(f"--length={length}: {backbone} reads at most {max_tokens} tokens. Give {max_tokens} or less.")
    values = {**(settings or {}), "backbone": backbone, "task": task}
    make = build_for_gpu if on_gpu else build
    return (
        _estimate_or_failure(name, partial(make, config, **values), batch_size, length, budget)
        for name, config in configs.items()
    )


def _estimate_or_failure(
    name: str, make: Callable[[], Method], batch_size: int, length: int, budget: int | None
) -> Estimate | Failure:
    try:
        with _shapes(batch_size * length):
            return _estimate(name, make(), batch_size, length, budget)
    except Exception as error:  # of any kind: the other methods have their estimates
        text = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        return Failure(name, " ".join(text.split()))


@contextmanager
def _shapes(num_tokens: int) -> Iterator[None]:
    """Context manager in which tensors have shapes alone, and a batch has this many tokens."""
    with FakeTensorMode(allow_non_fake_inputs=True), AssumedValues(num_tokens), only_shapes():
        yield


def _estimate(name: str, method: Method, batch_size: int, length: int, budget: int | None) -> Estimate:
    """Estimate the memory of one method, inside FakeTensorMode."""

    def measure(examples: int) -> tuple[int, Mapping[Kind, int]]:
        with AssumedValues(examples * length):
            live = live_bytes(method, *training_step(method, batch_of(examples, length, method.task)))
        return live.peak_bytes, live.by_kind

    peak, by_kind = measure(batch_size)
    trainable = sum(parameter.numel() for parameter in method.parameters() if parameter.requires_grad)
    largest = None if budget is None else largest_batch_size(lambda examples: measure(examples)[0], budget)
    return Estimate(name, trainable, peak, by_kind, largest)


def largest_batch_size(peak: Callable[[int], int], budget: int) -> int:
    """Return the largest batch size with a peak within the budget, or 0.

    Peaks grow about linearly with the batch size, so the line through the last two leads to it in a few steps.

    Args:
        peak: Function that returns the peak of a batch size, in bytes.
        budget: Bytes available.
    """
    fits, fitting_peak = 1, peak(1)
    if fitting_peak > budget:
        return 0
    growth: float = peak(2) - fitting_peak
    too_large: int | None = None
    while too_large is None or too_large - fits > 1:
        guess = fits + max(1, int((budget - fitting_peak) / max(growth, 1)))
        guess = guess if too_large is None else min(guess, too_large - 1)
        guess_peak = peak(guess)
        growth = (guess_peak - fitting_peak) / (guess - fits)
        if guess_peak <= budget:
            fits, fitting_peak = guess, guess_peak
        else:
            too_large = guess
    return fits
