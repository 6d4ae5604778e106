"""Tasks: the fields of an example, its prompts, its label words and its metrics."""

from lit_spu.tasks.glue import TASKS, is_built_in
from lit_spu.tasks.own_task import load_task
from lit_spu.tasks.task import Encoding, Files, Format, Metric, Split, Task
from lit_spu.tasks.template import check_template

__all__ = [
    "TASKS",
    "Encoding",
    "Files",
    "Format",
    "Metric",
    "Split",
    "Task",
    "check_template",
    "is_built_in",
    "load_task",
]
