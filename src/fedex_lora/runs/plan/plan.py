"""What a run will need, worked out before it starts: bytes, memory, disk and, if measured, time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import psutil

from fedex_lora.aggregation.methods import METHODS
from fedex_lora.data.partition import client_names
from fedex_lora.engines.chosen import federation_settings
from fedex_lora.engines.rows import load_rows
from fedex_lora.engines.setup import POOLED, architecture_of, recipe_task, roster, set_up
from fedex_lora.federation.settings import Settings
from fedex_lora.model.architectures import count
from fedex_lora.model.load import local_folder
from fedex_lora.recipe import EvaluationSpec, Recipe
from fedex_lora.runs import private
from fedex_lora.runs.plan.memory import Part, client_memory, server_memory
from fedex_lora.runs.plan.timing import Timing, measure
from fedex_lora.runs.plan.traffic import DryRun, Size, summed
from fedex_lora.runs.preflight import KEPT, elsewhere
from fedex_lora.runs.watch import Silent
from fedex_lora.tasks import Task


@dataclass(frozen=True)
class Round:
    """What one round sends and leaves.

    Attributes:
        up, down: Messages by client.
        rank: Rank of the ledger's sum T, of the layer where it is largest.
        full: Largest rank that layer can have.
        ledger: Bytes of the ledger.
        checkpoint: Bytes of the state, clients' own factors apart.
        own: Bytes of clients' own factors, which lie on disk beside the checkpoint.
        catch_up: The message for a client that joins after this round.
    """

    round: int
    up: Mapping[str, Size]
    down: Mapping[str, Size]
    rank: int
    full: int
    ledger: int
    checkpoint: int
    own: int
    catch_up: Size


@dataclass(frozen=True)
class Plan:
    """Everything that is known of a run beforehand.

    Attributes:
        parameters, adapter, head: Numbers of parameters: of the model, of LoRA's factors at the
            largest rank, and of what is trained in full.
        adapted: Number of adapted layers.
        examples: Training rows by client; None where they are not known here.
        about_examples: Why not, or where they come from.
        delivery: The final model to all clients.
        client, server: Memory of the two kinds of process; the local engine's one is both.
        libraries: Memory of a process that has imported everything and loaded nothing.
        disk: Bytes of checkpoints, and of saved updates, at most.
        timing: None where nothing was measured.
        about_time: Why not.
        privacy: What is settled of it before round 1.
    """

    recipe: Recipe
    clients: tuple[str, ...]
    parameters: int
    adapter: int
    head: int
    adapted: int
    examples: Mapping[str, int] | None
    about_examples: str
    rounds: Sequence[Round]
    delivery: Size
    client: Sequence[Part]
    server: Sequence[Part]
    libraries: int
    disk: int
    timing: Timing | None
    about_time: str
    privacy: Sequence[str]


def plan(recipe: Recipe, measured: bool = True) -> Plan:
    """What a recipe's run will need. Nothing is downloaded.

    Args:
        measured: Whether to train a few steps where model and rows are on this machine, which
            tells the time.

    Raises:
        UserError: The recipe's model is not known here (the presets are named), or rows that are
            here cannot be used.
    """
    libraries = psutil.Process().memory_info().rss
    task = recipe_task(recipe)
    model = architecture_of(recipe, task)
    folder = local_folder(recipe.model.name, recipe.model.revision)
    why = elsewhere(recipe)
    if folder is None:
        why = f"unknown without the model: the weights of {recipe.model.name} are not here"
    if not measured:
        why = "not asked for"
    if why:
        examples, about = _examples(recipe, task)
        timing = None
    else:
        # a cached model by its folder, so that no hub is asked
        here = recipe.model.model_copy(update={"name": str(folder), "revision": None})
        federation = private.settle(set_up(recipe.model_copy(update={"model": here})), Silent())
        examples, about = federation.examples, federation.description
        timing = measure(federation)
    clients = list(examples or roster(recipe) or client_names(recipe.federation.clients))
    if METHODS[recipe.method.name].pooled:
        clients = [POOLED]
    notes: list[str] = []
    settings = private.settled(
        recipe,
        federation_settings(recipe, model, clients),
        examples or {},
        notes.append,
        recipe.engine.kind != "local",
    )
    run = DryRun(settings, model.head, recipe.lora.init is not None)
    rounds = [_round(run, recipe.evaluation) for _ in range(settings.rounds)]
    delivery = summed(run.down(client) for client in settings.clients)
    messages = [s.bytes for r in rounds for part in (r.up, r.down) for s in part.values()]
    checkpoint = max(r.checkpoint for r in rounds)
    head = count(model.head.values())
    adapter = sum(s.rank * (s.out + s.inp) for s in settings.layers.values())
    return Plan(
        recipe,
        settings.clients,
        model.size,
        adapter,
        head,
        len(settings.layers),
        examples,
        about,
        rounds,
        delivery,
        client_memory(recipe, settings, model, max(r.ledger for r in rounds)),
        server_memory(settings, head, checkpoint, max(messages)),
        libraries,
        KEPT * max(r.checkpoint + r.own for r in rounds) + _saved(recipe, rounds, settings),
        timing,
        why,
        notes,
    )


def _round(run: DryRun, evaluation: EvaluationSpec) -> Round:
    up, down = run.round()
    due = run.version == run.settings.rounds or run.version % evaluation.every == 0
    if evaluation.where != "server" and due:
        scored = run.scored()
        down = {c: summed(m[c] for m in (down, scored) if c in m) for c in {**down, **scored}}
    ranks = run.ledger_ranks()
    layer = max(ranks, key=lambda name: ranks[name], default=None)
    shape = run.settings.layers[layer] if layer is not None else None
    return Round(
        run.version,
        up,
        down,
        ranks[layer] if layer is not None else 0,
        min(shape.out, shape.inp) if shape is not None else 0,
        run.ledger_bytes(),
        run.checkpoint(),
        run.own_factors(),
        run.catch_up(),
    )


def _saved(recipe: Recipe, rounds: Iterable[Round], settings: Settings) -> int:
    """Bytes of `records.save_updates`: all updates, and what was made of them."""
    if not recipe.records.save_updates:
        return 0
    made = 4 * sum(s.rank * (s.out + s.inp) for s in settings.layers.values())
    return sum(summed([*r.up.values(), *r.down.values()]).bytes + made for r in rounds)


def _examples(recipe: Recipe, task: Task) -> tuple[dict[str, int] | None, str]:
    """Training rows by client, and what is to be said of them."""
    if why := elsewhere(recipe):
        wanted = recipe.data.train_examples
        return None, why if wanted is None else f"{wanted} of them, as train_examples says; {why}"
    rows = load_rows(recipe, task)
    found = {name: len(part) for name, part in rows.train.items()}
    if METHODS[recipe.method.name].pooled:
        found = {POOLED: sum(found.values())}
    return found, rows.description
