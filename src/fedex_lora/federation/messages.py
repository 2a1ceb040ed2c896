"""What crosses between server and client, as values.

A message holds only what its receiver lacks: factors that are a function of the seed, or that have
not changed since the version it holds, are not sent. Tensors go by flat names: A/LAYER, B/LAYER,
head/PARAMETER; a control variate is called variate/ and what it is of. Those of a client's own
pair, pair/A/LAYER and pair/B/LAYER, never cross. `codec` makes bytes of messages.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fedex_lora.aggregation.adapter import (
    AdapterState,
    Factors,
    LayerShape,
    fresh,
    weight_name,
)
from fedex_lora.aggregation.ledger import Ledger
from fedex_lora.aggregation.sparse import sparse_name

Tensors = Mapping[str, Tensor]
VARIATE = "variate"  # before the name of what it is of


@dataclass(frozen=True)
class Broadcast:
    """Server to client: what changed since the version it holds.

    Attributes:
        round: The round to train; the state is that after the round before.
        tensors: Factors and head that changed.
        ledger: The entries that the client lacks.
        fresh: If set, A is drawn from (seed, this version) and B = 0; nothing of them is sent.
        own: The round whose result is the client's own factors, where those stay with it; 0 for
            the initial ones.
    """

    round: int
    tensors: Tensors = field(default_factory=dict)
    ledger: Ledger = field(default_factory=Ledger)
    fresh: int | None = None
    own: int = 0


@dataclass(frozen=True)
class Update:
    """Client to server: what it trained, and how that went.

    Attributes:
        client: Who sent it, as the transport knows; a message does not say.
        tensors: Trained factors and head; what was frozen in this round is absent.
        examples: Number of training examples, n of the weights.
        metrics: Numbers by name: losses, steps, seconds, and what else the training tells.
        kept: What stays with the client and never crosses, of clients in this process.
        nbytes: Of the message it came in; None if it crossed no wire.
        resent: Bytes that were sent to the client on top of its broadcast, to catch it up.
    """

    round: int
    client: str
    tensors: Tensors
    examples: int
    metrics: Mapping[str, float] = field(default_factory=dict)
    kept: Tensors = field(default_factory=dict)
    nbytes: int | None = None
    resent: int = 0


@dataclass(frozen=True)
class Pending:
    """An update that was made and is held back, in a rehearsal of late ones.

    Attributes:
        due: The round in which it arrives.
    """

    update: Update
    due: int


@dataclass(frozen=True)
class Scores:
    """Client to server: how good the broadcast model is on the client's own validation rows."""

    client: str
    scores: Mapping[str, float]
    resent: int = 0


@dataclass(frozen=True)
class Lost:
    """A client that sent nothing that can be used, or was not there.

    Attributes:
        refused: Whether it did send something.
        resent: As of an `Update`.
    """

    client: str
    reason: str
    refused: bool = False
    resent: int = 0


def norm_of(tensors: Iterable[Tensor]) -> float:
    """Of tensors together, in float64."""
    return math.hypot(*(torch.linalg.vector_norm(t, dtype=torch.float64).item() for t in tensors))


def flat(adapter: AdapterState) -> dict[str, Tensor]:
    """All tensors of an adapter by flat name.

    Example:
        >>> import torch
        >>> f = Factors(torch.zeros(1, 2), torch.zeros(3, 1), 2.0)
        >>> sorted(flat(AdapterState({"q": f}, {"w": torch.zeros(1)})))
        ['A/q', 'B/q', 'head/w']
    """
    found = {f"{x}/{name}": getattr(f, x) for x in "AB" for name, f in adapter.layers.items()}
    found |= {f"pair/{x}/{name}": getattr(f, x) for x in "AB" for name, f in adapter.pair.items()}
    found |= {f"head/{name}": value for name, value in adapter.head.items()}
    return found | prefixed(adapter.variates)


def prefixed(variates: Tensors) -> dict[str, Tensor]:
    """Control variates by the names under which they cross."""
    return {f"{VARIATE}/{name}": value for name, value in variates.items()}


def variates_in(tensors: Tensors) -> dict[str, Tensor]:
    """The control variates in a message, by the names of what they are of."""
    found = only(tensors, {VARIATE})
    return {name.removeprefix(f"{VARIATE}/"): value for name, value in found.items()}


def replaced(adapter: AdapterState, tensors: Tensors) -> AdapterState:
    """The adapter with some of its tensors in place of its own."""

    def factors(held: Mapping[str, Factors], prefix: str) -> dict[str, Factors]:
        return {
            name: Factors(
                tensors.get(f"{prefix}A/{name}", f.A),
                tensors.get(f"{prefix}B/{name}", f.B),
                f.scale,
            )
            for name, f in held.items()
        }

    head = {name: tensors.get(f"head/{name}", value) for name, value in adapter.head.items()}
    variates = {name: tensors.get(f"{VARIATE}/{name}", c) for name, c in adapter.variates.items()}
    pair = factors(adapter.pair, "pair/")
    return AdapterState(factors(adapter.layers, ""), head, variates, pair)


def only(tensors: Tensors, kinds: frozenset[str] | set[str]) -> dict[str, Tensor]:
    """The tensors of some kinds, of "A", "B", "head" and "pair"."""
    return {name: value for name, value in tensors.items() if name.partition("/")[0] in kinds}


def receive(
    held: AdapterState, message: Broadcast, layers: Mapping[str, LayerShape], seed: int
) -> AdapterState:
    """The adapter a client starts from: what it held, with what the message changes.

    Args:
        held: Its adapter after the last message, or the initial one.
        layers: The layers at this client's rank.
    """
    if message.fresh is not None:
        held = replace(held, layers=fresh(layers, seed, message.fresh))
    if message.round > 1:  # gradients of whole weights are of the first round alone
        gradients = {weight_name(name) for name in layers}
        head = {name: t for name, t in held.head.items() if name not in gradients}
        held = replace(held, head=head)
    # a sparse change of whole weights ends where the factors come that take its place
    ended = {sparse_name(n) for n in layers if f"A/{n}" in message.tensors}
    ended -= {name.removeprefix("head/") for name in message.tensors}
    held = replace(held, head={name: t for name, t in held.head.items() if name not in ended})
    adapter = replaced(held, message.tensors)
    pruned = {
        n: replace(f, scale=layers[n].at_rank(f.rank).scale)
        for n, f in adapter.layers.items()
        if f.rank != held.layers[n].rank
    }
    return replace(adapter, layers={**adapter.layers, **pruned})
