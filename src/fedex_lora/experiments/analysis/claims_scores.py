"""Claims 1, 2, 3 and 5 of the paper: who scores higher."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from fedex_lora.experiments.analysis.finding import Finding, Outcome, judged
from fedex_lora.experiments.analysis.scores import differences, final_score, poolable
from fedex_lora.experiments.analysis.statistics import (
    LEVEL,
    Estimate,
    Paired,
    estimate,
    interval_text,
    number,
)
from fedex_lora.experiments.analysis.study import Placed, Study, metric_of

# claim, ours, reference, and what ours has of a setting times what the reference has
_CONTESTS: tuple[tuple[int, str, str, Mapping[str, float]], ...] = (
    (1, "fedex", "fedit", {}),
    (1, "fedit", "ffa", {}),
    (1, "fedex", "ffa", {}),
    (2, "fedit", "ffa", {"lora.r": 0.5}),
    (2, "fedex", "ffa", {"lora.r": 0.5}),
    (3, "fedex", "fedex-reinit", {}),
    (3, "fedex", "fedex-keep", {}),
)
_FEDEX, _CENTRALIZED = "fedex", "centralized"
_NEAR = 0.01  # one point of 100; the largest gap of an average in the paper's Table 3 is 0.8
_ALPHA = "lora.lora_alpha"  # may go with the rank


def score_findings(study: Study) -> Iterator[Finding]:
    """A finding for each comparison."""
    for contest in _CONTESTS:
        yield _contest(study, *contest)
    yield _near_centralized(study)
    yield _best_rank(study)


def _named(name: str) -> Callable[[Placed], bool]:
    return lambda placed: placed.run.recipe.method.name == name


def _contest(
    study: Study, claim: int, ours: str, reference: str, factor: Mapping[str, float]
) -> Finding:
    opponent = f"{reference} with twice its rank" if factor else reference
    part = f"{ours} scores higher than {opponent}"
    but = (_ALPHA,) if factor else ()
    found = differences(study, _named(ours), _named(reference), but=but, factor=factor)
    e, why_not = _pooled(study, found)
    if e is None:
        return Finding(claim, part, "not tested", why_not)
    return judged(claim, part, e, Paired(ours, opponent, e).verdict())


def _pooled(
    study: Study, found: Mapping[str, Sequence[float]], level: float = LEVEL
) -> tuple[Estimate | None, str]:
    """The estimate over all tasks, positive where ours is better; or why there is none."""
    if not found:
        return None, "no finished runs of both with the same seed and settings"
    if not poolable(study, list(found)):
        return None, "the tasks' metrics have no common scale; give runs of one task at a time"
    signs = {task: 1 if metric_of(study.of(task)[0].run)[1] else -1 for task in found}
    signed = {task: [signs[task] * d for d in values] for task, values in found.items()}
    return estimate(signed, level), ""


def _near_centralized(study: Study) -> Finding:
    found = differences(study, _named(_FEDEX), _named(_CENTRALIZED))
    scores = [s for p in study.placed if p.task in found and (s := final_score(p.run)) is not None]
    near = _NEAR * (100 if max(map(abs, scores), default=0) > 1 else 1)
    part = f"{_FEDEX} is at most {near:g} below {_CENTRALIZED}"
    e, why_not = _pooled(study, found)
    if e is None:
        return Finding(1, part, "not tested", why_not)
    outcome: Outcome = "not seen"
    if e.interval is not None and e.interval[0] >= -near:
        outcome = "holds"
    elif e.interval is not None and e.interval[1] < -near:
        outcome = "does not hold"
    text = f"{_FEDEX} − {_CENTRALIZED}: {number(e.mean, sign=True)} ({interval_text(e)})"
    return Finding(1, part, outcome, text)


def _best_rank(study: Study) -> Finding:
    """Claim 5: some smaller rank beats the largest. Several are tried, so each interval's level is
    1 − 0.05 / their number (Bonferroni)."""
    part = "a smaller rank scores higher than the largest"
    names = [p.run.recipe.method.name for p in study.placed]
    name = _FEDEX if _FEDEX in names else names[0]
    done = [p for p in study.placed if _named(name)(p) and final_score(p.run) is not None]
    ranks = sorted({p.run.recipe.lora.r for p in done})
    against: dict[int, Estimate] = {}
    for rank in ranks[:-1]:
        e, why_not = _rank_against(study, name, rank, ranks[-1], 1 - 0.05 / (len(ranks) - 1))
        if e is None:
            return Finding(5, part, "not tested", f"ranks {rank} and {ranks[-1]}: {why_not}")
        against[rank] = e
    if not against:
        return Finding(5, part, "not tested", "no finished runs of one method with several lora.r")
    better = [rank for rank, e in against.items() if e.sign > 0]
    best = max(better or against, key=lambda rank: against[rank].mean)
    worse = all(e.sign < 0 for e in against.values())
    outcome: Outcome = "does not hold" if worse else "not seen"
    text = (
        f"{name}: rank {best} − rank {ranks[-1]}: {number(against[best].mean, sign=True)} "
        f"({interval_text(against[best])}), of ranks {', '.join(map(str, ranks))}"
    )
    return Finding(5, part, "holds" if better else outcome, text)


def _rank_against(
    study: Study, name: str, rank: int, largest: int, level: float
) -> tuple[Estimate | None, str]:
    def at(r: int) -> Callable[[Placed], bool]:
        return lambda p: _named(name)(p) and p.run.recipe.lora.r == r

    found = differences(study, at(rank), at(largest), but=("lora.r", _ALPHA))
    return _pooled(study, found, level)
