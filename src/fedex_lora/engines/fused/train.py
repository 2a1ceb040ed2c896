"""Local training of several clients in one forward and backward pass a step."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import set_seed

from fedex_lora.aggregation.adapter import AdapterState
from fedex_lora.aggregation.seeding import derive
from fedex_lora.engines.fused.batches import Rows, batches, together
from fedex_lora.engines.fused.losses import client_losses, items
from fedex_lora.engines.fused.stack import Stack
from fedex_lora.engines.training import (
    OnStep,
    attention,
    made_update,
    make_trainer,
    steps_of,
    training_arguments,
)
from fedex_lora.federation.messages import Update
from fedex_lora.model.adapted import AdaptedModel
from fedex_lora.tasks import Task
from fedex_lora.tasks.base import Collate


@dataclass(frozen=True)
class Turn:
    """What one client brings to a round: its name, its encoded rows, and what it starts from."""

    client: str
    rows: Dataset
    start: AdapterState


@dataclass(frozen=True)
class _Member:
    """A client that trains: everything of its own but the pass through the model."""

    turn: Turn
    steps: int
    trainer: Any
    batches: Iterator[Rows]
    parameters: list[nn.Parameter]

    def step(self) -> None:
        """Clips its gradients and takes the optimizer's and the schedule's step."""
        most = self.trainer.args.max_grad_norm
        if most > 0:
            nn.utils.clip_grad_norm_(self.parameters, most)
        self.trainer.optimizer.step()
        self.trainer.lr_scheduler.step()


def train_fused(
    model: AdaptedModel,
    task: Task,
    turns: Sequence[Turn],
    *,
    trained: frozenset[str],
    training: Mapping[str, Any],
    seed: int,
    round: int,
    on_step: OnStep | None = None,
) -> list[Update]:
    """`fedex_lora.engines.training.train_client` for several clients of equal rank and one base.

    A client's batches, loss, clipping, optimizer, schedule and number of steps are its own, so
    without dropout it ends, up to rounding, where it would have ended by itself. Dropout is drawn
    for all of them from one stream, which their names seed.

    Returns:
        The updates, in the order of `turns`; the seconds are shared out evenly.
    """
    began = perf_counter()
    model.freeze(trained)
    stack = Stack(model.trained_layers(), len(turns))
    with tempfile.TemporaryDirectory() as directory:
        members = _members(model, task, turns, stack, training, seed, round, directory)
        set_seed(derive(seed, "train", round, *(turn.client for turn in turns)))
        losses = _train(model, task, stack, members, on_step)
    ends = {}
    for place, member in enumerate(members):
        stack.get(place)
        ends[member.turn.client] = model.read()
    seconds = (perf_counter() - began) / len(turns)
    metrics = {
        m.turn.client: {"loss": loss / m.steps, "steps": float(m.steps), "seconds": seconds}
        for m, loss in zip(members, losses)
    }
    return [
        made_update(round, t.client, ends[t.client], trained, len(t.rows), metrics[t.client])
        for t in turns
    ]


def _members(
    model: AdaptedModel,
    task: Task,
    turns: Sequence[Turn],
    stack: Stack,
    training: Mapping[str, Any],
    seed: int,
    round: int,
    directory: str,
) -> list[_Member]:
    """The clients in the order of the stack: those with the most steps first."""
    steps = {turn.client: _steps(model, task, turn, training, directory) for turn in turns}
    order = sorted(turns, key=lambda turn: -steps[turn.client])
    members = []
    for place, turn in enumerate(order):
        model.write(turn.start)
        stack.put(place)
        local = derive(seed, "train", round, turn.client)
        with stack.one(place):
            trainer = make_trainer(model, task, turn.rows, training, local, directory, collate=Rows)
            own = batches(trainer)
            trainer.create_optimizer_and_scheduler(steps[turn.client])
        members.append(_Member(turn, steps[turn.client], trainer, own, stack.trained(place)))
    return members


def _steps(
    model: AdaptedModel, task: Task, turn: Turn, training: Mapping[str, Any], directory: str
) -> int:
    args = training_arguments(training, 0, model.device, directory)
    return steps_of(len(turn.rows), args)


def _train(
    model: AdaptedModel,
    task: Task,
    stack: Stack,
    members: Sequence[_Member],
    on_step: OnStep | None,
) -> list[float]:
    """Trains all to their ends; returns the sum of each one's losses."""
    sums = torch.zeros(len(members), device=model.device)
    collate, last = task.collator(model.tokenizer), members[0].steps
    model.module.train()
    with stack.all(), attention(members[0].trainer.args):
        for done in range(last):
            active = [m for m in members if m.steps > done]
            stack.active = len(active)
            sums[: len(active)] += _step(model, task, stack, active, collate)
            if on_step is not None:
                on_step(done + 1, last)
    return sums.tolist()


def _step(
    model: AdaptedModel, task: Task, stack: Stack, members: Sequence[_Member], collate: Collate
) -> Tensor:
    """One optimizer step of each; returns their losses."""
    batch, real = together([next(m.batches) for m in members], collate)
    labels = batch.pop("labels")
    parts = zip(members, labels.chunk(len(members)), real.chunk(len(members)))
    divisors = [items(m.trainer, part[counts]) for m, part, counts in parts]
    labels, real = labels.to(model.device), real.to(model.device)
    with members[0].trainer.accelerator.autocast():
        logits = model.module(**{k: v.to(model.device) for k, v in batch.items()}).logits
    losses = client_losses(logits.float(), labels, real, divisors, task.regression)
    losses.sum().backward()
    for member in members:
        member.step()
    stack.zero_grad()
    return losses.detach()
