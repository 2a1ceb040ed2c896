"""What the commands share: the app, the console, options, and how errors are told.

Modules of commands import nothing heavy; a command's function imports what it needs. So help,
mistyped options and lists come at once.
"""

from __future__ import annotations

import logging
import os
import re
import shlex
import site
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console

import fedex_lora
from fedex_lora import __version__
from fedex_lora.cli.json_lines import Events, emit, log_json, logs_json
from fedex_lora.cli.spoken import app, spoken
from fedex_lora.errors import QuorumLost, RecipeError, show_rows

if TYPE_CHECKING:
    from fedex_lora.cli.display import Display
    from fedex_lora.recipe import Recipe


def _version(asked: bool) -> None:
    if asked:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_version, help="Print it, and end.")
    ] = False,
) -> None:
    """Federated LoRA: the global model is exactly the weighted mean of what clients learned."""
    log_json(False)  # until an option says otherwise


def make_console() -> Console:
    """For what is asked for. Below a notebook's kernel there seems to be a terminal, but one that
    knows no cursor: it gets lines, as a file does."""
    terminal = False if "JPY_PARENT_PID" in os.environ else None
    return Console(force_terminal=terminal, emoji=False)  # which it makes of ":x:"


console = make_console()
errors = Console(stderr=True, soft_wrap=True, emoji=False)


def _show_rows(whole: bool) -> bool:
    show_rows(whole)
    return whole


RecipeFile = Annotated[Path, typer.Argument(help="A recipe: a YAML file.")]
RunPath = Annotated[Path, typer.Argument(help="A run's directory.")]
Sets = Annotated[list[str], typer.Option("--set", help="Override a key: a.b=c. May be repeated.")]
Out = Annotated[Path | None, typer.Option("--out", help="Directory to write.")]
Round = Annotated[str, typer.Option("--round", help="best, last, or a round's number.")]
ShowRows = Annotated[
    bool,
    typer.Option(
        "--show-rows",
        callback=_show_rows,
        help="Errors about rows show whole values, not 40 characters.",
    ),
]
Client = Annotated[str | None, typer.Option(help="Whose model, where nothing is exchanged.")]
Address = Annotated[
    str | None,
    typer.Option("--monitor", help="PORT or HOST:PORT for /metrics (Prometheus) and /health."),
]

RankError = Annotated[
    float | None,
    typer.Option("--error", help="With --rank auto: relative error allowed in a layer."),
]


def read_recipe(
    path: Path, sets: list[str], announce: Callable[[Recipe], None] | None = None
) -> Recipe:
    """The recipe of a file; all that is wrong with it is told at once.

    Args:
        announce: Is given the recipe before anything heavy is imported.
    """
    from fedex_lora.recipe.reader import read_draft

    draft = read_draft(path, sets)
    if announce is not None and draft.recipe is not None and not draft.lines:
        announce(draft.recipe)
    phase.info("loading libraries")
    from fedex_lora.runs.preflight import beforehand

    return beforehand(draft).settled()


def announce(recipe: Recipe) -> None:
    """The first line of a run: what is about to happen."""
    clients, rounds = recipe.federation.clients, recipe.federation.rounds
    counts = f"{clients} client{'s' * (clients != 1)}, {rounds} round{'s' * (rounds != 1)}"
    say(f"{recipe.name}: {recipe.method.name}, {counts}, {recipe.model.name}")


class Phases(logging.Handler):
    """Shows what takes long: on the display of a run; without one, on a terminal."""

    display: Display | Events | None = None

    def emit(self, record: logging.LogRecord) -> None:
        if self.display is not None:
            self.display.phase(record.getMessage())
        elif not emit("phase", text=record.getMessage()) and errors.is_terminal:
            errors.print(f"  {record.getMessage()}", style="dim", highlight=False, markup=False)


phases, phase = Phases(), logging.getLogger("fedex_lora.phase")


@contextmanager
def displays(go_on: Callable[[], str]) -> Iterator[Callable[[str], Display | Events]]:
    """Makes displays, takes them away whatever happens, and says how to go on after Ctrl-C or with
    too few clients: by the command that `go_on` gives."""
    from fedex_lora.cli.display import Display

    made: list[Display | Events] = []

    def show(label: str) -> Display | Events:
        for before in made:
            before.close()
        phases.display = Events(label) if logs_json() else Display(console, label)
        made.append(phases.display)
        return phases.display

    try:
        try:
            yield show
        finally:
            phases.display = None
            for display in made:
                display.close()
    except KeyboardInterrupt:
        complain(f"interrupted; this goes on after the last finished round:\n  {go_on()}")
        raise typer.Exit(130) from None
    except QuorumLost as error:
        complain(f"stopped: {error}")
        complain(
            "What was finished before is intact. Mend the cause (for a loss that is nan: a lower "
            f"learning rate, in a new run), then go on:\n  {go_on()}"
        )
        raise typer.Exit(2) from None


def shipped_recipes() -> Path | None:
    """The folder of recipes that came with the program: the checkout's, or as installed."""
    installed = "share/fedex-lora/recipes"
    schemes = (sysconfig.get_path("data"), sys.prefix, site.getuserbase())
    places = [Path(fedex_lora.__file__).parents[2] / "recipes"]
    places += [Path(scheme) / installed for scheme in schemes]
    return next((place for place in places if (place / "demo.yaml").is_file()), None)


def runs_folder(name: str) -> Path:
    """The folder of that name among the runs, whatever is in the name.

    Example:
        >>> runs_folder("../sst2-fedex-seed0").as_posix()
        'runs/..-sst2-fedex-seed0'
    """
    return Path("runs") / re.sub(r"[/\\\x00-\x1f\x7f]+", "-", name)


def this_command() -> str:
    """The command line as it was given."""
    return shlex.join(["fedex-lora", *sys.argv[1:]])


def which_round(text: str) -> Literal["best", "last"] | int:
    if text in ("best", "last"):
        return text  # type: ignore[return-value]
    return whole_number(text, "--round")


def whole_number(text: str, option: str) -> int:
    if not text.strip().isdecimal():
        raise RecipeError(f"{option}: {text!r} is no whole number")
    return int(text)


def comma_separated(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def rank_option(text: str, error: float | None) -> tuple[int | None, float]:
    """A rank (None for as many as there are), and a relative error that it may cost in a layer."""
    if text == "auto":
        if error is None or not 0 < error < 1:
            raise RecipeError("--rank auto: needs --error, above 0 and below 1, e.g. --error 1e-3")
        return None, error
    if error is not None:
        raise RecipeError("--error: goes with --rank auto only")
    if not text:
        return None, 0.0
    rank = whole_number(text, "--rank")
    if rank < 1:
        raise RecipeError("--rank: expected a number of at least 1, or auto")
    return rank, 0.0


def say(text: str) -> None:
    if not emit("said", text=spoken(text)):
        console.print(spoken(text), highlight=False, soft_wrap=True, markup=False)


def complain(text: str) -> None:
    if not emit("error", "error", text=spoken(text).removeprefix("error: ")):
        errors.print(spoken(text), highlight=False, markup=False)


def tell(text: str, trouble: bool | None = None) -> None:
    """A line of a deployment's processes; with the time, if it is of what happens."""
    if trouble is None:
        say(text)
    elif not emit("line", "warning" if trouble else "info", text=spoken(text)):
        say(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}")
