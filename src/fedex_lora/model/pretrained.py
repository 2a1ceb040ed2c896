"""The pretrained weights W0 of the adapted layers, read from files and not kept in memory."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers.utils.hub import cached_file

from fedex_lora.model.layer import Layer
from fedex_lora.model.load import dequantised

_SPILL = "pretrained.safetensors"


class Pretrained:
    """Reads W0 of a layer from the model's own safetensors files.

    A layer's key there may lack a prefix or have one more. Whether the right tensor was found is
    decided by its content: cast to the model's dtype it must equal the loaded weight. Weights that
    are in no file as such (renamed, merged, pickled checkpoints) are written to one file of our
    own. Quantised weights are what the model computes with, so W0 is the dequantised weight.
    """

    def __init__(
        self, layers: Iterable[Layer], where: str | None, config: Any, workdir: Path | None
    ) -> None:
        layers = list(layers)
        keys = (
            {} if where is None else _checkpoint_keys(where, getattr(config, "_commit_hash", None))
        )
        self.layers = {layer.name: layer for layer in layers}
        self.places = {
            layer.name: place
            for layer in layers
            if not layer.quantised and (place := _find(layer, keys)) is not None
        }
        rest = [la for la in layers if la.name not in self.places and not la.quantised]
        if rest:
            self._spill(rest, workdir)

    def __call__(self, name: str) -> Tensor:
        """W0 of a layer: out × in, float32, a fresh tensor on the CPU."""
        layer = self.layers[name]
        if layer.quantised:
            return dequantised(layer.base)
        weight = layer.oriented(_read(*self.places[name]))
        return weight.to(torch.float32, copy=True).contiguous()

    def _spill(self, layers: list[Layer], workdir: Path | None) -> None:
        if workdir is None:
            # removed with this object
            self._temporary = tempfile.TemporaryDirectory(prefix="fedex-lora-")
            workdir = Path(self._temporary.name)
        workdir.mkdir(parents=True, exist_ok=True)
        file = workdir / _SPILL
        weights = {la.name: la.base.weight.detach().cpu().contiguous() for la in layers}
        save_file(weights, file)
        self.places.update({la.name: (file, la.name) for la in layers})


def _read(file: Path, key: str) -> Tensor:
    with safe_open(file, framework="pt") as f:
        return f.get_tensor(key)


def _find(layer: Layer, keys: Mapping[str, Path]) -> tuple[Path, str] | None:
    """The file that has W0 of a layer, and its key there."""
    weight = layer.base.weight.detach()
    for key in _candidates(f"{layer.name}.weight", keys):
        found = _read(keys[key], key)
        if found.shape == weight.shape and torch.equal(found.to(weight.dtype), weight.cpu()):
            return keys[key], key
    return None


def _candidates(name: str, keys: Iterable[str]) -> list[str]:
    """Keys that may stand for the parameter `name`, the likeliest first.

    Example:
        >>> _candidates("bert.layer.0.q.weight", ["layer.0.q.weight", "layer.1.q.weight"])
        ['layer.0.q.weight']
        >>> _candidates("layer.0.q.weight", ["model.layer.0.q.weight"])
        ['model.layer.0.q.weight']
    """
    # weight and its layer's own name at least: "weight" alone would fit anything
    matches = [
        key
        for key in keys
        if key == name
        or (key.count(".") > 0 and name.endswith(f".{key}"))
        or key.endswith(f".{name}")
    ]
    return sorted(matches, key=lambda key: (abs(len(key) - len(name)), key))


def _checkpoint_keys(where: str, revision: str | None) -> dict[str, Path]:
    """Every tensor in the model's safetensors files, with its file; none for other formats."""
    index = _file(where, "model.safetensors.index.json", revision)
    single = _file(where, "model.safetensors", revision)
    if single is not None:
        with safe_open(single, framework="pt") as f:
            return dict.fromkeys(f.keys(), single)
    if index is None:
        return {}
    weight_map = json.loads(index.read_text())["weight_map"]
    files = {shard: _file(where, shard, revision) for shard in sorted(set(weight_map.values()))}
    return {key: file for key, shard in weight_map.items() if (file := files[shard]) is not None}


def _file(where: str, name: str, revision: str | None) -> Path | None:
    hub = {"revision": revision} if revision else {}
    # loading has put it into the cache, if it exists at all
    path = cached_file(
        where, name, local_files_only=True, _raise_exceptions_for_missing_entries=False, **hub
    )
    return None if path is None else Path(path)
