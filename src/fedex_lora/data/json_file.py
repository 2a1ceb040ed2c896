"""JSON and JSON Lines: values as they are written, and damage named by its line."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Dataset

from fedex_lora.data.stored import AT_ONCE, stored
from fedex_lora.data.text_file import open_text
from fedex_lora.errors import DataError, StorageError, shown

DEEPEST = 30  # objects and lists within each other
Row = dict[str, Any]

_BLANK = " \t\r\n"


def read_json(file: Path, on_disk: bool = False) -> Dataset:
    """The rows of a file of objects: one a line, one after the other, or in one list.

    Nothing is guessed: a text that looks like a date is a text. A key that a row lacks is None
    there. A column with values of several kinds keeps them as they are.

    Raises:
        UserError: Something is no JSON object, a key is given twice in one, a text is no Unicode,
            or a whole number has more than 64 bits; the line is named.
    """
    if on_disk:
        schema = pa.schema({})
        for part in _tables(file):  # what all columns hold shows at the end
            schema = _joined([schema.empty_table(), part]).schema
        return stored((_joined([schema.empty_table(), part]) for part in _tables(file)), schema)
    return Dataset(_joined(list(_tables(file))))


def _tables(file: Path) -> Iterator[pa.Table]:
    """The rows, some at a time."""
    records = json_records(file)
    while part := list(islice(records, AT_ONCE)):
        names = dict.fromkeys(name for _, row in part for name in row)
        yield pa.table({name: _array(file, name, part) for name in names})


def json_records(file: Path) -> Iterator[tuple[int, Row]]:
    """The objects, each with the line on which it begins.

    Raises:
        UserError: As for `read_json`, but for numbers.
    """
    with open_text(file) as lines:
        for number, line in enumerate(lines, start=1):
            row = _only_object(line)
            if row is not None:
                yield number, row
            elif line.strip(_BLANK):  # objects over several lines, a list, or damage
                yield from _records(file, number, line + lines.read())


def _only_object(line: str) -> Row | None:
    """The object that a line is; None if it is none."""
    text = line.strip(_BLANK)
    try:
        row, end = _object(text, 0) if text else ({}, -1)
    except _Damage:
        return None
    return row if end == len(text) else None


def _records(file: Path, first: int, text: str) -> Iterator[tuple[int, Row]]:
    """The objects of a text that begins on line `first`."""
    line, counted = first, 0
    try:
        for at, row in _objects(text):
            line, counted = line + text.count("\n", counted, at), at
            yield line, row
    except _Damage as damage:
        line += text.count("\n", counted, damage.begin)
        there = line + text.count("\n", damage.begin, damage.at)
        where = f" (on line {there})" if there != line else ""
        raise StorageError(f"{file}, line {line}: cannot be read: {damage}{where}") from None


def _objects(text: str) -> Iterator[tuple[int, Row]]:
    """The objects that stand one after the other, or in one list, with where each begins."""
    at = _skipped(text, 0)
    if not text.startswith("[", at):
        while at < len(text):
            row, end = _object(text, at)
            yield at, row
            at = _skipped(text, end)
        return
    at = _skipped(text, at + 1)
    while not text.startswith("]", at):
        row, end = _object(text, at)
        yield at, row
        end = _skipped(text, end)
        if text.startswith(",", end):
            at = _skipped(text, end + 1)
            if text.startswith("]", at):
                raise _Damage("a comma before the end of the list", end, end)
        elif text.startswith("]", end):
            at = end
        else:
            raise _Damage("expected ',' or ']' after an object of the list", end, end)
    if (at := _skipped(text, at + 1)) < len(text):
        raise _Damage("something follows the list", at, at)


class _Damage(ValueError):
    """What is wrong with an object that begins at `begin`, and where it shows."""

    def __init__(self, what: str, begin: int, at: int) -> None:
        super().__init__(what)
        self.begin, self.at = begin, at


def _object(text: str, begin: int) -> tuple[Row, int]:
    """The object that begins there, and where it ends."""
    try:
        value, end = _DECODER.raw_decode(text, begin)
    except json.JSONDecodeError as error:
        what = f"{error.msg.removesuffix(' at')} at character {error.colno}"
        raise _Damage(what, begin, error.pos) from None
    except RecursionError:
        raise _Damage(_TOO_DEEP, begin, begin) from None
    except ValueError as error:
        raise _Damage(str(error), begin, begin) from None
    if not isinstance(value, dict):
        raise _Damage(f"expected an object {{...}}, got {shown(value)}", begin, begin)
    part = text[begin:end]
    if part.count("[") + part.count("{") > DEEPEST and _depth(value) > DEEPEST:
        raise _Damage(_TOO_DEEP, begin, begin)
    if "\\u" in part:
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            half = f"\\u{ord(error.object[error.start]):04x}"
            raise _Damage(f"{half} is half a character (a lone surrogate)", begin, begin) from None
    return value, end


_TOO_DEEP = f"objects and lists are nested more than {DEEPEST} deep"


def _once(pairs: list[tuple[str, Any]]) -> Row:
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {shown(twice)} is given twice")
    return row


_DECODER = json.JSONDecoder(object_pairs_hook=_once)


def _skipped(text: str, at: int) -> int:
    """The first place from `at` on that is not blank."""
    while text[at : at + 1] in _BLANK and at < len(text):
        at += 1
    return at


def _depth(value: Any) -> int:
    level, depth = [value], 0
    while level:
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, Mapping) else outer)
            if isinstance(inner, Mapping | list)
        ]
        depth += 1
    return depth


def _array(file: Path, name: str, part: Sequence[tuple[int, Row]]) -> pa.Array:
    """One column of some rows."""
    values = [row.get(name) for _, row in part]
    try:
        return pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError):
        _check_numbers(file, name, part)
        return _of_any_kind(values)


def _check_numbers(file: Path, name: str, part: Sequence[tuple[int, Row]]) -> None:
    for line, row in part:
        try:
            pa.array([row.get(name)])
        except OverflowError:
            raise DataError(
                f"{file}, line {line}: {name} has a whole number of more than 64 bits, "
                f"{shown(row[name])}; write it as a text"
            ) from None
        except pa.ArrowException:  # a list with values of several kinds
            pass


def _joined(parts: Sequence[pa.Table]) -> pa.Table:
    """One after the other; what a part lacks is None there."""
    names = dict.fromkeys(name for part in parts for name in part.column_names)
    return pa.table({name: _column(name, parts) for name in names})


def _column(name: str, parts: Sequence[pa.Table]) -> pa.ChunkedArray | pa.Array:
    """One column; where parts differ in kind, of the kind that holds all."""
    arrays = [
        part.column(name) if name in part.column_names else pa.nulls(len(part)) for part in parts
    ]
    try:
        tables = [pa.table({"column": array}) for array in arrays]
        return pa.concat_tables(tables, promote_options="permissive").column(0)
    except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError):
        return _of_any_kind([v for array in arrays for v in _values(array)])


def _of_any_kind(values: Sequence[Any]) -> pa.Array:
    return pa.array([json.dumps(value) for value in values], pa.json_())


def _values(array: pa.Array) -> list[Any]:
    values = array.to_pylist()
    return list(map(json.loads, values)) if isinstance(array.type, pa.JsonType) else values
