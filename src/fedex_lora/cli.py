"""The command line. Whatever the user can mend is one short text and exit code 2."""

from __future__ import annotations

import logging
import shlex
import sys
from pathlib import Path
from typing import Annotated, Literal

import torch
import typer
from rich.console import Console

from fedex_lora import __version__
from fedex_lora.client import check_training
from fedex_lora.compare import client_table, compare, table
from fedex_lora.display import Display, show_table
from fedex_lora.engines.local import LocalEngine
from fedex_lora.errors import QuorumLost, UserError
from fedex_lora.export import Exported, export_adapter, export_model, open_run
from fedex_lora.methods import METHODS
from fedex_lora.recipe import Recipe
from fedex_lora.recipe_yaml import load_recipe_with_places
from fedex_lora.run import evaluate as evaluate_state
from fedex_lora.run import resume_run, start_run
from fedex_lora.rundir import RunDir
from fedex_lora.setup import recipe_task, set_up

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Federated LoRA: the global model is exactly the weighted mean of what clients learned.",
)
console = Console()
errors = Console(stderr=True, soft_wrap=True)

RecipeFile = Annotated[Path, typer.Argument(help="A recipe: a YAML file.")]
RunPath = Annotated[Path, typer.Argument(help="A run's directory.")]
Sets = Annotated[list[str], typer.Option("--set", help="Override a key: a.b=c. May be repeated.")]
Out = Annotated[Path | None, typer.Option("--out", help="Directory to write.")]
Round = Annotated[str, typer.Option("--round", help="best, last, or a round's number.")]
Client = Annotated[str | None, typer.Option(help="Whose model, where nothing is exchanged.")]


def _recipe(path: Path, sets: list[str]) -> Recipe:
    recipe, places = load_recipe_with_places(path, sets)
    check_training(recipe.training, places)
    return recipe


@app.command()
def run(recipe: RecipeFile, set: Sets = [], out: Out = None, resume: bool = False) -> None:  # noqa: B006
    """Run a recipe in a new directory (or continue it there with --resume)."""
    spec = _recipe(recipe, set)
    path = out or Path("runs") / f"{spec.name}-{spec.method.name}-seed{spec.seed}"
    display = Display(console)
    try:
        results = resume_run(path, spec, display) if resume else start_run(spec, path, display)
    finally:
        display.close()
    _show_results(path, results)


@app.command()
def resume(run: RunPath) -> None:
    """Continue a run after its last finished round."""
    display = Display(console)
    try:
        results = resume_run(run, None, display)
    finally:
        display.close()
    _show_results(run, results)


@app.command(name="compare")
def compare_command(
    recipe: RecipeFile,
    methods: Annotated[str, typer.Option(help="Comma-separated.")] = "fedit,ffa,fedex",
    seeds: Annotated[str, typer.Option(help="Comma-separated.")] = "",
    set: Sets = [],  # noqa: B006
    out: Out = None,
    export: Annotated[bool, typer.Option(help="Write a merged model too.")] = False,
) -> None:
    """Run several methods (and seeds) on one recipe and print the table."""
    spec = _recipe(recipe, set)
    path = out or Path("runs") / f"{spec.name}-comparison"
    displays: list[Display] = []

    def display(method: str, seed: int) -> Display:
        displays.append(Display(console, method))
        return displays[-1]

    try:
        numbers = [_int(s, "--seeds") for s in _split(seeds)] or [spec.seed]
        results = compare(spec, _split(methods), numbers, path, display)
    finally:
        for shown in displays:
            shown.close()
    for one in (table(results), client_table(results)):
        if one is not None:
            show_table(console, *one)
    _say(f"The same as JSON and Markdown: {path}/comparison.json, comparison.md")
    offered = "fedex" if "fedex" in results else next(iter(results))
    if METHODS[offered.partition(":")[0]].exchanges:
        best = path / f"{offered.replace(':', '-')}-seed{numbers[0]}"
        if export and not (best / "final" / "model").exists():
            export_model(open_run(best), best / "final" / "model")
        _offer(best)


@app.command()
def evaluate(run: RunPath, round: Round = "best", client: Client = None) -> None:
    """Score a run's model on all its evaluation splits."""
    trained = open_run(run, _which(round))
    federation = set_up(trained.recipe)
    engine = LocalEngine(federation.model, federation.task, {}, federation.settings, {})
    scores = evaluate_state(federation, engine, trained.state)
    rows = [[s, k, f"{v:.4f}"] for s, m in scores["scores"].items() for k, v in m.items()]
    for name, metrics in scores.get("client_scores", {}).items():
        rows += [[name, k, f"{v:.4f}"] for k, v in metrics.items()]
    _say(f"{run}, round {trained.state.version}")
    show_table(console, ["rows", "metric", "score"], rows)


@app.command()
def export(
    run: RunPath,
    as_: Annotated[Literal["model", "adapter"], typer.Option("--as")] = "adapter",
    rank: Annotated[int | None, typer.Option(min=1, help="Best adapter of this rank.")] = None,
    dtype: Annotated[Literal["base", "float32"], typer.Option(help="Of a merged model.")] = "base",
    round: Round = "best",
    client: Client = None,
    out: Out = None,
) -> None:
    """Write a run's model as a merged model or as a PEFT adapter."""
    trained = open_run(run, _which(round))
    path = out or run / "final" / as_
    if as_ == "model":
        exported = export_model(
            trained, path, torch.float32 if dtype == "float32" else None, client
        )
    else:
        exported = export_adapter(trained, path, rank, client)
    _show_export(exported, rank)


@app.command()
def methods() -> None:
    """List the methods: three choices each, and where they come from."""
    header = ["method", "trains", "assignment", "residual", "base", "ranks differ", "source"]
    rows = [
        [
            name,
            m.trains,
            m.assignment,
            m.residual,
            "shared" if m.shared_base else "per client",
            "yes" if m.ranks_may_differ else "no",
            m.source,
        ]
        for name, m in METHODS.items()
    ]
    show_table(console, header, rows)


@app.command()
def recipes(directory: Path = Path("recipes")) -> None:
    """List the recipes in a directory."""
    found = sorted(directory.rglob("*.yaml"))
    if not found:
        raise UserError(f"{directory}: no recipes (*.yaml) there; name a directory that has some")
    rows = []
    for file in found:
        spec = load_recipe_with_places(file)[0]
        rows.append(
            [str(file), spec.method.name, spec.task.name or spec.task.kind, spec.model.name]
        )
    show_table(console, ["recipe", "method", "task", "model"], rows)


@app.command()
def version() -> None:
    """Print the version."""
    typer.echo(__version__)


def _show_results(path: Path, results: dict) -> None:
    rows = [
        [which, split, *(f"{k} {v:.4f}" for k, v in scores.items())]
        for which in ("best", "last")
        for split, scores in results[which]["scores"].items()
    ]
    if rows:
        _say(f"Best round {results['best_round']} of {results['rounds']}.")
        show_table(console, ["round", "split", *[""] * (len(rows[0]) - 2)], rows)
    _offer(path)


def _offer(path: Path) -> None:
    quoted = shlex.quote(str(path))
    _say(f"Run:     {path}")
    if (path / "final" / "adapter").is_dir():
        _say(f"Adapter: {path}/final/adapter")
        _say(f'         peft.PeftModel.from_pretrained(base_model, "{path}/final/adapter")')
    if (path / "final" / "model").is_dir():
        _say(f"Model:   {path}/final/model")
        _say(f'         transformers.{_auto(path)}.from_pretrained("{path}/final/model")')
    else:
        _say(f"Merged model: fedex-lora export {quoted} --as model")


def _auto(path: Path) -> str:
    return recipe_task(RunDir(path).recipe()).auto_model


def _show_export(exported: Exported, rank: int | None) -> None:
    _say(f"Written: {exported.path}")
    if exported.rank is not None:
        _say(f"Largest rank of a layer: {exported.rank}")
    if rank is not None and exported.errors:
        worst = max(exported.errors, key=lambda site: exported.errors[site])  # type: ignore[index]
        _say(
            f"Relative error of the change: {exported.error:.3g} in total, at most "
            f"{exported.errors[worst]:.3g} ({worst})"
        )
    for note in exported.notes:
        _say(f"Note: {note}")


def _which(text: str) -> Literal["best", "last"] | int:
    if text in ("best", "last"):
        return text  # type: ignore[return-value]
    return _int(text, "--round")


def _int(text: str, option: str) -> int:
    if not text.strip().isdigit():
        raise UserError(f"{option}: {text!r} is no whole number")
    return int(text)


def _split(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _say(text: str) -> None:
    console.print(text, highlight=False, soft_wrap=True, markup=False)


def main() -> None:
    """Entry point: errors of the user become text on stderr and exit code 2."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    try:
        app()
    except QuorumLost as error:
        errors.print(f"[red]stopped[/]: {error}", highlight=False)
        errors.print("The last checkpoint is intact; `fedex-lora resume RUN` goes on.")
        sys.exit(2)
    except UserError as error:
        errors.print("[red]error[/]: ", end="")
        errors.print(str(error), highlight=False, markup=False)
        sys.exit(2)
    except KeyboardInterrupt:
        errors.print("interrupted; `fedex-lora resume RUN` goes on after the last finished round")
        sys.exit(130)
