"""Predictions of a model for the rows of a file, whether or not these have labels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from string import Formatter
from typing import Any

import torch
from datasets import Dataset

from fedex_lora.data.read import SUFFIXES, kind, quiet, read
from fedex_lora.disk import replace_atomic
from fedex_lora.engines.setup import recipe_task
from fedex_lora.errors import DataError, RecipeError, StorageError
from fedex_lora.recipe import Recipe, TaskSpec
from fedex_lora.runs.evaluation import Subject
from fedex_lora.tasks import Task
from fedex_lora.tasks.base import evaluating
from fedex_lora.tasks.generation import Decoding, generate
from fedex_lora.tasks.language import prompt_of

PREDICTION, PROBABILITY = "prediction", "probability"
_NEW_TOKENS = 64
Encoded = list[dict[str, Any]]
Answer = Callable[[Subject, Encoded], list[dict[str, Any]]]


def predict(
    subject: Subject, recipe: Recipe, rows: Dataset, max_new_tokens: int | None = None
) -> tuple[Dataset, int]:
    """The rows with a column `prediction`, and `probability` where there are classes.

    Classes by name, of several each whose probability is above one half; numbers; texts, which are
    generated greedily. What a row has for a label is not looked at, and need not be there.

    Args:
        recipe: Its blocks task and evaluation (`batch_size`).
        max_new_tokens: Of a generated text; by default the task's, or 64.

    Returns:
        The rows, and how many of them have no prediction: the task makes nothing of these, e.g. as
        a prompt is longer than `task.max_length`.

    Raises:
        UserError: A column is missing, or there is no prediction for models of this kind.
    """
    task, spec = recipe_task(recipe), recipe.task
    clash = [name for name in (PREDICTION, PROBABILITY) if name in rows.column_names]
    if clash:
        raise DataError(f"data: there is a column {clash[0]!r} already; rename it")
    way = _way(task, recipe, max_new_tokens)
    encoded = _encoded(task, spec, rows, subject)
    usable = [row for row in encoded if row is not None]
    if not usable:
        raise DataError(f"data: {task.name} can make nothing of any row; see task.max_length")
    given = way(subject, usable)
    answers = iter(given)
    found = [None if row is None else next(answers) for row in encoded]
    for name in given[0]:
        rows = rows.add_column(name, [None if one is None else one[name] for one in found])
    return rows, sum(one is None for one in found)


def read_rows(file: Path, task: Task) -> Dataset:
    """The rows of a file, their columns called as the task does."""
    rows = read(file)
    known = {theirs: ours for ours, theirs in task.renamed.items() if theirs in rows.column_names}
    return rows.rename_columns(known)


def write_rows(rows: Dataset, file: Path) -> None:
    """Writes rows as the file's suffix says.

    Raises:
        UserError: The file is there, its suffix is none, or it cannot be written.
    """
    check_out(file)
    write = {".csv": rows.to_csv, ".parquet": rows.to_parquet, ".json": _as_list(rows)}
    with quiet():
        replace_atomic(file, lambda new: write.get(kind(file), rows.to_json)(str(new)))


def check_out(file: Path) -> None:
    """Raises a `UserError` if rows cannot be written there."""
    if kind(file) not in SUFFIXES:
        raise RecipeError(f"`out`: {file}: expected a file of one of {', '.join(SUFFIXES)}")
    if file.exists():
        raise StorageError(f"`out`: {file} is there already; name another file")


def _as_list(rows: Dataset) -> Callable[[str], object]:
    return lambda path: rows.to_json(path, lines=False)


def _encoded(
    task: Task, spec: TaskSpec, rows: Dataset, subject: Subject
) -> list[dict[str, Any] | None]:
    """The rows as the model takes them; None for one that the task leaves out."""
    whole = _with_labels(task, spec, rows)
    task.check(whole, "data")
    encode, length = task.encode_evaluation or task.encode, spec.evaluated_length
    tokenizer = subject.model.tokenizer
    with quiet():
        together = encode(whole, tokenizer, length)
        if len(together) == len(whole):
            return [dict(row) for row in together]
        return [_one(encode, whole.select([i]), tokenizer, length) for i in range(len(whole))]


def _one(encode: Any, row: Dataset, tokenizer: Any, length: int) -> dict[str, Any] | None:
    try:
        return dict(encode(row, tokenizer, length)[0])
    except DataError:
        return None


def _with_labels(task: Task, spec: TaskSpec, rows: Dataset) -> Dataset:
    """Rows that have something for a label, which encoding asks for and predicting does not."""
    label: Any = 0.0 if task.regression else (task.labels or ("",))[0]
    answers: dict[str, Any] = {task.stratify: label} if task.stratify else {}
    asked, answered = (_fields(getattr(spec, key, None)) for key in ("prompt", "response"))
    answers |= dict.fromkeys(answered - asked, "-")
    for name, value in answers.items():
        if name not in rows.column_names:
            rows = rows.add_column(name, [value] * len(rows))
    return rows


def _fields(template: object) -> set[str]:
    """The columns that a task's template asks for."""
    if not isinstance(template, str):
        return set()
    return {name for _, name, _, _ in Formatter().parse(template) if name is not None}


def _way(task: Task, recipe: Recipe, max_new_tokens: int | None) -> Answer:
    size = recipe.evaluation.batch_size
    kinds: Mapping[str, Answer] = {
        "AutoModelForSequenceClassification": lambda s, rows: _classes(task, s, rows, size),
        "AutoModelForImageClassification": lambda s, rows: _classes(task, s, rows, size),
        "AutoModelForCausalLM": lambda s, rows: _texts(
            s, rows, size, max_new_tokens or getattr(recipe.task, "max_new_tokens", _NEW_TOKENS)
        ),
    }
    if task.auto_model not in kinds:
        raise RecipeError(
            f"task: {task.name} is a task of {task.auto_model}; there are predictions of "
            f"{', '.join(kinds)}. Export the run, and use transformers' pipeline"
        )
    return kinds[task.auto_model]


def _classes(task: Task, subject: Subject, rows: Encoded, size: int) -> list[dict[str, Any]]:
    """Of each row the class, the classes or the number."""
    model, collate = subject.model.module, task.collator(subject.model.tokenizer)
    logits: list[torch.Tensor] = []
    with evaluating(model) as device:
        for first in range(0, len(rows), size):
            batch = collate(rows[first : first + size])
            inputs = {k: v.to(device) for k, v in batch.items() if k != "labels"}
            logits += model(**inputs).logits.float().cpu()
    if task.regression:
        return [{PREDICTION: row[0].item()} for row in logits]
    names = task.labels or tuple(map(str, range(len(logits[0]))))
    if model.config.problem_type == "multi_label_classification":
        told = [row.sigmoid().tolist() for row in logits]
        return [
            {
                PREDICTION: [n for n, p in zip(names, row, strict=True) if p > 0.5],
                PROBABILITY: row,
            }
            for row in told
        ]
    return [
        {PREDICTION: names[int(p.argmax())], PROBABILITY: p.max().item()}
        for p in (row.softmax(-1) for row in logits)
    ]


def _texts(subject: Subject, rows: Encoded, size: int, most: int) -> list[dict[str, Any]]:
    """Of each row what the model says after its prompt; a row without one is the prompt."""
    prompts = [prompt_of(row) or list(row["input_ids"]) for row in rows]
    module, tokenizer = subject.model.module, subject.model.tokenizer
    return [
        {PREDICTION: text} for text in generate(module, tokenizer, prompts, Decoding(most), size)
    ]
