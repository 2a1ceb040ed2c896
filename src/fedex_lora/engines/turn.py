"""One client's turn in a round: place, write, freeze, train, read, transform, message.

There is one for clients in this process, on other machines, and for several in one pass. What
trains is a function: the Trainer of transformers, several clients in one pass, or a loop of one's
own; what becomes of an update before it is sent is a chain of functions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from datasets import Dataset
from torch import Tensor

from fedex_lora.aggregation.adapter import AdapterState, Factors, weight_name
from fedex_lora.aggregation.ledger import Ledger
from fedex_lora.aggregation.pruning import Pruning
from fedex_lora.aggregation.seeding import derive
from fedex_lora.engines.stage import Stage
from fedex_lora.errors import UserError
from fedex_lora.federation.messages import Tensors, Update, flat
from fedex_lora.federation.settings import Settings
from fedex_lora.federation.state import own_part, sent_part
from fedex_lora.model.adapted import AdaptedModel


@dataclass(frozen=True)
class Turn:
    """What a training is given.

    Attributes:
        client: The client's name.
        round: The round, from 1 on.
        rows: The client's rows, encoded.
        start: The factors and the head that it starts from.
        trained: Which factors are trained, of "A" and "B".
        seed: The run's; everything random derives from (seed, round, client).
        pruning: What is added to the loss, of a client whose rank may shrink.
        head: Whether the head is trained.
    """

    client: str
    round: int
    rows: Dataset
    start: AdapterState
    trained: frozenset[str]
    seed: int
    pruning: Pruning | None = None
    head: bool = True

    @property
    def gradients(self) -> bool:
        """Whether gradients of the adapted layers' whole weights are asked for in the place of a
        training."""
        return any(weight_name(name) in self.start.head for name in self.start.layers)

    @property
    def plain_start(self) -> AdapterState:
        """The start without the places of those gradients."""
        asked = {weight_name(name) for name in self.start.layers}
        head = {name: value for name, value in self.start.head.items() if name not in asked}
        return AdapterState(self.start.layers, head)


def turn_of(
    settings: Settings, client: str, round: int, rows: Dataset, start: AdapterState
) -> Turn:
    """A client's turn as the federation's method has it."""
    method = settings.method
    trained, pruning = method.trained(round), method.assignment.pruning
    return Turn(client, round, rows, start, trained, settings.seed, pruning)


@dataclass(frozen=True)
class Trained:
    """What a training came to.

    Attributes:
        metrics: Numbers by name, for the records: loss, steps, seconds, and what else there is.
        end: The factors and the head that it ended with; None for those that lie on the model.
    """

    metrics: Mapping[str, float] = field(default_factory=dict)
    end: AdapterState | None = None


class Train(Protocol):
    """A way to train: from where turns start to where they end.

    Attributes:
        together: How many clients it trains in one pass.
    """

    @property
    def together(self) -> int: ...

    def __call__(self, model: AdaptedModel, turns: Sequence[Turn]) -> list[Trained]:
        """Trains up to `together` clients; their base is in place already.

        Returns:
            What each came to, in the order of `turns`.
        """
        ...


OnTurn = Callable[[Turn, int, int, float | None], None]
"""Is told (turn, steps done, steps in all, the last step's loss or None)."""

Transform = Callable[[Tensors, Turn], Mapping[str, Tensor]]
"""(the update as a drift from the start, the turn) → the drift that is sent instead."""


def take_turns(
    stage: Stage,
    train: Train,
    turns: Sequence[Turn],
    ledger: Ledger,
    settings: Settings,
    transform: Transform | None = None,
) -> list[Update]:
    """The updates of some clients, as many as `train` takes in one pass.

    Args:
        ledger: What their base has beyond the pretrained weights.
    """
    pairs = [_own_pair(stage, train, turn, ledger) for turn in turns if turn.start.pair]
    stage.place(ledger, turns[0].start)
    found = train(stage.model, turns)
    if len(found) != len(turns):
        raise UserError(f"a training of {len(turns)} clients came back with {len(found)} results")
    ends = [stage.model.read() if trained.end is None else trained.end for trained in found]
    if pairs:
        ends = [replace(end, pair=pair) for end, (pair, _) in zip(ends, pairs, strict=True)]
        found = [_told(one, more) for one, (_, more) in zip(found, pairs, strict=True)]
    if settings.scaffold and not all(end.variates for end in ends):
        raise UserError("scaffold: this way to train makes no control variates; take HFTrainer")
    return [
        _update(turn, flat(end), trained.metrics, settings, transform)
        for turn, end, trained in zip(turns, ends, found, strict=True)
    ]


def _own_pair(
    stage: Stage, train: Train, turn: Turn, ledger: Ledger
) -> tuple[dict[str, Factors], Mapping[str, float]]:
    """The client's own pair, trained in the place of the shared one, which is part of the base
    meanwhile, as is its share; and what that training came to."""
    start = turn.start
    # a base has what is given here taken off, so it is negative
    shared = {n: replace(f, scale=start.pair[n].scale - f.scale) for n, f in start.layers.items()}
    stage.place(ledger, part=shared)
    alone = AdapterState(start.pair, start.head)
    seed = derive(turn.seed, "own pair")
    (found,) = train(stage.model, [replace(turn, start=alone, seed=seed, head=False)])
    end = stage.model.read() if found.end is None else found.end
    return dict(end.layers), found.metrics


def _told(trained: Trained, pair: Mapping[str, float]) -> Trained:
    """With the loss of the client's own pair, and the seconds of both trainings."""
    metrics = {"seconds": trained.metrics.get("seconds", 0.0) + pair.get("seconds", 0.0)}
    metrics |= {"own_loss": pair["loss"]} if "loss" in pair else {}
    return replace(trained, metrics={**trained.metrics, **metrics})


def _update(
    turn: Turn,
    end: Tensors,
    metrics: Mapping[str, float],
    settings: Settings,
    transform: Transform | None,
) -> Update:
    assignment = settings.method.assignment
    kept = own_part(settings, end) if assignment.private else {}
    sent = sent_part(settings, end, turn.round)
    if transform is not None and settings.scaffold:
        raise UserError("scaffold: variates cross as they are; leave the transform out")
    if transform is not None and settings.method.exchanges:  # of what stays, nothing is hidden
        start = flat(turn.start)
        drift = {name: value - start[name] for name, value in sent.items()}
        sent = {name: start[name] + moved for name, moved in transform(drift, turn).items()}
    return Update(turn.round, turn.client, sent, len(turn.rows), metrics, kept)
