"""Safetensors without its copies: the library makes two of everything on the way to bytes."""

from __future__ import annotations

import json
from collections.abc import Mapping

import torch
from torch import Tensor

_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


def pieces(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> list[bytes | memoryview]:
    """What makes a safetensors file one after the other; tensors on the CPU are not copied.

    Joined they are the bytes of `safetensors.torch.save`, which moreover refuses tensors that share
    memory.

    Example:
        >>> [len(piece) for piece in pieces({"a": torch.zeros(2)}, {"x": "y"})]
        [8, 80, 8]
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    parts, end = [], 0
    for name in sorted(tensors, key=lambda name: (-tensors[name].element_size(), name)):
        value = tensors[name].detach().cpu().contiguous()
        start, end = end, end + value.numel() * value.element_size()
        header[name] = {
            "dtype": _DTYPES[value.dtype],
            "shape": list(value.shape),
            "data_offsets": [start, end],
        }
        if value.numel():
            parts.append(value.reshape(-1).view(torch.uint8).numpy().data)
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return [len(text).to_bytes(8, "little"), text, *parts]
