"""The rounds of a run: what is played, scored, saved and, at the end, exported."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from time import perf_counter
from typing import Any, cast

from fedex_lora.aggregation.adapter import AdapterState
from fedex_lora.engines.engine import Engine
from fedex_lora.engines.setup import Federation
from fedex_lora.engines.training import quick_collections
from fedex_lora.errors import UserError
from fedex_lora.federation.loop import Record, deliver, run_round
from fedex_lora.federation.messages import Update
from fedex_lora.federation.secure.messages import SecureTransport
from fedex_lora.federation.secure.round import secure_round
from fedex_lora.federation.settings import Settings
from fedex_lora.federation.state import ServerState, admit
from fedex_lora.recipe.reader import dump_recipe
from fedex_lora.runs import private
from fedex_lora.runs.by_client import begin_round
from fedex_lora.runs.checkpoint import NAME, load_checkpoint, prune, save_checkpoint, shelve
from fedex_lora.runs.export import export_adapter, export_model
from fedex_lora.runs.extend import extended
from fedex_lora.runs.records import best_record, comparable, exhausted
from fedex_lora.runs.reopened import Trained
from fedex_lora.runs.rundir import DATA, RunDir, plain
from fedex_lora.runs.scoring import lacks_scores, selected, server_scores
from fedex_lora.runs.watch import Silent, Start, Watcher


@dataclass
class Run:
    """What is run, who carries its messages, where it is kept, and how far it has come.

    Attributes:
        federation: With the clients that have joined so far.
        state: The server's, after the last finished round.
        records: One a finished round.
    """

    federation: Federation
    engine: Engine
    directory: RunDir
    state: ServerState
    watcher: Watcher = field(default_factory=Silent)
    records: list[Record] = field(default_factory=list)

    def play(self, most: int | None = None) -> dict[str, Any]:
        """Plays the rounds that are left and closes the run; returns what results.json says.

        Args:
            most: How many rounds are played; while some are left nothing is returned.
        """
        federation, directory = self.federation, self.directory
        recipe, rounds = federation.recipe, federation.settings.rounds
        until = rounds if most is None else min(rounds, self.state.version + most)
        private.take_up(self.engine, self.records)
        directory.write_records(self.records)
        directory.write_json(DATA, {"description": federation.description, **federation.counts})
        names = recipe.name, recipe.method.name, recipe.seed
        per_round, done = len(federation.settings.sample(1)), self.state.version
        out = str(directory.path)
        self.watcher.started(Start(*names, rounds, federation.examples, out, per_round, done))
        if recipe.records.save_updates and self.state.version == 0:
            self._save_global({})
        late = self._take_scores()
        saved: Future[None] | None = None  # a round is written while the next one trains
        with quick_collections(), ThreadPoolExecutor(1, "saving") as saving:
            while self.state.version < until and not self._exhausted():
                late = False
                self._admit()
                state, record = self._round()
                told = private.told(self.federation, self.engine, record, self.records)
                if told is not None:
                    record["privacy"] = told
                record |= extended(record, directory.extensions())
                if saved is not None:
                    saved.result()
                self.state = state
                self.records.append(record)
                saved = saving.submit(self._save, state, self._saved_beside(record))
                self.watcher.round_done(record)
        if saved is not None:
            saved.result()
        over = self.state.version == rounds or self._exhausted()
        if not over or (self._lacks_scores() and not late):
            return {}
        if late:
            self._save(self.state, self._saved_beside(self.records[-1]))
        return self._close()

    def best(self) -> Record | None:
        """The record with the best selection score."""
        return best_record(self.records, self.federation.task.higher_is_better)

    def _exhausted(self) -> bool:
        patience = self.federation.recipe.evaluation.patience
        return exhausted(self.records, self.federation.task.higher_is_better, patience)

    def _lacks_scores(self) -> bool:
        later = self.engine.scores_later and bool(self.records)
        return later and lacks_scores(self.federation.recipe, self.records[-1])

    def _take_scores(self) -> bool:
        """Records what clients that score later found of the last round, if that is to be done."""
        if lacks := self._lacks_scores():
            record = dict(self.records[-1])
            self.state = self._scored(self.state, record, self.federation.settings, later=True)
            self.records[-1] = plain(record)
            self.watcher.scored(self.records[-1])
        return lacks

    def _admit(self) -> None:
        """Clients that have come late take part from now on."""
        settings, initial = self.federation.settings, self.federation.initial
        if names := self.engine.newcomers():
            self.state, settings = admit(self.state, settings, initial, names)
        self.engine.settings = replace(settings, examples=self.engine.examples)
        self.federation = replace(self.federation, settings=self.engine.settings)

    def _round(self) -> tuple[ServerState, Record]:
        """The next round: train, aggregate, score."""
        recipe, began = self.federation.recipe, perf_counter()
        round, federation = self.state.version + 1, self.federation
        bounded, noise = begin_round(federation, self.engine, round, self.records)
        settings = bounded.settings
        saves, checkpoints = recipe.records.save_updates, self.directory.checkpoints
        if settings.secure is not None:
            # rounds by hand, whose transport carries no sums, refuse a block on privacy
            transport = cast(SecureTransport, self.engine)
            state, record = secure_round(self.state, settings, transport, self.watcher.note)
        else:
            state, record = run_round(
                self.state,
                settings,
                self.engine,
                self._keep if saves else None,
                partial(shelve, checkpoints),
                checkpoints / "waiting",
                noise,
            )
        if saves:
            self._save_global(record["weights"], state)
        trained = sum(c.get("seconds", 0.0) for c in record["clients"].values())
        evaluated = perf_counter()
        state = self._scored(state, record, settings)
        now = perf_counter()
        record["seconds"] |= {"train": trained, "evaluate": now - evaluated, "round": now - began}
        return state, plain(record)

    def _scored(
        self, state: ServerState, record: Record, settings: Settings, later: bool = False
    ) -> ServerState:
        """Adds to a round's record how good its model is; the state, with who holds it.

        Args:
            later: Whether what clients found has come after the round.
        """
        last, engine = state.version == settings.rounds, self.engine
        if not last and state.version % self.federation.recipe.evaluation.every:
            return state
        # those of the next round get this model anyhow; of pooled rows every silo has a share
        everybody = last or settings.method.pooled
        clients = sorted(engine.validation) if everybody else settings.sample(state.version + 1)
        if later != engine.scores_later:
            clients = []
        if not clients and not self.federation.evaluation:
            return state
        state, scored, sent = self.evaluate(state, clients, selection_only=True, known=record)
        record |= scored
        down = dict(record["bytes_down"])
        record["bytes_down"] = down | {c: down.get(c, 0) + n for c, n in sent.items()}
        return state

    def evaluate(
        self,
        state: ServerState,
        clients: Sequence[str],
        selection_only: bool = False,
        known: Record | None = None,
    ) -> tuple[ServerState, Record, Mapping[str, int]]:
        """Scores of the global model on the server's rows, and of the clients' on their own.

        Where there is no global model each client's own is scored, and the server's scores are
        their means.

        Args:
            clients: Whose rows. In a run, those of the next round: they get the model anyhow.
            selection_only: The first of the server's splits alone.
            known: The state's record, if it may have the server's scores.

        Returns:
            The state, with who holds the model; `scores` by split, `client_scores` by client and
            `score`, the number that selects; and the bytes that were sent to clients for it.
        """
        federation, engine = self.federation, self.engine
        scores, alone = server_scores(federation, engine.stage, state, selection_only, known)
        own: Mapping[str, Mapping[str, float]] = {}
        sent: Mapping[str, int] = {}
        if clients and federation.recipe.evaluation.where != "server":
            state, own, sent, missed = deliver(state, federation.settings, engine, clients)
            for client, why in missed.items():
                self.watcher.note(f"round {state.version}: no scores of {client}: {why}")
        return state, selected(federation, engine, scores, alone, own), sent

    def _final_scores(self, state: ServerState, record: Record) -> Record:
        """All of the server's splits; the clients' scores as the round's record has them."""
        federation, engine = self.federation, self.engine
        scores, alone = server_scores(federation, engine.stage, state, False, record)
        return selected(federation, engine, scores, alone, record.get("client_scores", {}))

    def _keep(self, round: int, update: Update, end: AdapterState) -> None:
        """Writes an update that is taken into the run's directory."""
        info = {"examples": update.examples, **update.metrics}
        model, name = self.federation.model, self.federation.recipe.model.name
        self.directory.save_update(model, name, round, update.client, end, info)

    def _save_global(self, weights: Mapping[str, float], state: ServerState | None = None) -> None:
        """Writes what was made of a round's updates."""
        model, name = self.federation.model, self.federation.recipe.model.name
        settings = self.federation.settings
        self.directory.save_global(model, name, state or self.state, settings, weights)

    def _save(self, state: ServerState, beside: Mapping[str, Any]) -> None:
        """Writes the state, then the records that lead to it, then drops checkpoints of old."""
        save_checkpoint(self.directory.checkpoints, state, beside)
        self.directory.write_records(self.records)
        best = self.best()
        prune(self.directory.checkpoints, {best["round"]} if best else set())

    def _saved_beside(self, record: Record) -> dict[str, Any]:
        """What a checkpoint holds beside the state: enough to export from it."""
        settings = self.federation.settings
        return {
            "record": record,
            "clients": list(settings.ranks or settings.clients),
            "description": self.federation.description,
            "recipe": dump_recipe(self.federation.recipe),
        }

    def _close(self) -> dict[str, Any]:
        """Delivers the last model, scores the last and the best round on all splits, exports the
        best, and writes results.json with the totals."""
        federation, records, note = self.federation, self.records, self.watcher.note
        settings, rounds = federation.settings, self.state.version
        checkpoints = self.directory.checkpoints
        # of all rounds, of which the best was chosen
        spent = {k: records[-1][k] for k in ("privacy",) if k in records[-1]}
        self.state, _, sent, missed = deliver(
            self.state, settings, self.engine, settings.clients, scored=False, final=True
        )
        for client, why in missed.items():
            note(f"the last model did not reach {client}: {why}")
        if not comparable(records):
            note(
                "rounds were scored by different clients, so they cannot be compared; the last "
                "round that was scored counts as the best"
            )
        state, best = self.state, self.best() or records[-1]
        last = at_best = self._final_scores(state, records[-1])
        if best["round"] != rounds:
            try:
                state = load_checkpoint(checkpoints / NAME.format(best["round"]))[0]
            except UserError as error:
                note(f"{error}; taking the last round in place of the best")
                best = records[-1]
            else:
                at_best = self._final_scores(state, best)
        if not settings.method.personal:
            self._export(state, {**best, **spent})
        deviations = [r["deviation"] for r in records if "deviation" in r]
        delivery = sum(sent.values())
        results = {
            "method": federation.recipe.method.name,
            "seed": federation.recipe.seed,
            "metric": federation.task.primary,
            "rounds": rounds,
            "best_round": best["round"],
            "last": last,
            "best": at_best,
            "description": federation.description,
            **({"extended": parts} if (parts := self.directory.extensions()) else {}),
            "deviation": deviations[-1] if deviations else None,
            "bytes_up": sum(sum(r["bytes_up"].values()) for r in records),
            "bytes_down": sum(sum(r["bytes_down"].values()) for r in records) + delivery,
            "bytes_delivery": delivery,
            "seconds": sum(r["seconds"]["round"] for r in records),
            **spent,
        }
        self.directory.write_json("results.json", results)
        return plain(results)

    def _export(self, state: ServerState, record: Record) -> None:
        """A round's model in final/: an adapter, or the model where everything was trained."""
        f, beside = self.federation, self._saved_beside(record)
        trained = Trained(f.recipe, f.model, f.settings, state, beside)
        write, name = (export_adapter, "adapter") if state.factors else (export_model, "model")
        path = self.directory.final / name
        shutil.rmtree(path, ignore_errors=True)  # of a run that died right here
        for note in write(trained, path).notes:
            self.watcher.note(note)
