"""A full model's tensors on disk."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fedex_lora.disk import reason, stands_for
from fedex_lora.errors import DataError, StorageError
from fedex_lora.merge.quantised import Packed, packed_parts
from fedex_lora.merge.tensor_file import DTYPES
from fedex_lora.model.config import empty

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Stored:
    """A tensor in a file, as a model's weights see it.

    Attributes:
        packed: What it is quantised with, if it is: `shape` and `dtype` are those of the weight
            that it stands for.
    """

    file: Path
    key: str
    shape: Shape
    dtype: torch.dtype
    packed: Packed | None = None

    def read(self) -> Tensor:
        with safe_open(self.file, framework="pt") as f:
            if self.packed is not None:
                return self.packed.unpacked(f, self.key).to(self.dtype)
            return f.get_tensor(self.key)


def checkpoint(folder: Path, dtype: torch.dtype | None = None) -> dict[str, Stored]:
    """Every tensor of a model by its name on disk, shard after shard.

    Args:
        dtype: Of 8-bit weights, for which the files do not say it; float16 by default.

    Raises:
        UserError: There is none, a file is missing or damaged, a tensor is empty or quantised in a
            way that is not known here.
    """
    found: dict[str, Stored] = {}
    for file in _shards(folder):
        try:
            with safe_open(file, framework="pt") as f:
                keys = list(f.keys())
                parts = packed_parts(f, keys, dtype or torch.float16)
                taken = {name for packed in parts.values() for name in packed.beside}
                for key in keys:
                    if key not in taken:
                        found[key] = _stored(file, key, f.get_slice(key), parts.get(key))
        except (OSError, SafetensorError) as error:
            told = stands_for(file) or "missing, truncated or damaged"
            raise StorageError(f"{file} cannot be read ({reason(error)}); it is {told}") from None
    return found


def _stored(file: Path, key: str, view: Any, packed: Packed | None) -> Stored:
    shape, name = tuple(view.get_shape()), view.get_dtype()
    if 0 in shape:
        raise empty(str(file), key, shape)
    if packed is not None:
        return Stored(file, key, packed.shape, packed.dtype, packed)
    if name not in DTYPES:
        raise DataError(
            f"{key} in {file} has dtype {name}, which is quantised in a way that is "
            "not undone here (bitsandbytes' 4 and 8 bits are); name the model that it was made from"
        )
    return Stored(file, key, shape, DTYPES[name])


def _shards(folder: Path) -> Sequence[Path]:
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if not (folder / INDEX).is_file():
        for file in (folder / SINGLE, folder / INDEX):
            if told := stands_for(file):
                raise StorageError(f"{file} is {told}")
        raise DataError(
            f"{folder} has no {SINGLE} and no {INDEX}; expected a model saved as safetensors"
        )
    try:
        names = sorted(set(json.loads((folder / INDEX).read_text())["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise StorageError(f"{folder / INDEX} cannot be read: {error}") from None
    wrong = [n for n in names if not isinstance(n, str) or not re.fullmatch(r"[\w.-]+", n)]
    if wrong:
        raise DataError(f"{folder / INDEX} names {wrong[0]!r}; expected a file beside")
    return [folder / name for name in names]
