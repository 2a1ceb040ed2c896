"""The row of the table: rounds of all peers in turn, each in a process of its own."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import suppress
from importlib import import_module
from importlib.metadata import version
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from time import perf_counter
from typing import Any

import psutil
import torch

from benchmarks.peers.common import Asked
from benchmarks.results import Figure, Row, seconds
from benchmarks.timing import Times, ratio

OURS, PLAIN, PUBLISHED = "ours", "ours in float32, one by one", "the published way"
FLOWER, CHORUS = "FlowerTune's shape", "chorus"
PEERS = {
    OURS: "ours.as_it_is",
    PLAIN: "ours.in_float32",
    PUBLISHED: "published.in_turn",
    FLOWER: "flower.in_turn",
    CHORUS: "chorus.in_turn",
}
TITLE = "A round as others do it: MiniLM, 3 clients, mrpc, 300 rows"
NOTES = (
    "Broadcast, one epoch in batches of 16, aggregation; no evaluation. Every peer has a process "
    "of its own, and they take turns. CPU seconds are of that process and all below it, so that "
    "what else the machine does matters little; time is the clock's. How far off: the distance of "
    "the new global weights of all adapted layers from the weighted mean of where the clients "
    "ended, in float64, over how far that mean moved; the largest of all rounds. 1e-5 is the "
    "rounding of float32 weights.",
    "Why ours takes less: the model is read once and rows are padded to the longest of a batch "
    "alone, which is all there is in float32; then bfloat16 and clients in one pass, where this "
    "machine is faster so.",
    "The published way: as in the row mrpc (benchmarks/published.py). FlowerTune's shape: an app "
    f"for Flower's simulation (flwr {version('flwr')}) with its FedAvg, PEFT and the Trainer; "
    "every client reads the model anew and trains in a process of Ray's, several at a time where "
    "there are cores.",
    "chorus: the package chorus-fl, its server and its client, and the Trainer, used as its own "
    "trainer uses it, which is for causal language models alone: the model read anew, the adapter "
    "of the last round merged into it, every example padded. It sends no heads. The adapter that "
    "its client fetches has other names than PEFT's, which loads none of it: its clients go on "
    "from the pretrained model. Under PEFT's names it would be the best one of rank 4. The "
    "checkpoint that its server gives out has the residual too, and lacks the scale α/r. To "
    "measure it: "
    "`pip install --no-deps --target DIR chorus-fl python-multipart`, then `--chorus DIR`.",
)


class Peer:
    """A peer's process."""

    def __init__(self, work: str, asked: Asked) -> None:
        context = get_context("spawn")
        self._ours, theirs = context.Pipe()
        self._process = context.Process(target=_work, args=(work, theirs, asked))
        self._process.start()
        theirs.close()
        self._ours.recv()
        self.root = psutil.Process(self._process.pid)

    def ask(self, what: str) -> Any:
        """Has it done, and gives the answer."""
        self._ours.send(what)
        return self._ours.recv()

    def end(self) -> None:
        """Waits until it has ended."""
        with suppress(BrokenPipeError):  # it has, after its last round
            self._ours.send("end")
        self._process.join()


def _work(work: str, connection: Connection, asked: Asked) -> None:
    module, function = work.split(".")
    getattr(import_module(f"benchmarks.peers.{module}"), function)(connection, asked)


def row(data: Path, chorus: Path | None, repeats: int = 2) -> Row:
    """CPU seconds of a round, ours and the peers', and how far its result is from the mean."""
    asked = Asked(data, torch.get_num_threads(), repeats + 1, chorus)
    names = [name for name in PEERS if name != CHORUS or chorus is not None]
    running = {name: Peer(PEERS[name], asked) for name in names}
    cpu: dict[str, list[float]] = {name: [] for name in names}
    clock: dict[str, list[float]] = {name: [] for name in names}
    wrong: dict[str, list[float]] = {}
    for _ in range(asked.rounds):
        for name, peer in running.items():
            began, before = perf_counter(), cpu_seconds(peer.root)
            peer.ask("round")
            clock[name].append(perf_counter() - began)
            cpu[name].append(cpu_seconds(peer.root) - before)
            print(f"{name}: {cpu[name][-1]:.2f} s of CPU, {clock[name][-1]:.2f} s", file=sys.stderr)
            for what, far in peer.ask("wrong").items():
                wrong.setdefault(f"{name}{what}", []).append(far)
    for peer in running.values():
        peer.end()
    return shown(_warm(cpu), _warm(clock), {what: max(far) for what, far in wrong.items()})


def cpu_seconds(process: psutil.Process) -> float:
    """Of a process and all below it, those included that have ended and were waited for."""
    total = 0.0
    for one in (process, *process.children(recursive=True)):
        with suppress(psutil.NoSuchProcess):
            total += sum(one.cpu_times()[:4])
    return total


def _warm(found: Mapping[str, list[float]]) -> dict[str, Times]:
    """Without the first round, in which libraries set themselves up."""
    return {name: Times(tuple(values[1:])) for name, values in found.items()}


def gain(slow: Times, fast: Times) -> tuple[float, str, float | None]:
    """A figure's value, unit and spread."""
    value, spread = ratio(slow, fast)
    return value, "×", spread


def shown(cpu: Mapping[str, Times], clock: Mapping[str, Times], wrong: Mapping[str, float]) -> Row:
    """How many times as much the peers take as ours does, and all that was measured."""
    peers = [name for name in cpu if name not in (OURS, PLAIN)]
    gains = [
        Figure(f"CPU seconds, {peer} over {one}", *gain(cpu[peer], cpu[one]), at_least=1)
        for peer in peers
        for one in (OURS, PLAIN)
    ]
    waits = [Figure(f"time, {p} over {OURS}", *gain(clock[p], clock[OURS])) for p in peers]
    off = [Figure(f"how far off, {what}", far, "") for what, far in wrong.items()]
    spent = [Figure(f"CPU seconds, {f.what}", f.value, "s", f.spread) for f in seconds(cpu)]
    missing = () if CHORUS in cpu else ("Without `--chorus`, chorus was not measured.",)
    return Row(TITLE, [*gains, *waits, *off, *spent], [*NOTES, *missing])
