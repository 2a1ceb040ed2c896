"""A client's turn of a round by hand: here, or for a training of one's own."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fedex_lora.aggregation.adapter import AdapterState
from fedex_lora.engines import turn as engine
from fedex_lora.engines.own_loop import own_loop
from fedex_lora.engines.remote.wire import Facts, facts, most_down
from fedex_lora.engines.setup import (
    Federation,
    roster,
    set_up_client,
    set_up_server,
    surroundings,
)
from fedex_lora.engines.stage import Stage
from fedex_lora.engines.training import HFTrainer
from fedex_lora.errors import ProtocolError
from fedex_lora.federation.codec import decode_broadcast
from fedex_lora.federation.messages import Broadcast, Update, receive, replaced
from fedex_lora.federation.state import begin, start_of
from fedex_lora.recipe import Recipe
from fedex_lora.recipe.reader import load_recipe
from fedex_lora.runs.by_hand import share
from fedex_lora.runs.by_hand.folder import (
    BROADCAST,
    INFO,
    RECIPE,
    SCORES,
    TURN,
    UPDATE,
    Scored,
    Turn,
    read_turn,
)
from fedex_lora.runs.here import stage_of


@dataclass(frozen=True)
class Taken:
    """A turn that was taken.

    Attributes:
        address: Of the update.
        key: Fingerprint of the coordinator's key that signed the folder.
        update: What was trained, if anything was.
        scored: How good the model that was sent is, if that was asked.
    """

    address: str
    turn: Turn
    key: str
    update: Update | None
    scored: Scored | None


def take_turn(
    address: str,
    file: Path | None = None,
    *,
    key: Path | None = None,
    sets: Sequence[str] = (),
    train: bool = True,
    on_step: engine.OnTurn | None = None,
) -> Taken:
    """Trains a client's turn as a run on one machine would, and writes the update beside it. Where
    clients score models, the one that was sent is scored first, on this client's own rows.

    Args:
        address: Of the folder that `open_round` wrote.
        file: The client's rows; without one they are its share of the recipe's own data.
        key: The coordinator's public key, if it is known from elsewhere.
        sets: Overrides of the recipe: where the model or the rows lie on this machine.
        train: If not, scores are all, and what else lies in `update/` stays.

    Raises:
        UserError: The folder was changed, the rows or the model do not fit, or the address cannot
            be written; nothing is to be scored, and nothing else is wanted.
    """
    with share.local(address) as folder:
        turn, mark = read_turn(folder, key)
        if not (train or turn.scores):
            raise ProtocolError(f"{address}: no scores are asked for with round {turn.round}")
        recipe = load_recipe(folder / RECIPE, sets)
        with surroundings(recipe):
            federation = set_up_client(recipe, turn.client, file)
            _check_agreed(federation, turn)
            message, start = _received(federation, turn, folder)
            stage, scored, update = stage_of(federation), None, None
            if turn.scores:
                rows = federation.validation[turn.client]
                stage.show(message.ledger, start)
                scored = Scored(rows=len(rows), scores=stage.score(rows, turn.round - 1))
            if train and turn.trains:
                update = _trained(federation, stage, turn, message, start, on_step)
            text = (folder / TURN).read_bytes()
    with tempfile.TemporaryDirectory() as work:
        (Path(work) / TURN).write_bytes(text)
        if scored is not None:
            (Path(work) / SCORES).write_text(json.dumps(scored.model_dump(), indent=1) + "\n")
        if update is None:
            to = share.below(address, UPDATE)
            share.put(Path(work), to, last=SCORES)
            return Taken(to, turn, mark, update, scored)
        end = replaced(start, update.tensors)
        federation.model.save_adapter(end, Path(work), base_name=recipe.model.name)
        info = {"examples": update.examples, "metrics": dict(update.metrics)}
        (Path(work) / INFO).write_text(json.dumps(info, indent=1) + "\n")
        to = share.keep(Path(work), address, UPDATE, last=INFO)
    return Taken(to, turn, mark, update, scored)


def _trained(
    federation: Federation,
    stage: Stage,
    turn: Turn,
    message: Broadcast,
    start: AdapterState,
    on_step: engine.OnTurn | None,
) -> Update:
    recipe, task = federation.recipe, federation.task
    settings = replace(federation.settings, clients=(turn.client,))
    train = own_loop(recipe) or HFTrainer(
        task, recipe.trainer_arguments, on_step, proximal=recipe.federation.proximal
    )
    rows = federation.clients[turn.client]
    one = engine.turn_of(settings, turn.client, turn.round, rows, start)
    (update,) = engine.take_turns(stage, train, [one], message.ledger, settings)
    return update


def open_turn(
    folder: str | Path, *, key: Path | None = None, sets: Sequence[str] = ()
) -> tuple[Any, Any]:
    """The model of a turn, for a training of one's own: `module, tokenizer = open_turn(folder)`.

    Its base has what the run has added so far, bit for bit as everybody's; what the round trains
    requires gradients, all else is frozen. Train it with anything, then
    `module.save_pretrained(f"{folder}/update")` and write how many rows it were into
    `update/update.json`: `{"examples": 512}`.

    Args:
        folder: On this machine's disk.
        key: As of `fedex-lora turn`.
        sets: Overrides of the recipe, e.g. `["model.name=/models/roberta"]`.

    Returns:
        A PEFT model, and its tokenizer.

    Raises:
        UserError: The folder was changed, or the model here is another than the coordinator's.
    """
    folder = Path(folder)
    turn, _ = read_turn(folder, key)
    recipe = load_recipe(folder / RECIPE, sets)
    scored = recipe.evaluation.model_copy(update={"where": "clients"})
    alone = recipe.model_copy(update={"evaluation": scored})  # no rows are needed
    federation = set_up_server(alone, roster(recipe) or [turn.client])
    _check_agreed(federation, turn, recipe)
    message, start = _received(federation, turn, folder)
    stage = stage_of(federation)
    stage.show(message.ledger, start)
    federation.model.freeze(federation.settings.method.trained(turn.round))
    return federation.model.module.train(), federation.model.tokenizer


def _check_agreed(federation: Federation, turn: Turn, recipe: Recipe | None = None) -> None:
    task, model = federation.task, federation.model
    mine = facts(recipe or federation.recipe, task, model, federation.initial)
    if different := mine.differences(Facts(turn.agreed, turn.digests)):
        raise ProtocolError(
            f"not what the coordinator's run is: {'; '.join(different)}. `set` may say where the "
            "model and the rows lie on this machine, and nothing else"
        )


def _received(federation: Federation, turn: Turn, folder: Path) -> tuple[Broadcast, AdapterState]:
    """The message, and where the client starts: as one in the process without a memory."""
    settings = federation.settings
    blob = (folder / BROADCAST).read_bytes()
    message = decode_broadcast(blob, most_down(settings, federation.initial))
    first = start_of(begin(settings, federation.initial), settings, turn.client)
    layers = settings.layers_of(turn.client)
    return message, receive(first, message, layers, settings.seed)
