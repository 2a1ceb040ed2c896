"""Bytes of messages: those of safetensors."""

import torch
from safetensors.torch import load, save

from fedex_lora.aggregation.ledger import Ledger
from fedex_lora.aggregation.lowrank import LowRank
from fedex_lora.federation.blobs import pieces
from fedex_lora.federation.messages import Broadcast, broadcast_nbytes, encode_broadcast


def test_the_pieces_are_the_file_that_safetensors_writes():
    torch.manual_seed(0)
    tensors = {
        "b": torch.randn(3, 5).bfloat16(),
        'ä/"quoted"': torch.randn(2, 2),
        "none": torch.zeros(0, 4),
        "number": torch.tensor(2.5),
        "a": torch.randn(4),
    }
    for metadata in ({}, {"fedex": '{"x": "ü\\n"}'}):
        assert b"".join(pieces(tensors, metadata)) == save(tensors, metadata or None)


def test_slices_and_transposes_of_one_stack_can_be_sent():
    stack = torch.arange(24.0).reshape(2, 3, 4)
    found = load(b"".join(pieces({"a": stack[1], "b": stack[0].T}, {})))
    assert torch.equal(found["a"], stack[1]) and torch.equal(found["b"], stack[0].T)


def test_a_broadcast_s_length_is_known_without_it():
    ledger = Ledger().append(1, {"x": LowRank(torch.ones(3, 1), torch.ones(1, 2) / 3)})
    message = Broadcast(2, A={"x": torch.randn(4, 5)}, head={"h": torch.ones(7)}, ledger=ledger)
    for dtype in (torch.float32, torch.bfloat16):
        assert broadcast_nbytes(message, dtype) == len(encode_broadcast(message, dtype))
