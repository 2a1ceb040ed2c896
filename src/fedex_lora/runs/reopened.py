"""A run's directory opened again: the state of one of its rounds, with or without the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fedex_lora.engines.chosen import federation_settings
from fedex_lora.engines.setup import recipe_model, recipe_task
from fedex_lora.engines.stage import Stage
from fedex_lora.errors import StorageError, UserError
from fedex_lora.federation.record import Record
from fedex_lora.federation.settings import Settings
from fedex_lora.federation.state import ServerState
from fedex_lora.model.adapted import AdaptedModel
from fedex_lora.recipe import Recipe
from fedex_lora.runs.checkpoint import NAME, latest, load_checkpoint
from fedex_lora.runs.records import best_record
from fedex_lora.runs.rundir import RunDir, not_of_a_run
from fedex_lora.runs.sources import check_pretrained

Which = Literal["best", "last"]


@dataclass(frozen=True)
class Round:
    """What a run left of one round; the attributes are those of `Trained`."""

    recipe: Recipe
    state: ServerState
    extra: Mapping[str, Any]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Trained:
    """The model of one round of a run.

    Attributes:
        extra: What was saved with the state.
        notes: What the user should know about the round that was taken.
    """

    recipe: Recipe
    model: AdaptedModel
    settings: Settings
    state: ServerState
    extra: Mapping[str, Any]
    notes: tuple[str, ...] = ()

    def show(self, client: str | None = None) -> None:
        """Makes the model the global one; or `client`'s, where every client has a model alone."""
        stage = Stage(self.model, recipe_task(self.recipe), self.settings.method)
        stage.show_global(self.state, self.settings, client)


def read_round(path: Path, which: Which | int = "best") -> Round:
    """The state of one round of a run, without any model.

    Args:
        which: The best round by the selection score, the last, or a round that has a checkpoint.

    Raises:
        UserError: No run, or no such checkpoint.
    """
    directory = RunDir(path)
    recipe = directory.recipe()
    state, extra, notes = directory.newest()
    if state is None:
        raise StorageError(
            f"{path}: no intact checkpoint; " + ("; ".join(notes) or "no round is done")
        )
    if which == "best":
        higher = recipe_task(recipe).higher_is_better
        round = _best_round(directory, extra["record"], higher)
    else:
        round = state.version if which == "last" else which
    if round != state.version:
        state, extra = _load_round(directory, round)
    notes = [note.partition("; going on")[0] for note in notes]
    if different := directory.edited(recipe, extra):
        changed = "; ".join(different)
        notes.append(f"{path}/recipe.yaml was changed after the run began, and is used: {changed}")
    record = {**extra["record"], **_later(directory, round)}
    return Round(recipe, state, {**extra, "record": record}, tuple(notes))


def _later(directory: RunDir, round: int) -> dict[str, Any]:
    """What came after a round's checkpoint was written: scores of the clients' own, and what the
    rounds after it spent of a privacy budget, as it was chosen among them all."""
    try:
        records = directory.records()
    except StorageError:  # damaged; the checkpoint's record will do
        return {}
    found = [r for r in records if r["round"] == round]
    scores = {k: r[k] for r in found for k in ("scores", "client_scores", "score") if k in r}
    spent = [r["privacy"] for r in records if "privacy" in r]
    return scores | ({"privacy": spent[-1]} if spent else {})


def open_run(path: Path, which: Which | int = "best", workdir: Path | None = None) -> Trained:
    """`read_round`, and the pretrained model that goes with it."""
    found = read_round(path, which)
    model = recipe_model(found.recipe, recipe_task(found.recipe), workdir)
    check_pretrained(RunDir(path), found.recipe, model)
    settings = federation_settings(found.recipe, model, found.extra["clients"])
    return Trained(found.recipe, model, settings, found.state, found.extra, found.notes)


def _best_round(directory: RunDir, newest: Record, higher: bool) -> int:
    """What results.json says; before there is one, by the scores so far, else the newest."""
    results = directory.results(whole=True)
    if results is not None:
        return results["best_round"]
    # a crash may have come between the newest checkpoint and its line
    by_round = {r["round"]: r for r in [newest, *directory.records()]}
    return (best_record(list(by_round.values()), higher) or newest)["round"]


def _load_round(directory: RunDir, round: int) -> tuple[ServerState, Mapping[str, Any]]:
    try:
        path = directory.checkpoints / NAME.format(round)
        state, extra = load_checkpoint(path)
        if problem := not_of_a_run(path, extra):
            raise StorageError(problem)
        return state, extra
    except UserError as error:
        there = sorted(s.version for _, s, _ in latest(directory.checkpoints) if s is not None)
        raise StorageError(
            f"{error}. Intact checkpoints are there of rounds {', '.join(map(str, there))}; name "
            "one with `round`"
        ) from None
