"""The end of a run: all scores, the totals, the exported model."""

from __future__ import annotations

import shutil
from typing import Any

from fedex_lora.engines.engine import Engine
from fedex_lora.engines.setup import Federation
from fedex_lora.errors import UserError
from fedex_lora.federation.loop import Record, deliver
from fedex_lora.federation.state import ServerState
from fedex_lora.runs.checkpoint import NAME, load_checkpoint
from fedex_lora.runs.export import Exported, export_adapter, export_model
from fedex_lora.runs.progress import Progress, saved_beside
from fedex_lora.runs.records import comparable
from fedex_lora.runs.reopened import Trained
from fedex_lora.runs.rundir import RunDir, plain
from fedex_lora.runs.scoring import final_scores
from fedex_lora.runs.watch import Watcher


def finish(
    federation: Federation,
    directory: RunDir,
    engine: Engine,
    state: ServerState,
    progress: Progress,
    watcher: Watcher,
) -> dict[str, Any]:
    """All splits for the last and the best round, and the totals, with the delivery of the
    final model to every client."""
    settings, records = federation.settings, progress.records
    state, _, sent, missed = deliver(
        state, settings, engine, settings.clients, scored=False, final=True
    )
    for client, why in missed.items():
        watcher.note(f"the last model did not reach {client}: {why}")
    best = progress.best() or records[-1]
    if not comparable(records):
        watcher.note(
            "rounds were scored by different clients, so they cannot be compared; the last round "
            "that was scored counts as the best"
        )
    rounds, last = state.version, final_scores(federation, engine, state, records[-1])
    at_best = last
    if best["round"] != rounds:
        state, best = _load_best(directory, best, state, records[-1], watcher)
        if best is not records[-1]:
            at_best = final_scores(federation, engine, state, best)
    if not settings.method.personal:
        spent = {k: records[-1][k] for k in ("privacy",) if k in records[-1]}
        for note in _export(federation, directory, state, {**best, **spent}).notes:
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
        **({"extended": parts} if (parts := directory.extensions()) else {}),
        **_totals(records, sum(sent.values())),
    }
    if "privacy" in records[-1]:  # of all rounds, of which the best was chosen
        results["privacy"] = records[-1]["privacy"]
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
    extra = saved_beside(federation, record)
    trained = Trained(federation.recipe, federation.model, federation.settings, state, extra)
    write, name = (export_adapter, "adapter") if state.factors else (export_model, "model")
    shutil.rmtree(directory.final / name, ignore_errors=True)  # of a run that died right here
    return write(trained, directory.final / name)
