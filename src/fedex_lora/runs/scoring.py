"""Scores of a global model: on the server's rows, and on the clients' own."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from fedex_lora.engines.engine import Engine
from fedex_lora.engines.local import LocalEngine
from fedex_lora.engines.setup import Federation
from fedex_lora.federation.loop import Record
from fedex_lora.federation.state import ServerState

Scores = dict[str, float]


def evaluate(
    federation: Federation,
    engine: Engine,
    state: ServerState,
    selection_only: bool = False,
    clients: Sequence[str] | None = None,
) -> Record:
    """Scores of the global model on the server's rows, and of the clients' on their own.

    Where nothing is exchanged each client's own model is scored, and the server's scores are
    their means.

    Args:
        selection_only: The first of the server's splits alone.
        clients: Whose rows; None for all. In a run, those of the next round: they hold the model.

    Returns:
        `scores` by split, `client_scores` by client, and `score`, the number that selects.
    """
    scores, alone = server_scores(federation, engine.server, state, selection_only)
    names = sorted(engine.validation) if clients is None else clients
    if federation.settings.method.pooled:
        names = sorted(engine.validation)
    result = with_own(federation, engine, scores, engine.client_scores(state, names) or {})
    return {**result, "scores_alone": alone} if alone else result


def server_scores(
    federation: Federation,
    server: LocalEngine,
    state: ServerState,
    selection_only: bool,
    known: Record | None = None,
) -> tuple[dict[str, Scores], dict[str, dict[str, Scores]]]:
    """Scores by split, and by client and split where every client has a model of its own.

    Args:
        known: The state's record: splits that it has scores of are not scored again.
    """
    splits = dict(list(federation.evaluation.items())[: 1 if selection_only else None])
    if not splits:
        return {}, {}
    alone = not federation.settings.method.exchanges
    size = federation.recipe.evaluation.batch_size
    by_model: dict[str | None, dict[str, Scores]] = {}
    for client in list(federation.settings.clients) if alone else [None]:
        server.write_global(state, client)
        had = _scored(known or {}, client)
        whose = ("clients", client) if client else ()
        by_model[client] = {
            split: had[split] if split in had else server.evaluate(rows, size, state, *whose, split)
            for split, rows in splits.items()
        }
    scores = {split: _means([m[split] for m in by_model.values()]) for split in splits}
    scores |= federation.task.average(scores)
    return scores, {str(c): m for c, m in by_model.items()} if alone else {}


def _scored(record: Record, client: str | None) -> Mapping[str, Scores]:
    """Splits whose scores are all numbers: a record has null for what is none."""
    found = record.get("scores_alone", {}).get(client, {}) if client else record.get("scores", {})
    return {split: told for split, told in found.items() if None not in told.values()}


def with_own(
    federation: Federation,
    engine: Engine,
    scores: Mapping[str, Scores],
    own: Mapping[str, Mapping[str, float]],
) -> Record:
    """The server's scores and the clients' own, and the number that selects."""
    primary = federation.task.primary
    told = {c: dict(own[c]) for c in sorted(own)}
    counted = [c for c, found in told.items() if _is_number(found[primary])]
    result: Record = {
        "scores": dict(scores),
        "score": _selection(primary, scores, {c: told[c] for c in counted}, engine.validation),
    }
    if not told:
        return result
    return {**result, "client_scores": told, **({} if scores else {"scored_by": counted})}


def _is_number(score: float | None) -> bool:
    return score is not None and math.isfinite(score)


def _means(scores: list[Scores]) -> Scores:
    return {key: sum(s[key] for s in scores) / len(scores) for key in scores[0]}


def _selection(
    primary: str,
    scores: Mapping[str, Scores],
    own: Mapping[str, Mapping[str, float]],
    sizes: Mapping[str, int],
) -> float | None:
    """The primary metric on the first split; without one, the mean over the clients' rows."""
    if scores:
        return next(iter(scores.values()))[primary]
    total = sum(sizes[name] for name in own)
    return sum(sizes[name] * own[name][primary] for name in sorted(own)) / total if own else None


def final_scores(
    federation: Federation, engine: Engine, state: ServerState, record: Record
) -> Record:
    """All of the server's splits; the clients' scores as the round's record has them."""
    scores, alone = server_scores(federation, engine.server, state, False, record)
    result = with_own(federation, engine, scores, record.get("client_scores", {}))
    return {**result, "scores_alone": alone} if alone else result
