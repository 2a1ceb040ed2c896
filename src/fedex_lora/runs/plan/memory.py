"""Peak memory of the processes of a federation, part by part, before it runs.

Weights, adapters, gradients and optimizer states follow from shapes; activations are estimated.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from fedex_lora.aggregation.adapter import LayerShape
from fedex_lora.aggregation.aggregator import assign
from fedex_lora.federation.settings import Settings
from fedex_lora.model.architectures import Architecture, count
from fedex_lora.recipe import Recipe
from fedex_lora.runs.plan.traffic import statistics

FLOAT32 = 4


@dataclass(frozen=True)
class Part:
    """Bytes that a process holds at its peak, and what for.

    Attributes:
        estimate: Whether more than shapes go into it.
    """

    what: str
    bytes: int
    estimate: bool = False


def total(parts: Iterable[Part], certain: bool = False) -> int:
    """The sum; with `certain`, of what is not estimated."""
    return sum(part.bytes for part in parts if not (certain and part.estimate))


def client_memory(
    recipe: Recipe, settings: Settings, model: Architecture, ledger: int
) -> list[Part]:
    """What a process holds that trains one client after the other, or `recipe.fused` at once.

    Args:
        ledger: Bytes of all increments, which lie beside the layers with `placement: side`.
    """
    k, head = recipe.fused, count(model.head.values())
    parts = [
        Part("model", model.bytes(recipe.model)),
        *turn_memory(recipe, settings, head, ledger),
        Part("activations", k * activations(recipe, model.config), True),
    ]
    return [part for part in parts if part.bytes]


def turn_memory(recipe: Recipe, settings: Settings, head: int, ledger: int) -> list[Part]:
    """What a client's turn holds beside the model and its activations.

    Args:
        head: Numbers that are trained in full.
        ledger: As of `client_memory`.
    """
    exchanged, k, layers = _exchanged(settings, head), recipe.fused, settings.layers.values()
    held = k * exchanged if layers else head * _itemsize(recipe)  # LoRA trains in float32
    sizes = [s.out * s.inp for s in layers]
    dense_round = settings.method.sends_gradients(1) or settings.method.assignment.sparse(1)
    largest, dense = max(sizes, default=0), sum(sizes) * dense_round
    moments, sure = _moments(str(recipe.training.get("optim", "adamw_torch")))
    parts = [
        Part("adapter and head", held if layers else 0),
        Part("gradients", held),
        Part("optimizer", int(held * moments), not sure),
        Part("start and end of a turn", (1 + k) * exchanged),
        Part("changes of whole weights, twice", 2 * dense * FLOAT32),
        Part("a layer's pretrained weights, twice", 2 * largest * FLOAT32),
        Part("increments beside the layers", ledger if recipe.model.placement == "side" else 0),
    ]
    return [part for part in parts if part.bytes]


def server_memory(settings: Settings, head: int, checkpoint: int, message: int) -> list[Part]:
    """What the process that aggregates holds, evaluation apart.

    Args:
        head: Numbers that are trained in full.
        checkpoint: Bytes of the largest state.
        message: Bytes of the largest message.
    """
    exchanged = _exchanged(settings, head)
    k = settings.sample_size
    assignment = settings.method.assignment
    both = assignment.sent_up(settings.method.trained(1)) == {"A", "B"}
    sums = both + ("product" in assignment.needs) + 2 * ("increment" in assignment.needs)
    spread = sum(
        min(k * s.rank * (s.out + s.inp), 2 * s.out * s.inp) for s in settings.layers.values()
    )
    parts = [
        Part("state", checkpoint),
        Part("means and next factors", 2 * exchanged),
        Part("an update", exchanged),
        Part("a message", message),
        Part("sums over clients", sums * spread * FLOAT32, True),
    ]
    return [part for part in parts if part.bytes]


def activations(recipe: Recipe, config: Any) -> int:
    """An estimate for a transformer's training step: what is kept for the backward pass.

    A token and layer keep about 9 hidden vectors and 4 of the feed-forward's width (Korthikanti et
    al., arXiv 2205.05198, section 4.1, without attention scores, which are not stored); a language
    model's logits are there three times in float32. Autograd kept 0.6 to 1.4 times as much for
    small RoBERTa, GPT-2, Llama and Gemma-2. 0 where the config has no such sizes.
    """
    hidden, layers = (getattr(config, n, None) for n in ("hidden_size", "num_hidden_layers"))
    if not isinstance(hidden, int) or not isinstance(layers, int):
        return 0
    wide = getattr(config, "intermediate_size", None) or 4 * hidden
    tokens = int(recipe.training.get("per_device_train_batch_size", 8)) * recipe.task.max_length
    layer = tokens * (9 * hidden + 4 * wide)
    if recipe.training.get("gradient_checkpointing"):
        kept = layer + layers * tokens * hidden
    else:
        kept = layer * layers
    vocabulary = getattr(config, "vocab_size", 0) if recipe.task.vocabulary else 0
    return kept * _itemsize(recipe) + 3 * tokens * vocabulary * FLOAT32


def _exchanged(settings: Settings, head: int) -> int:
    """Bytes of all factors, at the largest rank of a client, and the head, as values: float32."""
    return (sum(s.rank * (s.out + s.inp) for s in settings.layers.values()) + head) * FLOAT32


def _itemsize(recipe: Recipe) -> int:
    return getattr(torch, recipe.model.dtype).itemsize


def _moments(optim: str) -> tuple[float, bool]:
    """Optimizer states, in multiples of the trained parameters' size, and whether that is sure."""
    if optim.startswith("adamw_torch"):
        return 2.0, True
    if optim == "sgd":
        return 0.0, True
    return (0.5 if "8bit" in optim else 2.0), False


def ledger_numbers(settings: Settings) -> int:
    """Numbers of the ledger where it is largest, at least: every round adds what the assignment
    leaves out, and all but the newest are one matrix a layer as soon as that is smaller."""
    each, dense = 0, 0
    for layer in settings.layers.values():
        if found := _left_out(settings, layer):
            each, dense = each + found, dense + layer.out * layer.inp
    largest = old = new = 0
    for _ in range(settings.rounds if each else 0):
        new += 1
        if new > 2 and dense <= old + (new - 1) * each:
            old, new = dense, 1
        largest = max(largest, old + new * each)
    return largest


def _left_out(settings: Settings, layer: LayerShape) -> int:
    """Numbers of a round's increment in one layer, of clients that start from B = 0 at least."""
    method = settings.method
    if not method.exchanges:
        return 0
    clients = 1 if settings.combining.mean == "krum" else settings.sample_size
    found = assign(method, statistics(settings, layer, 1, clients)).left_out
    if found is None or not method.in_ledger:
        return 0
    if method.residual == "truncated":
        rank = min(settings.rank or 0, found.rank)
        return min(rank * (layer.out + layer.inp), layer.out * layer.inp)
    return found.smaller().numbers


def own_numbers(settings: Settings, head: int) -> int:
    """Numbers that the clients of one round keep as their own."""
    assignment = settings.method.assignment

    def owns(factor: str) -> bool:
        return not {factor, "pair"}.isdisjoint(assignment.own)

    taken = settings.sample(1)[: settings.sample_size]
    factors = sum(
        layer.rank * (owns("A") * layer.inp + owns("B") * layer.out)
        for client in taken
        for layer in settings.layers_of(client).values()
    )
    return factors + len(taken) * head * assignment.head_private
