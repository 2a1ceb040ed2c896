"""What a client's turn costs beside its optimizer steps."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from time import process_time
from typing import Any
from unittest import mock

import torch

from benchmarks.results import Figure, Row
from benchmarks.rounds import recipe
from fedex_lora.engines.setup import set_up
from fedex_lora.engines.trainer import LabelledTrainer
from fedex_lora.engines.training import quick_collections
from fedex_lora.federation.loop import Exchange
from fedex_lora.federation.state import begin
from fedex_lora.runs.here import local_engine

CLIENTS = 100


def row(data: Path, repeats: int = 5) -> Row:
    """CPU seconds of 100 turns of one step each, and of what of them is no step."""
    spec = recipe("mrpc", data, CLIENTS).with_engine(precision="float32", fuse=1)
    many = spec.federation.model_copy(update={"clients": CLIENTS})
    federation = set_up(spec.model_copy(update={"federation": many}))
    engine, settings = local_engine(federation), federation.settings
    exchange = Exchange(begin(settings, federation.initial), settings, settings.sample(1))
    inside: list[float] = []
    steps = [(LabelledTrainer, "training_step"), (torch.nn.utils, "clip_grad_norm_")]
    patches = [
        mock.patch.object(where, name, _timed(getattr(where, name), inside))
        for where, name in (*steps, (torch.optim.AdamW, "step"))
    ]
    took = []
    with quick_collections(), patches[0], patches[1], patches[2]:
        for _ in range(repeats + 1):
            inside.clear()
            began = process_time()
            for _ in engine.train(exchange):
                pass
            took.append((process_time() - began, sum(inside)))
    outside = [(whole - step) / CLIENTS for whole, step in took[1:]]
    inner = [step / CLIENTS for _, step in took[1:]]
    return Row(
        "A client's turn beside its steps: MiniLM, 100 clients with one step each",
        [
            Figure("beside its step, CPU seconds", *_middle(outside), at_most=0.005),
            Figure("its step: forward, backward, clipping, optimizer", *_middle(inner)),
        ],
        ["In float32, one client after the other, rounds of 100 turns."],
    )


def _timed(work: Callable[..., Any], spent: list[float]) -> Callable[..., Any]:
    def measured(*args: Any, **given: Any) -> Any:
        began = process_time()
        found = work(*args, **given)
        spent.append(process_time() - began)
        return found

    return measured


def _middle(values: list[float]) -> tuple[float, str, float]:
    middle = statistics.median(values)
    return middle, "s", (max(values) - min(values)) / middle
