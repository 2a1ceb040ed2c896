"""Logs as JSON: every line of the output parses, whatever is told, and errors do too."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from commands import Command
from small_runs import recipe

from fedex_lora.cli import json_lines
from fedex_lora.cli.json_lines import Events, Lines, log_json
from fedex_lora.engines.remote.audit import FILE, Audit
from fedex_lora.flower.deploy import processes
from fedex_lora.recipe.reader import dump_recipe
from fedex_lora.runs.rundir import RunDir, plain


@pytest.fixture
def written(tmp_path: Path) -> Path:
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe(tmp_path)))
    return tmp_path / "recipe.yaml"


def events(out: str) -> list[dict[str, Any]]:
    lines = [json.loads(line, parse_constant=pytest.fail) for line in out.splitlines()]
    for line in lines:
        assert list(line) == ["time", "level", "event", "fields"]
        assert datetime.fromisoformat(line["time"]).tzinfo is not None
        assert line["level"] in ("info", "warning", "error")
    return lines


def test_every_line_of_a_run_is_an_object_and_the_rounds_are_the_records(
    command: Command, written: Path, tmp_path: Path
) -> None:
    code, out, _ = command("run", written, "--out", tmp_path / "run", "--log-json")
    found = events(out)
    by: dict[str, list[Any]] = {}
    for line in found:
        by.setdefault(line["event"], []).append(line["fields"])
    assert code == 0 and found[0]["event"] == "said" and found[-1]["event"] == "finished"
    assert by["started"][0]["examples"] == {"ann": 9, "bob": 3, "cleo": 5}
    records = [dict(record) for record in RunDir(tmp_path / "run").records()]
    assert by["round"] == plain(records) and len(records) == 2
    last = [(t["round"], t["client"]) for t in by["turn"] if t["step"] == t["steps"]]
    assert last == [(r, c) for r in (1, 2) for c in ("ann", "bob", "cleo")]
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert by["finished"] == [{"run": str(tmp_path / "run"), **results}]
    code, out, _ = command("resume", tmp_path / "run", "--log-json")
    assert code == 0 and "nothing to do" in str(events(out))
    assert not command("recipes")[1].startswith("{")  # it was for those commands alone


def test_an_error_is_a_line_too(command: Command, written: Path, tmp_path: Path) -> None:
    wrong = ("--set", "federation.rounds=0", "--out", tmp_path / "run")
    code, out, errors = command("run", written, "--log-json", *wrong)
    *before, line = events(out)
    assert code == 2 and "rounds" not in errors and {e["event"] for e in before} == {"phase"}
    assert (line["level"], line["event"]) == ("error", "error")
    assert line["fields"]["text"].startswith("--set federation.rounds=0: ")


def test_lines_of_a_server_and_of_a_client(
    command: Command, written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "d"
    assert command("deploy", "init", folder, "--clients", "ann", "--insecure")[0] == 0

    def attend(programs: Any, say: Any, log: Path, now_and_then: Callable[[], object]) -> None:
        say("$ flower-supernode")
        say("connected", False)
        say("the server does not answer", True)
        Audit(log.parent / FILE).write("in", "round", "ab", 2, b"12345", "received", "coordinator")
        now_and_then()

    monkeypatch.setattr(processes, "serve", lambda path, deployment, say: say("ready", False))
    monkeypatch.setattr(processes, "attend", attend)
    code, out, _ = command("deploy", "server", folder, "--log-json")
    assert code == 0 and [e["event"] for e in events(out)] == ["said", "line", "error"]
    client = ("--name", "ann", "--recipe", written, "--no-check", "--log-json")
    code, out, _ = command("deploy", "client", folder, *client)
    found = {(e["event"], e["level"]): e["fields"] for e in events(out)}
    assert code == 0 and found["line", "info"] == {"text": "connected"}
    assert found["line", "warning"] == {"text": "the server does not answer"}
    message = found["message", "info"]
    assert (message["round"], message["bytes"], message["direction"]) == (2, 5, "in")
    _, out, _ = command("deploy", "client", folder, *client[:-1])
    assert "{" not in out and " connected\n" in out  # for people, with the time


def test_what_is_no_json_becomes_null_and_newlines_stay_inside(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_lines, "_on", True)
    Events("fedex").note("two\nlines — `monitor`")
    json_lines.emit("x", loss=float("nan"), path=Path("a"), of=(1, float("inf")))
    Lines().emit(logging.LogRecord("peft", 30, "", 0, "odd %s", ("thing",), None))
    Events().round_done({"round": 1, "refused": {}, "lost": {"ann": "late"}})
    note, x, log, round = events(capsys.readouterr().out)
    assert note["fields"] == {"label": "fedex", "text": "two\nlines — --monitor"}
    assert x["fields"] == {"loss": None, "path": "a", "of": [1, None]}
    assert log["level"] == "warning" and log["fields"] == {"logger": "peft", "text": "odd thing"}
    assert note["level"] == "info" and round["level"] == "warning"  # somebody was left out
    log_json(False)
    assert not json_lines.emit("x")
