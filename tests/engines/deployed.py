"""A real deployment on this machine: SuperLink with TLS and node keys, and SuperNodes."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing import forkserver
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from fedex_lora import cli
from fedex_lora.flower.deploy import commands
from fedex_lora.flower.deploy.init import Deployment, init
from fedex_lora.flower.deploy.processes import free_port, run_to_end
from fedex_lora.recipe import Recipe
from fedex_lora.recipe.reader import dump_recipe
from fedex_lora.runs.lock import interrupted_by_signals

ROOT = Path(__file__).resolve().parents[2]
FORKS = "multiprocessing.forkserver"
forkserver.set_forkserver_preload(["fedex_lora.cli"])  # so that it is imported once for all


class Deployed:
    """A folder of `deploy init`, and the processes of `deploy server` and `deploy client`."""

    def __init__(self, folder: Path, names: Sequence[str], runs: int = 100) -> None:
        self.folder, self.names, self.runs = folder, names, runs
        self.processes: dict[str, ForkServerProcess] = {}
        self.host = own_address()
        init(folder, Deployment(self.host, free_port(), tuple(names)))
        self.plan = folder / "plan.json"
        self.at_work = self.plan.with_name("at-work")  # made by a client that waits, see sabotage
        self.environment = {
            "OMP_NUM_THREADS": "1",
            "FEDEX_LORA_CHAOS": str(self.plan),
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        }

    def start_server(self) -> None:
        self._start("server", ["deploy", "server", str(self.folder)])
        self.wait_for("server", "ready for clients")

    def start_client(
        self, name: str, recipe: Path, data: Path, handed_over: Path | None = None
    ) -> None:
        folder = str(handed_over or self.folder)
        common = ["deploy", "client", folder, "--name", name, "--no-check"]
        common += ["--runs", str(self.runs)]
        self._start(name, [*common, "--recipe", str(recipe), "--data", str(data)])

    @contextmanager
    def sabotage(self, client: str, round: int, what: str) -> Iterator[None]:
        """While it lasts `client` does `what` (see benchmarks/chaos_client.py) in a round.

        A client that "waits" is at work on the round's message until it is let go or killed.
        """
        self.at_work.unlink(missing_ok=True)
        self.plan.write_text(json.dumps({"client": client, "round": round, "what": what}))
        try:
            yield
        finally:
            self.plan.unlink()
            self.let_go()

    def await_at_work(self, seconds: float = 300) -> None:
        """Until the client that is to wait has the round's message and is at work on it."""
        until = time.monotonic() + seconds
        while not self.at_work.exists():
            assert time.monotonic() < until, self.log("server")[-3000:]
            time.sleep(0.1)

    def let_go(self) -> None:
        """The client that waits goes on."""
        self.at_work.unlink(missing_ok=True)

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text(errors="replace")

    def wait_for(self, name: str, text: str, seconds: float = 300) -> None:
        until = time.monotonic() + seconds
        while text not in self.log(name):
            assert self.processes[name].is_alive(), self.log(name)[-3000:]
            assert time.monotonic() < until, self.log(name)[-3000:]
            time.sleep(0.5)

    def _start(self, name: str, arguments: list[str]) -> None:
        log = self.folder / f"{name}.log"
        log.touch()
        context = multiprocessing.get_context("forkserver")
        self.processes[name] = context.Process(
            target=program, args=(arguments, log, self.environment)
        )
        self.processes[name].start()

    def kill(self, pattern: str, within: str) -> int:
        """kill -9 of the processes below `within` whose command line has `pattern`; how many."""
        return _kill(p for p in self._below(within) if pattern in command(p))

    def freeze(self, name: str, frozen: bool) -> None:
        """Stops `deploy client` itself, so that it starts nothing again; or lets it go on."""
        number = self.processes[name].pid
        assert number is not None
        os.kill(number, signal.SIGSTOP if frozen else signal.SIGCONT)

    def kill_app(self, within: str) -> int:
        """kill -9 of the apps below `within`: forks of the process that has imported everything."""
        parents = [p for p in self._below(within) if FORKS in command(p)]
        return _kill({child for parent in parents for child in descendants(parent)})

    def _below(self, name: str) -> list[int]:
        number = self.processes[name].pid
        return descendants(number) if number else []

    def end(self) -> None:
        below = [number for name in self.processes for number in self._below(name)]
        for process in self.processes.values():
            process.terminate()
            if process.pid and process.is_alive():
                os.kill(process.pid, signal.SIGCONT)  # one that is frozen would not hear of it
        for process in self.processes.values():
            process.join(30)
        _kill(number for number in below if command(number))


def program(arguments: list[str], log: Path, environment: Mapping[str, str]) -> None:
    """`fedex-lora ARGUMENTS` in a session of its own, with its output in a file."""
    os.setsid()
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.update(environment)
    if "client" in arguments:
        commands.EXECUTOR = "benchmarks.chaos_superexec"
    sys.argv = ["fedex-lora", *arguments]
    cli.main()


def traffic(folder: Path) -> int:
    """Bytes that Flower counted for the newest run."""
    status = commands.status(folder, 0)
    argv = tuple(part for part in status.argv if part not in ("--run-id", "0"))
    told = run_to_end(replace(status, argv=argv)).stdout
    runs = json.loads(told[told.index("{") :])["runs"]
    return max(runs, key=lambda one: one["pending-at"])["network-traffic"]["total-bytes"]


def own_address() -> str:
    """An address of this machine by which it counts as the network, if it has one."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, contextlib.suppress(OSError):
        probe.connect(("192.0.2.1", 9))  # sends nothing
        return probe.getsockname()[0]
    return "127.0.0.1"


@contextmanager
def deployed(
    folder: Path, recipe: Recipe, files: Sequence[Path], runs: int = 100
) -> Iterator[Deployed]:
    """All of it; ended whatever happens. Clients take part in so many runs."""
    deployment = Deployed(folder, [file.stem for file in files], runs)
    with interrupted_by_signals():
        try:
            deployment.start_server()
            text = folder / "recipe.yaml"
            text.write_text(dump_recipe(recipe))
            for file in files:
                deployment.start_client(file.stem, text, file)
            yield deployment
        finally:
            deployment.end()


def _kill(numbers: Iterable[int]) -> int:
    found = list(numbers)
    for number in found:
        with contextlib.suppress(ProcessLookupError):
            os.kill(number, signal.SIGKILL)
    return len(found)


def descendants(root: int) -> list[int]:
    """All processes below one, by their parents."""
    parents = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parents[int(entry.parent.name)] = int(entry.read_text().rpartition(")")[2].split()[1])
    found = [root]
    for number in found:
        found += [child for child, parent in parents.items() if parent == number]
    return found[1:]


def command(number: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{number}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    return ""
