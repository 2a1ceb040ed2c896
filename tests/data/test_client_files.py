"""Several files a client, and files of its own to be scored on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pydantic import ValidationError
from small_runs import recipe

from fedex_lora.data.load import load
from fedex_lora.engines.rows import client_rows, load_rows
from fedex_lora.engines.setup import recipe_task
from fedex_lora.errors import UserError
from fedex_lora.recipe import DataSpec, Recipe, task_spec
from fedex_lora.recipe.reader import dump_recipe, load_recipe
from fedex_lora.runs.run import start_run
from fedex_lora.tasks import build_task

LM = build_task(task_spec(kind="causal-lm"))


def write(folder: Path, **files: list[str]) -> None:
    for name, texts in files.items():
        lines = [json.dumps({"text": text}) for text in texts]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")


def spec(folder: Path, clients, **more) -> DataSpec:
    def placed(given):
        return [folder / f for f in given] if isinstance(given, list) else folder / given

    return DataSpec(clients={name: placed(given) for name, given in clients.items()}, **more)


def texts(rows) -> dict[str, list[str]]:
    return {name: part["text"][:] for name, part in rows.items()}


def test_files_and_patterns_of_a_client_are_one_after_the_other(tmp_path):
    write(tmp_path, x=["a", "b"], y=["c"], z=["d"], lima_2=["f"], lima_1=["e"])
    given = {"ann": ["y.jsonl", "x.jsonl"], "bob": "z.jsonl", "lima": "lima_*.jsonl"}
    data = load(spec(tmp_path, given), LM, 0)
    wanted = {"ann": ["c", "a", "b"], "bob": ["d"], "lima": ["e", "f"]}
    assert data.clients is not None and texts(data.clients) == wanted
    one = load(spec(tmp_path, given, train_examples=1), LM, 0)
    assert one.clients is not None and {len(part) for part in one.clients.values()} == {1}


def test_bad_rows_of_one_of_several_files_are_named_there(tmp_path):
    write(tmp_path, x=["a"], y=["b", " "])
    with pytest.raises(UserError, match=r"y\.jsonl, line 2: text is ' '"):
        load(spec(tmp_path, {"ann": ["x.jsonl", "y.jsonl"]}), LM, 0)
    with pytest.raises(UserError, match=r"q\*\.jsonl: no file fits this pattern"):
        load(spec(tmp_path, {"ann": "q*.jsonl"}), LM, 0)
    (tmp_path / "z.jsonl").write_text('{"text": "a", "more": 1}\n')
    (tmp_path / "w.jsonl").write_text('{"text": "a", "more": ["b"]}\n')
    with pytest.raises(UserError, match=r"z\.jsonl, .*w\.jsonl: the files of one client differ"):
        load(spec(tmp_path, {"ann": ["z.jsonl", "w.jsonl"]}), LM, 0)


def test_conversations_of_several_forms_go_together(tmp_path):
    said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    (tmp_path / "x.jsonl").write_text(json.dumps({"messages": said}) + "\n")
    (tmp_path / "y.jsonl").write_text(json.dumps({"instruction": "a", "output": "b"}) + "\n")
    from fedex_lora.tasks.conversations import conversations  # noqa: PLC0415

    chat = build_task(task_spec(kind="chat"))
    data = load(spec(tmp_path, {"ann": ["x.jsonl", "y.jsonl"]}), chat, 0)
    assert data.clients is not None
    assert [one.turns for one in conversations(data.clients["ann"])] == [said, said]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"clients": {"a": []}}, "expected one or more files, all different"),
        ({"clients": {"a": ["x", "y"], "b": "x"}}, "expected one or more files, all different"),
    ],
)
def test_files_that_cannot_be_meant(data, message):
    with pytest.raises(ValidationError, match=message):
        DataSpec.model_validate(data)


@pytest.fixture
def own(tmp_path) -> Recipe:
    """Two clients of several files; one of them has rows of its own to be scored on."""
    raw = recipe(tmp_path, "llama").model_dump(exclude_unset=True)
    write(tmp_path, x=["The fox"] * 4, y=["The dog"] * 4, held=["A file is", "opened for"])
    x, y, held = (str(tmp_path / f"{name}.jsonl") for name in ("x", "y", "held"))
    raw["data"] = {"clients": {"ann": [x, y], "bob": y[:-7] + "[y].jsonl"}}
    raw["data"]["validation"] = {"ann": held}
    raw["federation"] |= {"clients": 2, "rounds": 1}
    raw["evaluation"] = {"where": "clients", "client_fraction": 0.25}
    return Recipe.model_validate(raw)


def test_a_client_is_scored_on_its_own_file(own, tmp_path):
    rows = load_rows(own, recipe_task(own))
    assert {name: len(part) for name, part in rows.train.items()} == {"ann": 8, "bob": 3}
    assert texts(rows.validation)["ann"] == ["A file is", "opened for"]
    alone = client_rows(own, recipe_task(own), "ann", tmp_path / "x.jsonl")
    assert len(alone.train["ann"]) == 4 and len(alone.validation["ann"]) == 2
    results = start_run(own, tmp_path / "run")
    assert set(results["best"]["client_scores"]) == {"ann", "bob"}


def test_the_recipe_comes_back_as_it_was(own, tmp_path):
    (tmp_path / "r.yaml").write_text(dump_recipe(own))
    with pytest.raises(UserError, match=r"data\.validation\.anna: expected one of ann, bob"):
        load_recipe(tmp_path / "r.yaml", ["data.validation={anna: x}"])
    assert load_recipe(tmp_path / "r.yaml") == own
    text = dump_recipe(own).replace("clients: 2\n", "\n").replace("where: clients", "where: server")
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(UserError, match=r"data\.validation: clients are not scored"):
        load_recipe(tmp_path / "r.yaml")
