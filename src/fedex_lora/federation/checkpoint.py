"""Checkpoints: the whole server state in one safetensors file, written so that a crash at any
moment leaves the one before intact. A digest beside the file is the sign that it is complete."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fedex_lora.adapter import AdapterState, Factors
from fedex_lora.errors import UserError
from fedex_lora.federation.messages import ledger_from, ledger_meta, ledger_tensors
from fedex_lora.federation.state import ServerState
from fedex_lora.lowrank import LowRank

NAME = "round-{:04d}.safetensors"


def write_atomic(path: Path, content: bytes) -> None:
    """Writes a new file, fsyncs it, renames it onto `path`, fsyncs the directory.

    Raises:
        UserError: A full disk or a directory that cannot be written; `path` is as it was.
    """
    _replace(path, lambda new: new.write_bytes(content))


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    new = path.with_name(path.name + ".new")
    try:
        write(new)
        _sync(new)
        new.replace(path)
        _sync(path.parent)
    except (OSError, SafetensorError) as error:
        new.unlink(missing_ok=True)
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise UserError(
            f"{path}: cannot be written: {reason}. Free some space or choose "
            "another directory, then `fedex-lora resume`; what was saved before is intact"
        ) from None


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def save_checkpoint(directory: Path, state: ServerState, extra: Mapping[str, Any]) -> Path:
    """Writes the state after its version; `extra` is JSON that comes back with it."""
    meta = {"fedex": json.dumps({**_meta(state), "extra": extra})}
    path = directory / NAME.format(state.version)
    _replace(path, lambda new: save_file(_tensors(state), new, meta))
    write_atomic(_digest_path(path), _digest(path).encode())
    return path


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load_checkpoint(path: Path) -> tuple[ServerState, dict[str, Any]]:
    """The state and what was saved beside it.

    Raises:
        UserError: If the file is absent, truncated, or not what was written.
    """
    try:
        intact = _digest(path) == _digest_path(path).read_text()
    except OSError as error:
        raise UserError(f"{path}: checkpoint cannot be read: {error.strerror}") from None
    if not intact:
        raise UserError(f"{path}: checkpoint is corrupted or truncated (its digest differs)")
    with safe_open(path, framework="pt") as file:
        meta = json.loads(file.metadata()["fedex"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return _state(tensors, meta), meta["extra"]


def checkpoints(directory: Path) -> list[Path]:
    """Checkpoints that were finished, newest first."""
    found = sorted(directory.glob("round-*.safetensors"), reverse=True)
    return [path for path in found if _digest_path(path).exists()]


def prune(directory: Path, keep: set[int]) -> None:
    """Deletes all but the two newest checkpoints and those of the rounds in `keep`."""
    kept = {directory / NAME.format(round) for round in keep}
    for path in checkpoints(directory)[2:]:
        if path not in kept:
            path.unlink()
            _digest_path(path).unlink()


def latest(directory: Path) -> Iterator[tuple[Path, ServerState | None, dict[str, Any] | str]]:
    """Checkpoints from the newest on: (path, state, extra), or (path, None, what is wrong)."""
    for path in checkpoints(directory):
        try:
            yield path, *load_checkpoint(path)
        except UserError as error:
            yield path, None, str(error)


def _digest_path(path: Path) -> Path:
    return path.with_suffix(".sha256")


def _meta(state: ServerState) -> dict[str, Any]:
    return {
        "version": state.version,
        "held": dict(state.held),
        "changed": dict(state.changed),
        "scales": {n: f.scale for n, f in state.factors.items()},
        "own_scales": {c: {n: f.scale for n, f in a.sites.items()} for c, a in state.own.items()},
        "ledger": ledger_meta(state.ledger),
    }


def _tensors(state: ServerState) -> dict[str, Tensor]:
    flat = ledger_tensors(state.ledger)
    flat |= _adapter_tensors("factors", AdapterState(state.factors, state.head))
    for client, adapter in state.own.items():
        flat |= _adapter_tensors(f"own/{client}", adapter)
    for site, w in state.carry.items():
        flat |= {f"carry/{site}/left": w.left, f"carry/{site}/right": w.right}
    flat |= {f"late/{name}": value for name, value in state.late.items()}
    seen: set[int] = set()  # one tensor under two names is written twice
    for name, value in flat.items():
        if value.data_ptr() in seen or not value.is_contiguous():
            flat[name] = value.clone(memory_format=torch.contiguous_format)
        seen.add(value.data_ptr())
    return flat


def _adapter_tensors(prefix: str, adapter: AdapterState) -> dict[str, Tensor]:
    flat = {f"{prefix}/head/{name}": value for name, value in adapter.head.items()}
    for site, f in adapter.sites.items():
        flat |= {f"{prefix}/A/{site}": f.A, f"{prefix}/B/{site}": f.B}
    return flat


def _adapter(tensors: Mapping[str, Tensor], prefix: str, scales: Mapping[str, float]):
    a, b, head = (_under(tensors, f"{prefix}/{kind}/") for kind in ("A", "B", "head"))
    return AdapterState({n: Factors(a[n], b[n], s) for n, s in scales.items()}, head)


def _under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}


def _state(tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> ServerState:
    shared = _adapter(tensors, "factors", meta["scales"])
    own = {c: _adapter(tensors, f"own/{c}", s) for c, s in meta["own_scales"].items()}
    carry = _under(tensors, "carry/")
    sites = [key[: -len("/left")] for key in carry if key.endswith("/left")]
    return ServerState(
        meta["version"],
        shared.sites,
        shared.head,
        ledger_from(tensors, meta["ledger"]),
        own,
        {s: LowRank(carry[f"{s}/left"], carry[f"{s}/right"]) for s in sites},
        _under(tensors, "late/"),
        meta["held"],
        meta["changed"],
    )
