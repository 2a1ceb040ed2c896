"""Tasks: how rows are checked, encoded, batched and scored."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from numbers import Real
from typing import Any

from fedex_lora.errors import UserError, shown
from fedex_lora.recipe import TaskSpec, register_task, task_kinds, task_spec
from fedex_lora.tasks.base import Task
from fedex_lora.tasks.metrics import Metric

__all__ = [
    "Metric",
    "Task",
    "TaskSpec",
    "build_task",
    "register_task",
    "task_kinds",
    "task_spec",
]


def build_task(spec: TaskSpec, labels: Sequence[str] | None = None) -> Task:
    """The task that a recipe's `task` block asks for.

    Args:
        spec: The block.
        labels: The classes of data that bring their own, if `spec` names none.

    Raises:
        UserError: Classification without labels, a template that cannot be read, or a task that
            lacks a part.

    Example:
        >>> task = build_task(task_spec(kind="glue", name="mrpc"))
        >>> task.columns, task.primary, task.labels
        (('sentence1', 'sentence2', 'label'), 'accuracy', ('not_equivalent', 'equivalent'))
    """
    try:
        task = spec.build(labels)
    except TypeError as error:
        if "Task.__init__()" in str(error):  # it names the parts
            raise UserError(f"task {spec.kind!r}: {error}") from error
        raise
    if not isinstance(task, Task):
        raise UserError(
            f"task {spec.kind!r}: build gave {task!r}; expected a fedex_lora.tasks.Task"
        )
    return replace(task, renamed=spec.columns, evaluate=partial(_evaluate, task))


def _evaluate(task: Task, *args: Any, **kwargs: Any) -> dict[str, float]:
    """What the task's own `evaluate` gives, refused where it is not what all else reads."""
    scores = task.evaluate(*args, **kwargs)
    numbers = isinstance(scores, Mapping) and all(isinstance(v, Real) for v in scores.values())
    if not numbers or task.primary not in scores:
        raise UserError(
            f"task {task.name!r}: evaluate gave {shown(scores)}; expected numbers by name, "
            f"{task.primary} among them"
        )
    return {name: float(value) for name, value in scores.items()}
