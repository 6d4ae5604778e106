"""Measured costs that the tables and plots show, by their names in the records."""

from __future__ import annotations

TRAINED = "params/trainable"
MEMORY = "memory/live_peak_mib"
STEP_TIME = "latency/step_ms"
INFERENCE_TIME = "latency/inference_ms"
BACKWARD_PASSES = "passes/backward"

COLUMNS = {
    TRAINED: ("trained", "Number of trained parameters"),
    MEMORY: ("memory MiB", "Live tensor bytes at the peak of a training step, weights included"),
    STEP_TIME: ("step ms", "Median time of an optimizer step"),
    "latency/step_p95_ms": ("p95 ms", "95th percentile of the time of a step"),
    INFERENCE_TIME: ("inference ms", "Median time of a forward pass in validation"),
    "checkpoint_mib": ("checkpoint MiB", "Size of the best checkpoint, optimizer state included"),
    "passes/forward": ("forwards", "Forward passes in training"),
    BACKWARD_PASSES: ("backwards", "Backward passes in training"),
    "steps": ("steps", "Optimizer steps"),
}
"""Heading and meaning of each column of a table, after the score."""

RELATIVE = (MEMORY, STEP_TIME)
"""Columns that are also shown as a ratio to the reference row."""

BRIEF = (TRAINED, MEMORY, STEP_TIME, INFERENCE_TIME)
"""Columns that fit into a terminal."""

AXES = {
    MEMORY: "peak memory, MiB",
    STEP_TIME: "time of a step, ms",
    TRAINED: "trained parameters",
    BACKWARD_PASSES: "backward passes",
}
"""Costs that the Pareto plot shows if methods differ in them, with the labels of their axes."""
