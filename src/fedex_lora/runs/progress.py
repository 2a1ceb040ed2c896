"""How far a run has come: its records, and what is on disk of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from fedex_lora.engines.setup import Federation
from fedex_lora.federation.loop import Record
from fedex_lora.federation.state import ServerState
from fedex_lora.recipe.reader import dump_recipe
from fedex_lora.runs.checkpoint import prune, save_checkpoint
from fedex_lora.runs.records import best_record
from fedex_lora.runs.rundir import RunDir


@dataclass
class Progress:
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

    def save(self, federation: Federation, directory: RunDir, state: ServerState) -> None:
        """Writes the state, then the records that lead to it, then drops checkpoints of old."""
        extra = saved_beside(federation, self.records[-1])
        save_checkpoint(directory.checkpoints, state, extra)
        directory.write_records(self.records)
        best = self.best()
        prune(directory.checkpoints, {best["round"]} if best else set())


def saved_beside(federation: Federation, record: Record) -> dict[str, Any]:
    """What a checkpoint holds beside the state: enough to export from it."""
    clients = list(federation.settings.ranks or federation.settings.clients)
    return {
        "record": record,
        "clients": clients,
        "description": federation.description,
        "recipe": dump_recipe(federation.recipe),
    }
