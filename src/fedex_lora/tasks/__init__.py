"""Tasks: how rows are checked, encoded, batched and scored."""

from collections.abc import Sequence
from dataclasses import replace

from fedex_lora.errors import RecipeError
from fedex_lora.recipe import TaskSpec
from fedex_lora.tasks.arithmetic import arithmetic
from fedex_lora.tasks.base import Task
from fedex_lora.tasks.classification import glue, text_classification
from fedex_lora.tasks.commonsense import commonsense
from fedex_lora.tasks.e2e import e2e
from fedex_lora.tasks.images import image_classification
from fedex_lora.tasks.language import causal_lm, instruction

__all__ = ["Task", "build_task"]


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
    return replace(_built(spec, labels), renamed=spec.columns)


def _built(spec: TaskSpec, labels: Sequence[str] | None) -> Task:
    if spec.kind == "glue":
        return glue(spec.name or "")
    if spec.kind == "causal-lm":
        return causal_lm(spec.text_column or "text")
    if spec.kind == "instruction":
        return instruction(
            spec.prompt or "", spec.response or "", spec.max_new_tokens, spec.generate
        )
    if spec.kind == "e2e":
        return e2e(spec.max_new_tokens, spec.generate, spec.num_beams)
    if spec.kind == "math":
        return arithmetic(spec.name, spec.max_new_tokens, spec.generate, spec.compare)
    if spec.kind == "commonsense":
        likelihood = spec.score == "likelihood"
        return commonsense(spec.name, spec.max_new_tokens, spec.generate, likelihood)
    names = spec.labels or labels
    if names is None:
        raise RecipeError("task.labels is missing: list all labels, in the order all agree on.")
    if spec.kind == "image-classification":
        column = spec.image_column or "image"
        return image_classification(column, spec.label_column, tuple(names))
    return text_classification(
        spec.text_column or "text",
        spec.text_pair_column,
        spec.label_column,
        tuple(names),
    )
