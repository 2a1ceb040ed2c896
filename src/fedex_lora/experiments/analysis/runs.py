"""Runs read back from their directories for analysis: records, results, and what is wrong."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from fedex_lora.errors import StorageError, UserError
from fedex_lora.federation.loop import Record
from fedex_lora.recipe import Recipe
from fedex_lora.runs.checkpoint import checkpoints
from fedex_lora.runs.rundir import DATA, RunDir

Shape = tuple[int, int]
_DEPTH = 4  # of directories that are searched for runs
_MAPPINGS = ("clients", "bytes_up", "bytes_down")  # by client, in every record


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
    environment, data = (_mapping(directory, name) for name in ("environment.json", DATA))
    said = results["description"] if results else data.get("description")
    said = said or _checkpoint_meta(path).get("description")
    return Run(path, recipe, tuple(records), results, environment, said, tuple(notes), data)


def _mapping(directory: RunDir, name: str) -> Mapping[str, Any]:
    found = directory.read_json(name)
    return found if isinstance(found, dict) else {}


def _records(file: Path) -> tuple[list[Record], list[str]]:
    try:
        lines = file.read_bytes().split(b"\n")
    except OSError:
        return [], []
    found: dict[int, Record] = {}
    notes = []
    for number, line in enumerate(lines, start=1):
        record = _record(line)
        if record is not None:
            found[record["round"]] = record
        elif line.strip():
            notes.append(f"metrics.jsonl: line {number} is damaged and left out")
    return [found[round] for round in sorted(found)], notes


def _record(line: bytes) -> Record | None:
    try:
        value = json.loads(line)
    except ValueError:
        return None
    if not isinstance(value, dict) or not isinstance(value.get("round"), int):
        return None
    return value if all(isinstance(value.get(k), dict) for k in _MAPPINGS) else None


def _is_results(value: Any) -> bool:
    best = value.get("best") if isinstance(value, dict) else None
    known = isinstance(best, dict) and isinstance(best.get("scores"), dict)
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
    for file in [
        *checkpoints(path / "checkpoints"),
        path / "final/adapter/adapter_model.safetensors",
    ]:
        shapes = _tensor_shapes(file)
        if sites := {**_pairs(shapes, "factors/{x}/", ""), **_peft_pairs(shapes)}:
            return sites
    return {}


def head_numbers(path: Path) -> int:
    """How many numbers the trained head has, from the newest checkpoint's header."""
    for file in checkpoints(path / "checkpoints"):
        shapes = _tensor_shapes(file)
        if shapes:
            heads = (s for name, s in shapes.items() if name.startswith("factors/head/"))
            return sum(_product(s) for s in heads)
    return 0


def _product(shape: Iterable[int]) -> int:
    product = 1
    for size in shape:
        product *= size
    return product


def _tensor_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    try:
        with safe_open(file, framework="numpy") as tensors:
            return {n: tuple(tensors.get_slice(n).get_shape()) for n in tensors.keys()}  # noqa: SIM118
    except (OSError, SafetensorError):
        return {}


def _pairs(shapes: Mapping[str, tuple[int, ...]], prefix: str, suffix: str) -> dict[str, Shape]:
    """(rows of B, columns of A) of every site that has both; `{x}` stands for A and B."""
    found = {}
    before, after = (prefix.format(x="A"), suffix.format(x="A"))
    for name, a in shapes.items():
        if not (name.startswith(before) and name.endswith(after)):
            continue
        site = name.removeprefix(before).removesuffix(after)
        b = shapes.get(prefix.format(x="B") + site + suffix.format(x="B"))
        if b is not None and len(a) == len(b) == 2:
            found[site] = (b[0], a[1])
    return found


def _peft_pairs(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Shape]:
    kinds = (".lora_{x}.weight", ".lora_embedding_{x}")
    return {s: v for kind in kinds for s, v in _pairs(shapes, "base_model.model.", kind).items()}


def _checkpoint_meta(path: Path) -> Mapping[str, Any]:
    """What was saved beside the newest checkpoint's state, from its header."""
    for file in checkpoints(path / "checkpoints"):
        try:
            with safe_open(file, framework="numpy") as tensors:
                extra = json.loads(tensors.metadata()["fedex"])["extra"]
        except (OSError, SafetensorError, KeyError, TypeError, ValueError):
            continue
        if isinstance(extra, dict):
            return extra
    return {}
