"""Adapters on disk, so that memory does not grow with the number of clients.

Where factors are a client's own (keep, hetero, local) the server must remember everybody's. Each
adapter is put into a file of its own, and comes back as an `AdapterState` that reads a site's
factors when it is asked for them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from fedex_lora.aggregation.adapter import AdapterState, Factors
from fedex_lora.disk import reason, replace_atomic
from fedex_lora.errors import UserError

T = TypeVar("T")
_NAME = "{:04d}-{}.safetensors"


@dataclass(frozen=True)
class OnDisk(Mapping[str, T], Generic[T]):
    """Values by name that are read from a file whenever they are asked for."""

    path: Path
    names: tuple[str, ...]
    read: Callable[[Any, str], T]

    def __getitem__(self, name: str) -> T:
        if name not in self.names:
            raise KeyError(name)
        with _opened(self.path) as file:
            return self.read(file, name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def put(directory: Path, version: int, adapter: AdapterState) -> AdapterState:
    """Writes an adapter and returns it as one that is read when needed.

    The file's name says the version it belongs to and what is in it; equal ones are one file.

    Raises:
        UserError: The file cannot be written.
    """
    scales = {name: f.scale for name, f in adapter.sites.items()}
    flat = {name: t.contiguous() for name, t in adapter_tensors(adapter).items()}
    blob = save(flat, {"scales": json.dumps(scales)})
    path = directory / _NAME.format(version, hashlib.sha256(blob).hexdigest())
    if not intact(path):
        replace_atomic(path, lambda new: _write(new, blob))
    return get(path)


def _write(new: Path, blob: bytes) -> None:
    new.parent.mkdir(exist_ok=True)
    new.write_bytes(blob)


def get(path: Path) -> AdapterState:
    """The adapter in a file; its tensors are read when they are asked for.

    Raises:
        UserError: There is no such file, or it is damaged.
    """
    with _opened(path) as file:
        scales = json.loads(file.metadata()["scales"])
        names = [name[len("head/") :] for name in file.keys() if name.startswith("head/")]  # noqa: SIM118
    return AdapterState(
        OnDisk(path, tuple(scales), lambda file, site: _factors(file, site, scales[site])),
        OnDisk(path, tuple(names), lambda file, name: file.get_tensor(f"head/{name}")),
    )


def intact(path: Path) -> bool:
    """Whether the file holds what its name says."""
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return False
    return path.stem.endswith(digest)


def place(adapter: AdapterState) -> Path | None:
    """The file that an adapter is read from; None if it is in memory."""
    return adapter.sites.path if isinstance(adapter.sites, OnDisk) else None


def sweep(directory: Path, version: int, used: Iterable[Path]) -> None:
    """Deletes the files of versions up to `version` that are not in `used`."""
    kept = set(used)
    for path in directory.glob("[0-9]*-*.safetensors"):
        made = path.name.partition("-")[0]
        if path not in kept and made.isdecimal() and int(made) <= version:
            path.unlink()


def adapter_tensors(adapter: AdapterState) -> dict[str, Tensor]:
    """All tensors by name: A/SITE, B/SITE, head/PARAMETER."""
    flat = {f"head/{name}": value for name, value in adapter.head.items()}
    for site, f in adapter.sites.items():
        flat |= {f"A/{site}": f.A, f"B/{site}": f.B}
    return flat


def _factors(file: Any, site: str, scale: float) -> Factors:
    return Factors(file.get_tensor(f"A/{site}"), file.get_tensor(f"B/{site}"), scale)


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{path}: a client's own factors cannot be read: {reason(error)}. The file belongs to "
            "a checkpoint; put it back, or delete that checkpoint and go on from the one before"
        ) from None
