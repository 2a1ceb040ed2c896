"""How apps are started: as forks, but not on a machine with a GPU."""

from multiprocessing import forkserver

import pytest
from flwr.supercore.constant import ExecutorType, TaskType
from flwr.supercore.superexec.executor import factory
from flwr.supercore.superexec.executor.subprocess_executor import SubprocessExecutor
from flwr.supercore.superexec.executor.types import ExecutionSpec

from fedex_lora.flower import superexec


@pytest.mark.parametrize("gpu", [True, False])
def test_apps_are_forks_but_where_there_is_a_gpu(gpu, tmp_path, monkeypatch):
    device, made, calls = tmp_path / "nvidiactl", [], []
    if gpu:
        device.touch()
    monkeypatch.setattr(superexec, "_GPUS", ("/nowhere", str(device)))
    monkeypatch.setattr(factory, "SubprocessExecutor", SubprocessExecutor)  # put back afterwards
    monkeypatch.setattr(forkserver, "ensure_running", lambda: calls.append("running"))
    monkeypatch.setattr(forkserver, "set_forkserver_preload", lambda names: calls.append(names))
    make = lambda: made.append(factory.get_executor(ExecutorType.SUBPROCESS))  # noqa: E731
    monkeypatch.setattr(superexec, "flower_superexec", make)
    superexec.main()
    assert [type(one) for one in made] == [SubprocessExecutor if gpu else superexec.Forking]
    preloaded = [f"fedex_lora.flower.{name}" for name in ("superexec", "client_app", "server_app")]
    assert calls == ([] if gpu else [preloaded, "running"])


def test_only_client_and_server_apps_are_forks(monkeypatch):
    forked, launched = [], []

    class Context:
        def Process(self, target, args):
            forked.append(args[0].task_type)
            return self

        def start(self):
            pass

    monkeypatch.setattr(superexec.multiprocessing, "get_context", lambda kind: Context())
    launch = lambda self, spec: launched.append(spec.task_type)  # noqa: E731
    monkeypatch.setattr(SubprocessExecutor, "launch", launch)
    kinds = (TaskType.CLIENT_APP, TaskType.SERVER_APP, TaskType.SIMULATION)
    for kind in kinds:
        spec = ExecutionSpec(kind, "127.0.0.1:1", "token", True, None, False, None, False, 1)
        superexec.Forking().launch(spec)
    assert forked == [TaskType.CLIENT_APP, TaskType.SERVER_APP]
    assert launched == [TaskType.SIMULATION]
