"""The command that says what a run will take before it starts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from fedex_lora.cli.common import RecipeFile, Sets, ShowRows, app, console, read_recipe, say
from fedex_lora.cli.display import show_table
from fedex_lora.errors import size

if TYPE_CHECKING:
    from fedex_lora.experiments.cost.cost import Table
    from fedex_lora.runs.plan.plan import Plan, Round

_SHOWN = 10  # clients


@app.command(name="plan")
def plan_command(
    recipe: RecipeFile,
    set: Sets = [],  # noqa: B006
    measured: Annotated[
        bool, typer.Option("--measure/--no-measure", help="Train a few steps to tell the time.")
    ] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print all of it as JSON.")] = False,
    show_rows: ShowRows = False,
) -> None:
    """Say what a recipe's run will send, hold, write and take, before it starts."""
    from fedex_lora.engines.setup import surroundings
    from fedex_lora.runs.plan.memory import total
    from fedex_lora.runs.plan.plan import plan

    spec = read_recipe(recipe, set)
    with surroundings(spec):
        found = plan(spec, measured)
    if as_json:
        whole = {**asdict(found), "recipe": found.recipe.model_dump(mode="json")}
        typer.echo(json.dumps(whole, indent=1))
        return
    _say_what(found)
    show_table(console, *_rounds_table(found))
    _say_bytes(found)
    say("\nMemory at the peak of a process")
    show_table(console, *_memory_table(found))
    both = total(found.client) + total(found.server) + found.libraries
    say(f'Both in one process, as with engine local: ~{size(both)}. "~" is an estimate.')
    say(f"Disk: up to {size(found.disk)} of checkpoints and saved updates")
    _say_time(found)


def _say_what(found: Plan) -> None:
    from fedex_lora.experiments.cost.cost import millions

    recipe, clients = found.recipe, len(found.clients)
    say(
        f"{recipe.name}: {recipe.method.name}, {clients} client(s), {len(found.rounds)} rounds\n"
        f"Model: {recipe.model.name}, {millions(found.parameters)} parameters; adapted: "
        f"{found.adapted} layers, {millions(found.adapter)}; "
        f"trained in full: {millions(found.head)}"
    )
    if found.examples is None:
        say(f"Training examples: {found.about_examples}")
    else:
        few = [f"{name}: {n}" for name, n in list(found.examples.items())[:_SHOWN]]
        more = ["..."] if clients > _SHOWN else []
        say(f"Training examples: {', '.join([*few, *more])}\nRows: {found.about_examples}")
    for note in found.privacy:
        say(f"Privacy: {note}")


def _rounds_table(found: Plan) -> Table:
    header = ["round", "up", "down", "all", "rank", "ledger", "state", "late"]
    rows = []
    for r in _some(found.rounds):
        up, down = (max((s.bytes for s in part.values()), default=0) for part in (r.up, r.down))
        whole = sum(s.bytes for part in (r.up, r.down) for s in part.values())
        rank = "dense" if 0 < r.rank == r.full else str(r.rank)
        held = [size(b) for b in (r.ledger, r.checkpoint + r.own, r.catch_up.bytes)]
        rows.append([str(r.round), size(up), size(down), size(whole), rank, *held])
    return header, rows


def _some(rounds: Sequence[Round]) -> list[Round]:
    """The first three rounds, some between, and the last."""
    shown = {1, 2, 3, *(m * 10**e for m in (1, 2, 5) for e in range(6) if m * 10**e > 3)}
    return [r for r in rounds if r.round in shown or r is rounds[-1]]


def _say_bytes(found: Plan) -> None:
    up = sum(s.bytes for r in found.rounds for s in r.up.values())
    down = sum(s.bytes for r in found.rounds for s in r.down.values())
    last = found.delivery.bytes
    say(
        f"In all: {size(up)} up, {size(down)} down, {size(last)} to deliver the final model: "
        f"{size(up + down + last)}.\nup, down: one client's messages, the largest; all: of all "
        "clients; rank: of what the ledger adds to the layer where it is largest; ledger, state: "
        "bytes at the server; late: to a client that joins after that round"
    )


def _memory_table(found: Plan) -> Table:
    from fedex_lora.runs.plan.memory import total

    rows = []
    for process, parts in (("client", found.client), ("server", found.server)):
        rows += [[process, p.what, ("~" if p.estimate else "") + size(p.bytes)] for p in parts]
        rows.append([process, "Python and libraries, as in this command", size(found.libraries)])
        rows.append([process, "together", f"~{size(total(parts) + found.libraries)}"])
    return ["process", "what", "bytes"], rows


def _say_time(found: Plan) -> None:
    t = found.timing
    if t is None:
        say(f"Time: {found.about_time}")
        return
    steps = sum(t.steps.values())
    say(
        f"Time: about {_duration(t.run)} for the run, one client after the other, at the present "
        "load. Measured: "
        f"{t.step:.3g} s a step (up to {steps} a round), {t.turn:.3g} s more a client's turn, "
        f"{t.row:.3g} s a row of evaluation, {t.server:.3g} s an aggregation; "
        f"{size(t.resident)} resident\nOn: {t.machine}"
    )


def _duration(seconds: float) -> str:
    """Seconds for people.

    Example:
        >>> _duration(42.4), _duration(600), _duration(90_000)
        ('42 s', '10 min', '25 h')
    """
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.0f} h"
