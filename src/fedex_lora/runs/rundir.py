"""A run directory: recipe, environment, one line a round, checkpoints, updates, the result."""

from __future__ import annotations

import itertools
import json
import math
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from safetensors import SafetensorError
from safetensors.torch import save

from fedex_lora.aggregation.adapter import AdapterState
from fedex_lora.disk import parsed, reason, write_atomic
from fedex_lora.errors import StorageError
from fedex_lora.federation.codec import ledger_tensors
from fedex_lora.federation.record import Record
from fedex_lora.federation.settings import Settings
from fedex_lora.federation.state import ServerState, start_of
from fedex_lora.model.adapted import AdaptedModel
from fedex_lora.recipe import Recipe
from fedex_lora.recipe.reader import differences, dump_recipe, recipe_of_text
from fedex_lora.runs.checkpoint import by_round, latest, load_checkpoint
from fedex_lora.runs.lock import LOCK, OWNER, locked
from fedex_lora.runs.registered import stored_recipe
from fedex_lora.runs.saved import (
    COMPARISON,
    ENDS,
    EVALUATED,
    EXTENSIONS,
    MAPPING,
    RECORD,
    RESULTS,
    SAVED,
    WHOLE,
    checked,
)

DATA = "data.json"  # what the rows were, and how many of them could not be used
SCORES = "scores.json"  # of an evaluation
EXTENDED = "extended.json"  # of a run that got more rounds when it was finished
BY_HAND = "by-hand.json"  # of a run whose messages people carry: what was sent out
OUTPUTS = "outputs"  # the folder of generated texts: ROUND/SPLIT.jsonl
PACKAGES = ("fedex-lora", "torch", "transformers", "peft", "datasets", "flwr-datasets", "numpy")


class RunDir:
    """The files of one run.

    Attributes:
        path: The directory.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.final = path / "final"

    def check_free(self) -> None:
        """Raises a `UserError` if a new run may not be put here.

        What is left where a process was killed before it wrote the recipe is in nobody's way.
        """
        if self.is_run():
            raise StorageError(
                f"{self.path}: holds another run; name another directory with `out`, or continue "
                f"that run with `fedex-lora resume {self.path}`"
            )
        try:
            there = list(self.path.iterdir()) if self.path.is_dir() else []
        except OSError as error:
            raise StorageError(f"{self.path}: cannot be read: {reason(error)}") from None
        above = next(path for path in (self.path, *self.path.parents) if path.exists())
        if any(map(_precious, there)) or (above == self.path and not above.is_dir()):
            raise StorageError(f"{self.path}: is in use; name a new or empty directory with `out`")
        if not (above.is_dir() and os.access(above, os.W_OK)):
            raise StorageError(f"{above}: no directory to write into; name another with `out`")

    @contextmanager
    def held(self) -> Iterator[None]:
        """The directory, made if it is not there, while no other process may write into it.

        Raises:
            UserError: Another one does, which is named; or it cannot be written.
        """
        self.make(self.path)
        with locked(self.path):
            yield

    def create(self, recipe: Recipe) -> None:
        """Makes the directory for a new run; the recipe comes first, and makes it one.

        Raises:
            UserError: It exists and is not empty, or cannot be written.
        """
        self.check_free()
        self.make(self.path)
        write_atomic(self.path / "recipe.yaml", dump_recipe(recipe).encode())
        self.prepare()

    def prepare(self) -> None:
        """Makes what a run writes into; where a new one was killed it may not be there.

        Raises:
            UserError: It cannot be made.
        """
        self.make(self.checkpoints)

    def make(self, folder: Path) -> None:
        """Makes the directory, or a folder in it, if it is not there.

        Raises:
            UserError: It cannot be made.
        """
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(
                f"{self.path}: cannot be made: {reason(error)}; name a directory that you may "
                "write with `out`"
            ) from None

    def is_run(self) -> bool:
        return (self.path / "recipe.yaml").is_file()

    def recipe(self) -> Recipe:
        """The resolved recipe of the run.

        Raises:
            UserError: The directory holds no run.
        """
        if not self.is_run():
            raise StorageError(f"{self.path}: no run there (no recipe.yaml)")
        return stored_recipe(self.path / "recipe.yaml", self.read_json("environment.json"))

    def write_json(self, name: str, value: object) -> None:
        write_atomic(self.path / name, (json.dumps(plain(value), indent=1) + "\n").encode())

    def read_json(self, name: str) -> Any:
        """What the file holds; None if it is absent or no JSON (a crash or a hand got at it)."""
        try:
            return parsed((self.path / name).read_bytes())
        except (OSError, ValueError):
            return None

    def results(self, whole: bool = False) -> dict[str, Any] | None:
        """What results.json says; None while the run is not finished, or if that is no JSON.

        Args:
            whole: Whether the last round and the rounds' numbers are needed as well.

        Raises:
            UserError: It is JSON, but no results.
        """
        needed = ENDS if whole else ()
        return self._json("results.json", RESULTS, needed)

    def comparison(self) -> dict[str, list[dict[str, Any]]]:
        """What comparison.json says, by method and seed; nothing if there is none.

        Raises:
            UserError: It is JSON, but no comparison.
        """
        return self._json("comparison.json", COMPARISON) or {}

    def evaluated(self) -> dict[str, Any] | None:
        """What scores.json says; None if there is none.

        Raises:
            UserError: It is JSON, but no scores.
        """
        return self._json(SCORES, EVALUATED)

    def extensions(self) -> list[dict[str, int]]:
        """From how many rounds to how many the run was extended, once for every time.

        Raises:
            UserError: The file is there, and says something else.
        """
        return self._json(EXTENDED, EXTENSIONS) or []

    def edited(self, recipe: Recipe, extra: Mapping[str, Any]) -> list[str]:
        """How recipe.yaml differs from the recipe that was saved beside a state, if one was, by
        other than extensions of the run."""
        text = extra.get("recipe")
        if text is None:
            return []
        then, parts = recipe_of_text(text), self.extensions()
        known = {recipe.federation.rounds, then.federation.rounds}
        known -= {rounds for part in parts for rounds in part.values()}
        found = differences(recipe, then)
        return [text for text in found if known or not text.startswith("federation.rounds:")]

    def environment(self) -> dict[str, Any] | None:
        """What environment.json says; None if there is none.

        Raises:
            UserError: It is JSON, but no environment.
        """
        return self._json("environment.json", MAPPING)

    def _json(self, name: str, kind: TypeAdapter[Any], needed: Sequence[str] = ()) -> Any:
        value = self.read_json(name)
        remedy = "delete the file; it is made anew"
        return None if value is None else checked(kind, value, self.path / name, remedy, needed)

    def records(self, whole: bool = False) -> list[Record]:
        """One record a round.

        Args:
            whole: Whether all is needed that totals and tables are made of.

        Raises:
            UserError: A line is no record; it is named.
        """
        file = self.path / "metrics.jsonl"
        try:
            lines = file.read_bytes().split(b"\n") if file.is_file() else []
        except OSError as error:
            raise StorageError(f"{file}: cannot be read: {reason(error)}") from None
        needed = WHOLE if whole else ()
        records, remedy = [], "delete the lines that are no records"
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                value = parsed(line)
            except ValueError as error:
                raise StorageError(f"{file}: damaged (line {number}: {error}); {remedy}") from None
            records.append(checked(RECORD, value, f"{file}, line {number}", remedy, needed))
        return records

    def write_records(self, records: list[Record]) -> None:
        text = "".join(json.dumps(plain(r)) + "\n" for r in records)
        write_atomic(self.path / "metrics.jsonl", text.encode())

    def newest(self) -> tuple[ServerState | None, dict[str, Any], list[str]]:
        """The newest checkpoint that is intact, what was saved with it, and notes on worse ones."""
        notes = []
        for path, state, extra in latest(self.checkpoints):
            if state is not None and isinstance(extra, dict):
                if problem := not_of_a_run(path, extra):
                    extra = problem
                else:
                    return state, extra, notes
            notes.append(f"{extra}; going on from the one before")
        if notes:
            notes.append(f"{self.checkpoints}: none is intact; the run begins again")
        return None, {}, notes

    def go_back(self, round: int) -> Path:
        """Sets aside all that came after a round, so that the run goes on from there.

        Returns:
            The folder in the run's directory in which it lies now.

        Raises:
            UserError: There is no intact checkpoint of that round; the others are named.
        """
        with self.held():
            self.recipe()
            there = by_round(self.checkpoints)
            try:
                load_checkpoint(there[round])
            except KeyError:
                known = ", ".join(map(str, sorted(there))) or "none"
                raise StorageError(
                    f"{self.path}: no checkpoint of round {round}; there are: {known}"
                ) from None
            moved = [path for n, path in there.items() if n > round]
            moved += [path.with_suffix(".sha256") for path in moved]
            named = (self.path / f"set-aside-{n}" for n in itertools.count(1))
            aside = next(folder for folder in named if not folder.exists())
            self.set_aside(aside, moved)
            return aside

    def set_aside(self, aside: Path, more: Sequence[Path] = ()) -> None:
        """Moves what the run came to, and other files of it, into a folder.

        Raises:
            UserError: The folder cannot be written.
        """
        try:
            aside.mkdir(exist_ok=True)
            for path in [*more, self.path / "results.json", self.final]:
                if path.exists():
                    path.rename(aside / path.name)
        except OSError as error:
            raise StorageError(f"{aside}: cannot be written: {reason(error)}") from None

    def save_update(
        self, model: AdaptedModel, base: str, round: int, name: str, state: AdapterState, info: Any
    ) -> None:
        """One client's update as a PEFT adapter (or its parameters), and update.json."""
        folder = self.path / "rounds" / f"{round:04d}" / "clients" / name
        save_state(model, folder, base, state)
        write_atomic(folder / "update.json", json.dumps(plain(info), indent=1).encode())

    def saved_updates(self, round: int) -> dict[str, tuple[Path, Path]]:
        """By client, where its update of a round lies, and its own factors of the round before."""
        rounds = self.path / "rounds"
        own = rounds / f"{round - 1:04d}" / "global" / "own"
        found = sorted((rounds / f"{round:04d}" / "clients").glob("*/update.json"))
        return {file.parent.name: (file.parent, own / file.parent.name) for file in found}

    def save_global(
        self,
        model: AdaptedModel,
        base: str,
        state: ServerState,
        settings: Settings,
        weights: Mapping[str, float],
    ) -> None:
        """What the server made of a round: factors, head, increments, weights, own factors."""
        folder = self.path / "rounds" / f"{state.version:04d}" / "global"
        save_state(model, folder, base, AdapterState(state.factors, state.head))
        for client in state.own:
            whole = start_of(state, settings, client)
            save_state(model, folder / "own" / client, base, whole)
        tensors = ledger_tensors(state.ledger.since(state.version - 1))
        blob = save({k: t.clone().contiguous() for k, t in tensors.items()})
        write_atomic(folder / "increment.safetensors", blob)
        write_atomic(folder / "weights.json", json.dumps(dict(weights)).encode())


_UNFINISHED = {LOCK, OWNER, *(f"{name}.new" for name in ("recipe.yaml", "evaluation.json", OWNER))}


def _precious(file: Path) -> bool:
    """Whether a file may be anything but the first that a run, or an evaluation, writes."""
    empty = file.name == "checkpoints" and file.is_dir() and not any(file.iterdir())
    return file.name not in _UNFINISHED and not empty


def not_of_a_run(path: Path, extra: Mapping[str, Any]) -> str | None:
    """What is wrong with what was saved beside a state; None if nothing is."""
    try:
        checked(SAVED, extra, path, "")
        checked(RECORD, extra["record"], path, "", WHOLE)
    except StorageError as error:
        return str(error).removesuffix("; ")
    return None


def save_state(model: AdaptedModel, folder: Path, base: str, state: AdapterState) -> None:
    """A PEFT adapter; where there are no adapted layers, the parameters.

    Raises:
        UserError: A full disk, or a directory that cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if state.layers:
            model.save_adapter(state, folder, base_name=base)
        else:
            write_atomic(folder / "parameters.safetensors", save(dict(state.head)))
    except (OSError, SafetensorError) as error:
        raise StorageError(
            f"{folder}: cannot be written: {reason(error)}. Free some space or choose another "
            "directory, then `fedex-lora resume`; the checkpoints are intact"
        ) from None


def environment(device: torch.device) -> dict[str, Any]:
    """Versions, device and threads: what a run's bits depend on besides its recipe."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": versions(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
    }


def versions() -> dict[str, str | None]:
    """Versions of this package and of those its numbers depend on."""
    found: dict[str, str | None] = dict.fromkeys(PACKAGES)
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def plain(value: Any) -> Any:
    """JSON has no NaN: it becomes null."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
