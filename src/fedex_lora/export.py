"""From a run to something plain transformers and PEFT load: a merged model or an adapter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from fedex_lora.adapter import AdapterState, Factors
from fedex_lora.engines.local import base_increment
from fedex_lora.errors import UserError
from fedex_lora.federation.checkpoint import NAME, load_checkpoint, write_atomic
from fedex_lora.federation.settings import Settings
from fedex_lora.federation.state import ServerState, global_factors, start_of
from fedex_lora.lowrank import LowRank, concat, factored
from fedex_lora.methods import METHODS
from fedex_lora.model import AdaptedModel
from fedex_lora.recipe import Recipe
from fedex_lora.rundir import RunDir, versions
from fedex_lora.setup import federation_settings, recipe_model, recipe_task

Which = Literal["best", "last"]
EPS = torch.finfo(torch.float32).eps  # what the run's own arithmetic could tell from zero


@dataclass(frozen=True)
class Trained:
    """The model of one round of a run."""

    recipe: Recipe
    model: AdaptedModel
    settings: Settings
    state: ServerState
    extra: Mapping[str, Any]


@dataclass(frozen=True)
class Exported:
    """What an export wrote, and how far it is from the run's model.

    Attributes:
        rank: Largest rank of a site (adapters).
        error: ‖G − exported‖_F / ‖G − W0‖_F over all sites (adapters cut to a rank).
        errors: The same by site.
        notes: What the user should know.
    """

    path: Path
    rank: int | None = None
    error: float = 0.0
    errors: Mapping[str, float] | None = None
    notes: tuple[str, ...] = ()


def open_run(path: Path, which: Which | int = "best", workdir: Path | None = None) -> Trained:
    """Loads the pretrained model and the state of one round of a run.

    Args:
        which: The best round by the selection score, the last, or a round that has a checkpoint.

    Raises:
        UserError: No run, or no such checkpoint.
    """
    directory = RunDir(path)
    recipe = directory.recipe()
    state, extra, notes = directory.newest()
    if state is None:
        raise UserError(
            f"{path}: no intact checkpoint; " + ("; ".join(notes) or "no round is done")
        )
    round = state.version if which == "last" else which
    if which == "best":
        round = (directory.read_json("results.json") or {}).get("best_round", state.version)
    if round != state.version:
        file = directory.checkpoints / NAME.format(round)
        state, extra = load_checkpoint(file)
    task = recipe_task(recipe)
    model = recipe_model(recipe, task, workdir)
    settings = federation_settings(recipe, model, extra["clients"])
    return Trained(recipe, model, settings, state, extra)


def final_state(trained: Trained, client: str | None) -> AdapterState:
    """The factors and head that go with the global base; a client's own where nothing is shared.

    Raises:
        UserError: A client is needed and not named, or named and unknown.
    """
    clients = trained.settings.clients
    if trained.settings.method.exchanges:
        return AdapterState(global_factors(trained.state, trained.settings), trained.state.head)
    if client not in clients:
        raise UserError(
            f"--client: every client has its own model under {trained.recipe.method.name}; "
            f"name one of {', '.join(clients)}"
        )
    return start_of(trained.state, trained.settings, client)


def change(trained: Trained, state: AdapterState, site: str) -> LowRank:
    """G − W0 of one site as float64 factors: the ledger's total and the adapter."""
    parts = [
        factored(w)
        for w in [base_increment(trained.state, trained.settings, site, None, False)]
        if w is not None
    ]
    if site in state.sites:
        parts.append(state.sites[site].delta())
    return concat([p.to(torch.float64) for p in parts])


def export_model(
    trained: Trained, out: Path, dtype: torch.dtype | None = None, client: str | None = None
) -> Exported:
    """Writes W0 + T + s·B·A, rounded once, as a plain transformers model.

    Args:
        dtype: float32 or the base's own (default).
    """
    _check_free(out)
    state = final_state(trained, client)
    zero = {
        n: Factors(torch.zeros(1, s.inp), torch.zeros(s.out, 1), 1.0)
        for n, s in trained.model.sites.items()
    }
    whole = AdapterState({**zero, **state.sites}, state.head)
    merged = trained.model.merged(
        whole, lambda s: base_increment(trained.state, trained.settings, s, None), dtype
    )
    merged.save_pretrained(out)
    trained.model.tokenizer.save_pretrained(out)
    _write_card(trained, out, "merged model")
    return Exported(out)


def export_adapter(
    trained: Trained, out: Path, rank: int | None = None, client: str | None = None
) -> Exported:
    """Writes one PEFT adapter relative to the pretrained model that carries the whole ledger.

    Args:
        rank: None for the numerical rank of each site, else the best of that rank.
    """
    _check_free(out)
    state = final_state(trained, client)
    sites, errors, squares, notes = {}, {}, [0.0, 0.0], []
    for site, shape in trained.model.sites.items():
        whole = change(trained, state, site)
        kept, left = (whole.compress(EPS), None) if rank is None else whole.split(rank)
        missed, size = (0.0 if left is None else left.norm().item()), whole.norm().item()
        errors[site] = missed / size if size else 0.0
        squares = [squares[0] + missed**2, squares[1] + size**2]
        sites[site] = Factors(kept.right.float(), kept.left.float(), 1.0)
        if kept.rank * (shape.out + shape.inp) >= shape.out * shape.inp:
            notes.append(site)
    trained.model.save_adapter(
        AdapterState(sites, state.head), out, base_name=trained.recipe.model.name
    )
    _write_card(trained, out, "PEFT adapter")
    widest = max((f.rank for f in sites.values()), default=0)
    error = (squares[0] / squares[1]) ** 0.5 if squares[1] else 0.0
    return Exported(out, widest, error, errors, _notes(trained, notes))


def _notes(trained: Trained, wide: list[str]) -> tuple[str, ...]:
    notes = []
    if wide:
        notes.append(
            f"{len(wide)} layers ({wide[0]}, ...) need a rank at which factors are larger than the "
            "weight itself; --as model is smaller, --rank R the best approximation"
        )
    if trained.state.carry:
        waiting = sum(w.norm().item() ** 2 for w in trained.state.carry.values()) ** 0.5
        notes.append(
            f"a residual of norm {waiting:.3g} was cut off by truncation and waits in the carry; "
            "it is not in the exported model"
        )
    return tuple(notes)


def _check_free(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: exists and is not empty; name another directory with --out")


def _write_card(trained: Trained, out: Path, what: str) -> None:
    write_atomic(out / "README.md", model_card(trained, what).encode())


def model_card(trained: Trained, what: str) -> str:
    """A model card: method, rounds, clients, data, scores, versions."""
    recipe, record = trained.recipe, trained.extra["record"]
    method = METHODS[recipe.method.name]
    scores = [
        f"| {split} | {name} | {value:.4f} |"
        for split, metrics in record.get("scores", {}).items()
        for name, value in metrics.items()
    ]
    clients = [f"- {c}: {d['examples']} examples" for c, d in record["clients"].items()]
    return "\n".join(
        [
            "---",
            f"base_model: {recipe.model.name}",
            "library_name: " + ("peft" if "adapter" in what else "transformers"),
            "tags: [federated-learning, lora, fedex-lora]",
            "---",
            f"# {recipe.name}",
            "",
            f"A {what}, trained by {len(trained.settings.clients)} clients with the method "
            f"`{recipe.method.name}` ({method.source}); round {trained.state.version} of "
            f"{recipe.federation.rounds}, seed {recipe.seed}.",
            "",
            f"Data: {trained.extra['description']}. Clients of the last round:",
            "",
            *clients,
            "",
            "| split | metric | score |",
            "|---|---|---|",
            *scores,
            "",
            "Made with " + ", ".join(f"{n} {v}" for n, v in versions().items()) + ".",
            "",
        ]
    )
