"""Scores of finished runs: by arm and seed, and their paired differences."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from statistics import fmean
from typing import Any

from fedex_lora.experiments.analysis.runs import Run
from fedex_lora.experiments.analysis.statistics import Estimate, Paired, estimate
from fedex_lora.experiments.analysis.study import Placed, Study, metric_of, shown

OWN_ROWS = "clients’ own rows"  # in place of a split, where clients alone evaluate

Chooses = Callable[[Placed], bool]
Value = Callable[[Run], float | None]


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
    return f"{[*scores_by_split(run.results)][-1]} {run.results['metric']}"


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
    rest, ratios = (*but, *(factor or {})), factor or {}

    def alike(a: Placed, b: Placed) -> bool:
        return a.others(*rest) == b.others(*rest) and _fits(a, b, ratios)

    return _pairs(study, ours, reference, alike, value)


def _pairs(
    study: Study,
    ours: Chooses,
    reference: Chooses,
    alike: Callable[[Placed, Placed], bool],
    value: Value = final_score,
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


def _fits(a: Placed, b: Placed, factor: Mapping[str, float]) -> bool:
    return all(a.settings.get(k) == f * b.settings.get(k, math.nan) for k, f in factor.items())


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
    if study.by_arm:
        found = [against_reference(study, arm, task) for arm in study.arms]
    else:
        found = [_method_against(study, method, task) for method in study.methods]
    return [one for one in found if one is not None]


def _method_against(study: Study, method: str, task: str | None) -> Paired | None:
    if method == study.reference:
        return None
    found = _pairs(
        study, lambda p: p.label == method, lambda p: p.label == study.reference, _same_condition
    )
    return _paired(study, method, study.reference, found, task)


def against_reference(study: Study, arm: str, task: str | None = None) -> Paired | None:
    """One arm against the first, or the reference method's at the same condition; None for those
    themselves, and without a common seed."""
    first = study.first
    if first in (arm, study.of(arm=arm)[0].label):
        return None
    if study.by_arm:
        return paired(study, arm, first, task)
    found = _pairs(study, lambda p: p.arm == arm, lambda p: p.label == first, _same_condition)
    return _paired(study, arm, first, found, task)


def paired(study: Study, ours: str, reference: str, task: str | None = None) -> Paired | None:
    """One arm against another, in one task or over all; None without a common seed in each."""
    found = _pairs(study, lambda p: p.arm == ours, lambda p: p.arm == reference, _anyway)
    return _paired(study, ours, reference, found, task)


def bytes_ratio(study: Study, ours: str, task: str) -> float | None:
    """Bytes of what `comparisons` calls `ours` over the reference's in a task: the geometric mean
    over pairs of runs with equal seed and condition; None where either exchanges nothing."""

    def named(name: str) -> Chooses:
        return lambda p: (p.arm if study.by_arm else p.label) == name

    alike = _anyway if study.by_arm else _same_condition
    found = _pairs(study, named(ours), named(study.first), alike, _log_of_bytes)
    logs = found.get(task)
    return math.exp(fmean(logs)) if logs else None


def _log_of_bytes(run: Run) -> float | None:
    sent = bytes_sent(run)
    return math.log(sent) if sent else None


def bytes_sent(run: Run) -> int:
    """Up and down, of all clients and rounds, the final model's delivery included."""
    return sum((run.results or {}).get(key, 0) for key in ("bytes_up", "bytes_down"))


def _same_condition(a: Placed, b: Placed) -> bool:
    return a.condition == b.condition


def _anyway(a: Placed, b: Placed) -> bool:
    return True


def _paired(
    study: Study, ours: str, reference: str, found: Mapping[str, list[float]], task: str | None
) -> Paired | None:
    wanted = study.tasks if task is None else [task]
    found = {t: d for t, d in found.items() if t in wanted}
    if set(found) != set(wanted) or not poolable(study, wanted):
        return None
    return Paired(ours, reference, estimate(found), metric_of(study.of(wanted[0])[0].run)[1])


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


def arm_scores(study: Study, task: str) -> list[ArmScores]:
    """A row an arm, of its finished runs."""
    return [_arm(arm, study.of(task, arm)) for arm in study.arms if study.of(task, arm)]


def _arm(arm: str, placed: Sequence[Placed]) -> ArmScores:
    done = [p.run.results for p in placed if p.run.results is not None]
    splits = list(dict.fromkeys(s for r in done for s in scores_by_split(r)))

    def every(key: str) -> list[float]:
        return [v for r in done if (v := _finite(r.get(key))) is not None]

    return ArmScores(
        arm,
        tuple(p.seed for p in placed),
        tuple(p.seed for p in placed if not p.run.finished),
        {s: _scores(done, s) for s in splits},
        every("deviation"),
        every("bytes_up"),
        every("bytes_down"),
        every("seconds"),
        [r["best_round"] for r in done],
    )


def _scores(done: Sequence[Mapping[str, Any]], split: str) -> list[float]:
    found = (_finite(scores_by_split(r).get(split, {}).get(r["metric"])) for r in done)
    return [value for value in found if value is not None]


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
        value = _setting(p, key)
        label = _label_without(p, key)
        groups.setdefault((p.task, label, value), []).append(score)
    return [
        GroupScore(task, label, value, estimate({"": scores}))
        for (task, label, value), scores in groups.items()
    ]


def _setting(placed: Placed, key: str) -> Any:
    value: Any = placed.run.recipe.model_dump(mode="json")
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value if isinstance(value, int | float | str) or value is None else str(value)


def _label_without(placed: Placed, key: str) -> str:
    """What else varies: the method, unless it is the key, and the other named settings."""
    kept = {k: v for k, v in placed.named.items() if k != key}
    method = [] if key.startswith("method.") else [placed.label]
    return ", ".join([*method, *shown(kept)])
