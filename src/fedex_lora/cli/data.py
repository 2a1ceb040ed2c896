"""The command that shows rows as the model sees them."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedex_lora.cli.common import RecipeFile, Sets, ShowRows, app, console, read_recipe, say
from fedex_lora.errors import RecipeError, some

if TYPE_CHECKING:
    from datasets import Dataset

    from fedex_lora.tasks.base import Encode
    from fedex_lora.tasks.preview import Piece


@app.command(name="data")
def data_command(
    recipe: RecipeFile,
    show: Annotated[int, typer.Option(min=0, help="How many rows to print.")] = 3,
    client: Annotated[
        str | None, typer.Option(help="Whose rows, or which split's; the first client's if not.")
    ] = None,
    set: Sets = [],  # noqa: B006
    show_rows: ShowRows = False,
) -> None:
    """Print rows as the model sees them, and how many of all rows are left out, and why.

    What is learned stands between ⟦ and ⟧: the tokens that the loss is over, or the label.
    """
    from fedex_lora.data.counts import trained_on
    from fedex_lora.data.places import places
    from fedex_lora.engines.rows import load_rows
    from fedex_lora.engines.setup import recipe_task, surroundings
    from fedex_lora.model.load import load_processor
    from fedex_lora.tasks.base import placed
    from fedex_lora.tasks.preview import pieces

    spec = read_recipe(recipe, set)
    task = recipe_task(spec)
    with surroundings(spec):
        rows = load_rows(spec, task)
        parts = {**rows.train, **{f"{n}, held out": r for n, r in rows.validation.items()}}
        parts |= rows.evaluation
        shown = client or next(iter(parts))
        if shown not in parts:
            raise RecipeError(f"`client`: {shown!r} has no rows; these have: {some(parts)}")
        tokenizer = load_processor(spec.model, task.processor)
        scored = (task.encode_evaluation or task.encode, spec.task.evaluated_length)
        for name, part in parts.items():
            encode, length = (task.encode, spec.task.max_length) if name in rows.train else scored
            with placed(places(part, spec.data, task)):
                encoded, told = _encoded(encode, part, tokenizer, length)
            counts = trained_on({name: part}, {name: encoded})[name]
            say(f"{name}: {counts['rows']} rows, {counts['left_out']} left out")
            for line in told:
                say(f"  {line}")
            if name == shown:
                for i in range(min(show, len(encoded))):
                    console.rule(f"row {i + 1}", align="left", characters="-")
                    _print(pieces(task, encoded[i], tokenizer))
                if show:
                    console.rule(characters="-")


def _encoded(
    encode: Encode, part: Dataset, tokenizer: Any, length: int
) -> tuple[Dataset, list[str]]:
    from fedex_lora.data.read import quiet

    with quiet(), _heard() as told:
        return encode(part, tokenizer, length), told


@contextmanager
def _heard() -> Iterator[list[str]]:
    """What the program warns of, instead of its being printed at once."""
    logger, told = logging.getLogger("fedex_lora"), list[str]()
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: told.append(record.getMessage())
    propagates, logger.propagate = logger.propagate, False
    logger.addHandler(handler)
    try:
        yield told
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagates


def _print(found: list[Piece]) -> None:
    from rich.text import Text

    line = Text()
    for piece in found:
        if not piece.learned:
            line.append(piece.text)
            continue
        line.append("⟦" + piece.text, style="bold green")
        line.append((f" = {piece.label}" if piece.label else "") + "⟧", style="bold green")
    console.print(line, soft_wrap=True)
