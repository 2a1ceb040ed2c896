"""Seconds that were measured on this machine before, so that nothing is measured twice.

They lie in one file, `choices.json` in the user's cache directory; FEDEX_LORA_CACHE names another.
Without it, and where it is damaged or of another version, everything is measured anew.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fedex_lora.disk import parsed, write_atomic
from fedex_lora.errors import StorageError

VERSION = 1
MOST = 500  # the oldest are forgotten

Seconds = tuple[float, float]  # of two ways to do the same


def path() -> Path:
    """Where measured seconds are kept."""
    own = os.environ.get("FEDEX_LORA_CACHE")
    if own:
        return Path(own) / "choices.json"
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "fedex-lora" / "choices.json"


def remembered(what: Mapping[str, Any], measure: Callable[[], Seconds]) -> tuple[Seconds, bool]:
    """What was measured of this before, or is now; and whether it was before.

    Of several processes that measure the same, all take what the first one to end has found.

    Args:
        what: Whatever the seconds depend on; values that JSON has.
    """
    key = json.dumps(what, sort_keys=True)
    known = _read().get(key)
    if known is not None:
        return known, True
    found = measure()
    choices = _read()
    if key in choices:
        return choices[key], False
    kept = dict([*choices.items(), (key, found)][-MOST:])
    try:
        path().parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path(), json.dumps({"version": VERSION, "seconds": kept}, indent=1).encode())
    except (OSError, StorageError):
        pass  # it is measured again the next time
    return found, False


def _read() -> dict[str, Seconds]:
    try:
        told = parsed(path().read_bytes())
        if told["version"] != VERSION:
            return {}
        return {key: _seconds(value) for key, value in told["seconds"].items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return {}


def _seconds(value: Any) -> Seconds:
    one, other = map(float, value)
    if not (math.isfinite(one) and math.isfinite(other) and min(one, other) >= 0):
        raise ValueError(f"no seconds: {value}")
    return one, other
