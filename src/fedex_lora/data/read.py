"""One local file as rows: JSON Lines, JSON, CSV or Parquet."""

import glob
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import datasets
from datasets import Dataset
from datasets.exceptions import DatasetGenerationError
from datasets.utils import logging

from fedex_lora.data.csv_file import csv_records, read_csv
from fedex_lora.errors import UserError

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
NO_ROWS = "corresponds to no data"  # what datasets says of a file without rows


def read(file: Path) -> Dataset:
    """The rows of a file, in memory.

    In CSV every field is a text: `2024`, `True`, `None` and nothing at all. Capitals in a suffix
    make no difference.

    Raises:
        UserError: There is no such file, its suffix is unknown, it is not UTF-8 (Parquet aside),
            it cannot be parsed, or it has no rows.
    """
    if kind(file) not in SUFFIXES:
        raise UserError(f"{file}: unknown kind of file; expected one of {', '.join(SUFFIXES)}.")
    if not file.is_file():
        raise UserError(f"{file}: no such file.")
    if file.stat().st_size == 0:
        raise UserError(f"{file}: the file is empty.")
    if kind(file) != ".parquet":
        _check_encoding(file)
    rows = read_csv(file) if kind(file) == ".csv" else _read(file)
    if len(rows) == 0:
        raise UserError(f"{file}: no rows; at least one is needed.")
    return rows


def kind(file: Path) -> str:
    """The suffix in small letters.

    Example:
        >>> kind(Path("TRAIN.CSV"))
        '.csv'
    """
    return file.suffix.lower()


def line_of(file: Path, row: int) -> int:
    """The line (from 1) that holds a row (from 0), or the row's number where rows are no lines."""
    if kind(file) == ".jsonl":
        return next(_nth(_json_lines(file), row))
    if kind(file) == ".csv":
        return next(_nth((line for line, _ in csv_records(file)), row + 1))
    return row + 1


def _check_encoding(file: Path) -> None:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                line.decode()
            except UnicodeDecodeError as error:
                raise UserError(f"{file}, line {number}: not UTF-8; save it as UTF-8.") from error


def _read(file: Path) -> Dataset:
    try:
        # a cache of its own, thrown away: a file that was changed is always read again
        with tempfile.TemporaryDirectory() as cache, quiet():
            return _parse(file, cache)
    except (DatasetGenerationError, ValueError, TypeError, OSError) as error:
        cause = str(error.__cause__ or error).strip()
        if NO_ROWS in cause:
            return Dataset.from_dict({})
        raise UserError(f"{_place(file)}: cannot be read: {cause}") from error


@contextmanager
def quiet() -> Iterator[None]:
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
    path = glob.escape(str(file))  # datasets takes a path for a pattern
    from_file = Dataset.from_parquet if kind(file) == ".parquet" else Dataset.from_json
    rows = from_file(path, cache_dir=cache, keep_in_memory=True)
    assert isinstance(rows, Dataset)
    return rows


def _place(file: Path) -> str:
    """The file, with the first line that is no JSON object if it is made of such lines."""
    if kind(file) != ".jsonl":
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
