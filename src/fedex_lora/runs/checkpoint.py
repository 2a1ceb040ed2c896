"""Checkpoints: the server state in one safetensors file, and clients' own tensors in files of
their own (shelf.py), written so that a crash at any moment leaves the one before intact. A digest
beside the file is the sign that all of it is complete."""

from __future__ import annotations

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
from fedex_lora.aggregation.delta import Delta
from fedex_lora.disk import parsed, replace_atomic, sha256_of, write_atomic
from fedex_lora.errors import StorageError, UserError
from fedex_lora.federation.codec import ledger_from, ledger_meta, ledger_tensors
from fedex_lora.federation.messages import Pending, Tensors, Update, flat
from fedex_lora.federation.state import ServerState
from fedex_lora.runs import shelf

NAME = "round-{:04d}.safetensors"  # more digits from round 10,000 on
_NAMED = re.compile(r"round-([0-9]+)\.safetensors")
_ODD = (LookupError, TypeError, ValueError, AttributeError, SafetensorError)
OWN = "own"  # the directory of clients' own tensors
_BESIDE = "own", "variates", "pending"  # of each client, in files of their own


def save_checkpoint(directory: Path, state: ServerState, extra: Mapping[str, Any]) -> Path:
    """Writes the state after its version; `extra` is JSON that comes back with it."""
    pending = {c: p.update.tensors for c, p in state.pending.items()}
    beside = {
        kind: {c: shelve(directory, state.version, t).path.name for c, t in parts.items()}
        for kind, parts in zip(_BESIDE, (state.own, state.variates, pending))
    }
    meta = {"fedex": json.dumps({**_meta(state), **beside, "extra": extra})}
    path = directory / NAME.format(state.version)
    replace_atomic(path, lambda new: save_file(_tensors(state), new, meta))
    write_atomic(_digest_path(path), sha256_of(path).encode())
    return path


def shelve(directory: Path, version: int, tensors: Tensors) -> shelf.OnDisk:
    """Puts a client's own tensors beside the checkpoints, if they are not there; they are read
    when needed."""
    if isinstance(tensors, shelf.OnDisk) and tensors.path.parent == directory / OWN:
        return tensors
    return shelf.put(directory / OWN, version, tensors)


def load_checkpoint(path: Path) -> tuple[ServerState, dict[str, Any]]:
    """The state and what was saved beside it.

    Raises:
        UserError: If the file is absent, truncated, not what was written, or of another version.
    """
    try:
        intact = sha256_of(path).encode() == _digest_path(path).read_bytes().strip()
    except OSError as error:
        raise StorageError(f"{path}: checkpoint cannot be read: {error.strerror}") from None
    if not intact:
        raise StorageError(f"{path}: checkpoint is corrupted or truncated (its digest differs)")
    try:
        return _read(path)
    except UserError:
        raise
    except LookupError as error:
        raise StorageError(
            f"{path}: checkpoint of another version of fedex-lora (it lacks {error}); go on with "
            "the version that environment.json names"
        ) from None
    except _ODD as error:
        raise StorageError(f"{path}: no checkpoint ({type(error).__name__}: {error})") from None


def _read(path: Path) -> tuple[ServerState, dict[str, Any]]:
    meta = _meta_in(path)
    parts = [
        {client: path.parent / OWN / name for client, name in meta.get(kind, {}).items()}
        for kind in _BESIDE
    ]
    for client, file in ((c, file) for part in parts for c, file in part.items()):
        if not shelf.intact(file):
            raise StorageError(f"{path}: checkpoint lacks the factors of {client}, {file}")
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    held = ({c: shelf.get(file) for c, file in part.items()} for part in parts)
    return _state(tensors, meta, *held), meta["extra"]


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
        meta = _meta_in(path)
        return [name for kind in _BESIDE for name in meta.get(kind, {}).values()]
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
        "taken": dict(state.taken),
        "ranks": dict(state.ranks),
        "past": sorted(state.past),
        "due": {c: _held_back(pending) for c, pending in state.pending.items()},
        "scales": {n: f.scale for n, f in state.factors.items()},
        "ledger": ledger_meta(state.ledger),
    }


def _tensors(state: ServerState) -> dict[str, Tensor]:
    found = ledger_tensors(state.ledger)
    shared = flat(AdapterState(state.factors, state.head))
    found |= {f"factors/{name}": value for name, value in shared.items()}
    for layer, w in state.carry.items():
        found |= {f"carry/{layer}/{part}": value for part, value in w.parts.items()}
    found |= {f"late/{name}": value for name, value in state.late.items()}
    found |= {f"optimizer/{name}": value for name, value in state.optimizer.items()}
    found |= {f"variate/{name}": value for name, value in state.variate.items()}
    for version, adapter in state.past.items():
        found |= {f"past/{version}/{name}": value for name, value in flat(adapter).items()}
    seen: set[int] = set()  # one tensor under two names is written twice
    for name, value in found.items():
        if value.data_ptr() in seen or not value.is_contiguous():
            found[name] = value.clone(memory_format=torch.contiguous_format)
        seen.add(value.data_ptr())
    return found


def _under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}


def _state(
    tensors: Tensors,
    meta: Mapping[str, Any],
    own: Mapping[str, Tensors],
    variates: Mapping[str, Tensors],
    pending: Mapping[str, Tensors],
) -> ServerState:
    carry = _under(tensors, "carry/")
    layers = [key[: -len("/left")] for key in carry if key.endswith("/left")]
    held: dict[str, int] = meta["held"]
    now = _adapter(tensors, "factors", meta["scales"])
    return ServerState(
        meta["version"],
        now.layers,
        now.head,
        ledger_from(tensors, meta["ledger"]),
        own,
        {n: Delta(carry[f"{n}/left"], carry.get(f"{n}/right")) for n in layers},
        _under(tensors, "late/"),
        held,
        meta["changed"],
        # before it was kept, a client held the version before its last update
        meta.get("taken", {client: version + 1 for client, version in held.items()}),
        _under(tensors, "optimizer/"),
        meta.get("ranks", {}),  # before clients could be pruned there were none
        variates,
        _under(tensors, "variate/"),
        {v: _adapter(tensors, f"past/{v}", meta["scales"]) for v in meta.get("past", [])},
        {c: _pending(c, meta["due"][c], tensors) for c, tensors in pending.items()},
    )


def _adapter(tensors: Tensors, where: str, scales: Mapping[str, float]) -> AdapterState:
    a, b, head = (_under(tensors, f"{where}/{kind}/") for kind in ("A", "B", "head"))
    return AdapterState({n: Factors(a[n], b[n], scale) for n, scale in scales.items()}, head)


def _held_back(pending: Pending) -> dict[str, Any]:
    update = pending.update
    about = {"round": update.round, "examples": update.examples, "metrics": dict(update.metrics)}
    return {"due": pending.due, **about}


def _pending(client: str, about: Mapping[str, Any], tensors: Tensors) -> Pending:
    update = Update(about["round"], client, tensors, about["examples"], about["metrics"])
    return Pending(update, about["due"])
