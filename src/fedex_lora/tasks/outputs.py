"""What an evaluation generates, kept batch by batch, so that one that was interrupted goes on."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from fedex_lora.disk import parsed, write_atomic
from fedex_lora.errors import StorageError, UserError

OnProgress = Callable[[int, int], None]  # (prompts done, prompts in all)


class Outputs(Protocol):
    """Where generated texts go.

    `begin` says what will be generated and returns what is there already, by row; `add` takes
    the texts of a finished batch, by row; `verdicts` takes every row with its score at the end.
    """

    def begin(
        self, decoding: Mapping[str, Any], prompts: Sequence[Sequence[int]]
    ) -> dict[int, str]: ...
    def add(self, texts: Mapping[int, str]) -> None: ...
    def verdicts(self, rows: Sequence[Mapping[str, Any]]) -> None: ...


class OutputFile:
    """`Outputs` in two JSON Lines files.

    `path` begins with a line of what determines the outputs (key, decoding, SHA-256 of the
    prompts' tokens); each further line is `{"row": 3, "output": "..."}`. Lines are appended as
    batches finish. A last line without its end, left by a crash, is dropped. `STEM.verdicts.jsonl`
    beside it is written when all rows are scored.

    Args:
        path: The file; made, with its folder, if it is not there.
        key: What else determines the outputs: which model, in which state, on which data.
        on_progress: Called with (done, total) at the beginning and after every batch.
    """

    def __init__(self, path: Path, key: str, on_progress: OnProgress | None = None) -> None:
        self.path = path
        self.verdicts_path = path.with_name(f"{path.stem}.verdicts.jsonl")
        self._key = key
        self._on_progress = on_progress or (lambda done, total: None)
        self._done = self._total = 0

    def begin(
        self, decoding: Mapping[str, Any], prompts: Sequence[Sequence[int]]
    ) -> dict[int, str]:
        """Opens the file for these prompts and returns the texts it holds.

        Raises:
            UserError: The file, or one in the place of the verdicts, is of something else, or
                cannot be read or written. Nothing is changed then.
        """
        header = {"key": self._key, "decoding": dict(decoding), "prompts": _digest(prompts)}
        try:
            texts = self._open(header, len(prompts))
        except OSError as error:
            raise _unusable(self.path, error) from error
        self._total = len(prompts)
        self._progress(len(texts))
        return texts

    def add(self, texts: Mapping[int, str]) -> None:
        """Appends the texts of a batch.

        Raises:
            UserError: The file cannot be written.
        """
        lines = b"".join(_line({"row": row, "output": text}) for row, text in texts.items())
        try:
            with self.path.open("ab") as file:
                file.write(lines)
        except OSError as error:
            raise _unusable(self.path, error) from error
        self._progress(self._done + len(texts))

    def verdicts(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Writes every row with its verdict."""
        write_atomic(self.verdicts_path, b"".join(_line(row) for row in rows))

    def _progress(self, done: int) -> None:
        self._done = done
        self._on_progress(done, self._total)

    def _open(self, header: Mapping[str, Any], rows: int) -> dict[int, str]:
        content = self.path.read_bytes() if self.path.exists() else b""
        if _line(header).startswith(content) and content != _line(header):  # none, or a torn one
            self._start(header)
            return {}
        first, *lines, torn = content.split(b"\n") if b"\n" in content else (content, b"")
        self._check(first, header)
        texts = dict(self._text(i, line, rows) for i, line in enumerate(lines, start=2))
        if torn:
            os.truncate(self.path, len(content) - len(torn))
        return texts

    def _start(self, header: Mapping[str, Any]) -> None:
        if self.verdicts_path.exists():  # of outputs that were moved away
            raise StorageError(f"{self.verdicts_path}: is there without its outputs. {_REMEDY}")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_bytes(_line(header))

    def _check(self, first: bytes, header: Mapping[str, Any]) -> None:
        found = _parsed(first)
        if found is None or found.keys() != header.keys():
            raise StorageError(f"{self.path}: is no file of outputs. {_REMEDY}")
        if other := [name for name in header if found[name] != header[name]]:
            names = " and ".join(_MEANING[name] for name in other)
            raise StorageError(f"{self.path}: holds the outputs of {names}. {_REMEDY}")

    def _text(self, number: int, line: bytes, rows: int) -> tuple[int, str]:
        match _parsed(line):
            case {"row": int(row), "output": str(text)} if 0 <= row < rows:
                return row, text
        raise StorageError(f"{self.path}, line {number}: is no output. {_REMEDY}")


class VerdictFile:
    """`Outputs` that keep nothing but every row with its verdict, in one file, written at once.

    For the evaluations within a run: one that is cut off is made again from its beginning, in the
    same batches, so that a run that is resumed has the same bits.

    Args:
        path: The JSON Lines file; made, with its folder, once there are verdicts.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def begin(
        self, decoding: Mapping[str, Any], prompts: Sequence[Sequence[int]]
    ) -> dict[int, str]:
        """Nothing is there."""
        return {}

    def add(self, texts: Mapping[int, str]) -> None:
        """They come again with their verdicts."""

    def verdicts(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Writes every row with its verdict.

        Raises:
            UserError: The file cannot be written; one that was there is intact.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _unusable(self.path, error) from error
        write_atomic(self.path, b"".join(_line(row) for row in rows))


_REMEDY = "Nothing was changed; name another file, or move this one away."
_MEANING = {
    "key": "another model or other data",
    "decoding": "another decoding",
    "prompts": "other prompts",
}


def _digest(prompts: Sequence[Sequence[int]]) -> str:
    return hashlib.sha256(json.dumps([list(ids) for ids in prompts]).encode()).hexdigest()


def _line(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, ensure_ascii=False) + "\n").encode()


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        value = parsed(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _unusable(path: Path, error: OSError) -> UserError:
    return StorageError(
        f"{path}: cannot be used: {error.strerror}: {error.filename}. Name a file that can be "
        "written; what was written to this one before is intact."
    )
