"""Assembles the coordinator's side of a run across machines, whatever carries the messages."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from fedex_lora.disk import write_atomic
from fedex_lora.engines.engine import Engine
from fedex_lora.engines.remote.audit import Audit
from fedex_lora.engines.remote.courier import Courier, Waits
from fedex_lora.engines.remote.engine import RemoteEngine
from fedex_lora.engines.remote.guests import Guests
from fedex_lora.engines.remote.wire import Identity, facts
from fedex_lora.engines.setup import Federation, roster, set_up_server
from fedex_lora.errors import some, tally
from fedex_lora.federation.checks import check_shares
from fedex_lora.recipe import Recipe
from fedex_lora.runs import private
from fedex_lora.runs.here import Assemble, stage_of
from fedex_lora.runs.rundir import RunDir, versions
from fedex_lora.runs.secure import lacking
from fedex_lora.runs.watch import Watcher

FILE = "federation.json"
FEW = 3  # clients with whom a peer's adapter, or nearly, follows from the averages


def across_machines(courier: Courier, audit: Audit = Audit()) -> Assemble:  # noqa: B008
    """Runs whose clients are reached through `courier`; `audit` is the log of all messages."""

    def assemble(
        recipe: Recipe, out: Path, clients: list[str] | None, watcher: Watcher
    ) -> tuple[Federation, Engine]:
        federation = set_up_server(recipe, clients)
        engine = _engine(federation, courier, out, watcher, audit)
        least = recipe.federation.min_clients
        names = engine.guests.gather(recipe.federation.clients, least)
        known = clients or roster(recipe) or names
        settings = replace(
            federation.settings, clients=tuple(sorted(known)), examples=engine.examples
        )
        check_shares(settings)
        engine.guests.began = True
        engine.settings = settings
        for note in _notes(engine, recipe):
            watcher.note(note)
        description = f"{federation.description} ({tally(engine.examples)} rows)"
        held = {name: _Rows(rows) for name, rows in engine.examples.items()}
        found = replace(federation, settings=settings, description=description, clients=held)
        found = private.settle(found, watcher, elsewhere=True)
        engine.settings = found.settings
        return found, engine

    return assemble


class _Rows:
    """Rows that stay where they are; their number is known."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count


def _engine(
    federation: Federation, courier: Courier, out: Path, watcher: Watcher, audit: Audit
) -> RemoteEngine:
    recipe, fed = federation.recipe, federation.recipe.federation
    names, (known, declared) = roster(recipe), identity(out)
    guests = Guests(
        courier,
        facts(recipe, federation.task, federation.model, federation.initial),
        known,
        Waits(fed.round_timeout, fed.wait_for_clients),
        None if names is None else frozenset(names),
        versions(),
        watcher.note,
        federation.settings,
        declared,
        audit,
    )
    return RemoteEngine(
        guests,
        federation.settings,
        stage_of(federation, out),
        watcher.turn,
        lambda known, examples: remember(out, known, examples),
    )


def identity(out: Path) -> tuple[Identity, dict[str, int]]:
    """The run's, with one more start of the coordinator, and the rows that clients declared; a new
    one for a new run."""
    mark = secrets.token_hex(8)
    directory = RunDir(out)
    stored = directory.read_json(FILE) if directory.is_run() else None
    if stored is None:
        return Identity(secrets.token_hex(16), ((0, mark),)), {}
    state = directory.newest()[0]
    version = state.version if state is not None else 0
    before = tuple((int(v), str(m)) for v, m in stored["lineage"])
    known = Identity(stored["federation"], (*before, (version, mark)))
    return known, dict(stored.get("examples", {}))


def remember(out: Path, known: Identity, examples: Mapping[str, int]) -> None:
    """Writes the identity and the declared rows into the run's directory."""
    lineage = [list(part) for part in known.lineage]
    value = {"federation": known.federation, "lineage": lineage, "examples": dict(examples)}
    write_atomic(out / FILE, json.dumps(value).encode())


def _notes(engine: RemoteEngine, recipe: Recipe) -> list[str]:
    """What those who run it should know before round 1."""
    absent = [name for name in engine.settings.clients if name not in engine.guests.known]
    notes = [f"not here yet: {some(absent)}"] if absent else []
    count = len(engine.settings.clients)
    if recipe.privacy.secure_aggregation is not None:
        notes.append(lacking(recipe))
    elif count <= FEW:
        notes.append(
            f"with {count} clients what one of them sends can be worked out, or nearly, from the "
            "averages that the others receive; see the privacy statement in docs/deploy.md"
        )
    return notes
