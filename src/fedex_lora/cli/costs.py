"""The command that says what methods send, from the shapes of a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from fedex_lora.cli.common import app, comma_separated
from fedex_lora.errors import RecipeError
from fedex_lora.model.presets import PRESETS

_PLOTTED = "fedex,fedit,full"

Dtype = Literal["float32", "bfloat16", "float16"]


@app.command()
def cost(
    model: Annotated[str, typer.Option(help=f"{', '.join(PRESETS)}, a hub id, or a folder.")] = "",
    rank: Annotated[int, typer.Option(min=1, help="LoRA's r.")] = 4,
    targets: Annotated[str, typer.Option(help="Layers to adapt; PEFT's choice if not given.")] = "",
    labels: Annotated[int | None, typer.Option(min=1, help="Classify into so many.")] = None,
    clients: Annotated[int, typer.Option(min=1)] = 3,
    rounds: Annotated[int, typer.Option(min=1)] = 5,
    method: Annotated[str, typer.Option(help="Comma-separated; all if not given.")] = "",
    residual_rank: Annotated[
        int | None, typer.Option(min=0, help="Of a truncated residual; LoRA's r if not given.")
    ] = None,
    dtype: Annotated[Dtype, typer.Option(help="Of the model when it is handed out.")] = "float32",
    wire_dtype: Annotated[Literal["float32", "bfloat16"], typer.Option()] = "float32",
    secure: Annotated[
        bool, typer.Option("--secure", help="Under privacy.secure_aggregation.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print numbers only, as JSON.")] = False,
    plot: Annotated[
        Path | None, typer.Option(help="Draw cost against clients into this directory.")
    ] = None,
    plot_clients: Annotated[str, typer.Option(help="Numbers of clients.")] = "2,5,20,100",
    table8: Annotated[bool, typer.Option("--table8", help="The paper's Table 8.")] = False,
    out: Annotated[Path | None, typer.Option(help="With --table8: a Markdown file.")] = None,
) -> None:
    """Say what each method sends, from the shapes of a model; nothing is downloaded."""
    from fedex_lora.cli import cost_tables

    if table8:
        cost_tables.table8(out)
        return
    if not model:
        raise RecipeError(f"--model: missing; expected one of {', '.join(PRESETS)}, or a folder")
    if out is not None:
        raise RecipeError("--out: only --table8 is written to a file; leave it out, or use --json")
    import torch

    from fedex_lora.aggregation.methods import METHODS
    from fedex_lora.experiments.cost.cost import costs, reference, shapes
    from fedex_lora.recipe import LoraSpec

    torch.set_num_threads(1)
    found = shapes(model, LoraSpec(r=rank, target_modules=comma_separated(targets) or None), labels)
    chosen = comma_separated(method)
    if plot is not None:
        methods = chosen or comma_separated(_PLOTTED)
        cost_tables.plot(plot, model, found, plot_clients, methods)
        return
    fit = [name for name, m in METHODS.items() if not secure or m.unfit_for_sums() is None]
    compared = costs(
        found,
        [*(chosen or fit), reference()],
        clients=clients,
        rounds=rounds,
        residual_rank=residual_rank,
        wire_dtype=getattr(torch, wire_dtype),
        model_dtype=getattr(torch, dtype),
        secure=secure,
    )
    if as_json:
        typer.echo(json.dumps(cost_tables.plain(model, found, compared), indent=1))
    else:
        cost_tables.show(model, found, compared)
