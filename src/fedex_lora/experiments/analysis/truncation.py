"""The best inexact approximation: what a residual cut to rank r' leaves out, costs and scores.

The residual of k clients has rank (k−1)·r at most, so the curve begins at averaging alone (r' = 0,
nothing is sent) and ends at the exact residual (r' = (k−1)·r). What is left out is the best
possible for its rank in Frobenius norm (Eckart-Young; eq. 17-18 of arXiv 2410.09432).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fedex_lora.aggregation.methods import METHODS
from fedex_lora.experiments.analysis.runs import Run
from fedex_lora.experiments.analysis.scores import final_score
from fedex_lora.experiments.analysis.study import Placed, Study, is_exact_average


@dataclass(frozen=True)
class CutPoint:
    """One truncation rank, over the runs (seeds) that have it.

    Attributes:
        curve: "with carry" or "without carry"; "" for the ends of the curve, which both share.
        rank: r'.
        left_out: Mean over rounds of ‖left out‖_F / ‖residual‖_F. With carry it is all that waits,
            so it may exceed 1. None where the runs do not say.
        bytes_down: Of all clients in all rounds, and the delivery of the final model.
        score: Of the best round; None before a run is finished.
    """

    arm: str
    curve: str
    rank: int
    left_out: float | None
    bytes_down: float
    score: float | None
    seeds: int


def cut_points(study: Study, task: str) -> list[CutPoint]:
    """The curve of one task in the order of the ranks; empty without a truncated residual."""
    groups: dict[str, list[Placed]] = {}
    for placed in study.of(task):
        if _cut_rank(placed.run) is not None and placed.run.records:
            groups.setdefault(placed.arm, []).append(placed)
    if not any(p[0].method.residual == "truncated" for p in groups.values()):
        return []
    compared = _comparable(groups)
    return sorted((_point(arm, runs) for arm, runs in compared.items()), key=lambda p: p.rank)


def _comparable(groups: Mapping[str, list[Placed]]) -> dict[str, list[Placed]]:
    """Finished runs where an arm has some, of the seeds that all arms have, if they have any in
    common: means over other seeds, or over half of the rounds, make no curve."""
    done = {arm: [p for p in placed if p.run.finished] or placed for arm, placed in groups.items()}
    common = set.intersection(*({p.seed for p in placed} for placed in done.values()))
    return {arm: [p for p in placed if p.seed in common] or placed for arm, placed in done.items()}


def _cut_rank(run: Run) -> int | None:
    """r' of a run: 0 where the residual is dropped, (k−1)·r where it is sent whole."""
    recipe = run.recipe
    method = METHODS[recipe.method.name]
    if method.residual == "truncated":
        return recipe.method.rank
    if method.trains != "both" or not method.averages or method.pooled:
        return None
    whole = (recipe.federation.sampled - 1) * recipe.lora.r
    return whole if is_exact_average(method) else 0


def _point(arm: str, placed: Sequence[Placed]) -> CutPoint:
    spec = placed[0].run.recipe.method
    cut = placed[0].method.residual == "truncated"
    carry = "with carry" if spec.carry else "without carry"
    left = [v for p in placed if (v := left_out(p.run)) is not None]
    scores = [v for p in placed if (v := final_score(p.run)) is not None]
    return CutPoint(
        arm,
        carry if cut else "",
        _cut_rank(placed[0].run) or 0,
        statistics.fmean(left) if left else None,
        statistics.fmean(
            (p.run.results or {}).get("bytes_down")
            or sum(sum(r["bytes_down"].values()) for r in p.run.records)
            for p in placed
        ),
        statistics.fmean(scores) if scores else None,
        len(placed),
    )


def left_out(run: Run) -> float | None:
    """Mean over rounds of ‖left out‖/‖residual‖, without the last, which a flush sends whole."""
    method = METHODS[run.recipe.method.name]
    if method.residual != "truncated":
        return 1.0 if method.residual == "dropped" else 0.0
    last = run.recipe.federation.rounds if run.recipe.method.flush else None
    shares = [_share(r) for r in run.records if r["round"] != last]
    known = [s for s in shares if s is not None]
    return statistics.fmean(known) if known else None


def _share(record: dict) -> float | None:
    left = record.get("left_out", record.get("carry"))
    whole = math.hypot(*(v or 0 for v in (record.get("deviation_by_site") or {}).values()))
    return left / whole if left is not None and whole else None
