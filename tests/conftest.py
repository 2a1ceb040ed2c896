"""What all tests share."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

import hypothesis
import pytest
import torch
from commands import Command
from small_runs import recipe

from fedex_lora import cli
from fedex_lora.runs.reopened import open_run
from fedex_lora.runs.run import start_run

hypothesis.settings.register_profile("untimed", deadline=None)  # a busy machine is no failure
hypothesis.settings.load_profile("untimed")
torch.set_num_threads(1)  # tiny matrices: more threads are slower, by far on a busy machine


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with published data and models, if there is one."""
    beside = Path(__file__).resolve().parents[2] / "shared"
    path = Path(os.environ.get("FEDEX_LORA_SHARED", beside))
    if not path.is_dir():
        pytest.skip(f"no shared data in {path}; set FEDEX_LORA_SHARED")
    return path


@pytest.fixture(autouse=True)
def forgetful(tmp_path_factory, monkeypatch):
    """No test knows what another one, or the user of this machine, has measured."""
    folder = tmp_path_factory.getbasetemp() / "measured" / secrets.token_hex(8)
    monkeypatch.setenv("FEDEX_LORA_CACHE", str(folder))


@pytest.fixture(scope="session")
def small_run(tmp_path_factory):
    """(path, model) of a finished run."""
    folder = tmp_path_factory.mktemp("small")
    start_run(recipe(folder, records={"save_updates": True}), folder / "run")
    return folder / "run", open_run(folder / "run").model


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    """Runs a command; returns (exit code, output, errors)."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["fedex-lora", *map(str, arguments)])
        monkeypatch.setattr(cli.console, "width", 200)
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            assert stop.code is None or isinstance(stop.code, int)
            code = stop.code or 0
        said = capsys.readouterr()
        return code, said.out, said.err

    return call
