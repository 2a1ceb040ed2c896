"""What records say about rounds: one by one, as a table, and which was the best."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fedex_lora.federation.record import Record


def best_record(records: Sequence[Record], higher: bool) -> Record | None:
    """The record with the best selection score; None if none has one.

    Of equal scores the one with the lower loss, then the later round. Scores of different clients
    cannot be compared; where rounds were scored by different ones it is the last that has a score.

    Args:
        records: In any order; a score that is absent, None or not finite does not count.
        higher: Whether a higher score is better.

    Example:
        >>> best_record([{"round": 1, "score": None}, {"round": 2, "score": 0.5}], True)["round"]
        2
        >>> one = {"round": 1, "score": 0.9, "scored_by": ["a"]}
        >>> best_record([one, {"round": 2, "score": 0.5, "scored_by": ["a", "b"]}], True)["round"]
        2
    """
    scored = [r for r in records if r.get("score") is not None and math.isfinite(r["score"])]
    if not comparable(scored):
        return max(scored, key=lambda r: r["round"])
    sign = 1 if higher else -1
    return max(scored, key=lambda r: (sign * r["score"], -_loss(r), r["round"]), default=None)


def exhausted(records: Sequence[Record], higher: bool, patience: int | None) -> bool:
    """Whether `patience` evaluations in a row brought no better score.

    Example:
        >>> scored = [{"round": i, "score": score} for i, score in enumerate([0.5, 0.4, 0.3])]
        >>> exhausted(scored, True, 2), exhausted(scored, True, 3), exhausted(scored, False, 2)
        (True, False, False)
    """
    best = best_record(records, higher)
    if patience is None or best is None:
        return False
    later = [r for r in records if r["round"] > best["round"]]
    return sum("score" in r for r in later) >= patience


def comparable(records: Sequence[Record]) -> bool:
    """Whether the same clients scored all of these rounds, or the server did."""
    return len({tuple(r.get("scored_by", ())) for r in records if r.get("score") is not None}) < 2


def _loss(record: Record) -> float:
    """The mean loss beside the selection score; without one that of the training."""
    told = list(record.get("scores", {}).values())[:1]
    if "scored_by" in record:
        own = record.get("client_scores", {})
        told = [own.get(client, {}) for client in record["scored_by"]]
    for name in ("loss", "perplexity"):
        found = [scores[name] for scores in told if scores.get(name) is not None]
        if told and len(found) == len(told):
            return sum(found) / len(found)
    if record.get("secure"):  # the mean, of which nobody knows the parts
        return record.get("loss", 0.0)
    trained = record.get("clients", {})
    losses = {c: trained.get(c, {}).get("loss") for c in record.get("weights", {})}
    return sum(record["weights"][c] * loss for c, loss in losses.items() if loss is not None)


@dataclass(frozen=True)
class Round:
    """What a round came to.

    Attributes:
        number: From 1 on.
        record: All that is known of it, as in a run's metrics.jsonl.
    """

    number: int
    record: Record

    @property
    def deviation(self) -> float | None:
        """‖Σ wᵢsᵢBᵢAᵢ − s·B̄Ā‖_F, the mean over the layers: what plain averaging would miss."""
        return self.record.get("deviation")

    @property
    def metrics(self) -> Mapping[str, Mapping[str, float]]:
        """By client, what its training told."""
        return self.record["clients"]


class Rounds(list[Round]):
    """Rounds, which a notebook shows as a table."""

    def _repr_html_(self) -> str:
        def cell(value: float | None) -> str:
            return "<td>" + ("–" if value is None else f"{value:.4g}") + "</td>"

        rows = ""
        for r in self:
            losses = [m["loss"] for m in r.metrics.values() if m.get("loss") is not None]
            loss = sum(losses) / len(losses) if losses else r.record.get("loss")
            sent = (sum(r.record[key].values()) / 1e6 for key in ("bytes_up", "bytes_down"))
            rows += f"<tr>{cell(r.number)}{cell(len(r.metrics))}{cell(loss)}{cell(r.deviation)}"
            rows += "".join(map(cell, sent)) + "</tr>"
        names = ("round", "clients", "mean loss", "deviation", "MB up", "MB down")
        head = "".join(f"<th>{name}</th>" for name in names)
        return f"<table><tr>{head}</tr>{rows}</table>"
