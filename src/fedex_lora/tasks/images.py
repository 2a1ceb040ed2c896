"""Classification of images. What a text task's tokenizer is, is here the model's image processor.

Images stay as they are stored and are made into pixels batch by batch: as float32 arrays a set of
photographs would be some hundred times its size.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, Image
from torch import nn

from fedex_lora.errors import DataError, check_installed
from fedex_lora.tasks.base import Batch, Collate, LineOf, Task, check_columns, evaluating, one_based
from fedex_lora.tasks.classification import Columns, check_labels, codes, scores
from fedex_lora.tasks.outputs import Outputs

METRICS = ("accuracy", "macro_f1")  # the first is the primary one


def image_classification(image_column: str, label_column: str, labels: tuple[str, ...]) -> Task:
    """Classification of one image into the agreed `labels`, which are read as those of texts are.

    Colours are what transformers' own pipeline makes of an image: RGB, turned as its EXIF says.

    Raises:
        UserError: Pillow is not installed.
    """
    check_installed("PIL", "task.kind: image-classification")
    columns = Columns((image_column,), label_column, labels, ("image_column", "label_column"))
    return Task(
        name="image-classification",
        auto_model="AutoModelForImageClassification",
        peft_task_type=None,
        columns=(image_column, label_column),
        evaluation_splits=("validation", "test"),
        primary=METRICS[0],
        higher_is_better=True,
        check=partial(_check, columns),
        encode=partial(_encode, columns),
        collator=partial(_collator, image_column),
        evaluate=partial(_evaluate, image_column),
        labels=labels,
        stratify=label_column,
        image=image_column,
    )


def _check(columns: Columns, rows: Dataset, where: str, line_of: LineOf = one_based) -> None:
    (column,) = columns.texts
    check_columns(rows, (column, columns.label), where, columns.keys)
    if not isinstance(rows.features[column], Image):
        raise DataError(
            f"{where}: column '{column}' holds no images; name the column that does "
            "(task.image_column)."
        )
    for row, cell in enumerate(_stored(rows, column)):
        if problem := _problem(cell):
            raise DataError(f"{where}, line {line_of(row)}: {column} {problem}.")
    check_labels(columns, rows, where, line_of)


def _stored(rows: Dataset, column: str) -> Iterator[dict[str, Any] | None]:
    """The cells as `{"bytes": ..., "path": ...}`, one at a time."""
    raw = rows.select_columns([column]).cast_column(column, Image(decode=False))
    return (row[column] for row in raw)  # type: ignore[index]


def _problem(cell: dict[str, Any] | None) -> str:
    if cell is None or (cell["bytes"] is None and cell["path"] is None):
        return "is missing"
    if cell["bytes"] is None and not Path(cell["path"]).is_file():  # nor is it fetched
        return f"{cell['path']}: no such file"
    try:
        Image(mode="RGB").decode_example(cell)
    except Exception as error:  # Pillow's many decoders raise many kinds
        at = f"{cell['path']} " if cell["path"] else ""
        return f"{at}is no image that can be read ({type(error).__name__})"
    return ""


def _encode(columns: Columns, rows: Dataset, tokenizer: Any, max_length: int) -> Dataset:
    (column,) = columns.texts
    code = codes(columns, rows)
    labels = [code(value) for value in rows[columns.label]]
    images = rows.select_columns([column]).cast_column(column, Image(mode="RGB"))
    return images.add_column("labels", labels)  # type: ignore[call-arg]


def _collator(column: str, tokenizer: Any) -> Collate:
    def collate(rows: list[dict[str, Any]]) -> Batch:
        images = [row[column] for row in rows]
        pixels = tokenizer(images, return_tensors="pt")["pixel_values"]
        return {"pixel_values": pixels, "labels": torch.tensor([row["labels"] for row in rows])}

    return collate


def _evaluate(
    column: str,
    model: nn.Module,
    encoded: Dataset,
    tokenizer: Any,
    batch_size: int,
    outputs: Outputs | None = None,
) -> dict[str, float]:
    collate, parts = _collator(column, tokenizer), []
    with evaluating(model) as device:
        for start in range(0, len(encoded), batch_size):
            rows = range(start, min(start + batch_size, len(encoded)))
            batch = collate([encoded[i] for i in rows])
            logits = model(pixel_values=batch["pixel_values"].to(device)).logits
            parts.append(logits.double().cpu())
    return scores(METRICS, torch.cat(parts), torch.tensor(encoded["labels"][:]))
