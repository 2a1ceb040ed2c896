"""Scores of a global model on the server's rows, and the number of them that selects."""

from __future__ import annotations

import math
from collections.abc import Mapping

from fedex_lora.engines.engine import Engine
from fedex_lora.engines.setup import Federation
from fedex_lora.engines.stage import Stage
from fedex_lora.federation.record import Record
from fedex_lora.federation.state import ServerState
from fedex_lora.recipe import Recipe

Scores = dict[str, float]


def lacks_scores(recipe: Recipe, record: Record) -> bool:
    """Whether clients are to score the model after this record's round, and none has so far."""
    where, every = recipe.evaluation.where, recipe.evaluation.every
    last = record["round"] == recipe.federation.rounds
    due = where != "server" and (last or record["round"] % every == 0)
    return due and "client_scores" not in record


def server_scores(
    federation: Federation,
    stage: Stage,
    state: ServerState,
    selection_only: bool,
    known: Record | None = None,
) -> tuple[dict[str, Scores], dict[str, dict[str, Scores]]]:
    """Scores by split, and by client and split where every client has a model of its own.

    Args:
        selection_only: The first split alone.
        known: The state's record: splits that it has scores of are not scored again.
    """
    splits = dict(list(federation.evaluation.items())[: 1 if selection_only else None])
    if not splits:
        return {}, {}
    alone = federation.settings.method.personal
    by_model: dict[str | None, dict[str, Scores]] = {}
    for client in list(federation.settings.clients) if alone else [None]:
        stage.show_global(state, federation.settings, client)
        had = _scored(known or {}, client)
        whose = ("clients", client) if client else ()
        by_model[client] = {
            split: had[split] if split in had else stage.score(rows, state.version, *whose, split)
            for split, rows in splits.items()
        }
    scores = {}
    for split in splits:
        each = [m[split] for m in by_model.values()]
        scores[split] = {key: sum(s[key] for s in each) / len(each) for key in each[0]}
    scores |= federation.task.average(scores)
    return scores, {str(c): m for c, m in by_model.items()} if alone else {}


def _scored(record: Record, client: str | None) -> Mapping[str, Scores]:
    """Splits whose scores are all numbers: a record has null for what is none."""
    found = record.get("scores_alone", {}).get(client, {}) if client else record.get("scores", {})
    return {split: told for split, told in found.items() if None not in told.values()}


def selected(
    federation: Federation,
    engine: Engine,
    scores: Mapping[str, Scores],
    alone: Mapping[str, Mapping[str, Scores]],
    own: Mapping[str, Mapping[str, float]],
) -> Record:
    """The server's scores and the clients' own, and the number that selects: the primary metric on
    the first split; without one, the mean over the clients' rows.

    Args:
        scores, alone: As of `server_scores`.
        own: By client, the scores on its own rows.
    """
    primary, sizes = federation.task.primary, engine.validation
    told = {c: dict(own[c]) for c in sorted(own)}
    counted = [c for c, found in told.items() if math.isfinite(_number(found[primary]))]
    score = None
    if scores:
        score = next(iter(scores.values()))[primary]
    elif total := sum(sizes[c] for c in counted):
        score = sum(sizes[c] * told[c][primary] for c in counted) / total
    result: Record = {"scores": dict(scores), "score": score}
    if told:
        result |= {"client_scores": told, **({} if scores else {"scored_by": counted})}
    return {**result, "scores_alone": alone} if alone else result


def _number(score: float | None) -> float:
    """As a record has it; null is none."""
    return math.nan if score is None else score
