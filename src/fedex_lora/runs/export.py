"""From a run to something plain transformers and PEFT load: a merged model or an adapter."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedex_lora.aggregation.adapter import AdapterState, Factors, folded, uniform
from fedex_lora.aggregation.delta import Delta, concat
from fedex_lora.aggregation.ledger import Ledger
from fedex_lora.disk import new_directory
from fedex_lora.engines.setup import recipe_task
from fedex_lora.errors import RecipeError
from fedex_lora.federation.state import base_increment, global_factors, start_of
from fedex_lora.model.config import CONFIG, SERVER_LIMITS, above_limits, misread, published
from fedex_lora.model.load import text_tokenizer
from fedex_lora.runs.card import base_options, loading_lines, model_card
from fedex_lora.runs.reopened import Trained

EPS = torch.finfo(torch.float32).eps  # what the run's own arithmetic could tell from zero


@dataclass(frozen=True)
class Exported:
    """What an export wrote, and how far it is from the run's model.

    Attributes:
        rank: Largest rank of a layer (adapters).
        error: ‖G − exported‖_F / ‖G − W0‖_F over all layers (adapters cut to a rank).
        errors: The same by layer.
        rounding: ‖cast(W) − W‖_F / ‖W‖_F over layers for W = W0 + T + s·B·A and the dtype of the
            exported model, or for an adapter that to which the run folded its base.
        notes: What the user should know.
    """

    path: Path
    rank: int | None = None
    error: float = 0.0
    errors: Mapping[str, float] | None = None
    rounding: float = 0.0
    notes: tuple[str, ...] = ()


def final_state(trained: Trained, client: str | None) -> AdapterState:
    """The factors and head that go with the global base; a client's own where no model is global.

    Raises:
        UserError: A client is needed and not named, named and unknown, or named and not needed;
            or its own factors are on its own machine.
    """
    clients = trained.settings.clients
    if not trained.settings.method.personal:
        if client is not None:
            raise RecipeError(
                f"`client`: {trained.recipe.method.name} trains one global model, no client has "
                "its own; leave `client` out"
            )
        factors = global_factors(trained.state, trained.settings)
        return folded(AdapterState(factors, trained.state.head))
    if trained.recipe.engine.kind != "local" and client not in trained.state.own:
        raise RecipeError(
            f"{trained.recipe.method.name}: every client has its own model, a part of which never "
            "left it; each exports its own, on its machine: fedex-lora deploy export FOLDER"
        )
    if client not in clients:
        raise RecipeError(
            f"`client`: every client has its own model under {trained.recipe.method.name}; "
            f"name one of {', '.join(clients)}"
        )
    return folded(start_of(trained.state, trained.settings, client))


def change(ledger: Ledger, state: AdapterState, layer: str) -> Delta:
    """G − W0 of one layer as float64 factors: the ledger's total and the adapter."""
    parts = [base_increment(ledger, layer, fold=False)]
    parts.append(state.layers[layer].delta() if layer in state.layers else None)
    return concat([part.to(torch.float64) for part in parts if part is not None])


def export_model(
    trained: Trained, out: Path, dtype: torch.dtype | None = None, client: str | None = None
) -> Exported:
    """Writes W0 + T + s·B·A, rounded once, as a plain transformers model.

    Args:
        dtype: float32 or the base's own (default).

    Raises:
        UserError: `out` is not empty or cannot be written, or `client` does not fit the method.
    """
    state = final_state(trained, client)
    check_finite(state.head)
    to = dtype or getattr(torch, trained.recipe.model.dtype)
    rounding = _rounding(trained, state, to)
    notes = list(_notes(trained))
    if rounding:
        notes.append(f"rounding the weights to {to} changed them by {rounding:.2g} (relative)")
    with _fresh(out) as new:
        merged = _merged(trained, state, dtype)
        names = [f"{layer}.weight" for layer in trained.model.layers] + list(state.head)
        check_finite({name: merged.get_parameter(name) for name in names})
        merged.save_pretrained(new)
        _save_tokenizer(trained, new)
        for file in new.glob("*.safetensors"):  # safetensors lets only the owner read
            shutil.copymode(new / "config.json", file)
        _write_card(trained, new, out, "merged model", notes, published(trained.recipe.model.name))
    return Exported(out, rounding=rounding, notes=(*trained.notes, *notes))


def _merged(trained: Trained, state: AdapterState, dtype: torch.dtype | None) -> Any:
    zero = {
        n: Factors(torch.zeros(1, s.inp), torch.zeros(s.out, 1), 1.0)
        for n, s in trained.model.layers.items()
    }
    whole = AdapterState({**zero, **state.layers}, state.head)
    return trained.model.merged(
        whole, lambda layer: base_increment(trained.state.ledger, layer), dtype
    )


def export_adapter(
    trained: Trained,
    out: Path,
    rank: int | None = None,
    client: str | None = None,
    *,
    error: float = 0.0,
    tight: bool = False,
    base_name: str | None = None,
) -> Exported:
    """Writes one PEFT adapter relative to the pretrained model that carries the whole ledger.

    All layers get one rank, the largest that one of them needs, padded with zeros, at scale 1: so
    programs that know no rank and alpha patterns read it as PEFT does.

    Args:
        rank: None for the numerical rank of each layer, else the best of that rank.
        error: Without a rank: how much of a layer's change may be missed, relative in Frobenius
            norm; the smallest rank that keeps to it is taken.
        tight: Every layer keeps its own rank, with patterns.
        base_name: What the adapter calls its base; see `published`.

    Raises:
        UserError: `out` is not empty or cannot be written, `client` does not fit the method, or
            a weight is no finite number.
    """
    state, spec = final_state(trained, client), trained.recipe.model
    check_finite(state.head)
    cut = as_adapter(trained.state.ledger, state, trained.model.layers, rank, error)
    factors = cut.factors if tight else uniform(cut.factors)
    folds = spec.placement == "fold"
    rounding = _rounding(trained, state, getattr(torch, spec.dtype)) if folds else 0.0
    widest = max((f.rank for f in factors.values()), default=0)
    notes = [*_notes(trained), *_adapter_notes(trained, cut.factors, rounding)]
    notes += above_limits(widest, cut.would_miss)
    told = [f"cut to rank {widest}: it misses {cut.error:.3g} of the change"] if cut.error else []
    base_name = base_name or published(spec.name)
    with _fresh(out) as new:
        trained.model.save_adapter(AdapterState(factors, state.head), new, base_name=base_name)
        _save_tokenizer(trained, new)
        notes += [f"`tight`: {who}" for who in misread(new)]
        _write_card(trained, new, out, "PEFT adapter", [*notes, *told], base_name)
        _write_loading(trained, new, base_name)
    return Exported(out, widest, cut.error, cut.errors, rounding, (*trained.notes, *notes))


@dataclass(frozen=True)
class Cut:
    """The change as factors, and what they miss of it, relative: by layer and in total.

    Attributes:
        would_miss: The same in total at other ranks.
    """

    factors: Mapping[str, Factors]
    errors: Mapping[str, float]
    error: float
    would_miss: Mapping[int, float]


def as_adapter(
    ledger: Ledger, state: AdapterState, names: Iterable[str], rank: int | None, error: float
) -> Cut:
    """The ledger and the factors of each layer as one pair of factors.

    Args:
        rank: None for the numerical rank, else the best approximation of that rank.
        error: Without a rank: how much of a layer's change may be missed, relative.
    """
    factors, missed, sizes, at = {}, {}, {}, dict.fromkeys(SERVER_LIMITS, 0.0)
    for layer in names:
        whole = change(ledger, state, layer)
        for part in whole.parts.values():
            check_finite({layer: part})
        kept = whole.compress(EPS)
        # what is missed at rank 0, 1, ..., the kept one
        tails = [*kept.singular_values().square().flip(0).cumsum(0).sqrt().flip(0).tolist(), 0.0]
        least = next(r for r, tail in enumerate(tails) if tail <= error * tails[0])
        keep = min(least if rank is None else rank, kept.rank)
        kept = kept.split(keep)[0] if keep < kept.rank else kept
        missed[layer], sizes[layer] = tails[keep], tails[0]
        at = {r: math.hypot(lost, tails[min(r, len(tails) - 1)]) for r, lost in at.items()}
        left, right = kept.factors()
        factors[layer] = Factors(right.float(), left.float(), 1.0)
    total = math.hypot(*sizes.values())
    return Cut(
        factors,
        {layer: missed[layer] / size if size else 0.0 for layer, size in sizes.items()},
        math.hypot(*missed.values()) / total if total else 0.0,
        {r: lost / total if total else 0.0 for r, lost in at.items()},
    )


def check_finite(*tensors: Mapping[str, Tensor]) -> None:
    """Raises a `UserError` if one of these holds NaN or infinity."""
    for name, tensor in (pair for part in tensors for pair in part.items()):
        if not tensor.isfinite().all():
            raise RecipeError(
                f"{name} is not finite (in {tensor.dtype}): this round's training went wrong, or "
                "its weights are too large for that. Nothing is written; take an earlier `round`"
            )


def _adapter_notes(
    trained: Trained, factors: Mapping[str, Factors], rounding: float
) -> Iterator[str]:
    model, shapes = trained.recipe.model, trained.model.layers
    wide = [
        name
        for name, f in factors.items()
        if f.A.numel() + f.B.numel() >= shapes[name].out * shapes[name].inp
    ]
    if wide:
        yield (
            f"{len(wide)} layers ({wide[0]}, ...) need a rank at which factors are larger than the "
            "weight itself; `as=model` is smaller, `rank=R` the best approximation"
        )
    if rounding:
        yield (
            f"the run rounded its base to {model.dtype} when the change was folded in, by "
            f"{rounding:.2g} (relative); on the unchanged base logits differ by as much"
        )
    if model.quantisation:
        way = f"fedex-lora merge --into-base BASE --base-quantised {model.quantisation}"
        more = "" if model.quantisation == "int8" else f", or {way}"
        yield f"the adapter belongs on the base quantised to {model.quantisation}; load it so{more}"


def _notes(trained: Trained) -> Iterator[str]:
    """What no kind of export has."""
    if trained.state.carry:
        waiting = sum(w.norm().item() ** 2 for w in trained.state.carry.values()) ** 0.5
        yield (
            f"a residual of norm {waiting:.3g} that the messages cut off waits in the carry; "
            "it is not in the exported model"
        )


def _rounding(trained: Trained, state: AdapterState, dtype: torch.dtype) -> float:
    """‖cast(W) − W‖_F / ‖W‖_F over the adapted weights W; over all where all were trained."""
    if torch.finfo(dtype).bits >= 32:
        return 0.0
    lost = size = 0.0
    for weight in _weights(trained, state):
        lost += (weight.to(dtype).float() - weight).norm().item() ** 2
        size += weight.norm().item() ** 2
    return (lost / size) ** 0.5 if size else 0.0


def _weights(trained: Trained, state: AdapterState) -> Iterator[Tensor]:
    """W0 + T + s·B·A in float32, one layer at a time."""
    if not trained.model.layers:
        yield from state.head.values()
    for layer in trained.model.layers:
        total = trained.model.pretrained(layer)
        own = state.layers[layer].delta() if layer in state.layers else None
        for part in (base_increment(trained.state.ledger, layer), own):
            total += 0 if part is None else part.dense().to(total)
        yield total


def _fresh(out: Path) -> AbstractContextManager[Path]:
    return new_directory(out, "the export", "export again; the run is as it was")


def default_name(
    kind: str,
    rank: int | None = None,
    dtype: torch.dtype | None = None,
    client: str | None = None,
    round: int | None = None,
    error: float = 0.0,
    tight: bool = False,
) -> str:
    """The folder of an export under final/; one that is not the best round's says its round.

    Example:
        >>> default_name("adapter", rank=4, round=7)
        'adapter-rank4-round7'
        >>> default_name("model", dtype=torch.float32, client="ann")
        'model-float32-ann'
    """
    parts = [kind, str(dtype).removeprefix("torch.") if dtype else None]
    parts += [f"rank{rank}" if rank else None, f"error{error:g}" if error else None]
    parts += ["tight" if tight else None, client, f"round{round}" if round else None]
    return "-".join(part for part in parts if part)


def is_export(path: Path) -> bool:
    """Whether an export was written there."""
    return (path / "config.json").is_file() or (path / CONFIG).is_file()


def _save_tokenizer(trained: Trained, new: Path) -> None:
    """Or the processor. Without the truncation and padding of the last batch, which others
    than transformers would keep to."""
    tokenizer: Any = trained.model.tokenizer
    template = recipe_task(trained.recipe).chat_template
    if template is not None:
        tokenizer.chat_template = template
    backend = getattr(text_tokenizer(tokenizer), "backend_tokenizer", None)
    if backend is not None:
        backend.no_truncation()
        backend.no_padding()
    tokenizer.save_pretrained(new)


PRIVACY = "privacy.json"  # what a private run spent; or that it was a rehearsal
LOADING = "base.json"  # transformers would take a config.json here for that of a whole model


def _write_loading(trained: Trained, new: Path, base_name: str) -> None:
    """What the base has to be loaded with: an adapter's own config has no place for it."""
    task = recipe_task(trained.recipe)
    options = {"class": task.auto_model, "base": base_name, **base_options(trained.recipe, task)}
    pad = getattr(text_tokenizer(trained.model.tokenizer), "pad_token_id", None)
    options |= {} if pad is None else {"pad_token_id": pad}
    text = json.dumps(options, indent=1, ensure_ascii=False) + "\n"
    (new / LOADING).write_text(text, encoding="utf-8")


def _write_card(
    trained: Trained, new: Path, out: Path, what: str, notes: list[str], base: str
) -> None:
    usage = loading_lines(trained.recipe, new, base, out.name)
    card = model_card(trained, what, base, notes, usage)
    (new / "README.md").write_text(card, encoding="utf-8")
    if (spent := trained.extra["record"].get("privacy")) is not None:
        (new / PRIVACY).write_text(json.dumps(spent, indent=1) + "\n", encoding="utf-8")
