"""A client brings what it holds up to date with what the coordinator sends it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from fedex_lora.aggregation.adapter import AdapterState, Factors, LayerShape
from fedex_lora.aggregation.ledger import Ledger
from fedex_lora.engines.remote.asked import field
from fedex_lora.engines.remote.cache import Cache, Held
from fedex_lora.engines.remote.wire import NOTHING, Identity, most_down
from fedex_lora.errors import UserError
from fedex_lora.federation.codec import decode_broadcast, worded
from fedex_lora.federation.messages import Broadcast, Tensors, flat, receive, replaced
from fedex_lora.federation.settings import Settings
from fedex_lora.federation.state import begin, own_part, start_of

log = logging.getLogger(__name__)


class Lacks(UserError):
    """The client holds less than the server believes."""

    def __init__(self, version: int) -> None:
        super().__init__(f"holds version {version}")
        self.version = version


def load_held(cache: Cache, identity: Identity, settings: Settings) -> Held | None:
    """What the client holds of this federation's history; None if nothing."""
    held = cache.load()
    if held is not None and not identity.holds(held.version, held.mark):
        log.warning("what is held was thrown away by the coordinator; beginning anew")
        if settings.method.assignment.private:  # nobody else has the client's own factors
            return replace(held, version=NOTHING)
        held = None
    if held is None:
        cache.clear()
    return held


def caught_up(
    blob: bytes,
    about: Mapping[str, Any],
    cache: Cache,
    identity: Identity,
    settings: Settings,
    initial: AdapterState,
) -> Held:
    """What is held after this message.

    Args:
        settings: The federation's, with this client's name alone.
        initial: What all clients start from, at the full rank.

    Raises:
        Lacks: The server believes that more is held; it has to send from the version that is.
        UserError: The message is none of this federation's.
    """
    (name,) = settings.clients
    message = decode_broadcast(blob, most_down(settings, initial))
    base, version = (field(about, key, int) for key in ("held", "version"))
    held = load_held(cache, identity, settings)
    ends = {} if held is None else dict(held.ends)
    if held is None or held.version == NOTHING:
        first = begin(settings, initial)
        held = Held(0, identity.lineage[0][1], start_of(first, settings, name), first.ledger)
    if held.version < base:
        raise Lacks(least(settings) if settings.method.assignment.own else held.version)
    layers = settings.layers_of(name)
    _check_broadcast(message, version, layers, held.adapter, settings)
    adapter = receive(held.adapter, message, layers, settings.seed)
    ends = {round: end for round, end in ends.items() if round >= message.own}
    if message.own:
        adapter, ends = _own(adapter, message, ends, settings)
    ledger = held.ledger.extended(message.ledger, version)
    return Held(version, identity.lineage[-1][1], adapter, ledger, ends)


def _own(
    adapter: AdapterState, message: Broadcast, ends: Mapping[int, Tensors], settings: Settings
) -> tuple[AdapterState, Mapping[int, Tensors]]:
    """The adapter with the client's own tensors as it ended the round that the server last took
    from it, and what else of them is kept."""
    if own_part(settings, message.tensors):  # they came back from the server
        return adapter, {message.own: own_part(settings, flat(adapter))}
    if message.own in ends:
        return replaced(adapter, ends[message.own]), ends
    if not settings.method.assignment.private:
        raise Lacks(NOTHING)
    log.warning("this client's own factors are lost; it starts them anew")
    return adapter, ends


def least(settings: Settings) -> int:
    """What a client without a memory can make up for by itself: the start, but no own factors
    that the server has."""
    assignment = settings.method.assignment
    return NOTHING if assignment.own and not assignment.private else 0


def _check_broadcast(
    message: Broadcast,
    version: int,
    layers: Mapping[str, LayerShape],
    held: AdapterState,
    settings: Settings,
) -> None:
    if message.round != version + 1 or version < 0:
        raise UserError(f"round {message.round} after version {version}; messages are mixed up")
    if message.fresh is not None and message.fresh != version:
        raise UserError(f"factors of version {message.fresh}; expected {version}")
    expected = flat(held)
    if settings.method.assignment.pruning is not None:
        expected |= flat(AdapterState(_pruned(message.tensors, held.layers)))
    for name, value in message.tensors.items():
        if name not in expected or value.shape != expected[name].shape:
            raise UserError(f"the coordinator's {worded(name)} does not fit the model")
        if not torch.isfinite(value).all():
            raise UserError(f"the coordinator's {worded(name)} is not finite")
    _check_ledger(message.ledger, version, layers)


def _pruned(tensors: Tensors, held: Mapping[str, Factors]) -> dict[str, Factors]:
    """What is held at the rank, lower or the same, that the coordinator sends the factors at."""
    rank = min((len(t) for name, t in tensors.items() if name.startswith("A/")), default=None)
    return {n: Factors(f.A[:rank], f.B[:, :rank], f.scale) for n, f in held.items()}


def _check_ledger(ledger: Ledger, version: int, layers: Mapping[str, LayerShape]) -> None:
    versions = [v for v, _ in ledger.entries]
    if not all(type(v) is int for v in (*versions, ledger.snapshot_version)):
        raise UserError("the coordinator's ledger has versions that are no numbers")
    if (
        versions != sorted(set(versions))
        or any(not 0 < v <= version for v in versions)
        or not (0 <= ledger.snapshot_version <= version)
    ):
        raise UserError("the coordinator's ledger has entries in disorder")
    for increment in (ledger.snapshot, *(inc for _, inc in ledger.entries)):
        for name, w in increment.items():
            if name not in layers or w.shape != (layers[name].out, layers[name].inp):
                raise UserError(f"the coordinator's increment of {name[:80]!r} does not fit")
            if not all(torch.isfinite(part).all() for part in w.parts.values()):
                raise UserError(f"the coordinator's increment of {name[:80]!r} is not finite")
