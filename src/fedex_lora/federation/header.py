"""The header of a message: read before anything else of it, within bounds, and strictly.

A message is a safetensors blob: 8 bytes that give the header's length, the header (JSON), tensors.
Whoever sent it may have put anything into it, so its size is looked at before it is decoded.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from typing import Any

from safetensors import SafetensorError

from fedex_lora.errors import UserError

_FLOATS = {"F32": 4, "BF16": 2}  # bytes of the dtypes that may cross
_MASKED = {"I64": 8}  # of numbers under masks
_SLACK = 1 << 16  # bytes of a header besides what it says of tensors
_ENTRY = 512  # bytes of a header for each tensor
_METADATA, _FIRST = b'{"__metadata__":', 1 << 20
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
class Limit:
    """What a message may be: another one is refused unread.

    Attributes:
        header: Bytes of its header, at most.
        whole: Bytes of all of it, at most.
        masked: Whether its numbers are integers under masks.
    """

    header: int
    whole: int
    masked: bool = field(default=False, repr=False)

    @classmethod
    def of(cls, numbers: int, tensors: int) -> Limit:
        """For a message of at most so many numbers in float32 and so many tensors.

        Example:
            >>> Limit.of(numbers=1000, tensors=2)
            Limit(header=66560, whole=70568)
        """
        header = _SLACK + _ENTRY * tensors
        return cls(header, 8 + header + 4 * numbers)


WORDS = Limit.of(0, 0)  # of a message without tensors


@dataclass(frozen=True)
class Header:
    """What a message says of itself.

    Attributes:
        shapes: Of its tensors, by name.
        meta: The program's own JSON.
    """

    shapes: Mapping[str, tuple[int, ...]]
    meta: Mapping[str, Any]


def read_header(blob: bytes, limit: Limit) -> Header:
    """The header of a message that is within its limit.

    Raises:
        UserError: It is too large, or no such message: a key twice, another dtype, sizes that do
            not fit together.
    """
    length = int.from_bytes(blob[:8], "little")
    if len(blob) > limit.whole:
        raise UserError(f"a message of {len(blob):,} bytes; at most {limit.whole:,} are expected")
    if length > len(blob) - 8:
        raise UserError(f"message of {len(blob):,} bytes cannot be read: its header is cut off")
    if length > limit.header:
        raise UserError(f"a header of {length:,} bytes; at most {limit.header:,} are expected")
    with reading(blob):
        found = _parsed(blob[8 : 8 + length])
        meta = _parsed(found.pop("__metadata__")["fedex"])
        shapes = {name: _shape(name, entry, limit.masked) for name, entry in found.items()}
        return Header(shapes, meta)


def first_of(blob: bytes) -> Mapping[str, Any]:
    """The program's own JSON of a message, for who cannot know yet how long its header may be.

    It stands first in the header; no more than `_FIRST` bytes are looked at.

    Raises:
        UserError: It does not stand there, or is longer.

    Example:
        >>> text = b'{"__metadata__":{"fedex":"{}"},"a":'
        >>> first_of(len(text).to_bytes(8, "little") + text)
        {}
    """
    with reading(blob):
        begin = 8 + len(_METADATA)
        if blob[8:begin] != _METADATA:
            raise ValueError("its header does not begin with its own words")
        text = bytes(blob[begin : begin + _FIRST]).decode(errors="ignore")
        return _parsed(_DECODER.raw_decode(text)[0]["fedex"])


@contextmanager
def reading(blob: bytes) -> Iterator[None]:
    """Whatever is wrong with a message that somebody sent is told in the same way."""
    try:
        yield
    except _UNREADABLE as error:
        what = f"{type(error).__name__}: {error}"[:300]
        raise UserError(f"message of {len(blob):,} bytes cannot be read: {what}") from None


def _parsed(text: str | bytes) -> dict[str, Any]:
    value = json.loads(text, object_pairs_hook=_once)
    if not isinstance(value, dict):
        raise ValueError("expected an object")
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key that is given twice")
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_once)


def _shape(name: str, entry: Mapping[str, Any], masked: bool) -> tuple[int, ...]:
    """The shape of one tensor, if dtype, shape and place fit together."""
    width, shape = (_MASKED if masked else _FLOATS).get(entry["dtype"]), tuple(entry["shape"])
    if width is None:
        expected = "int64" if masked else "float32 or bfloat16"
        raise ValueError(f"{name!r} has dtype {entry['dtype']}; expected {expected}")
    begin, end = entry["data_offsets"]
    if not all(type(n) is int and n >= 0 for n in (*shape, begin, end)):
        raise ValueError(f"the shape or place of {name!r} is none")
    if end - begin != width * prod(shape):
        raise ValueError(f"{name!r} of shape {shape} takes {end - begin} bytes")
    return shape
