"""What crosses between server and client, and its bytes.

A message holds only what the receiver lacks: factors that are a function of the seed, or that
have not changed since the version it holds, are not sent. On the wire it is one safetensors blob.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors.torch import load
from torch import Tensor

from fedex_lora.aggregation.adapter import AdapterState, Factors, Site, fresh
from fedex_lora.aggregation.ledger import Ledger
from fedex_lora.aggregation.lowrank import LowRank
from fedex_lora.federation.blobs import pieces
from fedex_lora.federation.header import Limit, read_header, reading

Tensors = Mapping[str, Tensor]

_HEADER = 1024  # metadata is filled up to a multiple: bytes do not depend on how a time is written
_NAME = re.compile(r"[A-Za-z0-9_.@/ -]{1,60}")
_MOST_NUMBERS = 50


@dataclass(frozen=True)
class Broadcast:
    """Server to client: what changed since the version it holds.

    Attributes:
        round: The round to train.
        fresh: If set, A is drawn from (seed, this version) and B = 0; nothing of them is sent.
        A, B, head: Tensors that changed, by site or parameter name.
        ledger: The entries that the client lacks.
    """

    round: int
    fresh: int | None = None
    A: Tensors = field(default_factory=dict)
    B: Tensors = field(default_factory=dict)
    head: Tensors = field(default_factory=dict)
    ledger: Ledger = field(default_factory=Ledger)


@dataclass(frozen=True)
class Update:
    """Client to server: what it trained, and how that went.

    Attributes:
        client: Who sent it, as the transport knows; a message does not say.
        A, B: Trained factors by site; a factor frozen in this round is absent.
        head: Trained head.
        examples: Number of training examples, n of the weights.
        metrics: Losses and seconds.
        scores: The incoming model on the client's own validation rows, if asked for.
        nbytes: Of the message it came in; None if it crossed no wire.
        resent: Bytes that were sent to the client on top of its broadcast, to catch it up.
    """

    round: int
    client: str
    A: Tensors
    B: Tensors
    head: Tensors
    examples: int
    metrics: Mapping[str, float] = field(default_factory=dict)
    scores: Mapping[str, float] = field(default_factory=dict)
    nbytes: int | None = None
    resent: int = 0


def receive(
    held: AdapterState, message: Broadcast, sites: Mapping[str, Site], seed: int
) -> AdapterState:
    """The adapter a client starts from: what it held, with what the message changes.

    Args:
        held: Its adapter after the last message, or the initial one.
        sites: The sites at this client's rank.
    """
    factors = held.sites if message.fresh is None else fresh(sites, seed, message.fresh)
    new = {
        name: Factors(message.A.get(name, f.A), message.B.get(name, f.B), sites[name].scale)
        for name, f in factors.items()
    }
    return AdapterState(new, {**held.head, **message.head})


def encode_broadcast(
    message: Broadcast, dtype: torch.dtype = torch.float32, about: Mapping[str, Any] | None = None
) -> bytes:
    """One safetensors blob. Always lossless: only tensors that are exact in `dtype` are cast.

    Args:
        about: JSON that travels in the header; see `read_about`.
    """
    return b"".join(_broadcast_pieces(message, dtype, about))


def broadcast_nbytes(message: Broadcast, dtype: torch.dtype = torch.float32) -> int:
    """Length of `encode_broadcast`, which is not made."""
    return sum(len(piece) for piece in _broadcast_pieces(message, dtype))


def _broadcast_pieces(
    message: Broadcast, dtype: torch.dtype, about: Mapping[str, Any] | None = None
) -> list[bytes | memoryview]:
    tensors, meta = broadcast_parts(message)
    if dtype != torch.float32:
        lower = {name: value.to(dtype) for name, value in tensors.items()}
        exact = {n: t for n, t in lower.items() if torch.equal(t.float(), tensors[n])}
        tensors = {**tensors, **exact}
    return pieces(tensors, metadata({**meta, "about": about or {}}))


def broadcast_parts(message: Broadcast) -> tuple[dict[str, Tensor], dict[str, object]]:
    """What `encode_broadcast` writes, before any cast: tensors by flat name, and metadata."""
    tensors = flat(A=message.A, B=message.B, head=message.head)
    tensors |= ledger_tensors(message.ledger)
    meta: dict[str, object] = {
        "round": message.round,
        "fresh": message.fresh,
        "ledger": ledger_meta(message.ledger),
    }
    return tensors, meta


def decode_broadcast(blob: bytes, limit: Limit) -> Broadcast:
    """The inverse of `encode_broadcast`; tensors come back as float32.

    Raises:
        UserError: It is larger than `limit`, or no such message.
    """
    meta = read_header(blob, limit).meta
    with reading(blob):
        tensors = _floats(blob)
        part, fresh = unflat(tensors), meta["fresh"]
        ledger = ledger_from(tensors, meta["ledger"])
        fresh = None if fresh is None else _whole("fresh", fresh)
        return Broadcast(
            _whole("round", meta["round"]), fresh, part["A"], part["B"], part["head"], ledger
        )


def encode_update(
    update: Update,
    start: AdapterState,
    dtype: torch.dtype = torch.float32,
    about: Mapping[str, Any] | None = None,
) -> bytes:
    """One safetensors blob; in a lossy dtype it holds the drift from `start`, which is small."""
    tensors, meta = update_parts(update, dtype)
    if dtype != torch.float32:
        base = reference(start)
        tensors = {name: (value - base[name]).to(dtype) for name, value in tensors.items()}
    return _save(tensors, {**meta, "about": about or {}})


def update_parts(update: Update, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, object]]:
    """What `encode_update` writes, before any cast: tensors by flat name, and metadata."""
    meta: dict[str, object] = {
        "round": update.round,
        "examples": update.examples,
        "metrics": dict(update.metrics),
        "scores": dict(update.scores),
        "drift": dtype != torch.float32,
    }
    return flat(A=update.A, B=update.B, head=update.head), meta


def most_up(start: AdapterState) -> Limit:
    """The limit of an update: all factors and the head."""
    tensors = reference(start)
    return Limit.of(sum(t.numel() for t in tensors.values()), len(tensors))


def decode_update(blob: bytes, start: AdapterState, client: str) -> Update:
    """The inverse of `encode_update`.

    Args:
        client: Who sent it, by the transport's account.

    Raises:
        UserError: It is larger than an update can be, no such message, or holds tensors that
            `start` does not have.
    """
    header = read_header(blob, most_up(start))
    base, meta = reference(start), header.meta
    with reading(blob):
        for name, shape in header.shapes.items():
            if name not in base:
                raise ValueError(f"{_worded(name)} was not asked for")
            if shape != tuple(base[name].shape):
                expected = tuple(base[name].shape)
                raise ValueError(f"{_worded(name)} has shape {shape}; expected {expected}")
        if not isinstance(meta["drift"], bool):
            raise ValueError("drift: expected true or false")
        tensors = _floats(blob)
        if meta["drift"]:
            tensors = {name: base[name] + drift for name, drift in tensors.items()}
        part = unflat(tensors)
        return Update(
            _whole("round", meta["round"]),
            client,
            part["A"],
            part["B"],
            part["head"],
            _whole("examples", meta["examples"]),
            _numbers(meta["metrics"]),
            _numbers(meta["scores"]),
            len(blob),
        )


def encode_about(about: Mapping[str, Any]) -> bytes:
    """A message without tensors: JSON in the header of an empty safetensors blob."""
    return _save({}, {"about": about})


def read_about(blob: bytes, limit: Limit) -> dict[str, Any]:
    """The JSON in a message's header; its tensors are not looked at.

    Raises:
        UserError: It is larger than `limit`, or no such message.

    Example:
        >>> from fedex_lora.federation.header import WORDS
        >>> read_about(encode_about({"kind": "hello"}), WORDS)
        {'kind': 'hello'}
    """
    meta = read_header(blob, limit).meta
    with reading(blob):
        return dict(meta["about"].items())


def _worded(key: str) -> str:
    kind, _, name = key[:200].partition("/")
    return f"{kind} of {name!r}"


def _whole(name: str, value: Any) -> int:
    if type(value) is not int:
        raise ValueError(f"{name}: expected a whole number, got {str(value)[:40]!r}")
    return value


def _numbers(found: Mapping[str, Any]) -> dict[str, float]:
    """Metrics by name; names are shown to people, so they are plain and few."""
    if len(found) > _MOST_NUMBERS or not all(_NAME.fullmatch(name) for name in found):
        raise ValueError("metrics with strange names, or too many")
    for name, value in found.items():
        if type(value) not in (int, float):
            raise ValueError(f"{name}: expected a number, got {str(value)[:40]!r}")
    return {name: float(value) for name, value in found.items()}


def ledger_tensors(ledger: Ledger) -> dict[str, Tensor]:
    """A ledger's tensors under flat names."""
    flat: dict[str, Tensor] = {}
    for version, increment in (("snapshot", ledger.snapshot), *ledger.entries):
        for site, w in increment.items():
            key = f"ledger/{version}/{site}"
            if isinstance(w, LowRank):
                flat |= {f"{key}/left": w.left, f"{key}/right": w.right}
            else:
                flat[f"{key}/dense"] = w
    return flat


def ledger_meta(ledger: Ledger) -> dict[str, object]:
    """What `ledger_from` needs beside the tensors."""
    return {"versions": [v for v, _ in ledger.entries], "snapshot": ledger.snapshot_version}


def ledger_from(tensors: Tensors, meta: Mapping[str, object]) -> Ledger:
    """The ledger back from its flat tensors."""
    increments: dict[str, dict[str, LowRank | Tensor]] = {}
    for key, value in tensors.items():
        if not key.startswith("ledger/"):
            continue
        _, version, site, kind = key.split("/")
        if kind == "left":
            increments.setdefault(version, {})[site] = LowRank(
                value, tensors[f"ledger/{version}/{site}/right"]
            )
        elif kind == "dense":
            increments.setdefault(version, {})[site] = value
    entries = tuple((v, increments.get(str(v), {})) for v in meta["versions"])  # type: ignore
    return Ledger(entries, increments.get("snapshot", {}), meta["snapshot"])  # type: ignore


def update_nbytes(update: Update, dtype: torch.dtype = torch.float32) -> int:
    """Length of `encode_update`, which is not made."""
    tensors, meta = update_parts(update, dtype)
    tensors = {name: value.to(dtype) for name, value in tensors.items()}
    return sum(len(piece) for piece in pieces(tensors, metadata({**meta, "about": {}})))


def reference(start: AdapterState) -> dict[str, Tensor]:
    """What a client trains, as it was at the start, by flat name."""
    a = {name: f.A for name, f in start.sites.items()}
    b = {name: f.B for name, f in start.sites.items()}
    return flat(A=a, B=b, head=start.head)


def flat(**parts: Tensors) -> dict[str, Tensor]:
    """Tensors by PART/NAME."""
    return {f"{kind}/{name}": value for kind, part in parts.items() for name, value in part.items()}


def unflat(tensors: Tensors) -> dict[str, dict[str, Tensor]]:
    """The factors and the head among flat tensors, by part and name."""
    parts: dict[str, dict[str, Tensor]] = {"A": {}, "B": {}, "head": {}}
    for key, value in tensors.items():
        kind, _, name = key.partition("/")
        if kind in parts:
            parts[kind][name] = value
    return parts


def metadata(meta: Mapping[str, object]) -> dict[str, str]:
    """A message's metadata as safetensors takes it, of a length that hardly ever varies."""
    text = json.dumps({"about": {}, **meta})
    return {"fedex": text + " " * (-len(json.dumps(text)) % _HEADER)}  # quotes are escaped


def _save(tensors: Tensors, meta: Mapping[str, object]) -> bytes:
    return b"".join(pieces(tensors, metadata(meta)))


def _floats(blob: bytes) -> dict[str, Tensor]:
    return {name: value.float() for name, value in load(blob).items()}
