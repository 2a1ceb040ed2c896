"""What is wrong with a recipe is said before a model is loaded, all of it at once."""

import json

import pytest
import yaml
from small_runs import recipe

from fedex_lora.engines import setup
from fedex_lora.engines.setup import set_up
from fedex_lora.errors import UserError
from fedex_lora.recipe import Recipe
from fedex_lora.recipe.reader import dump_recipe
from fedex_lora.runs import preflight
from fedex_lora.runs.preflight import check
from fedex_lora.runs.run import start_run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("preflight")


@pytest.fixture
def unloaded(monkeypatch):
    """No model may be loaded."""

    def load(*_, **__):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(setup, "load_model", load)


def whole(folder, **blocks) -> Recipe:
    """Six rows, to be dealt out."""
    base = recipe(folder)
    rows = [{"text": f"dog {i}", "label": i % 3} for i in range(6)]
    for name in ("train", "validation"):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    raw = base.model_dump(exclude_unset=True) | {"data": {"path": folder}}
    for name, block in blocks.items():
        raw[name] = {**raw.get(name, {}), **block}
    return Recipe.model_validate(raw)


def test_all_is_said_at_once_with_its_place(command, folder, tmp_path, unloaded):
    raw = yaml.safe_load(dump_recipe(whole(folder)))
    raw["lora"] |= {"r": 17, "lora_alpha": float("inf")}
    raw["federation"]["clients"] = 7
    raw["federation"]["server_learning_rate"] = -1
    raw["training"] |= {"num_train_epochs": 0, "max_steps": 10**30, "lerning_rate": 1}
    file = tmp_path / "r.yaml"
    file.write_text(yaml.safe_dump(raw, sort_keys=False))
    code, _, err = command("run", file, "--out", tmp_path / "run")
    assert code == 2 and not (tmp_path / "run").exists()
    for text in (
        "lora.lora_alpha: expected a number that is finite, got inf",
        "federation.server_learning_rate: expected a number above 0, got -1",
        "training.num_train_epochs: expected a number above 0",
        f"training.max_steps: expected a whole number of at least 1 and at most {10**9}",
        "training.lerning_rate: unknown key; did you mean 'learning_rate'?",
        "lora.r: 17 is more than any rank that the adapted layers can have (",
        "is 16 × 16); set it to 16 or less",
        "federation.clients: 7 clients, but only 6 training examples.",
    ):
        assert text in err
    lines = [line for line in err.splitlines() if ".yaml:" in line]
    assert len(lines) == 7 and all(
        line.removeprefix("error: ").startswith(f"{file}:") for line in lines
    )


@pytest.mark.parametrize(
    "blocks, lines",
    [
        ({"lora": {"r": 17}}, ["lora.r: 17 is more"]),
        (
            {"lora": {"r": 17}, "federation": {"clients": 9}},
            ["lora.r: 17", "federation.clients: 9"],
        ),
        ({"lora": {"rank_pattern": {"query": 30}}}, ["lora.rank_pattern.query: 30 is more"]),
        (
            {"lora": {"ranks": [2, 40, 3]}, "method": {"name": "flexlora"}},
            ["lora.ranks: 40 is more"],
        ),
        ({"training": {"num_train_epochs": -1}}, ["training.num_train_epochs: expected"]),
        ({"federation": {"clients": 9}}, ["federation.clients: 9 clients, but only 6"]),
        ({"data": {"path": "nowhere"}}, ["data.path: nowhere is no directory"]),
    ],
)
def test_so_it_is_from_python(folder, tmp_path, unloaded, blocks, lines):
    with pytest.raises(UserError) as told:
        start_run(whole(folder, **blocks), tmp_path / "run")
    found = str(told.value).splitlines()
    assert len(found) == len(lines) and all(f.startswith(x) for f, x in zip(found, lines))
    assert not (tmp_path / "run").exists()


def test_a_rank_that_some_layers_cannot_have_is_said_and_taken(folder, caplog):
    """k_proj is 8 × 16, of two heads of keys for four of queries."""
    lora = {"r": 12, "target_modules": ["q_proj", "k_proj"]}
    set_up(recipe(folder, "llama", lora=lora))
    assert "rank 12 is more than some layers can have (" in caplog.text
    assert "k_proj is 8 × 16)" in caplog.text
    with pytest.raises(UserError, match=r"lora\.r: 12 is more than .*; set it to 8 or less"):
        check(recipe(folder, "llama", lora=lora | {"target_modules": ["k_proj"]}))


def test_rows_are_only_read_where_something_is_wrong(folder, monkeypatch):
    """They take long, and are read anyway for the run."""
    read = []
    monkeypatch.setattr(preflight, "load_rows", lambda *_: read.append(1))
    check(whole(folder))
    assert not read
    with pytest.raises(UserError, match=r"lora\.r: 17"):
        check(whole(folder, lora={"r": 17}))
    assert read
