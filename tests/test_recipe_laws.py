"""Laws of recipes: what is written loads back equal, and no value gives anything but a recipe or a
clear error."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from test_recipe import MINIMAL, load

from fedex_lora.errors import UserError
from fedex_lora.recipe import Recipe, limits
from fedex_lora.recipe.limits import TRAINING
from fedex_lora.recipe.reader import (
    differences,
    dump_recipe,
    load_recipe,
    load_stored_recipe,
)
from fedex_lora.recipe.refused import REFUSED_TRAINING
from fedex_lora.recipe.task import own_specs

PLAIN = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
TEXTS = st.sampled_from(["1e-3", "yes", "null", "0x1", "*a", "- b", "é\n", "\x85"]) | st.text(
    min_size=1
)


@given(
    st.dictionaries(TEXTS.filter(lambda k: k not in REFUSED_TRAINING), PLAIN, max_size=3),
    st.lists(TEXTS, min_size=2, max_size=3, unique=True),
    st.booleans(),
)
def test_what_is_written_loads_back_equal(
    tmp_path_factory: pytest.TempPathFactory, training: Any, labels: Any, own_files: bool
) -> None:
    recipe = Recipe.model_validate(
        {
            "name": labels[0],
            "model": {"name": labels[1]},
            "federation": {"clients": 2, "clients_per_round": 0.5},
            "task": {"kind": "text-classification", "labels": labels},
            "data": {"clients": ["a.csv", "b.csv"]} if own_files else {"path": "data"},
            "training": training,
        }
    )
    path = tmp_path_factory.mktemp("recipe") / "r.yaml"
    path.write_text(dump_recipe(recipe), encoding="utf-8", newline="")
    again = load_stored_recipe(path)  # whatever the limits of numbers
    assert again == recipe
    assert differences(again, recipe) == []


def test_differences_are_named(tmp_path: Path) -> None:
    a = load(tmp_path, MINIMAL, "training.learning_rate=1e-3", "lora.target_modules=[q]")
    b = load(tmp_path, MINIMAL, "training.learning_rate=2e-3", "training.optim=x", "lora.r=2")
    assert differences(a, a) == []
    assert differences(a, b) == [
        "lora.r: 8 != 2",
        "lora.target_modules: ['q'] != None",
        "training.learning_rate: 0.001 != 0.002",
        "training.optim: not set != x",
    ]


ODD: list[Any] = [
    0, -1, 1.5, True, None, "", "x", [], {}, [1], {"a": 1}, float("inf"), float("nan"), 1e30,
    10**30, -(10**30), "nan", "../..", "a\nb", "é" * 300, [None], [[1]], {"": 1}, ["x", "x"],
    "1e400", {"a": {"b": [1]}}, 2**63, 1e-320, [float("nan")], [10**30], "%s{}", "~", "/",
]  # fmt: skip


def _keys(part: type[Any], before: str = "") -> Iterator[str]:
    for name, field in part.model_fields.items():
        yield before + name
        if isinstance(field.annotation, type) and hasattr(field.annotation, "model_fields"):
            yield from _keys(field.annotation, f"{before}{name}.")


TASK_KEYS = {f"task.{name}" for spec in own_specs() for name in spec.model_fields}
KEYS = [
    *_keys(Recipe),
    *sorted(TASK_KEYS),
    *(f"training.{name}" for name in TRAINING),
    "training.max_steps",
    "lora.no",
]


@settings(max_examples=200)
@given(st.lists(st.tuples(st.sampled_from(KEYS), st.sampled_from(ODD)), min_size=1, max_size=3))
def test_no_value_gives_anything_but_a_recipe_or_a_clear_error(
    tmp_path_factory: pytest.TempPathFactory, given: list[tuple[str, Any]]
) -> None:
    raw = yaml.safe_load(MINIMAL)
    for key, value in given:
        block, *names = raw, *key.split(".")
        for name in names[:-1]:
            if not isinstance(block.get(name), dict):
                block[name] = {}
            block = block[name]
        block[names[-1]] = value
    path = tmp_path_factory.mktemp("odd") / "r.yaml"
    path.write_text(yaml.safe_dump(raw, allow_unicode=True))
    try:
        recipe = load_recipe(path)
    except UserError as error:
        for line in str(error).splitlines():
            assert line.startswith(f"{path}:") and len(line) < 1000
    else:
        assert list(limits(recipe)) == [] and load_recipe(path) == recipe


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_recipe_as_windows_writes_it(encoding: str, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_bytes(MINIMAL.replace("\n", "\r\n").encode(encoding))
    (tmp_path / "plain.yaml").write_text(MINIMAL)
    assert load_recipe(tmp_path / "r.yaml") == load_recipe(tmp_path / "plain.yaml")
