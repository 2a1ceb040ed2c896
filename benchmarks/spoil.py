"""A message taken apart and put together again, past all of the program's checks: to spoil it."""

from __future__ import annotations

import json
from typing import Any

from safetensors.torch import load, save
from torch import Tensor


def parts(blob: bytes) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A message's tensors by name and its JSON, of which `about` is a part."""
    header = json.loads(blob[8 : 8 + int.from_bytes(blob[:8], "little")])
    return load(blob), json.loads(header["__metadata__"]["fedex"])


def whole(tensors: dict[str, Tensor], meta: Any) -> bytes:
    """The inverse; `meta` may also be JSON as text."""
    text = meta if isinstance(meta, str) else json.dumps(meta)
    return save({n: t.contiguous().clone() for n, t in tensors.items()}, {"fedex": text})


def about(blob: bytes) -> dict[str, Any]:
    """What a message says of itself."""
    return parts(blob)[1]["about"]
