"""Copies from the host to a device that overlap with the steps on earlier batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor


def copy_ahead(batches: Iterable[Mapping[str, Tensor]], device: torch.device) -> Iterator[dict[str, Tensor]]:
    """Yield batches on a device. The copy of a batch starts before the batch before it is yielded.

    So three batches need memory: the one that is copied, the one that is yielded next, and the one before it, which a
    caller still holds until then.

    Args:
        batches: Batches in pinned memory.
        device: An accelerator. Copies run in a separate stream, and the current stream waits for a batch's copy when
            the batch is yielded. The host does not wait.
    """
    stream = torch.Stream(device)

    def copy(batch: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], torch.Event]:
        with stream:
            return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}, stream.record_event()

    def wait_for(copied: dict[str, Tensor], event: torch.Event) -> dict[str, Tensor]:
        current = torch.accelerator.current_stream(device)
        current.wait_event(event)
        for tensor in copied.values():
            tensor.record_stream(current)  # its memory is not used again before the current stream is done with it
        return copied

    previous = None
    for batch in batches:
        following = copy(batch)
        if previous is not None:
            yield wait_for(*previous)
        previous = following
    if previous is not None:
        yield wait_for(*previous)
