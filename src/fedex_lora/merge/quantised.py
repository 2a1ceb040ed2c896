"""Weights that bitsandbytes quantised, as the numbers that a layer multiplies with.

A 4-bit weight is packed two numbers a byte, its scales and codebook lie beside it under
`KEY.absmax`, `KEY.quant_map`, ...; an 8-bit one has a scale for each row, `SCB` (a name beside
`weight`), times 1/127.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedex_lora.errors import DataError, StorageError, check_installed

_STATE = ".quant_state.bitsandbytes__"
KINDS = ("nf4", "nf4-double", "fp4", "fp4-double")  # as load_in_4bit makes them; double: scales too


@dataclass(frozen=True)
class Packed:
    """What stands beside a quantised weight.

    Attributes:
        beside: Names of the tensors that belong to it.
        shape: Of the weight.
        dtype: That it was quantised from.
        four_bit: Whether it has 4 bits; else 8.
    """

    beside: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    four_bit: bool

    def unpacked(self, file: Any, key: str) -> Tensor:
        """The weight, dequantised in float32.

        Args:
            file: An open safetensors file.
        """
        functional = _bitsandbytes() if self.four_bit else None
        try:
            if functional is None:
                (scales,) = (file.get_tensor(n) for n in self.beside if n.endswith("SCB"))
                weight = file.get_tensor(key).float() * (scales.float() / 127)[:, None]
            else:
                parts = {n.removeprefix(f"{key}."): file.get_tensor(n) for n in self.beside}
                state = functional.QuantState.from_dict(parts, device=torch.device("cpu"))
                state.dtype = torch.float32
                weight = functional.dequantize_4bit(file.get_tensor(key), state)
        except (ValueError, TypeError, KeyError, RuntimeError, AttributeError) as error:
            raise StorageError(
                f"{key} cannot be dequantised: {error!r}; the file is damaged"
            ) from None
        if tuple(weight.shape) != self.shape:
            raise DataError(f"{key} dequantised is {tuple(weight.shape)}; expected {self.shape}")
        return weight


def packed_parts(file: Any, keys: Sequence[str], dtype: torch.dtype) -> dict[str, Packed]:
    """The quantised weights of an open safetensors file, by name; `dtype` for 8-bit ones."""
    found = {}
    for key in keys:
        weight = key.partition(_STATE)[0]
        if weight != key:
            beside = tuple(k for k in keys if k.startswith(f"{weight}."))
            try:
                state = json.loads(bytes(file.get_tensor(key).tolist()))
                own, shape = getattr(torch, state["dtype"]), tuple(map(int, state["shape"]))
                found[weight] = Packed(beside, shape, own, True)
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                raise StorageError(
                    f"{key} is no state of a quantised weight: {error!r}; the file is damaged"
                ) from None
        elif key.endswith(".SCB"):
            weight = f"{key.removesuffix('SCB')}weight"
            if weight not in keys:
                continue
            beside = tuple(k for k in (key, f"{key.removesuffix('SCB')}weight_format") if k in keys)
            shape = tuple(file.get_slice(weight).get_shape())
            found[weight] = Packed(beside, shape, dtype, False)
    return found


def requantised(weight: Tensor, kind: str) -> Tensor:
    """What a layer multiplies with once transformers loaded it with `load_in_4bit`.

    Args:
        weight: out × in, float32, float16 or bfloat16: what is quantised.
        kind: Of `KINDS`.

    Returns:
        float32.
    """
    functional = _bitsandbytes()
    name, _, double = kind.partition("-")
    packed, state = functional.quantize_4bit(
        weight.contiguous(), blocksize=64, quant_type=name, compress_statistics=bool(double)
    )
    state.dtype = torch.float32
    return functional.dequantize_4bit(packed, state)


def _bitsandbytes() -> Any:
    check_installed("bitsandbytes", "a quantised model")
    from bitsandbytes import functional  # noqa: PLC0415 (heavy, and not always installed)

    return functional
