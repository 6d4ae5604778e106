"""How much memory training takes, from shapes alone: no weights are loaded and nothing is computed.

A step runs on torch's fake tensors, which have a size and no content, under the counter that measures real steps
(`lit_spu.measure.LiveBytes`). So the two differ only where what is done depends on the content: a batch without any
padding needs no mask, which an estimate counts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch._subclasses import FakeTensorMode

from lit_spu.errors import UserError
from lit_spu.measure import Kind
from lit_spu.methods.base import Method
from lit_spu.study.grid import build
from lit_spu.study.steps import batch_of, live_bytes, training_step


@dataclass(frozen=True)
class Estimate:
    """What a training step of one method takes, in bytes; `by_kind` adds up to `peak`."""

    name: str
    trainable: int
    peak: int
    by_kind: Mapping[Kind, int]
    largest: int | None  # the largest batch within the budget, where there is one


def estimates(
    configs: Mapping[str, Path],
    backbone: str,
    task: str,
    batch_size: int,
    length: int,
    budget: int | None = None,
    settings: Mapping[str, Any] | None = None,
) -> tuple[list[Estimate], dict[str, UserError]]:
    """An estimate a config, smallest first, and why there is none of the others.

    Args:
        configs: Config files of methods, by name.
        backbone: An embedded model, or a Hugging Face name or folder, of which only config and tokenizer are read.
        task: The task, for the width of the head and the words that answer.
        batch_size: Texts of a batch.
        length: Tokens of every text.
        budget: Bytes that must hold the largest batch.
        settings: Settings of the methods, laid over those of the configs that have such.
    """
    found, refused = [], {}
    for name, config in configs.items():
        with FakeTensorMode(allow_non_fake_inputs=True):
            try:
                method = build(config, **{**(settings or {}), "backbone": backbone, "task": task})
                max_tokens = method.encoding.max_tokens
                if max_tokens is not None and length > max_tokens:
                    raise UserError(f"length={length}: {backbone} reads at most {max_tokens} tokens.")
            except UserError as error:
                refused[name] = error
                continue
            found.append(_estimate(name, method, batch_size, length, budget))
    return sorted(found, key=lambda estimate: estimate.peak), refused


def _estimate(name: str, method: Method, batch_size: int, length: int, budget: int | None) -> Estimate:
    def step(examples: int) -> tuple[int, Mapping[Kind, int]]:
        live = live_bytes(method, *training_step(method, batch_of(examples, length, method.task)))
        return live.peak_bytes, live.by_kind

    peak, by_kind = step(batch_size)
    trainable = sum(parameter.numel() for parameter in method.parameters() if parameter.requires_grad)
    fitting = None if budget is None else largest(lambda examples: step(examples)[0], budget)
    return Estimate(name, trainable, peak, by_kind, fitting)


def largest(peak: Callable[[int], int], budget: int) -> int:
    """The largest batch whose peak is within the budget, or 0.

    Peaks grow about linearly with the batch, so that the line through the last two leads there in a few steps.
    """
    fits, at_fits = 1, peak(1)
    if at_fits > budget:
        return 0
    growth: float = peak(2) - at_fits
    too_large: int | None = None
    while too_large is None or too_large - fits > 1:
        guess = fits + max(1, int((budget - at_fits) / max(growth, 1)))
        guess = guess if too_large is None else min(guess, too_large - 1)
        at_guess = peak(guess)
        growth = (at_guess - at_fits) / (guess - fits)
        if at_guess <= budget:
            fits, at_fits = guess, at_guess
        else:
            too_large = guess
    return fits
