"""The paper's claims held against runs.

Scores and deviations are judged by `statistics.Estimate`: nothing holds or fails unless the
interval leaves out 0. Bytes are counted, not estimated: they are the same for every seed but for a
few of a message's header, so they have no interval.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean

import numpy as np

from fedex_lora.errors import UserError, number
from fedex_lora.experiments.analysis import deviation as dev
from fedex_lora.experiments.analysis.claims import Finding, Outcome, judged
from fedex_lora.experiments.analysis.runs import Run, head_numbers
from fedex_lora.experiments.analysis.scores import (
    Chooses,
    by_task,
    bytes_sent,
    differences,
    final_score,
    poolable,
)
from fedex_lora.experiments.analysis.statistics import (
    LEVEL,
    Estimate,
    Paired,
    estimate,
    interval_text,
    mirrored,
    percent,
)
from fedex_lora.experiments.analysis.study import (
    Placed,
    Study,
    deviates,
    is_exact_average,
    metric_of,
)
from fedex_lora.model.load import locate

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
_RANK, _ALPHA = "lora.r", "lora.lora_alpha"  # the latter may go with the former

Measure = Callable[[Sequence[dev.Deviation], dev.Scaling], float | None]
_TRENDS: tuple[tuple[str, Measure, bool], ...] = (  # part, measure, whether it is to be low
    ("the deviation falls with depth (after round 1)", dev.depth_trend, True),
    ("the deviation is larger in Q than in V (after round 1)", dev.query_over_value, False),
    ("the deviation falls over rounds", dev.round_trend, True),
)
_EPOCHS, _CLIENTS = "training.num_train_epochs", "federation.clients"
_MARGINAL = 0.1  # of all bytes; in the paper's Table 8 at most 0.083
_BENT = 0.02  # relative distance from a straight line


def findings(study: Study) -> list[Finding]:
    """What the runs show of every part of every claim, in the order of the claims."""
    found = [*_contests(study), _near_centralized(study), _best_rank(study), *_deviations(study)]
    found += [_marginal(study), _linear_in_clients(study)]
    return sorted(found, key=lambda f: f.claim)


def _method(name: str, rank: int | None = None) -> Chooses:
    def chosen(p: Placed) -> bool:
        return p.run.recipe.method.name == name and rank in (None, p.run.recipe.lora.r)

    return chosen


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


def _contests(study: Study) -> Iterator[Finding]:
    """Claims 1, 2, 3: who scores higher."""
    for claim, ours, reference, factor in _CONTESTS:
        opponent = f"{reference} with twice its rank" if factor else reference
        part = f"{ours} scores higher than {opponent}"
        but = (_ALPHA,) if factor else ()
        found = differences(study, _method(ours), _method(reference), but=but, factor=factor)
        e, why_not = _pooled(study, found)
        if e is None:
            yield Finding(claim, part, "not tested", why_not)
        else:
            yield judged(claim, part, e, Paired(ours, opponent, e).verdict())


def _near_centralized(study: Study) -> Finding:
    found = differences(study, _method(_FEDEX), _method(_CENTRALIZED))
    scores = [s for p in study.placed if p.task in found and (s := final_score(p.run)) is not None]
    near = _NEAR * (100 if max(map(abs, scores), default=0) > 1 else 1)
    part = f"{_FEDEX} is at most {near:g} below {_CENTRALIZED}"
    e, why_not = _pooled(study, found)
    if e is None:
        return Finding(1, part, "not tested", why_not)
    low, high = e.interval or (-math.inf, math.inf)
    outcome: Outcome = "holds" if low >= -near else "does not hold" if high < -near else "not seen"
    text = f"{_FEDEX} − {_CENTRALIZED}: {number(e.mean, 3, sign=True)} ({interval_text(e)})"
    return Finding(1, part, outcome, text)


def _best_rank(study: Study) -> Finding:
    """Claim 5: some smaller rank beats the largest. Several are tried, so each interval's level is
    1 − 0.05 / their number (Bonferroni)."""
    part = "a smaller rank scores higher than the largest"
    names = [p.run.recipe.method.name for p in study.placed]
    name = _FEDEX if _FEDEX in names else names[0]
    done = [p for p in study.placed if _method(name)(p) and final_score(p.run) is not None]
    ranks = sorted({p.run.recipe.lora.r for p in done})
    against: dict[int, Estimate] = {}
    for rank in ranks[:-1]:
        ours, reference = _method(name, rank), _method(name, ranks[-1])
        found = differences(study, ours, reference, but=(_RANK, _ALPHA))
        e, why_not = _pooled(study, found, 1 - 0.05 / (len(ranks) - 1))
        if e is None:
            return Finding(5, part, "not tested", f"ranks {rank} and {ranks[-1]}: {why_not}")
        against[rank] = e
    if not against:
        return Finding(5, part, "not tested", "no finished runs of one method with several lora.r")
    better = [rank for rank, e in against.items() if e.sign > 0]
    best = max(better or against, key=lambda rank: against[rank].mean)
    worse = all(e.sign < 0 for e in against.values())
    outcome: Outcome = "holds" if better else "does not hold" if worse else "not seen"
    text = (
        f"{name}: rank {best} − rank {ranks[-1]}: {number(against[best].mean, 3, sign=True)} "
        f"({interval_text(against[best])}), of ranks {', '.join(map(str, ranks))}"
    )
    return Finding(5, part, outcome, text)


def _deviations(study: Study) -> Iterator[Finding]:
    """Claim 4: how the deviation of averaging depends on depth, epochs, Q or V, rounds; on the runs
    of one method (exact averaging if there), as methods of equal seed share round 1."""
    able = [p for p in study.placed if deviates(p.method) and p.method.averages]
    exact = [p for p in able if is_exact_average(p.method)]
    chosen = exact or [p for p in able if p.method == able[0].method]
    rows = {id(p.run): dev.deviations(p.run) for p in chosen}
    scaling = dev.best_scaling(row for part in rows.values() for row in part)
    methods = ", ".join(dict.fromkeys(p.run.recipe.method.name for p in chosen))

    def over_runs(measure: Measure, scaling: dev.Scaling) -> Estimate | None:
        """The mean of a log ratio that every run gives; tasks and seeds are the sample."""
        found: dict[tuple[str, int], list[float]] = {}
        for p in chosen:
            value = measure(rows[id(p.run)], scaling)
            if value is not None:
                found.setdefault((p.task, p.seed), []).append(value)
        return estimate(by_task(found)) if found else None

    for part, measure, low in _TRENDS:
        e, relative = over_runs(measure, scaling), over_runs(measure, "relative")
        if e is None:
            why = "no runs that average, with such layers or rounds"
            yield Finding(4, part, "not tested", why)
            continue
        text = f"{methods}: {_ratio(e)}, of the {dev.SCALINGS[scaling]}"
        text += f"; {_ratio(relative)} relative to the ideal" if relative else ""
        yield judged(4, part, mirrored(e) if low else e, text)
    yield _epochs(study, rows, scaling, chosen)


def _epochs(
    study: Study,
    rows: Mapping[int, Sequence[dev.Deviation]],
    scaling: dev.Scaling,
    chosen: Sequence[Placed],
) -> Finding:
    part = "the deviation grows with local epochs (after round 1)"
    counts = sorted({p.settings[_EPOCHS] for p in chosen if _EPOCHS in p.settings})
    if len(counts) < 2:
        return Finding(4, part, "not tested", f"no runs that differ in {_EPOCHS}")
    few, many = counts[0], counts[-1]

    def having(epochs: float) -> Chooses:
        return lambda p: id(p.run) in rows and p.settings.get(_EPOCHS) == epochs

    def measure(run: Run) -> float | None:
        return dev.first_round(rows[id(run)], scaling)

    but = (_EPOCHS, "federation.rounds")  # the first round does not know how many follow
    found = differences(study, having(many), having(few), measure, but)
    if not found:
        return Finding(4, part, "not tested", f"no runs of equal seed that differ in {_EPOCHS}")
    e = estimate(found)
    text = f"{many} epochs over {few}: {_ratio(e)}, of the {dev.SCALINGS[scaling]}"
    return judged(4, part, e, text)


def _ratio(e: Estimate) -> str:
    """A log ratio as a ratio, with its interval."""
    text = f"ratio {math.exp(e.mean):.2f}"
    if e.interval is None:
        return f"{text} ({e.basis})"
    low, high = map(math.exp, e.interval)
    return f"{text} (95 % interval {low:.2f} to {high:.2f}; {e.basis})"


def _marginal(study: Study) -> Finding:
    """Claim 6: whether the residual's bytes are at most a tenth, the initial model sent once as
    well. Means over pairs of exact and of plain averaging."""
    part = f"the residual is at most {percent(_MARGINAL)} of all bytes, the initial model included"
    plain = {
        (p.task, p.seed, p.others()): p.run
        for p in study.placed
        if deviates(p.method)
        and p.method.averages
        and p.method.residual == "dropped"
        and p.run.finished
    }
    shares = []  # of all bytes: the residual's without the initial model's, and with; that; head
    known = True
    for p in study.placed:
        other = plain.get((p.task, p.seed, p.others()))
        if not is_exact_average(p.method) or not p.run.finished or other is None:
            continue
        exact, fed = bytes_sent(p.run), p.run.recipe.federation
        messages = fed.sampled * fed.rounds * 2  # up, and down with the final delivery
        extra, head = exact - bytes_sent(other), 4.0 * head_numbers(p.run.path) * messages
        initial = _initial(p.run)
        known = known and initial is not None
        whole = exact + (initial or 0)
        shares.append((extra / exact, extra / whole, (initial or 0) / whole, head / whole))
    if not shares:
        why = "no finished runs of exact and of plain averaging with the same seed and settings"
        return Finding(6, part, "not tested", why)
    alone, extra, model, head = (fmean(column) for column in zip(*shares))
    text = f"{percent(alone)} of the bytes after the initial model"
    if not known:
        text += "; the initial model's size is not known here (its files are not on this machine)"
        return Finding(6, part, "not seen", text)
    text = f"{percent(extra)} of all (initial model {percent(model)}, head {percent(head)}); {text}"
    return Finding(6, part, "holds" if extra <= _MARGINAL else "does not hold", text)


def _initial(run: Run) -> float | None:
    """Bytes of the pretrained model's files, once for every client; None if they are not here."""
    try:
        folder = Path(locate(run.recipe.model.name))
    except UserError:
        return None
    files = list(folder.glob("*.safetensors")) or list(folder.glob("pytorch_model*.bin"))
    size = sum(f.stat().st_size for f in files)
    return float(size * run.recipe.federation.clients) if files else None


def _linear_in_clients(study: Study) -> Finding:
    """Claim 6: whether the bytes down a client and round lie on a straight line in the number of
    clients; of runs that are equal in all else, those with the most such numbers."""
    part = "bytes to a client grow linearly with the number of clients"
    groups: dict[tuple[str, str], dict[int, list[float]]] = {}
    for p in study.placed:
        if is_exact_average(p.method) and _CLIENTS in p.settings and p.run.finished:
            alike = groups.setdefault((p.task, p.others(_CLIENTS)), {})
            # without the first round, in which all have the start already
            rounds = [r for r in p.run.records if r["round"] > 1]
            sizes = [size for r in rounds for size in r["bytes_down"].values()]
            mean = fmean(sizes) if sizes else math.nan
            alike.setdefault(p.run.recipe.federation.sampled, []).append(mean)
    points = max(groups.values(), key=len, default={})
    if len(points) < 3:
        why = f"no finished runs of exact averaging with three or more {_CLIENTS}"
        return Finding(6, part, "not tested", why)
    k = np.array(sorted(points))
    down = np.array([fmean(points[x]) for x in k.tolist()])
    fitted = np.polyval(np.polyfit(k, down, 1), k)
    off = float(np.max(np.abs(fitted - down) / down))
    told = ", ".join(f"{x}: {size / 1e6:.2f} MB" for x, size in zip(k.tolist(), down.tolist()))
    text = f"a client and round, by clients {told}; at most {percent(off)} from a straight line"
    return Finding(6, part, "holds" if off <= _BENT else "does not hold", text)
