"""One run, from a recipe to a finished directory; and its continuation after a crash."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from time import perf_counter
from typing import Any, Protocol

from datasets import Dataset

from fedex_lora.adapter import AdapterState
from fedex_lora.engines.engine import Engine
from fedex_lora.engines.local import LocalEngine
from fedex_lora.errors import UserError
from fedex_lora.export import Exported, export_adapter, export_model
from fedex_lora.federation.checkpoint import NAME, load_checkpoint, prune, save_checkpoint
from fedex_lora.federation.loop import KeepUpdate, Record, count_down, run_round
from fedex_lora.federation.messages import Update
from fedex_lora.federation.state import ServerState, admit, begin, broadcast_to
from fedex_lora.recipe import Recipe
from fedex_lora.recipe_yaml import differences
from fedex_lora.rundir import RunDir, best_record, environment, plain
from fedex_lora.setup import Federation, set_up
from fedex_lora.trained import Trained
from fedex_lora.training_log import TrainingLog

Scores = dict[str, float]


@dataclass(frozen=True)
class Start:
    """What a run is, for people; `examples` are training examples by client."""

    name: str
    method: str
    seed: int
    rounds: int
    examples: Mapping[str, int]
    out: str


class Watcher(Protocol):
    """What wants to know how a run goes on, e.g. the command line's display.

    `scored` is told when a record that `round_done` has shown gets its clients' scores later.
    """

    def started(self, start: Start) -> None: ...
    def turn(self, round: int, client: str, done: int, total: int) -> None: ...
    def round_done(self, record: Record) -> None: ...
    def scored(self, record: Record) -> None: ...
    def note(self, text: str) -> None: ...


class Silent:
    """A watcher that shows nothing."""

    def started(self, start: Start) -> None: ...
    def turn(self, round: int, client: str, done: int, total: int) -> None: ...
    def round_done(self, record: Record) -> None: ...
    def scored(self, record: Record) -> None: ...
    def note(self, text: str) -> None: ...


Assemble = Callable[[Recipe, Path, list[str] | None, Watcher], tuple[Federation, Engine]]
"""(recipe, run's directory, clients of a run that is resumed, watcher) → what is run, and how."""


def local_engine(
    federation: Federation, watcher: Watcher | None = None, out: Path | None = None
) -> LocalEngine:
    """The engine whose clients take turns in this process; its logs go into the run's directory."""
    recipe = federation.recipe
    name = f"{recipe.name}-{recipe.method.name}-seed{recipe.seed}"
    name = recipe.training.get("run_name") or name
    return LocalEngine(
        federation.model,
        federation.task,
        federation.clients,
        federation.settings,
        recipe.training,
        recipe.federation.failure_rate,
        watcher.turn if watcher else None,
        federation.validation,
        recipe.evaluation.batch_size,
        TrainingLog(out / "logs", name) if out else None,
    )


def in_this_process(
    recipe: Recipe, out: Path, clients: list[str] | None, watcher: Watcher
) -> tuple[Federation, Engine]:
    """Everything of a recipe here: all rows, one model, the local engine."""
    if recipe.engine.kind != "local":
        raise UserError(
            f"engine.kind: {recipe.engine.kind} is for `fedex-lora run`; for this command set "
            "engine.kind=local"
        )
    federation = set_up(recipe)
    return federation, local_engine(federation, watcher, out)


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


def start_run(
    recipe: Recipe,
    out: Path,
    watcher: Watcher | None = None,
    assemble: Assemble = in_this_process,
) -> dict[str, Any]:
    """Runs a recipe in a new directory and returns what results.json says.

    Raises:
        UserError: Anything the user can mend; what was saved before stays.
    """
    directory, watcher = RunDir(out), watcher or Silent()
    directory.check_free()
    federation, engine = assemble(recipe, out, None, watcher)
    directory.create(recipe)
    directory.write_json("environment.json", environment(federation.model.device))
    state = begin(federation.settings, federation.initial)
    return _go_on(federation, directory, engine, state, _Progress(), watcher)


def resume_run(
    out: Path,
    recipe: Recipe | None = None,
    watcher: Watcher | None = None,
    assemble: Assemble = in_this_process,
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
    state, extra, notes = directory.newest()
    for note in notes:
        watcher.note(note)
    federation, engine = assemble(stored, out, extra.get("clients"), watcher)
    _note_environment(directory, federation, watcher)
    records = [r for r in directory.records() if state and r["round"] < state.version]
    if state is None:
        state = begin(federation.settings, federation.initial)
    else:
        records.append(extra["record"])
    return _go_on(federation, directory, engine, state, _Progress(records), watcher)


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
    engine: Engine,
    state: ServerState,
    progress: _Progress,
    watcher: Watcher,
) -> dict[str, Any]:
    recipe = federation.recipe
    patience, rounds = recipe.evaluation.patience, federation.settings.rounds
    progress.higher = federation.task.higher_is_better
    directory.write_records(progress.records)
    watcher.started(_start(federation, directory.path))
    if recipe.records.save_updates and state.version == 0:
        directory.save_global(federation.model, recipe.model.name, state, {})
    while state.version < rounds and not progress.exhausted(patience):
        federation, state = _admit(federation, engine, state)
        after, record = _round(federation, directory, engine, state)
        if _complete(progress.records, _scores_in(record), federation, engine, watcher):
            directory.write_records(progress.records)
            if progress.exhausted(patience):  # the round that told so was one too many
                break
        state = after
        progress.records.append(record)
        _save(federation, directory, state, progress)
        watcher.round_done(record)
    return _finish(federation, directory, engine, state, progress, watcher)


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
    names = engine.newcomers()
    if not names:
        return federation, state
    state, engine.settings = admit(state, federation.settings, federation.initial, names)
    return replace(federation, settings=engine.settings), state


def _round(
    federation: Federation, directory: RunDir, engine: Engine, state: ServerState
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
        clients = None if last else federation.settings.sample(state.version + 1)
        record |= evaluate(federation, engine, state, True, clients)
    now = perf_counter()
    record["seconds"] |= {"train": trained, "evaluate": now - evaluated, "round": now - began}
    return state, plain(record)


def _scores_in(record: Record) -> dict[str, Scores]:
    """Scores of the round before that came with this round's updates; taken out of its record."""
    found = {c: told.pop("scores", None) for c, told in record["clients"].items()}
    return {c: scores for c, scores in found.items() if scores}


def _complete(
    records: list[Record],
    own: Mapping[str, Mapping[str, float]],
    federation: Federation,
    engine: Engine,
    watcher: Watcher,
) -> bool:
    """Puts clients' scores that come late where they belong; whether there were any."""
    if not own or not records or "client_scores" in records[-1]:
        return False
    record = records[-1]
    record |= plain(_with_own(federation, engine, record.get("scores", {}), own))
    watcher.scored(record)
    return True


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
    federation: Federation,
    engine: Engine,
    state: ServerState,
    selection_only: bool = False,
    clients: Sequence[str] | None = None,
) -> Record:
    """Scores of the global model on the server's rows, and of the clients' on their own.

    Where nothing is exchanged each client's own model is scored, and the server's scores are
    their means.

    Args:
        selection_only: The first of the server's splits alone.
        clients: Whose rows; None for all. In a run, those of the next round: they hold the model.

    Returns:
        `scores` by split, `client_scores` by client, and `score`, the number that selects.
    """
    scores, alone = _server_scores(federation, engine.server, state, selection_only)
    names = sorted(engine.validation) if clients is None else clients
    if federation.settings.method.pooled:
        names = sorted(engine.validation)
    result = _with_own(federation, engine, scores, engine.client_scores(state, names) or {})
    return {**result, "scores_alone": alone} if alone else result


def _server_scores(
    federation: Federation, server: LocalEngine, state: ServerState, selection_only: bool
) -> tuple[dict[str, Scores], dict[str, dict[str, Scores]]]:
    """Scores by split, and by client and split where every client has a model of its own."""
    splits = dict(list(federation.evaluation.items())[: 1 if selection_only else None])
    if not splits:
        return {}, {}
    alone = not federation.settings.method.exchanges
    by_model: dict[str | None, dict[str, Scores]] = {}
    for client in list(federation.settings.clients) if alone else [None]:
        server.write_global(state, client)
        by_model[client] = {split: _score(federation, rows) for split, rows in splits.items()}
    scores = {split: _means([m[split] for m in by_model.values()]) for split in splits}
    scores |= federation.task.average(scores)
    return scores, {str(c): m for c, m in by_model.items()} if alone else {}


def _with_own(
    federation: Federation,
    engine: Engine,
    scores: Mapping[str, Scores],
    own: Mapping[str, Mapping[str, float]],
) -> Record:
    score = _selection(federation.task.primary, scores, own, engine.validation)
    result: Record = {"scores": dict(scores), "score": score}
    return {**result, "client_scores": {c: dict(own[c]) for c in sorted(own)}} if own else result


def _score(federation: Federation, rows: Dataset) -> Scores:
    size = federation.recipe.evaluation.batch_size
    model = federation.model
    return federation.task.evaluate(model.module, rows, model.tokenizer, size)


def _means(scores: list[Scores]) -> Scores:
    return {key: sum(s[key] for s in scores) / len(scores) for key in scores[0]}


def _selection(
    primary: str,
    scores: Mapping[str, Scores],
    own: Mapping[str, Mapping[str, float]],
    sizes: Mapping[str, int],
) -> float | None:
    """The primary metric on the first split; without one, the mean over the clients' rows."""
    if scores:
        return next(iter(scores.values()))[primary]
    total = sum(sizes[name] for name in own)
    return sum(sizes[name] * own[name][primary] for name in sorted(own)) / total if own else None


def _finish(
    federation: Federation,
    directory: RunDir,
    engine: Engine,
    state: ServerState,
    progress: _Progress,
    watcher: Watcher,
) -> dict[str, Any]:
    """All splits for the last and the best round, and the totals, with the delivery of the
    final model to every client."""
    settings, records = federation.settings, progress.records
    closing = {c: broadcast_to(state, settings, c) for c in settings.clients}
    delivery = sum(count_down(settings, closing).values())
    del closing
    if _complete(records, engine.deliver(state), federation, engine, watcher):
        directory.write_records(records)
    best = progress.best() or records[-1]
    rounds, last = state.version, _final_scores(federation, engine, state, records[-1])
    at_best = last
    if best["round"] != rounds:
        state, best = _load_best(directory, best, state, records[-1], watcher)
        if best is not records[-1]:
            at_best = _final_scores(federation, engine, state, best)
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


def _final_scores(
    federation: Federation, engine: Engine, state: ServerState, record: Record
) -> Record:
    """All of the server's splits; the clients' scores as the round's record has them."""
    scores, alone = _server_scores(federation, engine.server, state, False)
    result = _with_own(federation, engine, scores, record.get("client_scores", {}))
    return {**result, "scores_alone": alone} if alone else result


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
