"""Writes docs/private.md from summaries of private runs: `python docs/private.py`.

`python docs/private.py add DIR...` first puts the finished runs below each DIR, as `grid` leaves
them, into docs/private.jsonl, as docs/claims.py does with other runs.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from claims import script
from results import environments, setting

from fedex_lora.experiments.analysis.runs import Run
from fedex_lora.experiments.analysis.scores import final_score, judged_split
from fedex_lora.experiments.analysis.statistics import change, estimate, spread
from fedex_lora.experiments.compare import markdown_table

HERE = Path(__file__).parent
KEPT = HERE / "private.jsonl"
EXACT = "fedex"
NONE, TWIN = "none", "no noise"  # in place of an ε
KEYS = ("training.learning_rate", "privacy.example_level.max_grad_norm")

ABOUT = """\
# Exact aggregation under differential privacy

Written by `docs/private.py` from `docs/private.jsonl`, what runs say of themselves. Further runs,
of any machine, add to it:

    fedex-lora grid recipes/real/private.yaml --data DIR --out runs/private
    fedex-lora grid recipes/real/private-none.yaml --data DIR --out runs/private
    fedex-lora grid recipes/real/private-twin.yaml --data DIR --out runs/private --only PAIR
    fedex-lora grid recipes/real/private-stsb.yaml --data DIR --out runs/private
    fedex-lora grid recipes/real/private-stsb-none.yaml --data DIR --out runs/private
    python docs/private.py add runs/private
    python docs/private.py

Privacy is that of single rows ([differential-privacy.md](differential-privacy.md)). Each method's
learning rate and clipping bound are the pair that scored best on validation at the first seed at
ε 3; other ε take the same, and runs without privacy choose a rate of their own, of
the same two. That seed counts among the others. Frozen weights are bfloat16. The noise is a
rehearsal's, so that runs repeat. PAIR is what was chosen for {exact}, e.g.
`'sst2-learning_rate=0.01-max_grad_norm=4.0/*'`. On STS-B one bound was tried.
"""
NOISE = """\
## How much of the residual is noise

FFA-LoRA freezes A because noise of A times noise of B is in what averaging misses. Here is that
deviation, ‖ideal − averaged‖, of {exact} after the first round, beside the same of a twin that drew
and clipped the same rows from the same start with next to no noise. The share of the squared
deviation that the twin does not have is noise.
"""
Choice = tuple[object, ...]
Arms = Mapping[tuple[str, str], Mapping[Choice, Mapping[int, Run]]]


def budget(run: Run) -> str:
    spec = run.recipe.privacy.example_level
    if spec is None:
        return NONE
    return TWIN if spec.epsilon is None else f"ε {spec.epsilon:g}"


def arms(runs: Sequence[Run]) -> Arms:
    """Runs by (method, budget), then by what is tuned, then by seed."""
    found: dict[tuple[str, str], dict[Choice, dict[int, Run]]] = {}
    for run in runs:
        method = run.path.name.rpartition("-seed")[0]
        choice = tuple(run.settings.get(key) for key in KEYS)
        by_choice = found.setdefault((method, budget(run)), {})
        by_choice.setdefault(choice, {})[run.recipe.seed] = run
    return found


def chosen(by_choice: Mapping[Choice, Mapping[int, Run]]) -> Choice:
    """The one that all seeds ran; of several the best on validation at the first seed."""

    def rank(choice: Choice) -> tuple[int, float]:
        first = by_choice[choice][min(by_choice[choice])]
        assert first.results is not None  # none that is not finished was kept
        return len(by_choice[choice]), first.results["best"]["score"]

    return max(by_choice, key=rank)


def budgets(found: Arms) -> list[str]:
    """Ascending, without privacy last."""
    named = {b for _, b in found} - {TWIN}
    return sorted(named, key=lambda name: float("inf" if name == NONE else name.split()[1]))


def tables(found: Arms) -> Iterator[str]:
    columns, best = budgets(found), {key: found[key][chosen(found[key])] for key in found}
    methods = [
        m for m in dict.fromkeys(m for m, _ in found) if any((m, b) in best for b in columns)
    ]

    def rows(cell, without: str = "") -> list[list[str]]:
        shown = [method for method in methods if method != without]
        return [[m, *(cell(m, b) if (m, b) in best else "-" for b in columns)] for m in shown]

    def score(method: str, b: str) -> str:
        values = [final_score(run) for run in best[method, b].values()]
        return f"{spread(values)} ({len(values)})"

    def less(method: str, b: str) -> str:
        ours, theirs = best.get((EXACT, b), {}), best[method, b]
        pairs = [(final_score(ours[s]), final_score(theirs[s])) for s in ours if s in theirs]
        values = [x - y for x, y in pairs if x is not None and y is not None]
        return change(estimate({"": values})) if values else "-"

    def picked(method: str, b: str) -> str:
        best = ", ".join("-" if x is None else f"{x:g}" for x in chosen(found[method, b]))
        return f"{best} (of {len(found[method, b])})"

    run = next(iter(best.values()))
    first = run[min(run)]
    yield f"## Scores: {task_of(first)}\n\nThe first run: {setting(first)}\n"
    yield f"{judged_split(first)}: mean ± standard deviation (seeds).\n"
    yield markdown_table(["method", *columns], rows(score))
    yield f"{EXACT} less the method, of equal seeds, with the 95 % interval:\n"
    yield markdown_table([f"{EXACT} less", *columns], rows(less, EXACT))
    yield "Learning rate and clipping bound (of so many pairs tried there):\n"
    yield markdown_table(["method", *columns], rows(picked))


def noise(found: Arms) -> Iterator[str]:
    rows = []
    for b in budgets(found):
        if b == NONE or (EXACT, b) not in found:
            continue
        choice = chosen(found[EXACT, b])
        ours, twins = found[EXACT, b][choice], found.get((EXACT, TWIN), {}).get(choice, {})
        both = [s for s in ours if s in twins]
        pairs = [[r.records[0]["deviation"] for r in (ours[s], twins[s])] for s in both]
        if pairs:
            shares = [1 - (twin / whole) ** 2 for whole, twin in pairs]
            each = [spread(values) for values in (*zip(*pairs, strict=True), shares)]
            rows.append([b, str(len(pairs)), *each])
    if rows:
        yield NOISE.format(exact=EXACT)
        yield markdown_table(["", "seeds", "deviation", "of the twin", "share that is noise"], rows)


def task_of(run: Run) -> str:
    return str(getattr(run.recipe.task, "name", run.recipe.task.kind))


def page(runs: Sequence[Run]) -> Iterator[str]:
    """The task with the most runs first."""
    yield ABOUT.format(exact=EXACT)
    yield f"{len(runs)} runs.\n"
    for task, _ in Counter(map(task_of, runs)).most_common():
        found = arms([run for run in runs if task_of(run) == task])
        yield from tables(found)
        yield from noise(found)
    yield from environments(runs)


if __name__ == "__main__":
    script(__doc__, KEPT, page)
