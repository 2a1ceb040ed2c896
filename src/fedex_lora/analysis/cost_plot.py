"""Bytes of a round and the server's time for it, against the number of clients."""

from __future__ import annotations

import os
import platform
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from matplotlib.figure import Figure

from fedex_lora.adapter import AdapterState, Factors, fresh
from fedex_lora.aggregate import Aggregator
from fedex_lora.analysis.cost import Shapes, settings, trained
from fedex_lora.analysis.plots import Series, panels
from fedex_lora.analysis.traffic import DryRun, summed
from fedex_lora.federation.settings import Settings
from fedex_lora.federation.state import begin, start_of, step
from fedex_lora.methods import get_method


def round_bytes(federation: Settings, head: Mapping[str, torch.Size]) -> tuple[int, int]:
    """Bytes of one round (up, down) of all clients, with the delivery of what it made."""
    run = DryRun(replace(federation, rounds=1), head)
    up, _ = run.round()
    down = summed(run.down(client) for client in federation.clients)
    return summed(up.values()).bytes, down.bytes


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
        federation.method, federation.sites, factors, rate, len(federation.clients)
    )
    seconds, ends = 0.0, {}
    generator = torch.Generator().manual_seed(0)
    for client in federation.clients:
        start = start_of(state, federation, client)
        end = _drifted(start, factors, generator)
        if federation.method.own_factors:
            ends[client] = end
        began = perf_counter()
        aggregator.add(1.0, start, end)
        seconds += perf_counter() - began
    began = perf_counter()
    result = aggregator.finish()
    step(state, federation, result, federation.clients, ends)
    return seconds + perf_counter() - began


def _drifted(
    start: AdapterState, factors: frozenset[str], generator: torch.Generator
) -> AdapterState:
    def moved(value: torch.Tensor) -> torch.Tensor:
        return value + 0.01 * torch.randn(value.shape, generator=generator)

    sites = {
        name: Factors(
            moved(f.A) if "A" in factors else f.A, moved(f.B) if "B" in factors else f.B, f.scale
        )
        for name, f in start.sites.items()
    }
    return AdapterState(sites, {name: moved(value) for name, value in start.head.items()})


def cost_plot(
    title: str, model: Shapes, clients: Sequence[int], methods: Iterable[str]
) -> tuple[Figure, list[dict[str, Any]]]:
    """Bytes a round for one client and for the server, and the server's seconds; log axes.

    The seconds are measured here and now; the axis says on what. Full fine-tuning is left out of
    them, as its updates are as large as the model.

    Args:
        clients: Numbers of clients, ascending; all take part.

    Returns:
        The figure, and its figures as rows.
    """
    rows = [_measured(model, name, k) for name in methods for k in clients]
    quantities = {
        "one client's bytes": "client_bytes",
        "the server's bytes": "server_bytes",
        "server, seconds": "server_seconds",
    }
    parts = [(label, _series(rows, key)) for label, key in quantities.items()]
    return panels(
        title,
        "\n".join(["clients in a round", *textwrap.wrap(f"seconds: {machine()}", 60)]),
        parts,
        log=True,
    ), rows


def _measured(model: Shapes, name: str, clients: int) -> dict[str, Any]:
    method = get_method(name)
    federation = settings(method, model, clients=clients, rounds=1)
    head = trained(method, model).head
    up, down = round_bytes(federation, head)
    seconds = None
    if method.trains != "all" and method.exchanges:
        zeros = {n: torch.zeros(shape) for n, shape in head.items()}
        initial = AdapterState(fresh(federation.sites, 0), zeros)
        seconds = server_seconds(federation, initial)
    k = len(federation.clients)
    return {
        "method": name,
        "clients": k,
        "client_bytes": (up + down) / k,
        "server_bytes": up + down,
        "server_seconds": seconds,
    }


def _series(rows: Sequence[Mapping[str, Any]], key: str) -> list[Series]:
    names = list(dict.fromkeys(str(row["method"]) for row in rows))
    found = []
    for style, name in enumerate(names):
        points = [
            (r["clients"], r[key]) for r in rows if r["method"] == name and r[key] is not None
        ]
        x, y = zip(*points) if points else ((), ())
        found.append(Series(name, x, y, style))
    return found


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
