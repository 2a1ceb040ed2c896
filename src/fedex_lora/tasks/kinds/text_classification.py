"""Classification of a text, or of a pair of texts, by the user's own columns and classes.

Labels in the data are names of `labels`, or the numbers 0 .. n-1. (Where any name is itself a
number, such as "1" to "5" stars or "0.5", numbers are read as names, by value.) A number may be
written as a text, as in CSV.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from fedex_lora.recipe import Problem, TaskSpec, register_task
from fedex_lora.tasks.base import Task
from fedex_lora.tasks.classification import (
    Columns,
    agreed_labels,
    classification_task,
    label_problems,
)


class TextClassification(TaskSpec):
    vocabulary = False

    labels: list[str] | None = None  # all of them, in the order that all clients agree on
    text_column: str = "text"
    text_pair_column: str | None = None
    label_column: str = "label"

    @property
    def lacks_labels(self) -> bool:
        return self.labels is None

    def problems(self) -> Iterator[Problem]:
        yield from super().problems()
        yield from label_problems(self.labels)

    def build(self, labels: Sequence[str] | None) -> Task:
        texts = [self.text_column, *([self.text_pair_column] if self.text_pair_column else [])]
        keys = (*("text_column", "text_pair_column")[: len(texts)], "label_column")
        names = agreed_labels(self.labels, labels)
        columns = Columns(tuple(texts), self.label_column, names, keys)
        metrics = ("accuracy", "macro_f1")
        return classification_task("text-classification", columns, metrics, ("validation", "test"))


register_task("text-classification", TextClassification)
