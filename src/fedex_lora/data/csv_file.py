"""CSV: every field is a text, and a file that is malformed is refused by line."""

import csv
from collections.abc import Iterator
from pathlib import Path

from datasets import Dataset

from fedex_lora.errors import UserError

LONGEST = 2**31 - 1  # characters of a field: texts may well exceed the csv module's 128 KiB
OTHER_SEPARATORS = (";", "\t")


def read_csv(file: Path) -> Dataset:
    """The rows of a comma-separated file in UTF-8 with a header, as texts, in memory.

    Nothing is guessed: `2024`, `True` and `NA` are texts, an empty field is an empty text, and it
    is for the task to read a label as a number. Columns without a name are left out.

    Raises:
        UserError: It has other separators, a row with more or fewer fields than the header, two
            columns of one name, or a quote that is not closed.
    """
    records = csv_records(file)
    line, header = next(records, (1, []))
    _check_header(header, f"{file}, line {line}")
    columns: list[list[str]] = [[] for _ in header]
    for line, fields in records:
        if len(fields) != len(header):
            raise UserError(
                f"{file}, line {line}: {len(fields)} field(s), where the header has {len(header)}. "
                + _EXPECTED
            )
        for column, field in zip(columns, fields):
            column.append(field)
    return Dataset.from_dict({name: column for name, column in zip(header, columns) if name})


def csv_records(file: Path) -> Iterator[tuple[int, list[str]]]:
    """The records, the header among them, each with the line on which it starts.

    Blank lines are no records.

    Raises:
        UserError: A quote is in the wrong place, or not closed.
    """
    csv.field_size_limit(LONGEST)
    with file.open(encoding="utf-8-sig", newline="") as lines:  # Excel begins with a mark
        reader = csv.reader(lines, strict=True)
        start = 1
        try:
            for fields in reader:
                if fields:
                    yield start, fields
                start = reader.line_num + 1
        except csv.Error as error:
            raise UserError(f"{file}, line {start}: {error}. {_EXPECTED}") from error


_EXPECTED = (
    'Expected a comma-separated file; put "..." around a text with commas, quotes or line breaks, '
    "and double the quotes within it."
)


def _check_header(header: list[str], where: str) -> None:
    if len(header) == 1 and any(separator in header[0] for separator in OTHER_SEPARATORS):
        raise UserError(
            f"{where}: {header[0]!r} is the only column; this is no comma-separated file. "
            "Save it with commas."
        )
    named = [name for name in header if name]
    twice = next((name for name in named if named.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"{where}: two columns are named '{twice}'; rename one of them.")
