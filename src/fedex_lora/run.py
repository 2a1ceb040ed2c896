"""One run, from a recipe to a finished directory; and its continuation after a crash."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any, Protocol

from datasets import Dataset

from fedex_lora.adapter import AdapterState
from fedex_lora.engines.local import LocalEngine
from fedex_lora.errors import UserError
from fedex_lora.export import Exported, export_adapter, export_model
from fedex_lora.federation.checkpoint import NAME, load_checkpoint, prune, save_checkpoint
from fedex_lora.federation.loop import KeepUpdate, Record, count_down, run_round
from fedex_lora.federation.messages import Update
from fedex_lora.federation.state import ServerState, begin, broadcast_to
from fedex_lora.recipe import Recipe
from fedex_lora.recipe_yaml import differences
from fedex_lora.rundir import RunDir, best_record, environment, plain
from fedex_lora.setup import Federation, set_up
from fedex_lora.trained import Trained

Scores = dict[str, float]


class Watcher(Protocol):
    """What wants to know how a run goes on, e.g. the command line's display."""

    def started(self, federation: Federation, out: Path) -> None: ...
    def turn(self, round: int, client: str, done: int, total: int) -> None: ...
    def round_done(self, record: Record) -> None: ...
    def note(self, text: str) -> None: ...


class Silent:
    """A watcher that shows nothing."""

    def started(self, federation: Federation, out: Path) -> None: ...
    def turn(self, round: int, client: str, done: int, total: int) -> None: ...
    def round_done(self, record: Record) -> None: ...
    def note(self, text: str) -> None: ...


@dataclass
class _Progress:
    """The records so far, and what they say about the best round."""

    records: list[Record] = field(default_factory=list)
    higher: bool = True

    def best(self) -> Record | None:
        """The record with the best selection score; the earliest of equals."""
        return best_record(self.records, self.higher)

    def exhausted(self, patience: int | None) -> bool:
        """Whether `patience` evaluations in a row brought no better score."""
        best = self.best()
        if patience is None or best is None:
            return False
        later = [r for r in self.records if r["round"] > best["round"]]
        return sum("score" in r for r in later) >= patience


def start_run(recipe: Recipe, out: Path, watcher: Watcher | None = None) -> dict[str, Any]:
    """Runs a recipe in a new directory and returns what results.json says.

    Raises:
        UserError: Anything the user can mend; what was saved before stays.
    """
    directory = RunDir(out)
    directory.check_free()
    federation = set_up(recipe)
    directory.create(recipe)
    directory.write_json("environment.json", environment(federation.model.device))
    state = begin(federation.settings, federation.initial)
    return _go_on(federation, directory, state, _Progress(), watcher or Silent())


def resume_run(
    out: Path, recipe: Recipe | None = None, watcher: Watcher | None = None
) -> dict[str, Any]:
    """Continues a run after its last finished round; bit for bit what it would have been.

    Args:
        recipe: If given, it must be the one the run began with.

    Raises:
        UserError: No run there, or another recipe; the differences are named.
    """
    directory, watcher = RunDir(out), watcher or Silent()
    stored = directory.recipe()
    if recipe is not None and (different := differences(recipe, stored)):
        raise UserError(
            f"{out}: this run began with another recipe: {'; '.join(different)}. Use another --out"
        )
    if (results := directory.read_json("results.json")) is not None:
        watcher.note(f"{out} is finished; nothing to do")
        return results
    federation = set_up(stored)
    _note_environment(directory, federation, watcher)
    state, extra, notes = directory.newest()
    for note in notes:
        watcher.note(note)
    records = [r for r in directory.records() if state and r["round"] < state.version]
    if state is None:
        state = begin(federation.settings, federation.initial)
    else:
        records.append(extra["record"])
    return _go_on(federation, directory, state, _Progress(records), watcher)


def _note_environment(directory: RunDir, federation: Federation, watcher: Watcher) -> None:
    now = environment(federation.model.device)
    then = directory.read_json("environment.json") or now
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
    state: ServerState,
    progress: _Progress,
    watcher: Watcher,
) -> dict[str, Any]:
    recipe, settings = federation.recipe, federation.settings
    progress.higher = federation.task.higher_is_better
    directory.write_records(progress.records)
    watcher.started(federation, directory.path)
    engine = LocalEngine(
        federation.model,
        federation.task,
        federation.clients,
        settings,
        recipe.training,
        recipe.federation.failure_rate,
        watcher.turn,
    )
    if recipe.records.save_updates and state.version == 0:
        directory.save_global(federation.model, recipe.model.name, state, {})
    while state.version < settings.rounds and not progress.exhausted(recipe.evaluation.patience):
        state, record = _round(federation, directory, engine, state)
        progress.records.append(record)
        _save(federation, directory, state, progress)
        watcher.round_done(record)
    return _finish(federation, directory, engine, state, progress, watcher)


def _round(
    federation: Federation, directory: RunDir, engine: LocalEngine, state: ServerState
) -> tuple[ServerState, Record]:
    recipe, began = federation.recipe, perf_counter()
    keep = _keeper(federation, directory) if recipe.records.save_updates else None
    state, record = run_round(state, federation.settings, engine, keep)
    if recipe.records.save_updates:
        directory.save_global(federation.model, recipe.model.name, state, record["weights"])
    trained = sum(c["seconds"] for c in record["clients"].values())
    evaluated = perf_counter()
    last = state.version == federation.settings.rounds
    if last or state.version % recipe.evaluation.every == 0:
        record |= evaluate(federation, engine, state, selection_only=True)
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


def _save(
    federation: Federation, directory: RunDir, state: ServerState, progress: _Progress
) -> None:
    extra = _extra(federation, progress.records[-1])
    save_checkpoint(directory.checkpoints, state, extra)
    directory.write_records(progress.records)
    best = progress.best()
    prune(directory.checkpoints, {best["round"]} if best else set())


def evaluate(
    federation: Federation, engine: LocalEngine, state: ServerState, selection_only: bool = False
) -> Record:
    """Scores of the global model on the server's rows and on each client's own.

    Where nothing is exchanged each client's own model is scored, and the server's scores are
    their means.

    Returns:
        `scores` by split, `client_scores` by client, and `score`, the number that selects.
    """
    alone = not federation.settings.method.exchanges
    models = list(federation.settings.clients) if alone else [None]
    splits = dict(list(federation.evaluation.items())[: 1 if selection_only else None])
    by_model: dict[str | None, dict[str, Scores]] = {}
    own: dict[str, Scores] = {}
    for client in models:
        engine.write_global(state, client)
        by_model[client] = {split: _score(federation, rows) for split, rows in splits.items()}
        for name, rows in federation.validation.items():
            if client in (None, name):
                own[name] = _score(federation, rows)
    scores = {split: _means([m[split] for m in by_model.values()]) for split in splits}
    result: Record = {"scores": scores, "score": _selection(federation, scores, own)}
    if own:
        result["client_scores"] = own
    if alone and splits:
        result["scores_alone"] = {str(c): m for c, m in by_model.items()}
    return result


def _score(federation: Federation, rows: Dataset) -> Scores:
    size = federation.recipe.evaluation.batch_size
    model = federation.model
    return federation.task.evaluate(model.module, rows, model.tokenizer, size)


def _means(scores: list[Scores]) -> Scores:
    return {key: sum(s[key] for s in scores) / len(scores) for key in scores[0]}


def _selection(
    federation: Federation, scores: Mapping[str, Scores], own: Mapping[str, Scores]
) -> float | None:
    """The primary metric on the first split; without one, the mean over the clients' rows."""
    primary = federation.task.primary
    if scores:
        return next(iter(scores.values()))[primary]
    sizes = {name: len(rows) for name, rows in federation.validation.items()}
    total = sum(sizes[name] for name in own)
    return sum(sizes[name] * s[primary] for name, s in own.items()) / total if own else None


def _finish(
    federation: Federation,
    directory: RunDir,
    engine: LocalEngine,
    state: ServerState,
    progress: _Progress,
    watcher: Watcher,
) -> dict[str, Any]:
    """All splits for the last and the best round, and the totals, with the delivery of the
    final model to every client."""
    settings, records = federation.settings, progress.records
    best = progress.best() or records[-1]
    closing = {c: broadcast_to(state, settings, c) for c in settings.clients}
    delivery = sum(count_down(settings, closing).values())
    del closing
    rounds, last = state.version, evaluate(federation, engine, state)
    at_best = last
    if best["round"] != rounds:
        state, best = _load_best(directory, best, state, records[-1], watcher)
        at_best = last if best is records[-1] else evaluate(federation, engine, state)
    if settings.method.exchanges:
        for note in _export(federation, directory, state, best).notes:
            watcher.note(note)
    results = {
        "method": federation.recipe.method.name,
        "seed": federation.recipe.seed,
        "metric": federation.task.primary,
        "rounds": rounds,
        "best_round": best["round"],
        "last": last,
        "best": at_best,
        "description": federation.description,
        **_totals(records, delivery),
    }
    directory.write_json("results.json", results)
    return plain(results)


def _load_best(
    directory: RunDir, best: Record, state: ServerState, last: Record, watcher: Watcher
) -> tuple[ServerState, Record]:
    """The best round's state; the last one's if that checkpoint is damaged, and said so."""
    try:
        return load_checkpoint(directory.checkpoints / NAME.format(best["round"]))[0], best
    except UserError as error:
        watcher.note(f"{error}; taking the last round in place of the best")
        return state, last


def _totals(records: list[Record], delivery: int) -> dict[str, Any]:
    deviations = [r["deviation"] for r in records if "deviation" in r]
    return {
        "deviation": deviations[-1] if deviations else None,
        "bytes_up": sum(sum(r["bytes_up"].values()) for r in records),
        "bytes_down": sum(sum(r["bytes_down"].values()) for r in records) + delivery,
        "bytes_delivery": delivery,
        "seconds": sum(r["seconds"]["round"] for r in records),
    }


def _export(
    federation: Federation, directory: RunDir, state: ServerState, record: Record
) -> Exported:
    """The best round's model in final/: an adapter, or the model where everything was trained."""
    extra = _extra(federation, record)
    trained = Trained(federation.recipe, federation.model, federation.settings, state, extra)
    write, name = (export_adapter, "adapter") if state.factors else (export_model, "model")
    shutil.rmtree(directory.final / name, ignore_errors=True)  # of a run that died right here
    return write(trained, directory.final / name)


def _extra(federation: Federation, record: Record) -> dict[str, Any]:
    """What a checkpoint holds beside the state: enough to export from it."""
    clients = list(federation.settings.ranks or federation.settings.clients)
    return {"record": record, "clients": clients, "description": federation.description}
