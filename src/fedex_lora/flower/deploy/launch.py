"""Starts a run on a deployment, follows it, and ends it if it is interrupted here."""

from __future__ import annotations

import json
import re
import secrets
import tempfile
import time
from pathlib import Path
from typing import Any

from fedex_lora.disk import write_atomic, write_secret
from fedex_lora.errors import DeploymentError, UserError, check_installed, shows_rows
from fedex_lora.flower.deploy import commands, templates
from fedex_lora.flower.deploy.init import new_folders, read_deployment, write_app
from fedex_lora.flower.deploy.processes import await_port, free_port, run_to_end, running
from fedex_lora.flower.progress import follow
from fedex_lora.recipe import Recipe
from fedex_lora.recipe.reader import dump_recipe
from fedex_lora.runs.rundir import RunDir
from fedex_lora.runs.watch import Watcher

_FINISHED = re.compile(r'"status"\s*:\s*"finished')
_SELDOM = 20.0  # seconds between two questions whether a run is still alive: each costs a process


def launch(
    recipe: Recipe, out: Path, deployment: Path, resume: bool, watcher: Watcher
) -> dict[str, Any]:
    """Runs a recipe on the clients of a deployment, in a directory of this machine.

    Returns:
        What results.json says.

    Raises:
        UserError: It cannot be started, or ended with an error; QuorumLost among them.
    """
    read_deployment(deployment)
    _check_out(out, resume)
    return _run(recipe, out.resolve(), deployment.resolve(), resume, watcher)


def simulate(recipe: Recipe, out: Path, resume: bool, watcher: Watcher) -> dict[str, Any]:
    """Runs a recipe in Flower's simulation on this machine: a process for every client at a time.

    Its SuperLink and what that starts are ended here, whatever happens.

    Returns, raises: As `launch`.
    """
    _check_out(out, resume)
    check_installed("ray", "engine.kind: flower-simulation")
    engine = recipe.engine
    options = (
        f"num-supernodes={recipe.federation.clients} "
        f"client-resources-num-cpus={engine.client_cpus} "
        f"client-resources-num-gpus={engine.client_gpus}"
    )
    with tempfile.TemporaryDirectory(prefix="fedex-lora-") as temporary:
        folder, port = Path(temporary), free_port()
        write_app(folder, f"127.0.0.1:{port}", None)
        new_folders(folder / "server")
        write_secret(folder / "server" / "control.secret", secrets.token_hex(32).encode())
        link = commands.simulation(folder, port)
        with running([link], lambda *_: None, folder / "flower.log") as ended:
            await_port(port, ended)
            try:
                return _run(recipe, out.resolve(), folder, resume, watcher, options)
            except UserError as error:
                log = (folder / "flower.log").read_text(errors="replace")
                watcher.note(f"Flower's log ends: {log[-1500:]}")
                raise error


def _check_out(out: Path, resume: bool) -> None:
    if resume:
        RunDir(out).recipe()
    else:
        RunDir(out).check_free()


def _run(
    recipe: Recipe,
    out: Path,
    folder: Path,
    resume: bool,
    watcher: Watcher,
    options: str | None = None,
) -> dict[str, Any]:
    """Starts it on the SuperLink of `folder`, and follows it to the end."""
    config, progress = _prepare(recipe, out, folder, resume)
    number = start(folder, config, options)
    try:
        return follow(progress, watcher, _Alive(folder, number))
    except KeyboardInterrupt:
        run_to_end(commands.stop(folder, number))
        raise


def _prepare(recipe: Recipe, out: Path, deployment: Path, resume: bool) -> tuple[Path, Path]:
    """The files by which the coordinator's process knows what to do, and tells how it goes."""
    stem = deployment / "runs" / secrets.token_hex(8)
    stem.parent.mkdir(exist_ok=True)
    # one that an earlier version made lacks keys
    write_atomic(deployment / "app" / "pyproject.toml", templates.APP.encode())
    text, progress, config = (stem.with_suffix(s) for s in (".yaml", ".jsonl", ".toml"))
    write_atomic(text, dump_recipe(recipe).encode())
    write_atomic(progress, b"")
    values = {
        "folder": str(Path.cwd()),
        "recipe": str(text),
        "out": str(out),
        "progress": str(progress),
        "resume": resume,
        "show-rows": shows_rows(),
    }
    lines = [f"{key} = {json.dumps(value)}" for key, value in values.items()]
    write_atomic(config, "\n".join(lines).encode())
    return config, progress


def start(deployment: Path, config: Path, options: str | None = None) -> int:
    """Starts the run; its number.

    Raises:
        UserError: The SuperLink does not answer, or refuses.
    """
    command = commands.start(deployment, config, options)
    done = run_to_end(command)
    found = re.search(r'"run-id"\s*:\s*"?(\d+)', done.stdout)
    if done.returncode or found is None:
        told = (done.stdout + done.stderr).strip()
        raise DeploymentError(
            f"the run cannot be started: {told[-600:]}. Does `fedex-lora deploy server "
            f"{deployment}` run on this machine?"
        )
    return int(found[1])


class _Alive:
    """Whether a run goes on; asks seldom, and goes on where nobody answers (a restart)."""

    def __init__(self, deployment: Path, number: int) -> None:
        self.command = commands.status(deployment, number)
        self.asked, self.answer = time.monotonic(), True

    def __call__(self) -> bool:
        if self.answer and time.monotonic() - self.asked > _SELDOM:
            told = run_to_end(self.command).stdout
            self.answer = _FINISHED.search(told) is None
            self.asked = time.monotonic()
        return self.answer
