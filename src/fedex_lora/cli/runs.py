"""Commands that run recipes and read what runs left."""

from __future__ import annotations

import shlex
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from fedex_lora.cli.common import (
    Address,
    Client,
    Out,
    RankError,
    RecipeFile,
    Round,
    RunPath,
    Sets,
    ShowRows,
    announce,
    app,
    comma_separated,
    console,
    displays,
    phase,
    rank_option,
    read_recipe,
    runs_folder,
    say,
    this_command,
    which_round,
    whole_number,
)
from fedex_lora.cli.display import show_table
from fedex_lora.cli.json_lines import LogJson, emit
from fedex_lora.errors import RecipeError, check_installed, number

if TYPE_CHECKING:
    from fedex_lora.aggregation.methods import Method
    from fedex_lora.experiments.compare import Results
    from fedex_lora.recipe import Recipe
    from fedex_lora.runs.export import Exported
    from fedex_lora.runs.watch import Watcher

Deployment = Annotated[
    Path, typer.Option(help="Engine flower: the folder that `deploy init` made.")
]


@app.command()
def run(
    recipe: RecipeFile,
    set: Sets = [],  # noqa: B006
    out: Out = None,
    resume: bool = False,
    engine: Annotated[
        str | None,
        typer.Option(help="As engine.kind: local, flower, flower-simulation, ..."),
    ] = None,
    deployment: Deployment = Path("deployment"),
    first_rounds: Annotated[
        Path | None,
        typer.Option(help="A folder by which runs take over each other's first round of training."),
    ] = None,
    monitor: Address = None,
    log_json: LogJson = False,
    show_rows: ShowRows = False,
) -> None:
    """Run a recipe in a new directory (or continue it there with --resume)."""
    sets = [*set, *([f"engine.kind={engine}"] if engine else [])]
    spec = read_recipe(recipe, sets, announce)
    path = out or runs_folder(f"{spec.name}-{spec.method.name}-seed{spec.seed}")
    _run(spec, path, resume, deployment, monitor, first_rounds)


@app.command()
def resume(
    run: RunPath,
    deployment: Deployment = Path("deployment"),
    round: Annotated[
        int | None, typer.Option(min=1, help="Go back to this round; the later ones are set aside.")
    ] = None,
    rounds: Annotated[
        int | None, typer.Option(min=1, help="Of a finished run: so many rounds more.")
    ] = None,
    monitor: Address = None,
    log_json: LogJson = False,
    show_rows: ShowRows = False,
) -> None:
    """Continue a run after its last finished round."""
    say(f"{run}: going on after its last finished round")
    phase.info("loading libraries")
    from fedex_lora.runs.rundir import BY_HAND, RunDir

    if rounds is not None:
        if round is not None:
            raise RecipeError("--rounds: goes on after the last round; leave --round out")
        from fedex_lora.runs.extend import extend

        say(f"{run}: now of {extend(RunDir(run), rounds)} rounds")
        if (run / BY_HAND).is_file():
            say(f"They are carried by hand: fedex-lora round open {shlex.quote(str(run))}")
            return
    if round is not None:
        say(f"What came after round {round} lies in {RunDir(run).go_back(round)}")
    _run(RunDir(run).recipe(), run, True, deployment, monitor)


def _run(
    spec: Recipe,
    path: Path,
    resume: bool,
    deployment: Path,
    monitor: str | None,
    first_rounds: Path | None = None,
) -> None:
    """With the engine that the recipe names."""
    from fedex_lora.runs.here import by_kind
    from fedex_lora.runs.run import resume_run, start_run
    from fedex_lora.runs.rundir import RunDir

    def go_on() -> str:
        if not RunDir(path).is_run():
            return this_command()
        where = ["--deployment", str(deployment)] if spec.engine.kind == "flower" else []
        return shlex.join(["fedex-lora", "resume", str(path), *where])

    assemble = by_kind
    if first_rounds is not None:
        if spec.engine.kind != "local":
            raise RecipeError("--first-rounds: only runs with engine.kind=local share trainings")
        from fedex_lora.experiments.once import Once

        assemble = Once(first_rounds)
    with displays(go_on) as show, ExitStack() as stack:
        shown: Watcher = show("")
        if monitor is not None:
            check_installed("prometheus_client", "--monitor")
            from fedex_lora.runs.monitor import monitored

            shown = stack.enter_context(monitored(shown, monitor))
        if spec.engine.kind == "flower":
            from fedex_lora.flower.deploy.launch import launch

            results = launch(spec, path, deployment, resume, shown)
        elif spec.engine.kind == "flower-simulation":
            from fedex_lora.flower.deploy.launch import simulate

            results = simulate(spec, path, resume, shown)
        elif resume:
            results = resume_run(path, spec, shown, assemble)
        else:
            results = start_run(spec, path, shown, assemble)
    show_results(path, results)


@app.command(name="compare")
def compare_command(
    recipe: RecipeFile,
    methods: Annotated[str, typer.Option(help="Comma-separated.")] = "fedit,ffa,fedex",
    seeds: Annotated[str, typer.Option(help="Comma-separated.")] = "",
    set: Sets = [],  # noqa: B006
    out: Out = None,
    export: Annotated[bool, typer.Option(help="Write a merged model too.")] = False,
    train_once: Annotated[
        bool, typer.Option("--train-once", help="Methods share the first round's training.")
    ] = False,
    show_rows: ShowRows = False,
) -> None:
    """Run several methods (and seeds) on one recipe and print the table."""
    spec = read_recipe(recipe, set, announce)
    from fedex_lora.aggregation.methods import METHODS
    from fedex_lora.experiments.compare import compare
    from fedex_lora.runs.export import export_model
    from fedex_lora.runs.reopened import open_run

    path = out or runs_folder(f"{spec.name}-comparison")
    numbers = [whole_number(s, "--seeds") for s in comma_separated(seeds)] or [spec.seed]
    with displays(this_command) as show:
        results = compare(
            spec,
            comma_separated(methods),
            numbers,
            path,
            lambda method, _: show(method),
            train_once,
        )
    show_comparison(results, path, train_once)
    chosen = {name: METHODS[name.partition(":")[0]] for name in comma_separated(methods)}
    exact = (name for name, method in chosen.items() if _exact_for_all(method))
    offered = next(exact, next(iter(chosen)))
    if not chosen[offered].personal:
        best = path / f"{offered.replace(':', '-')}-seed{numbers[0]}"
        if export and not (best / "final" / "model").exists():
            export_model(open_run(best), best / "final" / "model")
        _offer(best)


def show_comparison(results: Results, path: Path, once: bool = False) -> None:
    """The tables, and where they lie; `once`: whether methods shared trainings."""
    from fedex_lora.experiments.compare import client_table, difference_table, table

    for one in (table(results), difference_table(results), client_table(results)):
        if one is not None:
            show_table(console, *one)
    if once:
        say("seconds: a training that methods share is counted for the first of them alone")
    say(f"The same as JSON and Markdown: {path}/comparison.json, comparison.md")


def _exact_for_all(method: Method) -> bool:
    """Whether the method federates one model that is the exact mean and keeps its factors."""
    exact = method.residual == "exact" and method.averages
    return exact and method.exchanges and not method.pooled


@app.command()
def export(
    run: RunPath,
    as_: Annotated[Literal["model", "adapter"], typer.Option("--as")] = "adapter",
    rank: Annotated[
        str, typer.Option(help="Best adapter of this rank, or auto with --error.")
    ] = "",
    error: RankError = None,
    tight: Annotated[
        bool,
        typer.Option("--tight", help="Every layer at its own rank: smaller, not for all readers."),
    ] = False,
    base_name: Annotated[
        str | None, typer.Option(help="Hub id that the adapter names as its base.")
    ] = None,
    dtype: Annotated[Literal["base", "float32"], typer.Option(help="Of a merged model.")] = "base",
    round: Round = "best",
    client: Client = None,
    out: Out = None,
) -> None:
    """Write a run's model as a merged model or as a PEFT adapter."""
    import torch

    from fedex_lora.runs.export import (
        Exported,
        default_name,
        export_adapter,
        export_model,
        is_export,
    )
    from fedex_lora.runs.reopened import open_run

    limit, tolerance = rank_option(rank, error)
    for option, given in (("rank", rank), ("tight", tight), ("base-name", base_name)):
        if as_ == "model" and given:
            raise RecipeError(f"--{option}: is about an adapter; use --as adapter or leave it out")
    trained = open_run(run, which_round(round))
    to = torch.float32 if as_ == "model" and dtype == "float32" else None
    # before a run is finished its best round may become another one
    settled = round == "best" and (run / "results.json").is_file()
    version = None if settled else trained.state.version
    name = default_name(as_, limit, to, client, version, tolerance, tight)
    path = out or run / "final" / name
    if out is None and is_export(path):
        say(f"Already there: {path}")
        exported = Exported(path, notes=trained.notes)
    else:
        if as_ == "model":
            exported = export_model(trained, path, to, client)
        else:
            exported = export_adapter(
                trained,
                path,
                limit,
                client,
                error=tolerance,
                tight=tight,
                base_name=base_name,
            )
        say(f"Written: {path}")
    show_export(exported, trained.recipe)


def show_results(path: Path, results: dict) -> None:
    if emit("finished", run=str(path), **results):
        return
    rows = [
        [which, split, *(f"{k} {number(v)}" for k, v in scores.items())]
        for which in ("best", "last")
        for split, scores in results[which]["scores"].items()
    ]
    score, own = results["best"].get("score"), "" if rows else f", {results['metric']}"
    own += "" if rows else f" {number(score)} on the clients' own rows"
    say(f"Best round {results['best_round']} of {results['rounds']}{own}.")
    if rows:
        show_table(console, ["round", "split", *[""] * (len(rows[0]) - 2)], rows)
    _offer(path)


def _offer(path: Path) -> None:
    from fedex_lora.runs.card import loading_lines
    from fedex_lora.runs.export import is_export
    from fedex_lora.runs.rundir import RunDir

    final, recipe = path / "final", RunDir(path).recipe()
    say(f"Run:     {path}")
    for what in ("adapter", "model"):
        if is_export(final / what):
            say(f"{what.capitalize()}: {final / what}; in Python:")
            say("\n".join(loading_lines(recipe, final / what)))
    if not is_export(final / "model"):
        whose = " --client NAME" if recipe.method.chosen.personal else ""
        say(f"Merged model: fedex-lora export {shlex.quote(str(path))} --as model{whose}")


def show_export(exported: Exported, recipe: Recipe) -> None:
    from fedex_lora.runs.card import loading_lines

    if exported.rank is not None:
        say(f"Largest rank of a layer: {exported.rank}")
    if exported.error and exported.errors:
        worst = max(exported.errors, key=lambda name: exported.errors[name])  # type: ignore[index]
        say(
            f"Relative error of the change: {exported.error:.3g} in total, at most "
            f"{exported.errors[worst]:.3g} ({worst})"
        )
    for note in exported.notes:
        say(f"Note: {note}")
    say("In Python:\n" + "\n".join(loading_lines(recipe, exported.path)))
