"""Classification of images. What a text task's tokenizer is, is here the model's image processor.

Images stay as they are stored and are made into pixels batch by batch: as float32 arrays a set of
photographs would be some hundred times its size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from fedex_lora.errors import DataError, check_installed
from fedex_lora.recipe import Problem, TaskSpec, register_task
from fedex_lora.tasks.base import (
    Batch,
    Collate,
    LineOf,
    Prediction,
    Task,
    check_columns,
    one_based,
)
from fedex_lora.tasks.classification import (
    Columns,
    agreed_labels,
    blank,
    check_labels,
    codes,
    label_problems,
    read_as,
    scores,
    told,
)
from fedex_lora.tasks.lazy import Dataset, datasets, torch
from fedex_lora.tasks.logits import evaluate_logits, tell_logits

METRICS = ("accuracy", "macro_f1")  # the first is the primary one


class ImageClassification(TaskSpec):
    """Classification of one image into the agreed `labels`, which are read as those of texts are.

    Colours are what transformers' own pipeline makes of an image: RGB, turned as its EXIF says.
    """

    vocabulary = False

    labels: list[str] | None = None  # all of them, in the order that all clients agree on
    image_column: str = "image"
    label_column: str = "label"

    @property
    def lacks_labels(self) -> bool:
        return self.labels is None

    def problems(self) -> Iterator[Problem]:
        yield from super().problems()
        yield from label_problems(self.labels)
        for key in ("max_length", "evaluation_max_length"):
            if getattr(self, key) != type(self).model_fields[key].default:
                yield key, f"a task of kind {self.kind} does not use it"

    def build(self, labels: Sequence[str] | None) -> Task:
        check_installed("PIL", "task.kind: image-classification")
        names, image = agreed_labels(self.labels, labels), self.image_column
        keys = ("image_column", "label_column")
        columns = Columns((image,), self.label_column, names, keys)
        collator = partial(_collator, image)
        return Task(
            name="image-classification",
            auto_model="AutoModelForImageClassification",
            peft_task_type=None,
            columns=(image, self.label_column),
            evaluation_splits=("validation", "test"),
            primary=METRICS[0],
            metrics=read_as(METRICS),
            check=partial(_check, columns),
            encode=partial(_encode, columns),
            collator=collator,
            evaluate=partial(evaluate_logits, collator, partial(scores, METRICS)),
            labels=names,
            stratify=self.label_column,
            image=image,
            prediction=Prediction(
                blank=partial(blank, columns),
                tell=partial(tell_logits, collator, partial(told, names)),
            ),
        )


register_task("image-classification", ImageClassification)


def _check(columns: Columns, rows: Dataset, where: str, line_of: LineOf = one_based) -> None:
    (column,) = columns.texts
    check_columns(rows, (column, columns.label), where, columns.keys)
    check_images(rows, column, where, line_of)
    check_labels(columns, rows, where, line_of)


def check_images(rows: Dataset, column: str, where: str, line_of: LineOf) -> None:
    """Raise a `UserError` that names the line of the first row without an image to be read."""
    if not isinstance(rows.features[column], datasets.Image):
        raise DataError(
            f"{where}: column '{column}' holds no images; name the column that does "
            "(task.image_column)."
        )
    for row, cell in enumerate(_stored(rows, column)):
        if problem := _problem(cell):
            raise DataError(f"{where}, line {line_of(row)}: {column} {problem}.")


def _stored(rows: Dataset, column: str) -> Iterator[dict[str, Any] | None]:
    """The cells as `{"bytes": ..., "path": ...}`, one at a time."""
    raw = rows.select_columns([column]).cast_column(column, datasets.Image(decode=False))
    return (row[column] for row in raw)  # type: ignore[index]


def _problem(cell: dict[str, Any] | None) -> str:
    if cell is None or (cell["bytes"] is None and cell["path"] is None):
        return "is missing"
    if cell["bytes"] is None and not Path(cell["path"]).is_file():  # nor is it fetched
        return f"{cell['path']}: no such file"
    try:
        datasets.Image(mode="RGB").decode_example(cell)
    except Exception as error:  # Pillow's many decoders raise many kinds
        at = f"{cell['path']} " if cell["path"] else ""
        return f"{at}is no image that can be read ({type(error).__name__})"
    return ""


def _encode(columns: Columns, rows: Dataset, tokenizer: Any, max_length: int) -> Dataset:
    (column,) = columns.texts
    code = codes(columns, rows)
    labels = [code(value) for value in rows[columns.label]]
    images = rows.select_columns([column]).cast_column(column, datasets.Image(mode="RGB"))
    return images.add_column("labels", labels)  # type: ignore[call-arg]


def _collator(column: str, tokenizer: Any) -> Collate:
    return partial(_batch, column, tokenizer)


def _batch(column: str, processor: Any, rows: list[dict[str, Any]]) -> Batch:
    pixels = processor([row[column] for row in rows], return_tensors="pt")["pixel_values"]
    return {"pixel_values": pixels, "labels": torch.tensor([row["labels"] for row in rows])}
