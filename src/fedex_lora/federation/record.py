"""What happened in a round, and the line that the records say of it."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import reduce
from operator import add
from typing import Any

from fedex_lora.aggregation.adapter import AdapterState, folded
from fedex_lora.aggregation.aggregator import Aggregate
from fedex_lora.aggregation.delta import Delta
from fedex_lora.aggregation.ledger import Increment
from fedex_lora.federation.late import Late
from fedex_lora.federation.settings import Settings
from fedex_lora.federation.state import ServerState, global_factors

Record = dict[str, Any]


@dataclass(frozen=True)
class Taken:
    """What the record says of an update that was aggregated."""

    examples: int
    metrics: Mapping[str, float]


@dataclass
class Tally:
    """What happened in a round, besides the numbers that are aggregated."""

    taken: dict[str, Taken] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    lost: dict[str, str] = field(default_factory=dict)
    late: dict[str, Late] = field(default_factory=dict)
    delayed: dict[str, int] = field(default_factory=dict)
    norms: dict[str, float] = field(default_factory=dict)
    variate_norms: dict[str, float] = field(default_factory=dict)
    up: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def all_norms(self) -> dict[str, float]:
        """Of the updates of this round and of earlier ones."""
        return {**self.norms, **{label: late.norm for label, late in self.late.items()}}

    def shares(self, settings: Settings, round: int) -> dict[str, float]:
        """uᵢ / Σuᵢ of all updates that are taken."""
        alike, asynchronous = settings.weights == "uniform", settings.asynchronous
        n = {c: 1.0 if alike else float(self.taken[c].examples) for c in sorted(self.taken)}
        for label, late in sorted(self.late.items()):
            assert asynchronous is not None
            count = 1.0 if alike else float(late.update.examples)
            n[label] = asynchronous.weight(count, round - late.update.round)
        return {c: v / sum(n.values()) for c, v in n.items()}

    def refuse(self, client: str, why: str) -> None:
        self.taken.pop(client, None)
        self.late.pop(client, None)
        self.refused[client] = why


def record_of(
    settings: Settings,
    after: ServerState,
    result: Aggregate | None,
    tally: Tally,
    down: Mapping[str, int],
) -> Record:
    """One line of the records: what happened in a round, and what it came to."""
    shares = tally.shares(settings, after.version)
    record: Record = {
        "round": after.version,
        "clients": {
            c: {"examples": t.examples, **t.metrics} for c, t in sorted(tally.taken.items())
        },
        "refused": tally.refused,
        "lost": tally.lost,
        "weights": {c: shares[c] for c in sorted(tally.taken)},
        "norms": {c: tally.norms[c] for c in sorted(tally.norms)},
        "bytes_down": dict(down),
        "bytes_up": tally.up,
        "seconds": {"aggregate": tally.seconds},
    }
    if settings.asynchronous is not None:
        record["late"] = {
            label: {
                "client": late.update.client,
                "round": late.update.round,
                "examples": late.update.examples,
                "weight": shares[label],
                **late.update.metrics,
            }
            for label, late in sorted(tally.late.items())
        }
        record["delayed"] = dict(tally.delayed)
    if settings.method.assignment.pruning is not None:
        layer = min(settings.layers)  # all have one rank
        left = {c: settings.layers_of(c, after.ranks.get(c)) for c in settings.clients}
        record["ranks"] = {client: layers[layer].rank for client, layers in left.items()}
    if tally.norms:
        record["median_norm"] = statistics.median(tally.norms.values())
    if result is not None and result.deviation:
        record["deviation"] = statistics.fmean(result.deviation.values())
        record["ideal"] = statistics.fmean(result.ideal.values())
        record["deviation_by_site"] = dict(result.deviation)
        record["ideal_by_site"] = dict(result.ideal)
    if settings.spectrum:
        spectra = {name: w.singular_values() for name, w in _changes(settings, after).items()}
        first = {name: s[: settings.spectrum].tolist() for name, s in spectra.items()}
        record["spectrum_by_site"] = first
        record["change_by_site"] = {name: s.norm().item() for name, s in spectra.items()}
    if after.carry:
        record["carry"] = _norm(after.carry)
        record["sent"] = _norm(after.ledger.newest())
    if result is not None and settings.method.residual == "truncated":
        record["left_out"] = _left_out(settings, after, result)
    return record


def _changes(settings: Settings, after: ServerState) -> dict[str, Delta]:
    """G − W0 of every layer."""
    pairs = folded(AdapterState(global_factors(after, settings), after.head)).layers
    found = {}
    for name in settings.layers:
        parts = [pairs[name].delta()] if name in pairs else []
        if (base := after.ledger.factored(name)) is not None:
            parts.append(base)
        if parts:
            found[name] = reduce(add, parts)
    return found


def _left_out(settings: Settings, after: ServerState, result: Aggregate) -> float:
    """‖·‖_F of what truncation keeps from the clients: all that is carried, or what is lost now."""
    if settings.carry:
        return _norm(after.carry)
    sent = after.ledger.newest() if result.increment else {}  # of one client there is none
    return _norm({layer: w - sent[layer] for layer, w in result.increment.items()})


def _norm(increment: Increment) -> float:
    """‖·‖_F over all layers."""
    return sum(w.norm().item() ** 2 for w in increment.values()) ** 0.5
