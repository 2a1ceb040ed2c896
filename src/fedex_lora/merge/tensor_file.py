"""A safetensors file written one tensor at a time.

The format begins with a header that holds every tensor's shape and offset, which are known only at
the end. So room for the largest possible header is left free and filled last; spaces pad it, as
the format allows (github.com/huggingface/safetensors, "Format").
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from fedex_lora.errors import DataError

_TYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
DTYPES = {name: dtype for dtype, name in _TYPES.items()}
_ENTRY = 200  # bytes that dtype, shape and offsets of one tensor take at most


class TensorFile:
    """Where tensors go; their names were given before."""

    def __init__(self, file: BinaryIO, names: Iterable[str], metadata: Mapping[str, str]) -> None:
        self._file = file
        self._header: dict[str, Any] = {"__metadata__": dict(metadata)}
        size = len(json.dumps(self._header)) + sum(len(json.dumps(n)) + _ENTRY for n in names)
        self._reserved = -(-size // 8) * 8
        self._end = 0
        file.seek(8 + self._reserved)

    def add(self, name: str, tensor: Tensor) -> None:
        """Writes a tensor.

        Raises:
            UserError: Its dtype is not one that models are kept in.
        """
        assert name not in self._header
        if tensor.dtype not in _TYPES:
            raise DataError(
                f"{name}: has dtype {tensor.dtype}; expected a model that is not quantised"
            )
        content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        self._file.write(content.data)
        offsets = [self._end, self._end + content.nbytes]
        self._header[name] = {
            "dtype": _TYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": offsets,
        }
        self._end = offsets[1]

    def finish(self) -> int:
        """Writes the header. Returns the bytes of all tensors."""
        header = json.dumps(self._header).encode()
        assert len(header) <= self._reserved
        self._file.seek(0)
        self._file.write(self._reserved.to_bytes(8, "little"))
        self._file.write(header.ljust(self._reserved))
        return self._end


@contextmanager
def tensor_file(
    path: Path, names: Iterable[str], metadata: Mapping[str, str] | None = None
) -> Iterator[TensorFile]:
    """A new file for tensors of these names (and no others); on disk when the block ends."""
    with path.open("wb") as file:
        made = TensorFile(file, names, metadata or {"format": "pt"})
        yield made
        made.finish()
        file.flush()
        os.fsync(file.fileno())
