"""Puts LoRA and a trained head into a plain model, and finds them again."""

from __future__ import annotations

import logging
import re
from collections import Counter
from itertools import accumulate
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils.other import ModulesToSaveWrapper, get_pattern_key
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fedex_lora.errors import RecipeError
from fedex_lora.model.layer import ADAPTER, Layer, make_layer
from fedex_lora.model.load import Base, quiet, seeded
from fedex_lora.recipe import LoraSpec

log = logging.getLogger(__name__)

# PEFT trains these for the task types that classify, whether asked to or not
_CLASSIFIERS = {"SEQ_CLS": ["classifier", "score"], "TOKEN_CLS": ["classifier", "score"]}


def head_names(lora: LoraSpec, task_type: str | None) -> list[str]:
    """Names of the modules that are trained in full."""
    return [*(lora.modules_to_save or []), *_CLASSIFIERS.get(task_type or "", [])]


def check_no_statistics(model: nn.Module, name: str) -> None:
    """Training changes them, yet they are no parameters: they would leak from client to client."""
    for module_name, module in model.named_modules():
        if getattr(module, "track_running_stats", False):
            raise RecipeError(
                f"model.name: {name!r} normalises batches by running statistics ({module_name}), "
                "which are neither averaged nor reset; take a model with layer normalisation"
            )


def inject(
    base: Base, lora: LoraSpec, task_type: str | None, seed: int
) -> tuple[PeftModel, list[Layer]]:
    """Adapts `base` in place.

    Parameters that the checkpoint lacks are trained with the head: left frozen they would stay
    random. The head is held in float32 whatever the model's dtype.

    Returns:
        PEFT's model, and its adapted layers sorted by name.

    Raises:
        UserError: If a name in the recipe matches nothing, or a layer cannot be adapted exactly.
    """
    model = base.model
    everything = [name for name, _ in model.named_modules()]
    _check_names("lora.modules_to_save", lora.modules_to_save, everything)
    if isinstance(lora.exclude_modules, list):
        _check_names("lora.exclude_modules", lora.exclude_modules, everything)
    owners = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    tied = {i for i, names in owners.items() if names > 1}
    new = _untrained_modules(base.missing, head_names(lora, task_type))
    if new:
        log.warning("not in the checkpoint, so trained with the head: %s", ", ".join(new))
    kinds = _kinds(model)
    try:
        fields = lora.model_dump(exclude={"init", "ranks"})
        alpha = fields["lora_alpha"]
        fields["lora_alpha"] = int(alpha) if alpha == int(alpha) else alpha
        fields["modules_to_save"] = [*(lora.modules_to_save or []), *new] or None
        if not isinstance(lora.target_modules, str) and lora.exclude_modules is None:
            fields["exclude_modules"] = _beside_language(model)
        # PEFT needs to be told that Conv1D is transposed, and only warns if it was told wrongly
        config = LoraConfig(**fields, task_type=task_type)
        with quiet(), seeded(seed):
            peft_model = get_peft_model(model, config)
    except (ValueError, TypeError, re.error) as error:
        raise RecipeError(
            f"lora: this model cannot be adapted so: {error} It has these layers: {kinds}"
        ) from error
    found = [(n, m) for n, m in model.named_modules() if isinstance(m, LoraLayer)]
    layers = [
        make_layer(
            name,
            module,
            rslora=lora.use_rslora,
            gaussian=lora.init_lora_weights == "gaussian",
            fixed_rank=get_pattern_key(list(lora.rank_pattern), name) in lora.rank_pattern,
        )
        for name, module in sorted(found, key=lambda nm: nm[0])
    ]
    names = [layer.name for layer in layers]
    if not names:
        raise RecipeError(
            f"lora.target_modules: {lora.target_modules!r} matches no layer; the model has: {kinds}"
        )
    if isinstance(lora.target_modules, list):
        blocks = " in the blocks of lora.layers_to_transform"
        where = "" if lora.layers_to_transform is None else blocks
        _check_no_head(lora.target_modules, names, [name for name, _ in heads(model)])
        _check_names("lora.target_modules", lora.target_modules, names, kinds, where)
    for field in ("rank_pattern", "alpha_pattern"):
        for key in getattr(lora, field):
            if not any(get_pattern_key([key], name) == key for name in names):
                told = f"lora.{field}: {key!r} matches none of the adapted layers"
                raise RecipeError(f"{told}: {', '.join(dict.fromkeys(map(_last, names)))}")
    for layer in layers:
        if id(layer.base.weight) in tied:
            raise RecipeError(
                f"lora.target_modules: the weight of {layer.name} is shared with another layer "
                "(tied embeddings), which adapting it would change as well; leave it out"
            )
    for name, module in heads(model):
        original: Any = model.get_submodule(name)
        if any(id(p) in tied for p in original.original_module.parameters()):
            if name in new:
                raise RecipeError(
                    f"model.name: the checkpoint has no {name}, which the task needs, and which "
                    "cannot be trained anew, since it shares its weight with the embeddings; take "
                    "a model that was saved with it"
                )
            raise RecipeError(
                f"lora.modules_to_save: {name} shares its weight with another layer (tied "
                "embeddings), which training it would separate; leave it out"
            )
        _hold_in_float32(module, base.dtype)
    return peft_model, layers


def heads(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The modules trained in full, by their names in the plain model."""
    wrappers = [(n, m) for n, m in model.named_modules() if isinstance(m, ModulesToSaveWrapper)]
    return [(name, wrapper.modules_to_save[ADAPTER]) for name, wrapper in wrappers]


def _beside_language(model: Any) -> str | None:
    """All modules of a vision-language model but those of its language model, as a pattern; names
    of layers are mostly the same in both. None of other models."""
    if not hasattr(getattr(model, "config", None), "vision_config"):
        return None
    decoder = model.get_decoder()
    name = next((name for name, module in model.named_modules() if module is decoder), "")
    return rf"(?!{re.escape(name)}\.|lm_head$).*" if name else None


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _check_no_head(wanted: list[str], adapted: list[str], whole: list[str]) -> None:
    """A module that is trained in full gets no factors as well; PEFT passes it over."""
    for want in wanted:
        if not _any_is(want, adapted) and _any_is(want, whole):
            raise RecipeError(
                f"lora.target_modules: {want!r} is trained in full (by lora.modules_to_save, or as "
                "the task's head); leave it out of one of them"
            )


def _any_is(want: str, names: list[str]) -> bool:
    return any(name == want or name.endswith(f".{want}") for name in names)


def _check_names(
    field: str, wanted: list[str] | None, names: list[str], kinds: str = "", where: str = ""
) -> None:
    for want in wanted or []:
        if not _any_is(want, names):
            has = kinds or ", ".join(dict.fromkeys(_last(n) for n in names if n))
            raise RecipeError(f"{field}: {want!r} matches nothing{where}; the model has: {has}")


def _untrained_modules(missing: frozenset[str], trained: list[str]) -> list[str]:
    """Modules that own missing parameters and do not lie in one of the trained ones."""
    modules = sorted({name.rpartition(".")[0] for name in missing})
    above = {m: list(accumulate(m.split("."), "{}.{}".format)) for m in modules}
    return [m for m in modules if not any(a.endswith(t) for a in above[m] for t in trained)]


def _kinds(model: nn.Module) -> str:
    kinds = {
        _last(name)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D | nn.Embedding)
    }
    return ", ".join(sorted(kinds))


def _hold_in_float32(module: nn.Module, dtype: torch.dtype) -> None:
    """Trains a module of a half-precision model in float32: small steps would be rounded away."""
    if dtype == torch.float32:
        return
    module.float()

    def cast(value: Any, to: torch.dtype) -> Any:
        return value.to(to) if isinstance(value, Tensor) and value.is_floating_point() else value

    def before(_module: nn.Module, args: Any, kwargs: Any) -> Any:
        up = torch.float32
        return tuple(cast(a, up) for a in args), {k: cast(v, up) for k, v in kwargs.items()}

    module.register_forward_pre_hook(before, with_kwargs=True)
    module.register_forward_hook(lambda _module, _args, output: cast(output, dtype))
