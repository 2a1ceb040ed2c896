"""flower-superexec whose tasks are forks of a process that has imported everything.

Flower starts a new program for every message, and importing torch, transformers and PEFT takes it
seconds, of which a message has nothing. Here a process imports them once and runs nothing; every
message is handled by a fork of it: as separate as a new program, and there at once. A GPU does not
survive a fork, so on a machine with one every message has a new process that imports everything.
Either way a task's token goes through a pipe: Flower's way shows it to all who may list processes.

What a task does is in `turns`. Takes the arguments of flower-superexec.
"""

from __future__ import annotations

import os
from functools import partial
from multiprocessing import forkserver
from multiprocessing.context import ForkServerProcess, SpawnProcess
from pathlib import Path

from flwr.supercore.cli.flower_superexec import flower_superexec
from flwr.supercore.constant import TaskType
from flwr.supercore.superexec.executor import factory
from flwr.supercore.superexec.executor.subprocess_executor import SubprocessExecutor
from flwr.supercore.superexec.executor.types import ExecutionSpec, LaunchResult

from fedex_lora.flower.turns import APP, turn

_IMPORTED = (
    "fedex_lora.flower.turns",
    "fedex_lora.flower.client_app",
    "fedex_lora.flower.server_app",
    "flwr.supercore.cli.flower_superexec",
)
_GPUS = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")


class Processes(SubprocessExecutor):
    """Client and server apps, each in a process of its own; nothing else is started.

    Args:
        process: What kind of process.
        app: The client app that answers every run.
    """

    def __init__(self, process: type[ForkServerProcess | SpawnProcess], app: str) -> None:
        self.process, self.app = process, app

    def launch(self, spec: ExecutionSpec) -> LaunchResult:
        """Starts one task."""
        if spec.task_type not in (TaskType.CLIENT_APP, TaskType.SERVER_APP):
            return LaunchResult.failed(f"{spec.task_type} is not run here")
        self.process(target=turn, args=(spec, self.app)).start()
        return LaunchResult.accepted()


def main(app: str = APP) -> None:
    """Starts the SuperExec."""
    forks = hasattr(os, "fork") and not any(Path(file).exists() for file in _GPUS)
    if forks:
        forkserver.set_forkserver_preload(list(_IMPORTED))
        forkserver.ensure_running()  # imports while nobody waits for it
    process = ForkServerProcess if forks else SpawnProcess
    factory.SubprocessExecutor = partial(Processes, process, app)  # type: ignore[assignment,misc]
    flower_superexec()


if __name__ == "__main__":
    main()
