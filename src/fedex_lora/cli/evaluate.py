"""The command that scores a run, or any model on any task."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from fedex_lora.aggregation.methods import METHODS
from fedex_lora.cli.common import (
    Client,
    Out,
    Round,
    Sets,
    ShowRows,
    app,
    complain,
    console,
    say,
    this_command,
    which_round,
)
from fedex_lora.cli.display import show_table
from fedex_lora.data.load import SOURCES
from fedex_lora.data.read import SUFFIXES, kind
from fedex_lora.engines.setup import set_up
from fedex_lora.errors import UserError, number
from fedex_lora.recipe import Recipe, spec_of
from fedex_lora.recipe.reader import Places, recipe_of
from fedex_lora.runs.evaluation import OnProgress, kind_of, load_subject, model_block
from fedex_lora.runs.evaluation import evaluate as evaluate_subject
from fedex_lora.runs.reopened import read_round
from fedex_lora.runs.run import local_engine
from fedex_lora.runs.rundir import RunDir
from fedex_lora.runs.scoring import evaluate as evaluate_state

What = Annotated[str, typer.Argument(help="A run, a model (hub id or path) or a PEFT adapter.")]
Task = Annotated[
    str | None, typer.Option("--task", help="KIND or KIND/NAME, e.g. glue/sst2, e2e, math/gsm8k.")
]
Data = Annotated[
    str | None,
    typer.Option("--data", help="A file, a directory of splits, or a hub id[:config]."),
]
Split = Annotated[str | None, typer.Option("--split", help="One split; all labelled ones if not.")]

_BLOCKS = ("model", "task", "data", "evaluation.batch_size", "engine.threads", "seed")


@app.command()
def evaluate(
    what: What,
    task: Task = None,
    data: Data = None,
    split: Split = None,
    set: Sets = [],  # noqa: B006
    round: Round = "best",
    client: Client = None,
    out: Out = None,
    show_rows: ShowRows = False,
) -> None:
    """Score a run on its own evaluation rows, or any model on a task and data.

    A run is scored on its own task and data where no others are named. Tasks e2e, math and
    commonsense generate texts (unless --set task.generate=false), which are kept in --out, by
    default a directory under runs/: the same command goes on after an interruption.
    """
    plain = not (task or data or split or set or client or out) and kind_of(what) == "run"
    if plain and not _keeps_texts(RunDir(Path(what).expanduser()).recipe()):
        _evaluate_run(Path(what).expanduser(), round)
        return
    recipe = asked(what, task, data, set)
    subject = load_subject(what, recipe, which_round(round), client)
    with _progress() as tell:
        path, results = evaluate_subject(subject, recipe, out, split, tell)
    say("\n".join([subject.name, *(f"Note: {note}" for note in subject.notes)]))
    _show(results["scores"], results["rows"])
    say(f"The same as JSON: {path / 'scores.json'}")


def _keeps_texts(run: Recipe) -> bool:
    """Whether a run's own evaluation is of texts that one model generates for the server's rows."""
    alone = METHODS[run.method.name].personal
    return run.task.generates and run.evaluation.where == "server" and not alone


def _evaluate_run(run: Path, round: str) -> None:
    found = read_round(run, which_round(round))
    federation = set_up(found.recipe)
    engine, clients = local_engine(federation), federation.settings.clients
    _, scores, _ = evaluate_state(federation, engine, found.state, clients, say)
    say("\n".join([f"{run}, round {found.state.version}", *found.notes]))
    _show({**scores["scores"], **scores.get("client_scores", {})})


def _show(scores: dict[str, dict[str, float]], counts: dict[str, int] | None = None) -> None:
    named = {n: f"{n} ({counts[n]})" if counts and n in counts else n for n in scores}
    rows = [[named[n], k, number(v)] for n, metrics in scores.items() for k, v in metrics.items()]
    show_table(console, ["rows", "metric", "score"], rows)


def asked(what: str, task: str | None, data: str | None, sets: list[str]) -> Recipe:
    """What an evaluation needs, as a recipe whose other blocks are not used.

    Args:
        what: A run, from which comes what is not given; a model, or an adapter.
        task: KIND or KIND/NAME.
        data: A file, a directory, a built-in source, or a hub id with `:CONFIG`.
        sets: Overrides of single keys.

    Raises:
        UserError: Something is missing or wrong; one line for each problem.
    """
    _check_keys(sets)
    places, run = Places(""), kind_of(what) == "run"
    raw: dict[str, Any] = {"name": "evaluation", **(_of_run(what) if run else {})}
    if not run:
        raw["model"] = model_block(what)
    if task:
        raw["task"] = _task(task, sets)
        places.known["task",] = f"--task {task}"
    if data:
        raw["data"] = _data(data)
        places.known["data",] = f"--data {data}"
    for block, option in (("task", task), ("data", data)):
        if not run and not option and not any(s.startswith(f"{block}.") for s in sets):
            raise UserError(f"--{block}: missing; a model alone does not say what to score it on")
    recipe = recipe_of(raw, places, sets, stored=run)
    if kind_of(what) == "model" and recipe.model.name != what:
        raise UserError(f"--set model.name: the model is {what}, and has no other base")
    return recipe


def _check_keys(sets: list[str]) -> None:
    for text in sets:
        key = text.partition("=")[0].strip()
        if not any(key == block or key.startswith(f"{block}.") for block in _BLOCKS):
            raise UserError(f"--set {text}: not used here; only {', '.join(_BLOCKS)} are")


def _of_run(what: str) -> dict[str, Any]:
    recipe = RunDir(Path(what).expanduser()).recipe()
    whole = recipe.model_dump(mode="json", exclude_none=True)
    kept = {key: whole[key] for key in ("seed", "model", "task", "data")}
    size = {"batch_size": recipe.evaluation.batch_size}
    return {**kept, "evaluation": size, "engine": {"threads": recipe.engine.threads}}


def _task(text: str, sets: list[str]) -> dict[str, Any]:
    kind, _, name = text.partition("/")
    block: dict[str, Any] = {"kind": kind, **({"name": name} if name else {})}
    answers = any(s.startswith(("task.generate", "task.score", "task=")) for s in sets)
    spec = spec_of(kind)
    return block | (dict(spec.scored) if spec and not answers else {})


def _data(text: str) -> dict[str, Any]:
    path = Path(text).expanduser()
    if text in SOURCES:
        return {"source": text}
    if path.exists():
        return {"path": str(path)}
    if kind(path) in SUFFIXES or text.startswith((".", "/", "~")) or text.count("/") > 1:
        raise UserError(
            f"--data: there is no {text}; expected a file ({', '.join(SUFFIXES)}), a directory "
            f"with splits, a hub id with :CONFIG if it has some, or one of {', '.join(SOURCES)}"
        )
    name, _, config = text.partition(":")
    return {"name": name, **({"config": config} if config else {})}


@contextmanager
def _progress() -> Iterator[OnProgress]:
    """A bar on a terminal, of generated texts where there are some; says how to go on."""
    bar = Progress(
        TextColumn("  {task.description}", markup=False),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    shown = bar.add_task("scoring", total=None)

    def tell(split: str, done: int, total: int) -> None:
        bar.update(shown, description=split, completed=done, total=total)

    try:
        with bar:
            yield tell
    except KeyboardInterrupt:
        complain(f"interrupted; this goes on from there:\n  {this_command()}")
        raise typer.Exit(130) from None
