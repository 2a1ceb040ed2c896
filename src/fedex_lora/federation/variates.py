"""SCAFFOLD's control variates at the server: what clients are sent of them, and what comes back.

The server keeps every client's cᵢ and their weighted sum, so that clients need no memory.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from fedex_lora.federation.messages import Tensors
from fedex_lora.federation.settings import Settings

Variates = Mapping[str, Tensors]


def correction(settings: Settings, total: Tensors, own: Tensors, like: Tensors) -> Tensors:
    """c − cᵢ of a client, by flat name.

    Args:
        total: Σ nᵢcᵢ over all clients.
        own: cᵢ; what is absent is zero.
        like: All that is trained.
    """
    n = sum(settings.counts.values())
    found = {}
    for name, tensor in like.items():
        zero = torch.zeros_like(tensor, dtype=torch.float32)
        c = total[name] / n if name in total else zero
        found[name] = c - own[name] if name in own else c
    return found


def replaced_by(
    settings: Settings, total: Tensors, client: str, own: Tensors, new: Tensors
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Σ nᵢcᵢ and cᵢ once a client's cᵢ is `new`, as far as it is there."""
    n, total, own = settings.counts[client], dict(total), dict(own.items())
    for name, c in new.items():
        change = n * (c - own[name] if name in own else c)
        total[name] = total[name] + change if name in total else change
        own[name] = c
    return total, own
