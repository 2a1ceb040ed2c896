"""What crosses between server and client, and its bytes.

A message holds only what the receiver lacks: factors that are a function of the seed, or that
have not changed since the version it holds, are not sent. On the wire it is one safetensors blob.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from fedex_lora.adapter import AdapterState, Factors, Site, fresh
from fedex_lora.errors import UpdateRefused, UserError
from fedex_lora.federation.blobs import pieces
from fedex_lora.ledger import Ledger
from fedex_lora.lowrank import LowRank

Tensors = Mapping[str, Tensor]

_HEADER = 1024  # metadata is filled up to a multiple: bytes do not depend on how a time is written
_ON_THE_WIRE = (torch.float32, torch.bfloat16)
_NAME = re.compile(r"[A-Za-z0-9_.@/ -]{1,60}")
_MOST_NUMBERS = 50
_UNREADABLE = (
    SafetensorError,
    LookupError,
    ValueError,
    TypeError,
    AttributeError,
    RuntimeError,
    OverflowError,
)


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


def check(
    update: Update,
    start: AdapterState,
    trained: frozenset[str],
    round: int,
    client: str,
    max_norm: float | None = None,
) -> AdapterState:
    """The client's end state, if the update is one that may be aggregated.

    Args:
        max_norm: Bound of the Euclidean norm of all that changed, factors and head.

    Raises:
        UpdateRefused: Another round or client, other sites or shapes, another dtype, a number
            that is not finite, no examples, a norm above its bound. The text names the tensor.
    """
    if (update.round, update.client) != (round, client):
        raise UpdateRefused(
            f"sent an update of round {update.round} as {update.client!r}; expected round {round}"
        )
    if not update.examples > 0:
        raise UpdateRefused(f"trained on {update.examples} examples; expected at least 1")
    for name, value in update.metrics.items():
        if not math.isfinite(value):
            raise UpdateRefused(f"its training {name} is {value}; expected a finite number")
    a = {name: f.A for name, f in start.sites.items()}
    b = {name: f.B for name, f in start.sites.items()}
    _check_tensors("A", update.A, a if "A" in trained else {})
    _check_tensors("B", update.B, b if "B" in trained else {})
    _check_tensors("head", update.head, start.head)
    if max_norm is not None:
        _check_norm(_flat(A=update.A, B=update.B, head=update.head), start, max_norm)
    end = {
        name: Factors(update.A.get(name, f.A), update.B.get(name, f.B), f.scale)
        for name, f in start.sites.items()
    }
    return AdapterState(end, update.head)


def _check_tensors(kind: str, got: Tensors, expected: Tensors) -> None:
    if got.keys() != expected.keys():
        wrong = sorted(got.keys() ^ expected.keys())[0]
        what = "is missing" if wrong in expected else "was not asked for"
        raise UpdateRefused(f"{kind} of {wrong!r} {what}")
    for name, tensor in got.items():
        where, like = f"{kind} of {name!r}", expected[name]
        if tensor.shape != like.shape:
            raise UpdateRefused(
                f"{where} has shape {tuple(tensor.shape)}; expected {tuple(like.shape)}"
            )
        if tensor.dtype != like.dtype:
            raise UpdateRefused(f"{where} has dtype {tensor.dtype}; expected {like.dtype}")
        if not torch.isfinite(tensor).all():
            raise UpdateRefused(f"{where} has entries that are NaN or infinite")


def _check_norm(tensors: Tensors, start: AdapterState, bound: float) -> None:
    base = _reference(start)
    squares = [(value - base[name]).double().square().sum() for name, value in tensors.items()]
    norm = math.sqrt(sum(square.item() for square in squares))
    if norm > bound:
        raise UpdateRefused(f"it changed by {norm:.4g}; federation.max_norm is {bound:g}")


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
    tensors = _flat(A=message.A, B=message.B, head=message.head)
    tensors |= ledger_tensors(message.ledger)
    meta: dict[str, object] = {
        "round": message.round,
        "fresh": message.fresh,
        "ledger": ledger_meta(message.ledger),
    }
    return tensors, meta


def decode_broadcast(blob: bytes) -> Broadcast:
    """The inverse of `encode_broadcast`; tensors come back as float32."""
    tensors, meta = _load(blob)
    part = _unflat(tensors)
    with _reading(blob):
        ledger = ledger_from(tensors, meta["ledger"])
        return Broadcast(meta["round"], meta["fresh"], part["A"], part["B"], part["head"], ledger)


def encode_update(
    update: Update,
    start: AdapterState,
    dtype: torch.dtype = torch.float32,
    about: Mapping[str, Any] | None = None,
) -> bytes:
    """One safetensors blob; in a lossy dtype it holds the drift from `start`, which is small."""
    tensors, meta = update_parts(update, dtype)
    if dtype != torch.float32:
        base = _reference(start)
        tensors = {name: (value - base[name]).to(dtype) for name, value in tensors.items()}
    return _save(tensors, {**meta, "about": about or {}})


def update_parts(update: Update, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, object]]:
    """What `encode_update` writes, before any cast: tensors by flat name, and metadata."""
    meta: dict[str, object] = {
        "round": update.round,
        "client": update.client,
        "examples": update.examples,
        "metrics": dict(update.metrics),
        "scores": dict(update.scores),
        "drift": dtype != torch.float32,
    }
    return _flat(A=update.A, B=update.B, head=update.head), meta


def decode_update(blob: bytes, start: AdapterState) -> Update:
    """The inverse of `encode_update`.

    Raises:
        UserError: It is no such blob, or a drift of tensors that `start` does not have.
    """
    tensors, meta = _load(blob)
    with _reading(blob):
        if meta["drift"]:
            tensors = _added(_reference(start), tensors)
        part = _unflat(tensors)
        return Update(
            int(meta["round"]),
            str(meta["client"]),
            part["A"],
            part["B"],
            part["head"],
            int(meta["examples"]),
            _numbers(meta["metrics"]),
            _numbers(meta["scores"]),
            len(blob),
        )


def encode_about(about: Mapping[str, Any]) -> bytes:
    """A message without tensors: JSON in the header of an empty safetensors blob."""
    return _save({}, {"about": about})


def read_about(blob: bytes) -> dict[str, Any]:
    """The JSON in a message's header; its tensors are not looked at.

    Raises:
        UserError: It is no such message.

    Example:
        >>> read_about(encode_about({"kind": "hello"}))
        {'kind': 'hello'}
    """
    with _reading(blob):
        about = _meta(blob)["about"]
        return {str(key): value for key, value in about.items()}


def _added(base: Tensors, drifts: Tensors) -> dict[str, Tensor]:
    for name, drift in drifts.items():
        if name not in base or base[name].shape != drift.shape:
            raise ValueError(f"{name!r} of shape {tuple(drift.shape)} was not asked for")
    return {name: base[name] + drift for name, drift in drifts.items()}


def _numbers(found: Mapping[str, Any]) -> dict[str, float]:
    """Metrics by name; names are shown to people, so they are plain and few."""
    if len(found) > _MOST_NUMBERS or not all(_NAME.fullmatch(name) for name in found):
        raise ValueError("metrics with strange names, or too many")
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


def _reference(start: AdapterState) -> dict[str, Tensor]:
    a = {name: f.A for name, f in start.sites.items()}
    b = {name: f.B for name, f in start.sites.items()}
    return _flat(A=a, B=b, head=start.head)


def _flat(**parts: Tensors) -> dict[str, Tensor]:
    return {f"{kind}/{name}": value for kind, part in parts.items() for name, value in part.items()}


def _unflat(tensors: Tensors) -> dict[str, dict[str, Tensor]]:
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


def _load(blob: bytes) -> tuple[dict[str, Tensor], dict]:
    with _reading(blob):
        tensors, meta = load(blob), _meta(blob)
        for name, value in tensors.items():
            if value.dtype not in _ON_THE_WIRE:
                raise ValueError(f"{name!r} has dtype {value.dtype}; expected float32 or bfloat16")
        return {name: value.float() for name, value in tensors.items()}, meta


def _meta(blob: bytes) -> dict:
    header = json.loads(blob[8 : 8 + int.from_bytes(blob[:8], "little")])
    return json.loads(header["__metadata__"]["fedex"])


@contextmanager
def _reading(blob: bytes) -> Iterator[None]:
    """Whatever is wrong with a message that somebody sent is told in the same way."""
    try:
        yield
    except _UNREADABLE as error:
        what = f"{type(error).__name__}: {error}"[:300]
        raise UserError(f"message of {len(blob)} bytes cannot be read: {what}") from None
