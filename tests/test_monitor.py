"""Figures of a run for Prometheus, and its health, as they come over HTTP."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import urlopen

import pytest

pytest.importorskip("prometheus_client")

from fedex_lora.errors import UserError
from fedex_lora.runs.monitor import monitored
from fedex_lora.runs.watch import Silent, Start

RECORD: dict[str, Any] = {
    "round": 1,
    "clients": {"ann": {"examples": 9}, "bob": {"examples": 3}},
    "refused": {"cleo": "NaN"},
    "lost": {},
    "bytes_up": {"ann": 100, "bob": 50},
    "bytes_down": {"ann": 7},
    "seconds": {"train": 2.5, "round": 3.0},
    "score": 0.75,
}


class Heard(Silent):
    def __init__(self) -> None:
        self.notes: list[str] = []
        self.rounds: list[int] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def round_done(self, record: dict[str, Any]) -> None:
        self.rounds.append(record["round"])


def figures(address: str) -> dict[str, float]:
    text = urlopen(f"{address}/metrics").read().decode()
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}


def test_what_prometheus_and_a_probe_are_told() -> None:
    heard = Heard()
    with monitored(heard, "0") as monitor:
        found = re.search(r"http://127\.0\.0\.1:\d+", heard.notes[0])
        assert found
        address = found[0]
        assert json.loads(urlopen(f"{address}/health").read())["status"] == "starting"
        monitor.started(Start("x", "fedex", 0, 5, {"ann": 9}, "runs/x"))
        monitor.turn(1, "ann", 2, 8)
        for round in (1, 2):
            monitor.round_done({**RECORD, "round": round})
        health = json.loads(urlopen(f"{address}/health").read())
        assert health.pop("silent_seconds") < 60
        assert health == {
            "status": "training", "run": "runs/x", "round": 2, "rounds": 5,
            "training": "ann", "step": 2, "steps": 8,
        }  # fmt: skip
        got = figures(address)
        with pytest.raises(HTTPError, match="404"):
            urlopen(f"{address}/secret")
        board = (Path(__file__).parents[1] / "docs/grafana.json").read_text()
    assert heard.rounds == [1, 2]  # all is passed on
    assert got["fedex_lora_round"] == 2 and got["fedex_lora_rounds"] == 5
    assert got['fedex_lora_clients{state="taken"}'] == 2
    assert got['fedex_lora_clients{state="refused"}'] == 1
    assert got['fedex_lora_refusals_total{client="cleo"}'] == 2
    assert got['fedex_lora_bytes_total{direction="up"}'] == 300
    assert got['fedex_lora_bytes_total{direction="down"}'] == 14
    assert got['fedex_lora_seconds_total{part="train"}'] == 5
    assert got["fedex_lora_score"] == 0.75
    asked = {name for p in json.loads(board)["panels"] for t in p["targets"]
             for name in re.findall(r"fedex_lora_(?!client_)\w+", t["expr"])}  # fmt: skip
    assert len(asked) == 7 and asked <= {name.partition("{")[0] for name in got}


@pytest.mark.parametrize("address", ["metrics", "host:", "1:70000"])
def test_addresses_that_are_none(address: str) -> None:
    with pytest.raises(UserError, match="expected PORT or"), monitored(Heard(), address):
        pass


def test_an_address_in_use() -> None:
    heard = Heard()
    with monitored(heard, "0"):
        port = re.findall(r":(\d+)/", heard.notes[0])[0]
        with pytest.raises(UserError, match="name another port"), monitored(Heard(), port):
            pass
