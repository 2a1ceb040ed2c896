"""Each client's own batches, and one batch of all of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer

from fedex_lora.tasks.base import Batch, Collate


@dataclass(frozen=True)
class Rows:
    """A client's rows of a step, as yet unpadded; opaque, so that the loader leaves them alone."""

    rows: list[dict[str, Any]]


def batches(trainer: Trainer) -> Iterator[Rows]:
    """The batches that a Trainer just made would train on, epoch after epoch without end.

    They are drawn with the client's own random numbers, those that the Trainer's seed began.
    """
    stream = _Stream(torch.get_rng_state())
    with stream.used():
        loader: Any = trainer.get_train_dataloader()
    return _endless(loader, stream)


def _endless(loader: Any, stream: _Stream) -> Iterator[Rows]:
    epoch = 0
    while True:
        with stream.used():
            loader.set_epoch(epoch)
            left = iter(loader)
        while (batch := _next(left, stream)) is not None:
            yield batch
        epoch += 1


def _next(left: Iterator[Rows], stream: _Stream) -> Rows | None:
    with stream.used():
        return next(left, None)


@dataclass
class _Stream:
    """A client's random numbers, while others draw theirs from the one generator of torch."""

    state: Tensor

    @contextmanager
    def used(self) -> Iterator[None]:
        outer = torch.get_rng_state()
        torch.set_rng_state(self.state)
        try:
            yield
        finally:
            self.state = torch.get_rng_state()
            torch.set_rng_state(outer)


def together(parts: Sequence[Rows], collate: Collate) -> tuple[Batch, Tensor]:
    """One batch of all clients' rows, equally many of each, one client after the other.

    A client with fewer rows than another repeats its first one to make up for it.

    Returns:
        The batch, padded to the longest of all, and which of its rows count.
    """
    most = max(len(part.rows) for part in parts)
    rows: list[dict[str, Any]] = []
    real: list[bool] = []
    for part in parts:
        fill = most - len(part.rows)
        rows += part.rows + part.rows[:1] * fill
        real += [True] * len(part.rows) + [False] * fill
    return collate(rows), torch.tensor(real)
