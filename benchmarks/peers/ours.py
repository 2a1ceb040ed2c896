"""Our round, as a run has it."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import torch

from benchmarks.peers.common import Asked, Ended, bases, serve
from fedex_lora.aggregation.adapter import AdapterState
from fedex_lora.engines.setup import set_up
from fedex_lora.federation.loop import run_round
from fedex_lora.federation.messages import Update
from fedex_lora.federation.state import begin
from fedex_lora.runs.autotune import settle_fuse, settle_precision
from fedex_lora.runs.here import local_engine


def as_it_is(connection: Connection, asked: Asked) -> None:
    """With the precision and the fusing that this machine is faster with."""
    serve(connection, rounds(asked, "auto", "auto"))


def in_float32(connection: Connection, asked: Asked) -> None:
    """As the peers are: in float32, one client after the other."""
    serve(connection, rounds(asked, "float32", 1))


def rounds(asked: Asked, precision: str, fuse: int | str) -> Iterator[Ended]:
    """Each from where the last one ended."""
    torch.set_num_threads(asked.threads)
    federation, _ = settle_precision(set_up(asked.recipe(precision=precision, fuse=fuse)))
    federation, _ = settle_fuse(federation)
    engine, settings = local_engine(federation), federation.settings
    state = begin(settings, federation.initial)

    def weights(adapter: AdapterState) -> dict[str, torch.Tensor]:
        own = bases(federation.model.module)
        return {
            name: own[name] + f.scale * f.B.double() @ f.A.double()
            for name, f in adapter.layers.items()
        }

    while True:
        before = state
        kept: list[tuple[Update, AdapterState]] = []
        state, _ = run_round(state, settings, engine, partial(_keep, kept))
        engine.stage.place(before.ledger)
        start = weights(AdapterState(before.factors))
        ends = [weights(end) for _, end in kept]
        engine.stage.place(state.ledger)
        got = weights(AdapterState(state.factors))
        yield Ended(start, ends, [update.examples for update, _ in kept], {"": got})


def _keep(kept: list[tuple[Update, AdapterState]], _: int, *told: Any) -> None:
    kept.append((told[0], told[1]))
