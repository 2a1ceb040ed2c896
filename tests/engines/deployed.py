"""A real deployment on this machine: SuperLink with TLS and node keys, and SuperNodes."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from fedex_lora.deploy.init import Deployment, init
from fedex_lora.deploy.processes import end_session, free_port
from fedex_lora.recipe import Recipe
from fedex_lora.recipe_yaml import dump_recipe

PROGRAM = [sys.executable, "-m", "fedex_lora"]


class Deployed:
    """A folder of `deploy init`, and the processes of `deploy server` and `deploy client`."""

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        self.folder, self.names = folder, names
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        init(folder, Deployment("127.0.0.1", free_port(), tuple(names)))

    def start_server(self) -> None:
        self._start("server", ["deploy", "server", str(self.folder)])
        self.wait_for("server", "ready for clients")

    def start_client(self, name: str, recipe: Path, data: Path) -> None:
        common = ["deploy", "client", str(self.folder), "--name", name, "--no-check"]
        self._start(name, [*common, "--recipe", str(recipe), "--data", str(data)])

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text(errors="replace")

    def wait_for(self, name: str, text: str, seconds: float = 300) -> None:
        until = time.monotonic() + seconds
        while text not in self.log(name):
            assert self.processes[name].poll() is None, self.log(name)[-3000:]
            assert time.monotonic() < until, self.log(name)[-3000:]
            time.sleep(0.5)

    def _start(self, name: str, arguments: list[str]) -> None:
        with (self.folder / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                [*PROGRAM, *arguments],
                stdout=log,
                stderr=log,
                start_new_session=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )

    def kill(self, pattern: str, within: str) -> int:
        """kill -9 of the processes below `within` whose command line has `pattern`; how many."""
        found = [p for p in descendants(self.processes[within].pid) if pattern in command(p)]
        for number in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)
        return len(found)

    def end(self) -> None:
        for process in self.processes.values():
            end_session(process, 10.0)


@contextmanager
def deployed(folder: Path, recipe: Recipe, files: Sequence[Path]) -> Iterator[Deployed]:
    """All of it; ended whatever happens."""
    deployment = Deployed(folder, [file.stem for file in files])
    try:
        deployment.start_server()
        text = folder / "recipe.yaml"
        text.write_text(dump_recipe(recipe))
        for file in files:
            deployment.start_client(file.stem, text, file)
        yield deployment
    finally:
        deployment.end()


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
