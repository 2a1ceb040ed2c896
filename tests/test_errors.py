"""Errors: their kinds, and whose words they use."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from commands import Command

import fedex_lora
from fedex_lora import errors
from fedex_lora.cli.spoken import spoken
from fedex_lora.flower.deploy.names import host_name
from fedex_lora.recipe.reader import load_recipe

SRC = Path(fedex_lora.__file__).parent
# These hold command lines, style sheets and templates of files
COMMANDS = {
    "experiments/analysis/claims.py",
    "experiments/grid/plan.py",
    "experiments/report/page.py",
    "experiments/report/tables.py",
    "flower/deploy/asking.py",
    "flower/deploy/commands.py",
    "flower/deploy/templates.py",
}
OPTION = re.compile(r"(?<![\w-])--[a-z]")


def texts(file: Path) -> list[str]:
    """String literals that are no docstrings, with `…` for what an f-string fills in."""
    tree = ast.parse(file.read_text())
    passed = {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Expr)}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            passed |= {id(part) for part in node.values}
            parts = [p.value if isinstance(p, ast.Constant) else "…" for p in node.values]
            found.append("".join(map(str, parts)))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found += [node.value] * (id(node) not in passed)
    return found


def test_the_library_speaks_no_options() -> None:
    speaking = []
    for file in SRC.rglob("*.py"):
        name = file.relative_to(SRC).as_posix()
        if not name.startswith("cli/") and name not in COMMANDS:
            # a command to copy has them
            speaking += [(name, t) for t in texts(file) if OPTION.search(t.split("fedex-lora ")[0])]
    assert speaking == []


def test_what_the_library_calls_arguments_are_options_of_the_command_line() -> None:
    """Every `name=` in backquotes is said as an option."""
    argument, left = re.compile(r"`[a-z_]+=[^`]*`"), []
    for file in SRC.rglob("*.py"):
        if not file.is_relative_to(SRC / "cli"):
            left += [t for t in texts(file) if argument.search(spoken(t))]
    assert left == []


def test_one_error_in_both_languages(command: Command, tmp_path: Path) -> None:
    with pytest.raises(errors.RecipeError, match=r"^`host`: '0.0.0.0': nobody can reach"):
        host_name("0.0.0.0")
    rest = ("--host", "0.0.0.0", "--clients", "a")
    code, _, told = command("deploy", "init", tmp_path / "new", *rest)
    assert code == 2 and told.startswith("error: --host: '0.0.0.0': nobody can reach")


def test_an_override_is_named_as_it_was_given(command: Command, tmp_path: Path) -> None:
    recipe = Path(__file__).resolve().parents[1] / "recipes/demo.yaml"
    with pytest.raises(errors.RecipeError, match=r"^`set=lora.q=a b`: lora.q: unknown key"):
        load_recipe(recipe, ["lora.q=a b"])
    code, _, told = command("run", recipe, "--set", "lora.q=a b", "--out", tmp_path / "new")
    assert code == 2 and told.startswith("error: --set lora.q=a b: lora.q: unknown key")


def test_kinds_are_user_errors_and_stand_in_the_table() -> None:
    table = errors.__doc__ or ""
    kinds = [k for k in vars(errors).values() if isinstance(k, type) and issubclass(k, ValueError)]
    assert len(kinds) == 10
    for kind in kinds:
        assert issubclass(kind, errors.UserError) and f"`{kind.__name__}`" in table
