"""The client's side of `FedExLora`: a model becomes the global model, whatever it was before."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from flwr.app import ArrayRecord, RecordDict
from peft import set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fedex_lora.aggregation.adapter import AdapterState, Factors
from fedex_lora.aggregation.delta import Delta
from fedex_lora.errors import UserError
from fedex_lora.flower import arrays as wire
from fedex_lora.model.files import save_adapter
from fedex_lora.model.keys import PREFIX
from fedex_lora.model.layer import ADAPTER, Layer, make_layer
from fedex_lora.model.side import attach

_PLACED = "fedex_lora_placed"  # on PEFT's layers, so that a copy of the model knows it too


@dataclass(frozen=True)
class _Placed:
    """What a layer's base was before anything was added, or the hook that adds beside it."""

    w0: Tensor | None = None
    hook: RemovableHandle | None = None


def load_global(model: nn.Module, content: RecordDict | ArrayRecord) -> None:
    """Makes a PEFT model the global model W0 + T + s·B·A of a message.

    Takes the place of `set_peft_model_state_dict(model, …)`. T goes into the frozen weights: their
    float32 sum is rounded once, and always from W0, of which a copy is kept on the CPU (the adapted
    layers alone, once there is a T). So it does not matter what was loaded before, or how often.
    Beside quantised weights, and those that another layer shares (tied embeddings), T is computed
    in float32 by a hook.

    Args:
        model: With one adapter, "default", on the pretrained weights.
        content: `message.content`; or the arrays that `evaluate_fn` gets, or a result's.

    Raises:
        UserError: The arrays are not this model's.
    """
    tensors, base = wire.received(content)
    layers = _layers(model)
    _check_fits(layers, tensors, base)
    about = wire.about(content) if isinstance(content, RecordDict) else {}
    _check_scales(layers, about.get(wire.SCALES))
    unknown = set_peft_model_state_dict(model, tensors).unexpected_keys
    if unknown:
        raise UserError(f"array {unknown[0]!r}: this model has none of that name")
    uses = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    for name, layer in layers.items():
        beside = layer.quantised or uses[id(layer.base.weight)] > 1  # not another layer's too
        _place(layer, base.get(name), beside)
        layer.factors()[0].requires_grad_("A" in str(about.get(wire.TRAINS, "AB")))


def save_global(model: Any, content: RecordDict | ArrayRecord, directory: str | Path) -> None:
    """Writes the global model as a PEFT adapter on the pretrained weights, T included.

    `model.save_pretrained` would write B̄ and Ā without T. Here a layer's T is part of its factors,
    whose ranks grow by that of T.

    Args:
        model: The PEFT model, for its configuration.
        content: As for `load_global`.
        directory: Made if needed; for `PeftModel.from_pretrained`.
    """
    tensors, base = wire.received(content)
    layers = _layers(model)
    _check_fits(layers, tensors, base)
    scales = {name: layer.shape.scale for name, layer in layers.items()}
    state = wire.state_of(tensors, scales)
    factors = {name: _grown(f, base.get(name)) for name, f in state.layers.items()}
    head = {name.removeprefix(PREFIX): tensor for name, tensor in state.head.items()}
    config = model.peft_config[ADAPTER]
    of = config.base_model_name_or_path or ""
    save_adapter(AdapterState(factors, head), layers, config, Path(directory), of)


def _grown(f: Factors, base: Delta | None) -> Factors:
    if base is None:
        return f
    both = f.delta() + base
    left, right = both.factors()
    return Factors(right, left, 1.0)


def _layers(model: nn.Module) -> dict[str, Layer]:
    found = {}
    for path, module in model.named_modules():
        if isinstance(module, LoraLayer):
            if list(module.scaling) != [ADAPTER]:
                raise UserError(
                    f"the model has adapters {', '.join(module.scaling)}; expected one, {ADAPTER!r}"
                )
            name = path.removeprefix(PREFIX)
            found[name] = make_layer(name, module, rslora=False, gaussian=False, fixed_rank=False)
    if not found:
        raise UserError("the model has no LoRA layers; expected one from peft.get_peft_model")
    return found


def _check_fits(
    layers: Mapping[str, Layer], tensors: Mapping[str, Tensor], base: Mapping[str, Delta]
) -> None:
    names = wire.layers_of(tensors)
    if names.keys() != layers.keys():
        odd = min(names.keys() ^ layers.keys())
        where = "the arrays have, this model has not" if odd in names else "this model alone has"
        raise UserError(f"{odd}: a LoRA layer that {where}; expected one LoraConfig everywhere")
    for name, layer in layers.items():
        for key, parameter in zip((names[name]["A"], names[name]["B"]), layer.factors()):
            if tensors[key].shape != parameter.shape:
                raise UserError(
                    f"array {key!r} has shape {tuple(tensors[key].shape)}; this model expects "
                    f"{tuple(parameter.shape)}: the same model and LoRA rank everywhere"
                )
    for name, delta in base.items():
        shape = layers[name].shape if name in layers else None
        if shape is None or delta.shape != (shape.out, shape.inp):
            wanted = f"({shape.out}, {shape.inp})" if shape else "none, it is no LoRA layer here"
            raise UserError(f"{name}: a residual of shape {delta.shape}; expected {wanted}")


def _check_scales(layers: Mapping[str, Layer], scales: Any) -> None:
    for (name, layer), scale in zip(sorted(layers.items()), scales or ()):
        if abs(layer.shape.scale - scale) > 1e-6 * abs(scale):
            raise UserError(
                f"{name}: LoRA's scale is {layer.shape.scale:g} here and {scale:g} at the server; "
                "expected one lora_alpha and use_rslora everywhere"
            )


def _place(layer: Layer, base: Delta | None, beside: bool) -> None:
    """The layer's base becomes W0 + T."""
    placed: _Placed | None = layer.module.__dict__.get(_PLACED)
    if base is None and placed is None:
        return
    if layer.module.merged:
        raise UserError(f"{layer.name}: its adapter is merged into the base; unmerge it first")
    if beside:
        if placed and placed.hook:
            placed.hook.remove()
        hook = None if base is None else attach(layer, base)
        layer.module.__dict__[_PLACED] = _Placed(hook=hook)
        return
    weight = layer.base.weight
    if placed is None or placed.w0 is None:
        placed = _Placed(weight.detach().to("cpu", copy=True))
        layer.module.__dict__[_PLACED] = placed
    assert placed.w0 is not None
    with torch.no_grad():
        if base is None:
            weight.copy_(placed.w0)
        else:
            weight.copy_((placed.w0.float() + layer.oriented(base.dense())).to(weight.dtype))
