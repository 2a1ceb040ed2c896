"""A model that is used as it is: plain, or with a PEFT adapter from disk."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from peft import PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open

from fedex_lora.errors import DataError
from fedex_lora.model.adapted import AdaptedModel
from fedex_lora.model.config import CONFIG, WEIGHTS, adapter_folder, empty, read_config
from fedex_lora.model.keys import PREFIX, adapter_keys
from fedex_lora.model.load import TOKENIZER, load_base, quiet
from fedex_lora.recipe import ModelSpec


def load_ready(
    spec: ModelSpec,
    adapter: Path | None,
    *,
    auto_model: str,
    model_kwargs: dict[str, Any],
    seed: int,
    processor: str = TOKENIZER,
) -> AdaptedModel:
    """Loads a model with nothing left to train: every weight comes from a file.

    Args:
        spec: The model, or the adapter's base.
        adapter: The directory of a PEFT adapter.
        auto_model: Name of a transformers Auto class, e.g. "AutoModelForSequenceClassification".
        model_kwargs: For its `from_pretrained`; used with an adapter, which may bring a head.
        seed: For whatever transformers draws while it builds the model.
        processor: Name of the Auto class of its tokenizer, or what it has in place of it.

    Raises:
        UserError: If there is no such model or adapter, they do not go together, or weights that
            the class needs are in neither.
    """
    adapter = None if adapter is None else adapter_folder(adapter)
    keys = set() if adapter is None else _keys(adapter)
    base = load_base(spec, auto_model, {} if adapter is None else model_kwargs, seed, [], processor)
    if absent := sorted(base.missing - {key.removeprefix(PREFIX) for key in keys}):
        neither = f"{spec.name!r}" + (f" nor {adapter}" if adapter else "")
        raise DataError(
            f"{absent[0]} of a {type(base.model).__name__} is not in {neither}, so that it would "
            "be random; expected a model that was trained for this task, e.g. an export of a run"
        )
    module = base.model if adapter is None else _adapted(base.model, adapter, keys, spec.name)
    return AdaptedModel(base, module, [])


def base_of(adapter: Path) -> dict[str, str]:
    """`name` and `revision` of the model that an adapter belongs on, as far as its config says.

    Raises:
        UserError: The config cannot be read.
    """
    config = read_config(adapter)
    found = {"name": config.get("base_model_name_or_path"), "revision": config.get("revision")}
    return {key: value for key, value in found.items() if value}


def _keys(adapter: Path) -> set[str]:
    try:
        with safe_open(adapter / WEIGHTS, framework="pt") as file:
            shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise DataError(
            f"{adapter}: no adapter's weights: {error}; expected {WEIGHTS} beside {CONFIG}"
        ) from error
    for key, shape in shapes.items():
        if 0 in shape:
            raise empty(str(adapter), key, shape)
    names = adapter_keys(shapes, str(adapter)).stored.items()
    if any(not stored.endswith(key.removeprefix(PREFIX)) for key, stored in names):
        raise DataError(
            f"{adapter}: its tensors are named as in a model's state ({min(shapes)}, ...), and "
            f"PEFT does not find them; `fedex-lora merge {adapter} --out NEW` renames them"
        )
    return set(shapes)


def _adapted(model: Any, adapter: Path, keys: set[str], base_name: str) -> PeftModel:
    try:
        with quiet(), warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            module = PeftModel.from_pretrained(model, str(adapter))
    except (OSError, ValueError, RuntimeError, TypeError, KeyError) as error:
        raise _does_not_fit(adapter, base_name, str(error).strip() or repr(error)) from error
    # PEFT passes over what one has and the other has not
    missing = [str(w.message) for w in told if "missing adapter keys" in str(w.message)]
    own = get_peft_model_state_dict(module, save_embedding_layers=False)
    extra = sorted(key for key in keys - own.keys() if ".lora_" in key)
    if missing or extra:
        raise _does_not_fit(adapter, base_name, (missing or [f"it has no {extra[0]}"])[0])
    return module.eval()


def _does_not_fit(adapter: Path, base_name: str, why: str) -> DataError:
    short = " ".join(why.split())[:300].rstrip(".")
    return DataError(
        f"{adapter}: the adapter does not go with {base_name!r}: {short}. Name the model it was "
        "made for (`set=model.name=MODEL`), and a task of as many classes"
    )
