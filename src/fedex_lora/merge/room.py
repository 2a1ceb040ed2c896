"""Whether there is a place, disk and memory for a merge, asked before it starts."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

import psutil

from fedex_lora.disk import check_free
from fedex_lora.errors import RecipeError, StorageError


def check_place(out: Path, inputs: Iterable[Path], size: int) -> None:
    """Raises a `UserError` if `out` is in use, lies in an input, or the disk has too little room.

    Args:
        size: Bytes that will be written, at most.
    """
    check_free(out)
    target = out.absolute().resolve()
    for folder in inputs:
        if target.is_relative_to(folder.resolve()):
            raise RecipeError(f"`out`: {out} lies in {folder}, which is read; name a place outside")
    there = next(p for p in (target, *target.parents) if p.is_dir())
    free = shutil.disk_usage(there).free
    if size > free:
        raise StorageError(
            f"`out`: up to {gigabytes(size)} will be written to {out}, and only {gigabytes(free)} "
            "are free there; free some space, choose another place, or a smaller `rank` or `dtype`"
        )


def check_memory(size: int) -> None:
    """Raises a `UserError` if less than `size` bytes of memory are available."""
    free = psutil.virtual_memory().available
    if size > free:
        raise StorageError(
            f"the largest layer takes {gigabytes(size)} of memory while it is merged, and "
            f"{gigabytes(free)} are available; close other programs or use a larger machine"
        )


def gigabytes(size: int) -> str:
    """Bytes for people.

    Example:
        >>> gigabytes(1_500_000_000), gigabytes(12_000)
        ('1.50 GB', '0.01 MB')
    """
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.2f} MB"
