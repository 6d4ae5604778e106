"""Count the bytes that autograd saves for the backward pass, exactly and on any device."""

from __future__ import annotations

from collections.abc import Iterable
from types import TracebackType
from typing import Self

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


class SavedForBackward:
    """Context manager that counts the storages saved for the backward pass, each once.

    It holds references to these storages as long as it exists, so do not measure memory in the same run. In a region
    under gradient checkpointing, it counts only the inputs that the checkpoint saves.

    Args:
        exclude: Tensors that do not count, such as the parameters.
    """

    def __init__(self, exclude: Iterable[Tensor] = ()) -> None:
        self._excluded = {tensor.untyped_storage() for tensor in exclude}
        self._saved: set[torch.UntypedStorage] = set()
        self._hooks = saved_tensors_hooks(self._pack, lambda packed: packed)

    @property
    def nbytes(self) -> int:
        """Bytes of all saved storages."""
        return sum(storage.nbytes() for storage in self._saved)

    def __contains__(self, tensor: Tensor) -> bool:
        """Return whether the tensor, or another view of its storage, was saved."""
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
        return tensor.detach()  # not the tensor itself: a saved output would keep its own autograd node alive
