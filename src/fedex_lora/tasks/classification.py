"""Classification and regression of one text or a pair of texts, whatever the columns."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from fedex_lora.errors import DataError, RecipeError, shown
from fedex_lora.recipe import Problem
from fedex_lora.tasks.base import (
    LineOf,
    Prediction,
    Task,
    blanked,
    check_columns,
    one_based,
)
from fedex_lora.tasks.encoding import encode_texts, row_collator
from fedex_lora.tasks.lazy import (
    Dataset,
    PreTrainedTokenizerBase,
    datasets,
    functional,
    numpy,
    torch,
)
from fedex_lora.tasks.logits import Logits, evaluate_logits, tell_logits
from fedex_lora.tasks.metrics import LOSS, OF_LABELS, Metric

SCORES = (0.0, 5.0)  # of STS-B
MOST = 3.4028234663852886e38  # float32's largest number, in which models learn


@dataclass(frozen=True)
class Columns:
    """What is read from a row. Without `labels` the label is a number, to be predicted itself.

    `keys` of the recipe's task block name the columns; GLUE's have their names from it.
    """

    texts: tuple[str, ...]
    label: str
    labels: tuple[str, ...] | None
    keys: tuple[str, ...] = ()
    scores: tuple[float, float] = SCORES  # between which a label that is a number lies


def label_problems(labels: Sequence[str] | None) -> Iterator[Problem]:
    """What is wrong with the key `labels` of a task's block."""
    if labels is not None and len(set(labels)) < max(2, len(labels)):
        yield "labels", "expected two or more labels, all different"


def agreed_labels(given: Sequence[str] | None, brought: Sequence[str] | None) -> tuple[str, ...]:
    """The classes in order: those of the block, else those that the data bring.

    Raises:
        UserError: There are neither.
    """
    if given is None and brought is None:
        raise RecipeError("task.labels is missing: list all labels, in the order all agree on.")
    return tuple(given or brought or ())


def classification_task(
    name: str, columns: Columns, metrics: tuple[str, ...], splits: tuple[str, ...]
) -> Task:
    """The task of telling one label of each row; the first of `metrics` is the primary one."""
    return Task(
        name=name,
        auto_model="AutoModelForSequenceClassification",
        peft_task_type="SEQ_CLS",
        columns=(*columns.texts, columns.label),
        evaluation_splits=splits,
        primary=metrics[0],
        metrics=read_as(metrics),
        check=partial(_check, columns),
        encode=partial(_encode, columns),
        collator=row_collator,
        evaluate=partial(evaluate_logits, row_collator, partial(scores, metrics)),
        labels=columns.labels,
        regression=columns.labels is None,
        stratify=columns.label,
        prediction=Prediction(
            blank=partial(blank, columns),
            tell=partial(tell_logits, row_collator, partial(told, columns.labels)),
        ),
    )


def blank(columns: Columns, rows: Dataset, where: str) -> Dataset:
    """The rows with the first of the labels, or the least number."""
    low, high = columns.scores
    answer = columns.labels[0] if columns.labels else min(max(0.0, low), high)
    keys = columns.keys[: len(columns.texts)]
    return blanked(rows, where, columns.texts, {columns.label: answer}, keys)


def read_as(metrics: Sequence[str]) -> dict[str, Metric]:
    """How these metrics of `OF_LABELS`, and the loss, are read."""
    return {**{name: OF_LABELS[name][1] for name in metrics}, "loss": LOSS}


def _check(columns: Columns, rows: Dataset, where: str, line_of: LineOf = one_based) -> None:
    check_columns(rows, (*columns.texts, columns.label), where, columns.keys)
    check_texts(columns.texts, rows, where, line_of)
    check_labels(columns, rows, where, line_of)


def check_labels(columns: Columns, rows: Dataset, where: str, line_of: LineOf) -> None:
    """Raise a `UserError` that names the line of the first label that is none of the task's."""
    feature, known = rows.features[columns.label], columns.labels
    if isinstance(feature, datasets.ClassLabel) and known and set(feature.names) != set(known):
        # the numbers would mean something else
        raise DataError(
            f"{where}: the classes of column '{columns.label}' are {', '.join(feature.names)}; "
            f"the task's labels are {', '.join(known)}. Set task.labels to the former."
        )
    code = codes(columns, rows)
    bad = next((i for i, value in enumerate(rows[columns.label]) if code(value) is None), None)
    if bad is not None:
        raise DataError(
            f"{where}, line {line_of(bad)}: {columns.label} is {shown(rows[columns.label][bad])}; "
            f"expected {_expected(columns)}."
        )


def check_texts(names: tuple[str, ...], rows: Dataset, where: str, line_of: LineOf) -> None:
    """Raise a `UserError` that names the line of the first row without a text."""
    for row, texts in enumerate(zip(*(rows[name] for name in names))):
        for name, text in zip(names, texts):
            if not isinstance(text, str):
                found = "missing" if text is None else f"{shown(text)}, which is no text"
                raise DataError(f"{where}, line {line_of(row)}: {name} is {found}.")
        # one side of a pair may be empty: the official data have such rows
        if not any(text.strip() for text in texts):
            raise DataError(f"{where}, line {line_of(row)}: {' and '.join(names)} is empty.")


def _expected(columns: Columns) -> str:
    if columns.labels is None:
        low, high = columns.scores
        bounds = [f"of at least {low:g}"] if low > -math.inf else []
        bounds += [f"of at most {high:g}"] if high < math.inf else []
        if len(bounds) == 2:
            return f"a number from {low:g} to {high:g}"
        return " ".join(["a number", *bounds]) + " that float32 can hold"
    names = f"one of {', '.join(columns.labels)}"
    if any(_number(name) is not None for name in columns.labels):
        return names
    return f"{names}, or a number from 0 to {len(columns.labels) - 1}"


def codes(columns: Columns, rows: Dataset) -> Callable[[Any], int | float | None]:
    """From labels as they stand in the data to the model's; None for what is no label."""
    if columns.labels is None:
        return partial(_score, columns.scores)
    by_name = {name: i for i, name in enumerate(columns.labels)}
    feature = rows.features[columns.label]
    if isinstance(feature, datasets.ClassLabel):  # the data themselves say what their numbers mean
        by_number = {float(i): by_name[name] for i, name in enumerate(feature.names)}
    else:
        by_number = _by_number(columns.labels)

    def code(value: Any) -> int | None:
        if isinstance(value, bool):  # JSON's, where labels are called so
            return by_name.get(str(value), by_name.get(str(value).lower()))
        if isinstance(value, str) and value in by_name:
            return by_name[value]
        number = _number(value)
        return None if number is None else by_number.get(number)

    return code


def _by_number(labels: Sequence[str]) -> dict[float, int]:
    """Class number by number: by position, but by value as soon as any name is a number."""
    values = [_number(name) for name in labels]
    if all(value is None for value in values):
        return {float(i): i for i in range(len(labels))}
    count = Counter(values)  # of "1" and "1.0" neither is meant by a number
    return {value: i for i, value in enumerate(values) if value is not None and count[value] == 1}


def _score(between: tuple[float, float], value: Any) -> float | None:
    number = _number(value)
    low, high = max(between[0], -MOST), min(between[1], MOST)
    return number if number is not None and low <= number <= high else None


def _number(value: Any) -> float | None:
    """A finite number, or the one that a text spells; None for all else."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    spelt_oddly = isinstance(value, str) and "_" in value  # Python's 1_000
    return number if math.isfinite(number) and not spelt_oddly else None


def _encode(
    columns: Columns, rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> Dataset:
    texts = [rows[name][:] for name in columns.texts]
    second = texts[1] if len(texts) > 1 else None
    encoding = encode_texts(texts[0], second, tokenizer, max_length)
    code = codes(columns, rows)
    labels = [code(value) for value in rows[columns.label]]
    return Dataset.from_dict({**encoding, "labels": labels})


def told(
    labels: Sequence[str] | None, logits: Logits, encoded: Dataset | None = None
) -> list[dict[str, Any]]:
    """Of each row the likeliest class and its probability; without classes the number."""
    if labels is None:
        return [{"prediction": one[0].item()} for one in logits]
    best = torch.stack([*logits]).softmax(dim=1).max(dim=1)
    pairs = zip(best.indices.tolist(), best.values.tolist())
    return [{"prediction": labels[i], "probability": p} for i, p in pairs]


def scores(metrics: tuple[str, ...], found: Logits, encoded: Dataset) -> dict[str, float]:
    """The metrics, and the loss: cross-entropy, or the squared error of labels that are numbers.

    Args:
        metrics: Names of `OF_LABELS`.
        found: Of each class; for a regression one number.
    """
    logits, labels = torch.stack([*found]), torch.tensor(encoded["labels"][:])
    if labels.is_floating_point():
        predictions = logits[:, 0]
        loss = functional.mse_loss(predictions, labels.double())
    else:
        predictions = logits.argmax(dim=1)
        loss = functional.cross_entropy(logits, labels)
    told, wanted = predictions.numpy(), numpy.asarray(labels)
    return {name: OF_LABELS[name][0](told, wanted) for name in metrics} | {"loss": loss.item()}
