"""What autograd saves for the backward pass: the proof of a method's claim about memory, exact and without a device."""

from __future__ import annotations

from collections.abc import Iterable
from types import TracebackType
from typing import Self

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


class SavedForBackward:
    """Counts the storages that are saved for backward while it is entered, each once.

    It keeps what it counted alive until it is itself dropped: count with it, and measure memory in another run. Inside
    a region of activation checkpointing only what the region itself saves is seen.

    Args:
        exclude: tensors that do not count, such as the parameters: they are there anyway.
    """

    def __init__(self, exclude: Iterable[Tensor] = ()) -> None:
        self._excluded = {tensor.untyped_storage() for tensor in exclude}
        self._saved: set[torch.UntypedStorage] = set()
        self._hooks = saved_tensors_hooks(self._pack, lambda packed: packed)

    @property
    def nbytes(self) -> int:
        """Bytes of all that was saved."""
        return sum(storage.nbytes() for storage in self._saved)

    def __contains__(self, tensor: Tensor) -> bool:
        """Whether the tensor, or another view of its storage, was saved."""
        return tensor.untyped_storage() in self._saved

    def __len__(self) -> int:
        return len(self._saved)

    def __enter__(self) -> Self:
        self._hooks.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._hooks.__exit__(kind, error, trace)

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage not in self._excluded:
            self._saved.add(storage)
        return tensor.detach()  # a saved output of its own node must not keep that node alive
