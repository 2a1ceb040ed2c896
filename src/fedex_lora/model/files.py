"""PEFT adapters on disk: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fedex_lora.aggregation.adapter import AdapterState, Factors, LayerShape
from fedex_lora.disk import stands_for
from fedex_lora.errors import RecipeError, UserError
from fedex_lora.model.config import (
    CONFIG,
    WEIGHTS,
    adapter_folder,
    empty,
    published,
    read_config,
    with_ranks,
    write_config,
)
from fedex_lora.model.keys import NAMES, PREFIX, adapter_keys
from fedex_lora.model.layer import Layer
from fedex_lora.model.load import locate
from fedex_lora.model.plain import configured, unsupported
from fedex_lora.model.pretrained import Pretrained


def save_adapter(
    state: AdapterState,
    layers: Mapping[str, Layer],
    config: LoraConfig,
    directory: Path,
    base_name: str,
) -> None:
    """Writes `state` as a PEFT adapter relative to the pretrained model.

    Every layer keeps its factors; see `with_ranks` for what the config says of their ranks and
    scales. PEFT knows no rank 0: such a layer gets factors of zeros.
    """
    directory.mkdir(parents=True, exist_ok=True)
    factors = {name: _at_least_rank_1(f) for name, f in sorted(state.layers.items())}
    ranks = {name: (f.rank, f.scale) for name, f in factors.items()}
    written = with_ranks(config.to_dict(), ranks)
    write_config({**written, "base_model_name_or_path": published(base_name)}, directory)
    tensors = {f"{PREFIX}{name}": tensor for name, tensor in state.head.items()}
    for name, f in factors.items():
        a, b = NAMES[layers[name].embedding]
        tensors |= {f"{PREFIX}{name}.{a}": f.A, f"{PREFIX}{name}.{b}": f.B}
    tensors = {key: t.detach().cpu().contiguous() for key, t in tensors.items()}
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})
    shutil.copymode(directory / CONFIG, directory / WEIGHTS)  # safetensors lets only the owner read


def resolved(name: str) -> str:
    """A base model's name that `from_pretrained` understands anywhere on this machine: a hub id
    as it is, else the absolute path.

    Raises:
        UserError: If `name` is a path and no model lies there.

    Example:
        >>> resolved("FacebookAI/roberta-base")
        'FacebookAI/roberta-base'
    """
    where = locate(name)
    return str(Path(where).resolve()) if Path(where).exists() else where


def _at_least_rank_1(f: Factors) -> Factors:
    if f.rank:
        return f
    return Factors(f.A.new_zeros(1, f.A.shape[1]), f.B.new_zeros(f.B.shape[0], 1), f.scale)


def read_adapter(
    directory: Path,
    layers: Mapping[str, Layer],
    head: Mapping[str, Tensor],
    w0: Pretrained,
    any_rank: bool = False,
) -> AdapterState:
    """The adapter in `directory`, if it is one for these layers at their ranks and scales.

    Args:
        any_rank: Other ranks and scales are taken as they are.
        directory: A PEFT adapter with safetensors weights.
        layers: The model's adapted layers.
        head: The model's head; it stays as it is where the adapter has none.
        w0: The pretrained weights.

    Raises:
        UserError: If it is none, has fields that aggregation is not exact for, or does not fit; the
            text says what to set in the recipe.
    """
    directory = adapter_folder(directory)
    config, tensors = _load(directory)
    wanted = {
        name: tuple(f"{name}.{n}" for n in NAMES[la.embedding]) for name, la in layers.items()
    }
    present = {key.partition(".lora_")[0] for key in tensors if ".lora_" in key}
    if present != set(layers):
        raise RecipeError(
            f"lora.init: {directory} adapts other layers than the recipe: "
            f"{_some(present ^ set(layers))}; "
            f"set lora.target_modules: {config.get('target_modules')}"
        )
    factors = {}
    for name, (a, b) in wanted.items():
        factors[name] = _fitting(
            directory, config, name, tensors.pop(a), tensors.pop(b), layers[name].shape, any_rank
        )
    return AdapterState(factors, _read_head(directory, tensors, head, w0))


def _load(directory: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        config, stored = read_config(directory), load_file(directory / WEIGHTS)
    except (UserError, OSError, ValueError, SafetensorError) as error:
        told = stands_for(directory / WEIGHTS)
        told = f"{WEIGHTS} is {told}" if told else f"expected a folder with {CONFIG} and {WEIGHTS}"
        raise RecipeError(f"lora.init: {directory} is no PEFT adapter: {error}; {told}") from error
    name = f"lora.init: {directory}"
    keys = adapter_keys(stored, name).stored
    for original in keys.values():
        if not stored[original].numel():
            raise empty(name, original, stored[original].shape)
    refused = unsupported(config)
    if refused:
        raise RecipeError(
            f"{name} uses {refused}: its training cannot be gone on with exactly; expected a plain "
            "LoRA adapter"
        )
    return config, {k.removeprefix(PREFIX): stored[name].float() for k, name in keys.items()}


def _fitting(
    directory: Path,
    config: Mapping[str, Any],
    name: str,
    a: Tensor,
    b: Tensor,
    layer: LayerShape,
    any_rank: bool,
) -> Factors:
    """A layer's factors at the recipe's rank and scale; rows and columns of zeros are padding."""
    rank = a.shape[0]
    if a.shape[1] != layer.inp or b.shape != (layer.out, rank):
        raise RecipeError(
            f"lora.init: {directory} was made for another model: {name} has ΔW "
            f"{b.shape[0]} × {a.shape[1]} there and {layer.out} × {layer.inp} "
            f"here; set model.name to "
            f"{config.get('base_model_name_or_path')!r}"
        )
    _, scale = configured(config, name, rank)
    if any_rank:
        return Factors(a, b, scale)
    padded = rank > layer.rank and not a[layer.rank :].any() and not b[:, layer.rank :].any()
    if (rank != layer.rank and not padded) or abs(scale - layer.scale) > 1e-6 * abs(scale):
        keys = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern")
        settings = ", ".join(f"{key}: {json.dumps(config[key])}" for key in keys if config.get(key))
        raise RecipeError(
            f"lora.init: {directory} has rank {rank} and scale {scale:g} at {name}, the recipe "
            f"rank {layer.rank} and scale {layer.scale:g}; set in the recipe's lora: {settings}"
        )
    # copies, so that the padding goes
    return Factors(a[: layer.rank].clone(), b[:, : layer.rank].clone(), layer.scale)


def _read_head(
    directory: Path, tensors: Mapping[str, Tensor], head: Mapping[str, Tensor], w0: Pretrained
) -> dict[str, Tensor]:
    new = dict(head)
    for key, tensor in tensors.items():
        site = key.removesuffix(".base_layer.weight")
        if (
            site in w0.layers and site != key
        ):  # PEFT saves adapted embeddings along with the adapter
            layer = w0.layers[site]
            same = tensor.shape == layer.base.weight.shape
            if not (
                same and torch.allclose(layer.oriented(w0(site)), tensor, rtol=1e-2, atol=1e-6)
            ):
                raise RecipeError(f"lora.init: {directory} changes the base weight of {site}")
        elif key not in head or head[key].shape != tensor.shape:
            raise RecipeError(
                f"lora.init: {directory} holds {key} {tuple(tensor.shape)}, which is not "
                "trained here; set lora.modules_to_save and the labels as they were for it"
            )
        else:
            new[key] = tensor
    return new


def _some(names: set[str]) -> str:
    shown = sorted(names)[:3]
    return ", ".join(shown) + (", ..." if len(names) > 3 else "")
