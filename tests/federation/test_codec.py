"""Bytes of messages: a safetensors file each, whose length is known before it is made."""

import json

import torch
from safetensors.torch import load, save

from fedex_lora.aggregation.delta import Delta
from fedex_lora.aggregation.ledger import Ledger
from fedex_lora.federation.codec import (
    broadcast_nbytes,
    decode_broadcast,
    encode_broadcast,
    pieces,
)
from fedex_lora.federation.header import Limit
from fedex_lora.federation.messages import Broadcast


def test_the_pieces_are_the_file_that_safetensors_writes():
    torch.manual_seed(0)
    tensors = {
        "b": torch.randn(3, 5).bfloat16(),
        'ä/"quoted"': torch.randn(2, 2),
        "none": torch.zeros(0, 4),
        "number": torch.tensor(2.5),
        "a": torch.randn(4),
    }
    for meta in ({}, {"x": "ü\n"}):
        made = b"".join(pieces(tensors, meta))
        header = json.loads(made[8 : 8 + int.from_bytes(made[:8], "little")])
        assert made == save(tensors, header["__metadata__"])
        assert json.loads(header["__metadata__"]["fedex"]) == {"about": {}, **meta}


def test_slices_and_transposes_of_one_stack_can_be_sent():
    stack = torch.arange(24.0).reshape(2, 3, 4)
    found = load(b"".join(pieces({"a": stack[1], "b": stack[0].T}, {})))
    assert torch.equal(found["a"], stack[1]) and torch.equal(found["b"], stack[0].T)


def test_a_broadcast_s_length_is_known_without_it_and_it_comes_back():
    factored, dense = Delta(torch.ones(3, 1), torch.ones(1, 2) / 3), Delta(torch.ones(2, 2) / 7)
    ledger = Ledger().append(1, {"x": factored, "y": dense})
    tensors = {"A/x": torch.randn(4, 5), "head/h": torch.ones(7)}
    message = Broadcast(2, tensors, ledger, own=1)
    for dtype in (torch.float32, torch.bfloat16):
        blob = encode_broadcast(message, dtype)
        assert broadcast_nbytes(message, dtype) == len(blob)
        found = decode_broadcast(blob, Limit(1 << 20, 1 << 20))
        assert (found.round, found.fresh, found.own) == (2, None, 1)
        assert all(torch.equal(t, found.tensors[n]) for n, t in tensors.items())
        ((version, increment),) = found.ledger.entries
        assert version == 1 and torch.equal(increment["x"].dense(), factored.dense())
        assert increment["y"].right is None and torch.equal(increment["y"].left, dense.left)
