"""Several methods and seeds on one recipe, and the table that compares them."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from fedex_lora.aggregation.methods import METHODS, get_method
from fedex_lora.disk import write_atomic
from fedex_lora.errors import RecipeError, number, size
from fedex_lora.experiments.alike import in_common, settled
from fedex_lora.experiments.analysis.scores import judged, scores_by_split
from fedex_lora.experiments.analysis.statistics import Estimate, estimate, spread
from fedex_lora.experiments.analysis.study import is_exact_average
from fedex_lora.experiments.once import FOLDER, Once
from fedex_lora.recipe import MethodSpec, Recipe
from fedex_lora.runs.here import by_kind
from fedex_lora.runs.run import resume_run, start_run
from fedex_lora.runs.rundir import RunDir
from fedex_lora.runs.watch import Watcher

Results = dict[str, list[dict[str, Any]]]  # by method, a result a seed


def variant(recipe: Recipe, method: str, seed: int) -> Recipe:
    """The recipe with another method and seed.

    Args:
        method: A name of the table; a truncated residual's rank follows a colon: `fedex-svd:8`.

    Raises:
        UserError: The method is unknown, or does not go with the recipe.
    """
    name, colon, rank = method.partition(":")
    truncated = get_method(name).residual == "truncated"
    if colon and not (truncated and rank.isdecimal()):
        raise RecipeError(f"`methods`: {method}: only a truncated residual has a rank: fedex-svd:8")
    spec = recipe.method
    if name != spec.name or rank:
        if truncated and not rank:
            raise RecipeError(f"`methods`: {name} needs the rank to truncate to, e.g. {name}:8")
        spec = MethodSpec(name=name, rank=int(rank)) if rank else MethodSpec(name=name)
    raw = {**recipe.model_dump(exclude_unset=True), "seed": seed}
    raw["method"] = spec.model_dump(exclude_unset=True)
    try:
        return Recipe.model_validate(raw)
    except ValidationError as error:
        reasons = "; ".join(e["msg"] for e in error.errors())
        raise RecipeError(f"`methods`: {method} does not go with this recipe: {reasons}") from None


def compare(
    recipe: Recipe,
    methods: Sequence[str],
    seeds: Sequence[int],
    out: Path,
    watcher_for: Callable[[str, int], Watcher],
    train_once: bool = False,
) -> Results:
    """Runs every method with every seed; what is finished is not run again, what was begun resumes.

    Writes comparison.json and comparison.md into `out`. What `engine` leaves to be measured
    ("auto") is measured for the first run and holds for all; what not all can have, none has.

    Args:
        train_once: Whether methods take over each other's first round (`Once`): the same bits, and
            seconds that leave out what was taken over. It is kept in `out`, also for further
            methods later.
    """
    if not methods:
        raise RecipeError(f"`methods`: expected one or more of {', '.join(METHODS)}")
    variants = {(m, s): variant(recipe, m, s) for m in methods for s in seeds}
    known = RunDir(out).comparison()
    results: Results = {m: known.get(m, []) for m in dict.fromkeys([*known, *methods])}
    assemble = Once(out / FOLDER) if train_once else by_kind
    paths = {v: out / f"{v[0].replace(':', '-')}-seed{v[1]}" for v in variants}
    begun = any(RunDir(path).is_run() for path in paths.values())
    engine = {} if begun else in_common([*variants.values()])  # in place of "auto"
    for method, seed in sorted(variants, key=lambda v: seeds.index(v[1])):
        asked, path, watcher = (
            variants[method, seed],
            paths[method, seed],
            watcher_for(method, seed),
        )
        one = asked.with_engine(**settled(asked, engine))
        if RunDir(path).is_run():
            result = resume_run(path, one, watcher, assemble)
        else:
            result = start_run(one, path, watcher, assemble)
        named = RunDir(path).recipe()
        engine |= {"precision": named.engine.precision}
        engine |= {"fuse": named.engine.fuse} if asked.fused > 1 else {}
        others = [r for r in results[method] if r["seed"] != seed]
        results[method] = sorted([*others, result], key=lambda r: r["seed"])
        save_results(out, results)
    return results


def save_results(out: Path, results: Results) -> None:
    """Writes comparison.json and comparison.md."""
    write_atomic(out / "comparison.json", json.dumps(results, indent=1).encode())
    write_atomic(out / "comparison.md", markdown(results).encode())


def table(results: Results) -> tuple[list[str], list[list[str]]]:
    """Header and rows: scores at the best round by split, deviation, bytes, seconds."""
    done = {m: r for m, r in results.items() if r}
    splits = list(dict.fromkeys(s for r in done.values() for s in scores_by_split(r[0])))
    metric = next(iter(done.values()))[0]["metric"]
    header = ["method", *(f"{s} {metric}" for s in splits)]
    header += ["deviation", "up", "down", "seconds"]
    rows = []
    for method, runs in done.items():
        row = [method]
        row += [spread([scores_by_split(r).get(s, {}).get(metric) for r in runs]) for s in splits]
        deviations = [r["deviation"] for r in runs if r["deviation"] is not None]
        row.append(spread(deviations) if deviations else "-")
        row += [size(statistics.mean(r[k] for r in runs)) for k in ("bytes_up", "bytes_down")]
        row.append(f"{statistics.mean(r['seconds'] for r in runs):.0f}")
        rows.append(row)
    return header, rows


def client_table(results: Results) -> tuple[list[str], list[list[str]]] | None:
    """Each client's score on its own rows, by method; None if clients were not evaluated."""
    done = {m: r for m, r in results.items() if r and "client_scores" in r[0]["best"]}
    if not done:
        return None
    metric = next(iter(done.values()))[0]["metric"]
    clients = list(next(iter(done.values()))[0]["best"]["client_scores"])
    rows = [
        [
            c,
            *(
                spread([r["best"]["client_scores"][c][metric] for r in runs])
                for runs in done.values()
            ),
        ]
        for c in clients
    ]
    return [f"{metric} on the rows of", *done], rows


def difference_table(results: Results) -> tuple[list[str], list[list[str]]] | None:
    """Each method's paired difference from the exact one (else the first), by seed, on the last
    split; None where no two runs have a seed in common, or there is one seed."""
    found = [m for m, runs in results.items() if runs]
    exact = (m for m in found if is_exact_average(METHODS[results[m][0]["method"]]))
    reference = next(exact, found[0])
    rows = []
    for method in found:
        e = against(results, method, reference)
        if method == reference or e is None or e.seeds < 2:
            continue
        told = {1: "higher", -1: "lower", 0: "none seen"}[e.sign]
        edges = " to ".join(number(edge, 3) for edge in e.interval) if e.interval else "-"
        rows.append([method, str(e.seeds), number(e.mean, 3, sign=True), edges, told])
    best = next(r for runs in results.values() for r in runs)
    split = [*scores_by_split(best)][-1]
    what = " ".join([split, best["metric"], "against", reference])
    return ([what, "seeds", "difference", "95 % interval", ""], rows) if rows else None


def against(results: Results, method: str, other: str) -> Estimate | None:
    """How much higher `method` scores than `other`, paired by seed; None without pairs."""
    one, two = ({r["seed"]: judged(r) for r in results.get(m, [])} for m in (method, other))
    pairs = [(one[seed], two.get(seed)) for seed in one]
    differences = [a - b for a, b in pairs if a is not None and b is not None]
    return estimate({"": differences}) if differences else None


def markdown(results: Results) -> str:
    """The tables in Markdown."""
    every = (table(results), difference_table(results), client_table(results))
    tables = [t for t in every if t is not None]
    return "\n".join(markdown_table(*t) for t in tables)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """One table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
