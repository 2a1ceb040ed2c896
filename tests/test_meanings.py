"""Every key of a recipe is explained, by an example that is valid."""

from __future__ import annotations

import pytest
import yaml

from fedex_lora.recipe import TaskSpec, spec_of
from fedex_lora.recipe.meanings import MEANINGS, Key, keys
from fedex_lora.recipe.reader import recipe_of_text

KEYS = list(keys())


def found(name: str, kind: str = "") -> Key:
    return next(key for key in KEYS if key.name == name and key.kind in (kind, ""))


def test_every_key_has_a_meaning_and_an_example():
    lacking = [f"{k.name} {k.kind}" for k in KEYS if not k.meaning or not k.example]
    assert not lacking, f"say what they mean in recipe/meanings.py: {lacking}"


def test_nothing_is_explained_that_is_no_key():
    known = {key.name for key in KEYS} | {f"{key.name} ({key.kind})" for key in KEYS}
    assert set(MEANINGS) <= known


def test_types_and_defaults_are_those_of_the_code():
    rank = found("lora.r")
    assert (rank.type, rank.default) == ("whole number (at least 1)", "8")
    assert found("federation.clients_per_round").type == "all or whole number or number"
    assert found("engine.fuse").type == "whole number (at least 1) or auto"
    assert found("data.clients").type == "list of path"
    assert found("task.prompt", "instruction").default == ""
    assert found("model.quantisation").default == "null"
    assert {key.kind for key in KEYS} > {"", "glue", "instruction"}


def alone(key: Key) -> dict:
    """What a valid recipe has in place of other values where it has this key."""
    changes = {
        "method.rank": {"method": {"name": "fedex-svd"}},
        "method.options": {"method": {"name": "florist"}},
        "lora.ranks": {"method": {"name": "fedex-reinit"}},
        "model.quantisation": {"model": {"placement": "side"}},
        "federation.partition.alpha": {"federation": {"partition": {"kind": "dirichlet"}}},
        "federation.partition.shards_per_client": {"federation": {"partition": {"kind": "shards"}}},
        "federation.partition.column": {"federation": {"partition": {"kind": "by"}}},
        "federation.partition.kind": {"federation": {"partition": {"alpha": 0.3}}},
        "federation.min_clients": {"federation": {"clients": 3}},
        "federation.mean": {
            "method": {"name": "fedit"},
            "federation": {"liars": 1, "min_clients": 3},
        },
        "federation.align": {"method": {"name": "fedit"}},
        "federation.liars": {
            "method": {"name": "fedit"},
            "federation": {"mean": "median", "min_clients": 3},
        },
        "federation.oversample": {"engine": {"kind": "flower"}},
        "data.config": {"data": {"name": "x/y", "path": None}},
        "data.revision": {"data": {"name": "x/y", "path": None}},
        "data.name": {"data": {"path": None}},
        "data.source": {"data": {"path": None}},
        "data.clients": {"data": {"path": None}, "federation": {"clients": 2}},
        "task.columns": {"task": {"kind": "math", "name": "gsm8k"}},
    }
    return changes.get(key.name, {})


@pytest.mark.parametrize("name", [k.name for k in KEYS if not k.kind and "privacy" not in k.name])
def test_an_example_is_valid_in_a_recipe(name):
    key = found(name)
    raw: dict = {
        "name": "x",
        "model": {"name": "m"},
        "task": {"kind": "causal-lm"},
        "data": {"path": "d"},
    }
    for block, values in alone(key).items():
        raw[block] = {**raw.get(block, {}), **values}
    *blocks, last = name.split(".")
    inner = raw
    for block in blocks:
        inner = inner.setdefault(block, {})
    inner[last] = yaml.safe_load(key.example)
    if key.name == "task.kind":
        raw["task"]["labels"] = ["a", "b"]
    recipe = recipe_of_text(yaml.safe_dump(raw)).model_dump(mode="json")
    for block in blocks:
        recipe = recipe[block]
    assert recipe[last] == yaml.safe_load(key.example)


@pytest.mark.parametrize("key", [k for k in KEYS if k.kind], ids=lambda k: f"{k.kind} {k.name}")
def test_an_example_is_of_its_type_in_a_task(key):
    spec = spec_of(key.kind)
    assert spec is not None and issubclass(spec, TaskSpec)
    field = key.name.removeprefix("task.")
    text = {"name": {"math": "gsm8k", "commonsense": "boolq"}.get(key.kind, "sst2")}
    value = text.get(field, yaml.safe_load(key.example))
    given = {"kind": key.kind, "prompt": "{a}", "response": "{b}", "name": text["name"]}
    given = {k: v for k, v in given.items() if k in spec.model_fields} | {field: value}
    assert getattr(spec.model_validate(given), field) == value
