"""A pretrained model with LoRA and a head, read and written as values."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fedex_lora.aggregation.adapter import AdapterState, LayerShape, folded, fresh, inner_name
from fedex_lora.aggregation.delta import Delta
from fedex_lora.aggregation.seeding import derive
from fedex_lora.aggregation.sparse import sparse_name
from fedex_lora.errors import RecipeError
from fedex_lora.model.files import read_adapter, save_adapter
from fedex_lora.model.inject import check_no_statistics, head_names, heads, inject
from fedex_lora.model.layer import ADAPTER, Layer, copy_of
from fedex_lora.model.load import (
    TOKENIZER,
    Base,
    dequantised,
    is_quantised,
    load_base,
    quiet,
)
from fedex_lora.model.pretrained import Pretrained
from fedex_lora.model.side import attach
from fedex_lora.recipe import LoraSpec, ModelSpec

Increment = Callable[[str], Delta | None]


class AdaptedModel:
    """The one resident model of a process; clients take turns in it.

    Its base is always `cast(W0 + increment)` of the last `place`, its factors and head are those
    of the last `write` or what training made of them.

    Attributes:
        module: The nn.Module to train and evaluate. Gradient checkpointing needs nothing but the
            Trainer's switch: transformers makes the inputs require gradients.
        tokenizer: Its tokenizer, which has a padding token; or its image processor.
        layers: The adapted layers sorted by name, as shapes.
    """

    def __init__(
        self,
        base: Base,
        module: Any,
        layers: list[Layer],
        *,
        side: bool = False,
        init: Path | None = None,
        workdir: Path | None = None,
    ) -> None:
        self.module = module
        self.tokenizer = base.tokenizer
        self.layers: dict[str, LayerShape] = {layer.name: layer.shape for layer in layers}
        self._base = base
        self._layers = {layer.name: layer for layer in layers}
        self._head = dict(base.model.named_parameters())
        if layers:
            parts = heads(base.model)
            self._head = {f"{n}.{p}": v for n, part in parts for p, v in part.named_parameters()}
        self._init = init
        self._side: dict[str, RemovableHandle] | None = {} if side else None
        self._w0 = Pretrained(layers, base.where, getattr(base.model, "config", None), workdir)

    @property
    def device(self) -> torch.device:
        return next(self._base.model.parameters()).device

    @property
    def beside(self) -> bool:
        """Whether increments lie beside the layers (placement `side`) instead of in them."""
        return self._side is not None

    def initial(self, seed: int) -> AdapterState:
        """What clients start from: fresh factors and the head as loaded, or those of `lora.init`.

        To be called before anything is written or trained.

        Args:
            seed: The run's seed.
        """
        head = self._read_head()
        if self._init is not None:
            return read_adapter(self._init, self._layers, head, self._w0)
        return AdapterState(fresh(self.layers, seed, 0), head)

    def read(self) -> AdapterState:
        """Copies of the factors and the head: float32, on the CPU.

        Head parameters go by their names in the plain model, e.g. `classifier.dense.weight`.
        """
        factors = {name: layer.read() for name, layer in self._layers.items()}
        return AdapterState(factors, self._read_head())

    def frozen(self) -> dict[str, Tensor]:
        """What is neither factor nor head, by plain names: as loaded, before anything is placed."""
        return _plain_state(self._base.model, self._head)

    def write(self, state: AdapterState) -> None:
        """Makes `state` the model's factors and head; ranks may differ from the present ones, and a
        layer gets what the head has between or beside its factors.

        Raises:
            UserError: If `state` is not one of this model.
        """
        _check_keys("factors", set(state.layers), set(self._layers))
        beside = {part(name) for name in self._layers for part in (inner_name, sparse_name)}
        _check_keys("head", set(state.head) - beside, set(self._head))
        for name, layer in self._layers.items():
            layer.write(state.layers[name])
            layer.write_inner(state.head.get(inner_name(name)))
            layer.write_sparse(state.head.get(sparse_name(name)))
        with torch.no_grad():
            for name, parameter in self._head.items():
                given, expected = tuple(state.head[name].shape), tuple(parameter.shape)
                if given != expected:
                    raise RecipeError(f"{name}: shape {given} does not fit; expected {expected}")
                parameter.copy_(state.head[name])

    def parameters(self) -> dict[str, nn.Parameter]:
        """The model's own factors and head, as A/LAYER, B/LAYER and head/PARAMETER."""
        pairs = {name: layer.factors() for name, layer in self._layers.items()}
        found = {f"{x}/{name}": p for name, pair in pairs.items() for x, p in zip("AB", pair)}
        inner = {f"{n}.{p}": v for n, layer in self._layers.items() for p, v in layer.between()}
        return found | {f"head/{name}": p for name, p in (self._head | inner).items()}

    def freeze(self, trained: frozenset[str], head: bool = True) -> None:
        """Trains the factors in `trained`, of "A" and "B", and maybe the head; freezes the rest."""
        for parameter in self.module.parameters():
            parameter.requires_grad_(False)
        for layer in self._layers.values():
            a, b = layer.factors()
            a.requires_grad_("A" in trained)
            b.requires_grad_("B" in trained)
            for _, parameter in layer.between():
                parameter.requires_grad_(True)
        for parameter in self._head.values():
            parameter.requires_grad_(head)

    @contextmanager
    def gradients(self) -> Iterator[dict[str, Tensor]]:
        """Within it the adapted layers' whole weights take gradients, which are in the mapping by
        layer afterwards, out × in and float32; nothing else does.

        Raises:
            UserError: The base is quantised, so that its weights have no gradients.
        """
        for parameter in self._base.model.parameters():
            parameter.requires_grad_(False)
        for layer in self._layers.values():
            if layer.quantised:
                raise RecipeError(
                    f"model.quantisation: {layer.name} is quantised, and has no gradient of its "
                    "weight; leave it out, or take another method"
                )
            layer.base.weight.requires_grad_(True)
        found: dict[str, Tensor] = {}
        try:
            yield found
            for name, layer in self._layers.items():
                weight = layer.base.weight
                grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
                found[name] = copy_of(layer.oriented(grad))
        finally:
            for layer in self._layers.values():
                layer.base.weight.grad = None
                layer.base.weight.requires_grad_(False)

    def trained_layers(self) -> list[nn.Linear]:
        """The linear maps that hold the factors and the head, of a model with LoRA.

        Raises:
            UserError: There are others: an adapted embedding, a normalisation in the head.
        """
        maps = [m for layer in self._layers.values() for m in layer.maps()]
        found = [*maps, *self._head_maps()]
        odd = next((m for m in found if type(m) is not nn.Linear), None)
        if odd is not None:
            raise RecipeError(
                f"engine.fuse: only linear factors and heads can be fused, but a "
                f"{type(odd).__name__} is trained; set engine.fuse: 1 or leave it out of lora"
            )
        return found

    def embeddings(self) -> list[Layer]:
        """The adapted embeddings, whose factors are bare parameters of PEFT's layer."""
        return [layer for layer in self._layers.values() if layer.embedding]

    def _head_maps(self) -> Iterator[Any]:
        """The modules of the head that own parameters."""
        for _, module in heads(self._base.model):
            yield from (m for m in module.modules() if list(m.parameters(recurse=False)))

    def release(self) -> None:
        """Takes off what training put on the model: the hook of gradient checkpointing."""
        if getattr(self._base.model, "_require_grads_hook", None) is not None:
            self._base.model.disable_input_require_grads()

    def pretrained(self, layer: str) -> Tensor:
        """W0: out × in, float32, a fresh tensor read from the model's files."""
        return self._w0(layer)

    def place(self, increment: Increment) -> None:
        """Makes every base W0 + increment(name), in place of any earlier increment.

        With placement `fold` the float32 sum is rounded once, into the base's dtype. With `side`
        the base stays W0, and the increment is computed in float32 beside it.

        Args:
            increment: out × in, dense or in factors, for a layer; None for none: W0, bit for bit.
        """
        for name, layer in self._layers.items():
            if self._side is None:
                self._fold(layer, increment(name))
            else:
                self._put_beside(layer, increment(name))

    def save_adapter(self, state: AdapterState, directory: Path, *, base_name: str) -> None:
        """Writes `state` as a PEFT adapter that plain `peft.PeftModel.from_pretrained` loads.

        Args:
            state: Any ranks and scales, which may differ from layer to layer.
            directory: Made if needed.
            base_name: Hub id or path of the pretrained model, for the adapter's config.
        """
        state = folded(state)
        if not self._layers:
            raise RecipeError("a fully fine-tuned model has no adapter; export it as a model")
        config = self.module.peft_config[ADAPTER]
        save_adapter(state, self._layers, config, Path(directory), base_name)

    def saved(self, directory: Path) -> AdapterState:
        """What `save_adapter` wrote, at its own ranks and scales.

        Raises:
            UserError: None lies there, or one of another model.
        """
        return read_adapter(directory, self._layers, self._read_head(), self._w0, any_rank=True)

    def merged(
        self, state: AdapterState, increment: Increment, dtype: torch.dtype | None = None
    ) -> Any:
        """A plain transformers model with W0 + increment + scale·B·A, to be saved or run.

        The sum is taken in float32 and rounded once.

        Args:
            state: Factors and head.
            increment: As for `place`.
            dtype: Of the result; the model's own by default.
        """
        base, state = self._base.model, folded(state)
        to: torch.dtype = dtype or base.dtype
        weights = {k: _cast(t, to) for k, t in _plain_state(base, self._head).items()}
        for name, layer in self._layers.items():
            total = self._w0(name)
            for part in (increment(name), state.layers[name].delta()):
                total += 0 if part is None else part.dense().to(total)
            weights[f"{name}.weight"] = layer.oriented(total).to(to).contiguous()
        weights |= {name: _cast(t, to) for name, t in state.head.items()}
        return self._plain_model(weights, to)

    def _fold(self, layer: Layer, increment: Delta | None) -> None:
        weight = layer.base.weight
        total = self._w0(layer.name).to(weight.device)
        if increment is not None:
            total += increment.dense().to(total)
        with torch.no_grad():
            weight.copy_(layer.oriented(total))

    def _put_beside(self, layer: Layer, increment: Delta | None) -> None:
        assert self._side is not None
        if layer.name in self._side:
            self._side.pop(layer.name).remove()
        if increment is not None:
            self._side[layer.name] = attach(layer, increment)

    def _read_head(self) -> dict[str, Tensor]:
        found = {name: copy_of(parameter) for name, parameter in self._head.items()}
        for name, layer in self._layers.items():
            if layer.inner is not None:
                found[inner_name(name)] = copy_of(layer.inner.value())
            if layer.sparse is not None:
                found[sparse_name(name)] = copy_of(layer.sparse)
        return found

    def _plain_model(self, weights: dict[str, Tensor], dtype: torch.dtype) -> Any:
        base = self._base.model
        config = copy.deepcopy(base.config)
        if hasattr(config, "use_cache"):
            config.use_cache = self._base.use_cache
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        with quiet():
            model, info = type(base).from_pretrained(
                None, config=config, state_dict=weights, dtype=dtype, output_loading_info=True
            )
        assert not info["missing_keys"] and not info["unexpected_keys"], info
        if getattr(base, "generation_config", None) is not None:
            model.generation_config = copy.deepcopy(base.generation_config)
        return model


def load_model(
    model: ModelSpec,
    lora: LoraSpec | None,
    *,
    auto_model: str,
    peft_task_type: str | None,
    model_kwargs: dict[str, Any],
    seed: int,
    workdir: Path | None = None,
    processor: str = TOKENIZER,
) -> AdaptedModel:
    """Loads a pretrained model and adapts it.

    Args:
        model: The recipe's block.
        lora: The recipe's block; None for full fine-tuning: no layers, every parameter is "head".
        auto_model: Name of a transformers Auto class, e.g. "AutoModelForSequenceClassification".
        peft_task_type: PEFT's name for the task, e.g. "SEQ_CLS".
        model_kwargs: For its `from_pretrained`, e.g. `{"num_labels": 3}`.
        seed: The run's seed; what the checkpoint lacks (a new head) is a function of it alone.
        workdir: Where pretrained weights go that no file of the model's holds as such; a
            temporary folder by default.
        processor: Name of the Auto class of its tokenizer, or what it has in place of it.

    Raises:
        UserError: If there is no such model, or LoRA as asked for cannot be aggregated exactly.
    """
    head_seed = derive(seed, "head")
    keep = [] if lora is None else head_names(lora, peft_task_type)
    base = load_base(model, auto_model, model_kwargs, head_seed, keep, processor)
    check_no_statistics(base.model, model.name)
    if lora is None:
        return AdaptedModel(base, base.model, [], workdir=workdir)
    peft_model, layers = inject(base, lora, peft_task_type, head_seed)
    side = model.placement == "side"
    return AdaptedModel(base, peft_model, layers, side=side, init=lora.init, workdir=workdir)


def adapt(
    module: nn.Module, lora: LoraSpec | None, *, seed: int, side: bool = False
) -> AdaptedModel:
    """A module of the user's own with LoRA, adapted in place.

    Its W0 is what its layers hold now; they are written to a temporary file.

    Args:
        lora: None for full fine-tuning: no layers, every parameter is "head".
        seed, side: As of `load_model`, and whether increments lie beside the layers.

    Raises:
        UserError: LoRA as asked for cannot be aggregated exactly, or matches no layer.
    """
    check_no_statistics(module, type(module).__name__)
    base = Base(module, None, None, frozenset(), False)
    if lora is None:
        return AdaptedModel(base, module, [])
    peft_model, layers = inject(base, lora, None, derive(seed, "head"))
    return AdaptedModel(base, peft_model, layers, side=side, init=lora.init)


def _plain_state(model: nn.Module, head: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """The model's state by its names without PEFT; neither factors nor head parameters."""
    in_head = {parameter.data_ptr() for parameter in head.values()}  # by any of their names
    quantised = {n: m for n, m in model.named_modules() if is_quantised(m)}
    state = {}
    for key, tensor in model.state_dict().items():
        owner = next((n for n in quantised if key.startswith(f"{n}.")), None)
        if ".original_module." in key or ".lora_" in key or tensor.data_ptr() in in_head:
            continue
        if owner is not None and key != f"{owner}.bias":
            if key != f"{owner}.weight":
                continue  # statistics of the quantisation
            tensor = dequantised(quantised[owner])
        plain = key.replace(".base_layer.", ".").replace(f".modules_to_save.{ADAPTER}.", ".")
        state[plain] = tensor
    return state


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def _check_keys(what: str, given: set[str], own: set[str]) -> None:
    if given != own:
        names = ", ".join(sorted(given ^ own)[:3])
        raise RecipeError(f"the {what} are of another model: they differ in {names}")
