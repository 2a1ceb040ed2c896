"""Checkpoints: the server state in one safetensors file, and clients' own factors in files of
their own (shelf.py), written so that a crash at any moment leaves the one before intact. A digest
beside the file is the sign that all of it is complete."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fedex_lora.aggregation.adapter import AdapterState, Factors
from fedex_lora.aggregation.lowrank import LowRank
from fedex_lora.disk import parsed, replace_atomic, write_atomic
from fedex_lora.errors import UserError
from fedex_lora.federation.messages import ledger_from, ledger_meta, ledger_tensors
from fedex_lora.federation.state import ServerState
from fedex_lora.runs import shelf

NAME = "round-{:04d}.safetensors"  # more digits from round 10,000 on
_NAMED = re.compile(r"round-([0-9]+)\.safetensors")
_ODD = (LookupError, TypeError, ValueError, AttributeError, SafetensorError)
OWN = "own"  # the directory of clients' own factors


def save_checkpoint(directory: Path, state: ServerState, extra: Mapping[str, Any]) -> Path:
    """Writes the state after its version; `extra` is JSON that comes back with it."""
    own = {c: _shelved(directory, state.version, a).name for c, a in state.own.items()}
    meta = {"fedex": json.dumps({**_meta(state), "own": own, "extra": extra})}
    path = directory / NAME.format(state.version)
    replace_atomic(path, lambda new: save_file(_tensors(state), new, meta))
    write_atomic(_digest_path(path), _digest(path).encode())
    return path


def shelve(directory: Path, version: int, adapter: AdapterState) -> AdapterState:
    """Puts a client's own factors beside the checkpoints; they are read when needed."""
    return shelf.put(directory / OWN, version, adapter)


def _shelved(directory: Path, version: int, adapter: AdapterState) -> Path:
    """The file beside the checkpoints that holds a client's own factors."""
    path = shelf.place(adapter)
    if path is None or path.parent != directory / OWN:
        path = shelf.place(shelve(directory, version, adapter))
    assert path is not None
    return path


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load_checkpoint(path: Path) -> tuple[ServerState, dict[str, Any]]:
    """The state and what was saved beside it.

    Raises:
        UserError: If the file is absent, truncated, not what was written, or of another version.
    """
    try:
        intact = _digest(path).encode() == _digest_path(path).read_bytes().strip()
    except OSError as error:
        raise UserError(f"{path}: checkpoint cannot be read: {error.strerror}") from None
    if not intact:
        raise UserError(f"{path}: checkpoint is corrupted or truncated (its digest differs)")
    try:
        return _read(path)
    except UserError:
        raise
    except LookupError as error:
        raise UserError(
            f"{path}: checkpoint of another version of fedex-lora (it lacks {error}); go on with "
            "the version that environment.json names"
        ) from None
    except _ODD as error:
        raise UserError(f"{path}: no checkpoint ({type(error).__name__}: {error})") from None


def _read(path: Path) -> tuple[ServerState, dict[str, Any]]:
    meta = _meta_in(path)
    own = {client: path.parent / OWN / name for client, name in meta["own"].items()}
    for client, file in own.items():
        if not shelf.intact(file):
            raise UserError(f"{path}: checkpoint lacks the factors of {client}, {file}")
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return _state(tensors, meta, {c: shelf.get(file) for c, file in own.items()}), meta["extra"]


def _meta_in(path: Path) -> dict[str, Any]:
    with safe_open(path, framework="pt") as file:
        return parsed(file.metadata()["fedex"])


def by_round(directory: Path) -> dict[int, Path]:
    """Checkpoints that were finished, by round, newest first."""
    found = {path: _NAMED.fullmatch(path.name) for path in directory.glob("round-*.safetensors")}
    rounds = {int(name[1]): path for path, name in found.items() if name}
    return {n: rounds[n] for n in sorted(rounds, reverse=True) if _digest_path(rounds[n]).exists()}


def checkpoints(directory: Path) -> list[Path]:
    """Checkpoints that were finished, newest first."""
    return list(by_round(directory).values())


def prune(directory: Path, keep: set[int]) -> None:
    """Deletes all but the two newest checkpoints and those of the rounds in `keep`."""
    kept = {directory / NAME.format(round) for round in keep}
    there = checkpoints(directory)
    for path in there[2:]:
        if path not in kept:
            path.unlink()
            _digest_path(path).unlink()
    if (directory / OWN).is_dir() and there:
        used = {directory / OWN / name for path in checkpoints(directory) for name in _own_in(path)}
        shelf.sweep(directory / OWN, int(there[0].stem.rpartition("-")[2]), used)


def _own_in(path: Path) -> list[str]:
    """Names of the files that a checkpoint needs beside it; none if it is damaged."""
    try:
        return list(_meta_in(path)["own"].values())
    except (OSError, *_ODD):
        return []


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
        "ledger": ledger_meta(state.ledger),
    }


def _tensors(state: ServerState) -> dict[str, Tensor]:
    flat = ledger_tensors(state.ledger)
    shared = shelf.adapter_tensors(AdapterState(state.factors, state.head))
    flat |= {f"factors/{name}": value for name, value in shared.items()}
    for site, w in state.carry.items():
        flat |= {f"carry/{site}/left": w.left, f"carry/{site}/right": w.right}
    flat |= {f"late/{name}": value for name, value in state.late.items()}
    seen: set[int] = set()  # one tensor under two names is written twice
    for name, value in flat.items():
        if value.data_ptr() in seen or not value.is_contiguous():
            flat[name] = value.clone(memory_format=torch.contiguous_format)
        seen.add(value.data_ptr())
    return flat


def _adapter(tensors: Mapping[str, Tensor], prefix: str, scales: Mapping[str, float]):
    a, b, head = (_under(tensors, f"{prefix}/{kind}/") for kind in ("A", "B", "head"))
    return AdapterState({n: Factors(a[n], b[n], s) for n, s in scales.items()}, head)


def _under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}


def _state(
    tensors: Mapping[str, Tensor], meta: Mapping[str, Any], own: Mapping[str, AdapterState]
) -> ServerState:
    shared = _adapter(tensors, "factors", meta["scales"])
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
