"""The command that scores a run, or any model on any task."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

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
from fedex_lora.errors import number

if TYPE_CHECKING:
    from fedex_lora.recipe import Recipe

What = Annotated[str, typer.Argument(help="A run, a model (hub id or path) or a PEFT adapter.")]
Task = Annotated[
    str | None, typer.Option("--task", help="KIND or KIND/NAME, e.g. glue/sst2, e2e, math/gsm8k.")
]
Data = Annotated[
    str | None,
    typer.Option("--data", help="A file, a directory of splits, or a hub id[:config]."),
]
Split = Annotated[str | None, typer.Option("--split", help="One split; all labelled ones if not.")]


@app.command(name="evaluate")
def evaluate_command(
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
    from fedex_lora.cli.asked import asked
    from fedex_lora.engines.setup import surroundings
    from fedex_lora.runs.evaluation import evaluate, kind_of, load_subject
    from fedex_lora.runs.rundir import RunDir

    plain = not (task or data or split or set or client or out) and kind_of(what) == "run"
    if plain and not _keeps_texts(RunDir(Path(what).expanduser()).recipe()):
        _evaluate_run(Path(what).expanduser(), round)
        return
    recipe = asked(what, task, data, set)
    subject = load_subject(what, recipe, which_round(round), client)
    with surroundings(recipe), _progress() as tell:
        path, results = evaluate(subject, recipe, out, split, tell)
    say("\n".join([subject.name, *(f"Note: {note}" for note in subject.notes)]))
    _show(results["scores"], results["rows"])
    say(f"The same as JSON: {path / 'scores.json'}")


def _keeps_texts(run: Recipe) -> bool:
    """Whether a run's own evaluation is of texts that one model generates for the server's rows."""
    alone = run.method.chosen.personal
    return run.task.generates and run.evaluation.where == "server" and not alone


def _evaluate_run(run: Path, round: str) -> None:
    from fedex_lora.engines.setup import set_up, surroundings
    from fedex_lora.runs.here import local_engine
    from fedex_lora.runs.play import Run
    from fedex_lora.runs.reopened import read_round
    from fedex_lora.runs.rundir import RunDir
    from fedex_lora.runs.sources import changed, sources

    found = read_round(run, which_round(round))
    with surroundings(found.recipe):
        federation = set_up(found.recipe)
        different = changed(RunDir(run), found.recipe, sources(federation))
        again = Run(federation, local_engine(federation), RunDir(run), found.state)
        _, scores, _ = again.evaluate(found.state, federation.settings.clients)
    notes = [f"{what}: not as when the run began" for what in different]
    say("\n".join([f"{run}, round {found.state.version}", *found.notes, *notes]))
    _show({**scores["scores"], **scores.get("client_scores", {})})


def _show(scores: dict[str, dict[str, float]], counts: dict[str, int] | None = None) -> None:
    named = {n: f"{n} ({counts[n]})" if counts and n in counts else n for n in scores}
    rows = [[named[n], k, number(v)] for n, metrics in scores.items() for k, v in metrics.items()]
    show_table(console, ["rows", "metric", "score"], rows)


@contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None]]:
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
