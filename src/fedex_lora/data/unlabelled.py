"""Rows to be told answers of."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from datasets import Dataset

from fedex_lora.data.images import with_images
from fedex_lora.data.load import file_split, readable
from fedex_lora.data.quoted import about_rows
from fedex_lora.tasks import Task
from fedex_lora.tasks.base import Prediction


@dataclass(frozen=True)
class Unlabelled:
    """Rows as they stand in their file, and as the task takes them, with something in place of
    every answer; and where each stands."""

    own: Dataset
    blank: Dataset
    place: Callable[[int], str]


@readable()
@about_rows()
def load_unlabelled(file: Path, task: Task, way: Prediction) -> Unlabelled:
    """The rows of a file, or of a folder of images, whatever they have for answers.

    Raises:
        UserError: There is a row that the task cannot use, named by line, or no such file.
    """
    split = file_split(file, task)
    rows = with_images(split.rows, task.image, split.folder, split.where) if task.image else None
    blank = way.blank(split.rows if rows is None else rows, split.where)
    task.check(blank, split.where, split.line_of)
    return Unlabelled(_unnamed(split.rows, task), blank, split.place)


def _unnamed(rows: Dataset, task: Task) -> Dataset:
    """The rows with `task.renamed` columns under their own names."""
    return rows.rename_columns({k: v for k, v in task.renamed.items() if k in rows.column_names})
