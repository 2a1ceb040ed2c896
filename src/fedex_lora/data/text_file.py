"""A text file: in which encoding it is, and on which line it is damaged."""

from __future__ import annotations

import codecs
import gzip
import io
from pathlib import Path
from typing import BinaryIO, TextIO, cast

from fedex_lora.errors import DataError

TEXTS = (".jsonl", ".json", ".csv", ".tsv")
_MARKS = {  # what a file may begin with; without a mark it is UTF-8
    codecs.BOM_UTF8: "utf-8-sig",  # Excel's
    codecs.BOM_UTF32_LE: "utf-32",  # begins as UTF-16 does
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_NO_TEXT = {  # what files of other kinds begin with
    b"\x1f\x8b": "what gzip made of one; let its name end with .gz",
    b"PK\x03\x04": "a ZIP archive, as spreadsheets are; save it as text",
    b"PAR1": "Parquet; let its name end with .parquet",
}


def kind(file: Path) -> str:
    """The suffix in small letters; of a file that gzip has made smaller, the one before `.gz`.

    Example:
        >>> kind(Path("TRAIN.CSV")), kind(Path("train.jsonl.gz"))
        ('.csv', '.jsonl')
    """
    suffix = file.suffix.lower()
    inner = Path(file.stem).suffix.lower()
    return inner if suffix == ".gz" and inner in TEXTS else suffix


def open_text(file: Path, newline: str | None = None) -> TextIO:
    """The file for reading: UTF-8, or what its byte order mark says."""
    return io.TextIOWrapper(_opened(file), encoding=_encoding(file), newline=newline)


def check_text(file: Path) -> None:
    """Raises a `UserError` that names the line where a file is no text."""
    encoding = _encoding(file)
    if encoding.startswith("utf-8"):
        with _opened(file) as lines:
            for number, line in enumerate(lines, start=1):
                _check(line, "utf-8", file, number)
    else:
        with _opened(file) as whole:
            _check(whole.read(), encoding, file, 1)


def _opened(file: Path) -> BinaryIO:
    return cast(BinaryIO, gzip.open(file)) if file.suffix.lower() == ".gz" else file.open("rb")


def _encoding(file: Path) -> str:
    with _opened(file) as start:
        begins = start.read(4)
    for mark, told in _NO_TEXT.items():
        if begins.startswith(mark):
            raise DataError(f"{file}: is no text but {told}.")
    return next((name for mark, name in _MARKS.items() if begins.startswith(mark)), "utf-8")


def _check(part: bytes, encoding: str, file: Path, first: int) -> None:
    """Of a part that begins on line `first`."""
    damage = None
    try:
        text = part.decode(encoding)
    except UnicodeDecodeError as error:
        text, damage = part[: error.start].decode(encoding, "ignore"), f"not {encoding.upper()}"
    if "\0" in text:
        text, damage = text.partition("\0")[0], "a zero byte (UTF-16 without a byte order mark?)"
    if damage:
        line = first + text.count("\n")
        raise DataError(f"{file}, line {line}: {damage}; save it as UTF-8.")
