"""The settings of a federation, as a recipe chose them for a model."""

from __future__ import annotations

import math

import torch

from fedex_lora.aggregation.asynchronous import Asynchronous
from fedex_lora.federation.noise import SumNoise, split
from fedex_lora.federation.settings import Secure, Settings
from fedex_lora.model.adapted import AdaptedModel
from fedex_lora.model.architectures import Architecture
from fedex_lora.recipe import Recipe


def federation_settings(
    recipe: Recipe, model: AdaptedModel | Architecture, clients: list[str]
) -> Settings:
    """The settings of the federation; the one client of pooled data has no partners to wait for."""
    fed, method = recipe.federation, recipe.method.chosen
    ranks = dict(zip(clients, recipe.lora.ranks or [])) if not method.pooled else {}
    widest = max(ranks.values(), default=0)
    layers = {n: s.at_rank(widest) if widest else s for n, s in model.layers.items()}
    level, of_rows = recipe.privacy.client_level, recipe.privacy.example_level
    return Settings(
        method=method,
        seed=recipe.seed,
        clients=tuple(sorted(clients)),
        layers=layers,
        rounds=fed.rounds,
        ranks=ranks,
        rank=recipe.method.rank,
        carry=recipe.method.carry,
        flush=recipe.method.flush,
        weights=fed.weights,
        server_learning_rate=fed.server_learning_rate,
        clients_per_round="all" if method.pooled else fed.clients_per_round,
        min_clients=1 if method.pooled else fed.min_clients,
        wire_dtype=getattr(torch, fed.wire_dtype),
        oversample=fed.oversample,
        max_norm=fed.max_norm,
        clip=level.clip if level is not None and level.adaptive else None,
        epsilon=None if of_rows is None else of_rows.epsilon or math.inf,
        norm_ratio=fed.max_norm_ratio,
        max_share=fed.max_share,
        secure=secure_settings(recipe),
        mean=fed.mean,
        liars=fed.liars,
        align=fed.align,
        optimizer=fed.optimizer,
        scaffold=fed.scaffold,
        spectrum=recipe.records.spectrum,
        asynchronous=fed.asynchronous and Asynchronous(**fed.asynchronous.model_dump()),
    )


def secure_settings(recipe: Recipe) -> Secure | None:
    """How updates are summed, if only sums are to be seen. By default more than half of a round's
    clients must stay, by everybody's own recipe: nobody sums over fewer because a server says so.
    """
    asked = recipe.privacy.secure_aggregation
    if asked is None:
        return None
    least = asked.threshold or recipe.federation.sampled // 2 + 1
    noise, level = None, recipe.privacy.client_level
    if level is not None:
        of_sum, of_count = level.noise_multiplier, None
        if level.adaptive:
            of_sum, of_count = split(level.noise_multiplier, recipe.federation.sampled)
        seed = recipe.seed if recipe.privacy.rehearsal else None
        noise = SumNoise(level.clip, of_sum * level.clip, least, seed, of_count)
    rank = None if asked.rank == "exact" else asked.rank
    return Secure(least, asked.bits, rank, noise, asked.repeat)
