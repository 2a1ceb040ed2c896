"""Bytes of a round and the server's time for it, against the number of clients."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from matplotlib.figure import Figure

from fedex_lora.aggregation.adapter import AdapterState, fresh
from fedex_lora.aggregation.methods import get_method
from fedex_lora.experiments.analysis.plots import Series, panels
from fedex_lora.experiments.cost.cost import Shapes, settings, trained
from fedex_lora.federation.settings import Settings
from fedex_lora.runs.plan.timing import machine, server_seconds
from fedex_lora.runs.plan.traffic import DryRun, summed


def round_bytes(federation: Settings, head: Mapping[str, torch.Size]) -> tuple[int, int]:
    """Bytes of one round (up, down) of all clients, with the delivery of what it made."""
    run = DryRun(replace(federation, rounds=1), head)
    up, _ = run.round()
    down = summed(run.down(client) for client in federation.clients)
    return summed(up.values()).bytes, down.bytes


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
        initial = AdapterState(fresh(federation.layers, 0), zeros)
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
