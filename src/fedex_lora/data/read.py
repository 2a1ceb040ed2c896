"""One local file as rows: JSON Lines, JSON, CSV or Parquet."""

import csv
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import datasets
from datasets import Dataset
from datasets.exceptions import DatasetGenerationError
from datasets.utils import logging

from fedex_lora.errors import UserError

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")


def read(file: Path) -> Dataset:
    """The rows of a file, in memory.

    In CSV only an empty field is empty: "None" and "NA" are texts.

    Raises:
        UserError: There is no such file, its suffix is unknown, or it cannot be parsed.
    """
    if file.suffix not in SUFFIXES:
        raise UserError(f"{file}: unknown kind of file; expected one of {', '.join(SUFFIXES)}.")
    if not file.is_file():
        raise UserError(f"{file}: no such file.")
    if file.stat().st_size == 0:
        raise UserError(f"{file}: the file is empty.")
    try:
        # a cache of its own, thrown away: a file that was changed is always read again
        with tempfile.TemporaryDirectory() as cache, _quiet():
            return _parse(file, cache)
    except (DatasetGenerationError, ValueError, TypeError, OSError) as error:
        cause = error.__cause__ or error
        raise UserError(f"{_place(file)}: cannot be read: {str(cause).strip()}") from error


def line_of(file: Path, row: int) -> int:
    """The line (from 1) that holds a row (from 0), or the row's number where rows are no lines."""
    if file.suffix == ".jsonl":
        return next(_nth(_json_lines(file), row))
    if file.suffix == ".csv":
        return next(_nth(_csv_lines(file), row + 1))
    return row + 1


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars, and no log of an error that is raised as well."""
    bars, level = not datasets.are_progress_bars_disabled(), logging.get_verbosity()
    datasets.disable_progress_bars()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            datasets.enable_progress_bars()


def _parse(file: Path, cache: str) -> Dataset:
    if file.suffix == ".csv":
        rows = Dataset.from_csv(
            str(file), cache_dir=cache, keep_in_memory=True, keep_default_na=False
        )
    elif file.suffix == ".parquet":
        rows = Dataset.from_parquet(str(file), cache_dir=cache, keep_in_memory=True)
    else:
        rows = Dataset.from_json(str(file), cache_dir=cache, keep_in_memory=True)
    assert isinstance(rows, Dataset)
    return rows


def _place(file: Path) -> str:
    """The file, with the first line that is no JSON object if it is made of such lines."""
    if file.suffix != ".jsonl":
        return str(file)
    lines = file.read_text(encoding="utf-8", errors="replace").split("\n")
    for number, line in enumerate(lines, start=1):
        if line.strip() and not _is_object(line):
            return f"{file}, line {number}"
    return str(file)


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def _nth(numbers: Iterator[int], n: int) -> Iterator[int]:
    return (number for i, number in enumerate(numbers) if i == n)


def _json_lines(file: Path) -> Iterator[int]:
    with file.open(encoding="utf-8") as lines:
        yield from (number for number, line in enumerate(lines, start=1) if line.strip())


def _csv_lines(file: Path) -> Iterator[int]:
    with file.open(encoding="utf-8", newline="") as lines:
        reader = csv.reader(lines)
        start = 1
        for fields in reader:
            if fields:  # pandas passes over blank lines
                yield start
            start = reader.line_num + 1
