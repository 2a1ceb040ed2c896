"""The command that writes a first recipe for one's own files."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from fedex_lora.cli.common import app, complain, phase, say
from fedex_lora.errors import DataError, RecipeError, StorageError, UserError, did_you_mean, some

T = TypeVar("T")
_HUB = re.compile(r"[\w.-]+(/[\w.-]+)?")


@app.command()
def new(
    recipe: Annotated[Path, typer.Argument(help="The file to write, e.g. my.yaml.")],
    model: Annotated[str | None, typer.Option(help="Hub id or local path.")] = None,
    task: Annotated[str | None, typer.Option(help="What is learned, e.g. causal-lm.")] = None,
    data: Annotated[
        list[Path] | None,
        typer.Option(help="A client's file; repeat it. Or one directory, to be dealt out."),
    ] = None,
    method: Annotated[str | None, typer.Option(help="As `fedex-lora methods` lists them.")] = None,
    evaluation: Annotated[
        Path | None, typer.Option(help="Directory with validation rows; else clients score.")
    ] = None,
    set: Annotated[
        list[str], typer.Option("--set", help="A key of the task: task.text_column=review.")
    ] = [],  # noqa: B006
) -> None:
    """Write a commented recipe for your own files; what no option says is asked."""
    if recipe.suffix.lower() not in (".yaml", ".yml"):
        raise RecipeError(f"{recipe}: expected the name of a recipe, e.g. {recipe}.yaml")
    if recipe.exists():
        raise StorageError(f"{recipe}: exists already and stays as it is; name a new file")
    if not recipe.parent.is_dir():
        raise StorageError(f"{recipe}: there is no folder {recipe.parent}")
    chosen = _answer("--model", model, "Model, a hub id or local path", _model)
    kind = _answer("--task", task, "Task", _kind, "text-classification")
    phase.info("loading libraries")
    given = " ".join(map(str, data)) if data else None
    files = _answer(
        "--data", given, "Files, one for each client, with spaces between", _files(data)
    )
    if evaluation is not None and not evaluation.is_dir():
        raise StorageError(f"--evaluation: {evaluation} is no directory")
    how = _answer("--method", method, "Method", _method, "fedex", needed=False)

    from fedex_lora.recipe.reader import load_recipe
    from fedex_lora.runs.first_recipe import commented, first_recipe

    block = _task(kind, files, set)
    values = first_recipe(recipe.stem, chosen, block, how, files, evaluation)
    text = commented(
        values, f"Written by fedex-lora new. What a run takes: fedex-lora plan {recipe}"
    )
    try:
        with recipe.open("x", encoding="utf-8") as opened:
            opened.write(text)
    except OSError as error:
        raise StorageError(f"{recipe}: cannot be written: {error.strerror}") from error
    try:
        load_recipe(recipe)
    except UserError:
        recipe.unlink()
        raise
    say(f"Written: {recipe}\nNext: fedex-lora plan {recipe}, then fedex-lora run {recipe}")


def _answer(
    option: str,
    given: str | None,
    question: str,
    read: Callable[[str], T],
    default: str = "",
    needed: bool = True,
) -> T:
    """What an option says, or else what somebody answers, who is asked again after a mistake.

    Args:
        needed: Whether somebody has to answer; else the default is taken where there is nobody.

    Raises:
        UserError: The option is wrong, or nobody answers.
    """
    if given is not None:
        return read(given)
    while True:
        try:
            text = typer.prompt(question, default=default or None)
        except typer.Abort:
            if not needed and not sys.stdin.isatty():
                say(default)
                return read(default)
            raise RecipeError(f"{option}: missing, and nobody answers") from None
        try:
            return read(text)
        except UserError as error:
            complain(str(error))


def _model(text: str) -> str:
    path = Path(text).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise DataError(f"--model: {text} has no config.json, so it holds no model")
        return str(path)
    if not text.startswith("package:") and not _HUB.fullmatch(text):
        raise RecipeError(f"--model: {text!r} is no directory, and no hub id (OWNER/NAME)")
    return text


def _kind(text: str) -> str:
    from fedex_lora.recipe import task_kinds

    if text not in task_kinds():
        near = did_you_mean(text, task_kinds())
        raise RecipeError(f"--task: expected one of {', '.join(task_kinds())}, got {text!r}{near}")
    return text


def _method(text: str) -> str:
    from fedex_lora.aggregation.methods import get_method

    try:
        get_method(text)
    except UserError as error:
        raise RecipeError(f"--method: {str(error).removeprefix('method.name: ')}") from None
    return text


def _files(options: list[Path] | None) -> Callable[[str], list[Path]]:
    """Reads the files of an answer, or those of the options as they are."""

    def read_files(text: str) -> list[Path]:
        from fedex_lora.data.read import read

        files = options or [Path(part).expanduser() for part in text.split()]
        if len(files) == 1 and files[0].is_dir():
            return files
        for file in files:
            try:
                read(file)
            except UserError as error:
                raise type(error)(f"--data: {error}") from error
        names = {file.stem.casefold() for file in files}
        if len(files) < 2 or len(names) < len(files):
            raise RecipeError(
                "--data: expected two or more files of different names, one for each client, or "
                "one directory"
            )
        return files

    return read_files


def _task(kind: str, files: list[Path], sets: list[str]) -> dict[str, Any]:
    """The block of the task: from its options, from the columns of the rows, or by asking."""
    import yaml

    from fedex_lora.data.read import read
    from fedex_lora.recipe import spec_of
    from fedex_lora.recipe.meanings import MEANINGS
    from fedex_lora.runs.first_recipe import form_of, labels_of, task_fields

    spec, block = spec_of(kind), dict[str, Any](kind=kind)
    assert spec is not None
    for text in sets:
        key, equals, value = text.partition("=")
        name = key.removeprefix("task.")
        if not equals or name == key or name not in spec.model_fields or name == "kind":
            known = ", ".join(f"task.{field}" for field in spec.model_fields if field != "kind")
            raise RecipeError(f"--set {text}: expected KEY=VALUE with one of {known}")
        # braces of a prompt are no mapping
        block[name] = value if spec.model_fields[name].annotation is str else yaml.safe_load(value)
    sample = [_train_file(files[0])] if files[0].is_dir() else files
    columns = read(sample[0]).column_names
    for field, guess in task_fields(spec, columns):
        if field not in block:
            what = f"task.{field} ({MEANINGS.get(f'task.{field}', ('', ''))[1]}"
            what += f" The rows have {some(columns)})"
            block[field] = _answer(f"--set task.{field}=...", None, what, str, guess)
    if "labels" in spec.model_fields and "labels" not in block:
        form = form_of(spec, columns)
        column = form[-1] if form else "label_column"
        name = block.get(column, spec.model_fields[column].default)
        block["labels"] = labels_of(sample, name, bool(form))
    fields = {key: f.default for key, f in spec.model_fields.items() if key.endswith("_column")}
    unread = [name for name in columns if name not in (fields | block).values()]
    if unread and "text_pair_column" in fields.keys() - block.keys():
        say(f"Not read: {some(unread)}. A second text is named by task.text_pair_column")
    return block


def _train_file(folder: Path) -> Path:
    from fedex_lora.data.read import SUFFIXES

    found = [file for s in SUFFIXES if (file := folder / f"train{s}").is_file()]
    if not found:
        raise DataError(f"--data: {folder} has no file train ({', '.join(SUFFIXES)})")
    return found[0]
