"""Writes docs/claims.md and its plot from summaries of runs: `python docs/claims.py`.

`python docs/claims.py add DIR...` first puts the finished runs below each DIR, as `grid` and
`compare` leave them, into docs/runs.jsonl: a line a run, its text files without its tensors. Runs
of several machines add up there; one that is there already is replaced.
"""

import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev
from tempfile import TemporaryDirectory
from typing import Any

import matplotlib.pyplot as plt
from layers import dealt, is_plain, layers
from results import claims, difference, environments, further_metrics, model_name, setting
from results_why import EXACT, REFERENCE, share_missed
from scipy import stats

from fedex_lora.errors import UserError, size
from fedex_lora.experiments.analysis.runs import Run, read_runs
from fedex_lora.experiments.analysis.scores import (
    arm_scores,
    differences,
    final_score,
    judged_split,
    paired,
    significant,
)
from fedex_lora.experiments.analysis.statistics import spread
from fedex_lora.experiments.analysis.study import Study, study
from fedex_lora.experiments.compare import markdown_table

HERE = Path(__file__).parent
KEPT = HERE / "runs.jsonl"
FILES = ("recipe.yaml", "metrics.jsonl", "results.json", "environment.json", "data.json")
DIFFERENCE = 0.005  # of a score, that is to be seen
POWER = 0.8  # the chance of seeing it where it is there
BESIDE = ("ffa", "centralized")
MANY = 6  # methods, from which on they are a comparison of their own
ASSIGNMENTS = {"fedex", "fedex-reinit", "fedex-keep"}  # of Table 4

ABOUT = """\
# The claims on real models

Written by `docs/claims.py` from [runs.jsonl](runs.jsonl), what runs say of themselves. Further
runs, of any machine, add to it:

    fedex-lora grid recipes/real/one-round.yaml --data DIR --out runs/real
    python docs/claims.py add runs/real
    python docs/claims.py
"""
PLAN = f"""\
## What is tested, and how many seeds that takes

Tested is the difference {EXACT} − {REFERENCE} of equal seeds, on the last split, after one round of
10 local epochs: the setting of the paper's large models. First over all tasks of a group together,
which was fixed before all runs but the first four; then by task. Of n seeds whose differences have
the standard deviation s, a paired test at 5 % sees a difference d with a chance of
{100 * POWER:.0f} % if n ≥ (t(n−1; .975) + t(n−1; {POWER:g}))²·s²/d².
The table has the n for half a point, d = {DIFFERENCE:g}. Where fewer ran, "not seen" says little.
With 1,000 rows MiniLM learns nothing of CoLA (a Matthews correlation near 0), RTE (half are right)
and MRPC (two thirds of its pairs are paraphrases): there rows say nothing of methods.
"""
PLOT = f"""\
## Where exactness pays

![Gain against deviation](claims.svg)

Every pair of runs: what {EXACT} scores more than {REFERENCE}, against the share of the ideal update
that averaging missed in the last round, ‖ideal − averaged‖ / ‖ideal‖.
"""
METHODS = f"""\
## The methods beside each other

![Score against bytes](methods.svg)

Where at least {MANY} methods ran, or the assignments of Table 4. Score on the last split; what it
is above {REFERENCE} with equal seeds, with its 95 % interval where two seeds or more ran; the
deviation of the factors' product from the ideal update, before any residual (Frobenius norm); the
share of the ideal update that averaging, or a residual cut to a rank, leaves out in the last round;
bytes of all clients and rounds. The residual of `fedex-svd-N` is sent whole in the last round; that
of `fedex-svd-N-cut` (`recipes/real/truncation.yaml`) never is.
Seconds are not told: methods took over each other's first round. In the plot a point is a method in
one task, with clients alike or uneven.
"""


def kept(run: Run) -> dict[str, object]:
    """A line of the file: the run's own text files; of paths, the last name alone."""
    files: dict[str, str] = {}
    for name in FILES:
        path = run.path / name
        if path.is_file():
            files[name] = path.read_text()
            for folder in filter(None, (run.recipe.data.path, run.recipe.model.name)):
                if str(folder).startswith("/"):
                    files[name] = files[name].replace(str(folder), Path(folder).name)
    return {"run": "/".join(run.path.parts[-2:]), "files": files}


def add(folders: Sequence[Path], file: Path) -> str:
    runs, problems = read_runs(folders)
    lines = {line["run"]: line for line in map(json.loads, file.read_text().splitlines())}
    new = {line["run"]: line for line in (kept(run) for run in runs if run.finished)}
    lines |= new
    text = "".join(json.dumps(lines[name], ensure_ascii=False) + "\n" for name in sorted(lines))
    file.write_text(text)
    return "\n".join([f"{len(new)} runs added or replaced, {len(lines)} in all", *problems])


def unpacked(root: Path, file: Path) -> list[Run]:
    """The runs of the file, written below a folder and read as any others."""
    for line in map(json.loads, file.read_text().splitlines()):
        folder = root / line["run"]
        folder.mkdir(parents=True)
        for name, text in line["files"].items():
            (folder / name).write_text(text)
    return read_runs([root])[0]


def groups(runs: Sequence[Run]) -> dict[str, Study]:
    """Runs that may be taken together: one model, partition, number of rows, rounds, epochs, and
    rank; a method that ran at a rank at which the reference did not is beside the reference."""
    ranks: dict[str, set[int]] = {}
    for run in runs:
        if run.recipe.method.name == REFERENCE:
            ranks.setdefault(condition(run), set()).add(run.recipe.lora.r)
    found: dict[str, list[Run]] = {}
    for run in runs:
        rank, known = run.recipe.lora.r, ranks.get(condition(run), set())
        rank = min(known) if known and rank not in known else rank
        found.setdefault(f"{condition(run)}, rank {rank}", []).append(run)
    return {name: study(some) for name, some in found.items()}


def condition(run: Run) -> str:
    r = run.recipe
    length = f"{r.federation.rounds} × {r.training.get('num_train_epochs')} epochs"
    return (
        f"{model_name(r.model.name)}, {r.data.train_examples} rows, clients {dealt(run)}, {length}"
    )


def is_tested(run: Run) -> bool:
    """Whether it is of a method of the claims, with none of the options that go with any."""
    return is_plain(run) and run.recipe.method.name in (EXACT, REFERENCE, *BESIDE)


def named(part: Study) -> Study:
    """Its arms by what their runs' directories are called, as the rows of a grid are."""
    labels = (p.run.path.name.rpartition("-seed")[0] for p in part.placed)
    none: dict[str, Any] = {"settings": {}, "named": {}, "condition": {}}
    return Study(tuple(replace(p, label=label, **none) for p, label in zip(part.placed, labels)))


def seeds_needed(spread_: float, wanted: float = DIFFERENCE) -> int:
    """The fewest pairs with which a two-sided paired t-test at 5 % sees `wanted` with `POWER`.

    n ≥ (t(n−1; .975) + t(n−1; POWER))²·s²/d²; s is the standard deviation of the differences.

    Example:
        >>> seeds_needed(0.005), seeds_needed(0.01)
        (10, 34)
    """
    n = 2
    while n < (sum(stats.t.ppf([0.975, POWER], n - 1)) * spread_ / wanted) ** 2:
        n += 1
    return n


def differs(part: Study, task: str) -> list[float]:
    """fedex − fedit, a value a seed."""
    found = differences(
        part,
        lambda p: p.run.recipe.method.name == EXACT and p.task == task,
        lambda p: p.run.recipe.method.name == REFERENCE,
    )
    return [*found.get(task, [])]


def group(name: str, part: Study) -> Iterator[str]:
    """One table: a row a task, and what holds over all of them."""
    yield f"## {name}\n"
    yield setting(part.placed[0].run).split(" Data: ")[0] + "\n"
    arms = {p.run.recipe.method.name: p.arm for p in part.placed}
    others = [arms[m] for m in BESIDE if m in arms]
    header = ["task, metric", "seeds", REFERENCE, EXACT, f"{EXACT} less {REFERENCE}"]
    header += ["seeds for half a point", *(f"{arm} less {REFERENCE}" for arm in others), "missed"]
    rows = []
    for task in part.tasks:
        scores = {row.arm: [*row.by_split.values()][-1] for row in arm_scores(part, task)}
        pairs = differs(part, task)
        missed = [share[-1] for p in part.of(task) if (share := share_missed(p.run))]
        rows.append(
            [f"{task}, {judged_split(part.of(task)[0].run)}", str(len(pairs))]
            + [spread(scores[arms[m]]) for m in (REFERENCE, EXACT)]
            + [difference(part, arms[EXACT], task, arms[REFERENCE])]
            + [str(seeds_needed(stdev(pairs))) if len(pairs) > 1 else "-"]
            + [difference(part, arm, task, arms[REFERENCE]) for arm in others]
            + [spread(missed)]
        )
    yield markdown_table(header, rows)
    for task in part.tasks:
        if part.of(task)[0].run.recipe.task.generates:
            yield from further_metrics(part, task)
    if len(rows) > 1 and (over := paired(part, arms[EXACT], arms[REFERENCE])) is not None:
        yield f"Over these tasks: {over.verdict()}\n"


def draw(parts: Mapping[str, Study]) -> None:
    """The gain of every pair of runs against what averaging missed, as claims.svg."""
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for name, part in parts.items():
        ours, theirs = (
            {
                (p.task, p.seed): score
                for p in part.placed
                if p.run.recipe.method.name == method and (score := final_score(p.run)) is not None
            }
            for method in (EXACT, REFERENCE)
        )
        missed = {(p.task, p.seed): share for p in part.placed if (share := share_missed(p.run))}
        both = ours.keys() & theirs.keys() & missed.keys()
        points = [(missed[key][-1], ours[key] - theirs[key]) for key in sorted(both)]
        axes.scatter([x for x, _ in points], [y for _, y in points], s=12, label=name)
    axes.axhline(0, color="grey", linewidth=0.8)
    axes.set(
        xlabel="share of the ideal update that averaging misses", ylabel=f"{EXACT} − {REFERENCE}"
    )
    axes.legend(fontsize="small")
    figure.savefig(HERE / "claims.svg", metadata={"Date": None})


def left_out(run: Run) -> float | None:
    """‖what the last round's mean of products has and the clients are not given‖ / ‖that mean‖,
    over all layers; None where that is not what a method does."""
    last, method = run.records[-1], run.recipe.method.chosen
    if run.recipe.method.name == REFERENCE:
        rest = math.hypot(*last["deviation_by_site"].values())
    elif method.residual == "truncated" and not run.recipe.method.flush:
        rest = last["left_out"]
    else:
        return None
    return rest / math.hypot(*last["ideal_by_site"].values())


def many(parts: Mapping[str, Study]) -> Iterator[str]:
    """A table for every group and task in which many methods ran, and methods.svg of them all."""
    yield METHODS
    points: dict[str, list[tuple[float, float]]] = {}  # by method: MB, gain
    for name, part in parts.items():
        for task in part.tasks:
            arms = [row for row in arm_scores(part, task) if row.by_split]
            if len(arms) < MANY and not {row.arm for row in arms} >= ASSIGNMENTS:
                continue
            split = judged_split(part.of(task)[0].run)
            header = ["method", "seeds", "score", f"less {REFERENCE}", "deviation", "left out"]
            header += ["up", "down"]
            rows = []
            for arm in arms:
                scores = [*arm.by_split.values()][-1]
                sent = fmean(arm.bytes_up), fmean(arm.bytes_down)
                row = [arm.arm, str(len(scores)), spread(scores)]
                row += [difference(part, arm.arm, task, REFERENCE), significant(arm.deviation)]
                shares = [left_out(p.run) for p in part.of(task) if p.arm == arm.arm]
                row.append(spread([share for share in shares if share is not None]))
                rows.append(row + [size(value) for value in sent])
                found = paired(part, arm.arm, REFERENCE, task)
                if found is not None and arm.arm != "centralized":
                    points.setdefault(arm.arm, []).append((sum(sent) / 1e6, found.difference.mean))
            yield f"### {task}, {split}: {name}\n"
            yield markdown_table(header, rows)
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    marks = "ovs^D*Pph<>X8dH"
    for i, (arm, at) in enumerate(points.items()):
        axes.scatter(*zip(*at), s=24, marker=marks[i % len(marks)], label=arm, color=f"C{i % 10}")
    axes.axhline(0, color="grey", linewidth=0.8)
    axes.set(xlabel="MB up and down, all clients together", ylabel=f"score less {REFERENCE}'s")
    if points:
        axes.legend(fontsize="x-small", loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(HERE / "methods.svg", metadata={"Date": None})


def page(runs: Sequence[Run]) -> Iterator[str]:
    plt.rcParams["svg.hashsalt"] = "claims"  # the same files from the same runs
    compared = {
        name: part
        for name, part in groups([run for run in runs if is_tested(run)]).items()
        if {EXACT, REFERENCE} <= {p.run.recipe.method.name for p in part.placed}
    }
    yield ABOUT
    yield f"{len(runs)} runs.\n"
    yield PLAN
    for name, part in compared.items():
        yield from group(name, part)
    yield PLOT
    yield from layers(runs, HERE / "layers.svg")
    yield from many({name: named(part) for name, part in groups(runs).items()})
    for model in dict.fromkeys(run.recipe.model.name for run in runs):
        told = claims([run for run in runs if run.recipe.model.name == model], tested=True)
        yield from (text.replace("these runs", model_name(model)) for text in told)
    yield from environments(runs)
    draw(compared)


def script(about: str | None, kept: Path, page: Callable[[Sequence[Run]], Iterator[str]]) -> None:
    """The command line of a page that is written, beside `kept`, from the runs in it."""
    try:
        if sys.argv[1:2] == ["add"]:
            kept.touch()
            print(add([*map(Path, sys.argv[2:])], kept))
        elif sys.argv[1:]:
            sys.exit(about)
        else:
            with TemporaryDirectory() as folder:
                parts = page(unpacked(Path(folder), kept))
                text = "\n".join(part.rstrip("\n") + "\n" for part in parts if part)
            Path(sys.argv[0]).with_suffix(".md").write_text(text)
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    script(__doc__, KEPT, page)
