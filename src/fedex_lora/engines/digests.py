"""SHA-256 of what numbers are made of: tensors, tokenizers, rows."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any, cast

import pyarrow as pa
import torch
from datasets import Dataset
from torch import Tensor


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """Of names, shapes, dtypes and contents, in the order of names."""
    found = hashlib.sha256()
    for name in sorted(tensors):
        t = tensors[name].detach().cpu().contiguous()
        found.update(f"{name} {tuple(t.shape)} {t.dtype};".encode())
        found.update(t.flatten().view(torch.uint8).numpy().data if t.numel() else b"")
    return found.hexdigest()


def tokenizer_digest(tokenizer: Any) -> str:
    """Of all that decides how a text becomes numbers."""
    return hashlib.sha256(tokenizer_text(tokenizer).encode()).hexdigest()


def tokenizer_text(tokenizer: Any) -> str:
    """All that decides how a text becomes numbers, as one text."""
    if not hasattr(tokenizer, "get_vocab"):
        return json.dumps(tokenizer.to_dict(), sort_keys=True, default=str)  # an image processor
    special = {k: str(v) for k, v in tokenizer.special_tokens_map.items()}
    fast = getattr(tokenizer, "backend_tokenizer", None)
    rules = json.loads(fast.to_str()) if fast is not None else {}
    rules |= {"truncation": None, "padding": None}  # set anew by every call
    vocabulary, chat = sorted(tokenizer.get_vocab().items()), tokenizer.chat_template
    return json.dumps([vocabulary, special, rules, chat], sort_keys=True)


def rows_digest(rows: Dataset) -> str:
    """Of columns, values and their order; a file is read once, whatever its size.

    Example:
        >>> from datasets import Dataset
        >>> one, other = Dataset.from_dict({"x": [1, 2]}), Dataset.from_dict({"x": [2, 1]})
        >>> rows_digest(one) == rows_digest(other.select([1, 0])) != rows_digest(other)
        True
    """
    found = hashlib.sha256(" ".join(sorted(rows.column_names)).encode())
    parts = cast("Iterator[pa.Table]", rows.with_format("arrow").iter(1000))
    for part in parts:
        for batch in part.select(sorted(part.column_names)).combine_chunks().to_batches():
            found.update(batch.serialize())
    return found.hexdigest()
