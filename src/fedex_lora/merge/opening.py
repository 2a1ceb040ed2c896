"""A full model as the class of transformers that has all layers of the adapters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError

from fedex_lora.errors import DataError, StorageError, UserError
from fedex_lora.merge.adapters import WHERE, Adapter, Shape, download, is_local
from fedex_lora.merge.checkpoint import checkpoint
from fedex_lora.merge.target import Target, vocabulary
from fedex_lora.model.load import locate, quiet

_FILES = ["*.json", "*.txt", "*.model", "*.jinja", "*.safetensors"]
AUTO = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}
# what transformers raises for a config that is none, or of nothing that it knows
_CANNOT_BUILD = (OSError, ValueError, LookupError, AttributeError, TypeError, ImportError)
_CANNOT_BUILD += (RuntimeError, ArithmeticError, AssertionError, StrictDataclassError)


def open_target(
    name: str,
    adapter: Adapter,
    layers: Sequence[str],
    trained: Mapping[str, Shape],
    copies: Mapping[str, Shape],
) -> Target:
    """The model `name`, as a class that has all layers of the adapters.

    Args:
        name: A folder or hub id.
        adapter: One that says what the adapters were trained on.
        layers: Layers that will be changed.
        trained: Shapes of tensors that will replace or join the model's own, by PEFT's names.
        copies: Likewise, of those that were not trained.

    Raises:
        UserError: There is no such model, its files are not safetensors or damaged, it is
            quantised in a way that is not known here, or the tensors do not fit it.
    """
    for field in WHERE:
        if value := adapter.config.get(field):
            raise DataError(
                f"`into_base`: {adapter.name} has {field}: {value!r}, which no plain model has; "
                "merge into an adapter instead"
            )
    named = adapter.config.get("base_model_name_or_path")
    folder = model_folder(name, adapter.config.get("revision") if named == name else None)
    config = read_config(folder)
    stored = checkpoint(folder, getattr(config, "dtype", None))
    unknown: list[UserError] = []
    unfit: list[UserError] = []
    for auto_model in _classes(adapter.config, config):
        config = transformers.AutoConfig.from_pretrained(folder)
        try:
            net = build(folder, auto_model, config)
        except UserError as error:
            unknown.append(error)
            continue
        try:
            target = _target(Target(folder, config, auto_model, net, stored), trained, copies)
            for layer in layers:
                target.spot(adapter, layer)
            return target
        except UserError as error:
            unfit.append(error)
    raise [*unfit, *unknown][0]


def model_folder(name: str, revision: str | None = None) -> Path:
    """Where a model's files are: in a folder, an installed package, or from the hub.

    Args:
        name: A path, `package:NAME/SUB` or a hub id.
        revision: On the hub.

    Raises:
        UserError: There is no such package, or the hub has it not.
    """
    folder = Path(locate(name) if name.startswith("package:") else name).expanduser()
    there = folder.exists() or is_local(name)
    return folder if there else download(name, _FILES, revision)


def read_config(folder: Path) -> Any:
    """The config of the model in a folder.

    Raises:
        UserError: There is none, or the model is quantised in a way that is not known here.
    """
    if not (config := folder / "config.json").is_file():
        raise StorageError(f"{folder}: there is no {config}; expected a model's folder")
    try:
        config = transformers.AutoConfig.from_pretrained(folder)
    except _CANNOT_BUILD as error:
        raise _unknown(folder, error) from None
    found = getattr(config, "quantization_config", None)
    method = found.get("quant_method") if isinstance(found, dict) else found and found.quant_method
    if found and method != "bitsandbytes":
        raise DataError(
            f"{folder} is quantised by {method}, which is not undone here (bitsandbytes' 4 and 8 "
            "bits are); name the model that it was made from"
        )
    return config


def build(folder: Path, kind: str, config: Any) -> Any:
    """The model without numbers.

    Args:
        folder: Where it lies, for errors.
        kind: A class of transformers, or an Auto class.

    Raises:
        UserError: There is no such class, or it cannot be made of the config.
    """
    try:
        return _build(kind, config)
    except _CANNOT_BUILD as error:
        raise _unknown(folder, error) from None


def _unknown(folder: Path, error: Exception) -> UserError:
    first = (str(error).strip() or type(error).__name__).splitlines()[0]
    return DataError(f"{folder} is no model that transformers knows: {first}")


def _classes(adapter: Mapping[str, Any], config: Any) -> list[str]:
    """Classes in transformers to see the model as, the likeliest first."""
    mapped = adapter.get("auto_mapping") or {}
    names = [AUTO.get(adapter.get("task_type") or ""), mapped.get("base_model_class")]
    named = config.architectures
    names += named if isinstance(named, list) and named else ["AutoModel"]
    return list(dict.fromkeys(map(str, filter(None, names))))


def _target(target: Target, trained: Mapping[str, Shape], copies: Mapping[str, Shape]) -> Target:
    """The same model with as many labels and tokens as the other tensors have."""
    others = {**trained, **copies}
    config, folder = target.config, target.folder
    tokens, labels = _tokens(target, others), _labels(target, others)
    if tokens:
        config.get_text_config().vocab_size = tokens
    if labels:
        config.num_labels = labels
    if tokens or labels:
        net = _build(target.auto_model, config)
        target = Target(folder, config, target.auto_model, net, target.stored)
        target.enlarged, target.relabelled = bool(tokens), bool(labels)
    for key, shape in others.items():
        name = target.parameter(key)
        own = target.names.shape(name)
        if name in target.names.groups:
            raise DataError(
                f"`into_base`: {name} was trained in full and is in parts in the files of {folder};"
                " merge into an adapter instead"
            )
        if own != shape:
            raise DataError(
                f"`into_base`: {name} is {shape} in the adapters and {own or 'absent'} in a "
                f"{type(target.net).__name__}; expected the model that they were trained on"
            )
    if target.enlarged:
        shared = [tied for key in copies for tied in target.tied(target.parameter(key))]
        _check_rows(target, {*shared, *map(target.parameter, others)})
    return target


def _build(auto_model: str, config: Any) -> Any:
    if not _is_class(auto_model):
        raise ValueError(f"{auto_model} is no class of models")
    cls = getattr(transformers, auto_model)
    with quiet(), torch.device("meta"):
        return cls.from_config(config) if auto_model.startswith("Auto") else cls(config)


def _is_class(name: str) -> bool:
    """Whether that is one of transformers' models; a name in a file is to call nothing else."""
    cls = getattr(transformers, name, None)
    known = isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)
    return known or name in transformers.models.auto.modeling_auto.__all__


def _misfits(target: Target, others: Mapping[str, Shape]) -> dict[str, Shape]:
    by_name = {target.parameter(key): shape for key, shape in others.items()}
    return {n: s for n, s in by_name.items() if target.names.shape(n) not in (None, s)}


def _tokens(target: Target, others: Mapping[str, Shape]) -> int | None:
    """How many tokens the adapters' embeddings have, if that is another number."""
    names = {f"{name}.{leaf}" for name in vocabulary(target.net) for leaf in ("weight", "bias")}
    rows = {shape[0] for name, shape in _misfits(target, others).items() if name in names}
    return rows.pop() if len(rows) == 1 else None


def _labels(target: Target, others: Mapping[str, Shape]) -> int | None:
    if target.auto_model not in (AUTO["SEQ_CLS"], AUTO["TOKEN_CLS"]):
        return None
    embedded = {f"{name}.weight" for name in vocabulary(target.net)}
    rows = {s[0] for n, s in _misfits(target, others).items() if s and n not in embedded}
    return rows.pop() if len(rows) == 1 else None


def _check_rows(target: Target, given: set[str]) -> None:
    """Whatever has a row for each token must come with the adapters."""
    names = {name: (key, target.names.shape(name)) for name, key in target.names.direct.items()}
    names |= {
        tied: (key, shape) for name, (key, shape) in names.items() for tied in target.tied(name)
    }
    for name, (key, needed) in names.items():
        held = target.stored[key].shape
        if held != needed and name not in given:
            raise DataError(
                f"`into_base`: {name} is {held} in {target.folder}, and {needed} by the vocabulary "
                "of the adapters, which hold no rows for it; save them with "
                "save_embedding_layers=True"
            )
