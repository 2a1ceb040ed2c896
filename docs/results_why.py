"""The part of docs/results.md on where exact aggregation gains, and what averaging misses there."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

from fedex_lora.experiments.analysis.runs import Run
from fedex_lora.experiments.analysis.scores import paired
from fedex_lora.experiments.analysis.statistics import Paired, change, spread
from fedex_lora.experiments.analysis.study import Study
from fedex_lora.experiments.compare import markdown_table

REFERENCE = "fedit"  # what is compared with
EXACT = "fedex"
SHARE = f"""\
The share of the ideal product that averaging the factors misses, ‖ideal − averaged‖ / ‖ideal‖ over
all adapted layers, in runs of {REFERENCE}; and the difference of the scores, as in the tables. Rows
are in the order of the share missed in the last round.
"""
WHY = f"""\
What {REFERENCE} drops in a round is not lost for good: clients train on from the averaged model.
What is dropped in the last round, nothing makes up for.
"""


@dataclass(frozen=True)
class Gain:
    """What averaging misses in one directory, by run, and what exact aggregation gains there."""

    name: str
    setting: str
    first: list[float]
    last: list[float]
    pair: Paired


def gains(parts: Mapping[Path, Study]) -> list[Gain]:
    """In the order of what is missed in the last round."""
    every = [(folder, part, task) for folder, part in parts.items() for task in part.tasks]
    found = [g for where in every if (g := gain(*where)) is not None]
    return sorted(found, key=lambda g: sum(g.last) / len(g.last))


def gain(folder: Path, part: Study, task: str) -> Gain | None:
    """None where one of the two has no finished run."""
    arms = {p.run.recipe.method.name: p.arm for p in part.of(task)}
    if not {EXACT, REFERENCE} <= arms.keys():
        return None
    shares = [s for p in part.of(task) if (s := share_missed(p.run))]
    pair = paired(part, arms[EXACT], arms[REFERENCE], task)
    if not shares or pair is None:
        return None
    first, last = ([s[i] for s in shares] for i in (0, -1))
    return Gain(folder.name, in_short(part.of(task, arms[REFERENCE])[0].run), first, last, pair)


def in_short(run: Run) -> str:
    """What the deviation depends on: "5 × 3, 0.001"."""
    training = run.recipe.training
    epochs, rate = (training.get(key, "-") for key in ("num_train_epochs", "learning_rate"))
    return f"{run.recipe.federation.rounds} × {epochs}, {rate}"


def share_missed(run: Run) -> list[float]:
    """‖ideal − averaged‖_F / ‖ideal‖_F of every round, where the averaged model was trained on."""
    if run.recipe.method.name != REFERENCE or not run.finished:
        return []
    return [r["deviation"] / r["ideal"] for r in run.records if r.get("ideal")]


def against_reference(parts: Mapping[Path, Study]) -> Iterator[str]:
    """Where exact aggregation is seen to beat averaging, where not, and what goes with it."""
    if not (found := gains(parts)):
        return
    yield f"## {EXACT} against {REFERENCE}, and why\n"
    yield f"{outcomes(found)}\n"
    yield SHARE
    header = ["runs", "rounds × epochs, learning rate", "first round", "last round"]
    header += [f"{EXACT} less {REFERENCE}"]
    rows = [
        [g.name, g.setting, spread(g.first), spread(g.last), change(g.pair.difference)]
        for g in found
    ]
    yield markdown_table(header, rows)
    yield f"{going_with(found)} {WHY}".lstrip()


def outcomes(found: Sequence[Gain]) -> str:
    """In how many of the settings there is which outcome."""
    words = {
        "better": f"{EXACT} beats {REFERENCE}",
        "worse": f"{REFERENCE} beats {EXACT}",
        "none": "no difference is seen",
        "unknown": "there are too few seeds to tell",
    }
    told = []
    for outcome, text in words.items():
        names = [g.name for g in found if g.pair.outcome == outcome]
        if names:
            told.append(f"in {len(names)} {text} ({', '.join(names)})")
    return f"Of {len(found)} settings, {'; '.join(told)}."


def going_with(found: Sequence[Gain]) -> str:
    """How often more is gained where more is missed."""
    pairs = list(combinations(found, 2))
    both = sum(a.pair.difference.mean < b.pair.difference.mean for a, b in pairs)
    if not pairs:
        return ""
    return (
        f"Of the {len(pairs)} pairs of settings, in {both} {EXACT} gains more where averaging "
        "misses more in the last round."
    )
