"""Classification of a text into any number of the agreed classes.

A row has a list of classes, or a text of their names with a separator between them, as in CSV; or,
where the column of labels is absent, a column of 0 and 1 for each class.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from fedex_lora.errors import DataError, shown
from fedex_lora.recipe import Problem, TaskSpec, register_task
from fedex_lora.tasks.base import (
    LineOf,
    Prediction,
    Task,
    blanked,
    check_columns,
    one_based,
    refuse_first,
)
from fedex_lora.tasks.classification import agreed_labels, check_texts, label_problems
from fedex_lora.tasks.encoding import encode_texts, row_collator
from fedex_lora.tasks.lazy import (
    Dataset,
    PreTrainedTokenizerBase,
    functional,
    sklearn_metrics,
    torch,
)
from fedex_lora.tasks.logits import Logits, evaluate_logits, tell_logits
from fedex_lora.tasks.metrics import LOSS, NO_SUCH_CLASS, SHARE

METRICS = {"micro_f1": SHARE, "macro_f1": SHARE, "exact_match": SHARE, "loss": LOSS}
TRUE = {"1", "true", "yes", "1.0"}
FALSE = {"0", "false", "no", "0.0", "", "none"}


class MultiLabelClassification(TaskSpec):
    vocabulary = False

    labels: list[str] | None = None  # all of them, in the order that all clients agree on
    text_column: str = "text"
    label_column: str = "labels"
    separator: str = ","  # between the names of classes in a text

    @property
    def lacks_labels(self) -> bool:
        return self.labels is None

    def problems(self) -> Iterator[Problem]:
        yield from super().problems()
        yield from label_problems(self.labels)
        if not self.separator:
            yield "separator", "expected at least one character"

    def build(self, labels: Sequence[str] | None) -> Task:
        names = agreed_labels(self.labels, labels)
        read = _Labels(self.label_column, names, self.separator)
        return Task(
            name="multi-label-classification",
            auto_model="AutoModelForSequenceClassification",
            peft_task_type="SEQ_CLS",
            columns=(self.text_column,),
            evaluation_splits=("validation", "test"),
            primary="micro_f1",
            metrics=METRICS,
            check=partial(_check, self.text_column, read),
            encode=partial(_encode, self.text_column, read),
            collator=row_collator,
            evaluate=partial(evaluate_logits, row_collator, _scores),
            labels=names,
            multi_label=True,
            prediction=Prediction(
                blank=partial(
                    blanked,
                    columns=(self.text_column,),
                    answers={self.label_column: ""},
                    keys=("text_column",),
                ),
                tell=partial(tell_logits, row_collator, partial(_told, names)),
            ),
        )


register_task("multi-label-classification", MultiLabelClassification)


class _Labels:
    """Which of the classes a row has, as 0 and 1 in their order."""

    def __init__(self, column: str, names: Sequence[str], separator: str) -> None:
        self.column, self.names, self.separator = column, tuple(names), separator
        self.place = {name: i for i, name in enumerate(names)}

    def columns(self, rows: Dataset) -> tuple[str, ...]:
        """Where they stand: one column, or one for each class."""
        return (self.column,) if self.column in rows.column_names else self.names

    def of(self, row: Mapping[str, Any]) -> list[float]:
        """Raises a `DataError` that says what is wrong."""
        if self.column not in row:
            return [self._flag(name, row[name]) for name in self.names]
        value = row[self.column]
        found = self._listed(value)
        odd = next((name for name in found if self._number(name) is None), None)
        if odd is not None:
            raise DataError(f"{self.column} has {shown(odd)}; expected {', '.join(self.names)}")
        there = {self._number(name) for name in found}
        return [float(i in there) for i in range(len(self.names))]

    def _listed(self, value: Any) -> list[Any]:
        if isinstance(value, str):
            if value.strip().startswith("["):
                try:
                    return list(json.loads(value))
                except ValueError:
                    raise DataError(f"{self.column} is {shown(value)}, no list") from None
            return [part.strip() for part in value.split(self.separator) if part.strip()]
        if not isinstance(value, list):
            what = "missing" if value is None else f"{shown(value)}, which is no list"
            raise DataError(f"{self.column} is {what}; a row of no class has an empty one")
        return value

    def _number(self, name: Any) -> int | None:
        if isinstance(name, int) and not isinstance(name, bool) and 0 <= name < len(self.names):
            return name
        return self.place.get(name) if isinstance(name, str) else None

    def _flag(self, name: str, value: Any) -> float:
        said = str(value).strip().lower()
        if said not in TRUE | FALSE:
            raise DataError(f"{name} is {shown(value)}; expected 0 or 1")
        return float(said in TRUE)


def _check(
    text: str, read: _Labels, rows: Dataset, where: str, line_of: LineOf = one_based
) -> None:
    names = read.columns(rows)
    if not set(names) <= set(rows.column_names):
        names = (read.column,)  # neither form: ask for the one column
    keys = ["text_column", *(["label_column"] if names == (read.column,) else names)]
    check_columns(rows, (text, *names), where, keys)
    check_texts((text,), rows, where, line_of)
    refuse_first((_problem(read, row) for row in _records(read, rows)), where, line_of)


def _problem(read: _Labels, row: Mapping[str, Any]) -> str | None:
    try:
        read.of(row)
    except DataError as error:
        return f"{error}."
    return None


def _records(read: _Labels, rows: Dataset) -> Iterator[dict[str, Any]]:
    names = read.columns(rows)
    for values in zip(*(rows[name] for name in names)):
        yield dict(zip(names, values))


def _encode(
    text: str, read: _Labels, rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> Dataset:
    encoding = encode_texts(rows[text][:], None, tokenizer, max_length)
    labels = [read.of(row) for row in _records(read, rows)]
    return Dataset.from_dict({**encoding, "labels": labels})


def _scores(rows: Logits, encoded: Dataset) -> dict[str, float]:
    """A class is told where its probability is above one half."""
    logits = torch.stack([*rows])
    labels = torch.tensor(encoded["labels"][:], dtype=torch.float64)
    loss = functional.binary_cross_entropy_with_logits(logits, labels).item()
    found, wanted = (logits > 0).int().numpy(), labels.int().numpy()
    scores = {
        f"{average}_f1": float(
            sklearn_metrics.f1_score(wanted, found, average=average, zero_division=NO_SUCH_CLASS)
        )
        for average in ("micro", "macro")
    }
    right = float((found == wanted).all(axis=1).mean())
    return {**scores, "exact_match": right, "loss": loss}


def _told(names: tuple[str, ...], logits: Logits, encoded: Dataset) -> list[dict[str, Any]]:
    """The classes whose probability is above one half, and the probabilities of all."""
    return [
        {"prediction": [n for n, p in zip(names, row) if p > 0.5], "probability": row}
        for row in torch.stack([*logits]).sigmoid().tolist()
    ]
