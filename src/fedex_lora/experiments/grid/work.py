"""Runs in processes of their own, several at once: one that fails does not stop the others.

To stop runs needs the signals of Linux and macOS.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fedex_lora.experiments.grid.plan import Run, standing
from fedex_lora.experiments.once import FOLDER
from fedex_lora.runs.lock import locked
from fedex_lora.runs.rundir import RunDir

Tell = Callable[[str], None]

PATIENCE = 30.0  # seconds that an interrupted run has to end by itself
_BUSY = "another grid is at work here, {owner}; wait for it or end it, or name another `out`"
_PROMPT = "$ "  # before the command in a log


def command(run: Run, out: Path, train_once: bool = False) -> list[str]:
    """Starts a run, or resumes it where it was begun."""
    return run.command(out, standing(run, out) == "begun", out / FOLDER if train_once else None)


@dataclass(frozen=True)
class _Job:
    run: Run
    process: subprocess.Popen[bytes]
    log: Path
    began: float


def work(
    runs: Sequence[Run],
    out: Path,
    jobs: int,
    tell: Tell,
    finished: Callable[[Run], None],
    train_once: bool = False,
) -> dict[str, str]:
    """Runs all of them, `jobs` at a time.

    What a run prints goes to a log beside its directory. With several GPUs each job sees one of
    them. An interruption is passed on to the runs, which stop after what they saved last.

    Args:
        finished: Is called after each run that ended well.
        train_once: Whether methods take over each other's first round (`Once`).

    Returns:
        The runs that failed, by name, with the reason.

    Raises:
        UserError: Another process is at work in `out`, or in a run that is to be resumed.
    """
    waiting, busy, failed = deque(runs), dict[int, _Job](), dict[str, str]()
    RunDir(out).make(out)
    with locked(out, _BUSY):
        for run in runs:  # one that a grid was killed with may live on
            if standing(run, out) == "begun":
                with locked(out / run.name):
                    pass
        try:
            while waiting or busy:
                for slot in range(jobs):
                    if waiting and slot not in busy:
                        run = waiting.popleft()
                        tell(f"started   {run.name} ({len(waiting)} more wait)")
                        try:
                            busy[slot] = _start(run, out, command(run, out, train_once), slot)
                        except OSError as error:
                            failed[run.name] = f"it cannot be started: {error}"
                time.sleep(0.1)
                for slot, job in list(busy.items()):
                    if (code := job.process.poll()) is not None:
                        del busy[slot]
                        _end(job, code, tell, finished, failed)
        finally:
            _stop([job.process for job in busy.values()])
    return failed


def _start(run: Run, out: Path, words: list[str], slot: int) -> _Job:
    path = out / run.name
    log = path.with_name(path.name + ".log")
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file:
        file.write(f"{_PROMPT}{shlex.join(words)}\n".encode())
        file.flush()
        process = subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **_device(run, slot)},
            start_new_session=True,  # Ctrl-C reaches this process alone, which passes it on
        )
    return _Job(run, process, log, time.monotonic())


def _end(
    job: _Job, code: int, tell: Tell, finished: Callable[[Run], None], failed: dict[str, str]
) -> None:
    if code == 0:
        tell(f"finished  {job.run.name} after {time.monotonic() - job.began:.0f} s")
        finished(job.run)
        return
    died = f"killed by {signal.Signals(-code).name}; " if code < 0 else ""
    failed[job.run.name] = f"{died}{last_words(job.log)} (see {job.log})"
    tell(f"failed    {job.run.name}: {failed[job.run.name]}")


def last_words(log: Path) -> str:
    """What the last run in a log died of: its error, or the last line that says anything."""
    said: list[str] = []
    for line in log.read_text(errors="replace").splitlines():
        said = [] if line.startswith(_PROMPT) else [*said, line.strip()] if line.strip() else said
    errors = [line for line in said if line.startswith(("error: ", "stopped: "))]
    return (errors or said or ["it said nothing"])[-1]


def _stop(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Ctrl-C for each; those that have not ended in time are killed. Nothing saved is lost."""
    try:
        for process in processes:
            with suppress(ProcessLookupError):
                process.send_signal(signal.SIGINT)
        until = time.monotonic() + PATIENCE
        for process in processes:
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, until - time.monotonic()))
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.wait()


def _device(run: Run, slot: int) -> dict[str, str]:
    """One GPU for each job, in turn, where there are several and the recipe leaves it open."""
    given: Any = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is None:
        there = [str(i) for i in range(torch.cuda.device_count())]
    else:
        there = [name for name in given.split(",") if name]
    if len(there) < 2 or run.recipe.model.device not in ("auto", "cuda"):
        return {}
    return {"CUDA_VISIBLE_DEVICES": there[slot % len(there)]}
