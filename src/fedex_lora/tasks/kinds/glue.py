"""The nine tasks of GLUE: Wang et al., arXiv 1804.07461; the metrics are those of its table 1."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from fedex_lora.recipe import Problem, TaskSpec, did_you_mean, register_task
from fedex_lora.tasks.base import Task
from fedex_lora.tasks.classification import Columns, classification_task


@dataclass(frozen=True)
class GlueTask:
    texts: tuple[str, ...]
    labels: tuple[str, ...] | None
    metrics: tuple[str, ...] = ("accuracy",)  # the first is the primary one
    splits: tuple[str, ...] = ("validation", "test")


_PAIR = ("sentence1", "sentence2")
_ENTAILMENT = ("entailment", "not_entailment")
_MNLI_SPLITS = ("validation_matched", "validation_mismatched", "test_matched", "test_mismatched")

GLUE: Mapping[str, GlueTask] = {
    "cola": GlueTask(("sentence",), ("unacceptable", "acceptable"), ("matthews",)),
    "sst2": GlueTask(("sentence",), ("negative", "positive")),
    "mrpc": GlueTask(_PAIR, ("not_equivalent", "equivalent"), ("accuracy", "f1")),
    "qqp": GlueTask(("question1", "question2"), ("not_duplicate", "duplicate"), ("accuracy", "f1")),
    "stsb": GlueTask(_PAIR, None, ("pearson", "spearman")),
    "mnli": GlueTask(
        ("premise", "hypothesis"),
        ("entailment", "neutral", "contradiction"),
        splits=_MNLI_SPLITS,
    ),
    "qnli": GlueTask(("question", "sentence"), _ENTAILMENT),
    "rte": GlueTask(_PAIR, _ENTAILMENT),
    "wnli": GlueTask(_PAIR, ("not_entailment", "entailment")),
}
"""The GLUE tasks with the columns and label numbers of the Hugging Face hub."""


class Glue(TaskSpec):
    vocabulary = False

    name: str  # which of them

    def renamable(self) -> Sequence[str]:
        return (*GLUE[self.name].texts, "label") if self.name in GLUE else ("label",)

    def problems(self) -> Iterator[Problem]:
        yield from super().problems()
        if self.name not in GLUE:
            yield "name", f"expected one of {', '.join(GLUE)}{did_you_mean(self.name, GLUE)}"

    def build(self, labels: Sequence[str] | None) -> Task:
        known = GLUE[self.name]
        columns = Columns(known.texts, "label", known.labels)
        return classification_task(f"glue/{self.name}", columns, known.metrics, known.splits)


register_task("glue", Glue)
