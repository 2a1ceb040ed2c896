"""What a client of a federation across machines holds of a run: the model that it was given."""

from __future__ import annotations

from pathlib import Path

from fedex_lora.aggregation.methods import METHODS
from fedex_lora.engines.chosen import federation_settings
from fedex_lora.engines.remote.cache import Cache, Held
from fedex_lora.engines.setup import recipe_model, recipe_task, roster
from fedex_lora.errors import RecipeError, StorageError
from fedex_lora.federation.messages import flat
from fedex_lora.federation.state import ServerState, own_part
from fedex_lora.recipe import Recipe
from fedex_lora.runs.reopened import Trained


def open_held(folder: Path, recipe: Recipe, client: str, run: str = "") -> Trained:
    """The newest model that a client holds: the global one, or its own where there is none.

    Args:
        folder: The client's cache.
        recipe: By which it took part.
        run: The first digits of the run's number; by default the run it was last told of.

    Raises:
        UserError: It holds nothing of such a run, or the recipe is not the run's.
    """
    found = [path.parent for path in folder.glob(f"*/{client}/held.json")]
    fitting = [path for path in found if path.parent.name.startswith(run)]
    if not fitting:
        there = ", ".join(sorted(path.parent.name[:8] for path in found)) or "none"
        which = f"run {run}" if run else "any run"
        raise StorageError(
            f"{folder}: {client} holds nothing of {which}; runs that it has: {there}"
        )
    newest = max(fitting, key=lambda path: (path / "held.json").stat().st_mtime)
    held = Cache(newest).load()
    if held is None:
        raise StorageError(f"{newest}: damaged; a run that goes on sends it again")
    if held.version < 1:
        raise StorageError(f"{newest}: {client} holds the start of it alone; export after a round")
    model = recipe_model(recipe, recipe_task(recipe))
    settings = federation_settings(recipe, model, roster(recipe) or [client])
    given = held.adapter
    ranks = {n: s.rank for n, s in settings.layers_of(client).items()}
    pruned = settings.method.assignment.pruning is not None
    if different := _differences(held, ranks, pruned):
        raise RecipeError(
            f"not the recipe of run {newest.parent.name[:8]}: {different}; take the one that "
            "was agreed on"
        )
    state = ServerState(
        held.version,
        given.layers,
        given.head,
        held.ledger,
        {client: own_part(settings, flat(given))},
        ranks={client: max(f.rank for f in given.layers.values())} if pruned else {},
    )
    notes = [f"{client} holds the model after round {held.version} of {settings.rounds}"]
    if METHODS[recipe.method.name].assignment.ranks_may_differ and settings.ranks:
        notes.append("where ranks differ, it is as much of it as fits this client's rank")
    extra = {"record": {"clients": {}}, "clients": list(settings.clients), "holder": client}
    extra["description"] = "the institutions' own rows"
    return Trained(recipe, model, settings, state, extra, tuple(notes))


def _differences(held: Held, ranks: dict[str, int], pruned: bool) -> str:
    mine = {name: f.rank for name, f in held.adapter.layers.items()}
    if mine.keys() != ranks.keys():
        return "lora.target_modules"
    fits = all(mine[n] <= r if pruned else mine[n] == r for n, r in ranks.items())
    return "" if fits else "lora.r"
