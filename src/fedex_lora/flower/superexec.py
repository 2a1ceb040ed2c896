"""flower-superexec whose processes are forks of one that has imported everything.

Flower starts a new program for every message, and importing torch, transformers and PEFT takes it
seconds, of which a message has nothing. Here a process imports them once and runs nothing; every
message is handled by a fork of it: as separate as a new program, and there at once. A GPU does not
survive a fork, so on a machine with one Flower's way is kept. Takes the arguments of
flower-superexec.
"""

from __future__ import annotations

import multiprocessing
import os
from multiprocessing import forkserver
from pathlib import Path
from queue import Queue

from flwr.supercore.cli.flower_superexec import flower_superexec
from flwr.supercore.constant import TaskType
from flwr.supercore.logger import mirror_output_to_queue
from flwr.supercore.superexec.executor import factory
from flwr.supercore.superexec.executor.subprocess_executor import SubprocessExecutor
from flwr.supercore.superexec.executor.types import ExecutionSpec, LaunchResult
from flwr.supercore.tls import validate_and_resolve_root_certificates
from flwr.superlink.runtime import run_serverapp
from flwr.supernode.runtime.run_clientapp import run_clientapp

_IMPORTED = ("superexec", "client_app", "server_app")
_GPUS = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")


class Forking(SubprocessExecutor):
    """Client and server apps as forks; everything else as Flower does it."""

    def launch(self, spec: ExecutionSpec) -> LaunchResult:
        """Starts one task."""
        if spec.task_type not in (TaskType.CLIENT_APP, TaskType.SERVER_APP):
            return super().launch(spec)
        multiprocessing.get_context("forkserver").Process(target=turn, args=(spec,)).start()
        return LaunchResult.accepted()


def turn(spec: ExecutionSpec) -> None:
    """One task, in a process of its own; what flwr-clientapp and flwr-serverapp do."""
    certificates = validate_and_resolve_root_certificates(
        spec.root_certificates_path, spec.insecure
    )
    where = (spec.insecure, certificates, spec.parent_pid, spec.runtime_dependency_install)
    if spec.task_type == TaskType.CLIENT_APP:
        run_clientapp(spec.runtime_api_address, spec.token, *where)
        return
    said: Queue[str | None] = Queue()
    mirror_output_to_queue(said)
    run_serverapp(spec.runtime_api_address, said, spec.token, *where)


def main() -> None:
    """Starts the SuperExec."""
    if hasattr(os, "fork") and not any(Path(file).exists() for file in _GPUS):
        forkserver.set_forkserver_preload([f"fedex_lora.flower.{name}" for name in _IMPORTED])
        forkserver.ensure_running()  # imports while nobody waits for it
        factory.SubprocessExecutor = Forking  # type: ignore[misc]
    flower_superexec()


if __name__ == "__main__":
    main()
