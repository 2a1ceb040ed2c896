"""The wheel in dist/ (`make dist`), installed and used outside the checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.installed
SHORT = ["data.train_examples=30", "data.evaluation_examples=12", "training.max_steps=1"]
SHORT += ["engine.precision=float32", "engine.fuse=1"]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with an environment that has the wheel alone, with what it needs.

    With $FEDEX_LORA_BORROW the libraries are those of this environment, to save minutes; the
    program is the wheel's all the same.
    """
    (wheel,) = (ROOT / "dist").glob("*.whl")
    folder = tmp_path_factory.mktemp("installed")
    venv.create(folder / "venv", with_pip=True)
    pip = [folder / "venv/bin/python", "-m", "pip", "install", "--quiet"]
    if os.environ.get("FEDEX_LORA_BORROW"):
        (libraries,) = (folder / "venv/lib").glob("python3*/site-packages")
        own = Path(sys.prefix) / libraries.relative_to(folder / "venv")
        (libraries / "borrowed.pth").write_text(f"{own}\n")
        subprocess.run([*pip, "--no-deps", "--ignore-installed", wheel], check=True)
    else:
        constraints = ["-c", ROOT / "constraints.txt"]
        subprocess.run([*pip, *constraints, f"{wheel}[train,report,demo]"], check=True)
    return folder


def run(place: Path, *arguments: str) -> str:
    program = place / "venv/bin/fedex-lora"
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [program, *arguments], cwd=place, capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_program_is_the_wheels(place):
    python = place / "venv/bin/python"
    code = "import fedex_lora; print(fedex_lora.__file__)"
    found = subprocess.run([python, "-c", code], cwd=place, capture_output=True, text=True)
    assert Path(found.stdout.strip()).is_relative_to(place), found


def test_its_recipes_are_listed(place):
    said = run(place, "recipes")
    assert "share/fedex-lora/recipes/demo.yaml" in said and "own-files" in said


def test_its_demo_runs_and_is_reported(place):
    assert "--seeds" in run(place, "demo", "--help")
    sets = [part for one in SHORT for part in ("--set", one)]
    said = run(place, "demo", "--seeds", "0", *sets)
    assert "fedex-lora new my.yaml" in said
    run(place, "report", "runs/demo")
    assert (place / "runs/demo/report.html").stat().st_size > 10_000
