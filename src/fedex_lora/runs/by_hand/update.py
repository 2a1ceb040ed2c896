"""What came back from a client, if it is an update of the round that is open."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from fedex_lora.aggregation.adapter import AdapterState, Factors
from fedex_lora.disk import parsed, reason
from fedex_lora.engines.remote.replies import check_scores
from fedex_lora.errors import ProtocolError, UserError
from fedex_lora.federation.checks import check
from fedex_lora.federation.codec import worded
from fedex_lora.federation.loop import Exchange
from fedex_lora.federation.messages import Update, flat, only
from fedex_lora.federation.state import base_increment
from fedex_lora.model.adapted import AdaptedModel
from fedex_lora.model.config import CONFIG, WEIGHTS, adapter_folder
from fedex_lora.model.keys import NAMES, PREFIX, adapter_keys
from fedex_lora.model.plain import configured, unsupported
from fedex_lora.runs.by_hand import share
from fedex_lora.runs.by_hand.folder import (
    INFO,
    SCORES,
    TURN,
    UPDATE,
    Scored,
    Told,
    Turn,
    changed,
    sha256,
    told,
    turn_of,
)
from fedex_lora.tasks import Task

Base = Callable[[str], Tensor]  # of a layer's name: its frozen weight, out × in
_EMBEDDING = ".base_layer.weight"  # PEFT saves adapted embeddings along
_WHOLE = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")


@dataclass(frozen=True)
class Waiting:
    """What an update is compared with.

    Attributes:
        run: The run's number.
        opened: SHA-256 of the turn.json that each client was sent, by round and client.
        examples: Numbers of rows that the coordinator gives, by client.
    """

    run: str
    opened: Mapping[str, Mapping[str, str]]
    examples: Mapping[str, int]


@dataclass(frozen=True)
class Back:
    """What came back from a client.

    Attributes:
        update: What it trained; None where scores alone were asked for.
        scored: How good it finds the model that it was sent; None if it was not asked, or did not
            say.
    """

    client: str
    update: Update | None
    scored: Scored | None


def read_back(
    address: str, waiting: Waiting, exchange: Exchange, model: AdaptedModel, task: Task
) -> Back:
    """What lies at an address: a turn's folder with `update/` in it, or that alone.

    Raises:
        UserError: It is of another run, round or client, of a recipe or a start that was changed,
            no adapter of the shape that was sent out, or scores that cannot be; or the address
            cannot be read.
    """
    with share.local(address) as folder:
        where = folder / UPDATE if (folder / UPDATE).is_dir() else folder
        turn = _turn(folder, waiting, exchange)
        scored = told(Scored, where / SCORES) if turn.scores else None
        if scored is not None:
            if not scored.scores:
                raise ProtocolError(f"{SCORES}: holds no score; expected {task.primary} at least")
            try:
                check_scores(scored.scores, task)
            except UserError as error:
                raise ProtocolError(f"{SCORES}: {error}") from None
        update = _update(where, turn.client, waiting, exchange, model) if turn.trains else None
        return Back(turn.client, update, scored)


def _update(
    where: Path, client: str, waiting: Waiting, exchange: Exchange, model: AdaptedModel
) -> Update:
    start = exchange.start(client)
    # PEFT puts an adapter that has a name of its own into a subfolder
    adapter = adapter_folder(where) if where.name == UPDATE else where
    got = _tensors(adapter, start, _bases(exchange, client, model))
    given = told(Told, where / INFO) or Told()
    examples = waiting.examples.get(client, given.examples)
    if examples is None:
        raise ProtocolError(
            "how many rows were trained on is not said; write "
            f'{{"examples": N}} into {UPDATE}/{INFO}, or give `examples={client}=N`'
        )
    trained = exchange.settings.method.sent(exchange.round)
    for name, value in flat(start).items():
        kind = name.partition("/")[0]
        if kind not in trained and kind != "head" and not torch.equal(got[name], value):
            raise ProtocolError(
                f"{worded(name)} is frozen in this round, and was changed; train "
                f"{' and '.join(sorted(trained & set('AB')))} and the head alone"
            )
    update = Update(exchange.round, client, only(got, trained), examples, given.metrics)
    check(update, start, exchange.round, exchange.settings)
    return update


def _turn(folder: Path, waiting: Waiting, exchange: Exchange) -> Turn:
    """Whose turn it was, if that turn is open."""
    try:
        text = (folder / TURN).read_bytes()
    except OSError:
        raise ProtocolError(
            f"no {TURN} there; give the folder that `fedex-lora round open` wrote, with {UPDATE}/ "
            "in it"
        ) from None
    turn = turn_of(text, TURN)
    if turn.run != waiting.run:
        raise ProtocolError(f"of another run, {turn.run}; this is {waiting.run}")
    if turn.round != exchange.round:
        late = f"round {turn.round} is closed" if turn.round < exchange.round else "it is ahead"
        raise ProtocolError(
            f"the update of {turn.client} is of round {turn.round}; the run waits for those of "
            f"round {exchange.round}: {late}"
        )
    opened = waiting.opened.get(str(turn.round), {})
    if turn.client not in opened:
        raise ProtocolError(f"{turn.client!r} was not asked in round {turn.round}")
    if opened[turn.client] != sha256(text):
        raise ProtocolError(
            f"its {TURN} is not the one that {turn.client} was sent for round {turn.round}: it was "
            "changed, or the round was opened anew since; that turn has to be trained again"
        )
    if wrong := changed(folder, turn):
        raise ProtocolError(f"{wrong[0]} was changed; train again from the folder as it was sent")
    return turn


def _bases(exchange: Exchange, client: str, model: AdaptedModel) -> Base:
    """The frozen weight of a layer, out × in, as the client had it."""
    settings, start = exchange.settings, exchange.start(client)

    def base(name: str) -> Tensor:
        own = None if settings.method.shared_base else start.layers[name]
        increment = base_increment(exchange.state.ledger, name, own)
        whole = model.pretrained(name)
        return whole if increment is None else whole + increment.dense().to(whole)

    return base


def _tensors(where: Path, start: AdapterState, base: Base) -> dict[str, Tensor]:
    """All tensors of the adapter by flat name, if it has the shape of `start`."""
    if not (where / WEIGHTS).is_file() and any((where / name).is_file() for name in _WHOLE):
        raise ProtocolError(
            "holds a whole model; expected the adapter alone: save the PEFT model, before "
            "anything is merged"
        )
    try:
        config = parsed((where / CONFIG).read_bytes())
        stored = load_file(where / WEIGHTS)
    except (OSError, ValueError, SafetensorError) as error:
        raise ProtocolError(
            f"no PEFT adapter: {reason(error)}; expected {CONFIG} and {WEIGHTS} in {UPDATE}/"
        ) from None
    if refused := unsupported(config):
        raise ProtocolError(f"the adapter has {refused}; train the adapter that was sent out")
    keys = adapter_keys(stored, UPDATE).stored
    found = {key.removeprefix(PREFIX): stored[name] for key, name in keys.items()}
    got = {}
    for name, like in start.layers.items():
        got |= _factors(found, name, like, config)
    for name in start.head:
        if name not in found:
            raise ProtocolError(f"{name} is missing; save what modules_to_save trains as well")
        got[f"head/{name}"] = found.pop(name)
    _check_rest(found, start, base)
    for name, value in got.items():
        if value.dtype != torch.float32:
            raise ProtocolError(
                f"{worded(name)} was saved in {str(value.dtype).removeprefix('torch.')}, which "
                "rounds what was learned; keep the adapter in float32 and save it so"
            )
    return got


def _factors(
    found: dict[str, Tensor], name: str, like: Factors, config: Mapping[str, Any]
) -> dict[str, Tensor]:
    """A and B of a layer, taken out of `found`."""
    names = next((n for n in NAMES.values() if f"{name}.{n[0]}" in found), NAMES[False])
    try:
        a, b = (found.pop(f"{name}.{part}") for part in names)
    except KeyError as error:
        raise ProtocolError(f"{error.args[0]} is missing; train the adapter sent out") from None
    if a.shape != like.A.shape or b.shape != like.B.shape:
        shapes = f"A {tuple(a.shape)}, B {tuple(b.shape)}"
        sent = f"A {tuple(like.A.shape)}, B {tuple(like.B.shape)}"
        raise ProtocolError(f"{name} has {shapes}; sent out were {sent}")
    _, scale = configured(config, name, a.shape[0])
    if abs(scale - like.scale) > 1e-6 * like.scale:
        raise ProtocolError(
            f"{name} has scale {scale:g} by its {CONFIG}, and was sent out with {like.scale:g}"
        )
    return {f"A/{name}": a, f"B/{name}": b}


def _check_rest(found: Mapping[str, Tensor], start: AdapterState, base: Base) -> None:
    """What is neither factor nor head was frozen; embeddings that PEFT saved along may be there."""
    for key, tensor in found.items():
        name = key.removesuffix(_EMBEDDING)
        if key.endswith(_EMBEDDING) and name in start.layers:
            weight = base(name)
            if tensor.shape not in (weight.shape, weight.T.shape):
                raise ProtocolError(f"{key} has shape {tuple(tensor.shape)}; it was frozen")
            weight = weight if tensor.shape == weight.shape else weight.T
            if torch.allclose(tensor.float(), weight, rtol=1e-2, atol=1e-5):
                continue
            raise ProtocolError(f"the frozen weight of {name} was changed; train the adapter alone")
        raise ProtocolError(
            f"{key} was trained or saved along, and was frozen when it was sent out; expected "
            "the factors and the head alone"
        )
