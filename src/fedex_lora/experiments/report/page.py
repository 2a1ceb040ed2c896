"""The whole page, and the figures that are in it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from fedex_lora import __version__
from fedex_lora.experiments.analysis.drawn import Drawn
from fedex_lora.experiments.analysis.figures import of_task
from fedex_lora.experiments.analysis.study import Study
from fedex_lora.experiments.analysis.unused import unused
from fedex_lora.experiments.report import sections
from fedex_lora.experiments.report.html import Child, Html, details, el, join
from fedex_lora.experiments.report.scores import all_metrics, scores
from fedex_lora.experiments.report.style import CSS
from fedex_lora.experiments.report.svg import MARKER, inline, png_file, svg_file
from fedex_lora.experiments.report.words import verdict


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
    body = [
        el("h1", _title(study)),
        el("p", _subtitle(study), class_="soft"),
        sections.notes([*study.notes, *_run_notes(study), *problems]),
        verdict(study),
    ]
    for number, task in enumerate(study.tasks):
        body += _task(study, task, number, plots)
    body += [
        el("h2", "The paper’s claims"),
        sections.claims(study),
        el("h2", "Recipe"),
        *(sections.recipe(study, task) for task in study.tasks),
        el("h2", "Environment"),
        sections.environment(study),
        el("h2", "To repeat it"),
        el("pre", "\n".join(sections.commands(study)), class_="wrap"),
    ]
    return Report(_document(_title(study), join(body), refresh), plots)


def _document(title: str, body: Html, refresh: int | None) -> str:
    head = [
        Html('<meta charset="utf-8">'),
        Html('<meta name="viewport" content="width=device-width, initial-scale=1">'),
        Html(f'<meta name="generator" content="{MARKER} {__version__}">'),
        Html('<link rel="icon" href="data:,">'),
        Html(f'<meta http-equiv="refresh" content="{refresh}">') if refresh else None,
        el("title", title),
        el("style", CSS),
    ]
    page = el("html", el("head", *head), el("body", el("main", body)), lang="en")
    return f"<!doctype html>\n{page}\n"


def _title(study: Study) -> str:
    names = list(dict.fromkeys(p.run.recipe.name for p in study.placed))
    if len(study.placed) == 1:
        one = study.placed[0]
        return f"{names[0]}: {one.arm}, seed {one.seed}"
    return ", ".join(names[:4]) + (" and others" if len(names) > 4 else "")


def _subtitle(study: Study) -> str:
    done = sum(p.run.finished for p in study.placed)
    runs = f"{len(study.placed)} run{'s' * (len(study.placed) > 1)}, {done} finished"
    models = ", ".join(dict.fromkeys(p.run.recipe.model.name for p in study.placed))
    made = f"{datetime.now().astimezone():%Y-%m-%d %H:%M}"
    return f"{runs}; model {models}; fedex-lora {__version__}, {made}"


def _run_notes(study: Study) -> Iterator[str]:
    for p in study.placed:
        for note in p.run.notes:
            yield f"{p.run.path}: {note}"
    for task in study.tasks:
        told = unused([p.run for p in study.of(task)])
        yield from (f"{task}: {one}" for one in told)


def _task(study: Study, task: str, number: int, plots: dict[str, bytes]) -> Iterator[Child | None]:
    many = len(study.tasks) > 1
    yield el("h2", f"{task}: scores" if many else "Scores")
    yield scores(study, task)
    yield all_metrics(study, task)
    figures: dict[str, list[Html]] = {}
    for i, drawn in enumerate(of_task(study, task)):
        name = f"{number + 1}-{_slug(task)}-{drawn.name}" if many else drawn.name
        svg = svg_file(drawn.figure, name)
        plots |= {f"{name}.svg": svg, f"{name}.png": png_file(drawn.figure, name)}
        shown = figures.setdefault(drawn.condition, [])
        shown.append(_figure(drawn, svg, f"f{number}-{i}"))
    first = next((condition for condition in figures if condition), None)
    for condition, shown in figures.items():
        box = el("div", *shown, class_="figures")
        told = f"Curves: {condition}"
        yield details(told, box, open=condition == first) if condition else box
    if (shown := sections.clients(study, task)) is not None:
        yield el("h2", f"{task}: clients" if many else "Clients")
        yield shown


def _figure(drawn: Drawn, svg: bytes, prefix: str) -> Html:
    title = drawn.figure.get_suptitle().replace("\n", " ")
    return el("figure", inline(svg, prefix, title), el("figcaption", drawn.caption or None))


def _slug(task: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", task.lower()).strip("-")[:40]
