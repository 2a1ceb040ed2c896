"""Writes docs/results.md from runs: `python docs/results.py DIR... > docs/results.md`.

With --more before them it writes docs/results-more.md, of parts that ran elsewhere.
Each DIR holds runs that are compared with each other, as `compare` and `grid` leave them.
`make results DATA=DIR` runs what is missing first.
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import mean

from results_why import EXACT, REFERENCE, against_reference

from fedex_lora.errors import UserError
from fedex_lora.experiments.analysis.claims import CLAIMS
from fedex_lora.experiments.analysis.evidence import findings
from fedex_lora.experiments.analysis.runs import Run, read_runs, unused
from fedex_lora.experiments.analysis.scores import (
    ArmScores,
    arm_scores,
    chose_itself,
    differences,
    judged_metrics,
    judged_rows,
    metric_table,
    paired,
)
from fedex_lora.experiments.analysis.statistics import (
    Paired,
    change,
    estimate,
    spread,
    what_seeds_show,
)
from fedex_lora.experiments.analysis.study import Study, metric_of, study
from fedex_lora.experiments.compare import markdown_table
from fedex_lora.experiments.report.verdict import without_folder
from fedex_lora.recipe.reader import differences as differing

ABOUT = """\
# Results

Written by `docs/results.py` from the files of runs, not by hand. On local copies of the data, in
DIR/sst2, DIR/stsb, DIR/e2e_nlg, DIR/gsm8k and DIR/openbookqa, and a copy of stories260k, this runs
what is missing of them and writes the file again:

    make results DATA=DIR SMALL_LM=DIR/stories260k
"""
MORE = """\
# More results

Beside [results.md](results.md), on another machine: more parts of the grids that `make results`
runs, and a part of those once more. Written by `docs/results.py --more DIR...` from the files of
runs, not by hand. The claims are held against these runs alone.
"""
# Mean scores up to which a model knows nothing of a kind of task (the questions have four options)
GUESSED = {"math": 0.02, "commonsense": 0.3}
PATH = """\
With scores this low the model knows nothing of the task: these runs show that the path works from
end to end, and compare nothing. They are left out below.
"""
READING = """\
Scores are those of the best round, which the first split chooses: mean ± standard deviation over
the seeds. Differences are of the last split, over pairs of runs with equal seeds, with their 95 %
interval. Deviation is that of averaging the factors from the ideal update, in the last round; up
and down are the bytes of all clients together; seconds are those of training and evaluation on the
machine below, which may have had other work to do.
"""


def results(folders: Sequence[Path], about: str = ABOUT) -> Iterator[str]:
    """The parts of the page."""
    runs, problems = read_runs(folders)
    parts = {folder: study(read_runs([folder])[0]) for folder in folders}
    known = {f: part for f, part in parts.items() if not guessed(part)}
    yield about
    yield from unfinished(runs, problems)
    yield READING
    compared_in = {f: part for f, part in known.items() if REFERENCE in methods_of(part)}
    for folder, part in compared_in.items():
        for task in part.tasks:
            yield from compared(folder.name, part, task)
    yield from varied(compared_in, {f: p for f, p in known.items() if f not in compared_in})
    for folder, part in parts.items():
        if folder not in known:
            yield from path_alone(folder.name, part)
    yield from against_reference(compared_in)
    yield from claims([p.run for part in known.values() for p in part.placed])
    yield what_seeds_show(fewest_seeds(study(runs))) + "\n"
    yield from environments(runs)


def methods_of(part: Study) -> set[str]:
    return {p.run.recipe.method.name for p in part.placed}


def guessed(part: Study) -> bool:
    """Whether no arm's mean score is above what a model has that knows nothing of the task."""
    for task in part.tasks:
        limit = GUESSED.get(part.of(task)[0].run.recipe.task.kind)
        judged_by = [[*row.by_split.values()][-1:] for row in arm_scores(part, task)]
        found = [mean(scores) for splits in judged_by for scores in splits if scores]
        if limit is None or max(found, default=1.0) > limit:
            return False
    return True


def unfinished(runs: Sequence[Run], problems: Sequence[str]) -> Iterator[str]:
    """How many runs there are, and which of them are not finished."""
    left = [run for run in runs if not run.finished]
    yield f"{len(runs) - len(left)} finished runs" + (", without these:\n" if left else ".\n")
    if left or problems:
        told = [f"- {short(run.path)}: {'; '.join(run.notes) or 'unfinished'}" for run in left]
        yield "\n".join([*told, *(f"- {problem}" for problem in problems)]) + "\n"


def short(path: Path) -> str:
    return "/".join(path.parts[-2:])


def compared(name: str, part: Study, task: str) -> Iterator[str]:
    """One directory's runs: setting, table, and a sentence for every pair with the reference."""
    done = [p.run for p in part.of(task) if p.run.finished]
    yield f"## {name}\n"
    if not done:
        yield "No run is finished.\n"
        return
    yield setting(done[0]) + "\n"
    if chose_itself(done[0]) and sum("score" in r for r in done[0].records) > 1:
        yield "These rows also chose the best round, so that scores flatter.\n"
    for told in unused(done):
        yield f"{told}.\n"
    reference = reference_arm(part, task)
    yield scores_table(part, task, reference)
    yield from further_metrics(part, task)
    yield from sentences(part, task, reference)


def path_alone(name: str, part: Study) -> Iterator[str]:
    """Runs of a model that knows nothing of the task: their scores, and nothing made of them."""
    yield f"## {name}\n"
    for task in part.tasks:
        done = [p.run for p in part.of(task) if p.run.finished]
        yield setting(done[0]) + "\n"
        yield from (f"{told}.\n" for told in unused(done))
        yield PATH
        yield scores_table(part, task, None)


def scores_table(part: Study, task: str, reference: str | None) -> str:
    rows = [row for row in arm_scores(part, task) if len(row.seeds) > len(row.unfinished)]
    splits = list(dict.fromkeys(split for row in rows for split in row.by_split))
    metric = metric_of(part.of(task)[0].run)[0]
    header = ["method", "seeds", *(f"{split} {metric}" for split in splits)]
    header += [f"less {reference}"] * (reference is not None)
    header += ["deviation", "up", "down", "seconds"]
    return markdown_table(header, [line(row, splits, part, task, reference) for row in rows])


def further_metrics(part: Study, task: str) -> Iterator[str]:
    """All metrics of the judged split beside the loss, where there is more than the one."""
    names, rows = metric_table(part, task, but=("loss",))
    if len(names) < 2:
        return
    results = next(p.run.results for p in part.of(task) if p.run.results)
    yield f"All metrics, {judged_rows(results)}:\n"
    yield markdown_table(["method", *names], rows)
    others = [name for name in names if name != results["metric"]]
    yield "".join(f"- {told}\n" for name in others if (told := metric_told(part, task, name)))


def metric_told(part: Study, task: str, name: str) -> str:
    """The exact method against the reference by one metric, in a sentence."""
    found = differences(
        part,
        lambda p: p.run.recipe.method.name == EXACT and p.task == task,
        lambda p: p.run.recipe.method.name == REFERENCE,
        lambda run: judged_metrics(run).get(name),
    )
    if not found:
        return ""
    return f"{name}: {Paired(EXACT, REFERENCE, estimate(found), name != 'perplexity').verdict()}"


def setting(run: Run) -> str:
    """What all runs of a table have in common."""
    r = run.recipe
    dealt = r.federation.partition.model_dump(exclude_none=True)
    kind = dealt.pop("kind")
    parts = [f"partition {kind}", *(f"{k} {v}" for k, v in dealt.items())]
    trained = r.lora.target_modules
    where = trained if isinstance(trained, str) else ", ".join(trained or ["PEFT's choice"])
    rounds = f"{r.federation.rounds} round{'s' * (r.federation.rounds > 1)}"
    training = ", ".join(f"{k} {v}" for k, v in r.training.items())
    head = f", and {', '.join(r.lora.modules_to_save)}" if r.lora.modules_to_save else ""
    return (
        f"{model_name(r.model.name)}; LoRA of rank {r.lora.r}, α {r.lora.lora_alpha:g}, on {where}"
        f"{head}; {r.federation.clients} clients, {rounds}, {', '.join(parts)}; {training}. "
        f"Data: {without_folder(run.description or '')}."
    )


def model_name(name: str) -> str:
    """A hub id or package as it is; of a directory here only its own name."""
    return Path(name).name if name.startswith(("/", ".", "~")) else name


def line(
    row: ArmScores, splits: Sequence[str], part: Study, task: str, reference: str | None
) -> list[str]:
    finished = [seed for seed in row.seeds if seed not in row.unfinished]
    scores = [spread(row.by_split[s]) if row.by_split.get(s) else "-" for s in splits]
    costs = row.costs(not part.of(task, row.arm)[0].method.pooled)
    less = [difference(part, row.arm, task, reference)] * (reference is not None)
    return [row.arm, ", ".join(map(str, finished)), *scores, *less, *costs]


def reference_arm(part: Study, task: str) -> str | None:
    arms = [p.arm for p in part.of(task) if p.run.recipe.method.name == REFERENCE]
    return arms[0] if arms else None


def difference(part: Study, arm: str, task: str, reference: str | None) -> str:
    """Less the reference, with its interval."""
    if reference in (None, arm) or (found := paired(part, arm, reference, task)) is None:
        return "-"
    return change(found.difference)


def sentences(part: Study, task: str, reference: str | None) -> Iterator[str]:
    """What may be said of each arm against the reference."""
    if reference is None:
        yield f"No run of {REFERENCE} to compare with.\n"
        return
    arms = [arm for arm in part.of_arms(task) if arm != reference]
    pairs = (paired(part, arm, reference, task) for arm in arms)
    yield "".join(f"- {pair.verdict()}\n" for pair in pairs if pair is not None)


def varied(compared_in: Mapping[Path, Study], others: Mapping[Path, Study]) -> Iterator[str]:
    """Runs of one method alone, beside those of that method that differ from them the least."""
    groups: dict[Path | None, list[Path]] = {}
    for folder, part in others.items():
        groups.setdefault(nearest(part, compared_in), []).append(folder)
    for base, folders in groups.items():
        names = set().union(*(methods_of(others[folder]) for folder in folders))
        runs = [p.run for f in folders for p in others[f].placed]
        beside = compared_in[base].placed if base else ()
        own = [p.run for p in beside if p.run.recipe.method.name in names]
        part = study([*own, *runs])
        told = ", ".join(folder.name for folder in folders)
        yield f"## {told}\n"
        if base:
            yield f"Beside the same method's runs of {base.name}.\n"
        for task in part.tasks:
            if any(p.run.finished for p in part.of(task)):
                first = {p.run.path for p in beside}
                arms = [p.arm for p in part.of(task) if p.run.path in first]
                yield scores_table(part, task, arms[0] if arms else None)


def nearest(part: Study, compared_in: Mapping[Path, Study]) -> Path | None:
    """The directory whose runs of the same method and task differ in the fewest settings."""
    one = part.placed[0].run.recipe
    distances = {
        folder: len(differing(one, p.run.recipe))
        for folder, known in compared_in.items()
        for p in known.placed
        if (p.run.recipe.method, p.run.recipe.task) == (one.method, one.task) and p.seed == one.seed
    }
    return min(distances, key=lambda folder: distances[folder], default=None)


def claims(runs: Sequence[Run], tested: bool = False) -> Iterator[str]:
    """The paper's claims, held against these runs; tasks of one kind are taken together.

    Args:
        tested: Whether to leave out what these runs do not test.
    """
    if not runs:
        return
    yield "## The paper's claims, held against these runs\n"
    texts = {claim.number: f"{claim.text} ({claim.where})" for claim in CLAIMS}
    kinds = list(dict.fromkeys(run.recipe.task.kind for run in runs))
    for kind in kinds:
        whole = study([run for run in runs if run.recipe.task.kind == kind])
        if len(kinds) > 1:
            yield f"### {kind}: {', '.join(whole.tasks)}\n"
        tested = tested or len(kinds) > 1
        found = [f for f in findings(whole) if f.outcome != "not tested" or not tested]
        for number, text in texts.items():
            parts = [f for f in found if f.claim == number]
            told = "".join(f"   - {f.part}: **{f.outcome}**. {f.evidence}\n" for f in parts)
            yield from [f"{number}. {text}\n{told}"] * bool(parts)


def fewest_seeds(whole: Study) -> int:
    """Of the arms that have an interval."""
    counts = [
        sum(p.run.finished for p in whole.of(task, arm))
        for task in whole.tasks
        for arm in whole.arms
    ]
    return min((count for count in counts if count > 1), default=max(counts, default=0))


def environments(runs: Sequence[Run]) -> Iterator[str]:
    """Versions and device; every one there was."""
    told = []
    for run in runs:
        known = run.environment
        packages = ", ".join(f"{k} {v}" for k, v in known.get("packages", {}).items())
        device = f"{known.get('device')}, {known.get('threads')} thread(s)"
        told.append(f"- Python {known.get('python')}, {packages}; {device}\n")
    yield "## Environment\n"
    yield "".join(dict.fromkeys(told))


if __name__ == "__main__":
    more = sys.argv[1:2] == ["--more"]
    folders = [*map(Path, sys.argv[1 + more :])]
    if not folders:
        sys.exit(__doc__)
    try:
        parts = results(folders, MORE if more else ABOUT)
        print("\n".join(part.rstrip("\n") + "\n" for part in parts if part))
    except UserError as error:
        sys.exit(f"error: {error}")
