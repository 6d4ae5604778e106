"""The tasks: what an example holds, how it is written as text, and how it is scored."""

from lit_spu.tasks.task import TASKS, Encoding, Files, Format, Metric, Split, Task, load_task

__all__ = ["TASKS", "Encoding", "Files", "Format", "Metric", "Split", "Task", "load_task"]
