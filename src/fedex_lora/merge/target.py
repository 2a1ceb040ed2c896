"""A full model on disk: its tensors, and what they are called in the model that adapters change."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from fedex_lora.disk import reason
from fedex_lora.errors import UserError
from fedex_lora.merge.adapters import Place, Shape, download, is_local
from fedex_lora.merge.tensor_file import DTYPES
from fedex_lora.model.layer import transposed
from fedex_lora.model.load import quiet

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
_FILES = ["*.json", "*.txt", "*.model", "*.jinja", "*.safetensors"]
AUTO = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}


@dataclass(frozen=True)
class Stored:
    """A tensor in a file."""

    file: Path
    key: str
    shape: Shape
    dtype: torch.dtype

    def read(self) -> Tensor:
        with safe_open(self.file, framework="pt") as f:
            return f.get_tensor(self.key)


@dataclass(frozen=True)
class Target:
    """A model to add updates to.

    Attributes:
        folder: Where it lies.
        config: Its transformers config.
        auto_model: The class in transformers to load it with.
        net: The model on the meta device: names, shapes and kinds, no numbers.
        stored: Every tensor on disk by its name in `net` (or its own, if `net` has none such).
        relabelled: Whether its number of labels was set to that of the adapters' head.
    """

    folder: Path
    config: Any
    auto_model: str
    net: Any
    stored: Mapping[str, Stored]
    relabelled: bool

    @cached_property
    def _tied(self) -> dict[str, list[str]]:
        by_id: dict[int, list[str]] = defaultdict(list)
        for name, parameter in self.net.named_parameters(remove_duplicate=False):
            by_id[id(parameter)].append(name)
        return {name: names for names in by_id.values() for name in names}

    def tied(self, name: str) -> list[str]:
        """All names of the parameter called `name`, that one included."""
        return self._tied.get(name, [name])

    def source(self, name: str) -> Stored | None:
        """Where the parameter's pretrained value is; a tied one is under one of its names."""
        found = [n for n in (name, *self.tied(name)) if n in self.stored]
        return self.stored[found[0]] if found else None

    def check_site(self, site: str, place: Place) -> None:
        """Raises a `UserError` if the model has no such layer, or one of another shape or kind."""
        try:
            layer = self.net.get_submodule(site)
        except AttributeError:
            raise UserError(
                f"--into-base: {self.folder} as {self.auto_model} has no layer {site}; name the "
                "model that the adapters were trained on"
            ) from None
        if not isinstance(layer, nn.Linear | nn.Embedding | transformers.pytorch_utils.Conv1D):
            raise UserError(f"--into-base: {site} is a {type(layer).__name__}; cannot be changed")
        shape = tuple(layer.weight.shape)  # type: ignore[arg-type]
        out, inp = reversed(shape) if transposed(layer) else shape
        if (out, inp) != (place.site.out, place.site.inp):
            raise UserError(
                f"--into-base: {site} is {out} × {inp} in {self.folder} and {place.site.out} × "
                f"{place.site.inp} in the adapters; name the model that they were trained on"
            )
        if self.source(f"{site}.weight") is None:
            raise UserError(
                f"--into-base: the files of {self.folder} hold no tensor for {site}.weight: "
                "transformers fuses or renames it when loading. Save the model once more with "
                "save_pretrained of this transformers version"
            )

    def turned(self, site: str) -> bool:
        """Whether the layer holds its weight as in × out."""
        return transposed(self.net.get_submodule(site))


def open_target(name: str, adapter: Mapping[str, Any], heads: Mapping[str, Shape]) -> Target:
    """The model `name`, as the class that the adapters were trained on.

    Args:
        name: A folder or hub id.
        adapter: An adapter's config; its task type names the class.
        heads: Shapes of tensors that will replace or join the model's own.

    Raises:
        UserError: There is no such model, its files are not safetensors or damaged, it is
            quantised, or heads do not fit it.
    """
    revision = adapter.get("revision") if adapter.get("base_model_name_or_path") == name else None
    folder = _locate(name, revision)
    try:
        config = transformers.AutoConfig.from_pretrained(folder)
        if getattr(config, "quantization_config", None):
            raise UserError(f"--into-base: {folder} is quantised; name the model it was made from")
        auto_model = _auto_model(adapter, config)
        net, relabelled = _skeleton(auto_model, config, heads)
    except (OSError, ValueError, KeyError, AttributeError, ImportError) as error:
        if isinstance(error, UserError):
            raise
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"--into-base: {folder} is no model that transformers knows: {first}"
        ) from (None)
    known, prefix = set(net.state_dict()), f"{net.base_model_prefix}."
    stored = {_named(key, known, prefix): s for key, s in _stored(folder).items()}
    return Target(folder, config, auto_model, net, stored, relabelled)


def _locate(name: str, revision: str | None) -> Path:
    path = Path(name).expanduser()
    if not path.exists() and not is_local(name):
        path = download(name, _FILES, revision)
    if not (path / "config.json").is_file():
        raise UserError(f"{name}: there is no {path / 'config.json'}; expected a model's folder")
    return path


def _auto_model(adapter: Mapping[str, Any], config: Any) -> str:
    task, mapped = adapter.get("task_type"), adapter.get("auto_mapping") or {}
    architectures = config.architectures or ["AutoModel"]
    return AUTO.get(task or "") or mapped.get("base_model_class") or architectures[0]


def _skeleton(auto_model: str, config: Any, heads: Mapping[str, Shape]) -> tuple[Any, bool]:
    """The model without numbers, its labels as many as the heads have."""
    net = _build(auto_model, config)
    labels = {shape[0] for shape in _misfits(net, heads).values() if shape}
    if len(labels) == 1 and auto_model in (AUTO["SEQ_CLS"], AUTO["TOKEN_CLS"]):
        config.num_labels = labels.pop()
        net = _build(auto_model, config)
        relabelled = True
    else:
        relabelled = False
    for name, shape in _misfits(net, heads).items():
        own = net.state_dict().get(name)
        raise UserError(
            f"--into-base: {name} is {shape} in the adapters and "
            f"{'absent' if own is None else tuple(own.shape)} in a {type(net).__name__}; expected "
            "the model that they were trained on (with as many tokens and labels)"
        )
    return net, relabelled


def _build(auto_model: str, config: Any) -> Any:
    cls = getattr(transformers, auto_model)
    with quiet(), torch.device("meta"):
        return cls.from_config(config) if auto_model.startswith("Auto") else cls(config)


def _misfits(net: Any, heads: Mapping[str, Shape]) -> dict[str, Shape]:
    own = {name: tuple(t.shape) for name, t in net.state_dict().items()}
    return {name: shape for name, shape in heads.items() if own.get(name) != shape}


def _named(key: str, known: set[str], prefix: str) -> str:
    """A tensor's name in the model: a checkpoint may have or lack the prefix of its main part.

    Example:
        >>> _named("h.0.weight", {"transformer.h.0.weight"}, "transformer.")
        'transformer.h.0.weight'
    """
    for name in (key, prefix + key, key.removeprefix(prefix)):
        if name in known:
            return name
    return key


def _stored(folder: Path) -> dict[str, Stored]:
    files = _shards(folder)
    found: dict[str, Stored] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as f:
                for key in f.keys():  # noqa: SIM118
                    view = f.get_slice(key)
                    found[key] = Stored(file, key, tuple(view.get_shape()), _dtype(file, key, view))
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"--into-base: {file} cannot be read ({reason(error)}); it is missing, truncated "
                "or damaged"
            ) from None
    return found


def _dtype(file: Path, key: str, view: Any) -> torch.dtype:
    name = view.get_dtype()
    if name not in DTYPES:
        raise UserError(f"--into-base: {key} in {file} has dtype {name}; name an unquantised model")
    return DTYPES[name]


def _shards(folder: Path) -> Sequence[Path]:
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if not (folder / INDEX).is_file():
        raise UserError(
            f"--into-base: {folder} has no {SINGLE} and no {INDEX}; expected a model saved as "
            "safetensors"
        )
    try:
        names = sorted(set(json.loads((folder / INDEX).read_text())["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"--into-base: {folder / INDEX} cannot be read: {error}") from None
    wrong = [n for n in names if not isinstance(n, str) or not re.fullmatch(r"[\w.-]+", n)]
    if wrong:
        raise UserError(f"--into-base: {folder / INDEX} names {wrong[0]!r}; expected a file beside")
    return [folder / name for name in names]
