"""Local training of several clients in one forward and backward pass a step."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from transformers import set_seed

from fedex_lora.aggregation.seeding import derive
from fedex_lora.engines.fused.batches import Rows, batches, together
from fedex_lora.engines.fused.losses import client_losses, items, labelled_losses
from fedex_lora.engines.fused.stack import Stack
from fedex_lora.engines.trainer import Looks
from fedex_lora.engines.training import (
    HFTrainer,
    OnStep,
    attention,
    make_trainer,
    steps_of,
    training_arguments,
)
from fedex_lora.engines.training_log import TrainingLog
from fedex_lora.engines.turn import OnTurn, Trained, Turn
from fedex_lora.model.adapted import AdaptedModel
from fedex_lora.tasks import Task
from fedex_lora.tasks.base import Collate
from fedex_lora.tasks.labelled import Head, frozen_head


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


@dataclass(frozen=True)
class Fused:
    """`HFTrainer` for several clients of equal rank and one base, in one pass.

    A client's batches, loss, clipping, optimizer, schedule and number of steps are its own, so
    without dropout it ends, up to rounding, where it would have ended by itself. Dropout is drawn
    for all of them from one stream, which their names seed. The seconds are shared out evenly.

    Attributes:
        together: How many clients at most.
    """

    task: Task
    training: Mapping[str, Any]
    together: int
    on_step: OnTurn | None = None
    log: TrainingLog | None = None

    def __call__(self, model: AdaptedModel, turns: Sequence[Turn]) -> list[Trained]:
        if len(turns) == 1:
            alone = HFTrainer(self.task, self.training, self.on_step, self.log)
            return alone(model, turns)
        began, first = perf_counter(), turns[0]
        names = ", ".join(turn.client for turn in turns)
        on_step = partial(self.on_step, replace(first, client=names)) if self.on_step else None
        model.freeze(first.trained)
        stack = Stack(model.trained_layers(), len(turns))
        with tempfile.TemporaryDirectory() as directory:
            members = self._members(model, turns, stack, directory)
            clients = (turn.client for turn in turns)
            set_seed(derive(first.seed, "train", first.round, *clients))
            losses = _train(model, self.task, stack, members, on_step)
        found = {}
        for place, (member, loss) in enumerate(zip(members, losses)):
            stack.get(place)
            metrics = {"loss": loss / member.steps, "steps": float(member.steps)}
            found[member.turn.client] = Trained(metrics, model.read())
        share = {"seconds": (perf_counter() - began) / len(turns)}
        results = (found[turn.client] for turn in turns)
        return [replace(result, metrics={**result.metrics, **share}) for result in results]

    def _members(
        self, model: AdaptedModel, turns: Sequence[Turn], stack: Stack, directory: str
    ) -> list[_Member]:
        """The clients in the order of the stack: those with the most steps first."""
        args = training_arguments(self.training, 0, model.device, directory)
        steps = {turn.client: steps_of(len(turn.rows), args) for turn in turns}
        members = []
        for place, turn in enumerate(sorted(turns, key=lambda turn: -steps[turn.client])):
            model.write(turn.start)
            stack.put(place)
            seed = derive(turn.seed, "train", turn.round, turn.client)
            with stack.one(place):
                trainer = make_trainer(
                    model, self.task, turn.rows, self.training, seed, directory, collate=Rows
                )
                own = batches(trainer)
                trainer.create_optimizer_and_scheduler(steps[turn.client])
            members.append(_Member(turn, steps[turn.client], trainer, own, stack.trained(place)))
        return members


def _train(
    model: AdaptedModel,
    task: Task,
    stack: Stack,
    members: Sequence[_Member],
    on_step: OnStep | None,
) -> list[float]:
    """Trains all to their ends; returns the sum of each one's losses."""
    sums = torch.zeros(len(members), device=model.device)
    looks = Looks()
    collate, last = task.collator(model.tokenizer), members[0].steps
    head = frozen_head(model.module, members[0].turn.rows)
    model.module.train()
    with stack.all(), attention(members[0].trainer.args):
        for done in range(last):
            active = [m for m in members if m.steps > done]
            stack.active = len(active)
            losses = _step(model, task, stack, active, collate, head)
            sums[: len(active)] += losses
            if on_step is not None:
                on_step(done + 1, last, looks.read(losses.mean()))
    return sums.tolist()


def _step(
    model: AdaptedModel,
    task: Task,
    stack: Stack,
    members: Sequence[_Member],
    collate: Collate,
    head: Head | None,
) -> Tensor:
    """One optimizer step of each; returns their losses."""
    batch, real = together([next(m.batches) for m in members], collate)
    labels = batch.pop("labels")
    parts = zip(members, labels.chunk(len(members)), real.chunk(len(members)))
    divisors = [items(m.trainer, part[counts]) for m, part, counts in parts]
    labels, real = labels.to(model.device), real.to(model.device)
    batch = {k: v.to(model.device) for k, v in batch.items()}
    with members[0].trainer.accelerator.autocast():
        if head is None:
            logits = model.module(**batch).logits
            losses = client_losses(logits.float(), labels, real, divisors, task.regression)
            total = losses.sum()
        else:
            total, losses = labelled_losses(head, batch, labels, real, divisors)
    total.backward()
    for member in members:
        member.step()
    stack.zero_grad()
    return losses.detach()
