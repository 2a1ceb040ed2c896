"""The command that attacks a run's model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedex_lora.cli.common import Round, app, console, say, which_round
from fedex_lora.cli.display import show_table


@app.command(name="attack")
def attack_command(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Finished runs.")],
    shadows: Annotated[
        int, typer.Option(min=0, help="Shadow runs of LiRA, an even number; 0: the loss alone.")
    ] = 0,
    rows: Annotated[int, typer.Option(min=10, help="Members, and others, at most.")] = 2000,
    round: Round = "best",
) -> None:
    """Try to tell which rows a run was trained on: membership inference by loss, and by LiRA.

    Where a run saved its updates, these are attacked too, as a server that sees more than sums can:
    `update`, and whose a row is, `owner`. Several runs, with and without privacy, stand in one
    table. What comes of it is written into each run's attack.json, and its report has it.
    """
    from fedex_lora.runs.attack import FILE, attack
    from fedex_lora.runs.spent import line

    table = []
    for run in runs:
        told = attack(run, shadows, rows, which_round(round), say)
        privacy = "none" if told["privacy"] is None else line(told["privacy"])
        for name, found in told["attacks"].items():
            interval = f"{found['auc']:.3f} [{found['low']:.3f}, {found['high']:.3f}]"
            table.append([str(run), privacy, name, interval, f"{found['advantage']:+.3f}"])
        say(f"{run / FILE}: {told['members']} members, {told['others']} others")
    show_table(console, ["run", "privacy", "attack", "AUC [95 %]", "advantage"], table)
