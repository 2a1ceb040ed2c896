"""Rows in files of Arrow that are mapped into memory: more of them than memory holds.

Rows and their order are those of data in memory, so that a run has the same bits.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from itertools import chain, count
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Dataset, Features

from fedex_lora.disk import reason
from fedex_lora.errors import StorageError
from fedex_lora.tasks.base import Encode, NoneLeft, shifted

AT_ONCE = 10_000  # rows that are in memory at a time, as values of Python, on their way
ENCODED = 1_000  # the same of rows of tokens, which are long

_numbers = count()


@cache
def _temporary() -> tempfile.TemporaryDirectory[str]:
    """Removed when the process ends."""
    return tempfile.TemporaryDirectory(prefix="fedex-lora-rows-", ignore_cleanup_errors=True)


def folder() -> Path:
    """Where these files are until the process ends."""
    return Path(_temporary().name)


def stored(tables: Iterable[pa.Table], schema: pa.Schema | None = None) -> Dataset:
    """The rows of the tables, one after the other, in a file.

    Args:
        schema: Of all of them; by default the first one's.

    Raises:
        UserError: There is no room for them.
    """
    parts = iter(tables)
    if schema is None:
        first = next(parts, pa.table({}))
        parts, schema = chain([first], parts), first.schema
    file = folder() / f"{next(_numbers)}.arrow"
    with _room(file):
        out = pa.ipc.new_stream(file, schema)
    for part in parts:
        with _room(file):
            out.write_table(part.cast(schema), max_chunksize=AT_ONCE)
    with _room(file):
        out.close()
        return Dataset.from_file(str(file))


@contextmanager
def _room(file: Path) -> Iterator[None]:
    """Of what is written: what is read on the way has errors of its own."""
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"{file}: rows cannot be kept there: {reason(error)}. Set TMPDIR to a folder with more "
            "room"
        ) from None


def encoded(encode: Encode, rows: Dataset, tokenizer: Any, max_length: int) -> Dataset:
    """What the task's `encode` gives, of some rows at a time, in a file.

    Raises:
        UserError: As of `encode`.
    """
    return stored(_encoded(encode, rows, tokenizer, max_length))


def _encoded(encode: Encode, rows: Dataset, tokenizer: Any, max_length: int) -> Iterator[pa.Table]:
    nothing: NoneLeft | None = None
    features: Features | None = None
    for start in range(0, len(rows), ENCODED):
        part = rows.select(range(start, min(start + ENCODED, len(rows))))
        try:
            with shifted(start):
                found = encode(part, tokenizer, max_length)
        except NoneLeft as error:
            nothing = error
            continue
        features = features or found.features
        yield found.cast(features).with_format("arrow")[:]
    if features is None and nothing is not None:
        raise nothing
