"""The section of docs/deploy.md on what a round costs, made from benchmarks/flower.json.

python -m benchmarks.flower_page
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS, PAGE = ROOT / "benchmarks" / "flower.json", ROOT / "docs" / "deploy.md"
HEADING = "## What a round costs besides training\n"
TEXT = """\
One machine ({cores} cores; load average {load:.0f} with large messages, other programs included),
{nodes} nodes, TLS and keys. *Flower* is an app on the same SuperLink that sends and returns as many
bytes and does nothing; the two take turns. Seconds of a round, the median and the range:

| a round with | ours, besides training | Flower | ratio of medians |
|---|---|---|---|
{small}
{large}

Nodes ask for messages every three seconds, which is most of a small round. The rest is loading the
model and the rows, which every message does anew, and the server's own step.

Bytes are counted where they are sent. With the large messages Flower's own count is {off} of ours;
with the small ones, of {few} kB, it is {off_small}: its envelope is {envelope} kB a message. It
cuts messages into pieces of 5 MiB and carries equal ones once, so where tensors are zero, or the
same in all updates, it counts less than is sent.

Written by `python -m benchmarks.flower_page` from benchmarks/flower.json, which
`python -m benchmarks.flower_overhead floor` and `large` measure.
"""


def with_section(text: str, results: Mapping[str, Any]) -> str:
    """The page with the section of that heading made anew."""
    before, rest = text.split(HEADING)
    after = rest[rest.index("\n## ") + 1 :]
    return f"{before}{HEADING}\n{section(results)}\n{after}"


def section(results: Mapping[str, Any]) -> str:
    """What was measured, in Markdown."""
    small, large = results["floor"], results["large"]
    down, up = (large["flower"][-1][key] / 1e6 for key in ("down", "up"))
    ours, theirs = _bytes(small)
    messages = small["nodes"] * sum(2 * len(turn["seconds"]) + 2 for turn in small["ours"])
    return TEXT.format(
        cores=large["cores"],
        load=large["load"],
        nodes=large["nodes"],
        small=_row("a tiny model", small),
        large=_row(f"{down:.0f} MB to every client and {up:.0f} MB back", large),
        off=_share(large),
        off_small=_share(small),
        few=f"{ours / messages / 1000:.0f}",
        envelope=f"{(theirs - ours) / messages / 1000:.1f}",
    )


def besides(turns: Sequence[Mapping[str, Any]]) -> list[float]:
    """Seconds besides the longest training, of the rounds whose messages have the full size."""
    return [
        seconds - training
        for turn in turns
        for seconds, training, down in zip(turn["seconds"], turn["training"], turn["bytes_down"])
        if down == turn["bytes_down"][-1]
    ]


def _row(what: str, part: Mapping[str, Any]) -> str:
    ours, theirs = besides(part["ours"]), [s for turn in part["flower"] for s in turn["seconds"]]
    shown = [f"{median(s):.1f} ({min(s):.1f} to {max(s):.1f})" for s in (ours, theirs)]
    return f"| {what} | {' | '.join(shown)} | {median(ours) / median(theirs):.2f} |"


def _bytes(part: Mapping[str, Any]) -> tuple[int, int]:
    """In all turns: as we counted them, and as Flower did."""
    return sum(t["bytes"] for t in part["ours"]), sum(t["bytes_by_flower"] for t in part["ours"])


def _share(part: Mapping[str, Any]) -> str:
    ours, theirs = _bytes(part)
    return f"{theirs / ours:.2%}"


if __name__ == "__main__":
    PAGE.write_text(with_section(PAGE.read_text(), json.loads(RESULTS.read_text())))
