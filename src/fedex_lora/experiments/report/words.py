"""The verdict: what the runs show, in words, before any table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from fedex_lora.experiments.analysis.scores import (
    chose_itself,
    comparisons,
    final_score,
    judged_split,
)
from fedex_lora.experiments.analysis.statistics import Estimate, Outcome, Paired, what_seeds_show
from fedex_lora.experiments.analysis.statistics import number as signed
from fedex_lora.experiments.analysis.study import Placed, Study, as_text
from fedex_lora.experiments.compare import spread
from fedex_lora.experiments.report.html import Child, Html, el
from fedex_lora.experiments.report.setting import compared, cost
from fedex_lora.runs.words import number, size

_GROUPS: tuple[tuple[Outcome, str], ...] = (
    ("worse", "worse"),
    ("better", "better"),
    ("none", "no difference seen"),
    ("unknown", "no telling from chance"),
)


def verdict(study: Study) -> Html:
    """One box: a run's result, or every arm against the reference."""
    if len(study.placed) == 1:
        return el("section", el("h2", "Result"), *_one_run(study.placed[0]), class_="verdict")
    parts: list[Child] = [el("h2", "Verdict")]
    if len(study.tasks) > 1:
        parts += _compared(study, None)
    for task in study.tasks:
        parts += [compared(study, task), *_compared(study, task)]
    fewest = _fewest_seeds(study)
    if fewest:
        parts.append(el("p", what_seeds_show(fewest), class_="soft"))
    return el("section", *parts, class_="verdict")


def _one_run(placed: Placed) -> Iterator[Html]:
    run, recipe = placed.run, placed.run.recipe
    if run.results is None:
        scored = [r for r in run.records if r.get("score") is not None]
        last = f", at {scored[-1]['score']:.3f} in round {scored[-1]['round']}" if scored else ""
        done, planned = len(run.records), recipe.federation.rounds
        yield el("p", f"Not finished: {done} of {planned} rounds{last}.", class_="lead")
        return
    best, results = run.results["best"], run.results
    metric = results["metric"]
    scores = [f"{s} {metric} {number(v.get(metric))}" for s, v in best["scores"].items()]
    told = ", ".join(scores) or f"{metric} {number(best.get('score'))} on the clients’ own rows"
    yield el("p", f"{placed.arm}: {told}.", class_="lead")
    sent = f"{size(results.get('bytes_up', 0))} up, {size(results.get('bytes_down', 0))} down"
    yield el("p", f"Best round {results['best_round']} of {results['rounds']}; {sent}.")
    yield el("p", "One run: nothing here tells a method from chance.", class_="soft")


def _compared(study: Study, task: str | None) -> Iterator[Html]:
    """What is compared, by what the intervals say of it, in one task or over all."""
    pairs = [
        replace(p, ours=study.in_short(p.ours), reference=study.in_short(p.reference))
        for p in comparisons(study, task)
    ]
    if not pairs:
        if task is not None:
            yield from _uncompared(study, task)
        return
    yield el("p", f"{_where(study, task)}: {_summary(pairs)}", class_="lead")
    rows: list[Child] = [*_own_score(study, task)]
    for outcome, told in _GROUPS:
        of_group = [p for p in pairs if p.outcome == outcome]
        if of_group:
            listed = (el("li", f"{p.ours} {change(p.difference)}") for p in of_group)
            rows += [el("dt", told), el("dd", el("ul", *listed))]
    yield el("dl", *rows, *(cost(study, task) if task else ()))
    conditions = {as_text(p.condition) for p in study.placed}
    if len(conditions) > 1 and not study.by_arm:
        text = f"At equal settings, of which there are {len(conditions)}; a seed counts once."
        yield el("p", text, class_="soft")


def _own_score(study: Study, task: str | None) -> Iterator[Html]:
    """The score that others are compared with, where it is of one arm."""
    arms = {p.arm for p in study.of(task) if study.first in (p.arm, p.label)}
    scores = [s for p in study.of(task) if p.arm in arms and (s := final_score(p.run)) is not None]
    if task is not None and len(arms) == 1 and scores:
        yield el("dt", study.in_short(study.first))
        yield el("dd", spread(scores))


def _summary(pairs: Sequence[Paired]) -> str:
    """All outcomes in one sentence."""
    by = {o: _each([p.ours for p in pairs if p.outcome == o]) for o, _ in _GROUPS}
    reference, parts = pairs[0].reference, []
    if by["worse"]:
        parts.append(f"{reference} beats {by['worse']}")
    if by["better"]:
        parts.append(f"{reference} is beaten by {by['better']}")
    if by["none"]:
        parts.append(f"no difference seen between {reference} and {by['none']}")
    if by["unknown"]:
        parts.append(f"too few seeds to tell {reference} from {by['unknown']}")
    return "; ".join(parts) + "."


def _each(names: Sequence[str]) -> str:
    """Names in a sentence: "each of a, b and c"."""
    *first, last = names or [""]
    return f"each of {', '.join(first)} and {last}" if first else last


def _where(study: Study, task: str | None) -> str:
    if task is None:
        return f"Over {len(study.tasks)} tasks"
    run = next(p.run for p in study.of(task) if p.run.finished)
    caveat = " (rows that also chose the best round)" if chose_itself(run) else ""
    split = judged_split(run)
    return (f"{task}, {split}" if len(study.tasks) > 1 else split[0].upper() + split[1:]) + caveat


def change(e: Estimate) -> str:
    """A difference with its interval, short: "+0.012 (−0.003 to +0.027)"."""
    text = signed(e.mean, sign=True)
    if e.interval is not None:
        low, high = (signed(edge, sign=True) for edge in e.interval)
        text += f" ({low} to {high})"
    return text


def _uncompared(study: Study, task: str) -> Iterator[Html]:
    done = [p for p in study.of(task) if final_score(p.run) is not None]
    if not done:
        yield el("p", f"{task}: no run is finished yet.", class_="lead")
    elif len({p.arm for p in done}) == 1:
        yield el("p", f"{task}: one arm, {done[0].arm}; nothing to compare.", class_="lead")
    else:
        text = f"{task}: no finished runs of {study.first} and others with equal seeds."
        yield el("p", text, class_="lead")


def _fewest_seeds(study: Study) -> int:
    """Of what has an interval, the fewest seeds of a task; 1 if nothing has, 0 if there is none."""
    seeds = [one.difference.seeds for task in study.tasks for one in comparisons(study, task)]
    return min((n for n in seeds if n > 1), default=1 if seeds else 0)
