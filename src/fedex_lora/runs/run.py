"""One run, from a recipe to a finished directory; and its continuation after a crash."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

from fedex_lora.aggregation.adapter import AdapterState
from fedex_lora.engines.engine import Engine
from fedex_lora.engines.fused.train import Fused
from fedex_lora.engines.local import LocalEngine
from fedex_lora.engines.private.begin import plan_of, private_trainer
from fedex_lora.engines.setup import Federation, set_up, surroundings
from fedex_lora.engines.stage import Stage
from fedex_lora.engines.training import HFTrainer, quick_collections
from fedex_lora.engines.training_log import TrainingLog
from fedex_lora.engines.turn import Train, Turn
from fedex_lora.errors import RecipeError, StorageError
from fedex_lora.federation.loop import KeepUpdate, Record, run_round
from fedex_lora.federation.messages import Update
from fedex_lora.federation.noise import MeanNoise
from fedex_lora.federation.state import ServerState, admit, begin
from fedex_lora.recipe import Recipe
from fedex_lora.recipe.reader import differences
from fedex_lora.runs import private
from fedex_lora.runs.autotune import settle_fuse, settle_precision
from fedex_lora.runs.background import Background
from fedex_lora.runs.by_client import begin_round
from fedex_lora.runs.checkpoint import shelve
from fedex_lora.runs.closing import finish
from fedex_lora.runs.extend import extended
from fedex_lora.runs.plan.plan import foreseen
from fedex_lora.runs.preflight import check
from fedex_lora.runs.progress import Progress
from fedex_lora.runs.rundir import BY_HAND, DATA, OUTPUTS, RunDir, environment, plain
from fedex_lora.runs.scoring import evaluate
from fedex_lora.runs.watch import Silent, Start, Watcher

Assemble = Callable[[Recipe, Path, list[str] | None, Watcher], tuple[Federation, Engine]]
"""(recipe, run's directory, clients of a run that is resumed, watcher) → what is run, and how."""


def local_engine(
    federation: Federation, watcher: Watcher | None = None, out: Path | None = None
) -> LocalEngine:
    """The engine whose clients take turns in this process; its logs go into the run's directory."""
    recipe = federation.recipe
    log = None
    if out is not None:
        name = f"{recipe.name}-{recipe.method.name}-seed{recipe.seed}"
        log = TrainingLog(out / "logs", recipe.training.get("run_name") or name)
    task, training = federation.task, recipe.trainer_arguments
    on_step = _told(watcher) if watcher else None
    plan = plan_of(recipe, federation.settings, federation.examples)
    if plan is not None:
        train: Train = private_trainer(recipe, task, plan, on_step=on_step)
    elif recipe.fused > 1:
        train = Fused(task, training, recipe.fused, on_step, log)
    else:
        train = HFTrainer(task, training, on_step, log)
    return LocalEngine(
        stage_of(federation, out),
        federation.clients,
        federation.settings,
        federation.initial,
        train,
        federation.validation,
        recipe.federation.failure_rate,
    )


def stage_of(federation: Federation, out: Path | None = None) -> Stage:
    """The federation's one model, to train and to score on; `out` is the run's directory."""
    size = federation.recipe.evaluation.batch_size
    method = federation.settings.method
    return Stage(federation.model, federation.task, method, size, out and out / OUTPUTS)


def _told(watcher: Watcher) -> Callable[[Turn, int, int], None]:
    return lambda turn, done, total: watcher.turn(turn.round, turn.client, done, total)


def in_this_process(
    recipe: Recipe, out: Path, clients: list[str] | None, watcher: Watcher
) -> tuple[Federation, Engine]:
    """Everything of a recipe here: all rows, one model, the local engine."""
    if (out / BY_HAND).is_file():
        raise RecipeError(
            f"{out}: its rounds are carried by hand; go on with `fedex-lora round open {out}`"
        )
    if recipe.engine.kind != "local":
        raise RecipeError(
            f"engine.kind: {recipe.engine.kind} is for `fedex-lora run`; for this command set "
            "engine.kind=local"
        )
    federation, told = settle_precision(set_up(recipe))
    federation, more = settle_fuse(federation)
    for text in filter(None, (told, more)):
        watcher.note(text)
    federation = private.settle(federation, watcher)
    return federation, local_engine(federation, watcher, out)


def start_run(
    recipe: Recipe,
    out: Path,
    watcher: Watcher | None = None,
    assemble: Assemble = in_this_process,
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
        foreseen(recipe, out)
        federation, engine = assemble(recipe, out, None, watcher)
        with directory.held():
            directory.create(federation.recipe)
            directory.write_json("environment.json", environment(federation.model.device))
            state = begin(federation.settings, federation.initial)
            return _go_on(federation, directory, engine, state, Progress(), watcher, most)


def resume_run(
    out: Path,
    recipe: Recipe | None = None,
    watcher: Watcher | None = None,
    assemble: Assemble = in_this_process,
    most: int | None = None,
) -> dict[str, Any]:
    """Continues a run after its last finished round; bit for bit what it would have been.

    Args:
        recipe: If given, it must be the one the run began with.
        most: As of `start_run`.

    Raises:
        UserError: No run there, or another recipe than it began with; the differences are named.
            Another process is at work on it. A file of it is damaged.
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
        records, then = directory.records(whole=True), directory.environment()
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
        _note_environment(directory, then, federation, watcher)
        records = [r for r in records if state and r["round"] < state.version]
        if state is None:
            state = begin(federation.settings, federation.initial)
        else:
            records.append(extra["record"])
        if missing := {*range(1, state.version)} - {r["round"] for r in records}:
            rounds = ", ".join(map(str, sorted(missing)))
            watcher.note(f"{out}/metrics.jsonl: no record of round {rounds}; totals lack them")
        return _go_on(federation, directory, engine, state, Progress(records), watcher, most)


def _note_environment(
    directory: RunDir, then: Mapping[str, Any] | None, federation: Federation, watcher: Watcher
) -> None:
    now = environment(federation.model.device)
    then = then or now
    different = [k for k in now if now[k] != then.get(k)]
    if different:
        watcher.note(
            f"the run began elsewhere ({', '.join(f'{k}: {then.get(k)}' for k in different)}); "
            "its numbers may differ in the last bits"
        )
    directory.write_json("environment.json", now)


def _go_on(
    federation: Federation,
    directory: RunDir,
    engine: Engine,
    state: ServerState,
    progress: Progress,
    watcher: Watcher,
    most: int | None,
) -> dict[str, Any]:
    recipe = federation.recipe
    patience, rounds = recipe.evaluation.patience, federation.settings.rounds
    until = rounds if most is None else min(rounds, state.version + most)
    progress.higher = federation.task.higher_is_better
    private.take_up(engine, progress.records)
    directory.write_records(progress.records)
    directory.write_json(DATA, {"description": federation.description, **federation.counts})
    watcher.started(_start(federation, directory.path))
    if recipe.records.save_updates and state.version == 0:
        directory.save_global(federation.model, recipe.model.name, state, federation.settings, {})
    with quick_collections(), Background() as background:  # written while the next round trains
        while state.version < until and not progress.exhausted(patience):
            federation, state = _admit(federation, engine, state)
            bounded, noise = begin_round(federation, engine, state.version + 1, progress.records)
            after, record = _round(bounded, directory, engine, state, watcher, noise)
            if (told := private.told(federation, engine, record, progress.records)) is not None:
                record["privacy"] = told
            record |= extended(record, directory.extensions())
            background.wait()
            state = after
            progress.records.append(record)
            background.do(partial(progress.save, federation, directory, state))
            watcher.round_done(record)
    if state.version < rounds and not progress.exhausted(patience):
        return {}
    return finish(federation, directory, engine, state, progress, watcher)


def _start(federation: Federation, out: Path) -> Start:
    recipe = federation.recipe
    rounds = federation.settings.rounds
    return Start(
        recipe.name, recipe.method.name, recipe.seed, rounds, federation.examples, str(out)
    )


def _admit(
    federation: Federation, engine: Engine, state: ServerState
) -> tuple[Federation, ServerState]:
    """Clients that have come late take part from now on."""
    settings = federation.settings
    if names := engine.newcomers():
        state, settings = admit(state, settings, federation.initial, names)
    engine.settings = replace(settings, examples=engine.examples)
    return replace(federation, settings=engine.settings), state


def _round(
    federation: Federation,
    directory: RunDir,
    engine: Engine,
    state: ServerState,
    watcher: Watcher,
    noise: MeanNoise | None,
) -> tuple[ServerState, Record]:
    recipe, began = federation.recipe, perf_counter()
    keep = _keeper(federation, directory) if recipe.records.save_updates else None
    shelf = partial(shelve, directory.checkpoints)
    waiting = directory.checkpoints / "waiting"
    state, record = run_round(state, federation.settings, engine, keep, shelf, waiting, noise)
    if recipe.records.save_updates:
        weights = record["weights"]
        directory.save_global(
            federation.model, recipe.model.name, state, federation.settings, weights
        )
    trained = sum(c.get("seconds", 0.0) for c in record["clients"].values())
    evaluated, settings = perf_counter(), federation.settings
    last = state.version == settings.rounds
    if last or state.version % recipe.evaluation.every == 0:
        # those of the next round get this model anyhow; of pooled rows every silo has a share
        everybody = last or settings.method.pooled
        clients = sorted(engine.validation) if everybody else settings.sample(state.version + 1)
        state, scored, sent = evaluate(federation, engine, state, clients, watcher.note, True)
        record |= scored
        for client, nbytes in sent.items():
            record["bytes_down"][client] = record["bytes_down"].get(client, 0) + nbytes
    now = perf_counter()
    record["seconds"] |= {"train": trained, "evaluate": now - evaluated, "round": now - began}
    return state, plain(record)


def _keeper(federation: Federation, directory: RunDir) -> KeepUpdate:
    """Writes every update that is taken into the run's directory."""

    def keep(round: int, update: Update, end: AdapterState) -> None:
        info = {"examples": update.examples, **update.metrics}
        name = federation.recipe.model.name
        directory.save_update(federation.model, name, round, update.client, end, info)

    return keep
