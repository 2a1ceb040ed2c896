"""A model with LoRA, as Python code gives it: by a name, or as a module of one's own."""

from __future__ import annotations

from typing import Any

from peft import LoraConfig, PeftModel
from torch import nn

from fedex_lora.errors import UserError
from fedex_lora.model.adapted import AdaptedModel, adapt, load_model
from fedex_lora.recipe import LoraSpec, ModelSpec
from fedex_lora.recipe.draft import part_of

_OURS = {"peft_type", "task_type", "base_model_name_or_path", "revision", "inference_mode"}
_OURS |= {"auto_mapping", "peft_version", "runtime_config"}  # nothing that changes the adapter


class Model:
    """A model with LoRA.

    Args:
        module: Any module whose Linear and Embedding layers PEFT can adapt. It is adapted in place,
            and trained and shown as itself; what its forward takes is between it and the train
            function.
        lora: Which layers, at which rank; None to train all parameters.
        name: What an adapter that is saved says of its base.
        seed: Of parameters that PEFT adds.
        placement: Where the ledger goes: "fold" into the weights, or "side", beside them.

    Attributes:
        adapted: The model with its base, factors and head as values.
        name: Hub id or path of the pretrained model.
        head: As it was loaded: every federation of this model starts from it.

    Raises:
        UserError: LoRA as asked for cannot be aggregated exactly, or matches no layer.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> model = Model(net, LoraConfig(r=2, target_modules=["0"], modules_to_save=["2"]))
        >>> sorted(model.head), model.adapted.layers["0"].out
        (['2.bias', '2.weight'], 8)
    """

    def __init__(
        self,
        module: nn.Module,
        lora: LoraConfig | None,
        *,
        name: str = "",
        seed: int = 0,
        placement: str = "fold",
    ) -> None:
        if not isinstance(module, nn.Module):
            raise UserError(
                f"module: expected a torch.nn.Module, got {type(module).__name__}; by its name a "
                "model is loaded with Model.from_pretrained"
            )
        if isinstance(module, PeftModel):
            raise UserError("module: is adapted by PEFT already; expected the plain module")
        if placement not in ("fold", "side"):
            raise UserError(f"placement: expected fold or side, got {placement!r}")
        spec = None if lora is None else _spec_of(lora)
        self._take(adapt(module, spec, seed=seed, side=placement == "side"), name, seed)

    def _take(self, adapted: AdaptedModel, name: str, seed: int) -> None:
        self.adapted, self.name = adapted, name
        self.head = {n: t.clone() for n, t in adapted.initial(seed).head.items()}

    @classmethod
    def from_pretrained(
        cls,
        name: str,
        lora: LoraConfig | None,
        *,
        auto: str = "AutoModelForSequenceClassification",
        seed: int = 0,
        dtype: str = "float32",
        placement: str = "fold",
        device: str = "auto",
        **kwargs: Any,
    ) -> Model:
        """Loads and adapts a model.

        Args:
            name: Hub id, folder, or `package:NAME/FOLDER` of an installed Python package.
            lora: None to train all parameters.
            auto: The transformers class that loads it.
            seed: Of parameters that the checkpoint lacks, e.g. a new classification head.
            dtype: Of the frozen weights.
            placement: Where the ledger goes: "fold" into the weights, or "side", beside them.
            kwargs: For the class's `from_pretrained`, e.g. `num_labels`.

        Raises:
            UserError: No such model, or LoRA as asked for cannot be aggregated exactly.
        """
        options = {"name": name, "dtype": dtype, "placement": placement, "device": device}
        spec = part_of(ModelSpec, options, "Model")
        wanted = None if lora is None else _spec_of(lora)
        task_type = None if lora is None else lora.task_type
        task_type = None if task_type is None else str(getattr(task_type, "value", task_type))
        if task_type is None and auto == "AutoModelForSequenceClassification":
            task_type = "SEQ_CLS"
        adapted = load_model(
            spec,
            wanted,
            auto_model=auto,
            peft_task_type=task_type,
            model_kwargs=kwargs,
            seed=seed,
        )
        model = cls.__new__(cls)
        model._take(adapted, name, seed)
        return model

    @property
    def module(self) -> nn.Module:
        """The module as it is now: with the base, factors and head that were last put there."""
        return self.adapted.module

    @property
    def tokenizer(self) -> Any:
        """Its tokenizer, which has a padding token; None of a module of one's own."""
        return self.adapted.tokenizer


def _spec_of(config: LoraConfig) -> LoraSpec:
    if not isinstance(config, LoraConfig):
        raise UserError(f"lora: expected peft's LoraConfig, got {type(config).__name__}")
    default, known = LoraConfig(), set(LoraSpec.model_fields)
    given = {
        key: value
        for key, value in vars(config).items()
        if key not in _OURS and not key.startswith("_") and value != getattr(default, key)
    }
    if unknown := sorted(given.keys() - known):
        raise UserError(
            f"LoraConfig.{unknown[0]}: {given[unknown[0]]!r} cannot be aggregated exactly; leave "
            f"it out. Supported are {', '.join(sorted(known - {'init', 'ranks'}))}"
        )
    plain = {k: sorted(v) if isinstance(v, set) else v for k, v in given.items()}
    return part_of(LoraSpec, plain, "LoraConfig")
