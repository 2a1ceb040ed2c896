"""What the tensors in an adapter's file are called: PEFT's own names, and those that others write.

PEFT takes its adapter's name out of the names of the tensors, and what it wraps modules in. Code
that saves `model.state_dict()` itself, or parts of it, leaves both in.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from fedex_lora.errors import DataError

PREFIX = "base_model.model."
NAMES = {  # by whether the layer is an embedding
    False: ("lora_A.weight", "lora_B.weight"),
    True: ("lora_embedding_A", "lora_embedding_B"),
}
# torch.compile, FSDP and activation checkpointing put a module between two others
_WRAPPERS = re.compile(
    r"(?:(?<=\.)|^)(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)
_NAMED = (
    re.compile(r"(?P<before>\.lora_[AB])\.(?P<name>[^.]+)(?P<after>\.(?:weight|bias))$"),
    re.compile(r"(?P<before>\.lora_embedding_[AB])\.(?P<name>[^.]+)(?P<after>)$"),
    re.compile(r"(?P<before>\.trainable_tokens_delta)\.(?P<name>[^.]+)(?P<after>)$"),
    re.compile(r"(?P<before>)\.modules_to_save\.(?P<name>[^.]+)(?P<after>\..+)$"),
)


_OF_ADAPTERS = (".lora_", ".modules_to_save.", ".trainable_tokens_delta")


@dataclass(frozen=True)
class Keys:
    """Tensors of an adapter's file.

    Attributes:
        stored: Their names in the file by those that PEFT gives them.
        left_out: Names in the file of what belongs to the base model or to training alone.
    """

    stored: Mapping[str, str]
    left_out: tuple[str, ...] = ()


def adapter_keys(stored: Iterable[str], name: str) -> Keys:
    """What PEFT calls the tensors of a file.

    Args:
        stored: Their names there.
        name: The adapter, for errors.

    Raises:
        UserError: It holds more than one adapter.

    Example:
        >>> adapter_keys(["model.q.lora_A.default.weight", "model.q.base_layer.weight"], "a")
        Keys(stored={'base_model.model.model.q.lora_A.weight': 'model.q.lora_A.default.weight'}, \
left_out=('model.q.base_layer.weight',))
    """
    plain, names, found = _unwrapped(stored), set(), {}
    for key, original in plain.items():
        found[original], adapter = _without_name(key)
        names |= {adapter} - {None}
    if len(names) > 1:
        raise DataError(
            f"{name}: holds {len(names)} adapters, {', '.join(sorted(names))}; expected one: save "
            "them apart"
        )
    # with names it is a model's state: what is no adapter's there is the base's
    whole = bool(names) and any(".base_layer." in k and ".lora_" not in k for k in plain)
    rest = [
        original
        for key, original in plain.items()
        if key.endswith(".lora_velora_embed")
        or ".original_module." in key
        or ".trainable_tokens_original" in key
        or (whole and not any(part in key for part in _OF_ADAPTERS))
    ]
    kept = {PREFIX + key: original for original, key in found.items() if original not in rest}
    return Keys(kept, tuple(rest))


def _unwrapped(stored: Iterable[str]) -> dict[str, str]:
    """The names without wrappers and prefixes; what they stand for."""
    keys = {_WRAPPERS.sub("", key): key for key in stored}
    if keys and all(key.startswith("module.") for key in keys):  # DistributedDataParallel
        keys = {key.removeprefix("module."): original for key, original in keys.items()}
    return {re.sub(rf"^(?:{re.escape(PREFIX)})+", "", key): orig for key, orig in keys.items()}


def _without_name(key: str) -> tuple[str, str | None]:
    """A name without that of the adapter, and that."""
    for pattern in _NAMED:
        match = pattern.search(key)
        if match:
            return f"{key[: match.start()]}{match['before']}{match['after']}", match["name"]
    return key, None
