"""The parts of the page below the verdict."""

from __future__ import annotations

import shlex
import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fedex_lora.experiments.analysis.claims import CLAIMS, findings
from fedex_lora.experiments.analysis.finding import Finding
from fedex_lora.experiments.analysis.scores import final_score
from fedex_lora.experiments.analysis.study import Placed, Study
from fedex_lora.experiments.compare import spread
from fedex_lora.experiments.report.html import Child, Html, bullets, details, el, join, table
from fedex_lora.recipe.reader import differences, dump_recipe

_MOST_CLIENTS, _MOST_LINES = 100, 40


def notes(lines: Sequence[str]) -> Html | None:
    """What to know before reading on."""
    return el("div", bullets(lines), class_="notes") if lines else None


def clients(study: Study, task: str) -> Html | None:
    """Every client: examples, loss, its score alone and federated; who was refused or lost."""
    placed = [p for p in study.of(task) if p.run.records and not p.method.pooled]
    names = sorted({c for p in placed for r in p.run.records for c in r["clients"]})
    if not names:
        return None
    columns = {
        "examples": _examples(placed),
        **_losses(study.main_arm(task), placed),
        **_alone(placed),
        **_own_rows(study, placed),
    }
    shown = names[:_MOST_CLIENTS]
    rows = [[name, *(column.get(name, "-") for column in columns.values())] for name in shown]
    caption = "Means over seeds; examples from the smallest to the largest share."
    main = study.main_arm(task)
    ours = [s for p in study.of(task, main) if (s := final_score(p.run)) is not None]
    if ours and any(key.startswith("alone") for key in columns):
        caption += f" The model of {main} on the same rows: {spread(ours)}."
    if len(shown) < len(names):
        caption += f" The first {len(shown)} of {len(names)} clients."
    return join([table(["client", *columns], rows, caption), _absent(placed)])


def _examples(placed: Sequence[Placed]) -> dict[str, str]:
    counts: dict[str, list[int]] = {}
    for record in _records(placed):
        for name, client in record["clients"].items():
            counts.setdefault(name, []).append(client.get("examples") or 0)
    return {
        name: f"{min(n)}" if min(n) == max(n) else f"{min(n)} to {max(n)}"
        for name, n in counts.items()
    }


def _records(placed: Sequence[Placed]) -> Iterator[Mapping[str, Any]]:
    for p in placed:
        yield from p.run.records


def _losses(arm: str, placed: Sequence[Placed]) -> dict[str, dict[str, str]]:
    """The training loss of the last round, in one arm."""
    found: dict[str, list[float]] = {}
    for p in placed:
        if p.arm == arm:
            for name, client in p.run.records[-1]["clients"].items():
                if client.get("loss") is not None:
                    found.setdefault(name, []).append(client["loss"])
    return {
        f"last training loss, {arm}": {n: f"{statistics.fmean(v):.3f}" for n, v in found.items()}
    }


def _alone(placed: Sequence[Placed]) -> dict[str, dict[str, str]]:
    """Scores on the server's rows of clients that trained alone."""
    columns: dict[str, dict[str, list[float | None]]] = {}
    for p in placed:
        if p.run.results is None:
            continue
        metric = p.run.results["metric"]
        for name, by_split in (p.run.results["best"].get("scores_alone") or {}).items():
            split = list(by_split)[-1]
            column = columns.setdefault(f"alone ({p.arm}): {split} {metric}", {})
            column.setdefault(name, []).append(by_split[split].get(metric))
    return {title: {n: spread(v) for n, v in column.items()} for title, column in columns.items()}


def _own_rows(study: Study, placed: Sequence[Placed]) -> dict[str, dict[str, str]]:
    """Scores on each client's own validation rows, by arm."""
    columns: dict[str, dict[str, list[float | None]]] = {}
    for p in sorted(placed, key=lambda p: study.arms.index(p.arm)):
        if p.run.results is None:
            continue
        metric = p.run.results["metric"]
        for name, metrics in (p.run.results["best"].get("client_scores") or {}).items():
            column = columns.setdefault(f"own rows, {p.arm}: {metric}", {})
            column.setdefault(name, []).append(metrics.get(metric))
    return {title: {n: spread(v) for n, v in column.items()} for title, column in columns.items()}


def _absent(placed: Sequence[Placed]) -> Html:
    lines = [
        f"{p.arm}, seed {p.seed}, round {record['round']}: {name} was {what}: {why}"
        for p in placed
        for record in p.run.records
        for what in ("refused", "lost")
        for name, why in (record.get(what) or {}).items()
    ]
    if not lines:
        return el("p", "No client was refused or lost.", class_="soft")
    more = [f"and {len(lines) - _MOST_LINES} more"] if len(lines) > _MOST_LINES else []
    summary = f"Refused or lost in {len(lines)} turn(s)"
    return details(summary, bullets([*lines[:_MOST_LINES], *more]), open=len(lines) < 6)


def claims(study: Study) -> Html:
    """The paper's claims that these runs speak to; the others by name."""
    found = findings(study)
    tested = [f for f in found if f.outcome != "not tested"]
    silent = [
        c for c in CLAIMS if all(f.outcome == "not tested" for f in found if f.claim == c.number)
    ]
    parts: list[Child] = []
    for claim in CLAIMS:
        items = [_finding(f) for f in tested if f.claim == claim.number]
        if items:
            title = f"{claim.number}. {claim.text} ({claim.where})"
            parts += [el("h3", title), el("ul", *items, class_="findings")]
    if silent:
        told = [f"{c.number}. {c.text} Needs {c.needs}: {c.command}" for c in silent]
        parts.append(details("Not tested by these runs", bullets(told)))
    return join(parts)


def _finding(f: Finding) -> Html:
    looks = {"holds": "holds", "does not hold": "fails"}.get(f.outcome, "open")
    return el("li", el("span", f.outcome, class_=looks), f" {f.part}", el("p", f.evidence))


def recipe(study: Study, task: str) -> Html:
    """The recipe of one run, and in what the other arms differ from it."""
    one = study.of(task, study.main_arm(task))[0]
    lines = []
    for arm in dict.fromkeys(p.arm for p in study.of(task)):
        other = study.of(task, arm)[0].run.recipe
        same = other.model_copy(update={"seed": one.run.recipe.seed, "name": one.run.recipe.name})
        found = [d for d in differences(one.run.recipe, same) if not d.startswith("method.")]
        if found:
            lines.append(f"{arm}: {'; '.join(found)}")
    others = [el("p", f"Beside the method, others differ from {one.arm}:"), bullets(lines)]
    title = f"{one.run.recipe.name}, {one.arm}, seed {one.seed}"
    return join(
        [details(title, el("pre", dump_recipe(one.run.recipe))), *(others if lines else [])]
    )


def environment(study: Study) -> Html:
    """Versions, device and threads; where runs differ, how many had which."""
    values: dict[str, Counter[str]] = {}
    for p in study.placed:
        for key, value in p.run.environment.items():
            parts = value.items() if isinstance(value, dict) else [(key, value)]
            for name, v in parts:
                values.setdefault(str(name), Counter())[str(v)] += 1
    rows = [
        [name, ", ".join(v if len(seen) == 1 else f"{v} ({n} runs)" for v, n in seen.items())]
        for name, seen in values.items()
    ]
    if not rows:
        return el("p", "Not recorded.", class_="soft")
    return Html(table(["", "version or value"], rows).replace("scroll", "scroll narrow", 1))


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
