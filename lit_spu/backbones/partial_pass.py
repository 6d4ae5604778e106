"""Forward passes that run only some blocks of a stack.

A pass can start above blocks whose outputs are known, and can stop below blocks whose outputs are not used. The other
blocks are skipped: they return a known state, or their input. transformers' own code runs around them, so its masks,
its position embeddings and its order of modules stay in force.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lit_spu.backbones.hooks import override_forward, position_wise


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
        if self._others is None and 0 in numbers:
            restores.append(override_forward(self.blocks[0], self._run_first))
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
        if number == 0 and (self._others is None or (self._has_shared_parts and numbers)):
            with torch.no_grad():
                self._run_first(forward, state, *args, **kwargs)
        new = below if below is not None and number == numbers.start - 1 else state
        others = self._shared or self._others
        return (new, *others) if others else new

    @position_wise
    def _run_first(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run the first block and remember the parts of its output after the hidden state.

        A later block does not serve: it may be trained, and draw random numbers for its dropout.
        """
        output = forward(*args, **kwargs)
        others = output[1:] if isinstance(output, tuple) else ()
        self._others = (None,) * len(others)
        self._has_shared_parts = any(isinstance(part, Tensor) for part in others)
        self._shared = others
        return output
