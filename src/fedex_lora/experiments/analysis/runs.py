"""Runs read back from their directories for analysis: records, results, and what is wrong."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from fedex_lora.errors import StorageError, UserError
from fedex_lora.federation.record import Record
from fedex_lora.recipe import Recipe
from fedex_lora.recipe.reader import leaves
from fedex_lora.runs.checkpoint import checkpoints
from fedex_lora.runs.rundir import DATA, RunDir
from fedex_lora.runs.spent import attacked, sentences

Shape = tuple[int, int]
_DEPTH = 4  # of directories that are searched for runs
_MAPPINGS = ("clients", "bytes_up", "bytes_down")  # by client, in every record
_FACTOR = re.compile(  # in a checkpoint, or in an exported adapter
    r"factors/(?P<half>[AB])/(?P<site>.+)"
    r"|base_model\.model\.(?P<site_>.+)\.lora_(embedding_)?(?P<half_>[AB])(\.weight)?"
)
_UNUSED = {
    "left_out": "{of} were left out: too long, or of no use to the task",
    "not_asked": "{of} count as wrong: their prompt alone fills the length there is",
}


@dataclass(frozen=True)
class Run:
    """What a run's directory says, finished or not.

    Attributes:
        records: One a round, ascending; damaged lines are left out.
        results: What results.json says; None while the run is not finished.
        description: The data that were used, with the rows of each split, where it is known.
        data: What data.json says: how many rows could not be used. Empty for runs without it.
        notes: What is missing or damaged, for people.
    """

    path: Path
    recipe: Recipe
    records: tuple[Record, ...]
    results: Mapping[str, Any] | None
    environment: Mapping[str, Any]
    description: str | None
    notes: tuple[str, ...] = ()
    data: Mapping[str, Any] = field(default_factory=dict)

    @property
    def finished(self) -> bool:
        return self.results is not None

    @cached_property
    def settings(self) -> Mapping[str, Any]:
        """The recipe by dotted keys."""
        return dict(leaves(self.recipe.model_dump(mode="json")))

    def bytes_by_round(self) -> list[int]:
        """Bytes up and down of all clients together, by record."""
        return [sum(r["bytes_up"].values()) + sum(r["bytes_down"].values()) for r in self.records]


def read_runs(paths: Sequence[Path]) -> tuple[list[Run], list[str]]:
    """The runs in the given directories, each once, and what could not be read.

    Args:
        paths: Each a run's directory, or one that has runs below it.

    Raises:
        UserError: There is no run at all.
    """
    runs: dict[Path, Run] = {}
    problems: list[str] = []
    for path in paths:
        found = [path] if RunDir(path).is_run() else _runs_within(path)
        if not found:
            problems.append(f"{path}: no run there (no recipe.yaml)")
        for directory in found:
            try:
                runs.setdefault(directory.resolve(), read_run(directory))
            except UserError as error:
                problems.append(f"{directory}: left out, its recipe cannot be read: {error}")
    if not runs:
        raise StorageError(
            "\n".join(problems)
            + "\nName a run's directory, or one whose subdirectories are runs (of `compare`)"
        )
    return list(runs.values()), problems


def _runs_within(path: Path, depth: int = _DEPTH) -> list[Path]:
    """Runs below a directory, but none within another run."""
    try:
        children = sorted(p for p in path.iterdir() if p.is_dir())
    except OSError:
        return []
    found = []
    for child in children:
        if RunDir(child).is_run():
            found.append(child)
        elif depth > 1:
            found += _runs_within(child, depth - 1)
    return found


def read_run(path: Path) -> Run:
    """One run's directory.

    Raises:
        UserError: It holds no run, or a recipe that this version cannot read.
    """
    directory = RunDir(path)
    recipe = directory.recipe()
    records, notes = _records(path / "metrics.jsonl")
    results = directory.read_json("results.json")
    if results is not None and not _is_results(results):
        notes.append("results.json is damaged; the run counts as unfinished")
        results = None
    notes += _progress(records, recipe, results is not None)
    notes += sentences(records[-1].get("privacy") if records else None)
    notes += attacked(_mapping(directory.read_json("attack.json")))
    environment, data = (_mapping(directory.read_json(name)) for name in ("environment.json", DATA))
    said = results["description"] if results else data.get("description")
    said = said or _described(path)
    return Run(path, recipe, tuple(records), results, environment, said, tuple(notes), data)


def _described(path: Path) -> str | None:
    """The data, by what was saved beside the newest checkpoint's state."""
    for file in checkpoints(path / "checkpoints"):
        try:
            return json.loads(_header(file)[1]["fedex"])["extra"].get("description")
        except (KeyError, TypeError, ValueError, AttributeError):
            continue
    return None


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _records(file: Path) -> tuple[list[Record], list[str]]:
    try:
        lines = file.read_bytes().split(b"\n")
    except OSError:
        return [], []
    found: dict[int, Record] = {}
    notes = []
    for number, line in enumerate(lines, start=1):
        try:
            value = _mapping(json.loads(line))
        except ValueError:
            value = {}
        whole = all(isinstance(value.get(k), dict) for k in _MAPPINGS)
        if whole and isinstance(value.get("round"), int):
            found[value["round"]] = dict(value)
        elif line.strip():
            notes.append(f"metrics.jsonl: line {number} is damaged and left out")
    return [found[round] for round in sorted(found)], notes


def _is_results(value: Any) -> bool:
    known = isinstance(_mapping(_mapping(value).get("best")).get("scores"), dict)
    return known and {"metric", "description", "rounds", "best_round"} <= value.keys()


def _progress(records: Sequence[Record], recipe: Recipe, finished: bool) -> Iterator[str]:
    """Whether rounds are missing, and how far an unfinished run is."""
    rounds, planned = [r["round"] for r in records], recipe.federation.rounds
    if missing := sorted(set(range(1, max(rounds, default=0))) - set(rounds)):
        yield f"no record of round {', '.join(map(str, missing))}"
    if not rounds:
        yield "no round is recorded" + ("" if finished else " yet")
    elif not finished:
        yield f"unfinished: {max(rounds)} of {planned} rounds"


def site_shapes(path: Path) -> dict[str, Shape]:
    """(out, in) of every adapted layer, from the headers of the run's tensors; no model is loaded.

    From the newest checkpoint that can be read, else the exported adapter, in whose files an
    embedding's shape is transposed; m·n and m + n are the same.
    """
    exported = path / "final/adapter/adapter_model.safetensors"
    for file in [*checkpoints(path / "checkpoints"), exported]:
        halves: dict[str, dict[str, tuple[int, ...]]] = {}
        for name, shape in _header(file)[0].items():
            if (match := _FACTOR.fullmatch(name)) and len(shape) == 2:
                site, half = match["site"] or match["site_"], match["half"] or match["half_"]
                halves.setdefault(site, {})[half] = shape
        layers = {s: (h["B"][0], h["A"][1]) for s, h in halves.items() if len(h) == 2}
        if layers:
            return layers
    return {}


def head_numbers(path: Path) -> int:
    """How many numbers the trained head has, from the newest checkpoint's header."""
    headers = (_header(file)[0] for file in checkpoints(path / "checkpoints"))
    shapes = next(filter(None, headers), {})
    return sum(math.prod(s) for name, s in shapes.items() if name.startswith("factors/head/"))


def _header(file: Path) -> tuple[dict[str, tuple[int, ...]], Mapping[str, str]]:
    """Shapes by name, and the metadata; nothing of a file that cannot be read."""
    try:
        with safe_open(file, framework="numpy") as tensors:
            shapes = {n: tuple(tensors.get_slice(n).get_shape()) for n in tensors.keys()}  # noqa: SIM118
            return shapes, tensors.metadata() or {}
    except (OSError, SafetensorError):
        return {}, {}


def unused(runs: Sequence[Run]) -> list[str]:
    """A sentence for every kind of rows that could not all be used; counts as they are in the runs,
    from the fewest to the most.

    Args:
        runs: Of one task.
    """
    found: dict[tuple[str, str], list[tuple[int, int]]] = {}
    for run in runs:
        parts = {
            "training rows": run.data.get("training"),
            "rows of the clients’ own": run.data.get("own"),
        }
        for split, told in _mapping(run.data.get("evaluation")).items():
            parts[f"{split} rows"] = {split: told}
        for rows, part in parts.items():
            told = [t for t in _mapping(part).values() if isinstance(t, dict)]
            for what in _UNUSED:
                count, of = (sum(t.get(key, 0) for t in told) for key in (what, "rows"))
                found.setdefault((rows, what), []).append((count, of))
    return [
        _UNUSED[what].format(of=f"{_range(c for c, _ in n)} of {_range(t for _, t in n)} {rows}")
        for (rows, what), n in found.items()
        if any(count for count, _ in n)
    ]


def _range(counts: Iterable[int]) -> str:
    there = sorted(counts)
    return f"{there[0]}" if there[0] == there[-1] else f"{there[0]} to {there[-1]}"
