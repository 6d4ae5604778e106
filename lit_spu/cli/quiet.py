"""Warnings and log lines of Lightning and torch that a user cannot act on, hidden for the length of a run."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

HIDDEN_LOG_LINES = (
    "💡 Tip",  # an advertisement
    "TPU available",  # an absent accelerator
    "Trainer already configured with model summary",  # TrainableParameters prints its own
    "Loading `train_data",  # follows from the learning rate schedule, which needs the number of batches
)
"""Beginnings of lines that Lightning logs."""


@contextmanager
def hide_expected_warnings() -> Iterator[None]:
    """Context manager that hides expected warnings and log lines, and restores all filters at the end."""
    log = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    log.addFilter(_is_shown)
    with warnings.catch_warnings():
        # Lightning calls what jsonargparse 5 removes; our upper bound excludes that version
        warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"(lightning|jsonargparse)\.")
        # torch, on Lightning's use of its pytrees, in every run
        warnings.filterwarnings("ignore", message=".*LeafSpec.* is deprecated")
        # frozen modules are in evaluation mode on purpose
        warnings.filterwarnings("ignore", message=r"Found \d+ module\(s\) in eval mode")
        # SelectiveUpdate skips steps on purpose
        warnings.filterwarnings("ignore", message="`training_step` returned `None`")
        # GLUE tokenises in advance: a batch takes a tenth of a millisecond, so no workers are needed
        warnings.filterwarnings("ignore", message=".*does not have many workers")
        # ProfilerTrace writes the events of a cycle into a file before the next cycle clears them
        warnings.filterwarnings("ignore", message="Warning: Profiler clears events")
        # a resumed run continues in its own directory, where its earlier metrics have been renamed
        warnings.filterwarnings("ignore", message="(Experiment logs|Checkpoint) directory .* exists and is not empty")
        try:
            yield
        finally:
            log.removeFilter(_is_shown)


@contextmanager
def hide_callback_states() -> Iterator[None]:
    """Context manager that hides the warning on states of callbacks in a checkpoint, which evaluation does not need."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Be aware that when using `ckpt_path`")
        yield


def _is_shown(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(HIDDEN_LOG_LINES)
