"""Commands that use a finished model."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from fedex_lora.cli.common import Client, Round, Sets, ShowRows, app, phase, say, which_round
from fedex_lora.cli.evaluate import Task, What
from fedex_lora.errors import RecipeError

if TYPE_CHECKING:
    from fedex_lora.runs.service.chat import Chat

NewTokens = Annotated[
    int | None, typer.Option("--max-new-tokens", min=1, help="Of a generated text.")
]


@app.command(name="predict")
def predict_command(
    what: What,
    data: Annotated[Path, typer.Option(help="A file of rows (or a folder of images); no labels.")],
    out: Annotated[Path, typer.Option("--out", help="A new .jsonl, .json, .csv or .parquet file.")],
    task: Task = None,
    set: Sets = [],  # noqa: B006
    round: Round = "best",
    client: Client = None,
    max_new_tokens: NewTokens = None,
    show_rows: ShowRows = False,
) -> None:
    """Write the rows of a file with a model's predictions: classes, numbers or texts."""
    phase.info("loading libraries")
    from fedex_lora.cli.asked import asked
    from fedex_lora.engines.setup import recipe_task, surroundings
    from fedex_lora.runs.evaluation import load_subject
    from fedex_lora.runs.service.predict import check_out, predict, read_rows, write_rows

    check_out(out)
    recipe = asked(what, task, str(data), set)
    rows = read_rows(data, recipe_task(recipe))
    with surroundings(recipe):
        subject = load_subject(what, recipe, which_round(round), client)
        found, without = predict(subject, recipe, rows, max_new_tokens)
    write_rows(found, out)
    for note in subject.notes:
        say(f"Note: {note}")
    if without:
        say(f"Note: {without} of {len(found)} rows have none: too long, or with nothing to ask")
    say(f"{subject.name}: {len(found) - without} predictions in {out}")


@app.command(name="chat")
def chat_command(
    what: What,
    prompt: Annotated[str | None, typer.Option(help="Print the answer to this, and end.")] = None,
    system: Annotated[str | None, typer.Option(help="What the conversation begins with.")] = None,
    set: Sets = [],  # noqa: B006
    round: Round = "best",
    client: Client = None,
    max_new_tokens: NewTokens = 256,
) -> None:
    """Talk to a language model: a run's, an adapter's, or any; greedy, so answers repeat.

    Without --prompt every line of the input is one; /reset forgets what was said, /exit ends.
    """
    phase.info("loading libraries")
    from fedex_lora.cli.asked import asked
    from fedex_lora.engines.setup import surroundings
    from fedex_lora.runs.evaluation import kind_of, load_subject
    from fedex_lora.runs.service.chat import Chat

    # a model alone says nothing of a task, and no rows are read
    alone = kind_of(what) != "run"
    recipe = asked(what, "causal-lm" if alone else None, "." if alone else None, set)
    with surroundings(recipe):
        subject = load_subject(what, recipe, which_round(round), client)
        for note in subject.notes:
            say(f"Note: {note}")
        chat = Chat(subject, recipe, system, max_new_tokens or 256)
        if prompt is not None:
            if not prompt.strip():
                raise RecipeError("--prompt: is empty")
            print(chat.say(prompt))
            return
        if sys.stdin.isatty():
            kept = "goes on" if chat.template else "has no chat template: each prompt by itself"
            say(f"{subject.name} {kept}; /reset, /exit")
        _converse(chat)


def _converse(chat: Chat) -> None:
    """Line by line, until there are no more."""
    while True:
        try:
            text = input("> " if sys.stdin.isatty() else "").strip()
        except (EOFError, KeyboardInterrupt):
            return
        if text == "/exit":
            return
        if text == "/reset":
            chat.reset()
        elif text:
            print(chat.say(text), flush=True)


@app.command(name="push")
def push_command(
    what: Annotated[Path, typer.Argument(help="A run, or the folder of an export or a merge.")],
    repo: Annotated[str, typer.Argument(help="ORGANISATION/NAME at the hub.")],
    as_: Annotated[Literal["adapter", "model"], typer.Option("--as", help="Of a run.")] = "adapter",
    public: Annotated[bool, typer.Option("--public", help="A new repository for all.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List what would be sent.")] = False,
    message: Annotated[str, typer.Option(help="Of the commit.")] = "Upload by fedex-lora",
    round: Round = "best",
    client: Client = None,
) -> None:
    """Send an adapter or a merged model, with its card, to the hub; a new repository is private.

    Nothing is sent with --dry-run, offline, or without a token: what would be is listed.
    """
    phase.info("loading libraries")
    from fedex_lora.errors import size
    from fedex_lora.runs.service.push import parcel, send, unable

    folder = what
    if (what / "recipe.yaml").is_file():
        folder = _exported(what, as_, round, client)
    goods, why = parcel(folder, repo), unable()
    for name, count in goods.files.items():
        say(f"  {name}  {size(count)}")
    if goods.left_out:
        say(f"Not of the {folder.name}, so not sent: {', '.join(goods.left_out)}")
    total = f"{len(goods.files)} files, {size(sum(goods.files.values()))}, from {folder}"
    if dry_run or why:
        because = "" if dry_run else f" ({why})"
        say(f"Nothing is sent{because}. To {repo} would go: {total}")
        return
    say(f"Sent {total}, to {send(goods, not public, message)}")


def _exported(run: Path, as_: Literal["adapter", "model"], round: str, client: str | None) -> Path:
    """The run's export; made where it is not there yet."""
    from fedex_lora.runs.export import default_name, export_adapter, export_model, is_export
    from fedex_lora.runs.reopened import open_run

    settled = round == "best" and (run / "results.json").is_file() and client is None
    if settled and is_export(run / "final" / as_):
        return run / "final" / as_
    trained = open_run(run, which_round(round))
    version = None if settled else trained.state.version
    path = run / "final" / default_name(as_, None, None, client, version)
    if not is_export(path):
        (export_model if as_ == "model" else export_adapter)(trained, path, client=client)
    return path


@app.command(name="gguf")
def gguf_command(
    what: Annotated[Path, typer.Argument(help="A run, or the folder of an adapter or a model.")],
    out: Annotated[Path, typer.Option("--out", help="A new .gguf file.")],
    as_: Annotated[Literal["adapter", "model"], typer.Option("--as", help="Of a run.")] = "adapter",
    base: Annotated[
        str | None, typer.Option(help="Of an adapter: its base model, if it names another.")
    ] = None,
    dtype: Annotated[
        Literal["f32", "f16", "bf16"] | None,
        typer.Option(help="f32 for adapters, bf16 for models by default."),
    ] = None,
    pre: Annotated[
        str | None, typer.Option(help="llama.cpp's name of how the tokenizer cuts texts.")
    ] = None,
    round: Round = "best",
    client: Client = None,
) -> None:
    """Write an adapter or a merged model for llama.cpp, and check every value."""
    phase.info("loading libraries")
    from fedex_lora.errors import check_installed
    from fedex_lora.runs.evaluation import kind_of, model_block

    check_installed("gguf", "GGUF")
    from fedex_lora.merge.llama_cpp.write import write_adapter, write_model

    run = kind_of(str(what)) == "run"
    folder = _exported(what, as_, round, client) if run else what
    if kind_of(str(folder)) == "adapter":
        name = base or model_block(str(folder)).get("name", "")
        done, how = write_adapter(folder, out, name, dtype or "f32"), f"--lora {out}"
    elif base:
        raise RecipeError("--base: is of an adapter; this is a model")
    else:
        done, how = write_model(folder, out, dtype or "bf16", pre), f"-m {out}"
    rounded = f", rounded by {done.rounding:.2g} (relative)" if done.rounding else ""
    say(f"{done.path}: {done.tensors} tensors, read back and equal{rounded}")
    say(f"llama.cpp: llama-cli {how}")
