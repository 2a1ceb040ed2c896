"""Opening a round: a signed folder for each of its clients."""

from __future__ import annotations

import json
import secrets
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fedex_lora.aggregation.adapter import AdapterState, Factors
from fedex_lora.aggregation.delta import Delta
from fedex_lora.aggregation.methods import METHODS
from fedex_lora.data.partition import client_names
from fedex_lora.engines.remote.wire import NOTHING, facts
from fedex_lora.engines.setup import Federation, roster, set_up_server, surroundings
from fedex_lora.errors import ProtocolError, RecipeError, StorageError
from fedex_lora.federation.codec import encode_broadcast
from fedex_lora.federation.record import Record
from fedex_lora.federation.state import (
    ServerState,
    base_increment,
    begin,
    broadcast_to,
    start_of,
)
from fedex_lora.model.adapted import AdaptedModel
from fedex_lora.model.config import CONFIG
from fedex_lora.recipe import Privacy, Recipe
from fedex_lora.recipe.reader import dump_recipe
from fedex_lora.runs.by_hand import share
from fedex_lora.runs.by_hand.folder import (
    ADAPTER,
    BROADCAST,
    INCREMENT,
    KEY,
    RECIPE,
    SIGNATURE,
    TURN,
    Turn,
    digests_of,
    sha256,
    turn_of,
)
from fedex_lora.runs.by_hand.signing import fingerprint, public, signer
from fedex_lora.runs.records import exhausted
from fedex_lora.runs.rundir import BY_HAND, RunDir
from fedex_lora.runs.scoring import lacks_scores
from fedex_lora.runs.sources import check_pretrained
from fedex_lora.tasks import Task

PRIVATE = "coordinator.key"  # in the run's directory


@dataclass(frozen=True)
class Opened:
    """A round that waits for its updates.

    Attributes:
        folders: Addresses of the clients' folders.
        key: Fingerprint of the coordinator's key, for clients to compare.
        scores_alone: Whether all rounds are over, and clients are to score the last model.
    """

    round: int
    rounds: int
    folders: dict[str, str]
    key: str
    scores_alone: bool


def names_of(recipe: Recipe) -> list[str]:
    """The clients; those of rows that are dealt out have numbers.

    Raises:
        UserError: A method whose rounds cannot be carried by hand.
    """
    method = METHODS[recipe.method.name]
    whole = method.trains in ("inner", "all") or method.assignment.sparse(1)
    if not method.exchanges or method.pooled or whole:
        raise RecipeError(
            f"method.name: {recipe.method.name} sends no adapters; rounds by hand need a method "
            "that does, e.g. fedex"
        )
    if method.assignment.private:
        raise RecipeError(
            f"method.name: {recipe.method.name} leaves a part of every model with its client from "
            "round to round; rounds by hand send all in a folder: take another method"
        )
    if recipe.federation.asynchronous is not None:
        raise RecipeError(
            "federation.asynchronous: a round by hand is over when somebody closes it; leave it out"
        )
    if recipe.federation.scaffold:
        raise RecipeError(
            "federation.scaffold: control variates go beside the adapter, and rounds by hand send "
            "adapters; leave it out"
        )
    if recipe.privacy != Privacy():
        raise RecipeError(
            "privacy: whoever carries a round by hand sees every update; leave this block out"
        )
    return roster(recipe) or client_names(recipe.federation.clients)


def open_round(run: Path, to: str | None = None) -> Opened:
    """Writes the folders of a run's next round; after the last one, where clients score models,
    folders for the scores of the last one.

    Opening a round once more writes the same files again, and leaves updates as they are.

    Args:
        to: The address below which they go, as fsspec knows it; `RUN/by-hand` by default, or
            where the round before went.

    Raises:
        UserError: The run is finished, or was changed; the address cannot be written.
    """
    directory = RunDir(run)
    recipe = directory.recipe()
    if directory.results() is not None:
        raise ProtocolError(
            f"{run}: is finished; `fedex-lora resume {run} --rounds N` goes on with more rounds"
        )
    with surroundings(recipe), directory.held():
        state, extra, _ = directory.newest()
        federation = set_up_server(recipe, extra.get("clients") or names_of(recipe))
        check_pretrained(directory, recipe, federation.model)  # rows are told of at its close
        settings = federation.settings
        scores, alone = _asked(directory, recipe, extra.get("record"), federation.task)
        state = state or begin(settings, federation.initial)
        known = directory.read_json(BY_HAND) or {"run": secrets.token_hex(8), "opened": {}}
        to = to or str(known.get("to", run / "by-hand"))
        round, folders = state.version + 1, {}
        last = alone and state.version == settings.rounds
        where = f"scores-{state.version:04d}" if alone else f"round-{round:04d}"
        key, opened = signer(run / PRIVATE), {}
        for client in settings.clients if last else settings.sample(round):
            with tempfile.TemporaryDirectory() as work:
                folder = Path(work)
                token = sha256(key.sign(f"{known['run']}/{round}/{client}".encode()))[:32]
                about = _write(federation, state, client, folder, alone)
                turn = Turn(
                    known["run"], round, settings.rounds, client, token, scores=scores, **about
                )
                (folder / TURN).write_bytes(turn.text())
                (folder / SIGNATURE).write_bytes(key.sign(turn.text()))
                (folder / KEY).write_bytes(public(key))
                folders[client] = share.below(to, where, client)
                _check_free(folders[client], turn)
                share.put(folder, folders[client], last=TURN)
                opened[client] = sha256(turn.text())
        known |= {"to": to, "opened": {**known["opened"], str(round): opened}}
        directory.write_json(BY_HAND, known)
        return Opened(round, settings.rounds, folders, fingerprint(public(key)), alone)


def _asked(
    directory: RunDir, recipe: Recipe, record: Record | None, task: Task
) -> tuple[bool, bool]:
    """Whether clients are to score the model after the last round, whose record this is, and
    whether that is all: no round follows.

    Raises:
        UserError: There is nothing to ask for.
    """
    if record is None:
        return False, False
    scores, done = lacks_scores(recipe, record), record["round"]
    before = [r for r in directory.records() if r["round"] < done]
    patience = recipe.evaluation.patience
    over = done == recipe.federation.rounds or exhausted(
        [*before, record], task.higher_is_better, patience
    )
    if over and not scores:  # the process died before it had written the results
        raise ProtocolError(
            f"{directory.path}: its rounds are over; `fedex-lora round close {directory.path}` "
            "finishes it"
        )
    return scores, over


def _check_free(address: str, turn: Turn) -> None:
    try:
        there = share.read(address, TURN)
    except StorageError:  # no folder yet; an address that cannot be written is told when it is
        return
    if there is not None and turn_of(there, address).run != turn.run:
        raise StorageError(
            f"{address}: holds the folder of another run; name another address with `to`"
        )


def _write(
    federation: Federation, state: ServerState, client: str, folder: Path, scores_alone: bool
) -> dict[str, Any]:
    """Writes all files but turn.json and what belongs to it; what turn.json says of them."""
    recipe, settings, model = federation.recipe, federation.settings, federation.model
    (folder / RECIPE).write_text(dump_recipe(recipe), encoding="utf-8")
    message = broadcast_to(state, settings, client, NOTHING)
    (folder / BROADCAST).write_bytes(encode_broadcast(message))
    if not scores_alone:
        start = start_of(state, settings, client)
        model.save_adapter(start, folder / ADAPTER, base_name=recipe.model.name)
        own = None if settings.method.shared_base else start.layers
        _write_increment(model, recipe, state, own, folder / INCREMENT)
    found = facts(recipe, federation.task, model, federation.initial)
    return {
        "trains": [] if scores_alone else sorted(settings.method.trained(message.round)),
        "agreed": dict(found.agreed),
        "digests": dict(found.digests),
        "files": digests_of(folder),
    }


def _write_increment(
    model: AdaptedModel, recipe: Recipe, state: ServerState, own: Any, folder: Path
) -> None:
    """T − own as a PEFT adapter at scale 1, to be merged into the base before training."""
    factors = {}
    for name, layer in model.layers.items():
        delta = base_increment(state.ledger, name, own[name] if own else None, fold=False)
        delta = delta or Delta(torch.zeros(layer.out, 1), torch.zeros(1, layer.inp))
        left, right = delta.smaller().factors()
        factors[name] = Factors(right, left, 1.0)
    if not any(f.A.any() and f.B.any() for f in factors.values()):
        return  # the pretrained weights, as they are
    model.save_adapter(AdapterState(factors, {}), folder, base_name=recipe.model.name)
    config = json.loads((folder / CONFIG).read_text())
    config |= {"modules_to_save": None, "lora_dropout": 0.0, "task_type": None}
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True))
