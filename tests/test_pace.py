"""How far a run is, in 60 columns, in a file, and below a notebook."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from fedex_lora.cli import common
from fedex_lora.cli import display as shown
from fedex_lora.cli.display import Display
from fedex_lora.federation.messages import Lost, Update
from fedex_lora.runs.bar import Barred
from fedex_lora.runs.pace import Pace
from fedex_lora.runs.watch import Start

START = Start("tiny", "fedex", 0, 5, {"ann": 9, "hospital-of-the-north": 3}, "runs/x", 3, 1)
RECORD = {
    "round": 2, "clients": {"ann": {"loss": 0.5}}, "refused": {}, "lost": {},
    "bytes_up": {}, "bytes_down": {}, "seconds": {"round": 1.0},
}  # fmt: skip


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_time_left_and_clients_by_hand() -> None:
    pace = Pace(4, 2, 1, 100.0)  # round 1 was played before: three rounds of two clients are left
    assert pace.line(100.0, 46) == "round 2/4  clients 0/2  -:-- left  " + "·" * 11
    pace.turn("ann", 3, 6, 0.25)  # a twelfth of what is left
    assert pace.share() == pytest.approx(1 / 12)
    assert pace.left(110.0) == "1:50"
    pace.turn("ann", 6, 6, None)
    assert pace.line(160.0, 54) == "round 2/4  clients 1/2  ann 6/6  loss 0.250  5:00 left"
    pace.turn("bob", 0, 4, None)
    assert pace.share() == pytest.approx(1 / 6)
    pace.round_done(2)
    assert pace.share() == pytest.approx(1 / 3) and "clients 0/2" in pace.line(0.0, 60)
    pace.turn("a, b", 1, 2, 0.5)  # two clients in one pass
    assert pace.share() == pytest.approx(1 / 2)
    assert pace.left(100.0 + 4000.0) == "1:06:40"
    pace.round_done(4)
    assert pace.share() == 1 and pace.left(500.0) == "0:00" and "round 4/4" in pace.line(0, 60)


def test_replies_across_machines_are_clients() -> None:
    pace = Pace(2, 3, 0, 0.0)
    pace.turn("", 0, 3, None)
    pace.turn("", 2, 3, 0.75)
    assert pace.line(2.0, 44) == "round 1/2  clients 2/3  loss 0.750  0:04 left"[:44]
    assert pace.line(2.0, 45) == "round 1/2  clients 2/3  loss 0.750  0:04 left"


@pytest.mark.parametrize("width", [58, 30, 9])
def test_no_line_is_wider_than_its_place(width: int) -> None:
    pace = Pace(100, 100, 98, 0.0)
    for client in ("ann", "hospital-of-the-north-and-of-the-south"):
        for step in (0, 999, 1000):
            pace.turn(client, step, 1000, 10.5)
            line = pace.line(36_000.0, width)
            assert len(line) <= width
            if width == 58:  # what has to be there at 60 columns
                assert "round 99/100" in line and "loss 10.500" in line and " left" in line


def on_terminal(width: int) -> tuple[Clock, io.StringIO, Display]:
    clock, file = Clock(), io.StringIO()
    console = Console(file=file, width=width, force_terminal=True, color_system=None)
    return clock, file, Display(console, clock=clock)


def test_a_terminal_of_60_columns_has_one_line_that_changes() -> None:
    clock, file, display = on_terminal(60)
    display.phase("loading the model")
    display.started(START)
    live = display._live
    assert live is not None
    live.refresh()
    for step in range(1, 4):
        clock.now += 7
        display.turn(2, "hospital-of-the-north", step, 9, 1.2345)
        live.refresh()
    display.round_done(RECORD)
    display.close()
    frames = re.split(r"[\r\n]|\x1b\[[0-9;?]*[A-Za-z]", file.getvalue())
    of = [frame.rstrip() for frame in frames if "clients " in frame]
    assert of[0].startswith("  round 2/5  clients 0/3  -:-- left")  # before the first step
    assert "  round 2/5  clients 0/3  hospi… 3/9  loss 1.234  12:15 left" in of
    assert max(map(len, of)) <= 60
    assert any("loading the model" in frame for frame in frames)
    assert any(frame.startswith("  round 2; training loss 0.500") for frame in frames)


def test_a_file_gets_lines_and_no_control_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, file = Clock(), io.StringIO()
    display = Display(Console(file=file, width=60), clock=clock)
    display.phase("loading the model")
    display.started(START)
    for step in range(1, 31):
        clock.now += 5
        display.turn(2, "ann", step, 30, 0.5)
    display.round_done(RECORD)
    display.close()
    lines = file.getvalue().splitlines()
    assert "\x1b" not in file.getvalue() and "\r" not in file.getvalue()
    assert lines[0] == "  loading the model" and lines[1].startswith("tiny: fedex")
    told = [line for line in lines if "clients " in line]
    assert len(told) == 5  # in 150 seconds, one in thirty
    assert told[0] == "  round 2/5  clients 0/3  ann 6/30  loss 0.500  29:30 left"
    assert told[-1] == "  round 2/5  clients 1/3  ann 30/30  loss 0.500  27:30 left"
    assert shown._SELDOM == 30


class Two:
    """A transport whose clients have trained at once."""

    def train(self, exchange: Any) -> Iterator[Update | Lost]:
        yield Update(1, "ann", {}, 1, {"loss": 0.5})
        yield Lost("bob", "late")

    def evaluate(self, exchange: Any) -> Iterator[Any]:
        yield from ()


def test_rounds_from_python_are_lines_in_a_file_and_a_bar_on_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    exchange: Any = SimpleNamespace(clients=["ann", "bob"])
    for terminal in (False, True):
        monkeypatch.setattr("sys.stderr.isatty", lambda terminal=terminal: terminal)
        bar = Barred(Two(), 2, 2)
        for _ in range(2):
            assert len(list(bar.train(exchange))) == 2
            bar.round_done()
        bar.close()
        told = capsys.readouterr().err
        if terminal:
            last = told.split("\r")[-1]
            assert last.startswith("round 2/2: 100%") and "4/4" in last and "loss 0.500" in last
        else:
            first, second = told.splitlines()
            assert first.startswith("round 1/2  clients 2/2  loss 0.500  0:0")
            assert second == "round 2/2  clients 2/2  loss 0.500  0:00 left"


def test_what_runs_below_a_notebook_s_kernel_gets_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JPY_PARENT_PID", "1")
    assert not common.make_console().is_terminal
    monkeypatch.delenv("JPY_PARENT_PID")
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    assert common.make_console().is_terminal
