"""A number to be predicted of a text, or of a pair of texts, by the user's own columns.

The loss is the squared error of the number as it stands: numbers far from 1 are better scaled
before.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from fedex_lora.recipe import Problem, TaskSpec, register_task
from fedex_lora.tasks.base import Task
from fedex_lora.tasks.classification import Columns, classification_task

METRICS = ("rmse", "mae", "pearson", "spearman")  # the first is the primary one


class TextRegression(TaskSpec):
    vocabulary = False

    text_column: str = "text"
    text_pair_column: str | None = None
    label_column: str = "label"
    minimum: float | None = None  # labels beyond are refused
    maximum: float | None = None

    def problems(self) -> Iterator[Problem]:
        yield from super().problems()
        low, high = self._between
        if not low < high:
            yield "minimum", f"expected a number below maximum ({high:g})"

    @property
    def _between(self) -> tuple[float, float]:
        low, high = self.minimum, self.maximum
        return -math.inf if low is None else low, math.inf if high is None else high

    def build(self, labels: Sequence[str] | None) -> Task:
        texts = [self.text_column, *([self.text_pair_column] if self.text_pair_column else [])]
        keys = (*("text_column", "text_pair_column")[: len(texts)], "label_column")
        columns = Columns(tuple(texts), self.label_column, None, keys, self._between)
        return classification_task("text-regression", columns, METRICS, ("validation", "test"))


register_task("text-regression", TextRegression)
