"""The verdict: what was compared, what the runs show and what it cost, before any table."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

from fedex_lora.errors import number, size
from fedex_lora.experiments.analysis.scores import (
    bytes_ratio,
    bytes_sent,
    chose_itself,
    comparisons,
    final_score,
    judged_split,
)
from fedex_lora.experiments.analysis.statistics import (
    Outcome,
    Paired,
    change,
    spread,
    what_seeds_show,
)
from fedex_lora.experiments.analysis.study import Placed, Study, as_text

_GROUPS: tuple[tuple[Outcome, str], ...] = (
    ("worse", "worse"),
    ("better", "better"),
    ("none", "no difference seen"),
    ("unknown", "no telling from chance"),
)
_MOST = 12  # arms that are named
Part = tuple[str, Any]  # "lead", "soft", "": a paragraph; "list": (term, text or lines) each


def verdict(study: Study) -> Iterator[Part]:
    """A run's result, or every arm against the reference."""
    if len(study.placed) == 1:
        yield from _one_run(study.placed[0])
        return
    if len(study.tasks) > 1:
        yield from _compared(study, None)
    for task in study.tasks:
        placed = study.of(task)
        recipes = [p.run.recipe for p in placed]
        parts = [
            _values((r.federation.clients for r in recipes), "client"),
            _values((r.federation.rounds for r in recipes), "round"),
            _values((r.training.get("num_train_epochs") for r in recipes), "local epoch"),
            _values((p.seed for p in placed), "seed", count=True),
        ]
        rows = next((p.run.description for p in placed if p.run.description), None)
        every = study.of_arms(task)
        arms = ", ".join(every) if len(every) <= _MOST else f"{len(every)} arms"
        told = f" on {without_folder(rows)}" if rows else ""
        yield "soft", f"{task}: {arms}{told}; {', '.join(filter(None, parts))}."
        yield from _compared(study, task)
    seeds = [one.difference.seeds for task in study.tasks for one in comparisons(study, task)]
    if seeds:  # the fewest of what has an interval; one if nothing has
        yield "soft", what_seeds_show(min((n for n in seeds if n > 1), default=1))


def _one_run(placed: Placed) -> Iterator[Part]:
    run, results = placed.run, placed.run.results
    if results is None:
        scored = [r for r in run.records if r.get("score") is not None]
        last = f", at {scored[-1]['score']:.3f} in round {scored[-1]['round']}" if scored else ""
        planned = run.recipe.federation.rounds
        yield "lead", f"Not finished: {len(run.records)} of {planned} rounds{last}."
        return
    best, metric = results["best"], results["metric"]
    scores = [f"{s} {metric} {number(v.get(metric))}" for s, v in best["scores"].items()]
    own_rows = f"{metric} {number(best.get('score'))} on the clients’ own rows"
    yield "lead", f"{placed.arm}: {', '.join(scores) or own_rows}."
    sent = f"{size(results.get('bytes_up', 0))} up, {size(results.get('bytes_down', 0))} down"
    yield "", f"Best round {results['best_round']} of {results['rounds']}; {sent}."
    yield "soft", "One run: nothing here tells a method from chance."


def _values(values: Iterable[Any], what: str, count: bool = False) -> str:
    """`3 or 6 clients`; nothing where it is not known. With `count`, how many there are."""
    there = list(dict.fromkeys(v for v in values if v is not None))
    shown = str(len(there)) if count else " or ".join(map(str, there))
    return f"{shown} {what}{'s' * (shown != '1')}" if there else ""


def without_folder(description: str) -> str:
    """A description of data without the directory that they were in.

    Example:
        >>> without_folder("/my/data/sst2, train: 500 rows")
        'sst2, train: 500 rows'
    """
    first, comma, rest = description.partition(",")
    return Path(first).name + comma + rest


def _compared(study: Study, task: str | None) -> Iterator[Part]:
    """What is compared, by what the intervals say of it, in one task or over all."""
    pairs = [
        replace(p, ours=study.in_short(p.ours), reference=study.in_short(p.reference))
        for p in comparisons(study, task)
    ]
    if not pairs:
        if task is not None:
            yield "lead", f"{task}: {_why_nothing(study, task)}"
        return
    yield "lead", f"{_where(study, task)}: {_summary(pairs)}"
    groups = ((told, [p for p in pairs if p.outcome == outcome]) for outcome, told in _GROUPS)
    rows: list[tuple[str, str | list[str]]] = [
        (told, [f"{p.ours} {change(p.difference)}" for p in group])
        for told, group in groups
        if group
    ]
    if task is not None:
        rows = [*_own_score(study, task), *rows, *_cost(study, task)]
    yield "list", rows
    conditions = {as_text(p.condition) for p in study.placed}
    if len(conditions) > 1 and not study.by_arm:
        yield (
            "soft",
            f"At equal settings, of which there are {len(conditions)}; a seed counts once.",
        )


def _why_nothing(study: Study, task: str) -> str:
    done = [p for p in study.of(task) if final_score(p.run) is not None]
    if not done:
        return "no run is finished yet."
    if len({p.arm for p in done}) == 1:
        return f"one arm, {done[0].arm}; nothing to compare."
    return f"no finished runs of {study.first} and others with equal seeds."


def _own_score(study: Study, task: str) -> Iterator[tuple[str, str]]:
    """The score that others are compared with, where it is of one arm."""
    arms = {p.arm for p in study.of(task) if study.first in (p.arm, p.label)}
    scores = [s for p in study.of(task) if p.arm in arms and (s := final_score(p.run)) is not None]
    if len(arms) == 1 and scores:
        yield study.in_short(study.first), spread(scores)


def _summary(pairs: Sequence[Paired]) -> str:
    """All outcomes in one sentence."""
    reference, parts = pairs[0].reference, []
    texts = {
        "worse": "{0} beats {1}",
        "better": "{0} is beaten by {1}",
        "none": "no difference seen between {0} and {1}",
        "unknown": "too few seeds to tell {0} from {1}",
    }
    for outcome, text in texts.items():
        *first, last = [p.ours for p in pairs if p.outcome == outcome] or [""]
        each = f"each of {', '.join(first)} and {last}" if first else last
        parts += [text.format(reference, each)] * bool(last)
    return "; ".join(parts) + "."


def _where(study: Study, task: str | None) -> str:
    if task is None:
        return f"Over {len(study.tasks)} tasks"
    run = next(p.run for p in study.of(task) if p.run.finished)
    caveat = " (rows that also chose the best round)" if chose_itself(run) else ""
    split = judged_split(run)
    return (f"{task}, {split}" if len(study.tasks) > 1 else split[0].upper() + split[1:]) + caveat


def _cost(study: Study, task: str) -> Iterator[tuple[str, list[str]]]:
    """Bytes of a run of the reference, and of the others as multiples.

    Where the data are pooled nothing but the data would be sent, which is not counted.
    """
    runs = [p.run for p in study.of(task) if study.first in (p.arm, p.label) and p.run.finished]
    if not runs or not any(map(bytes_sent, runs)):
        return
    told = [f"{study.in_short(study.first)} {size(fmean(map(bytes_sent, runs)))}"]
    pooled = {name for p in study.of(task) if p.method.pooled for name in (p.arm, p.label)}
    for one in comparisons(study, task):
        if one.ours not in pooled:
            ratio = bytes_ratio(study, one.ours, task)
            times = "none" if ratio is None else f"× {number(ratio, 2)}"
            told.append(f"{study.in_short(one.ours)} {times}")
    yield "bytes of a run", told
