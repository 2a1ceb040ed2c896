"""The whole page, and the figures that are in it and beside it."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import matplotlib as mpl
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure

from fedex_lora import __version__
from fedex_lora.experiments.analysis.claims import CLAIMS, Finding
from fedex_lora.experiments.analysis.evidence import findings
from fedex_lora.experiments.analysis.figures import of_task
from fedex_lora.experiments.analysis.plots import GRID, INK, PALETTE, style
from fedex_lora.experiments.analysis.runs import unused
from fedex_lora.experiments.analysis.study import Study
from fedex_lora.experiments.report import tables
from fedex_lora.experiments.report.verdict import verdict

MARKER = "fedex-lora report"  # in every file that a report consists of
_COLOURS = {INK: "currentColor", GRID: "var(--grid)", "#ffffff": "none"}
_COLOURS |= {c: f"var(--c{i})" for i, c in enumerate(PALETTE)}


@dataclass(frozen=True)
class Report:
    """A page and what lies beside it.

    Attributes:
        html: The page; it needs no other file.
        plots: By file name, the figures as SVG and PNG.
    """

    html: str
    plots: Mapping[str, bytes]


def build(study: Study, problems: Sequence[str] = (), refresh: int | None = None) -> Report:
    """The report of a study.

    Args:
        problems: What could not be read.
        refresh: Seconds after which a browser loads the page again; for runs that go on.
    """
    plots: dict[str, bytes] = {}
    tested: dict[int, list[Finding]] = {}
    for one in findings(study):
        if one.outcome != "not tested":
            tested.setdefault(one.claim, []).append(one)
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=visible,
    )
    done = sum(p.run.finished for p in study.placed)
    runs = f"{len(study.placed)} run{'s' * (len(study.placed) > 1)}, {done} finished"
    models = ", ".join(dict.fromkeys(p.run.recipe.model.name for p in study.placed))
    made = f"{datetime.now().astimezone():%Y-%m-%d %H:%M}"
    page = environment.get_template("page.html").render(
        marker=f"{MARKER} {__version__}",
        refresh=refresh,
        title=_title(study),
        subtitle=f"{runs}; model {models}; fedex-lora {__version__}, {made}",
        notes=[*study.notes, *_run_notes(study), *problems],
        single=len(study.placed) == 1,
        verdict=verdict(study),
        tasks=[_task(study, task, number, plots) for number, task in enumerate(study.tasks)],
        claims=CLAIMS,
        tested=tested,
        environment=tables.environment(study),
        commands=tables.commands(study),
    )
    return Report(page, plots)


def visible(value: Any) -> Any:
    """Control characters of a text, which HTML forbids, made visible."""
    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    return "".join(c if c.isprintable() or c in "\n\t " else "\ufffd" for c in value)


def _title(study: Study) -> str:
    names = list(dict.fromkeys(p.run.recipe.name for p in study.placed))
    if len(study.placed) == 1:
        one = study.placed[0]
        return f"{names[0]}: {one.arm}, seed {one.seed}"
    return ", ".join(names[:4]) + (" and others" if len(names) > 4 else "")


def _run_notes(study: Study) -> Iterator[str]:
    for p in study.placed:
        yield from (f"{p.run.path}: {note}" for note in p.run.notes)
    for task in study.tasks:
        yield from (f"{task}: {told}" for told in unused([p.run for p in study.of(task)]))


def _task(study: Study, task: str, number: int, plots: dict[str, bytes]) -> dict[str, Any]:
    """What the page says of one task; its figures' files go into `plots`."""
    slug = re.sub(r"[^a-z0-9]+", "-", task.lower()).strip("-")[:40]
    many = f"{number + 1}-{slug}-" if len(study.tasks) > 1 else ""
    figures: dict[str, list[dict[str, str]]] = {}
    for i, drawn in enumerate(of_task(study, task)):
        name = f"{many}{drawn.name}"
        svg = saved(drawn.figure, name, "svg")
        plots |= {f"{name}.svg": svg, f"{name}.png": saved(drawn.figure, name, "png")}
        title = drawn.figure.get_suptitle().replace("\n", " ")
        shown = {"svg": inline(svg, f"f{number}-{i}", title), "caption": drawn.caption}
        figures.setdefault(drawn.condition, []).append(shown)
    return {
        "name": task,
        "scores": tables.scores(study, task),
        "metrics": tables.all_metrics(study, task),
        "figures": figures,
        "open": next((condition for condition in figures if condition), None),
        "clients": tables.clients(study, task),
        "absent": tables.absent(study, task),
        "recipe": tables.recipe(study, task),
    }


def saved(figure: Figure, name: str, kind: str) -> bytes:
    """A file on a white ground, "svg" or "png": the same bytes for the same figure."""
    meta = {"svg": {"Date": None, "Creator": MARKER}, "png": {"Software": MARKER}}[kind]
    buffer = io.BytesIO()
    with style(), mpl.rc_context({"svg.hashsalt": name}), warnings.catch_warnings():
        # letters that matplotlib's font lacks become boxes
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure.savefig(buffer, format=kind, dpi=150, facecolor="white", metadata=meta)
    return buffer.getvalue()


def inline(svg: bytes, name: str, title: str) -> Markup:
    """A file of `saved` for use within a page: without a ground, its colours CSS variables (`--c0`
    ..., `--grid`) and the text's colour, its ids beginning with `name`, unlike other figures'."""

    def adapted(tag: re.Match[str]) -> str:
        text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", tag[0])
        for colour, variable in _COLOURS.items():
            text = text.replace(colour, variable)
        return text

    body = re.sub(r"<metadata>.*?</metadata>", "", svg.decode().partition("<svg")[2], flags=re.S)
    head = Markup('<svg role="img" aria-label="{}"').format(title)
    return head + Markup(re.sub(r"<[^<>]+>", adapted, re.sub(r"\s*\n\s*", " ", body)))
