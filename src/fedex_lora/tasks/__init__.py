"""Tasks: how rows are checked, encoded, batched and scored."""

from collections.abc import Sequence

from fedex_lora.errors import UserError
from fedex_lora.recipe import TaskSpec
from fedex_lora.tasks.base import Task, with_padding
from fedex_lora.tasks.classification import glue, text_classification
from fedex_lora.tasks.language import causal_lm, instruction

__all__ = ["Task", "build_task", "with_padding"]


def build_task(spec: TaskSpec, labels: Sequence[str] | None = None) -> Task:
    """The task that a recipe's `task` block asks for.

    Args:
        spec: The block.
        labels: The classes of data that bring their own, if `spec` names none.

    Raises:
        UserError: Classification without labels, or a template that cannot be read.

    Example:
        >>> task = build_task(TaskSpec(kind="glue", name="mrpc"))
        >>> task.columns, task.primary, task.labels
        (('sentence1', 'sentence2', 'label'), 'accuracy', ('not_equivalent', 'equivalent'))
    """
    if spec.kind == "glue":
        return glue(spec.name or "")
    if spec.kind == "causal-lm":
        return causal_lm(spec.text_column or "text")
    if spec.kind == "instruction":
        return instruction(
            spec.prompt or "", spec.response or "", spec.max_new_tokens, spec.generate
        )
    names = spec.labels or labels
    if names is None:
        raise UserError("task.labels is missing: list all labels, in the order all agree on.")
    return text_classification(
        spec.text_column or "text",
        spec.text_pair_column,
        spec.label_column,
        tuple(names),
    )
