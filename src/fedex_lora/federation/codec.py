"""Messages and ledgers as bytes: one safetensors blob each, and its size without making it.

    8 bytes (length of the header) | header (JSON) | tensors

The program's own JSON stands in the header's `__metadata__`. This is the only place that knows how
an adapter, a ledger and a residual are laid out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import torch
from safetensors.torch import load
from torch import Tensor

from fedex_lora.aggregation.adapter import AdapterState
from fedex_lora.aggregation.delta import Delta
from fedex_lora.aggregation.ledger import Ledger
from fedex_lora.federation.header import Limit, read_header, reading
from fedex_lora.federation.messages import Broadcast, Tensors, Update, flat

_DTYPES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
}
_HEADER = 1024  # metadata is filled up to a multiple: bytes do not depend on how a time is written
_NAME = re.compile(r"[A-Za-z0-9_.@/ -]{1,60}")
_MOST_NUMBERS = 50


def encode_broadcast(
    message: Broadcast, dtype: torch.dtype = torch.float32, about: Mapping[str, Any] | None = None
) -> bytes:
    """Always lossless: only tensors that are exact in `dtype` are cast.

    Args:
        about: JSON that travels in the header; see `read_about`.
    """
    return b"".join(pieces(*_broadcast_parts(message, dtype, about)))


def broadcast_nbytes(message: Broadcast, dtype: torch.dtype = torch.float32) -> int:
    """Length of `encode_broadcast`, which is not made."""
    return nbytes(*_broadcast_parts(message, dtype))


def decode_broadcast(blob: bytes, limit: Limit) -> Broadcast:
    """The inverse of `encode_broadcast`; tensors come back as float32.

    Raises:
        UserError: It is larger than `limit`, or no such message.
    """
    meta = read_header(blob, limit).meta
    with reading(blob):
        tensors, fresh = _floats(blob), meta["fresh"]
        return Broadcast(
            _whole("round", meta["round"]),
            {name: value for name, value in tensors.items() if not name.startswith("ledger/")},
            ledger_from(tensors, meta["ledger"]),
            None if fresh is None else _whole("fresh", fresh),
            _whole("own", meta["own"]),
        )


def encode_update(
    update: Update,
    start: AdapterState,
    dtype: torch.dtype = torch.float32,
    about: Mapping[str, Any] | None = None,
) -> bytes:
    """In a lossy dtype it holds the drift from `start`, which is small."""
    tensors = dict(update.tensors)
    if dtype != torch.float32:
        base = flat(start)
        tensors = {name: (value - base[name]).to(dtype) for name, value in tensors.items()}
    return b"".join(pieces(tensors, _update_meta(update, dtype, about)))


def update_nbytes(update: Update, dtype: torch.dtype = torch.float32) -> int:
    """Length of `encode_update`, which is not made."""
    tensors = {name: value.to(dtype) for name, value in update.tensors.items()}
    return nbytes(tensors, _update_meta(update, dtype))


def decode_update(blob: bytes, start: AdapterState, client: str) -> Update:
    """The inverse of `encode_update`.

    Args:
        client: Who sent it, by the transport's account.

    Raises:
        UserError: It is larger than an update can be, no such message, or holds tensors that
            `start` does not have.
    """
    header = read_header(blob, most_up(start))
    base, meta = flat(start), header.meta
    with reading(blob):
        for name, shape in header.shapes.items():
            if name not in base:
                raise ValueError(f"{worded(name)} was not asked for")
            if shape != tuple(base[name].shape):
                expected = tuple(base[name].shape)
                raise ValueError(f"{worded(name)} has shape {shape}; expected {expected}")
        if not isinstance(meta["drift"], bool):
            raise ValueError("drift: expected true or false")
        tensors = _floats(blob)
        if meta["drift"]:
            tensors = {name: base[name] + drift for name, drift in tensors.items()}
        return Update(
            _whole("round", meta["round"]),
            client,
            tensors,
            _whole("examples", meta["examples"]),
            _numbers(meta["metrics"]),
            nbytes=len(blob),
        )


def most_up(start: AdapterState) -> Limit:
    """The limit of an update: all factors and the head."""
    tensors = flat(start).values()
    return Limit.of(sum(t.numel() for t in tensors), len(tensors))


def encode_about(about: Mapping[str, Any]) -> bytes:
    """A message without tensors: JSON in the header of an empty blob."""
    return b"".join(pieces({}, {"about": about}))


def encode_masked(about: Mapping[str, Any], vector: Tensor) -> bytes:
    """JSON in the header, and a vector of integers modulo 2⁶⁴, as int64."""
    return b"".join(pieces({"vector": vector}, {"about": about}))


def decode_masked(blob: bytes, limit: Limit) -> Tensor | None:
    """The vector of a message; None if it holds none.

    Raises:
        UserError: It is larger than `limit`, or no such message.

    Example:
        >>> blob = encode_masked({"kind": "secure"}, torch.tensor([1, -1]))
        >>> decode_masked(blob, Limit(2000, 4000, masked=True)).tolist()
        [1, -1]
    """
    read_header(blob, limit)
    with reading(blob):
        return load(blob).get("vector")


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


def ledger_tensors(ledger: Ledger) -> dict[str, Tensor]:
    """A ledger's tensors under flat names: ledger/VERSION/LAYER/PART."""
    return {
        f"ledger/{version}/{layer}/{part}": tensor
        for version, increment in (("snapshot", ledger.snapshot), *ledger.entries)
        for layer, delta in increment.items()
        for part, tensor in delta.parts.items()
    }


def ledger_meta(ledger: Ledger) -> dict[str, object]:
    """What `ledger_from` needs beside the tensors."""
    return {"versions": [v for v, _ in ledger.entries], "snapshot": ledger.snapshot_version}


def ledger_from(tensors: Tensors, meta: Mapping[str, Any]) -> Ledger:
    """The ledger back from its flat tensors."""
    increments: dict[str, dict[str, Delta]] = {}
    for key, value in tensors.items():
        if not key.startswith("ledger/"):
            continue
        _, version, layer, part = key.split("/")
        if part != "right":
            right = tensors[f"ledger/{version}/{layer}/right"] if part == "left" else None
            increments.setdefault(version, {})[layer] = Delta(value, right)
    entries = tuple((v, increments.get(str(v), {})) for v in meta["versions"])
    return Ledger(entries, increments.get("snapshot", {}), meta["snapshot"])


def pieces(tensors: Tensors, meta: Mapping[str, object]) -> list[bytes | memoryview]:
    """What makes a blob, one after the other; tensors on the CPU are not copied.

    Joined they are the bytes of `safetensors.torch.save`, which makes two copies of everything on
    the way and refuses tensors that share memory.

    Example:
        >>> [len(piece) for piece in pieces({"a": torch.zeros(2)}, {"x": "y"})]
        [8, 1104, 8]
    """
    header, names = _header(tensors, meta)
    values = (tensors[name].detach().cpu().contiguous() for name in names)
    data = [v.reshape(-1).view(torch.uint8).numpy().data for v in values if v.numel()]
    return [len(header).to_bytes(8, "little"), header, *data]


def nbytes(tensors: Tensors, meta: Mapping[str, object]) -> int:
    """Length of the blob, from shapes and dtypes alone: tensors may be on the meta device.

    Example:
        >>> nbytes({"w": torch.empty(1000, 1000, device="meta")}, {}) - 4 * 10**6
        1128
    """
    header, _ = _header(tensors, meta)
    return 8 + len(header) + sum(t.numel() * t.element_size() for t in tensors.values())


def worded(key: str) -> str:
    """A flat name for people: `A of 'encoder.0.query'`."""
    kind, _, name = key[:200].partition("/")
    return f"{kind} of {name!r}"


def _header(tensors: Tensors, meta: Mapping[str, object]) -> tuple[bytes, list[str]]:
    """The header, and the tensors' names in the order in which they follow."""
    text = json.dumps({"about": {}, **meta})
    text += " " * (-len(json.dumps(text)) % _HEADER)  # quotes are escaped
    header: dict[str, object] = {"__metadata__": {"fedex": text}}
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    end = 0
    for name in names:
        value = tensors[name]
        begin, end = end, end + value.numel() * value.element_size()
        place = {"shape": list(value.shape), "data_offsets": [begin, end]}
        header[name] = {"dtype": _DTYPES[value.dtype], **place}
    encoded = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    return encoded + b" " * (-len(encoded) % 8), names


def _broadcast_parts(
    message: Broadcast, dtype: torch.dtype, about: Mapping[str, Any] | None = None
) -> tuple[dict[str, Tensor], dict[str, object]]:
    tensors = {**message.tensors, **ledger_tensors(message.ledger)}
    if dtype != torch.float32:
        tensors = {name: _exactly(value, dtype) for name, value in tensors.items()}
    return tensors, {
        "round": message.round,
        "fresh": message.fresh,
        "own": message.own,
        "ledger": ledger_meta(message.ledger),
        "about": about or {},
    }


def _exactly(value: Tensor, dtype: torch.dtype) -> Tensor:
    if value.is_meta:
        return value
    lower = value.to(dtype)
    return lower if torch.equal(lower.float(), value) else value


def _update_meta(
    update: Update, dtype: torch.dtype, about: Mapping[str, Any] | None = None
) -> dict[str, object]:
    return {
        "round": update.round,
        "examples": update.examples,
        "metrics": dict(update.metrics),
        "drift": dtype != torch.float32,
        "about": about or {},
    }


def _floats(blob: bytes) -> dict[str, Tensor]:
    return {name: value.float() for name, value in load(blob).items()}


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
