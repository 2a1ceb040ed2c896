"""What was measured, where, and how it compares with its goal; kept in one JSON file."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch

from benchmarks.timing import Times

RESULTS = Path(__file__).parent / "results.json"
_PACKAGES = ("torch", "transformers", "peft", "numpy")


@dataclass(frozen=True)
class Figure:
    """One number.

    Attributes:
        what: What was measured, and against what.
        value: In `unit`: "s", "×" (a ratio), "%", "B" (bytes), or "" for a bare number.
        spread: (largest − smallest) / median of the repeats; None where there was one.
        at_least, at_most: The goal, if there is one.
    """

    what: str
    value: float
    unit: str
    spread: float | None = None
    at_least: float | None = None
    at_most: float | None = None

    @property
    def reached(self) -> bool | None:
        """Whether the goal is reached; None where there is none."""
        if self.at_least is None and self.at_most is None:
            return None
        above = self.at_least is None or self.value >= self.at_least
        return above and (self.at_most is None or self.value <= self.at_most)


@dataclass(frozen=True)
class Row:
    """Some figures that were measured together.

    Attributes:
        notes: How it was measured.
        skipped: Why nothing was, if so.
    """

    title: str
    figures: Sequence[Figure] = ()
    notes: Sequence[str] = ()
    skipped: str = ""


def seconds(times: Mapping[str, Times]) -> list[Figure]:
    """The medians themselves."""
    return [Figure(name, t.median, "s", t.spread) for name, t in times.items()]


def circumstances() -> dict[str, Any]:
    """Where and with what it is measured."""
    cuda = torch.cuda.is_available()
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "commit": _commit(),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "memory": psutil.virtual_memory().total,
        "gpu": torch.cuda.get_device_name() if cuda else None,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{name: version(name) for name in _PACKAGES},
    }


def _cpu() -> str:
    """The processor's name and the widest vectors that torch uses on it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{(names or [platform.processor()])[0]}, {torch.backends.cpu.get_cpu_capability()}"


def _commit() -> str:
    """The commit, with a + where files under src or benchmarks differ from it."""

    def git(*words: str) -> str:
        done = subprocess.run(
            ["git", *words], cwd=RESULTS.parent.parent, capture_output=True, text=True
        )
        return done.stdout.strip()

    changed = git("status", "--porcelain", "--", "src", "benchmarks/*.py")
    return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")


def read(path: Path = RESULTS) -> dict[str, dict[str, Any]]:
    """All rows measured so far, by name."""
    return json.loads(path.read_text()) if path.is_file() else {}


def store(name: str, row: Row, path: Path = RESULTS, order: Iterable[str] = ()) -> None:
    """Puts a row in place of its old result; one that was skipped replaces none that was not.

    Args:
        order: Names of rows as they are to stand; others follow.
    """
    rows = read(path)
    if row.skipped and name in rows and not rows[name]["skipped"]:
        return
    rows[name] = {**asdict(row), "measured": circumstances()}
    rows = {n: rows[n] for n in [*order, *rows] if n in rows}
    new = path.with_suffix(".new")
    new.write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    new.replace(path)


def row_of(entry: Mapping[str, Any]) -> Row:
    """A row as it was stored."""
    figures = [Figure(**figure) for figure in entry["figures"]]
    return Row(entry["title"], figures, entry["notes"], entry["skipped"])


def shown(figure: Figure) -> str:
    """A figure for people, with its unit.

    Example:
        >>> shown(Figure("", 0.00123, "s")), shown(Figure("", 512.3, "×"))
        ('1.23 ms', '512 ×')
        >>> shown(Figure("", 3.5e6, "B")), shown(Figure("", 1.2e-7, ""))
        ('3.5 MB', '1.2e-07')
    """
    value = figure.value
    if figure.unit == "s":
        return f"{value:.3g} s" if value >= 1 else f"{value * 1e3:.3g} ms"
    if figure.unit == "B":
        return f"{value / 1e6:.3g} MB"
    number = f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return f"{number} {figure.unit}".strip()


def goal(figure: Figure) -> str:
    """The goal, and whether it is missed.

    Example:
        >>> goal(Figure("", 300, "×", at_least=500)), goal(Figure("", 3, "×", at_most=4))
        ('≥ 500 ×: missed', '≤ 4 ×')
    """
    limits = (("≥", figure.at_least), ("≤", figure.at_most))
    parts = [f"{sign} {_plain(x, figure.unit)}" for sign, x in limits if x is not None]
    return ", ".join(parts) + (": missed" if figure.reached is False else "")


def _plain(value: float, unit: str) -> str:
    return f"{value:,g} {unit}".strip()
