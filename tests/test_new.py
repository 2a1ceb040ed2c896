"""`fedex-lora new`: what it writes is planned without a change; what it cannot mean is named."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
import yaml
from tiny import tiny
from typer.testing import CliRunner

from fedex_lora.cli import app
from fedex_lora.errors import RecipeError
from fedex_lora.recipe.reader import load_recipe
from fedex_lora.runs.first_recipe import commented, first_recipe

COLUMNS = {"text-classification": ["review", "label"], "causal-lm": ["note"]}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Two clients' files of each kind, and a tiny model."""
    folder = tmp_path_factory.mktemp("new")
    tiny("roberta", folder / "model")
    for name in ("ann", "bob"):
        lines = [f"row {i} of {name},{['yes', 'no', '10', '9'][i % 4]}" for i in range(30)]
        (folder / f"{name}.csv").write_text("\n".join(["review,label", *lines]) + "\n")
        rows = [{"q": f"is {i} even", "a": "yes" if i % 2 else "no"} for i in range(9)]
        (folder / f"{name}2.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return folder


def options(place: Path, *more: str, task: str = "text-classification") -> list[str]:
    files = [str(place / f"{name}.csv") for name in ("ann", "bob")]
    given = ["--model", str(place / "model"), "--task", task, "--method", "fedex"]
    return [*given, "--data", files[0], "--data", files[1], *more]


def test_with_all_options_nothing_is_asked_and_the_recipe_passes_plan(place, tmp_path, command):
    file = tmp_path / "my.yaml"
    sets = ("--set", "task.text_column=review")
    code, said, err = command("new", file, *options(place, *sets))
    assert code == 0, err
    assert str(file) in said and "?" not in said
    recipe = load_recipe(file)
    # every class that there is; numbers by value and before names
    assert recipe.task.labels == ["9", "10", "no", "yes"]  # type: ignore[attr-defined]
    assert recipe.federation.clients == 2 and recipe.evaluation.where == "clients"
    code, said, err = command("plan", file, "--no-measure")
    assert code == 0 and "ann: 27, bob: 27" in said, err  # a tenth is kept for scores


def test_every_line_has_a_comment(place, tmp_path, command):
    file = tmp_path / "my.yaml"
    command("new", file, *options(place, "--set", "task.text_column=review"))
    lines = [line for line in file.read_text().splitlines() if line and not line.endswith(":")]
    for before, line in pairwise(lines):
        assert "#" in line or before.lstrip().startswith("#"), line


def test_nothing_is_written_over(place, tmp_path, command):
    file = tmp_path / "my.yaml"
    file.write_text("mine")
    code, _, err = command("new", file, *options(place))
    assert code == 2 and "exists" in err and file.read_text() == "mine"


@pytest.mark.parametrize(
    "change, named",
    [
        ({"--model": "a b"}, "--model: 'a b'"),
        ({"--model": "."}, "config.json"),
        ({"--task": "text-classificatio"}, "did you mean 'text-classification'"),
        ({"--method": "fedx"}, "--method: there is no method 'fedx'"),
        ({"--data": "nowhere.csv"}, "--data: nowhere.csv: no such file"),
        ({"--evaluation": "nowhere"}, "--evaluation: nowhere"),
        ({"--set": "task.text_colum=x"}, "--set task.text_colum=x: expected"),
        ({"--set": "lora.r=4"}, "--set lora.r=4: expected"),
    ],
)
def test_a_bad_answer_is_named(change, named, place, tmp_path, command):
    given = options(place)
    for option, value in change.items():
        at = given.index(option) + 1 if option in given else len(given) + 1
        given[at - 1 : at + 1] = [option, value]
    code, _, err = command("new", tmp_path / "my.yaml", *given)
    assert code == 2 and named in err, err
    assert not (tmp_path / "my.yaml").exists()


def test_what_is_missing_is_asked_and_asked_again(place, tmp_path):
    file, model = tmp_path / "my.yaml", place / "model"
    files = [str(place / f"{name}2.jsonl") for name in ("ann", "bob")]
    answers = ["a b", str(model), "instruction", files[0], " ".join(files), "fedex-svd", "", ""]
    done = CliRunner().invoke(app, ["new", str(file)], input="\n".join(answers) + "\n")
    assert done.exit_code == 0, done.output
    recipe = load_recipe(file)
    assert recipe.task.prompt == "{q}\n" and recipe.task.response == "{a}"  # type: ignore[attr-defined]
    assert (recipe.method.name, recipe.method.rank) == ("fedex-svd", 8)


def test_nobody_there_to_answer(place, tmp_path):
    given = ["new", str(tmp_path / "my.yaml"), "--model", str(place / "model")]
    done = CliRunner().invoke(app, given, input="")
    assert isinstance(done.exception, RecipeError) and "--task: missing" in str(done.exception)


def test_where_nobody_answers_the_method_is_the_one_that_is_offered(place, tmp_path):
    given = options(place, "--set", "task.text_column=review")
    file = tmp_path / "my.yaml"
    at = given.index("--method")
    del given[at : at + 2]
    done = CliRunner().invoke(app, ["new", str(file), *map(str, given)], input="")
    assert done.exit_code == 0 and load_recipe(file).method.name == "fedex", done.output


def test_values_read_back_as_they_were():
    values = {"name": "x: y", "task": {"prompt": "a\n{b}: #c", "labels": ["1", "no", "ü, v"]}}
    values |= {"training": {"learning_rate": 1e-3, "num_train_epochs": 1}, "seed": 0}
    assert yaml.safe_load(commented(values, "head")) == values


@pytest.mark.parametrize(
    "task, row, labels",
    [
        (
            "token-classification",
            {"tokens": ["Ann", "Lee", "ran"], "tags": "B-PER I-PER O"},
            ["PER"],
        ),
        (
            "token-classification",
            {"text": "Ann ran", "entities": [{"start": 0, "end": 3, "label": "PER"}]},
            ["PER"],
        ),
        (
            "multi-label-classification",
            {"text": "Ann ran", "labels": ["I-2", "B-1"]},
            ["B-1", "I-2"],
        ),
    ],
)
def test_classes_are_those_of_the_rows(task, row, labels, place, tmp_path, command):
    tags = {"tags": row["tags"].split()} if "tags" in row else {}
    files = [tmp_path / f"{name}.jsonl" for name in ("ann", "bob")]
    for file in files:
        file.write_text((json.dumps(row | tags) + "\n") * 9)
    given = ["--model", place / "model", "--method", "fedex", "--task", task]
    code, said, err = command(
        "new", tmp_path / "my.yaml", *given, "--data", files[0], "--data", files[1]
    )
    assert code == 0 and "?" not in said, err
    assert load_recipe(tmp_path / "my.yaml").task.labels == labels  # type: ignore[attr-defined]
    assert command("data", tmp_path / "my.yaml")[0] == 0


def test_a_prompt_is_given_as_it_is_and_a_recipe_that_is_none_is_not_left(place, tmp_path, command):
    file = tmp_path / "my.yaml"
    given = [part for name in ("ann", "bob") for part in ("--data", place / f"{name}2.jsonl")]
    given += ["--model", place / "model", "--method", "fedex", "--task", "instruction"]
    prompt = ("--set", "task.prompt={q}", "--set", "task.response={a}")
    code, _, err = command("new", file, *given, *prompt, "--set", "task.max_length=two")
    assert code == 2 and "task.max_length" in err and not file.exists()
    assert command("new", file, *given, *prompt)[0] == 0
    task = load_recipe(file).task
    assert (task.prompt, task.max_length) == ("{q}", 512)  # type: ignore[attr-defined]


def test_rows_are_as_long_as_their_task_has_them(place):
    files = [Path("a.csv"), Path("b.csv")]
    kinds = {"text-regression": 128, "multiple-choice": 128, "causal-lm": 512}
    for kind, length in kinds.items():
        found = first_recipe("x", "model", {"kind": kind}, "fedex", files, None)
        assert found["task"]["max_length"] == length


@pytest.mark.parametrize("pair", [False, True])
def test_a_column_that_is_not_read_is_told(pair, place, tmp_path, command):
    for name in ("ann", "bob"):
        (tmp_path / f"{name}.csv").write_text("text,other,label\n" + "a,b,0.5\n" * 20)
    data = [part for name in ("ann", "bob") for part in ("--data", tmp_path / f"{name}.csv")]
    sets = ("--set", "task.text_pair_column=other") if pair else ()
    given = ("--model", place / "model", "--task", "text-regression", "--method", "fedex")
    code, said, err = command("new", tmp_path / "my.yaml", *given, *data, *sets)
    assert code == 0, err
    told = "Not read: other. A second text is named by task.text_pair_column"
    assert (told in said) is not pair
