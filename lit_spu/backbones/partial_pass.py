"""Forward passes that run only some blocks of a stack.

A pass can start above blocks whose outputs are known, and can stop below blocks that nobody reads. The other blocks are
skipped: they return a known state, or their input. transformers' own code runs around them, so its masks, its position
embeddings and its order of modules stay in force.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lit_spu.backbones.hooks import override_forward


class PartialStack:
    """A stack whose blocks can be skipped.

    Some families' blocks return a tuple that starts with the hidden state. If its other parts are tensors (a T5's
    position bias), the first block computes them for all, so it runs whenever a later block does.
    """

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        self.blocks = blocks
        self._others: tuple[Any, ...] | None = None  # None for each other part of an output; unknown before a first run
        self._has_shared_parts = False
        self._shared: tuple[Any, ...] | None = None  # the other parts in the present pass

    @contextmanager
    def run_only(self, numbers: range, below: Tensor | None = None) -> Iterator[None]:
        """Context manager in which only the blocks of these numbers run.

        Args:
            numbers: A range without gaps; the blocks before it and after it are skipped.
            below: Output of the block before the range. By default a skipped block returns its input.
        """
        restores = [
            override_forward(block, partial(self._skip, number, numbers, below))
            for number, block in enumerate(self.blocks)
            if number not in numbers
        ]
        try:
            yield
        finally:
            self._shared = None
            for restore in restores:
                restore()

    def _skip(
        self,
        number: int,
        numbers: range,
        below: Tensor | None,
        forward: Callable[..., Any],
        state: Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        if self._others is None or (number == 0 and self._has_shared_parts and numbers):
            with torch.no_grad():
                self._note_parts(forward(state, *args, **kwargs))
        new = below if below is not None and number == numbers.start - 1 else state
        others = self._shared or self._others
        return (new, *others) if others else new

    def _note_parts(self, output: Any) -> None:
        """Remember the parts of a block's output after its hidden state."""
        others = output[1:] if isinstance(output, tuple) else ()
        self._others = (None,) * len(others)
        self._has_shared_parts = any(isinstance(part, Tensor) for part in others)
        self._shared = others
