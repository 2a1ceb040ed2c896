"""PEFT LoRA adapters on disk: what they adapt, and their tensors, read one layer at a time."""

from __future__ import annotations

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

from fedex_lora.aggregation.adapter import LayerShape
from fedex_lora.disk import reason, stands_for
from fedex_lora.errors import DataError, StorageError, some
from fedex_lora.merge.experts import Form, forms
from fedex_lora.merge.factors import Term, finite
from fedex_lora.merge.tokens import indices, of_tokens
from fedex_lora.model.config import CONFIG, WEIGHTS, adapter_folder, empty, read_config
from fedex_lora.model.keys import NAMES, PREFIX, adapter_keys
from fedex_lora.model.plain import unsupported

PICKLE = "adapter_model.bin"
WHERE = ("layer_replication", "alora_invocation_tokens")
"""Fields that say where ΔW is added, and not what it is."""
# trained biases and tokens are averaged, experts merged one by one, tied factors apart
_DEALT_WITH = frozenset(
    {"bias", "trainable_token_indices", "target_parameters", "ensure_weight_tying", *WHERE}
)
_SUFFIXES = {f".{n}": i for names in NAMES.values() for i, n in enumerate(names)}
Shape = tuple[int, ...]
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class Place:
    """One adapted layer in the file.

    Attributes:
        shape: ΔW's shape, rank and scale; of one expert.
        keys: PEFT's names of A and B.
        experts: How many matrices of that shape there are. A holds the experts' rows one after
            the other, B's columns belong to the experts in turn.
    """

    shape: LayerShape
    keys: tuple[str, str]
    experts: int = 1

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
        others: Shapes of all other tensors, by PEFT's names: modules trained in full, copies of
            embeddings.
        stored: The names in the file by PEFT's.
        left_out: How many tensors in the file belong to the base model.
    """

    name: str
    folder: Path
    file: Path
    config: Mapping[str, Any]
    places: Mapping[str, Place]
    others: Mapping[str, Shape]
    stored: Mapping[str, str]
    left_out: int = 0

    def terms(self, layer: str) -> list[Term]:
        """(A, B, scale) of a layer, one for each of its experts.

        Raises:
            UserError: A tensor holds NaN or infinity, is none of floating point, is too large for
                float32, or cannot be read.
        """
        place = self.places[layer]
        a, b = self.tensors(place.keys)
        for key, factor, scale in zip(place.keys, (a, b), (1.0, place.shape.scale)):
            self._check_dtype(key, factor)
            if not finite(factor.to(torch.float32) * scale):
                raise DataError(
                    f"{self.name}: {key} in {self.file}, times its scale {scale:g}, is too large "
                    "for float32; its training went wrong, leave this adapter out"
                )
        n, scale = place.experts, place.shape.scale
        return [(a[i * len(a) // n :][: len(a) // n], b[:, i::n], scale) for i in range(n)]

    def tensors(self, keys: Sequence[str]) -> list[Tensor]:
        """Tensors by PEFT's names, finite; the file is mapped only as long as they live."""
        found = _read(self.file, [self.stored[key] for key in keys], self.name)
        for key, tensor in zip(keys, found):
            if tensor.is_floating_point():
                self._check_dtype(key, tensor)
            if not finite(tensor):
                raise DataError(
                    f"{self.name}: {key} in {self.file} holds NaN or infinity; its training went "
                    "wrong, leave this adapter out"
                )
        return found

    def _check_dtype(self, key: str, tensor: Tensor) -> None:
        if tensor.dtype not in _DTYPES:
            raise DataError(
                f"{self.name}: {key} in {self.file} has dtype {tensor.dtype}; expected one of "
                f"{', '.join(map(str, _DTYPES))}"
            )


def open_adapter(name: str, allow_pickle: bool = False) -> Adapter:
    """Reads an adapter's config and the shapes of its tensors.

    Args:
        name: A folder (or one with a subfolder that has the adapter), or a hub id where there is
            no such folder, with `:SUBFOLDER` if need be.
        allow_pickle: Whether adapter_model.bin may be read (with torch's weights_only).

    Raises:
        UserError: It is no adapter, is damaged, or does more than add B·A to a frozen base.
    """
    folder = _find(name, allow_pickle)
    config = _config(folder)
    refused = unsupported(config, _DEALT_WITH)
    if refused:
        raise DataError(
            f"{name}: uses {refused}: the mean of such adapters is not the mean of their B·A; "
            "expected a plain LoRA adapter"
        )
    file = _weights(folder, allow_pickle)
    found = _shapes(file, name)
    keys = adapter_keys(found, name)
    shapes = {key: found[stored] for key, stored in keys.stored.items()}
    for key, shape in shapes.items():
        if 0 in shape:
            raise empty(name, key, shape)
    try:
        places = _places(name, config, shapes, file)
    except (TypeError, AttributeError, ArithmeticError, re.error) as error:
        raise DataError(f"{folder / CONFIG}: not what PEFT writes: {error}") from None
    taken = {key for place in places.values() for key in place.keys}
    others = {key: shape for key, shape in shapes.items() if key not in taken}
    _check_others(name, config, others)
    return Adapter(name, folder, file, config, places, others, keys.stored, len(keys.left_out))


def _find(name: str, allow_pickle: bool) -> Path:
    files = [CONFIG, WEIGHTS, *([PICKLE] if allow_pickle else [])]
    path = Path(name).expanduser()
    if path.exists() or is_local(name):
        path = adapter_folder(path)
    else:
        repository, _, within = name.partition(":")
        path = download(repository, [f"{within}/{f}" if within else f for f in files]) / within
        if not within and not (path / CONFIG).is_file():
            root = download(name, [f"*/{CONFIG}"])
            there = adapter_folder(root).relative_to(root).as_posix()
            path = download(name, [f"{there}/{file}" for file in files]) / there
    if not (path / CONFIG).is_file():
        raise StorageError(f"{name}: there is no {path / CONFIG}; expected a folder with it")
    return path


def is_local(name: str) -> bool:
    """Whether that can be no hub id (which may be followed by `:SUBFOLDER`)."""
    return name.startswith((".", "/", "~")) or name.partition(":")[0].count("/") != 1


def download(name: str, files: Sequence[str], revision: str | None = None) -> Path:
    """A hub repository's files, from the hub or its cache.

    Args:
        files: Patterns of what to download.
    """
    try:
        return Path(snapshot_download(name, allow_patterns=list(files), revision=revision))
    except (OSError, ValueError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise StorageError(
            f"{name}: no such folder, and not to be had from the hub: {first}"
        ) from None


def _config(folder: Path) -> dict[str, Any]:
    config = read_config(folder)
    for fields, expected, fits in _FORMS:
        for field in fields:
            value = config.get(field)
            absent = value is None and (field not in _NUMBERS or field not in config)
            if not (absent or fits(value)):
                raise DataError(f"{folder / CONFIG}: {field} is {value!r}; expected {expected}")
    return config


def _all_of(value: Any, *kinds: type) -> bool:
    """Whether that has values of these kinds alone, by name."""
    return not value or (isinstance(value, dict) and all(type(n) in kinds for n in value.values()))


_NUMBERS = ("r", "lora_alpha")  # PEFT has its own where they are left out, and none for null
_FORMS = (
    (
        ("modules_to_save", "target_parameters"),
        "a list of names",
        lambda value: isinstance(value, list) and all(isinstance(one, str) for one in value),
    ),
    (
        ("task_type", "base_model_name_or_path", "revision", "bias"),
        "a text",
        lambda value: isinstance(value, str),
    ),
    (("auto_mapping",), "an object", lambda value: isinstance(value, dict)),
    (("r",), "a whole number", lambda value: type(value) is int),
    (("lora_alpha",), "a number", lambda value: type(value) in (int, float)),
    (
        ("rank_pattern",),
        "numbers by the names of layers, whole ones",
        lambda value: _all_of(value, int),
    ),
    (
        ("alpha_pattern",),
        "numbers by the names of layers",
        lambda value: _all_of(value, int, float),
    ),
)


def _weights(folder: Path, allow_pickle: bool) -> Path:
    if (folder / WEIGHTS).is_file():
        return folder / WEIGHTS
    pickled = folder / PICKLE
    if pickled.is_file() and allow_pickle:
        return pickled
    if pickled.is_file():
        raise DataError(
            f"{pickled} is a pickle, which may run code; save the adapter as safetensors, or trust "
            "it with `allow_pickle` (it is still read as plain tensors only)"
        )
    if told := stands_for(folder / WEIGHTS):
        raise StorageError(f"{folder / WEIGHTS} is {told}")
    others = sorted(file.name for file in folder.glob("*.safetensors"))
    there = f"; there is {some(others, 3)}" if others else ""
    raise StorageError(f"{folder}: there is no {WEIGHTS}; expected it beside {CONFIG}{there}")


def _places(
    name: str, config: Mapping[str, Any], shapes: Mapping[str, Shape], file: Path
) -> dict[str, Place]:
    halves: dict[str, dict[int, str]] = {}
    for key in shapes:
        suffix = next((s for s in _SUFFIXES if key.endswith(s)), None)
        if suffix:
            layer = key.removeprefix(PREFIX).removesuffix(suffix)
            halves.setdefault(layer, {})[_SUFFIXES[suffix]] = key
    if not halves:
        raise DataError(f"{name}: {file} holds no LoRA factors ({_content(shapes)})")
    rows = {layer: _rows(name, layer, halves[layer], shapes) for layer in sorted(halves)}
    found = forms(name, config, rows)
    return {layer: _place(name, layer, halves[layer], shapes, found[layer]) for layer in rows}


def _content(shapes: Mapping[str, Shape]) -> str:
    if not shapes:
        return "it has no tensors: their saving went wrong"
    return f"but {min(shapes)}, ...; expected names such as {PREFIX}LAYER.lora_A.weight"


def _rows(name: str, layer: str, keys: Mapping[int, str], shapes: Mapping[str, Shape]) -> int:
    if len(keys) != 2:
        raise StorageError(
            f"{name}: {layer} has only one of its two factors: {keys}; it is damaged"
        )
    a, b = shapes[keys[0]], shapes[keys[1]]
    if len(a) != 2 or len(b) != 2 or a[0] != b[1]:
        raise DataError(
            f"{name}: {layer} has factors A {a} and B {b}; expected A (r, in) and B (out, r) of a "
            "Linear, Conv1D or Embedding layer"
        )
    return a[0]


def _place(
    name: str, layer: str, keys: Mapping[int, str], shapes: Mapping[str, Shape], form: Form
) -> Place:
    if not math.isfinite(form.scale):
        raise StorageError(f"{name}: {layer} has the scale {form.scale} by {CONFIG}; it is damaged")
    out, inp = shapes[keys[1]][0], shapes[keys[0]][1]
    return Place(LayerShape(out, inp, form.rank, form.scale), (keys[0], keys[1]), form.experts)


def _check_others(name: str, config: Mapping[str, Any], others: Mapping[str, Shape]) -> None:
    for key in filter(of_tokens, others):
        if len(indices(name, config, key)) != others[key][0]:
            raise DataError(
                f"{name}: {key} has {others[key][0]} rows, trainable_token_indices in {CONFIG} "
                "another number of tokens; they are not of one adapter"
            )
    unknown = sorted(key for key in others if ".lora_" in key)
    if unknown:
        raise DataError(
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


def _damaged(file: Path, name: str, error: Exception) -> StorageError:
    why = reason(error).strip().splitlines()[0]
    told = stands_for(file) or "truncated or damaged"
    return StorageError(f"{name}: {file} cannot be read ({why}); it is {told}")
