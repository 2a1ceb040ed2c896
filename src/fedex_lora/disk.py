"""Files and directories that appear whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from fedex_lora.errors import StorageError


@contextmanager
def new_directory(out: Path, what: str, then: str) -> Iterator[Path]:
    """A directory beside `out` that becomes `out` when all is written; a failure leaves nothing.

    Args:
        out: Absent, or an empty directory.
        what: What is written, for errors: "the export".
        then: What to do once there is space, for errors: "export again".

    Raises:
        UserError: `out` is in use, or it cannot be written.
    """
    check_free(out)
    whole = out.absolute()
    new = whole.with_name(f".{whole.name}.partial")
    try:
        shutil.rmtree(new, ignore_errors=True)  # of one that was killed
        new.mkdir(parents=True)
        try:
            yield new
            new.rename(whole)
        finally:
            shutil.rmtree(new, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise StorageError(
            f"{out}: {what} cannot be written: {reason(error)}. Free some space or name a "
            f"directory that you may write with `out`, then {then}"
        ) from None


def check_free(out: Path) -> None:
    """Raises a `UserError` if `out` is anything but absent or an empty directory."""
    try:
        used = out.exists() and (not out.is_dir() or any(out.iterdir()))
    except OSError as error:
        raise StorageError(f"{out}: cannot be written: {reason(error)}") from None
    if used:
        raise StorageError(f"{out}: exists and is not empty; name another directory with `out`")


def reason(error: Exception) -> str:
    """Why a file could not be read or written, without the error's number."""
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def stands_for(path: Path) -> str:
    """What a file is in place of the one that its name says: a pointer that Git LFS left, or a
    link to nothing, as in a part of the hub's cache; "" if it is neither."""
    if path.is_symlink() and not path.exists():
        return f"a link to {path.readlink()}, which is not there; download it again"
    try:
        with path.open("rb") as file:
            pointer = file.read(len(_POINTER)) == _POINTER
    except OSError:
        return ""
    return "a pointer of Git LFS; get the file itself with `git lfs pull`" if pointer else ""


_POINTER = b"version https://git-lfs.github.com/spec/"


def write_atomic(path: Path, content: bytes) -> None:
    """Writes a new file, fsyncs it, renames it onto `path`, fsyncs the directory.

    Raises:
        UserError: A full disk or a directory that cannot be written; `path` is as it was.
    """
    replace_atomic(path, lambda new: new.write_bytes(content))


def replace_atomic(path: Path, write: Callable[[Path], object]) -> None:
    """As `write_atomic`, of a file that `write` makes at the path it is given."""
    new = path.with_name(path.name + ".new")
    try:
        write(new)
        _sync(new)
        new.replace(path)
        _sync(path.parent)
    except (OSError, SafetensorError) as error:
        new.unlink(missing_ok=True)
        raise StorageError(
            f"{path}: cannot be written: {reason(error)}. Free some space or choose "
            "another directory, then `fedex-lora resume`; what was saved before is intact"
        ) from None


def sha256_of(path: Path) -> str:
    """Of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_text(path: Path) -> str:
    """A text in UTF-8, or in UTF-16 or UTF-32 as Windows' programs write it.

    Raises:
        OSError: It cannot be read.
        UnicodeDecodeError: It is no text.
    """
    return path.read_text(encoding=json.detect_encoding(path.read_bytes()))


def parsed(text: str | bytes) -> Any:
    """What a JSON text says.

    Raises:
        ValueError: It is none, whatever is wrong with it.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def write_secret(path: Path, content: bytes) -> None:
    """A new file that its owner alone may read."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(handle, "wb") as file:
        file.write(content)


def append_private(path: Path, text: str) -> None:
    """Appends to a file that its owner alone may read; one that is new is made so."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        os.write(handle, text.encode(errors="replace"))
    finally:
        os.close(handle)


def _sync(path: Path) -> None:
    if os.name == "nt" and path.is_dir():  # which Windows neither opens nor needs
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
