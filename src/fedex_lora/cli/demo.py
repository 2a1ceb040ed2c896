"""The command that shows what all this is about, on data and a model that need no network."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedex_lora.cli.common import (
    Sets,
    app,
    comma_separated,
    displays,
    read_recipe,
    say,
    shipped_recipes,
    this_command,
    whole_number,
)
from fedex_lora.cli.runs import show_comparison
from fedex_lora.errors import StorageError, number

if TYPE_CHECKING:
    from fedex_lora.experiments.compare import Results
    from fedex_lora.recipe import Recipe

METHODS = ["local", "fedit", "fedex"]


@app.command()
def demo(
    seeds: Annotated[str, typer.Option(help="Comma-separated; one comparison each.")] = (
        "0,1,2,3,4,5"
    ),
    set: Sets = [],  # noqa: B006
    out: Annotated[Path, typer.Option("--out", help="Directory to write.")] = Path("runs/demo"),
) -> None:
    """Federate a small model over three clients, offline: factors averaged, and exactly."""
    folder = shipped_recipes()
    if folder is None:
        raise StorageError("recipes/demo.yaml came not with this installation; install it again")
    numbers = list(dict.fromkeys(whole_number(s, "--seeds") for s in comma_separated(seeds)))
    spec = read_recipe(folder / "demo.yaml", set, lambda recipe: _announce(recipe, numbers))
    from fedex_lora.experiments.compare import compare

    with displays(this_command) as show:
        results = compare(
            spec, METHODS, numbers, out, lambda method, _: show(method), train_once=True
        )
    show_comparison(results, out, once=True)
    say(verdict(results))
    say(
        f"The report, one page: fedex-lora report {shlex.quote(str(out))}\n"
        "On your own data, one file for each client:\n"
        "  fedex-lora new my.yaml     # asks for model, task and files\n"
        "  fedex-lora plan my.yaml    # what the run will send, hold and take\n"
        "  fedex-lora run my.yaml"
    )


def _announce(recipe: Recipe, seeds: list[int]) -> None:
    clients, epochs = recipe.federation.clients, recipe.training.get("num_train_epochs", 3)
    times = "once" if len(seeds) == 1 else f"{len(seeds)} times"
    say(
        f"{clients} clients train {recipe.model.name.split('/')[0].removeprefix('package:')} for "
        f"{epochs} epochs, {times}; what they learned is then left alone (local), averaged factor "
        "by factor (fedit), and averaged exactly (fedex)."
    )


def verdict(results: Results) -> str:
    """What the comparison shows of exactness, or that it shows nothing."""
    from fedex_lora.experiments.compare import against

    found = against(results, "fedex", "fedit")
    if found is None or found.interval is None:
        return "One seed tells no difference from chance: leave out --seeds, or give several."
    edges = " to ".join(number(edge, 3, sign=True) for edge in found.interval)
    told = (
        f"fedex − fedit = {number(found.mean, 3, sign=True)} (95 % interval {edges}, "
        f"{found.basis}, paired)"
    )
    if found.sign > 0:
        return f"Seen: the exact mean scores higher than averaged factors. {told}"
    if found.sign < 0:
        return f"Here the exact mean scores lower than averaged factors. {told}"
    return f"Not seen: the interval holds 0, so these seeds show no difference. {told}"
