"""Clients' own tensors on disk, so that memory does not grow with the number of clients.

Where factors are a client's own the run must remember everybody's. Each client's are put into a
file, and come back as a mapping that reads a tensor when it is asked for.
"""

from __future__ import annotations

import hashlib
from collections.abc import ItemsView, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from fedex_lora.disk import reason, replace_atomic, sha256_of
from fedex_lora.errors import StorageError
from fedex_lora.federation.messages import Tensors

_NAME = "{:04d}-{}.safetensors"


@dataclass(frozen=True)
class OnDisk(Mapping[str, Tensor]):
    """Tensors by flat name that are read from a file whenever they are asked for."""

    path: Path
    names: tuple[str, ...]

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.names:
            raise KeyError(name)
        with _opened(self.path) as file:
            return file.get_tensor(name).clone()  # else it keeps the whole file mapped

    def items(self) -> ItemsView[str, Tensor]:
        """All of them, in one pass over the file."""
        with _opened(self.path) as file:
            return {name: file.get_tensor(name).clone() for name in self.names}.items()

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def put(directory: Path, version: int, tensors: Tensors) -> OnDisk:
    """Writes a client's tensors and returns them as ones that are read when needed.

    The file's name says the version it belongs to and what is in it; equal ones are one file.

    Raises:
        UserError: The file cannot be written.
    """
    blob = save({name: tensors[name].contiguous() for name in tensors})
    path = directory / _NAME.format(version, hashlib.sha256(blob).hexdigest())
    if not intact(path):
        replace_atomic(path, lambda new: _write(new, blob))
    return get(path)


def _write(new: Path, blob: bytes) -> None:
    new.parent.mkdir(exist_ok=True)
    new.write_bytes(blob)


def get(path: Path) -> OnDisk:
    """The tensors in a file, which are read when they are asked for.

    Raises:
        UserError: There is no such file, or it is damaged.
    """
    with _opened(path) as file:
        return OnDisk(path, tuple(sorted(file.keys())))


def intact(path: Path) -> bool:
    """Whether the file holds what its name says."""
    try:
        return path.stem.endswith(sha256_of(path))
    except OSError:
        return False


def sweep(directory: Path, version: int, used: Iterable[Path]) -> None:
    """Deletes the files of versions up to `version` that are not in `used`."""
    kept = set(used)
    for path in directory.glob("[0-9]*-*.safetensors"):
        made = path.name.partition("-")[0]
        if path not in kept and made.isdecimal() and int(made) <= version:
            path.unlink()


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise StorageError(
            f"{path}: a client's own factors cannot be read: {reason(error)}. The file belongs to "
            "a checkpoint; put it back, or delete that checkpoint and go on from the one before"
        ) from None
