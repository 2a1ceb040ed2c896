"""Attacks on a run's model: can be told which rows it was trained on?

Members are rows of the clients, others are rows that the run was evaluated on. The loss attack
(Yeom et al. 2018, arXiv 1709.01604) says "member" where the loss is below the mean loss of members.
LiRA (Carlini et al. 2022, arXiv 2112.03570) trains shadow runs by the same recipe on random halves
of both, and compares what they think of a row when it was in and when it was out.

The model is all that sums over clients show. A server that sees single updates has each client's
model as well: the loss attack on that, and a guess at whose a row is. What these find is no bound
for what others could: a privacy budget is one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, concatenate_datasets
from safetensors import SafetensorError
from safetensors.torch import load_file

from fedex_lora.aggregation.adapter import AdapterState
from fedex_lora.aggregation.seeding import derive
from fedex_lora.disk import write_atomic
from fedex_lora.engines.private.losses import example_losses
from fedex_lora.engines.setup import Federation, set_up, surroundings
from fedex_lora.engines.stage import Stage
from fedex_lora.errors import RecipeError, StorageError, UserError
from fedex_lora.federation.loop import Record, run_round
from fedex_lora.federation.state import ServerState, begin
from fedex_lora.model.adapted import AdaptedModel
from fedex_lora.runs import private
from fedex_lora.runs.by_client import begin_round
from fedex_lora.runs.here import local_engine, stage_of
from fedex_lora.runs.reopened import Which, read_round
from fedex_lora.runs.rundir import RunDir
from fedex_lora.tasks.base import evaluating, longest_first

FILE = "attack.json"
_SAMPLES = 1000  # of the bootstrap
_SMALL = 1e-6  # of a variance


@dataclass(frozen=True)
class Found:
    """What an attack came to.

    Attributes:
        auc: The probability that a member looks more like one than another row does; ½ is
            guessing.
        low: Of its 95 % interval (bootstrap over rows).
        high: Of the same.
        advantage: Members called members less others called members, as shares.
    """

    auc: float
    low: float
    high: float
    advantage: float


def auc(members: np.ndarray, others: np.ndarray) -> float:
    """P(a member's score is above another row's); ties count half.

    Example:
        >>> auc(np.array([3.0, 2.0]), np.array([1.0, 2.0]))
        0.875
    """
    ordered = np.sort(others)
    below = np.searchsorted(ordered, members, "left") + np.searchsorted(ordered, members, "right")
    return float(below.mean() / (2 * len(others)))


def judged(scores: np.ndarray, member: np.ndarray, threshold: float) -> Found:
    """How well scores tell members from others, "member" being said above the threshold."""
    yes, no = scores[member], scores[~member]
    rng = np.random.default_rng(0)
    drawn = [auc(rng.choice(yes, len(yes)), rng.choice(no, len(no))) for _ in range(_SAMPLES)]
    low, high = np.quantile(drawn, [0.025, 0.975])
    advantage = float((yes > threshold).mean() - (no > threshold).mean())
    return Found(auc(yes, no), float(low), float(high), advantage)


def lira(target: np.ndarray, shadows: np.ndarray, within: np.ndarray) -> np.ndarray:
    """log of the likelihood ratio in : out of each row, Gaussians of one variance for all rows.

    Args:
        target: Scores of the attacked model, one a row.
        shadows: The shadow models' scores: models × rows.
        within: Whether a shadow model was trained on a row: models × rows; each row was in some
            and out of others.
    """

    def fitted(chosen: np.ndarray) -> tuple[np.ndarray, float]:
        mean = (shadows * chosen).sum(0) / chosen.sum(0)
        spread = ((shadows - mean) ** 2 * chosen).sum() / max(1, chosen.sum() - shadows.shape[1])
        return mean, max(float(spread), _SMALL)

    found = np.zeros_like(target)
    for sign, chosen in ((1, within), (-1, ~within)):
        mean, variance = fitted(chosen)
        found += sign * (-((target - mean) ** 2) / (2 * variance) - 0.5 * np.log(variance))
    return found


def halves(models: int, rows: int, seed: int) -> np.ndarray:
    """For each row the models that are trained on it: half of them, drawn anew for every row."""
    rng = np.random.default_rng(seed)
    order = np.argsort(rng.random((models, rows)), axis=0)
    return order < models // 2


def by_update(
    seen: Mapping[str, np.ndarray], member: np.ndarray, owner: Sequence[str]
) -> dict[str, Found]:
    """The attacks of who sees single updates: `update`, the loss attack on the update of a row's
    owner, and `owner`, whose of the clients a member is, by how much lower its loss is by one
    client's update than by the others' in the mean. It is judged over pairs of row and client.

    Args:
        seen: Losses of all rows by each client's update; nothing comes of none.
    """
    clients, found = sorted(seen), dict[str, Found]()
    if not clients:
        return found
    losses = np.stack([seen[c] for c in clients])  # clients × rows
    mine = np.array([[whose == c for whose in owner] for c in clients])
    known = mine.any(0)
    own = (losses * mine).sum(0)[known]
    if (member & known).any() and (~member & known).any():
        threshold = -float(own[member[known]].mean())
        found["update"] = judged(-own, member[known], threshold)
    among = known & member
    if len(clients) > 1 and len({whose for whose, there in zip(owner, among) if there}) > 1:
        others = (losses.sum(0) - losses) / (len(clients) - 1)
        lower = (others - losses)[:, among]
        found["owner"] = judged(lower.ravel(), mine[:, among].ravel(), 0.0)
    return found


def attack(
    run: Path,
    shadows: int = 0,
    most: int = 2000,
    which: Which | int = "best",
    tell: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Attacks one run's model, and writes what it came to into the run's directory.

    Args:
        shadows: Shadow runs of LiRA; an even number, 0 for the loss attack alone.
        most: Members at most, and others at most; a seeded draw of them.
        tell: Is told what takes long.

    Raises:
        UserError: No run there, or its rows cannot be attacked so.
    """
    if shadows % 2:
        raise RecipeError(f"`shadows`: {shadows}; expected an even number: every row is in half")
    found = read_round(run, which)
    with surroundings(found.recipe):
        federation = set_up(found.recipe)
        rows, member, owner = _candidates(federation, most)
        stage = stage_of(federation)
        stage.show_global(found.state, federation.settings)
        losses = _losses(federation, rows)
        results = {"loss": judged(-losses, member, -float(losses[member].mean()))}
        seen = seen_updates(run, federation, stage, found.state, rows)
        results |= by_update(seen, member, owner)
        if shadows:
            within = halves(shadows, len(rows), derive(found.recipe.seed, "shadows"))
            scores = []
            for number, chosen in enumerate(within, start=1):
                tell(f"shadow run {number} of {shadows}")
                rounds = found.state.version
                scores.append(_score(_shadow(federation, rows, owner, chosen, number, rounds)))
            ratios = lira(_score(losses), np.stack(scores), within)
            results["lira"] = judged(ratios, member, 0.0)
    told = {
        "round": found.state.version,
        "members": int(member.sum()),
        "others": int((~member).sum()),
        "shadows": shadows,
        "privacy": found.extra["record"].get("privacy"),
        "attacks": {name: vars(value) for name, value in results.items()},
    }
    write_atomic(run / FILE, (json.dumps(told, indent=1) + "\n").encode())
    return told


def seen_updates(
    run: Path, federation: Federation, stage: Stage, state: ServerState, rows: Dataset
) -> dict[str, np.ndarray]:
    """By client, the loss of each row by what the client's saved update of the round makes of the
    model; nothing where `records.save_updates` was not set.

    Raises:
        UserError: A saved update is damaged.
    """
    before, found = state.ledger.until(state.version - 1), dict[str, np.ndarray]()
    kept, model = RunDir(run).saved_updates(state.version), federation.model
    for client, (folder, own) in kept.items():
        part = None if federation.settings.method.shared_base else _saved(model, own).layers
        stage.place(before, part=part)
        model.write(_saved(model, folder))
        found[client] = _losses(federation, rows)
    return found


def _saved(model: AdaptedModel, folder: Path) -> AdapterState:
    try:
        if model.layers:
            return model.saved(folder)
        return AdapterState({}, load_file(folder / "parameters.safetensors"))
    except (UserError, OSError, SafetensorError) as error:
        why = str(error).removeprefix("lora.init: ")
        raise StorageError(f"{folder}: a saved update that cannot be read: {why}") from None


def _candidates(federation: Federation, most: int) -> tuple[Dataset, np.ndarray, list[str]]:
    """Members and others, whether each is a member, and whose it is; others are dealt out."""
    task = federation.task
    if federation.settings.method.personal or not federation.evaluation:
        raise RecipeError(
            "there is no global model, or no row of the server's that nobody trained on, to tell "
            "members from; attack a run with evaluation.where: server"
        )
    if task.encode_evaluation is not None:
        raise RecipeError(
            f"task {task.name}: its evaluation rows are encoded unlike training rows, so their "
            "losses cannot be compared; attack a run of a classification or of kind causal-lm"
        )
    mine = [rows.select_columns(_columns(federation)) for rows in federation.clients.values()]
    owner = [name for name, rows in federation.clients.items() for _ in range(len(rows))]
    others = concatenate_datasets(
        [rows.select_columns(_columns(federation)) for rows in federation.evaluation.values()]
    )
    members = concatenate_datasets(mine)
    rng = np.random.default_rng(derive(federation.recipe.seed, "attack"))
    count = min(most, len(members)), min(most, len(others))
    taken = [np.sort(rng.permutation(len(d))[:n]) for d, n in zip((members, others), count)]
    names = list(federation.clients)
    whose = [owner[i] for i in taken[0]] + [names[i % len(names)] for i in range(count[1])]
    rows = concatenate_datasets([members.select(taken[0]), others.select(taken[1])])
    return rows, np.arange(len(rows)) < count[0], whose


def _columns(federation: Federation) -> list[str]:
    """Those that training and evaluation rows have in common."""
    parts = [*federation.clients.values(), *federation.evaluation.values()]
    known = set(parts[0].column_names).intersection(*(part.column_names for part in parts))
    return sorted(known)


def _losses(federation: Federation, rows: Dataset) -> np.ndarray:
    """The loss of each row by the model as it is."""
    model, task = federation.model, federation.task
    collate, size = task.collator(model.tokenizer), federation.recipe.evaluation.batch_size
    lengths = [len(r) for r in rows["input_ids"]] if "input_ids" in rows.column_names else None
    found = np.zeros(len(rows))
    with evaluating(model.module) as device:
        for indices in longest_first(lengths or [0] * len(rows), size):
            batch = collate([rows[i] for i in indices])
            labels = batch.pop("labels").to(device)
            logits = model.module(**{k: v.to(device) for k, v in batch.items()}).logits
            found[indices] = example_losses(logits, labels, task.regression).double().cpu().numpy()
    return found


def _score(losses: np.ndarray) -> np.ndarray:
    """log(p/(1 − p)) of the probability p = e^−loss, which is about Gaussian over models."""
    return -losses - np.log(np.maximum(-np.expm1(-losses), 1e-12))


def _shadow(
    federation: Federation,
    rows: Dataset,
    owner: Sequence[str],
    chosen: np.ndarray,
    number: int,
    rounds: int,
) -> np.ndarray:
    """Losses of all rows by a run of so many rounds that was trained on the chosen ones."""
    parts: Mapping[str, Dataset] = {
        name: rows.select([i for i in np.flatnonzero(chosen) if owner[int(i)] == name])
        for name in federation.clients
    }
    examples = {name: len(part) for name, part in parts.items()}
    seed = derive(federation.recipe.seed, "shadow", number)
    # without sums: their noise is then drawn on the mean, no more than a sum has
    settings = replace(federation.settings, examples=examples, seed=seed, secure=None, epsilon=None)
    recipe = federation.recipe
    if (level := recipe.privacy.example_level) is not None and level.noise_multiplier is not None:
        # the same noise on fewer rows costs more, and the budget is not theirs
        level = level.model_copy(update={"epsilon": None})
        privacy = recipe.privacy.model_copy(update={"example_level": level})
        recipe = recipe.model_copy(update={"privacy": privacy})
    shadow = replace(federation, recipe=recipe, clients=parts, settings=settings)
    engine, state = local_engine(shadow), begin(settings, federation.initial)
    records: list[Record] = []
    while state.version < rounds:
        bounded, noise = begin_round(shadow, engine, state.version + 1, records)
        state, record = run_round(state, bounded.settings, engine, noise=noise)
        if (told := private.told(shadow, engine, record, records)) is not None:
            record["privacy"] = told
        records.append(record)
    engine.stage.show_global(state, settings)
    return _losses(federation, rows)
