"""The tables of scores: a row an arm."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from fedex_lora.experiments.analysis.scores import (
    ArmScores,
    against_reference,
    arm_scores,
    judged_metrics,
    scores_by_split,
)
from fedex_lora.experiments.analysis.study import Study, deviates, metric_of
from fedex_lora.experiments.compare import spread
from fedex_lora.experiments.report.html import Html, details, table
from fedex_lora.experiments.report.words import change
from fedex_lora.runs.words import size


def scores(study: Study, task: str) -> Html:
    """A row an arm: scores by split, paired difference, deviation, bytes, seconds."""
    arms = arm_scores(study, task)
    metric = metric_of(study.of(task)[0].run)[0]
    splits = list(dict.fromkeys(s for a in arms for s in a.by_split if a.by_split[s]))
    compared = {a.arm: against_reference(study, a.arm, task) for a in arms}
    able = {p.arm for p in study.of(task) if deviates(p.method)}
    header = ["", "seeds", *(f"{s} {metric}" for s in splits)]
    header += [f"difference from {study.first}"] * any(compared.values())
    header += ["best round", "deviation", "up", "down", "seconds"]
    rows = []
    for a in arms:
        row: list[str] = [a.arm, _seeds(a)]
        row += [spread(a.by_split.get(s) or [None]) for s in splits]
        if any(compared.values()):
            one = compared[a.arm]
            row.append(change(one.difference) if one else "")
        row += [", ".join(map(str, a.best_rounds)) or "-"]
        row += [significant(a.deviation) if a.arm in able else "-"]
        row += [_mean_size(a.bytes_up), _mean_size(a.bytes_down)]
        row += [f"{statistics.fmean(a.seconds):.0f}" if a.seconds else "-"]
        rows.append(row)
    caption = "Of the best round"
    if any(len(a.seeds) > 1 for a in arms):
        caption += ": mean ± standard deviation over seeds"
    if any(compared.values()):
        caption += "; differences of runs with equal seeds, with 95 % intervals"
    caption += (
        ". Deviation: what averaging the factors would miss in the last round, mean Frobenius norm "
        "over layers. Bytes: all clients and rounds, final delivery included."
    )
    return table(header, rows, caption)


def _seeds(a: ArmScores) -> str:
    text = ", ".join(map(str, a.seeds))
    return f"{text} ({len(a.unfinished)} unfinished)" if a.unfinished else text


def _mean_size(values: Sequence[float]) -> str:
    return size(statistics.fmean(values)) if values else "-"


def significant(values: Sequence[float]) -> str:
    """Mean and standard deviation of what may be of any size, to three digits.

    Example:
        >>> significant([0.00022, 0.00024]), significant([1.5]), significant([])
        ('0.00023 ± 1.4e-05', '1.5', '-')
    """
    if not values:
        return "-"
    mean = f"{statistics.fmean(values):.3g}"
    return f"{mean} ± {statistics.stdev(values):.2g}" if len(values) > 1 else mean


def all_metrics(study: Study, task: str) -> Html | None:
    """Every metric of the judged split at the best round; None if there is but the one."""
    by_arm = {
        arm: [m for p in study.of(task, arm) if (m := judged_metrics(p.run))]
        for arm in study.of_arms(task)
    }
    names = list(dict.fromkeys(name for found in by_arm.values() for m in found for name in m))
    if len(names) < 2:
        return None
    rows = [
        [arm, *(spread([m.get(name) for m in found]) for name in names)]
        for arm, found in by_arm.items()
        if found
    ]
    finished = next(p.run for p in study.of(task) if p.run.results)
    split = [*scores_by_split(finished.results or {})][-1]
    return details(f"All metrics, {split}", table(["", *names], rows, "Of the best round."))
