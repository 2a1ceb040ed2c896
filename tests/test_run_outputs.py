"""What a run keeps beside its numbers: texts with verdicts, and counts of rows it could not use."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from small_runs import SIZES, StopAfter, recipe

from fedex_lora.errors import UserError
from fedex_lora.recipe import Recipe
from fedex_lora.runs.run import resume_run, start_run
from fedex_lora.tasks.outputs import VerdictFile

ASKED = {
    "kind": "instruction",
    "prompt": "{text} ",
    "response": "{label}",
    "generate": True,
    "max_new_tokens": 3,
    "max_length": 64,
}
OWN = {"where": "both", "client_fraction": 0.4}


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def kept(run: Path) -> dict[str, bytes]:
    """All files of texts, by their path."""
    folder = run / "outputs"
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*.*"))}


def share(rows: list[dict[str, Any]]) -> float:
    return sum(row["correct"] for row in rows) / len(rows)


@pytest.fixture(scope="module")
def generated(tmp_path_factory):
    folder = tmp_path_factory.mktemp("generated")
    asked = recipe(folder, "llama", task=ASKED, evaluation=OWN, federation={"rounds": 3})
    start_run(asked, folder / "run")
    return folder, asked


def test_every_evaluation_s_texts_are_kept_with_verdicts_that_give_the_score(generated):
    run = generated[0] / "run"
    records = lines(run / "metrics.jsonl")
    for record in records:
        folder = run / "outputs" / f"{record['round']:04d}"
        rows = lines(folder / "validation.jsonl")
        assert [row["row"] for row in rows] == list(range(6))
        assert {"prompt", "output", "reference", "correct"} <= rows[0].keys()
        assert share(rows) == record["scores"]["validation"]["exact_match"]
        for client, scores in record["client_scores"].items():
            own = lines(folder / "clients" / client / "own-rows.jsonl")
            assert share(own) == scores["exact_match"]
    best = json.loads((run / "results.json").read_text())
    tested = lines(run / "outputs" / f"{best['best_round']:04d}" / "test.jsonl")
    assert share(tested) == best["best"]["scores"]["test"]["exact_match"]


def test_a_resumed_run_keeps_the_same_texts(generated, tmp_path):
    folder, asked = generated
    with pytest.raises(KeyboardInterrupt):
        start_run(asked, tmp_path / "run", StopAfter(1))
    resume_run(tmp_path / "run")
    assert kept(tmp_path / "run") == kept(folder / "run")


def test_clients_alone_have_texts_of_their_own(tmp_path):
    asked = recipe(tmp_path, "llama", task=ASKED, method={"name": "local"})
    start_run(asked, tmp_path / "run")
    alone = lines(tmp_path / "run" / "metrics.jsonl")[-1]["scores_alone"]
    for client in SIZES:
        file = tmp_path / "run" / "outputs" / "0002" / "clients" / client / "validation.jsonl"
        assert share(lines(file)) == alone[client]["validation"]["exact_match"]


def test_a_task_that_generates_nothing_keeps_no_texts(tmp_path):
    start_run(recipe(tmp_path, federation={"rounds": 1}), tmp_path / "run")
    assert not (tmp_path / "run" / "outputs").exists()


def test_texts_that_cannot_be_written_are_an_error_and_leave_the_old(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="cannot be used"):
        VerdictFile(tmp_path / "file" / "validation.jsonl").verdicts([{"row": 0}])
    assert (tmp_path / "file").read_text() == "in the way"


def places(folder: Path, method: str, **task: Any) -> Recipe:
    """E2E with five training rows, one of which is long, and four others, one of which is long."""

    def row(i: int, words: int) -> dict[str, str]:
        about = f"name[Place {i}], food[{' '.join(['Thai'] * words)}]"
        return {"meaning_representation": about, "human_reference": f"Eat at {i}."}

    def write(name: str, lengths: list[int]) -> Path:
        file = folder / "rows" / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row(i, n)) + "\n" for i, n in enumerate(lengths)))
        return file

    (folder / "rows").mkdir()
    clients = [write("ann", [1, 90, 1]), write("bob", [1, 1])]
    write("validation", [1, 1, 90, 1])
    return recipe(
        folder,
        "llama",
        method={"name": method},
        federation={"clients": 2, "rounds": 1},
        task={"kind": "e2e", **task},
        data={"clients": clients, "path": folder / "rows"},
    )


@pytest.mark.parametrize("method", ["fedex", "centralized"])
@pytest.mark.parametrize("more, not_asked", [({}, 1), ({"evaluation_max_length": 600}, 0)])
def test_rows_that_could_not_be_used_are_counted(tmp_path, method, more, not_asked):
    start_run(places(tmp_path, method, max_length=96, **more), tmp_path / "run")
    told = json.loads((tmp_path / "run" / "data.json").read_text())
    assert told["training"] == {
        "ann": {"rows": 3, "left_out": 1},
        "bob": {"rows": 2, "left_out": 0},
    }
    assert told["evaluation"] == {"validation": {"rows": 4, "left_out": 0, "not_asked": not_asked}}
