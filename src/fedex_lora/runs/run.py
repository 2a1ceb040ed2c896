"""One run: a recipe's rounds in a directory, from the first to the exported model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fedex_lora.engines.setup import surroundings
from fedex_lora.errors import RecipeError, StorageError
from fedex_lora.federation.state import begin
from fedex_lora.recipe import Recipe
from fedex_lora.recipe.reader import differences
from fedex_lora.runs import private
from fedex_lora.runs.here import Assemble, by_kind
from fedex_lora.runs.play import Run
from fedex_lora.runs.preflight import check, check_room, check_weights
from fedex_lora.runs.registered import registered
from fedex_lora.runs.rundir import RunDir, environment
from fedex_lora.runs.sources import keep_sources
from fedex_lora.runs.watch import Silent, Watcher


def start_run(
    recipe: Recipe,
    out: Path,
    watcher: Watcher | None = None,
    assemble: Assemble = by_kind,
    most: int | None = None,
) -> dict[str, Any]:
    """Runs a recipe in a new directory and returns what results.json says.

    Args:
        most: How many rounds are played; while some are left nothing is returned, and
            `resume_run` goes on.

    Raises:
        UserError: Anything the user can mend; what was saved before stays.
    """
    directory, watcher = RunDir(out), watcher or Silent()
    directory.check_free()
    with surroundings(recipe):
        check(recipe)
        check_weights(recipe)
        federation, engine = assemble(recipe, out, None, watcher)
        check_room(federation, out)
        with directory.held():
            directory.create(federation.recipe)
            here = environment(federation.model.device)
            directory.write_json("environment.json", {**here, **registered(federation.recipe)})
            keep_sources(directory, federation, done=0)
            state = begin(federation.settings, federation.initial)
            return Run(federation, engine, directory, state, watcher).play(most)


def resume_run(
    out: Path,
    recipe: Recipe | None = None,
    watcher: Watcher | None = None,
    assemble: Assemble = by_kind,
    most: int | None = None,
) -> dict[str, Any]:
    """Continues a run after its last finished round; bit for bit what it would have been.

    Args:
        recipe: If given, it must be the one the run began with.
        most: As of `start_run`.

    Raises:
        UserError: No run there, or one that is at work, damaged or began with another recipe.
    """
    directory, watcher = RunDir(out), watcher or Silent()
    stored = directory.recipe()
    if recipe is not None and (different := differences(recipe, stored)):
        raise RecipeError(
            f"{out}: this run began with another recipe: {'; '.join(different)}. Use another `out`"
        )
    if (results := directory.results(whole=True)) is not None:
        watcher.note(f"{out} is finished; nothing to do")
        return results
    with surroundings(stored), directory.held():
        written, then = directory.records(whole=True), directory.environment()
        state, extra, notes = directory.newest()
        if different := directory.edited(stored, extra):
            raise StorageError(
                f"{out}/recipe.yaml: was changed after the run began: {'; '.join(different)}. "
                "Put it back, or begin a new run"
            )
        for note in notes:
            watcher.note(note)
        directory.prepare()
        federation, engine = assemble(stored, out, extra.get("clients"), watcher)
        for note in keep_sources(directory, federation, state.version if state else 0):
            watcher.note(note)
        now = environment(federation.model.device)
        then = then or now
        if different := [f"{k}: {then.get(k)}" for k in now if now[k] != then.get(k)]:
            watcher.note(
                f"the run began elsewhere ({', '.join(different)}); its numbers may differ in the "
                "last bits"
            )
        directory.write_json("environment.json", {**now, **registered(stored)})
        records = [r for r in written if state and r["round"] < state.version]
        if state is None:
            private.check_unspent(written, out)
            state = begin(federation.settings, federation.initial)
        else:
            records.append(private.with_all_spent(extra["record"], written))
        if missing := {*range(1, state.version)} - {r["round"] for r in records}:
            rounds = ", ".join(map(str, sorted(missing)))
            watcher.note(f"{out}/metrics.jsonl: no record of round {rounds}; totals lack them")
        return Run(federation, engine, directory, state, watcher, records).play(most)
