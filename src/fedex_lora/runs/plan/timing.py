"""Seconds of a run, estimated from a few real steps of training and evaluation."""

from __future__ import annotations

import os
import platform
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import psutil
import torch
from datasets import Dataset
from transformers import TrainingArguments

from fedex_lora.aggregation.adapter import AdapterState, Factors
from fedex_lora.aggregation.aggregator import Aggregator
from fedex_lora.engines.fused import Fused
from fedex_lora.engines.setup import Federation
from fedex_lora.engines.training import steps_of, training_arguments
from fedex_lora.engines.turn import Turn
from fedex_lora.federation.messages import flat
from fedex_lora.federation.settings import Settings
from fedex_lora.federation.state import begin, first, own_part, start_of, step
from fedex_lora.recipe import EvaluationSpec

_STEPS = 3  # measured after one that warms up
_ROWS = 8  # measured of the evaluation


@dataclass(frozen=True)
class Timing:
    """Seconds, measured here, and what they add up to; clients take turns.

    Attributes:
        step: Of one optimizer step of the client with the most rows.
        turn: Of a client's turn beside its steps.
        row: Of evaluating one row.
        server: Of one aggregation.
        steps: Optimizer steps of each client in a round.
        run: Of the whole run.
        resident: Bytes of memory that the process held after training: on a GPU, at its peak.
        machine: What it was measured on.
    """

    step: float
    turn: float
    row: float
    server: float
    steps: Mapping[str, int]
    run: float
    resident: int
    machine: str


def measure(federation: Federation) -> Timing:
    """Trains and evaluates for a few steps; the federation's model is changed by that."""
    recipe, settings = federation.recipe, federation.settings
    args = _arguments(recipe.trainer_arguments, federation)
    step, turn = _steps(federation)
    resident = _resident(federation.model.device)
    row = _evaluate(federation)
    initial = federation.initial
    server = server_seconds(settings, initial) if settings.method.exchanges else 0.0
    steps = {name: steps_of(len(part), args) for name, part in federation.clients.items()}
    times = 1 + ("pair" in settings.method.assignment.own)  # a pair of its own is trained too
    rounds = sum(
        sum(times * (turn + step * steps[name]) for name in settings.sample(round)) + server
        for round in range(1, settings.rounds + 1)
    )
    scored = row * _scored_rows(federation)
    return Timing(step, turn, row, server, steps, rounds + scored, resident, machine())


def few_steps(federation: Federation) -> float:
    """Seconds of one optimizer step; the federation's model is changed by measuring it."""
    return _steps(federation)[0]


def _steps(federation: Federation) -> tuple[float, float]:
    """Seconds of a step of the client with the most rows, and of its turn beside its steps."""
    args = _arguments(federation.recipe.trainer_arguments, federation)
    rows = _STEPS * args.train_batch_size * args.gradient_accumulation_steps
    _turn(federation, rows, 1)
    one, more = _turn(federation, rows, 1), _turn(federation, rows, 1 + _STEPS)
    step = max(0.0, more - one) / _STEPS
    return step, max(0.0, one - step)


def evaluations(spec: EvaluationSpec, rounds: int) -> int:
    """How many rounds of a run are evaluated.

    Example:
        >>> evaluations(EvaluationSpec(every=2), 5)     # after rounds 2, 4 and the last
        3
    """
    return -(-rounds // spec.every)


def _turn(federation: Federation, rows: int, steps: int) -> float:
    """Seconds of a turn; of clients that train in one pass, a client's share of them.

    Args:
        rows: Of each client at most, its own: they are padded to the longest of all.
    """
    recipe, settings = federation.recipe, federation.settings
    trained, start = settings.method.trained(1), first(settings, federation.initial)
    largest = sorted(federation.clients.items(), key=lambda item: -len(item[1]))[: recipe.fused]
    turns = [
        Turn(name, 1, _sample(part, rows), start, trained, recipe.seed) for name, part in largest
    ]
    training = {**recipe.trainer_arguments, "max_steps": steps}
    train = Fused(federation.task, training, recipe.fused)
    return train(federation.model, turns)[0].metrics["seconds"]


def _arguments(training: Mapping[str, Any], federation: Federation) -> TrainingArguments:
    with tempfile.TemporaryDirectory() as directory:
        return training_arguments(training, 0, federation.model.device, directory)


def _sample(rows: Dataset, count: int) -> Dataset:
    """So many rows at random, the same every time: the first ones may be unlike the others."""
    chosen = np.random.default_rng(0).permutation(len(rows))[:count]
    return rows.select(sorted(chosen.tolist()))


def _evaluate(federation: Federation) -> float:
    """Seconds a row, on a few rows of the largest set."""
    sets = [*federation.evaluation.values(), *federation.validation.values()]
    rows = _sample(max(sets, key=len), _ROWS)
    model, size = federation.model, federation.recipe.evaluation.batch_size
    began = perf_counter()
    federation.task.evaluate(model.module, rows, model.tokenizer, size)
    return (perf_counter() - began) / len(rows)


def _scored_rows(federation: Federation) -> int:
    """Rows evaluated in a whole run: the first split and the clients' own after a round, all
    splits for the last and the best."""
    splits = [len(rows) for rows in federation.evaluation.values()]
    own = sum(len(rows) for rows in federation.validation.values())
    times = evaluations(federation.recipe.evaluation, federation.settings.rounds)
    models = len(federation.settings.clients) if federation.settings.method.personal else 1
    return models * (times * (sum(splits[:1])) + 2 * sum(splits)) + (times + 2) * own


def _resident(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return psutil.Process().memory_info().rss


def server_seconds(federation: Settings, initial: AdapterState) -> float:
    """Seconds that the server takes for a round, measured: it adds every client, then steps.

    Args:
        initial: What the clients start from. Their updates are random; to make them takes time
            that is not counted.
    """
    state = begin(federation, initial)
    factors = federation.method.trained(1)
    rate = federation.server_learning_rate
    aggregator = Aggregator(
        federation.method, federation.layers, factors, rate, len(federation.clients)
    )
    seconds, kept, assignment = 0.0, {}, federation.method.assignment
    generator = torch.Generator().manual_seed(0)
    for client in federation.clients:
        start = start_of(state, federation, client)
        end = _drifted(start, factors, generator)
        if assignment.own and not assignment.dealt:
            kept[client] = own_part(federation, flat(end))
        began = perf_counter()
        aggregator.add(1.0, start, end)
        seconds += perf_counter() - began
    began = perf_counter()
    result = aggregator.finish()
    step(state, federation, result, federation.clients, kept)
    return seconds + perf_counter() - began


def _drifted(
    start: AdapterState, factors: frozenset[str], generator: torch.Generator
) -> AdapterState:
    def moved(value: torch.Tensor) -> torch.Tensor:
        return value + 0.01 * torch.randn(value.shape, generator=generator)

    layers = {
        name: Factors(
            moved(f.A) if "A" in factors else f.A, moved(f.B) if "B" in factors else f.B, f.scale
        )
        for name, f in start.layers.items()
    }
    return AdapterState(layers, {name: moved(value) for name, value in start.head.items()})


def machine() -> str:
    """What a time was measured on, in a line."""
    threads = torch.get_num_threads()
    return f"{_processor()}, {os.cpu_count()} cores; {threads} thread(s), torch {torch.__version__}"


def _processor() -> str:
    """The processor's name; Linux tells it in a file alone."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return next(iter(names), "") or platform.processor() or platform.machine()
