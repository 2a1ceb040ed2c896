"""Whether there is a place, disk and memory for a merge, asked before it starts."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

import psutil

from fedex_lora.disk import check_free
from fedex_lora.errors import RecipeError, StorageError, size


def check_place(out: Path, inputs: Iterable[Path], needed: int) -> None:
    """Raises a `UserError` if `out` is in use, lies in an input, or the disk has too little room.

    Args:
        needed: Bytes that will be written, at most.
    """
    check_free(out)
    target = out.absolute().resolve()
    for folder in inputs:
        if target.is_relative_to(folder.resolve()):
            raise RecipeError(f"`out`: {out} lies in {folder}, which is read; name a place outside")
    there = next(p for p in (target, *target.parents) if p.is_dir())
    free = shutil.disk_usage(there).free
    if needed > free:
        raise StorageError(
            f"`out`: up to {size(needed)} will be written to {out}, and only {size(free)} "
            "are free there; free some space, choose another place, or a smaller `rank` or `dtype`"
        )


def check_memory(needed: int) -> None:
    """Raises a `UserError` if less than `needed` bytes of memory are available."""
    free = psutil.virtual_memory().available
    if needed > free:
        raise StorageError(
            f"the largest layer takes {size(needed)} of memory while it is merged, and "
            f"{size(free)} are available; close other programs or use a larger machine"
        )
