"""What a Flower message carries of a model: PEFT's arrays, and what its base has gained.

The adapter and the head travel as one ArrayRecord under PEFT's names, as in any Flower app. The
base's change since the pretrained weights, T, goes beside them in the message's ConfigRecord, as a
safetensors blob of named arrays: Flower's mods answer an error to a second ArrayRecord, and to
names in the first one that a client does not send back. Only a T that is too large for a
ConfigRecord, which Flower sends in one piece, is a second ArrayRecord.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from flwr.app import ArrayRecord, ConfigRecord, RecordDict
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from fedex_lora.aggregation.adapter import AdapterState, Factors
from fedex_lora.aggregation.delta import Delta
from fedex_lora.errors import UserError
from fedex_lora.model.keys import PREFIX

RESIDUAL = "fedex-lora.residual"  # in a ConfigRecord: T, named arrays as safetensors
SCALES = "fedex-lora.scales"  # of the layers, sorted by name
MOST = 1 << 30  # bytes of T in a ConfigRecord; Flower's messages end at 2 GiB
TRAINS = "fedex-lora.trains"  # which factors clients train: "AB" or "B"

_FACTOR = re.compile(r"(?P<layer>.+)\.(?:lora_|lora_embedding_)(?P<factor>[AB])(?:\.weight)?")
_RESIDUAL = re.compile(r"(?P<layer>.+)\.residual_(?P<part>left|right|dense)")


def named(base: Mapping[str, Delta]) -> dict[str, Tensor]:
    """A change of the base as named arrays: `….residual_left` (out × R) and `_right` (R × in) of a
    layer, or `_dense` (out × in) where that is smaller.

    Example:
        >>> sorted(named({"q": Delta(torch.ones(4, 1), torch.ones(1, 3))}))
        ['base_model.model.q.residual_left', 'base_model.model.q.residual_right']
    """
    return {
        f"{PREFIX}{layer}.residual_{part}": tensor.contiguous()
        for layer, delta in sorted(base.items())
        for part, tensor in delta.parts.items()
    }


def split(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Delta]]:
    """PEFT's tensors, and the change of the base that `named` put beside them."""
    adapter: dict[str, Tensor] = {}
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if found := _RESIDUAL.fullmatch(name):
            parts.setdefault(found["layer"].removeprefix(PREFIX), {})[found["part"]] = tensor
        else:
            adapter[name] = tensor
    base = {}
    for layer, part in parts.items():
        if part.keys() not in ({"dense"}, {"left", "right"}):
            raise UserError(f"{layer}: its residual has {sorted(part)}; expected left and right")
        base[layer] = (
            Delta(part["dense"]) if "dense" in part else Delta(part["left"], part["right"])
        )
    return adapter, base


def tensors_of(record: ArrayRecord) -> dict[str, Tensor]:
    """Copies of a record's arrays in float32, in its order."""
    return {k: t.to(torch.float32, copy=True) for k, t in record.to_torch_state_dict().items()}


def received(content: RecordDict | ArrayRecord) -> tuple[dict[str, Tensor], dict[str, Delta]]:
    """What a message, or `FedExLora.whole`, says of the model: PEFT's tensors and T.

    Raises:
        UserError: It has not exactly one ArrayRecord, or its residual cannot be read.
    """
    if isinstance(content, ArrayRecord):
        return split(tensors_of(content))
    records = [r for key, r in content.array_records.items() if key != RESIDUAL]
    if len(records) != 1:
        raise UserError(f"the message has {len(records)} ArrayRecords; expected one, the adapter")
    blob = about(content).get(RESIDUAL, b"")
    try:
        base = load(blob) if isinstance(blob, bytes) and blob else {}
    except SafetensorError as error:
        raise UserError(f"the message's residual cannot be read: {error}") from None
    if RESIDUAL in content.array_records:
        base = tensors_of(content.array_records[RESIDUAL])
    return split({**tensors_of(records[0]), **base})


def about(content: RecordDict) -> ConfigRecord:
    """The ConfigRecord of a message of `FedExLora`; an empty one where there is none."""
    found = [c for c in content.config_records.values() if TRAINS in c]
    return found[0] if found else ConfigRecord()


def packed(base: Mapping[str, Delta]) -> bytes:
    """T as it is sent."""
    return save(named(base)) if base else b""


def layers_of(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, str]]:
    """By adapted layer, the names of its "A" and "B" among PEFT's tensors.

    Raises:
        UserError: There are none, one lacks its other half, or a name is not PEFT's.

    Example:
        >>> names = [f"base_model.model.q.lora_{x}.weight" for x in "AB"]
        >>> list(layers_of(dict.fromkeys(names, torch.ones(1, 1))))
        ['q']
    """
    found: dict[str, dict[str, str]] = {}
    for name in tensors:
        match = _FACTOR.fullmatch(name)
        if match and name.startswith(PREFIX):
            layer = match["layer"].removeprefix(PREFIX)
            found.setdefault(layer, {})[match["factor"]] = name
        elif ".lora_" in name or _RESIDUAL.fullmatch(name):
            raise UserError(
                f"array {name!r}: no name of an adapter's; expected {PREFIX}LAYER.lora_A.weight "
                "and lora_B.weight, as peft.get_peft_model_state_dict gives them"
            )
    for layer, names in found.items():
        if len(names) != 2:
            raise UserError(f"array {min(names.values())!r} is alone; expected A and B of {layer}")
    if not found:
        raise UserError(
            "the arrays hold no LoRA factors; expected what "
            "peft.get_peft_model_state_dict(model) gives"
        )
    return found


def state_of(tensors: Mapping[str, Tensor], scales: Mapping[str, float]) -> AdapterState:
    """PEFT's tensors as factors and head; the head's keep their names."""
    layers = layers_of(tensors)
    factors = {n: Factors(tensors[f["A"]], tensors[f["B"]], scales[n]) for n, f in layers.items()}
    taken = {name for f in layers.values() for name in f.values()}
    return AdapterState(factors, {n: t for n, t in tensors.items() if n not in taken})
