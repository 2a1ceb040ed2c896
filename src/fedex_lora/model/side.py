"""The side path: an increment computed beside a frozen layer instead of folded into its weight."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from fedex_lora.aggregation.delta import Delta
from fedex_lora.model.layer import Layer


def attach(layer: Layer, increment: Delta) -> RemovableHandle:
    """Adds increment · x, in float32 at scale 1, to the output of the layer's plain base.

    The base gets the input before LoRA's dropout, hence so does the increment. It is held by the
    hook alone: it is no parameter, and in no state dict.

    Args:
        layer: An adapted layer.
        increment: out × in; factors are kept where they are smaller than the matrix.

    Returns:
        A handle whose `remove()` undoes it.
    """
    device = layer.base.weight.device
    parts = reversed(increment.smaller().parts.values())  # right first, then left
    weights = tuple(w.detach().to(device, torch.float32) for w in parts)

    def hook(_module: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        # autocast would round the increment to bfloat16
        with torch.autocast(output.device.type, enabled=False):
            y = _first(layer, weights[0], args[0])
            for weight in weights[1:]:
                y = F.linear(y, weight)
            return (output.float() + y).to(output.dtype)

    return layer.base.register_forward_hook(hook)


def _first(layer: Layer, weight: Tensor, x: Tensor) -> Tensor:
    if not layer.embedding:
        return F.linear(x.float(), weight)
    y = F.embedding(x, weight.T)
    scale = layer.module._get_embed_scale()  # Gemma 3 scales inside its embedding layer
    return y if scale is None else y * scale.float()
