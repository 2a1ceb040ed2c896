"""Writes docs/results.md from runs: `python docs/results.py DIR... > docs/results.md`.

Each DIR holds runs that are compared with each other, as `compare` and `grid` leave them.
`make results DATA=DIR` runs what is missing first.
"""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from fedex_lora.analysis.claims import CLAIMS, findings
from fedex_lora.analysis.runs import Run, read_runs
from fedex_lora.analysis.scores import ArmScores, arm_scores, paired
from fedex_lora.analysis.statistics import what_seeds_show
from fedex_lora.analysis.study import Study, metric_of, study
from fedex_lora.compare import markdown_table, size, spread
from fedex_lora.errors import UserError
from fedex_lora.report.setting import without_folder

REFERENCE = "fedit"  # what is compared with

ABOUT = """\
# Results

Written by `docs/results.py` from the files of runs, not by hand. On local copies of the data, in
DIR/sst2, DIR/stsb and DIR/e2e_nlg, and a copy of stories260k, this runs what is missing of them
and writes the file again:

    make results DATA=DIR SMALL_LM=DIR/stories260k
"""
EXACT = "fedex"
SHARE = f"""\
The share of the ideal product that averaging the factors misses, ‖ideal − averaged‖ / ‖ideal‖ over
all adapted layers, in runs of {REFERENCE}; and the difference of the scores, as in the tables.
"""
READING = """\
Scores are those of the best round, which the first split chooses: mean ± standard deviation over
the seeds. Differences are of the last split, over pairs of runs with equal seeds, with their 95 %
interval. Deviation is that of averaging the factors from the ideal update, in the last round; up
and down are the bytes of all clients together; seconds are those of training and evaluation on the
machine below, which may have had other work to do.
"""


def results(folders: Sequence[Path]) -> Iterator[str]:
    """The parts of the page."""
    runs, problems = read_runs(folders)
    whole = study(runs)
    yield ABOUT
    yield from unfinished(runs, problems)
    yield READING
    for folder in folders:
        part = study(read_runs([folder])[0])
        for task in part.tasks:
            yield from compared(folder.name, part, task)
    yield from missed(folders)
    yield from claims(whole)
    yield what_seeds_show(fewest_seeds(whole)) + "\n"
    yield from environments(runs)


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
    rows = [row for row in arm_scores(part, task) if len(row.seeds) > len(row.unfinished)]
    splits = list(dict.fromkeys(split for row in rows for split in row.by_split))
    metric = metric_of(done[0])[0]
    header = ["method", "seeds", *(f"{split} {metric}" for split in splits)]
    header += [f"less {REFERENCE}", "deviation", "up", "down", "seconds"]
    yield markdown_table(header, [line(row, splits, part, task) for row in rows])
    yield from sentences(part, task, [row.arm for row in rows])


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
        f"{r.model.name}; LoRA of rank {r.lora.r}, α {r.lora.lora_alpha:g}, on {where}{head}; "
        f"{r.federation.clients} clients, {rounds}, {', '.join(parts)}; "
        f"{training}. Data: {without_folder(run.description or '')}."
    )


def line(row: ArmScores, splits: Sequence[str], part: Study, task: str) -> list[str]:
    finished = [seed for seed in row.seeds if seed not in row.unfinished]
    scores = [spread(row.by_split[s]) if row.by_split.get(s) else "-" for s in splits]
    sent = [size(sum(v) / len(v)) if v else "-" for v in (row.bytes_up, row.bytes_down)]
    seconds = f"{sum(row.seconds) / len(row.seconds):.0f}" if row.seconds else "-"
    seeds = ", ".join(map(str, finished))
    deviation = spread(row.deviation) if row.deviation else "-"
    return [row.arm, seeds, *scores, difference(part, row.arm, task), deviation, *sent, seconds]


def reference_arm(part: Study, task: str) -> str | None:
    arms = [p.arm for p in part.of(task) if p.run.recipe.method.name == REFERENCE]
    return arms[0] if arms else None


def difference(part: Study, arm: str, task: str) -> str:
    """Less the reference, with its interval."""
    reference = reference_arm(part, task)
    if reference in (None, arm) or (found := paired(part, arm, reference, task)) is None:
        return "-"
    d = found.difference
    if d.interval is None:
        return f"{d.mean:+.3f}"
    return f"{d.mean:+.3f} ({d.interval[0]:+.3f} to {d.interval[1]:+.3f})"


def sentences(part: Study, task: str, arms: Sequence[str]) -> Iterator[str]:
    """What may be said of each arm against the reference."""
    reference = reference_arm(part, task)
    if reference is None:
        yield f"No run of {REFERENCE} to compare with.\n"
        return
    pairs = (paired(part, arm, reference, task) for arm in arms if arm != reference)
    yield "".join(f"- {pair.verdict()}\n" for pair in pairs if pair is not None)


def missed(folders: Sequence[Path]) -> Iterator[str]:
    """How much of the ideal update averaging misses, beside what exact aggregation gains."""
    header = ["runs", "first round", "last round", f"{EXACT} less {REFERENCE}"]
    rows = []
    for folder in folders:
        part = study(read_runs([folder])[0])
        for task in part.tasks:
            shares = [found for p in part.of(task) if (found := share_missed(p.run))]
            if shares and (gain := gained(part, task)):
                ends = [spread([s[i] for s in shares]) for i in (0, -1)]
                rows.append([folder.name, *ends, gain])
    if rows:
        yield f"## What averaging misses, and what {EXACT} gains by it\n"
        yield SHARE
        yield markdown_table(header, rows)


def share_missed(run: Run) -> list[float]:
    """‖ideal − averaged‖_F / ‖ideal‖_F of every round, where the averaged model was trained on."""
    if run.recipe.method.name != REFERENCE or not run.finished:
        return []
    return [r["deviation"] / r["ideal"] for r in run.records if r.get("ideal")]


def gained(part: Study, task: str) -> str:
    arms = {p.run.recipe.method.name: p.arm for p in part.of(task)}
    return difference(part, arms[EXACT], task) if EXACT in arms else ""


def claims(whole: Study) -> Iterator[str]:
    """The paper's claims, held against all these runs."""
    texts = {claim.number: f"{claim.text} ({claim.where})" for claim in CLAIMS}
    yield "## The paper's claims, held against these runs\n"
    found = findings(whole)
    for number, text in texts.items():
        parts = [f for f in found if f.claim == number]
        told = "".join(f"   - {f.part}: **{f.outcome}**. {f.evidence}\n" for f in parts)
        yield f"{number}. {text}\n{told}"


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
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    try:
        print("\n".join(part.rstrip("\n") + "\n" for part in results([*map(Path, sys.argv[1:])])))
    except UserError as error:
        sys.exit(f"error: {error}")
