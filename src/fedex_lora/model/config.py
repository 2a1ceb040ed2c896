"""What PEFT keeps of an adapter beside its weights: adapter_config.json, as a mapping.

Needs neither PEFT nor transformers, so that adapters are merged without them.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open

from fedex_lora.disk import reason, stands_for
from fedex_lora.errors import DataError, RecipeError, StorageError
from fedex_lora.model.keys import NAMES, PREFIX
from fedex_lora.model.plain import configured

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def read_config(folder: Path) -> dict[str, Any]:
    """A folder's adapter_config.json, also with a byte order mark, as Windows' editors save it.

    Raises:
        UserError: It cannot be read, or is no JSON object.
    """
    try:
        config = json.loads((folder / CONFIG).read_bytes())
    except (OSError, ValueError) as error:
        told = stands_for(folder / CONFIG)
        why = f"it is {told}" if told else reason(error)
        raise StorageError(f"{folder / CONFIG}: cannot be read: {why}") from None
    if not isinstance(config, dict):
        raise DataError(f"{folder / CONFIG}: not what PEFT writes: expected a JSON object")
    return config


def write_config(config: Mapping[str, Any], directory: Path) -> None:
    """Writes an adapter_config.json, as PEFT would."""
    text = json.dumps(config, indent=2, sort_keys=True, default=list)
    (directory / CONFIG).write_text(text)


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
    if cached := hub_id(name):
        return cached
    path = Path(name).expanduser()
    local = path.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1
    return path.resolve().name if local else name


def hub_id(name: str) -> str | None:
    """The id of a model whose folder in the hub's cache that is, on whatever machine."""
    cached = re.search(r"(?:^|[/\\])models--([^/\\]+?)--([^/\\]+)", name)
    return f"{cached[1]}/{cached[2]}" if cached else None


def with_ranks(
    config: Mapping[str, Any], layers: Mapping[str, tuple[int, float]], like: str | None = None
) -> dict[str, Any]:
    """A copy of an adapter's config by which every layer has this (rank, scale).

    `r` and `lora_alpha` are those of most layers (or of the layer `like`), others get patterns.
    rsLoRA's √r goes into the alphas: not every program that reads adapters knows it.
    """
    alphas = {name: _alpha(scale * rank) for name, (rank, scale) in layers.items()}
    ranks = {name: rank for name, (rank, _) in layers.items()}
    r, alpha = (
        values[like] if like else Counter(values.values()).most_common(1)[0][0]
        for values in (ranks, alphas)
    )
    named = {name: f"^{re.escape(name)}" for name in layers}  # anchored: PEFT matches the ends
    new = {
        **config,
        "inference_mode": True,
        "use_rslora": False,
        "r": r,
        "lora_alpha": alpha,
        "rank_pattern": {named[name]: other for name, other in ranks.items() if other != r},
        "alpha_pattern": {named[name]: other for name, other in alphas.items() if other != alpha},
    }
    for field in ("target_modules", "exclude_modules", "modules_to_save"):
        if isinstance(new.get(field), list | set):  # a set's order changes with the process
            new[field] = sorted(set(new[field]))
    return new


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
    costs = ", ".join(f"`rank={r}` would miss {would_miss[r]:.2g} of the change" for r in limits)
    return [
        f"rank {rank} is above {', '.join(map(str, limits))}, where programs that serve adapters "
        f"often stop (vLLM: max_lora_rank); {costs}"
    ]


def misread(directory: Path) -> list[str]:
    """Which programs read the adapter in a directory wrongly, and by how much."""
    config = read_config(directory)
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
    layers = {layer: r for layer, r in ranks.items() if configured(config, layer, r)[0] == r}
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
        raise RecipeError(f"{path}: there are adapters in {names}{more}; name one of them")
    return found[0] if found else path


def empty(name: str, key: str, shape: Sequence[int]) -> DataError:
    """What is wrong with a tensor of no elements."""
    return DataError(
        f"{name}: {key} is empty, of size {tuple(shape)}: DeepSpeed ZeRO-3 (or FSDP) saved it "
        "without gathering its parts. Save it once more with "
        "stage3_gather_16bit_weights_on_model_save: true, or get the weights out of the training "
        "checkpoint with DeepSpeed's zero_to_fp32.py"
    )
