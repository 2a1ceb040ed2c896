"""PEFT LoRA adapters on disk: what they adapt, and their tensors, read one layer at a time."""

from __future__ import annotations

import json
import math
import pickle
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fedex_lora.adapter import Site
from fedex_lora.disk import reason
from fedex_lora.errors import UserError
from fedex_lora.merge.factors import Term, finite
from fedex_lora.model.files import CONFIG, NAMES, PREFIX, WEIGHTS, configured, unsupported

PICKLE = "adapter_model.bin"
_SUFFIXES = {f".{n}": i for names in NAMES.values() for i, n in enumerate(names)}
Shape = tuple[int, ...]
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class Place:
    """One adapted layer in the file.

    Attributes:
        site: ΔW's shape, rank and scale.
        keys: Names of A and B in the file.
    """

    site: Site
    keys: tuple[str, str]

    @property
    def embedding(self) -> bool:
        return self.keys[0].endswith(NAMES[True][0])


@dataclass(frozen=True)
class Adapter:
    """An adapter on disk.

    Attributes:
        name: As the user gave it: a folder or hub id.
        folder: Where it lies.
        file: Its weights.
        config: Its adapter_config.json.
        places: Its layers by module path in the plain model, sorted.
        others: Shapes of all other tensors: modules trained in full, copies of embeddings.
    """

    name: str
    folder: Path
    file: Path
    config: Mapping[str, Any]
    places: Mapping[str, Place]
    others: Mapping[str, Shape]

    def term(self, site: str) -> Term:
        """(A, B, scale) of a layer.

        Raises:
            UserError: A tensor holds NaN or infinity, is none of floating point, is too large for
                float32, or cannot be read.
        """
        place = self.places[site]
        a, b = self.tensors(place.keys)
        for key, factor, scale in zip(place.keys, (a, b), (1.0, place.site.scale)):
            if factor.dtype not in _DTYPES:
                raise UserError(
                    f"{self.name}: {key} in {self.file} has dtype {factor.dtype}; expected one of "
                    f"{', '.join(map(str, _DTYPES))}"
                )
            if not finite(factor.to(torch.float32) * scale):
                raise UserError(
                    f"{self.name}: {key} in {self.file}, times its scale {scale:g}, is too large "
                    "for float32; its training went wrong, leave this adapter out"
                )
        return a, b, place.site.scale

    def tensors(self, keys: Sequence[str]) -> list[Tensor]:
        """Tensors of the file, finite; the file is mapped only as long as they live."""
        found = _read(self.file, keys, self.name)
        for key, tensor in zip(keys, found):
            if not finite(tensor):
                raise UserError(
                    f"{self.name}: {key} in {self.file} holds NaN or infinity; its training went "
                    "wrong, leave this adapter out"
                )
        return found


def open_adapter(name: str, allow_pickle: bool = False) -> Adapter:
    """Reads an adapter's config and the shapes of its tensors.

    Args:
        name: A folder, or a hub id where there is no such folder.
        allow_pickle: Whether adapter_model.bin may be read (with torch's weights_only).

    Raises:
        UserError: It is no adapter, is damaged, or does more than add B·A to a frozen base.
    """
    folder = locate(name, [CONFIG, WEIGHTS, *([PICKLE] if allow_pickle else [])], CONFIG)
    config = _config(folder)
    refused = unsupported(config)
    if refused:
        raise UserError(
            f"{name}: uses {refused}, for which merging is not exact; expected a plain LoRA adapter"
        )
    file = _weights(folder, allow_pickle)
    shapes = _shapes(file, name)
    try:
        places = _places(name, config, shapes)
    except (TypeError, AttributeError, ArithmeticError, re.error) as error:
        raise UserError(f"{folder / CONFIG}: not what PEFT writes: {error}") from None
    taken = {key for place in places.values() for key in place.keys}
    others = {key: shape for key, shape in shapes.items() if key not in taken}
    _check_others(name, others)
    return Adapter(name, folder, file, config, places, others)


def locate(name: str, files: Sequence[str], needed: str, revision: str | None = None) -> Path:
    """The local folder called `name`, or the hub's files downloaded (from its cache if there).

    Args:
        files: Patterns of what to download.
        needed: A file without which it is nothing.
    """
    path = Path(name).expanduser()
    local = name.startswith((".", "/", "~")) or name.count("/") != 1
    if not path.exists() and not local:
        try:
            path = Path(snapshot_download(name, allow_patterns=list(files), revision=revision))
        except (OSError, ValueError) as error:
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(
                f"{name}: no such folder, and not to be had from the hub: {first}"
            ) from (None)
    if not (path / needed).is_file():
        raise UserError(f"{name}: there is no {path / needed}; expected a folder with it")
    return path


def _config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / CONFIG).read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / CONFIG}: cannot be read: {reason(error)}") from None
    if not isinstance(config, dict):
        raise UserError(f"{folder / CONFIG}: not what PEFT writes: expected a JSON object")
    modules = config.get("modules_to_save")
    if not (modules is None or _names(modules)):
        raise UserError(
            f"{folder / CONFIG}: modules_to_save is {modules!r}; expected a list of names"
        )
    return config


def _names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, str) for one in value)


def _weights(folder: Path, allow_pickle: bool) -> Path:
    if (folder / WEIGHTS).is_file():
        return folder / WEIGHTS
    pickled = folder / PICKLE
    if pickled.is_file() and allow_pickle:
        return pickled
    if pickled.is_file():
        raise UserError(
            f"{pickled} is a pickle, which may run code; save the adapter as safetensors, or trust "
            "it with --allow-pickle (it is still read as plain tensors only)"
        )
    raise UserError(f"{folder}: there is no {WEIGHTS}; expected it beside {CONFIG}")


def _places(name: str, config: Mapping[str, Any], shapes: Mapping[str, Shape]) -> dict[str, Place]:
    halves: dict[str, dict[int, str]] = {}
    for key in shapes:
        suffix = next((s for s in _SUFFIXES if key.endswith(s)), None)
        if suffix:
            site = key.removeprefix(PREFIX).removesuffix(suffix)
            halves.setdefault(site, {})[_SUFFIXES[suffix]] = key
    if not halves:
        raise UserError(f"{name}: holds no LoRA factors")
    return {site: _place(name, config, site, halves[site], shapes) for site in sorted(halves)}


def _place(
    name: str,
    config: Mapping[str, Any],
    site: str,
    keys: Mapping[int, str],
    shapes: Mapping[str, Shape],
) -> Place:
    if len(keys) != 2:
        raise UserError(f"{name}: {site} has only one of its two factors: {keys}; it is damaged")
    a, b = shapes[keys[0]], shapes[keys[1]]
    if len(a) != 2 or len(b) != 2 or a[0] != b[1] or not a[0]:
        raise UserError(
            f"{name}: {site} has factors A {a} and B {b}; expected A (r, in) and B (out, r) of a "
            "Linear, Conv1D or Embedding layer"
        )
    rank, scale = configured(config, site, a[0])
    if rank != a[0]:
        raise UserError(
            f"{name}: {site} has rank {a[0]} in the file and {rank} in {CONFIG}; it is damaged"
        )
    if not math.isfinite(scale):
        raise UserError(f"{name}: {site} has the scale {scale} by {CONFIG}; it is damaged")
    return Place(Site(b[0], a[1], rank, float(scale)), (keys[0], keys[1]))


def _check_others(name: str, others: Mapping[str, Shape]) -> None:
    unknown = sorted(key for key in others if ".lora_" in key)
    if unknown:
        raise UserError(
            f"{name}: holds {unknown[0]}, which is no factor of a Linear, Conv1D or Embedding "
            "layer; expected a plain LoRA adapter as PEFT saves it"
        )


def _shapes(file: Path, name: str) -> dict[str, Shape]:
    try:
        if file.name == PICKLE:
            return {key: tuple(t.shape) for key, t in _unpickled(file).items()}
        with safe_open(file, framework="pt") as f:
            return {key: tuple(f.get_slice(key).get_shape()) for key in f.keys()}  # noqa: SIM118
    except _UNREADABLE as error:
        raise _damaged(file, name, error) from None


def _read(file: Path, keys: Sequence[str], name: str) -> list[Tensor]:
    try:
        if file.name == PICKLE:
            tensors = _unpickled(file)
            return [tensors[key] for key in keys]
        with safe_open(file, framework="pt") as f:
            return [f.get_tensor(key) for key in keys]
    except _UNREADABLE as error:
        raise _damaged(file, name, error) from None


def _unpickled(file: Path) -> dict[str, Tensor]:
    tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    if not isinstance(tensors, dict) or not all(isinstance(t, Tensor) for t in tensors.values()):
        raise ValueError("it holds something else than tensors by name")
    return tensors


_UNREADABLE = (OSError, ValueError, RuntimeError, EOFError, SafetensorError)
_UNREADABLE += (pickle.UnpicklingError,)


def _damaged(file: Path, name: str, error: Exception) -> UserError:
    why = reason(error).strip().splitlines()[0]
    return UserError(f"{name}: {file} cannot be read ({why}); it is truncated or damaged")
