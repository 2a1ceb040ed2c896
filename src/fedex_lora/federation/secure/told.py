"""What the server tells all clients of a sum alike. It is part of what their masks are made from.

A server that told one client another unit, weight, bound or model than the others could have these
add as good as nothing, and be left with that client's numbers, or with less noise (for models:
Pasquini et al. 2022, arXiv 2111.07380). Masks of clients that were told different things do not
cancel, so such a sum is as random as its parts.
"""

from __future__ import annotations

import hashlib

from fedex_lora.aggregation.adapter import AdapterState
from fedex_lora.aggregation.ledger import Ledger
from fedex_lora.federation.messages import flat
from fedex_lora.federation.secure.primitives import canonical
from fedex_lora.federation.settings import Settings


def fingerprint(*told: object) -> str:
    """SHA-256, in hex, of values of JSON.

    Example:
        >>> fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1}) != fingerprint({"a": 1})
        True
    """
    return hashlib.sha256(canonical(told)).hexdigest()


def origin(settings: Settings, start: AdapterState, ledger: Ledger) -> str:
    """SHA-256, in hex, of what all clients of a round start from: the ledger, the head, and the
    factors where they are the same for all."""
    tensors = {f"head/{name}": value for name, value in start.head.items()}
    if not settings.ranks and not settings.method.assignment.own:
        tensors = dict(flat(start))
    for version, increment in ((0, ledger.snapshot), *ledger.entries):
        for name, delta in increment.items():
            tensors |= {f"{version}/{name}/{part}": t for part, t in delta.parts.items()}
    found = hashlib.sha256(canonical([[n, [*tensors[n].shape]] for n in sorted(tensors)]))
    for name in sorted(tensors):
        found.update(tensors[name].detach().cpu().float().contiguous().numpy().data)
    return found.hexdigest()
