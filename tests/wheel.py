"""`python tests/wheel.py WHEEL`: whether a wheel holds all that the program reads at run time."""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).resolve().parents[1]


def absent(wheel: Path) -> list[str]:
    """Files of the package and recipes that the wheel lacks."""
    with zipfile.ZipFile(wheel) as opened:
        there = {PurePosixPath(name) for name in opened.namelist()}
    held = {path.relative_to(path.parts[0]).as_posix() for path in there if len(path.parts) > 1}
    package = ROOT / "src/fedex_lora"
    modules = [f for f in package.rglob("*") if f.is_file() and f.suffix != ".pyc"]
    recipes = [f for f in (ROOT / "recipes").rglob("*") if f.is_file() and f.suffix != ".pyc"]
    needed = [f.relative_to(package).as_posix() for f in modules]
    needed += [f"data/share/fedex-lora/{f.relative_to(ROOT).as_posix()}" for f in recipes]
    return sorted(set(needed) - held)


if __name__ == "__main__":
    if missing := absent(Path(sys.argv[1])):
        sys.exit("the wheel lacks: " + ", ".join(missing))
    print("the wheel is complete")
