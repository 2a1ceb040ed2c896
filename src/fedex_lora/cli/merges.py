"""The command that merges adapters."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from fedex_lora.cli.common import RankError, app, console, rank_option, say
from fedex_lora.cli.display import show_table
from fedex_lora.errors import RecipeError

if TYPE_CHECKING:
    from fedex_lora.merge.write import Merged

Dtype = Literal["float32", "bfloat16", "float16"]


@app.command()
def merge(
    adapters: Annotated[list[str], typer.Argument(help="PEFT LoRA adapters: folders or hub ids.")],
    out: Annotated[Path, typer.Option("--out", help="New directory to write.")],
    weights: Annotated[
        str | None, typer.Option(help="One each, e.g. 3,1,1; equal by default.")
    ] = None,
    rank: Annotated[str, typer.Option(help="Largest rank of a layer, or auto with --error.")] = "",
    error: RankError = None,
    dtype: Annotated[
        Dtype | None, typer.Option(help="Of what is written; float32, or as in the base model.")
    ] = None,
    into_base: Annotated[
        str | None, typer.Option(help="Add to this full model instead (folder or hub id).")
    ] = None,
    base_quantised: Annotated[
        str | None,
        typer.Option(help="With --into-base: the 4 bits it had in training, e.g. nf4-double."),
    ] = None,
    sum: Annotated[
        bool, typer.Option("--sum", help="Take the weights as they are, negative ones too.")
    ] = False,
    tight: Annotated[
        bool,
        typer.Option("--tight", help="Every layer at its own rank: smaller, not for all readers."),
    ] = False,
    embeddings: Annotated[
        str,
        typer.Option(help="Those saved along: equal in all, mean, or of adapter 1, 2, ..."),
    ] = "equal",
    ignore_base_name: Annotated[
        bool, typer.Option("--ignore-base-name", help="Pass over names of base models alone.")
    ] = False,
    report: Annotated[
        bool, typer.Option("--report", help="Every layer, and how far averaging factors is off.")
    ] = False,
    strict: Annotated[
        bool, typer.Option("--strict/--no-strict", help="Refuse adapters that differ in layers.")
    ] = True,
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Read adapter_model.bin too.")
    ] = False,
) -> None:
    """Merge LoRA adapters: the exact weighted mean (or sum) of their updates."""
    import torch

    from fedex_lora.merge.adapters import open_adapter
    from fedex_lora.merge.plan import make_plan
    from fedex_lora.merge.quantised import KINDS
    from fedex_lora.merge.write import Options, merge_adapters

    limit, tolerance = rank_option(rank, error)
    if base_quantised is not None and (into_base is None or base_quantised not in KINDS):
        raise RecipeError(
            f"--base-quantised: goes with --into-base, and is one of {', '.join(KINDS)}"
        )
    for option, given in (("report", report), ("tight", tight)):
        if into_base is not None and given:
            raise RecipeError(f"--{option}: is about a merged adapter; leave out --into-base or it")
    opened = [open_adapter(a, allow_pickle) for a in adapters]
    plan = make_plan(
        opened,
        _weights(weights),
        strict,
        is_sum=sum,
        ignore_base_name=ignore_base_name,
        embeddings=embeddings,
    )
    for adapter in opened:
        if Path(adapter.name).is_dir() and adapter.folder != Path(adapter.name).expanduser():
            say(f"Found: {adapter.folder}")
    to = getattr(torch, dtype) if dtype else None
    for line in plan.left_out:
        say(f"Passed over: {line}")
    if into_base is not None:
        from fedex_lora.merge.base import merge_into_base

        written = merge_into_base(plan, into_base, out, limit, tolerance, to, base_quantised)
        say(f"Written: {out}")
        _show_model(out, written)
        return
    options = Options(limit, tolerance, to or torch.float32, compare=report, tight=tight)
    merged = merge_adapters(plan, out, options)
    say(f"Written: {out}")
    _show_adapter(merged, report)


def _weights(text: str | None) -> list[float] | None:
    if text is None:
        return None
    try:  # an empty one, as of a shell's empty variable, is none: the others would move up
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise RecipeError(f"--weights: {text!r} are no numbers; expected e.g. 3,1,1") from None


def _show_adapter(merged: Merged, report: bool) -> None:
    from fedex_lora.merge.write import REPORT, share

    ranks = sorted({layer.rank for layer in merged.layers.values()})
    shown = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
    padded = f"; all are padded to {merged.rank}" if len(ranks) > 1 and merged.rank else ""
    say(f"Rank: {shown}, of {len(merged.layers)} layers{padded}")
    for what, get in (
        ("Cut off", lambda layer: layer.missed),
        ("Rounded off", lambda layer: layer.rounding),
        ("Averaging the factors would miss", lambda layer: layer.averaging),
    ):
        shares = {n: share(get(layer) or 0.0, layer.norm) for n, layer in merged.layers.items()}
        worst = max(shares, key=lambda name: shares[name])
        if shares[worst]:
            total = merged.relative(get)
            say(
                f"{what}: {total:.3g} of the update in total, at most {shares[worst]:.3g} ({worst})"
            )
    if report:
        show_table(console, ["layer", "rank", "cut off", "rounded off", "averaging"], _rows(merged))
    for note in merged.notes:
        say(f"Note: {note}")
    say(f"By layer: {merged.path / REPORT}")
    say("In Python:\nfrom peft import PeftModel")
    say(f"PeftModel.from_pretrained(base, {str(merged.path)!r})")


def _rows(merged: Merged) -> list[list[str]]:
    from fedex_lora.merge.write import share

    return [
        [
            name,
            str(layer.rank),
            *(
                "-" if part is None else f"{share(part, layer.norm):.3g}"
                for part in (layer.missed, layer.rounding, layer.averaging)
            ),
        ]
        for name, layer in merged.layers.items()
    ]


def _show_model(out: Path, written: Any) -> None:
    say(f"Layers changed: {written.layers}")
    if written.missed:
        say(f"Cut off: {written.missed:.3g} of the update in total")
    if written.rounding:
        say(f"Rounding the changed weights to the model's dtype: {written.rounding:.3g} of them")
    for note in written.notes:
        say(f"Note: {note}")
    say(
        f"In Python:\nfrom transformers import {written.auto_model}\n"
        f"{written.auto_model}.from_pretrained({str(out)!r}, dtype='auto')"
    )


@app.command(name="extract")
def extract_command(
    base: Annotated[str, typer.Argument(help="The model before: a folder or hub id.")],
    tuned: Annotated[str, typer.Argument(help="The same model after, tuned as a whole.")],
    out: Annotated[Path, typer.Option("--out", help="New directory to write.")],
    rank: Annotated[str, typer.Option(help="Of all layers, or auto with --error.")],
    error: RankError = None,
    embeddings: Annotated[
        bool,
        typer.Option("--embeddings/--no-embeddings", help="Save embeddings that changed, whole."),
    ] = True,
) -> None:
    """Write a PEFT adapter that makes one model of the other, as well as its rank can."""
    limit, tolerance = rank_option(rank, error)
    if limit is None and not tolerance:
        raise RecipeError("--rank: expected a number, or auto with --error")
    from fedex_lora.merge.extract import extract
    from fedex_lora.merge.opening import model_folder
    from fedex_lora.model.config import published
    from fedex_lora.model.load import quiet

    before, after, name = model_folder(base), model_folder(tuned), published(base)
    with quiet():
        done = extract(before, after, out, limit, tolerance, embeddings=embeddings, base_name=name)
    say(f"Written: {done.path}, rank {done.rank}")
    worst = max(done.errors, key=lambda layer: done.errors[layer])
    say(
        f"Relative error of the change: {done.error:.3g} in total, at most "
        f"{done.errors[worst]:.3g} in a layer ({worst})"
    )
    if done.whole:
        say(f"Saved whole: {', '.join(done.whole)}")
    if done.vocabulary is not None:
        say(
            f"Note: the vocabulary is another; model.resize_token_embeddings({done.vocabulary}) "
            "before the adapter is loaded"
        )
    if done.left_out:
        largest = max(done.left_out, key=lambda key: done.left_out[key])
        say(
            f"Note: {len(done.left_out)} tensors changed that no adapter holds, and are left out; "
            f"most changed {largest}, by {done.left_out[largest]:.3g}"
        )
