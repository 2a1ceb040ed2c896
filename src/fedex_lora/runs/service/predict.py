"""Predictions of a model for the rows of a file, whether or not these have labels."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset, Image

from fedex_lora.data.read import SUFFIXES, kind, quiet
from fedex_lora.data.unlabelled import Unlabelled, load_unlabelled
from fedex_lora.disk import replace_atomic
from fedex_lora.engines.setup import recipe_task
from fedex_lora.errors import DataError, RecipeError, StorageError
from fedex_lora.recipe import Recipe
from fedex_lora.runs.evaluation import Subject
from fedex_lora.tasks import Task
from fedex_lora.tasks.base import Encode, NoneLeft, Prediction, placed, with_columns

TOLD = ("prediction", "probability", "likeliest")  # the columns that tasks may add


def predict(
    subject: Subject, recipe: Recipe, rows: Unlabelled, max_new_tokens: int | None = None
) -> tuple[Dataset, int]:
    """The rows with a column `prediction`, and others that the task tells of them.

    Args:
        recipe: Its blocks task and evaluation (`batch_size`).
        max_new_tokens: Of a generated text; by default the task's, or 64.

    Returns:
        The rows, and how many of them have no prediction: the task makes nothing of these, e.g. as
        a prompt is longer than `task.max_length`.

    Raises:
        UserError: The task can make nothing of any of them.
    """
    task, (model, tokenizer) = recipe_task(recipe), (subject.model.module, subject.model.tokenizer)
    way = prediction_of(task)
    encode = way.encode or task.encode_evaluation or task.encode
    with quiet(), placed(rows.place):
        encoded, kept = _encoded(encode, rows.blank, tokenizer, recipe.task.evaluated_length)
    told = way.tell(model, encoded, tokenizer, recipe.evaluation.batch_size, max_new_tokens)
    answers: list[dict[str, Any] | None] = [None] * len(rows.own)
    for i, answer in zip(kept, told, strict=True):
        answers[i] = answer
    names = next((list(answer) for answer in answers if answer is not None), [TOLD[0]])
    columns = {name: [one and one[name] for one in answers] for name in names}
    return with_columns(rows.own, columns), answers.count(None)


def read_rows(file: Path, task: Task) -> Unlabelled:
    """The rows of a file, or of a folder of images; what they have for answers is not looked at.

    Raises:
        UserError: There is a row that the task cannot use, named by line, or no such file.
    """
    rows = load_unlabelled(file, task, prediction_of(task))
    if clash := next((name for name in TOLD if name in rows.own.column_names), None):
        raise DataError(f"{file}: there is a column {clash!r} already; rename it")
    return rows


def prediction_of(task: Task) -> Prediction:
    """How the task answers rows without labels.

    Raises:
        UserError: It does not.
    """
    if task.prediction is None:
        raise RecipeError(
            f"task: {task.name} has no predictions: its Task names no `prediction`. Export the "
            "run, and use transformers' pipeline"
        )
    return task.prediction


def write_rows(rows: Dataset, file: Path) -> None:
    """Writes rows as the file's suffix says; in CSV lists are JSON.

    Raises:
        UserError: The file is there, its suffix is none, or it cannot be written.
    """
    check_out(file)
    for name, feature in rows.features.items():
        if isinstance(feature, Image):  # as it is stored: its path, if it has one
            stored = rows.select_columns([name]).cast_column(name, Image(decode=False))
            paths = [cell[name] and cell[name]["path"] for cell in map(dict, stored)]
            rows = with_columns(rows, {name: paths})
    write = {
        ".csv": lambda path: rows.map(_flat).to_csv(path),
        ".parquet": rows.to_parquet,
        ".json": lambda path: rows.to_json(path, lines=False),
    }
    with quiet():
        replace_atomic(file, lambda new: write.get(kind(file), rows.to_json)(str(new)))


def _flat(row: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: json.dumps(value, ensure_ascii=False) if isinstance(value, list | dict) else value
        for name, value in row.items()
    }


def check_out(file: Path) -> None:
    """Raises a `UserError` if rows cannot be written there."""
    if kind(file) not in SUFFIXES:
        raise RecipeError(f"`out`: {file}: expected a file of one of {', '.join(SUFFIXES)}")
    if file.exists():
        raise StorageError(f"`out`: {file} is there already; name another file")


def _encoded(
    encode: Encode, rows: Dataset, tokenizer: Any, length: int
) -> tuple[Dataset, list[int]]:
    """The rows as the model takes them, and which these are: the task leaves some out."""
    together = encode(rows, tokenizer, length)
    if len(together) == len(rows):
        return together, list(range(len(rows)))
    kept = [i for i in range(len(rows)) if _usable(encode, rows.select([i]), tokenizer, length)]
    return together, kept


def _usable(encode: Encode, row: Dataset, tokenizer: Any, length: int) -> bool:
    try:
        return len(encode(row, tokenizer, length)) > 0
    except NoneLeft:
        return False
