"""DP-SGD at each client, as a way to train among others.

All that comes after it (means, residuals, folding, export) is computed from its result alone, so
every method keeps its guarantee.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Protocol

import torch
from datasets import Dataset
from opacus.optimizers import DPOptimizer
from torch.optim import Optimizer

from fedex_lora.aggregation.seeding import derive
from fedex_lora.engines.private.account import Spending, Steps
from fedex_lora.engines.private.gradients import per_example
from fedex_lora.engines.private.losses import Losses, logits_losses
from fedex_lora.engines.private.plan import shape_of
from fedex_lora.engines.training import Batches, make_trainer
from fedex_lora.engines.turn import OnTurn, Trained, Turn
from fedex_lora.federation.randomness import Bits, normal, poisson_sample, rehearsed, secret
from fedex_lora.model.adapted import AdaptedModel
from fedex_lora.tasks.base import IGNORED, Batch
from fedex_lora.tasks.labelled import Head, frozen_head, token_losses


class Predicting(Batches, Protocol):
    """How rows become batches, and what is predicted."""

    @property
    def regression(self) -> bool: ...


@dataclass(frozen=True)
class PrivateTrainer:
    """Abadi et al. 2016 (arXiv 1607.00133), algorithm 1, with the Trainer's optimizer and schedule.

    In each step every row is drawn with probability q = L/n by itself, and

        g = (Σ over the drawn rows of min(1, C/‖gᵢ‖)·gᵢ  +  σ·C·N(0, 1)) / L

    is what the optimizer gets. A batch that is too large for one pass is taken in several, the sum
    over all of them noised once. Which rows were drawn, and the noise, come from the operating
    system's generator, so nothing repeats. Training losses are no part of what is protected, so
    none is told.

    Attributes:
        task: How rows become batches, and whether a number is predicted.
        training: Arguments of TrainingArguments.
        max_grad_norm: C.
        noise: σ by client.
        account: Where every turn is taken down before it begins.
        rehearsal: Draws and noise are functions of the run's seed: for tests, and not private.
        on_step: Is told (turn, steps done, steps in all, loss).
        losses: Of one's own; by default those of the logits.
    """

    task: Predicting
    training: Mapping[str, Any]
    max_grad_norm: float
    noise: Mapping[str, float]
    account: Spending
    rehearsal: bool = False
    on_step: OnTurn | None = None
    losses: Losses | None = None
    together: int = 1

    def __call__(self, model: AdaptedModel, turns: Sequence[Turn]) -> list[Trained]:
        return [self._train(model, turn) for turn in turns]

    def _train(self, model: AdaptedModel, turn: Turn) -> Trained:
        began, rows, shape = perf_counter(), turn.rows, shape_of(self.training)
        spent = Steps(self.noise[turn.client], shape.expected / len(rows), shape.steps(len(rows)))
        epsilon = self.account.spend(turn.client, spent)
        seed = derive(turn.seed, "private", turn.round, turn.client)
        bits = rehearsed(seed) if self.rehearsal else secret
        model.write(turn.start)
        model.freeze(turn.trained, turn.head)
        smoothing = float(self.training.get("label_smoothing_factor", 0.0))
        collate, lengths = self.task.collator(model.tokenizer), _lengths(rows)
        with tempfile.TemporaryDirectory() as directory:
            args = {"train_sampling_strategy": "random", **self.training}
            trainer = make_trainer(model, self.task, rows, args, seed, directory)
            trainer.create_optimizer_and_scheduler(spent.count)
            head = None if self.losses is not None else frozen_head(model.module, rows)
            model.module.train()
            with per_example(model):
                inner: Any = trainer.optimizer
                optimizer = PrivateOptimizer(
                    inner, spent.noise, self.max_grad_norm, shape.expected, bits
                )
                for done in range(spent.count):
                    drawn = poisson_sample(bits, len(rows), spent.rate)
                    drawn.sort(key=lambda row: lengths[row])  # of a sum the order is free
                    parts = [
                        drawn[first : first + shape.physical]
                        for first in range(0, len(drawn), shape.physical)
                    ]
                    for part in parts:
                        batch = collate([rows[row] for row in part])
                        _backward(model, batch, self.task.regression, smoothing, head, self.losses)
                        optimizer.accumulate()
                    optimizer.finish()
                    trainer.lr_scheduler.step()  # pyright: ignore
                    if self.on_step is not None:
                        self.on_step(turn, done + 1, spent.count, None)
        model.module.zero_grad(set_to_none=True)
        model.release()
        metrics = {
            "steps": float(spent.count),
            "seconds": perf_counter() - began,
            "epsilon": epsilon,
            "noise_multiplier": spent.noise,
        }
        return Trained(metrics, model.read())


def _backward(
    model: AdaptedModel,
    batch: Batch,
    regression: bool,
    smoothing: float,
    head: Head | None,
    losses: Losses | None = None,
) -> None:
    there = {k: v.to(model.device) for k, v in batch.items()}
    if losses is not None:
        total = losses(model.module, there).sum()
    elif head is None:
        total = logits_losses(model.module, there, regression, smoothing).sum()
    else:
        labels = there.pop("labels")
        weights = 1 / labels[:, 1:].ne(IGNORED).sum(1).clamp(min=1)
        total = token_losses(head, there, labels, smoothing, weights).total
    total.backward()


def _lengths(rows: Dataset) -> list[int]:
    """Of each row; images have none."""
    if "input_ids" not in getattr(rows, "column_names", ()):
        return [0] * len(rows)
    return [len(ids) for ids in rows["input_ids"]]


class PrivateOptimizer(DPOptimizer):
    """An optimizer whose gradients are Σ clipped + σ·C·N(0, 1), over the expected batch size.

    Args:
        inner: Takes the step.
        noise: σ.
        bound: C.
        expected: L.
        bits: Where the noise is drawn from.
    """

    def __init__(
        self, inner: Optimizer, noise: float, bound: float, expected: int, bits: Bits
    ) -> None:
        super().__init__(
            inner, noise_multiplier=noise, max_grad_norm=bound, expected_batch_size=expected
        )
        self.bits = bits

    def accumulate(self) -> None:
        """Adds what a backward pass left, clipped row by row, to the sum."""
        self.signal_skip_step(True)
        self.step()
        self.zero_grad(set_to_none=True)

    def finish(self) -> None:
        """Noises the sum, which may be one of no rows at all, and takes the step."""
        for p in self.params:
            p.grad_sample = p.new_zeros((0, *p.shape))  # pyright: ignore
        self.signal_skip_step(False)
        self.step()
        self.zero_grad(set_to_none=True)

    def add_noise(self) -> None:
        """p.grad = sum + σ·C·N(0, 1)."""
        deviation = self.noise_multiplier * self.max_grad_norm
        for p in self.params:
            total: torch.Tensor = p.summed_grad  # pyright: ignore
            p.grad = (total + deviation * normal(self.bits, total)).view_as(p)
