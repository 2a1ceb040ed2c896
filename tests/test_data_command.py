"""`fedex-lora data`: rows as the model sees them."""

from __future__ import annotations

import json

import pytest
from commands import Command
from small_runs import recipe

from fedex_lora.recipe.reader import dump_recipe


@pytest.fixture
def show(command: Command, tmp_path):
    """Runs it on a recipe; returns (exit code, output, errors)."""

    def call(spec, *options):
        (tmp_path / "recipe.yaml").write_text(dump_recipe(spec))
        return command("data", tmp_path / "recipe.yaml", *options)

    return call


def test_what_a_language_model_predicts_is_marked(show, tmp_path):
    code, out, _ = show(recipe(tmp_path, "llama"), "--show", 2)
    assert code == 0 and "ann: 9 rows, 0 left out" in out and "validation: 6 rows" in out
    assert "T⟦he quick brown fox jumps over the lazy dog. 0 a⟧" in out.replace("\n", "")
    assert "row 2 -" in out and "row 3 -" not in out


def test_labels_are_shown_of_the_client_that_was_asked_for(show, tmp_path):
    spec = recipe(tmp_path, task={"max_length": 64})
    code, out, _ = show(spec, "--client", "bob", "--show", 1)
    assert code == 0 and "<s>A file is opened" in out and "0 bob</s>⟦ y⟧" in out
    code, out, err = show(spec, "--client", "bobby")
    assert code == 2 and "--client: 'bobby' has no rows; these have: ann, bob, cleo" in err


def test_rows_left_out_are_counted_with_the_reason(show, tmp_path):
    said = [{"role": "user", "content": "dog?"}, {"role": "assistant", "content": "fox"}]
    long = [{"role": "user", "content": "fox " * 99}, said[1]]
    task = {"kind": "chat", "template": "chatml", "max_length": 128}
    spec = recipe(tmp_path, "llama", task=task)
    for name in ("ann", "bob", "cleo", "validation", "test"):
        rows = [said, said] if name != "ann" else [said, long, said]
        text = "".join(json.dumps({"messages": row}) + "\n" for row in rows)
        (tmp_path / "data" / f"{name}.jsonl").write_text(text)
    code, out, err = show(spec)
    assert code == 0 and "left out" not in err
    assert "ann: 3 rows, 1 left out\n  1 of 3 rows left out: their first answer lies bey" in out
    assert "<|im_start|>assistant\n⟦fox<|im_end|>\n⟧" in out
