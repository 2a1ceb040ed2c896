"""What is shown is shown whole, however narrow the place."""

import io

import pytest
from rich.console import Console

from fedex_lora.display import show_table

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
