"""What a client's operator sees of it over HTTP, from its own audit log."""

from __future__ import annotations

import json
import re
from pathlib import Path
from urllib.request import urlopen

import pytest

pytest.importorskip("prometheus_client")

from test_monitor import figures

from fedex_lora.engines.remote import audit
from fedex_lora.engines.remote.audit import Audit, appended
from fedex_lora.flower.deploy.figures import Figures
from fedex_lora.flower.deploy.words import ANSWERS, CONNECTED, SILENT
from fedex_lora.runs.monitor import answering

RUN = "9357e544" * 4


def test_lines_are_told_once_and_none_is_lost_when_the_file_is_set_aside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "audit.jsonl"
    log = Audit(path)
    log.write("in", "hello", RUN, 0, b"before", "received")
    lines = appended(path)
    assert next(lines) == [] == next(lines)
    log.write("in", "round", RUN, 1, b"one", "received")
    monkeypatch.setattr(audit, "_LARGE", 10)
    log.write("out", "update", RUN, 1, b"three", "answered")  # the file is set aside before
    assert [line["bytes"] for line in next(lines)] == [3, 5]
    assert len(list(tmp_path.glob("audit-*.jsonl"))) == 1
    with path.open("a") as file:
        file.write('{"a": ')
    assert next(lines) == []  # half a line
    with path.open("a") as file:
        file.write("1}\n")
    assert next(lines) == [{"a": 1}]


def test_a_log_that_is_not_there_yet(tmp_path: Path) -> None:
    lines = appended(tmp_path / "audit.jsonl")
    assert next(lines) == [] == next(lines)
    Audit(tmp_path / "audit.jsonl").write("in", "hello", RUN, 0, b"xy", "received")
    assert [line["bytes"] for line in next(lines)] == [2]


def line(direction: str, kind: str, round: int, size: int, second: float) -> dict[str, object]:
    return {
        "time": f"2026-01-01T00:00:{second:06.3f}+00:00", "run": RUN, "round": round, "kind": kind,
        "direction": direction, "peer": "coordinator", "bytes": size, "digest": "", "outcome": "",
    }  # fmt: skip


def test_what_prometheus_and_a_probe_are_told_of_a_client() -> None:
    client, said = Figures("ann", 3), []
    with answering(client, "0", said.append):
        address = re.findall(r"http://127\.0\.0\.1:\d+", said[0])[0]

        def status() -> dict[str, object]:
            return json.loads(urlopen(f"{address}/health").read())

        assert status()["status"] == "connecting" and status()["run"] is None
        client.heard(SILENT)
        assert status()["status"] == "unreachable"
        for text in (CONNECTED, ANSWERS, "sent; waiting for the coordinator"):
            client.heard(text)
            assert status()["status"] == "waiting"
        client.message(line("in", "hello", 0, 10, 0))
        client.message(line("out", "hello", 0, 20, 1.25))
        client.message(line("in", "round", 1, 100, 2))
        assert status()["status"] == "training" and status()["round"] == 0
        client.message(line("out", "update", 1, 1000, 7.5))
        client.message(line("in", "round", 2, 100, 10))
        client.message(line("out", "failed", 2, 30, 11))
        client.message(line("in", "refused", 2, 5, 12))
        assert status()["status"] == "refused"
        client.message(line("out", "failed", 2, 6, 12.5))
        health = status()
        assert health.pop("silent_seconds") is not None
        assert health == {
            "status": "refused", "client": "ann", "run": RUN, "round": 1, "rounds": 3,
        }  # fmt: skip
        got = figures(address)
    name = 'fedex_lora_client_{}{{client="ann"}}'.format
    assert got[name("round")] == 1 and got[name("rounds")] == 3
    of = 'fedex_lora_client_{}{{client="ann",{}="{}"}}'.format
    assert got[of("bytes_total", "direction", "up")] == 20 + 1000 + 30 + 6
    assert got[of("bytes_total", "direction", "down")] == 10 + 100 + 100 + 5
    assert got[of("seconds_total", "kind", "hello")] == 1.25
    assert got[of("seconds_total", "kind", "round")] == 5.5 + 1
    assert got[of("refusals_total", "kind", "failed")] == 1
    assert got[of("refusals_total", "kind", "refused")] == 1
    states = {k: v for k, v in got.items() if k.startswith("fedex_lora_client_state")}
    assert sum(states.values()) == 1
    assert states['fedex_lora_client_state{client="ann",fedex_lora_client_state="refused"}'] == 1
    board = (Path(__file__).parents[2] / "docs/grafana.json").read_text()
    asked = {found for p in json.loads(board)["panels"] for t in p["targets"]
             for found in re.findall(r"fedex_lora_client_\w+", t["expr"])}  # fmt: skip
    assert len(asked) == 6 and asked <= {found.partition("{")[0] for found in got}


def test_a_client_whose_word_is_outstanding_is_undecided() -> None:
    client = Figures("ann", 3)
    client.message(line("in", "hello", 0, 10, 0))
    client.message(line("out", "undecided", 0, 10, 1))
    assert client.health()["status"] == "undecided"
