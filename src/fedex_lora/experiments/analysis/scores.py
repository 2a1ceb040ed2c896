"""Scores of finished runs: by arm and seed, and their paired differences."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from statistics import fmean, stdev
from typing import Any

from fedex_lora.errors import size
from fedex_lora.experiments.analysis.runs import Run
from fedex_lora.experiments.analysis.statistics import Estimate, Paired, estimate, spread
from fedex_lora.experiments.analysis.study import Placed, Study, metric_of, shown

OWN_ROWS = "clients’ own rows"  # in place of a split, where clients alone evaluate

Chooses = Callable[[Placed], bool]
Value = Callable[[Run], float | None]
Alike = Callable[[Placed, Placed], bool]


def final_score(run: Run) -> float | None:
    """The primary metric of the best round on the split that is judged; None if there is none.

    That is the last of the evaluation splits: rows that did not choose the best round, where the
    data have such; else those that did.
    """
    return None if run.results is None else judged(run.results)


def judged(results: Mapping[str, Any]) -> float | None:
    """`final_score` of what results.json says."""
    return _finite([*scores_by_split(results).values()][-1].get(results["metric"]))


def scores_by_split(results: Mapping[str, Any]) -> Mapping[str, Mapping[str, Any]]:
    """All metrics of the best round by split; without splits, the clients' mean on their own rows.

    Example:
        >>> best = {"scores": {}, "score": 0.5}
        >>> scores_by_split({"metric": "accuracy", "best": best})
        {'clients’ own rows': {'accuracy': 0.5}}
    """
    best = results["best"]
    return best["scores"] or {OWN_ROWS: {results["metric"]: best.get("score")}}


def judged_metrics(run: Run) -> Mapping[str, Any]:
    """All metrics that `final_score` is one of; none of a run that is not finished."""
    return {} if run.results is None else [*scores_by_split(run.results).values()][-1]


def judged_split(run: Run) -> str:
    """What `final_score` is of, for people: "test accuracy"."""
    if run.results is None:
        return metric_of(run)[0]
    return f"{judged_rows(run.results)} {run.results['metric']}"


def judged_rows(results: Mapping[str, Any]) -> str:
    """The name of the split that is judged."""
    return [*scores_by_split(results)][-1]


def chose_itself(run: Run) -> bool:
    """Whether the judged rows are those that chose the best round, so that scores flatter."""
    return run.results is not None and len(run.results["best"]["scores"]) < 2


def _finite(value: Any) -> float | None:
    fine = isinstance(value, int | float) and math.isfinite(value)
    return float(value) if fine else None


def differences(
    study: Study,
    ours: Chooses,
    reference: Chooses,
    value: Value = final_score,
    but: Sequence[str] = (),
    factor: Mapping[str, float] | None = None,
) -> dict[str, list[float]]:
    """value(ours) − value(reference) by task, over pairs of equal seed and other settings.

    Args:
        ours, reference: Choose the runs of the two sides.
        value: What is compared; runs without it are left out.
        but: Settings (beginnings of keys) that the two sides may differ in.
        factor: Of a setting, what ours has times the reference's: {"lora.r": 2}.
    """
    ratios = factor or {}

    def alike(a: Placed, b: Placed) -> bool:
        fits = (a.settings.get(k) == f * b.settings.get(k, math.nan) for k, f in ratios.items())
        return a.others(*but, *ratios) == b.others(*but, *ratios) and all(fits)

    return _pairs(study, ours, reference, alike, value)


def _pairs(
    study: Study, ours: Chooses, reference: Chooses, alike: Alike, value: Value = final_score
) -> dict[str, list[float]]:
    """Pairs of one task and seed (at other settings) share their data: they count as one, their
    mean."""
    found: dict[tuple[str, int], list[float]] = {}
    for a, b in product(filter(ours, study.placed), filter(reference, study.placed)):
        if a is b or (a.task, a.seed) != (b.task, b.seed) or not alike(a, b):
            continue
        x, y = value(a.run), value(b.run)
        if x is not None and y is not None:
            found.setdefault((a.task, a.seed), []).append(x - y)
    return by_task(found)


def by_task(found: Mapping[tuple[str, int], Sequence[float]]) -> dict[str, list[float]]:
    """From values by task and seed to the means of the seeds, by task."""
    grouped: dict[str, list[float]] = {}
    for (task, _), values in found.items():
        grouped.setdefault(task, []).append(fmean(values))
    return grouped


def poolable(study: Study, tasks: Sequence[str]) -> bool:
    """Whether differences of these tasks may be averaged: one metric, or all shares up to 1."""
    runs = [p.run for p in study.placed if p.task in tasks]
    if len({metric_of(r) for r in runs}) == 1:
        return True
    scores = [s for r in runs if (s := final_score(r)) is not None]
    return all(metric_of(r)[1] for r in runs) and all(-1 <= s <= 1 for s in scores)


def comparisons(study: Study, task: str | None = None) -> list[Paired]:
    """Every method against the reference at equal conditions; where that is one arm, every arm
    against it.

    Args:
        task: One of them; else over all tasks, for what ran in all of them.
    """
    names, what = (study.arms, "arm") if study.by_arm else (study.methods, "label")
    first, alike = study.first, _alike(study)
    found = [
        _against(study, (what, name), (what, first), alike, task) for name in names if name != first
    ]
    return [one for one in found if one is not None]


def _alike(study: Study) -> Alike:
    """What pairs must have in common: nothing more where all are compared with one arm."""
    return _anyway if study.by_arm else lambda a, b: a.condition == b.condition


def _anyway(a: Placed, b: Placed) -> bool:
    return True


def against_reference(study: Study, arm: str, task: str | None = None) -> Paired | None:
    """One arm against the first, or the reference method's at the same condition; None for those
    themselves, and without a common seed."""
    first = ("arm" if study.by_arm else "label", study.first)
    if getattr(study.of(arm=arm)[0], first[0]) == study.first:
        return None
    return _against(study, ("arm", arm), first, _alike(study), task)


def paired(study: Study, ours: str, reference: str, task: str | None = None) -> Paired | None:
    """One arm against another, in one task or over all; None without a common seed in each."""
    return _against(study, ("arm", ours), ("arm", reference), _anyway, task)


def _having(what: str, name: str) -> Chooses:
    """Runs whose `arm` or `label` is that."""
    return lambda placed: getattr(placed, what) == name


def _against(
    study: Study, ours: tuple[str, str], reference: tuple[str, str], alike: Alike, task: str | None
) -> Paired | None:
    wanted = study.tasks if task is None else [task]
    every = _pairs(study, _having(*ours), _having(*reference), alike)
    found = {t: d for t, d in every.items() if t in wanted}
    if set(found) != set(wanted) or not poolable(study, wanted):
        return None
    higher = metric_of(study.of(wanted[0])[0].run)[1]
    return Paired(ours[1], reference[1], estimate(found), higher)


def bytes_ratio(study: Study, ours: str, task: str) -> float | None:
    """Bytes of what `comparisons` calls `ours` over the reference's in a task: the geometric mean
    over pairs of runs with equal seed and condition; None where either exchanges nothing."""

    def log_of_bytes(run: Run) -> float | None:
        return math.log(bytes_sent(run)) if bytes_sent(run) else None

    what = "arm" if study.by_arm else "label"
    sides = _having(what, ours), _having(what, study.first)
    found = _pairs(study, *sides, _alike(study), log_of_bytes)
    return math.exp(fmean(found[task])) if task in found else None


def bytes_sent(run: Run) -> int:
    """Up and down, of all clients and rounds, the final model's delivery included."""
    return sum((run.results or {}).get(key, 0) for key in ("bytes_up", "bytes_down"))


@dataclass(frozen=True)
class ArmScores:
    """One arm in one task.

    Attributes:
        seeds: Of all its runs, finished or not.
        by_split: Of the best round, by split, a score a finished run.
        deviation: Of the last round, a value a finished run that has one.
        best_rounds: A number a finished run.
    """

    arm: str
    seeds: tuple[int, ...]
    unfinished: tuple[int, ...]
    by_split: Mapping[str, list[float]]
    deviation: list[float]
    bytes_up: list[float]
    bytes_down: list[float]
    seconds: list[float]
    best_rounds: list[int]

    def costs(self, deviates: bool) -> list[str]:
        """Deviation (if it says anything), bytes up and down, and seconds, for people."""
        sent = [size(fmean(v)) if v else "-" for v in (self.bytes_up, self.bytes_down)]
        seconds = f"{fmean(self.seconds):.0f}" if self.seconds else "-"
        return [significant(self.deviation) if deviates else "-", *sent, seconds]


def significant(values: Sequence[float]) -> str:
    """Mean and standard deviation of what may be of any size, to three digits.

    Example:
        >>> significant([0.00022, 0.00024]), significant([1.5]), significant([])
        ('0.00023 ± 1.4e-05', '1.5', '-')
    """
    if not values:
        return "-"
    mean = f"{fmean(values):.3g}"
    return f"{mean} ± {stdev(values):.2g}" if len(values) > 1 else mean


def arm_scores(study: Study, task: str) -> list[ArmScores]:
    """A row an arm, of its finished runs."""
    return [_arm(arm, study.of(task, arm)) for arm in study.of_arms(task)]


def _arm(arm: str, placed: Sequence[Placed]) -> ArmScores:
    done = [p.run.results for p in placed if p.run.results is not None]
    splits = list(dict.fromkeys(s for r in done for s in scores_by_split(r)))

    def every(get: Callable[[Mapping[str, Any]], Any]) -> list[float]:
        return [v for r in done if (v := _finite(get(r))) is not None]

    return ArmScores(
        arm,
        tuple(p.seed for p in placed),
        tuple(p.seed for p in placed if not p.run.finished),
        {s: every(lambda r, s=s: scores_by_split(r).get(s, {}).get(r["metric"])) for s in splits},
        *(
            every(lambda r, key=key: r.get(key))
            for key in ("deviation", "bytes_up", "bytes_down", "seconds")
        ),
        best_rounds=[r["best_round"] for r in done],
    )


def metric_table(
    study: Study, task: str, but: Sequence[str] = ()
) -> tuple[list[str], list[list[str]]]:
    """The metrics of the judged split at the best round, and a row an arm with all of them."""
    found = {
        arm: [m for p in study.of(task, arm) if (m := judged_metrics(p.run))]
        for arm in study.of_arms(task)
    }
    every = dict.fromkeys(n for metrics in found.values() for m in metrics for n in m)
    names = [name for name in every if name not in but]
    rows = [
        [arm, *(spread([m.get(name) for m in metrics]) for name in names)]
        for arm, metrics in found.items()
        if metrics
    ]
    return names, rows


@dataclass(frozen=True)
class GroupScore:
    """Scores of the runs that have one value of a setting, in one task."""

    task: str
    label: str
    value: Any
    score: Estimate


def scores_by(study: Study, key: str) -> list[GroupScore]:
    """The final score by any key of the recipe: `lora.r` (Table 9), `method.name` (Table 4).

    Everything else that varies makes a line of its own (`label`), so that only `key` differs along
    it.
    """
    groups: dict[tuple[str, str, Any], list[float]] = {}
    for p in study.placed:
        score = final_score(p.run)
        if score is None:
            continue
        value = p.run.settings.get(key)
        value = value if isinstance(value, int | float | str) or value is None else str(value)
        method = [] if key.startswith("method.") else [p.label]
        others = shown({k: v for k, v in p.named.items() if k != key})
        groups.setdefault((p.task, ", ".join([*method, *others]), value), []).append(score)
    return [
        GroupScore(task, label, value, estimate({"": scores}))
        for (task, label, value), scores in groups.items()
    ]
