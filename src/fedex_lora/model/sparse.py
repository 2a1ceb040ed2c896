"""A sparse change of a frozen layer's weight, whose values are trained."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedex_lora.aggregation.sparse import spread


class Sparse(nn.Module):
    """Adds D·x to the output of a plain linear layer, in float32, D as `spread` makes it.

    Attributes:
        values: The entries of D that are not zero.
    """

    def __init__(self, name: str, base: nn.Module, out: int, inp: int, values: Tensor) -> None:
        super().__init__()
        device = next(base.parameters()).device
        self.values = nn.Parameter(values.detach().to(device, torch.float32, copy=True))
        self.of = (name, out, inp)
        self.handle = base.register_forward_hook(self._add)

    def _add(self, _module: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        with torch.autocast(output.device.type, enabled=False):
            more = F.linear(args[0].float(), spread(*self.of, self.values))
            return (output.float() + more).to(output.dtype)
