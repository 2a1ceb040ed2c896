"""The tables of the page: header, rows, and what to know of them."""

from __future__ import annotations

import shlex
import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from fedex_lora.experiments.analysis.scores import (
    against_reference,
    arm_scores,
    final_score,
    judged_rows,
    metric_table,
)
from fedex_lora.experiments.analysis.statistics import change, spread
from fedex_lora.experiments.analysis.study import Placed, Study, deviates, metric_of
from fedex_lora.recipe.reader import differences, dump_recipe

_MOST = 100  # clients that have a row
Table = tuple[list[str], list[list[str]], str]  # header, rows, caption


def scores(study: Study, task: str) -> Table:
    """A row an arm: scores by split, paired difference, deviation, bytes, seconds."""
    arms = arm_scores(study, task)
    metric = metric_of(study.of(task)[0].run)[0]
    splits = list(dict.fromkeys(s for a in arms for s in a.by_split if a.by_split[s]))
    compared = {a.arm: against_reference(study, a.arm, task) for a in arms}
    any_compared = any(compared.values())
    able = {p.arm for p in study.of(task) if deviates(p.method)}
    header = ["", "seeds", *(f"{s} {metric}" for s in splits)]
    header += [f"difference from {study.first}"] * any_compared
    header += ["best round", "deviation", "up", "down", "seconds"]
    rows = []
    for a in arms:
        seeds = ", ".join(map(str, a.seeds))
        seeds += f" ({len(a.unfinished)} unfinished)" if a.unfinished else ""
        row = [a.arm, seeds, *(spread(a.by_split.get(s) or [None]) for s in splits)]
        if any_compared:
            one = compared[a.arm]
            row.append(change(one.difference) if one else "")
        row.append(", ".join(map(str, a.best_rounds)) or "-")
        rows.append([*row, *a.costs(a.arm in able)])
    caption = "Of the best round"
    if any(len(a.seeds) > 1 for a in arms):
        caption += ": mean ± standard deviation over seeds"
    if any_compared:
        caption += "; differences of runs with equal seeds, with 95 % intervals"
    caption += (
        ". Deviation: what averaging the factors would miss in the last round, mean Frobenius norm "
        "over layers. Bytes: all clients and rounds, final delivery included."
    )
    return header, rows, caption


def all_metrics(study: Study, task: str) -> tuple[str, list[str], list[list[str]], str] | None:
    """Every metric of the judged split at the best round; None if there is but the one."""
    names, rows = metric_table(study, task)
    if len(names) < 2:
        return None
    results = next(p.run.results for p in study.of(task) if p.run.results)
    return f"All metrics, {judged_rows(results)}", ["", *names], rows, "Of the best round."


def clients(study: Study, task: str) -> Table | None:
    """Every client: examples, loss, its score alone and federated."""
    placed = _federated(study, task)
    names = sorted({c for p in placed for r in p.run.records for c in r["clients"]})
    if not names:
        return None
    main = study.main_arm(task)
    by_arm = sorted(placed, key=lambda p: study.arms.index(p.arm))
    columns = {
        "examples": _examples(placed),
        f"last training loss, {main}": _losses(p.run.records[-1] for p in placed if p.arm == main),
        **_epsilons(p for p in placed if p.arm == main),
        **_scored(placed, "scores_alone", lambda s: [*s][-1], "alone ({arm}): {split} {metric}"),
        **_scored(by_arm, "client_scores", lambda s: "", "own rows, {arm}: {metric}"),
    }
    rows = [[name, *(c.get(name, "-") for c in columns.values())] for name in names[:_MOST]]
    caption = "Means over seeds; examples from the smallest to the largest share."
    ours = [s for p in study.of(task, main) if (s := final_score(p.run)) is not None]
    if ours and any(key.startswith("alone") for key in columns):
        caption += f" The model of {main} on the same rows: {spread(ours)}."
    if len(names) > _MOST:
        caption += f" The first {_MOST} of {len(names)} clients."
    return ["client", *columns], rows, caption


def _federated(study: Study, task: str) -> list[Placed]:
    return [p for p in study.of(task) if p.run.records and not p.method.pooled]


def _examples(placed: Sequence[Placed]) -> dict[str, str]:
    counts: dict[str, list[int]] = {}
    for record in (r for p in placed for r in p.run.records):
        for name, client in record["clients"].items():
            counts.setdefault(name, []).append(client.get("examples") or 0)
    return {
        name: f"{min(n)}" if min(n) == max(n) else f"{min(n)} to {max(n)}"
        for name, n in counts.items()
    }


def _losses(records: Iterator[Mapping[str, Any]]) -> dict[str, str]:
    found: dict[str, list[float]] = {}
    for record in records:
        for name, client in record["clients"].items():
            if client.get("loss") is not None:
                found.setdefault(name, []).append(client["loss"])
    return {name: f"{statistics.fmean(v):.3f}" for name, v in found.items()}


def _epsilons(placed: Iterator[Placed]) -> dict[str, dict[str, str]]:
    """A column of what each client's rows cost, the largest of the seeds; none in runs that are
    not private."""
    found: dict[str, float] = {}
    for p in placed:
        for name, value in (p.run.records[-1].get("privacy") or {}).get("epsilon", {}).items():
            found[name] = max(value, found.get(name, 0.0))
    return {"ε": {name: f"{value:.3g}" for name, value in found.items()}} if found else {}


def _scored(
    placed: Sequence[Placed], key: str, split_of: Callable[[Any], str], title: str
) -> dict[str, dict[str, str]]:
    """Columns of what results.json says of each client at the best round, by arm.

    Args:
        split_of: The split to take of a client's scores; "" where they are not by split.
    """
    columns: dict[str, dict[str, list[float | None]]] = {}
    for p in placed:
        results = p.run.results or {"best": {}, "metric": ""}
        metric = results["metric"]
        for name, scores in (results["best"].get(key) or {}).items():
            split = split_of(scores)
            named = title.format(arm=p.arm, split=split, metric=metric)
            value = (scores[split] if split else scores).get(metric)
            columns.setdefault(named, {}).setdefault(name, []).append(value)
    return {title: {n: spread(v) for n, v in column.items()} for title, column in columns.items()}


def absent(study: Study, task: str) -> list[str]:
    """Who was refused or lost, when and why."""
    return [
        f"{p.arm}, seed {p.seed}, round {record['round']}: {name} was {what}: {why}"
        for p in _federated(study, task)
        for record in p.run.records
        for what in ("refused", "lost")
        for name, why in (record.get(what) or {}).items()
    ]


def recipe(study: Study, task: str) -> dict[str, Any]:
    """The recipe of one run, and in what the other arms differ from it."""
    one = study.of(task, study.main_arm(task))[0]
    ours, others = one.run.recipe, []
    for arm in dict.fromkeys(p.arm for p in study.of(task)):
        other = study.of(task, arm)[0].run.recipe
        same = other.model_copy(update={"seed": ours.seed, "name": ours.name})
        found = [d for d in differences(ours, same) if not d.startswith("method.")]
        if found:
            others.append(f"{arm}: {'; '.join(found)}")
    title = f"{ours.name}, {one.arm}, seed {one.seed}"
    return {"title": title, "text": dump_recipe(ours), "arm": one.arm, "others": others}


def environment(study: Study) -> list[list[str]]:
    """Versions, device and threads; where runs differ, how many had which."""
    values: dict[str, Counter[str]] = {}
    for p in study.placed:
        for key, value in p.run.environment.items():
            parts = value.items() if isinstance(value, dict) else [(key, value)]
            for name, v in parts:
                values.setdefault(str(name), Counter())[str(v)] += 1
    return [
        [name, ", ".join(v if len(seen) == 1 else f"{v} ({n} runs)" for v, n in seen.items())]
        for name, seen in values.items()
    ]


def commands(study: Study) -> list[str]:
    """What repeats these runs: one `compare` where they came of one, else a `run` each."""
    first = study.of(arm=study.main_arm(study.tasks[0]))[0].run
    plain = len(study.tasks) == 1 and not any(p.named for p in study.placed)
    arms, seeds = study.arms, sorted({p.seed for p in study.placed})
    if len(study.placed) > 1 and plain and not any(" " in arm for arm in arms):
        given = [str(first.path / "recipe.yaml"), "--methods", ",".join(arms)]
        given += ["--seeds", ",".join(map(str, seeds)), "--out", "NEW-DIRECTORY"]
        return [shlex.join(["fedex-lora", "compare", *given])]
    return [
        shlex.join(["fedex-lora", "run", str(p.run.path / "recipe.yaml"), "--out", out])
        for i, p in enumerate(study.placed, start=1)
        for out in ["NEW-DIRECTORY" if len(study.placed) == 1 else f"NEW-{i}"]
    ]
