"""Embeddings of single tokens, which PEFT trains with `trainable_token_indices`.

It saves the new rows, in the order of their indices; a layer that shares the embedding's weight
gets the same ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedex_lora.errors import DataError
from fedex_lora.model.config import CONFIG
from fedex_lora.model.keys import PREFIX

_ROWS = ".token_adapter.trainable_tokens_delta"


def of_tokens(key: str) -> bool:
    """Whether a tensor holds rows of an embedding."""
    return key.endswith(_ROWS)


def embedding_of(key: str) -> str:
    """The weight that such rows belong to.

    Example:
        >>> embedding_of("base_model.model.wte.token_adapter.trainable_tokens_delta")
        'wte.weight'
    """
    return f"{key.removeprefix(PREFIX).removesuffix(_ROWS)}.weight"


def indices(name: str, config: Mapping[str, Any], key: str) -> list[int]:
    """Which rows they are.

    Args:
        name: The adapter, for errors.

    Raises:
        UserError: The config does not say.
    """
    given, module = config.get("trainable_token_indices"), embedding_of(key).removesuffix(".weight")
    if isinstance(given, dict):
        found = [value for own, value in given.items() if f".{module}".endswith(f".{own}")]
        given = found[0] if len(found) == 1 else None
    if not isinstance(given, list) or not all(type(i) is int and i >= 0 for i in given):
        raise DataError(
            f"{name}: trainable_token_indices in {CONFIG} does not say which tokens {key} is of; "
            "expected a list of their numbers"
        )
    return given
