"""CSV and TSV: every field is a text, and a file that is malformed is refused by line."""

import csv
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pyarrow as pa
from datasets import Dataset

from fedex_lora.data.stored import AT_ONCE, stored
from fedex_lora.data.text_file import kind, open_text
from fedex_lora.errors import DataError, shown

LONGEST = 2**31 - 1  # characters of a field: texts may well exceed the csv module's 128 KiB
SEPARATORS = {",": "comma", ";": "semicolon", "\t": "tab", "|": "bar", ":": "colon"}
_SAID = re.compile(r'"?sep=([,;\t|:])"?[\r\n]*', re.IGNORECASE)


def read_csv(file: Path, on_disk: bool = False) -> Dataset:
    """The rows of a comma- or (.tsv) tab-separated file with a header, as texts.

    A first line `sep=;`, as Excel reads it, names another separator. Nothing is guessed: `2024`,
    `True` and `NA` are texts, an empty field is an empty text, and it is for the task to read a
    label as a number. Columns without a name are left out.

    Raises:
        UserError: It has other separators, a row with more or fewer fields than the header, two
            columns of one name, or a quote that is not closed.
    """
    records = csv_records(file)
    line, header = next(records, (1, []))
    separator = _separator(file)[0]
    _check_header(header, separator, f"{file}, line {line}")
    schema = pa.schema([(name, pa.string()) for name in header if name])

    def tables() -> Iterator[pa.Table]:
        while part := list(islice(records, AT_ONCE)):
            for line, fields in part:
                if len(fields) != len(header):
                    raise DataError(
                        f"{file}, line {line}: {len(fields)} field(s), where the header has "
                        f"{len(header)}. {_expected(separator)}"
                    )
            columns = dict(zip(header, zip(*(fields for _, fields in part))))
            yield pa.table({name: columns[name] for name in schema.names}, schema)

    if on_disk:
        return stored(tables(), schema)
    return Dataset(pa.concat_tables(list(tables()) or [schema.empty_table()]))


def csv_records(file: Path) -> Iterator[tuple[int, list[str]]]:
    """The records, the header among them, each with the line on which it starts.

    Blank lines are no records.

    Raises:
        UserError: A quote is in the wrong place, or not closed.
    """
    csv.field_size_limit(LONGEST)
    separator, before = _separator(file)
    with open_text(file, newline="") as lines:
        for _ in range(before):
            lines.readline()
        reader = csv.reader(lines, strict=True, delimiter=separator)
        start = 1 + before
        try:
            for fields in reader:
                if fields:
                    yield start, fields
                start = reader.line_num + 1 + before
        except csv.Error as error:
            raise DataError(f"{file}, line {start}: {error}. {_expected(separator)}") from error


def _separator(file: Path) -> tuple[str, int]:
    """What separates fields, and how many lines come before the header."""
    with open_text(file, newline="") as lines:
        said = _SAID.fullmatch(lines.readline())
    if said:
        return said[1], 1
    return ("\t" if kind(file) == ".tsv" else ","), 0


def _expected(separator: str) -> str:
    name = SEPARATORS[separator]
    return (
        f'Expected a {name}-separated file; put "..." around a text with {name}s, quotes or line '
        "breaks, and double the quotes within it."
    )


def _check_header(header: list[str], separator: str, where: str) -> None:
    others = [s for s in SEPARATORS if s not in (separator, ":") and s in "".join(header)]
    if len(header) == 1 and others:
        raise DataError(
            f"{where}: {shown(header[0])} is the only column; this is no {SEPARATORS[separator]}-"
            f"separated file. Save it with {SEPARATORS[separator]}s, or put a line "
            f"sep={others[0]} before it."
        )
    named = [name for name in header if name]
    twice = next((name for name in named if named.count(name) > 1), None)
    if twice is not None:
        raise DataError(f"{where}: two columns are named '{twice}'; rename one of them.")
