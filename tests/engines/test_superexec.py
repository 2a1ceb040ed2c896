"""How tasks are started: as forks, but not on a machine with a GPU; and what a client runs."""

import importlib
import json
import logging
import os
import shutil
from io import BytesIO
from multiprocessing import forkserver
from multiprocessing.context import ForkServerProcess, SpawnProcess
from types import SimpleNamespace
from zipfile import ZIP_DEFLATED, ZipFile

import pytest
from flwr.app import ConfigRecord, Context, Message, MessageType, RecordDict
from flwr.cli.build import build_fab_from_files
from flwr.common.constant import ErrorCode
from flwr.supercore.constant import ExecutorType, TaskType
from flwr.supercore.fab import Fab
from flwr.supercore.superexec.executor import factory
from flwr.supercore.superexec.executor.subprocess_executor import SubprocessExecutor
from flwr.supercore.superexec.executor.types import ExecutionSpec, LaunchResultStatus
from flwr.supercore.task_identity import TaskIdentity

from benchmarks.spoil import about as about_of
from fedex_lora.flower import client_app, superexec, supernode, turns
from fedex_lora.flower.deploy.templates import APP as THIN
from fedex_lora.flower.grid import pack, unpack

FLOWER = importlib.import_module("flwr.supernode.runtime.run_clientapp")
PATCHED = ("install_from_fab", "get_load_client_app_fn", "Error")
HOSTILE = """
from pathlib import Path
from flwr.app import Message, RecordDict
from flwr.clientapp import ClientApp
Path({mark!r}).write_text("imported")
app = ClientApp()
@app.train()
def take(message, context):
    Path({mark!r}).write_text(Path(context.node_config["data"]).read_text())
    return Message(RecordDict(), reply_to=message)
"""


def task(kind):
    return ExecutionSpec(kind, "127.0.0.1:1", "token", True, None, False, None, False, 1)


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
    (one,) = made
    assert one.process == (SpawnProcess if gpu else ForkServerProcess) and one.app == turns.APP
    assert gpu or {f"fedex_lora.flower.{n}" for n in ("turns", "client_app")} <= {*calls[0]}
    assert calls[1:] == ([] if gpu else ["running"])


def test_only_client_and_server_apps_are_started(monkeypatch):
    started = []

    class Process(SpawnProcess):
        def start(self):
            started.append((self._target, *self._args))  # type: ignore[attr-defined]

    monkeypatch.setattr(SubprocessExecutor, "launch", lambda *_: pytest.fail("Flower's own way"))
    executor = superexec.Processes(Process, turns.APP)
    for kind in TaskType:
        ours = kind in (TaskType.CLIENT_APP, TaskType.SERVER_APP)
        status = LaunchResultStatus.ACCEPTED if ours else LaunchResultStatus.FAILED
        assert executor.launch(task(kind)).status == status
    ours = [task(kind) for kind in TaskType if kind in (TaskType.CLIENT_APP, TaskType.SERVER_APP)]
    assert started == [(turns.turn, one, turns.APP) for one in ours]


@pytest.fixture
def one_message(tmp_path, monkeypatch):
    """Runs flwr-clientapp's function on one message of a run with a FAB; the reply."""
    for name in PATCHED:  # put back afterwards
        monkeypatch.setattr(FLOWER, name, getattr(FLOWER, name))
    monkeypatch.setenv("FLWR_HOME", str(tmp_path / "flower"))
    for name in ("run_id", "node_id", "task_id"):
        monkeypatch.setattr(TaskIdentity, f"_{name}", 7, raising=False)
    (tmp_path / "rows.jsonl").write_text("a patient")
    sent = []

    def answer(fab, content, kept_to=None):
        message = Message(content, dst_node_id=1, message_type=MessageType.TRAIN)
        message.metadata.__dict__["_message_id"] = "0"
        node = {"client": "ann", "data": str(tmp_path / "rows.jsonl"), "home": str(tmp_path)}
        context = Context(7, 1, node, RecordDict(), {})
        run = SimpleNamespace(run_id=7, fab_id="evil/app", fab_version="1.0.0")
        found = Fab(turns.hashlib.sha256(fab).hexdigest(), fab, {})
        task_input = lambda client: (message, context, run, found)  # noqa: E731
        monkeypatch.setattr(FLOWER, "pull_task_input", task_input)
        monkeypatch.setattr(FLOWER, "push_message", lambda client, reply, _: sent.append(reply))
        for name in ("HeartbeatSender", "register_signal_handlers", "flwr_exit", "event"):
            monkeypatch.setattr(FLOWER, name, lambda *_, **__: SimpleNamespace(start=lambda: None))
        if kept_to:
            turns.keep_to(kept_to)
        FLOWER.run_clientapp("127.0.0.1:1", "token", True)
        return sent.pop()

    return answer


def fab(clientapp, **files):
    project = THIN.replace(turns.APP, clientapp).replace(
        'publisher = "fedex-lora"', 'publisher = "evil"'
    )
    project = project.replace("fedex-lora-app", "app")
    named = {f"{name}.py": text.encode() for name, text in files.items()}
    return build_fab_from_files({"pyproject.toml": project.encode(), **named})[0]


def test_a_client_runs_what_it_installed_whatever_the_server_sends(
    one_message, tmp_path, monkeypatch, caplog
):
    mark = tmp_path / "taken"
    hostile = fab("task:app", task=HOSTILE.format(mark=str(mark)))
    one_message(hostile, RecordDict())
    assert mark.read_text() == "a patient"  # so Flower by itself does it
    mark.unlink()
    shutil.rmtree(tmp_path / "flower" / "apps")
    monkeypatch.setattr(client_app, "reply_to", lambda blob, *_: b"ours to " + blob)
    with caplog.at_level(logging.WARNING, "fedex_lora"):
        reply = one_message(hostile, pack(b"it"), turns.APP)
    assert unpack(reply.content) == b"ours to it" and not mark.exists()
    assert not (tmp_path / "flower" / "apps").exists()
    assert "brought a program ('task:app', 2 files" in caplog.text and "not run here" in caplog.text
    # a program that calls itself by the name of ours
    hostile = fab(turns.APP, task=HOSTILE.format(mark=str(mark)))
    assert unpack(one_message(hostile, pack(b"it"), turns.APP).content) == b"ours to it"
    assert not mark.exists() and caplog.text.count("brought a program") == 2
    caplog.clear()
    with caplog.at_level(logging.WARNING, "fedex_lora"):
        one_message(fab(turns.APP), pack(b"it"), turns.APP)
        assert not caplog.text
        one_message(b"no zip", pack(b"it"), turns.APP)
        bomb = BytesIO()
        with ZipFile(bomb, "w", ZIP_DEFLATED) as packed:
            packed.writestr("pyproject.toml", b" " * 50_000_000)
        one_message(bomb.getvalue(), pack(b"it"), turns.APP)
    assert "unreadable: BadZipFile" in caplog.text and "unreadable: ValueError" in caplog.text


def test_what_raises_at_a_client_is_told_by_its_kind_alone(one_message, monkeypatch, caplog):
    def fails(*_):
        raise ValueError("Mrs Miller, born 1950")

    monkeypatch.setattr(client_app, "in_time", fails)
    reply = one_message(fab(turns.APP), pack(b"it"), turns.APP)
    assert reply.error.code == ErrorCode.CLIENT_APP_RAISED_EXCEPTION
    assert "ValueError" in reply.error.reason and "Miller" not in reply.error.reason
    assert "Mrs Miller, born 1950" in caplog.text  # this machine's own log


def test_another_version_of_flower_is_refused(monkeypatch):
    monkeypatch.delattr(FLOWER, "install_from_fab")
    with pytest.raises(RuntimeError, match=r"no flwr\.supernode\..*\.install_from_fab"):
        turns.keep_to(turns.APP)


def test_a_message_of_another_program_is_refused_and_logged(one_message, tmp_path):
    reply = one_message(fab(turns.APP), RecordDict({"x": ConfigRecord({"y": 1})}), turns.APP)
    told = about_of(unpack(reply.content))
    assert told["kind"] == "failed" and "another program" in told["reason"]
    lines = [json.loads(line) for line in (tmp_path / "audit.jsonl").read_text().splitlines()]
    assert [line["direction"] for line in lines] == ["in", "out"]
    assert "another program" in lines[1]["outcome"] and lines[0]["run"] is None


def test_a_supernode_leaves_programs_packed_and_ends_with_its_parent(monkeypatch):
    started = []
    internal = supernode.start_client_internal
    monkeypatch.setattr(internal, supernode.UNPACKS, getattr(internal, supernode.UNPACKS))
    monkeypatch.setattr(supernode, "start_parent_process_monitor", started.append)
    monkeypatch.setattr(supernode, "flower_supernode", lambda: started.append("it"))
    before = os.umask(0o022)
    supernode.main()
    assert os.umask(before) == 0o077 and started == [os.getppid(), "it"]
    assert getattr(internal, supernode.UNPACKS)(b"no zip", None) == {}
    monkeypatch.delattr(internal, supernode.UNPACKS)
    with pytest.raises(RuntimeError, match="this version of Flower"):
        supernode.main()
    os.umask(before)
