"""Before round 1: how much noise each client adds, and how many rounds fit into the budget.

A client's own number of rows n gives its sampling rate q = L/n, where L is the expected size of a
batch: per_device_train_batch_size · gradient_accumulation_steps.
"""

from __future__ import annotations

import math
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fedex_lora.engines.private.account import Steps, epsilon, noise_for
from fedex_lora.engines.training import training_arguments
from fedex_lora.errors import RecipeError
from fedex_lora.recipe.privacy import ClientLevel, ExampleLevel

_KEY = "privacy.example_level"


@dataclass(frozen=True)
class Plan:
    """What is settled before round 1.

    Attributes:
        noise: The noise multiplier by client.
        rounds: The last round that fits.
    """

    noise: Mapping[str, float]
    rounds: int


@dataclass(frozen=True)
class Shape:
    """How a turn is cut into steps.

    Attributes:
        expected: L, the expected number of rows of a step.
        physical: How many rows go through the model at once.
        epochs: Of a turn; `max_steps` above 0 counts in their place.
    """

    expected: int
    physical: int
    epochs: float
    max_steps: int

    def steps(self, rows: int) -> int:
        """How many steps a turn has."""
        return self.max_steps if self.max_steps > 0 else self._by_epochs(rows)

    def _by_epochs(self, rows: int) -> int:
        return math.ceil(self.epochs * math.ceil(rows / self.expected))


def shape_of(training: Mapping[str, Any]) -> Shape:
    """Of the arguments of TrainingArguments."""
    with tempfile.TemporaryDirectory() as directory:
        args = training_arguments(training, 0, torch.device("cpu"), directory)
    physical = args.per_device_train_batch_size
    expected = physical * args.gradient_accumulation_steps
    return Shape(expected, physical, args.num_train_epochs, args.max_steps)


def check_rows(spec: ExampleLevel, shape: Shape, client: str, rows: int) -> None:
    """Whether an account means something for so many rows.

    Raises:
        UserError: δ is above 1/rows, or a batch would be expected to have more rows than there are.
    """
    if spec.delta > 1 / rows:
        raise RecipeError(
            f"{_KEY}.delta: {spec.delta:g} is above 1/{rows}, one over the rows of {client}: to "
            f"publish a row as it is would be allowed; set it below {1 / rows:.2g}"
        )
    if shape.expected > rows:
        raise RecipeError(
            f"training.per_device_train_batch_size: {shape.expected} rows are expected in a step "
            f"(with gradient_accumulation_steps), but {client} has {rows}; each would be drawn "
            f"with a probability of {shape.expected / rows:.3g}. Set {rows} or less, or leave "
            "that client out"
        )


def plan(
    spec: ExampleLevel,
    training: Mapping[str, Any],
    rows: Mapping[str, int],
    schedule: Sequence[Sequence[str]],
) -> Plan:
    """The noise that keeps every client within ε, or with the noise that is given the last round
    that fits.

    Args:
        training: Arguments of TrainingArguments.
        rows: By client.
        schedule: The clients of each round.

    Raises:
        UserError: Not one round fits, or no account can be given of some client's rows.
    """
    shape = shape_of(training)
    for client, count in sorted(rows.items()):
        check_rows(spec, shape, client, count)
    turns = Counter(client for clients in schedule for client in clients)
    if spec.noise_multiplier is None:
        assert spec.epsilon is not None
        noise = {
            client: noise_for(
                spec.epsilon,
                spec.delta,
                shape.expected / count,
                max(1, turns[client]) * shape.steps(count),
            )
            for client, count in rows.items()
        }
        return Plan(noise, len(schedule))
    noise = dict.fromkeys(rows, spec.noise_multiplier)
    if spec.epsilon is None:
        return Plan(noise, len(schedule))
    most = {
        client: _turns_within(spec, shape, count, turns[client]) for client, count in rows.items()
    }
    taken: Counter[str] = Counter()
    for done, clients in enumerate(schedule):
        taken.update(clients)
        if over := [c for c in clients if taken[c] > most.get(c, len(schedule))]:
            if not done:
                raise _nothing_fits(spec, shape, over[0], rows[over[0]])
            return Plan(noise, done)
    return Plan(noise, len(schedule))


def _turns_within(spec: ExampleLevel, shape: Shape, rows: int, most: int) -> int:
    """How many turns, up to `most`, the given noise allows a client with so many rows."""
    assert spec.noise_multiplier is not None and spec.epsilon is not None
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        steps = Steps(spec.noise_multiplier, shape.expected / rows, middle * shape.steps(rows))
        low, high = (middle, high) if epsilon([steps], spec.delta) <= spec.epsilon else (
            low, middle - 1
        )  # fmt: skip
    return low


def _nothing_fits(spec: ExampleLevel, shape: Shape, client: str, rows: int) -> RecipeError:
    assert spec.noise_multiplier is not None
    one = Steps(spec.noise_multiplier, shape.expected / rows, shape.steps(rows))
    return RecipeError(
        f"{_KEY}.epsilon: {spec.epsilon:g} allows no round: one turn of {client} ({one.count} "
        f"steps at sampling rate {one.rate:.3g}, noise multiplier {one.noise:g}) already comes to "
        f"{epsilon([one], spec.delta):.4g}. Raise noise_multiplier, or leave it out and have it "
        "found; take fewer epochs or smaller batches; or raise epsilon"
    )


def client_rounds(spec: ClientLevel, schedule: Sequence[Sequence[str]]) -> int:
    """The last round that fits into the budget of every client, each of which pays for the rounds
    that it is asked in: who that is follows from the seed, which others know, so that no secret
    draw lowers the price.

    Raises:
        UserError: Not one round fits, or δ is above one over the number of clients.
    """
    names = {client for clients in schedule for client in clients}
    if spec.delta > 1 / len(names):
        raise RecipeError(
            f"privacy.client_level.delta: {spec.delta:g} is above 1/{len(names)}, one over the "
            f"clients: to publish a client's update as it is would be allowed; set it below "
            f"{1 / len(names):.2g}"
        )
    taken: Counter[str] = Counter()
    for done, clients in enumerate(schedule):
        taken.update(clients)
        most = Steps(spec.noise_multiplier, 1.0, max(taken.values()))
        if spec.epsilon is not None and (cost := epsilon([most], spec.delta)) > spec.epsilon:
            if not done:
                raise RecipeError(
                    f"privacy.client_level.epsilon: {spec.epsilon:g} allows no round: one already "
                    f"costs {cost:.4g}; raise noise_multiplier, or epsilon"
                )
            return done
    return len(schedule)
