"""Scores of a global model: on the server's rows, and on the clients' own."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from fedex_lora.engines.engine import Engine
from fedex_lora.engines.setup import Federation
from fedex_lora.engines.stage import Stage
from fedex_lora.federation.loop import Record, deliver
from fedex_lora.federation.state import ServerState

Scores = dict[str, float]


def evaluate(
    federation: Federation,
    engine: Engine,
    state: ServerState,
    clients: Sequence[str],
    note: Callable[[str], None],
    selection_only: bool = False,
) -> tuple[ServerState, Record, Mapping[str, int]]:
    """Scores of the global model on the server's rows, and of the clients' on their own.

    Where nothing is exchanged each client's own model is scored, and the server's scores are
    their means.

    Args:
        clients: Whose rows. In a run, those of the next round: they get the model anyhow.
        note: Is told of clients whose scores did not come.
        selection_only: The first of the server's splits alone.

    Returns:
        The state, with who holds the model; `scores` by split, `client_scores` by client and
        `score`, the number that selects; and the bytes that were sent to clients for it.
    """
    scores, alone = server_scores(federation, engine.stage, state, selection_only)
    own: Mapping[str, Mapping[str, float]] = {}
    sent: Mapping[str, int] = {}
    if any(engine.validation.values()):
        state, own, sent, missed = deliver(state, federation.settings, engine, clients)
        for client, why in missed.items():
            note(f"round {state.version}: no scores of {client}: {why}")
    result = with_own(federation, engine, scores, own)
    return state, {**result, "scores_alone": alone} if alone else result, sent


def server_scores(
    federation: Federation,
    stage: Stage,
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
    by_model: dict[str | None, dict[str, Scores]] = {}
    for client in list(federation.settings.clients) if alone else [None]:
        stage.show_global(state, federation.settings, client)
        had = _scored(known or {}, client)
        whose = ("clients", client) if client else ()
        by_model[client] = {
            split: had[split] if split in had else stage.score(rows, state.version, *whose, split)
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
    scores, alone = server_scores(federation, engine.stage, state, False, record)
    result = with_own(federation, engine, scores, record.get("client_scores", {}))
    return {**result, "scores_alone": alone} if alone else result
