"""What is shown is shown whole, however narrow the place."""

import io

import pytest
from rich.console import Console

from fedex_lora.cli.display import Display, show_table
from fedex_lora.runs.watch import Start

HEADER = ["method", "up a round", "ROUGE_L of the validation rows", "total"]
ROWS = [["fedex-reinit", "3,553.618M", "0.1282", "369.816M"], ["full", "-", "0.0", "[1]"]]


@pytest.mark.parametrize(("width", "terminal"), [(20, False), (20, True), (48, True), (90, True)])
def test_no_word_of_a_table_is_cut_off(width, terminal):
    file = io.StringIO()
    console = Console(file=file, width=width, force_terminal=terminal, color_system=None)
    show_table(console, HEADER, ROWS)
    lines = [line.split() for line in file.getvalue().splitlines()]
    assert ROWS[0] in lines and ROWS[1] in lines
    needed = max(width, 51) if terminal else 71  # headers wrap, but not within words
    assert max(map(len, file.getvalue().splitlines())) <= needed


def shown(act):
    file = io.StringIO()
    display = Display(Console(file=file, width=80, color_system=None))
    act(display)
    return file.getvalue()


def test_a_hundred_clients_are_not_printed_in_one_line():
    examples = {f"client-{i:03d}": 10 + i for i in range(100)}
    start = Start("many", "fedex", 0, 3, examples, "out")
    text = shown(lambda display: display.started(start))
    assert "100 clients with 10 to 109, 5,950 in all" in text and len(text) < 150
    few = Start("few", "fedex", 0, 3, {"a": 3, "b": 4}, "out")
    assert "a: 3, b: 4" in shown(lambda display: display.started(few))
    lost = dict.fromkeys(list(examples)[:90], "not connected")
    record = {
        "round": 1,
        "clients": {"client-099": {"loss": 1.0}},
        "refused": {"client-098": "its norm"},
        "lost": lost,
        "bytes_up": {},
        "bytes_down": {},
        "seconds": {"round": 1.0},
    }
    lines = shown(lambda display: display.round_done(record)).splitlines()
    assert len(lines) < 6 and max(map(len, lines)) <= 80
    assert "and 82 more: not connected" in " ".join(" ".join(lines).split())
