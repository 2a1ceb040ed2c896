"""A message is bounded before it is decoded, and read strictly."""

import json
import tracemalloc

import pytest
import torch

from benchmarks.spoil import whole
from fedex_lora.errors import UserError
from fedex_lora.federation.header import WORDS, Limit, first_of, read_header


def blob(header, tensors=b""):
    text = json.dumps(header).encode() if not isinstance(header, bytes) else header
    return len(text).to_bytes(8, "little") + text + tensors


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def header(**tensors):
    return {"__metadata__": {"fedex": '{"round": 1}'}, **tensors}


def test_what_is_whole_is_read():
    found = read_header(whole({"a": torch.zeros(3, 2)}, {"round": 1}), Limit.of(6, 1))
    assert found.shapes == {"a": (3, 2)} and found.meta == {"round": 1}


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (blob(header(a=entry()), bytes(8)) + bytes(Limit.of(6, 1).whole), "at most"),
        (blob(b" " * 66_060), "a header of 66,060 bytes; at most 66,048"),
        ((1 << 60).to_bytes(8, "little") + b"{}", "its header is cut off"),
        (b"", "cannot be read"),
        (blob(b"[" * 30_000), "cannot be read"),
        (blob(b"[]"), "expected an object"),
        (blob({"a": entry()}), "cannot be read: KeyError"),
        (blob(b'{"__metadata__": {"fedex": "{}"}, "__metadata__": {"fedex": "{}"}}'), "twice"),
        (blob({"__metadata__": {"fedex": '{"round": 1, "round": 2}'}}), "twice"),
        (blob({"__metadata__": {"fedex": "[1]"}}), "expected an object"),
        (blob(header(a=entry(dtype="F64"))), "dtype F64; expected float32 or bfloat16"),
        (blob(header(a=entry(dtype=["F32"]))), "cannot be read"),
        (blob(header(a=entry(shape=(-2,)))), "the shape or place of 'a' is none"),
        (blob(header(a=entry(shape=(2.0,)))), "the shape or place of 'a' is none"),
        (blob(header(a=entry(shape=(True,), offsets=(0, 4)))), "the shape or place of 'a' is none"),
        (blob(header(a=entry(offsets=(0, 7)))), "takes 7 bytes"),
        (blob(header(a=entry(offsets=(0, 1, 2)))), "cannot be read"),
        (blob(header(a=5)), "cannot be read"),
    ],
)
def test_what_is_no_message_is_refused_with_the_reason(message, reason):
    with pytest.raises(UserError, match=reason):
        read_header(message, Limit.of(6, 1))


@pytest.mark.parametrize("filling", [b"[" * 10**7, b'{"a":[' + b"{}," * 10**7, b"x" * 3 * 10**7])
def test_a_message_that_is_refused_takes_no_memory(filling):
    message = blob(filling)
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match="at most"):
            read_header(message, WORDS)
        assert tracemalloc.get_traced_memory()[1] < 10_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("filling", [b'{"a":[' + b"{}," * 20_000, b'{"a":"' + b"\\u0000" * 10_000])
def test_nor_does_one_that_is_refused_while_its_header_is_read(filling):
    message, limit = blob(filling), Limit.of(10**6, 10)
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match="cannot be read"):
            read_header(message, limit)
        assert tracemalloc.get_traced_memory()[1] < 2 * limit.whole
    finally:
        tracemalloc.stop()


def test_the_first_words_are_read_whatever_follows_them():
    message = whole({f"t{i}": torch.zeros(1) for i in range(9)}, {"about": {"kind": "round"}})
    assert first_of(message) == {"about": {"kind": "round"}}
    for bad in (b"", blob(b"[]"), blob({"a": 1, **header()}), blob(b"{")):
        with pytest.raises(UserError, match="cannot be read"):
            first_of(bad)
    long = blob({"__metadata__": {"fedex": "x" * (1 << 21)}})
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match="cannot be read"):
            first_of(long)
        assert tracemalloc.get_traced_memory()[1] < 5 << 20
    finally:
        tracemalloc.stop()
