"""One local file as rows: JSON Lines, JSON, CSV, TSV or Parquet."""

import glob
import gzip
import tempfile
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import islice
from pathlib import Path

import datasets
import pyarrow as pa
from datasets import Dataset, Features
from datasets.exceptions import DatasetGenerationError
from datasets.utils import logging
from pyarrow import parquet

from fedex_lora.data.csv_file import csv_records, read_csv
from fedex_lora.data.json_file import json_records, read_json
from fedex_lora.data.stored import folder
from fedex_lora.data.text_file import TEXTS, check_text, kind
from fedex_lora.disk import reason, stands_for
from fedex_lora.errors import DataError, StorageError

SUFFIXES = (*TEXTS, ".parquet")
_UNREADABLE = (DatasetGenerationError, pa.ArrowException, ValueError, TypeError, OSError)
NO_ROWS = "corresponds to no data"  # what datasets says of a file without rows


def read(file: Path, on_disk: bool = False) -> Dataset:
    """The rows of a file, in memory, or some at a time on their way to a file on disk.

    In CSV every field is a text: `2024`, `True`, `None` and nothing at all. Capitals in a suffix
    make no difference.

    Raises:
        UserError: There is no such file, its suffix is unknown, it is no text (Parquet aside), it
            cannot be parsed, or it has no rows.
    """
    if kind(file) not in SUFFIXES:
        raise DataError(
            f"{file}: unknown kind of file; expected one of {', '.join(SUFFIXES)}, or one of the "
            "texts among them with .gz. Save a spreadsheet as CSV."
        )
    if told := stands_for(file):
        raise StorageError(f"{file}: this is {told}.")
    if not file.is_file():
        raise StorageError(f"{file}: no such file.")
    try:
        if file.stat().st_size == 0:
            raise DataError(f"{file}: the file is empty.")
        if kind(file) != ".parquet":
            check_text(file)
        rows = _READERS[kind(file)](file, on_disk)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise StorageError(f"{file}: damaged, or not made by gzip: {error}") from None
    except OSError as error:
        raise StorageError(f"{file}: cannot be read: {reason(error)}") from None
    if len(rows) == 0:
        raise DataError(f"{file}: no rows; at least one is needed.")
    return rows


def line_of(file: Path, row: int) -> int:
    """The line (from 1) on which a row (from 0) begins, or its number where rows are no lines."""
    if kind(file) in (".jsonl", ".json"):
        return next(islice((line for line, _ in json_records(file)), row, None))
    if kind(file) in (".csv", ".tsv"):
        return next(islice((line for line, _ in csv_records(file)), row + 1, None))
    return row + 1


def _read_parquet(file: Path, on_disk: bool) -> Dataset:
    _check_columns(file)
    try:
        # a cache of its own, thrown away: a file that was changed is always read again
        with _cache(on_disk) as cache, quiet():
            path = glob.escape(str(file))  # datasets takes a path for a pattern
            rows = Dataset.from_parquet(path, cache_dir=cache, keep_in_memory=not on_disk)
            assert isinstance(rows, Dataset)
            rows.data.table.validate(full=True)  # texts are UTF-8, among others
            return rows
    except _UNREADABLE as error:
        cause = str(error.__cause__ or error).strip()
        if NO_ROWS in cause:
            return Dataset.from_dict({})
        raise StorageError(f"{file}: cannot be read: {cause}") from error


def _check_columns(file: Path) -> None:
    """That columns differ in name and have types that datasets knows."""
    try:
        schema = parquet.read_schema(file)
    except (OSError, ValueError, pa.ArrowException):  # which reading the rows says as well
        return
    if twice := sorted(name for name, n in Counter(schema.names).items() if n > 1):
        raise DataError(f"{file}: two columns are named {twice[0]!r}; rename one of them.")
    for column in schema:
        try:
            Features.from_arrow_schema(pa.schema([column]))
        except (ValueError, TypeError, pa.ArrowException):
            raise DataError(
                f"{file}: column {column.name!r} is of Arrow's type {column.type}, which datasets "
                "does not read; leave it out or save it as a text."
            ) from None


def _cache(on_disk: bool) -> AbstractContextManager[str]:
    if on_disk:
        return nullcontext(tempfile.mkdtemp(dir=folder()))
    return tempfile.TemporaryDirectory()


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


_READERS = {
    ".jsonl": read_json,
    ".json": read_json,
    ".csv": read_csv,
    ".tsv": read_csv,
    ".parquet": _read_parquet,
}
