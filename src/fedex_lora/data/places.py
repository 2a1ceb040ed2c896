"""Where a row stands that was read: its file and line."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset

from fedex_lora.data.load import file_split, matching
from fedex_lora.data.read import SUFFIXES
from fedex_lora.data.text_file import kind
from fedex_lora.errors import UserError, some
from fedex_lora.recipe import DataSpec
from fedex_lora.recipe.data import several
from fedex_lora.tasks import Task


def places(
    rows: Dataset, spec: DataSpec, task: Task, more: Sequence[Path] = ()
) -> Callable[[int], str]:
    """Says where a row stands that was read, dealt out or sampled: its file and line.

    The files are searched for it then; of rows that are equal it is the first.

    Args:
        more: Files to be searched before those that the block names.
    """
    own = rows.remove_columns([task.image]) if task.image else rows

    def place(row: int) -> str:
        wanted = _there(own[row])
        for file in (*more, *_files(spec)):
            try:
                split = file_split(file, task, spec.on_disk)
            except UserError:  # there may be others in the folder
                continue
            for i, found in enumerate(split.rows.select_columns(_common(split.rows, own))):
                if _there(found) == wanted:
                    return split.place(i)
        return f"row {row + 1}"

    return place


def no_split(folder: Path | None, splits: Sequence[str]) -> str:
    """That there are no rows to evaluate on, and what the files with some are called.

    Args:
        folder: Where splits are looked for.
        splits: Their names.
    """
    there = ""
    if folder is not None and folder.is_dir():
        names = some(sorted(file.name for file in folder.iterdir()))
        there = f" (there is: {names}; its file is called {' or '.join(splits)})"
    return (
        "the server has no labelled rows to evaluate on; give a validation split with data.path"
        f"{there}, or set evaluation.where: clients"
    )


def _common(rows: Dataset, other: Dataset) -> list[str]:
    return [name for name in rows.column_names if name in other.column_names]


def _there(row: Any) -> dict[str, Any]:
    """What a row has: files of several forms were put together."""
    return {name: value for name, value in row.items() if value is not None}


def _files(spec: DataSpec) -> list[Path]:
    """All local files that the block names."""
    given = [file for _, files in spec.files() for file in files]
    given += [file for files in spec.validation.values() for file in several(files)]
    given += [Path(source) for source in spec.evaluation.values()]
    if spec.path is not None:
        given += sorted(spec.path.iterdir()) if spec.path.is_dir() else [spec.path]
    found = [one for file in given for one in matching(file)]
    return [file for file in found if file.is_file() and kind(file) in SUFFIXES]
