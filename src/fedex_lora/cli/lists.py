"""Commands that list what there is."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedex_lora import __version__
from fedex_lora.cli.common import app, console, shipped_recipes
from fedex_lora.cli.display import show_table
from fedex_lora.errors import RecipeError, UserError


@app.command()
def methods() -> None:
    """List the methods: three choices each, and where they come from."""
    from fedex_lora.aggregation.methods import METHODS, get_method

    header = ["method", "trains", "assignment", "residual", "base", "ranks differ", "source"]
    rows = [
        [
            name,
            m.trains,
            m.assignment.name,
            m.residual,
            "shared" if m.shared_base else "per client",
            "yes" if m.ranks_may_differ else "no",
            m.source,
        ]
        for name, m in ((name, get_method(name)) for name in METHODS)
    ]
    show_table(console, header, rows)


@app.command()
def recipes(
    directory: Annotated[
        Path | None, typer.Option(help="recipes/, or else the installed ones.")
    ] = None,
) -> None:
    """List the recipes and grids in a directory."""
    from fedex_lora.experiments.grid.spec import grid_of, grid_row
    from fedex_lora.recipe.reader import drafted, read_yaml

    here = Path("recipes")
    directory = directory or (here if here.is_dir() else shipped_recipes() or here)
    found = sorted(directory.rglob("*.yaml"))
    if not found:
        raise RecipeError(f"{directory}: no recipes (*.yaml) there; name a directory that has some")
    rows, grids = [], []
    for file in found:
        try:
            raw, places, lines = read_yaml(file)
            if "recipes" in raw:
                grids.append([str(file), *grid_row(grid_of(raw, places, lines))])
                continue
            spec = drafted(raw, places, (), lines).settled()
        except UserError as error:
            rows.append([str(file), "-", "-", str(error).splitlines()[0]])
            continue
        rows.append([str(file), spec.method.name, spec.task.title, spec.model.name])
    show_table(console, ["recipe", "method", "task", "model"], rows)
    if grids:
        show_table(console, ["grid", "runs", "methods", "varies"], grids)


@app.command()
def version() -> None:
    """Print the version."""
    typer.echo(__version__)
