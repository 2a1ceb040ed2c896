"""Measures what this project promises about speed and memory, against what one would use instead.

    make bench DATA=DIR                                    # all rows; DIR holds cola and mrpc
    python -m benchmarks residual merge --threads 2        # some rows

Every row's result goes into benchmarks/results.json in place of its old one, so that a long table
can be measured piece by piece. `python -m benchmarks.page` makes docs/benchmarks.md of it.
"""

from __future__ import annotations

import argparse
import os
import sys
from multiprocessing import get_context
from pathlib import Path

from rich.console import Console

from benchmarks.results import RESULTS, goal, read, row_of, shown
from benchmarks.rows import Given, measure, rows
from fedex_lora.cli.display import show_table


def main() -> None:
    known = rows(Given())
    parser = argparse.ArgumentParser(prog="python -m benchmarks")
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"of {', '.join(known)}; or all")
    parser.add_argument("--data", type=Path, help="directory with cola, mrpc, e2e_nlg and gsm8k")
    parser.add_argument("--model", type=Path, help="of the row generation: a language model's")
    parser.add_argument("--chorus", type=Path, help="of the row peers: where that package lies")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--results", type=Path, default=RESULTS)
    asked = parser.parse_args()
    unknown = sorted(set(asked.rows) - set(known))
    if unknown:
        parser.error(f"there is no row {unknown[0]!r}; known: {', '.join(known)}")
    given, failed = Given(asked.data, asked.model, asked.chorus), []
    for name in asked.rows or known:
        process = get_context("spawn").Process(
            target=measure, args=(name, given, asked.threads, asked.results)
        )
        process.start()
        process.join()
        failed += [name] * (process.exitcode != 0)
    show(Console(), asked.results)
    if failed:
        sys.exit(f"not measured, see above: {', '.join(failed)}")


def show(console: Console, path: Path) -> None:
    """The table of everything measured so far."""
    lines = []
    for entry in read(path).values():
        row = row_of(entry)
        lines.append([row.title, "", "", ""])
        lines += [
            [f"  {f.what}", shown(f), "" if f.spread is None else f"{f.spread:.0%}", goal(f)]
            for f in row.figures
        ]
    show_table(console, ["", "median", "spread", "goal"], lines)


if __name__ == "__main__":
    main()
