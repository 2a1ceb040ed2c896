"""PEFT adapters on disk: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

import copy
import json
import re
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from fedex_lora.aggregation.adapter import AdapterState, Factors, Site
from fedex_lora.errors import UserError
from fedex_lora.model.keys import NAMES, PREFIX, adapter_keys
from fedex_lora.model.layer import Layer
from fedex_lora.model.load import locate
from fedex_lora.model.plain import configured, unsupported
from fedex_lora.model.pretrained import Pretrained

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


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
    sites = {name: _at_least_rank_1(f) for name, f in sorted(state.sites.items())}
    config = with_ranks(config, {name: (f.rank, f.scale) for name, f in sites.items()})
    config.base_model_name_or_path = published(base_name)
    config.save_pretrained(str(directory))
    tensors = {f"{PREFIX}{name}": tensor for name, tensor in state.head.items()}
    for name, f in sites.items():
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


def published(name: str) -> str:
    """What an adapter calls its base model: nothing that only this machine understands.

    A hub id as it is, also where the model is read from the hub's cache; `package:NAME/SUB` as it
    is; of any other folder its name.

    Example:
        >>> published("FacebookAI/roberta-base"), published("/home/ann/models/mine/")
        ('FacebookAI/roberta-base', 'mine')
        >>> published("/cache/hub/models--FacebookAI--roberta-base/snapshots/e2da8e2")
        'FacebookAI/roberta-base'
    """
    if name.startswith("package:"):
        return name
    cached = re.search(r"(?:^|[/\\])models--([^/\\]+?)--([^/\\]+)", name)
    if cached:
        return f"{cached[1]}/{cached[2]}"
    path = Path(name).expanduser()
    local = path.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1
    return path.resolve().name if local else name


def with_ranks(
    config: Any, sites: Mapping[str, tuple[int, float]], like: str | None = None
) -> LoraConfig:
    """A copy of a `LoraConfig` for a file, by which every layer has this (rank, scale).

    `r` and `lora_alpha` are those of most layers (or of the layer `like`), others get patterns.
    rsLoRA's √r goes into the alphas: not every program that reads adapters knows it.
    """
    config = copy.deepcopy(config)
    config.inference_mode, config.use_rslora = True, False
    config.rank_pattern, config.alpha_pattern = {}, {}
    alphas = {name: _alpha(scale * rank) for name, (rank, scale) in sites.items()}
    ranks = {name: rank for name, (rank, _) in sites.items()}
    config.r, config.lora_alpha = (
        values[like] if like else Counter(values.values()).most_common(1)[0][0]
        for values in (ranks, alphas)
    )
    for name, rank in ranks.items():
        pattern = f"^{re.escape(name)}"  # anchored: PEFT matches the ends of names
        if rank != config.r:
            config.rank_pattern[pattern] = rank
        if alphas[name] != config.lora_alpha:
            config.alpha_pattern[pattern] = alphas[name]
    for field in ("target_modules", "exclude_modules", "modules_to_save"):
        value = getattr(config, field)
        if isinstance(value, list | set):  # a set's order changes from process to process
            setattr(config, field, sorted(set(value)))
    return config


def _alpha(alpha: float) -> float:
    return round(alpha) if abs(alpha - round(alpha)) < 1e-9 else alpha


SERVER_LIMITS = (64, 128, 256)  # largest ranks that programs which serve adapters are set up for


def above_limits(rank: int, would_miss: Mapping[int, float]) -> list[str]:
    """What to know of an adapter of that rank, if it is a large one.

    Args:
        would_miss: By rank, how much of the change an adapter cut to it would miss.

    Example:
        >>> above_limits(100, {64: 0.01, 128: 0.0, 256: 0.0})[0][:68]
        'rank 100 is above 64, where programs that serve adapters often stop '
    """
    limits = [limit for limit in SERVER_LIMITS if rank > limit]
    if not limits:
        return []
    costs = ", ".join(f"--rank {r} would miss {would_miss[r]:.2g} of the change" for r in limits)
    return [
        f"rank {rank} is above {', '.join(map(str, limits))}, where programs that serve adapters "
        f"often stop (vLLM: --max-lora-rank); {costs}"
    ]


def misread(directory: Path) -> list[str]:
    """Which programs read the adapter in a directory wrongly, and by how much."""
    config = json.loads((directory / CONFIG).read_text())
    with safe_open(directory / WEIGHTS, framework="pt") as file:
        shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118
    ends = [f".{names[0]}" for names in NAMES.values()]
    ranks = {
        key.removeprefix(PREFIX).removesuffix(end): shape[0]
        for key, shape in shapes.items()
        for end in ends
        if key.endswith(end)
    }
    # of the rest the tensors hold the ranks of many experts
    layers = {site: r for site, r in ranks.items() if configured(config, site, r)[0] == r}
    return misreaders(config, layers)


def misreaders(config: Mapping[str, Any], ranks: Mapping[str, int]) -> list[str]:
    """Which programs read such an adapter wrongly, and by how much.

    PEFT takes every layer's rank and alpha from the patterns. vLLM and others scale all layers by
    `lora_alpha / r`, llama.cpp each by `lora_alpha` over the rank of its tensor.

    Args:
        config: The adapter_config.json.
        ranks: Of the layers' tensors.

    Example:
        >>> told = misreaders({"r": 4, "lora_alpha": 8, "alpha_pattern": {"k": 4}}, {"k": 4})
        >>> told[1].partition(", ")[2]
        'which scales a layer by lora_alpha / its rank, applies 2 × what PEFT does in 1 of 1 layers'
    """
    alpha, r = config["lora_alpha"], config["r"]
    told = []
    for who, scale in (
        ("vLLM, which scales all layers by lora_alpha / r", lambda rank: alpha / r),
        ("llama.cpp, which scales a layer by lora_alpha / its rank", lambda rank: alpha / rank),
    ):
        factors = [scale(rank) / configured(config, site, rank)[1] for site, rank in ranks.items()]
        wrong = [factor for factor in factors if abs(factor - 1) > 1e-6]
        if wrong:
            least, most = f"{min(wrong):.3g}", f"{max(wrong):.3g}"
            span = least if least == most else f"{least} to {most}"
            told.append(
                f"{who}, applies {span} × what PEFT does in {len(wrong)} of {len(factors)} layers"
            )
    return told


def _at_least_rank_1(f: Factors) -> Factors:
    if f.rank:
        return f
    return Factors(f.A.new_zeros(1, f.A.shape[1]), f.B.new_zeros(f.B.shape[0], 1), f.scale)


def read_adapter(
    directory: Path, layers: Mapping[str, Layer], head: Mapping[str, Tensor], w0: Pretrained
) -> AdapterState:
    """The adapter in `directory`, if it is one for these layers at their ranks and scales.

    Args:
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
        raise UserError(
            f"lora.init: {directory} adapts other layers than the recipe: "
            f"{_some(present ^ set(layers))}; "
            f"set lora.target_modules: {config.get('target_modules')}"
        )
    sites = {}
    for name, (a, b) in wanted.items():
        sites[name] = _fitting(
            directory, config, name, tensors.pop(a), tensors.pop(b), layers[name].site
        )
    return AdapterState(sites, _read_head(directory, tensors, head, w0))


def _load(directory: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        config = json.loads((directory / CONFIG).read_text())
        stored = load_file(directory / WEIGHTS)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(
            f"lora.init: {directory} is no PEFT adapter: {error}; "
            f"expected a folder with {CONFIG} and {WEIGHTS}"
        ) from error
    name = f"lora.init: {directory}"
    keys = adapter_keys(stored, name).stored
    for original in keys.values():
        if not stored[original].numel():
            raise empty(name, original, stored[original].shape)
    refused = unsupported(config)
    if refused:
        raise UserError(
            f"{name} uses {refused}: its training cannot be gone on with exactly; expected a plain "
            "LoRA adapter"
        )
    return config, {k.removeprefix(PREFIX): stored[name].float() for k, name in keys.items()}


def adapter_folder(path: Path) -> Path:
    """Where the adapter lies that `path` names: there, or in the one subfolder that has one.

    PEFT puts adapters that are not called "default" into a subfolder.

    Returns:
        `path` itself where there is none.

    Raises:
        UserError: Several subfolders have one.
    """
    if path.is_file() and (path.parent / CONFIG).is_file():
        return path.parent
    if not path.is_dir() or (path / CONFIG).is_file():
        return path
    found = sorted(p.parent for deep in ("*", "*/*") for p in path.glob(f"{deep}/{CONFIG}"))
    if len(found) > 1:
        names = ", ".join(str(folder) for folder in found[:8])
        more = f" and {len(found) - 8} more" if len(found) > 8 else ""
        raise UserError(f"{path}: there are adapters in {names}{more}; name one of them")
    return found[0] if found else path


def empty(name: str, key: str, shape: Sequence[int]) -> UserError:
    """What is wrong with a tensor of no elements."""
    return UserError(
        f"{name}: {key} is empty, of size {tuple(shape)}: DeepSpeed ZeRO-3 (or FSDP) saved it "
        "without gathering its parts. Save it once more with "
        "stage3_gather_16bit_weights_on_model_save: true, or get the weights out of the training "
        "checkpoint with DeepSpeed's zero_to_fp32.py"
    )


def _fitting(
    directory: Path, config: Mapping[str, Any], name: str, a: Tensor, b: Tensor, site: Site
) -> Factors:
    """A layer's factors at the recipe's rank and scale; rows and columns of zeros are padding."""
    rank = a.shape[0]
    if a.shape[1] != site.inp or b.shape != (site.out, rank):
        raise UserError(
            f"lora.init: {directory} was made for another model: {name} has ΔW "
            f"{b.shape[0]} × {a.shape[1]} there and {site.out} × {site.inp} "
            f"here; set model.name to "
            f"{config.get('base_model_name_or_path')!r}"
        )
    _, scale = configured(config, name, rank)
    padded = rank > site.rank and not a[site.rank :].any() and not b[:, site.rank :].any()
    if (rank != site.rank and not padded) or abs(scale - site.scale) > 1e-6 * abs(scale):
        keys = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern")
        settings = ", ".join(f"{key}: {json.dumps(config[key])}" for key in keys if config.get(key))
        raise UserError(
            f"lora.init: {directory} has rank {rank} and scale {scale:g} at {name}, the recipe "
            f"rank {site.rank} and scale {site.scale:g}; set in the recipe's lora: {settings}"
        )
    # copies, so that the padding goes
    return Factors(a[: site.rank].clone(), b[:, : site.rank].clone(), site.scale)


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
                raise UserError(f"lora.init: {directory} changes the base weight of {site}")
        elif key not in head or head[key].shape != tensor.shape:
            raise UserError(
                f"lora.init: {directory} holds {key} {tuple(tensor.shape)}, which is not "
                "trained here; set lora.modules_to_save and the labels as they were for it"
            )
        else:
            new[key] = tensor
    return new


def _some(names: set[str]) -> str:
    shown = sorted(names)[:3]
    return ", ".join(shown) + (", ..." if len(names) > 3 else "")
