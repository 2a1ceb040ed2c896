"""A round's training with `engine.fuse`: k clients in one pass against one after the other."""

from __future__ import annotations

from pathlib import Path

from benchmarks.results import Figure, Row
from benchmarks.rounds import recipe
from benchmarks.timing import in_turn, ratio
from fedex_lora.engines.setup import Federation, set_up
from fedex_lora.engines.training import quick_collections
from fedex_lora.federation.loop import Exchange
from fedex_lora.federation.state import begin
from fedex_lora.recipe import Recipe
from fedex_lora.runs.autotune import as_named
from fedex_lora.runs.here import local_engine

STEPS = 6
BATCHES = {3: (1, 4), 8: (1, 4)}  # by the number of clients


def small_batches(task: str, data: Path, clients: int, batch: int) -> Recipe:
    """The recipe of the other rows with so many clients, whose batches are small."""
    whole = recipe(task, data, clients * batch * STEPS).model_dump(mode="json", exclude_unset=True)
    whole["federation"]["clients"] = clients
    whole["training"]["per_device_train_batch_size"] = batch
    return Recipe.model_validate(whole)


def train_all(federation: Federation) -> None:
    """The training of a round."""
    state, settings = begin(federation.settings, federation.initial), federation.settings
    for _ in local_engine(federation).train(Exchange(state, settings, settings.clients)):
        pass


def gain(federation: Federation, repeats: int) -> tuple[float, float | None]:
    """How many times faster all clients train in one pass than one after the other."""
    clients = len(federation.clients)
    alone, fused = (as_named(federation, fuse=k) for k in (1, clients))
    with quick_collections():
        times = in_turn(
            {"alone": lambda: train_all(alone), "fused": lambda: train_all(fused)}, repeats
        )
    return ratio(times["alone"], times["fused"])


def row(data: Path, repeats: int = 3) -> Row:
    """Gains by clients, rows of a batch and precision."""
    figures = []
    for clients, batches in BATCHES.items():
        for batch in batches:
            federation = set_up(small_batches("cola", data, clients, batch))
            for precision in ("float32", "bfloat16"):
                value, spread = gain(as_named(federation, precision=precision), repeats)
                what = f"{clients} clients, batches of {batch}, {precision}"
                figures.append(Figure(what, value, "×", spread, at_least=1.3))
    return Row(
        "Fused clients: the training of a round in one pass against one client after the other",
        figures,
        [
            f"MiniLM, rank 4, cola, {STEPS} steps a client, dropout as in pretraining. One after "
            "the other is how clients train by default (transformers.Trainer). All clients' rows "
            "are padded to the longest of them. Without dropout both end at the same weights to "
            "1e-5 (tests/test_fused.py).",
            "Gains come from fewer and larger matrix products; where a single client's batch fills "
            "the machine there is none. `engine.fuse: auto` measures it.",
        ],
    )
