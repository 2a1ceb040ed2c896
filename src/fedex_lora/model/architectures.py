"""Shapes of models without their weights: of the paper's models, and of any that has a config.

Models are built on PyTorch's meta device, which holds shapes and no numbers, and are adapted there
by the same code that adapts the real ones. Nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.pytorch_utils import Conv1D

from fedex_lora.aggregation.adapter import LayerShape
from fedex_lora.errors import RecipeError, did_you_mean
from fedex_lora.model.inject import head_names, heads, inject
from fedex_lora.model.load import Base, local_folder, locate, quiet
from fedex_lora.model.presets import PRESETS, preset_of
from fedex_lora.recipe import LoraSpec, ModelSpec

# what transformers and safetensors raise for a name, folder or config that is no usable model
_NO_MODEL = (
    *(OSError, ValueError, KeyError, TypeError, RuntimeError, ImportError, AttributeError),
    SafetensorError,
)
# bytes of a weight with its scales: a float32 for every 64 weights, or for every row
_QUANTISED = {"nf4": 0.5 + 4 / 64, "fp4": 0.5 + 4 / 64, "int8": 1.0}


@dataclass(frozen=True)
class Plain:
    """The shapes of a model as it is loaded.

    Attributes:
        config: transformers' config.
        parameters: Everything in it; weights that go by several names once.
        linear: Numbers in the linear layers that quantisation stores in fewer bits.
    """

    config: Any
    parameters: Mapping[str, torch.Size]
    linear: int

    @property
    def size(self) -> int:
        """Number of parameters, those of a new head among them."""
        return count(self.parameters.values())

    def bytes(self, spec: ModelSpec) -> int:
        """Of all of them: quantised where asked for, the rest in their dtype."""
        each = getattr(torch, spec.dtype).itemsize
        if spec.quantisation is None:
            return self.size * each
        return int((self.size - self.linear) * each + self.linear * _QUANTISED[spec.quantisation])


@dataclass(frozen=True)
class Architecture(Plain):
    """The shapes of a model and of what is trained of it.

    Attributes:
        layers: The adapted layers, sorted by name; none for full fine-tuning.
        head: What is trained in full, by name in the plain model.
    """

    layers: Mapping[str, LayerShape]
    head: Mapping[str, torch.Size]

    @property
    def trained(self) -> int:
        """Number of parameters that both factors of every layer and the head have."""
        factors = sum(s.rank * (s.inp + s.out) for s in self.layers.values())
        return factors + count(self.head.values())


def count(shapes: Iterable[torch.Size]) -> int:
    """How many numbers tensors of these shapes hold.

    Example:
        >>> count([torch.Size([2, 3]), torch.Size([])])
        7
    """
    return sum(prod(shape) for shape in shapes)


def read_config(name: str, revision: str | None = None, **changes: Any) -> Any:
    """The transformers config of a preset, a hub id, a local folder or a config.json.

    Args:
        name: `roberta-large`, `FacebookAI/roberta-large`, a folder, a file config.json, or
            `package:NAME/FOLDER`. A hub id that is no preset's is looked for in the local cache.
        revision: Of a hub id.
        changes: Fields that a task sets, e.g. `num_labels=3`.

    Raises:
        UserError: There is none; the presets and the nearest of their names are given.

    Example:
        >>> read_config("FacebookAI/roberta-large").num_hidden_layers
        24
    """
    if Path(name).name == "config.json":
        name = str(Path(name).parent.absolute())
    where = locate(name)
    local = (Path(where) / "config.json").is_file()
    preset = None if local else preset_of(name)
    try:
        with quiet():
            if preset is not None:
                fields = {**preset.fields(), **changes}
                return transformers.AutoConfig.for_model(preset.kind, **fields)
            hub = {"revision": revision} if revision else {}
            return transformers.AutoConfig.from_pretrained(
                where, local_files_only=True, trust_remote_code=False, **hub, **changes
            )
    except _NO_MODEL as error:
        raise RecipeError(_unknown(name, error if local else None)) from error


def narrowest(config: Any) -> int:
    """The shortest side that a linear layer has by the config: of a hidden vector, or of all keys.

    Example:
        >>> narrowest(read_config("roberta-base")), narrowest(read_config("llama-3.2-3b"))
        (768, 1024)

    Returns:
        0 where the config does not tell.
    """
    hidden, heads = (getattr(config, n, 0) for n in ("hidden_size", "num_attention_heads"))
    if not (isinstance(hidden, int) and isinstance(heads, int) and heads):
        return 0
    keys = getattr(config, "num_key_value_heads", None) or heads
    each = getattr(config, "head_dim", None) or hidden // heads
    return min(hidden, keys * each)


def _unknown(name: str, error: Exception | None) -> str:
    if error is not None:
        reason = str(error).strip().splitlines()[0]
        return f"model.name: {name!r}: its config.json cannot be used: {reason}"
    names = [n for key, preset in PRESETS.items() for n in (key, *preset.ids)]
    return (
        f"model.name: {name!r} is not known here{did_you_mean(name, names, 0.0)} Expected a preset "
        f"({', '.join(PRESETS)}), its hub id, another hub id that is in the local cache, or a "
        "folder with config.json"
    )


def natural_task(config: Any, labels: int | None = None) -> tuple[str, str, dict[str, Any]]:
    """What a model is usually fine-tuned for: (auto_model, peft_task_type, model_kwargs).

    Args:
        config: transformers' config.
        labels: If given, classification with so many; else a causal language model if it was
            published as one, and classification with two labels if not.

    Example:
        >>> natural_task(read_config("gpt2"))[1], natural_task(read_config("roberta-base"))[1]
        ('CAUSAL_LM', 'SEQ_CLS')
    """
    made_for = set(getattr(config, "architectures", None) or [])
    if labels is None and made_for & set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()):
        return "AutoModelForCausalLM", "CAUSAL_LM", {}
    return "AutoModelForSequenceClassification", "SEQ_CLS", {"num_labels": labels or 2}


def architecture(
    name: str,
    lora: LoraSpec | None,
    *,
    auto_model: str,
    peft_task_type: str | None,
    model_kwargs: Mapping[str, Any],
    revision: str | None = None,
) -> Architecture:
    """The shapes of a model adapted as `fedex_lora.model.load_model` would adapt it.

    Args:
        name: As for `read_config`.
        lora: What to adapt; `target_modules: null` is PEFT's choice for the kind of model. None
            for full fine-tuning.
        auto_model, peft_task_type, model_kwargs: As a task gives them, or `natural_task`.

    Raises:
        UserError: There is no such model, it cannot be used so, or `lora` does not fit it.

    Example:
        >>> task = dict(auto_model="AutoModelForCausalLM", peft_task_type="CAUSAL_LM")
        >>> lora = LoraSpec(r=4, target_modules=["c_attn", "c_proj"])
        >>> gpt2 = architecture("gpt2", lora, **task, model_kwargs={})
        >>> gpt2.size, gpt2.trained
        (124439808, 405504)
    """
    config = read_config(name, revision, **model_kwargs)
    with torch.device("meta"):
        model, missing = _build(name, local_folder(name, revision), config, auto_model)
        plain = _plain(model, config, [] if lora is None else head_names(lora, peft_task_type))
        if lora is None:
            return Architecture(config, plain.parameters, plain.linear, {}, plain.parameters)
        _, found = inject(Base(model, None, name, missing, False), lora, peft_task_type, seed=0)
    layers = {layer.name: layer.shape for layer in found}
    head = {f"{n}.{p}": v.shape for n, m in heads(model) for p, v in m.named_parameters()}
    return Architecture(config, plain.parameters, plain.linear, layers, head)


def plain_model(name: str, config: Any, auto_model: str) -> Plain:
    """The shapes of a model before anything is adapted.

    Args:
        name: For errors.
        config: What `read_config` read.
        auto_model: As for `architecture`.

    Raises:
        UserError: It cannot be used so.
    """
    with torch.device("meta"):
        return _plain(_build(name, None, config, auto_model)[0], config, [])


def _plain(model: nn.Module, config: Any, trained: list[str]) -> Plain:
    kept = ["lm_head", *trained]  # as `load_base` asks bitsandbytes
    linear = sum(
        module.weight.numel()
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and not any(k in name for k in kept)
    )
    return Plain(config, {n: p.shape for n, p in model.named_parameters()}, linear)


def _build(
    name: str, folder: Path | None, config: Any, auto_model: str
) -> tuple[Any, frozenset[str]]:
    """The model on the meta device, and the parameters that its files, if any, lack."""
    auto = getattr(transformers, auto_model)
    try:
        with quiet():
            if folder is None:
                return auto.from_config(config, trust_remote_code=False), frozenset()
            model, info = auto.from_pretrained(
                folder, config=config, device_map="meta", output_loading_info=True
            )
            return model, frozenset(info["missing_keys"])
    except _NO_MODEL as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise RecipeError(
            f"model.name: {name!r} cannot be built as {auto_model}: {reason}"
        ) from error
