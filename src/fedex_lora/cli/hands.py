"""Commands for rounds whose messages people carry."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedex_lora.cli.common import (
    Out,
    Sets,
    ShowRows,
    announce,
    app,
    displays,
    phase,
    read_recipe,
    runs_folder,
    say,
    this_command,
    whole_number,
)
from fedex_lora.cli.runs import show_results
from fedex_lora.errors import RecipeError, StorageError, number

if TYPE_CHECKING:
    from fedex_lora.runs.by_hand.opening import Opened

rounds = typer.Typer(no_args_is_help=True, help="Rounds by hand: see docs/by-hand.md.")
app.add_typer(rounds, name="round")

To = Annotated[
    str | None,
    typer.Option(help="Where the folders go: a directory, or s3://..., sftp://... (fsspec)."),
]


@rounds.command("open")
def open_command(
    what: Annotated[Path, typer.Argument(help="A recipe (a new run), or a run's directory.")],
    to: To = None,
    set: Sets = [],  # noqa: B006
    out: Out = None,
) -> None:
    """Write a signed folder for each client of a run's next round."""
    run = what
    if what.is_file():
        recipe = read_recipe(what, set, announce)
        from fedex_lora.runs.by_hand.closing import begin_run

        run = out or runs_folder(f"{recipe.name}-{recipe.method.name}-seed{recipe.seed}")
        begin_run(recipe, run)
    elif not what.is_dir():
        raise StorageError(f"{what}: no recipe and no run there")
    elif set or out:
        option = "--set" if set else "--out"
        raise RecipeError(f"{option}: is for a recipe; {what} is a run, which has begun")
    phase.info("loading libraries")
    from fedex_lora.runs.by_hand.opening import open_round

    _show_opened(run, open_round(run, to))


def _show_opened(run: Path, opened: Opened) -> None:
    what = f"Round {opened.round} of {opened.rounds} is open"
    if opened.scores_alone:
        what = "All rounds are over; the clients are to score the last model"
    say(f"{what}. The coordinator's key: {opened.key}")
    for client, folder in opened.folders.items():
        say(f"{client}: hand over {folder}; there: fedex-lora turn FOLDER --data FILE")
    given = shlex.join(opened.folders.values())
    say(f"When they are back: fedex-lora round close {shlex.quote(str(run))} --updates {given}")


@rounds.command("close", context_settings={"allow_extra_args": True})
def close_command(
    context: typer.Context,
    run: Annotated[Path, typer.Argument(help="The run's directory.")],
    updates: Annotated[
        list[str], typer.Option(help="Folders that came back; several may follow.")
    ] = [],  # noqa: B006
    examples: Annotated[
        list[str],
        typer.Option(help="NAME=ROWS, where an update does not say how many it was trained on."),
    ] = [],  # noqa: B006
) -> None:
    """Check and aggregate the updates of the round that is open, and open the next one."""
    addresses = [*updates, *context.args]
    if odd := next((text for text in addresses if text.startswith("-")), None):
        raise RecipeError(f"{odd}: no such option")
    counts = {}
    for text in examples:
        name, _, count = text.partition("=")
        counts[name] = whole_number(count, "--examples")
    phase.info("loading libraries")
    from fedex_lora.runs.by_hand.closing import close_round
    from fedex_lora.runs.by_hand.opening import open_round

    with displays(this_command) as show:
        results = close_round(run, addresses, counts, show(""))
    if results:
        show_results(run, results)
    else:
        _show_opened(run, open_round(run))


@app.command()
def turn(
    folder: Annotated[str, typer.Argument(help="The folder that the coordinator handed over.")],
    data: Annotated[Path | None, typer.Option(help="This client's rows.")] = None,
    key: Annotated[
        Path | None, typer.Option(help="The coordinator's coordinator.pub, got on another way.")
    ] = None,
    score_only: Annotated[
        bool,
        typer.Option("--score-only", help="Score the model sent, for who trains it otherwise."),
    ] = False,
    set: Sets = [],  # noqa: B006
    show_rows: ShowRows = False,
) -> None:
    """Train a client's turn of a round by hand; the update comes to lie in its folder. Where
    clients score models (evaluation.where), score the one that was sent on this client's rows."""
    phase.info("loading libraries")
    from fedex_lora.runs.by_hand.turning import take_turn

    with displays(this_command) as show:
        display = show("")
        taken = take_turn(
            folder,
            data,
            key=key,
            sets=set,
            train=not score_only,
            on_step=lambda turn, *step: display.turn(turn.round, turn.client, *step),
        )
    one, update, scored = taken.turn, taken.update, taken.scored
    if scored is not None:
        found = ", ".join(f"{name} {number(value, 3)}" for name, value in scored.scores.items())
        say(f"{one.client}, the model after round {one.round - 1}, {scored.rows} rows: {found}")
    if update is not None:
        loss = update.metrics.get("loss")
        told = "" if loss is None else f", training loss {loss:.3f}"
        say(f"{one.client}, round {one.round} of {one.rounds}: {update.examples} rows{told}")
    if key is None:
        say(f"The folder is signed by the key {taken.key}; is that the coordinator's?")
    say(f"Send back {taken.address}")
