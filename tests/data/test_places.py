"""What only encoding finds wrong with a row is told with its file and line."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from small_runs import recipe
from tiny import tiny

from fedex_lora.data import stored
from fedex_lora.engines.setup import set_up, set_up_client
from fedex_lora.errors import UserError
from fedex_lora.recipe import Recipe

DROPS = (  # the system prompt is not in the text
    "{% for m in messages %}{% if m.role != 'system' %}{{ m.role }}: {{ m.content }}\n"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)
NONE = "{{ raise_exception('no system') }}"
REFUSES = f"{{% if messages[0].role == 'system' %}}{NONE}{{% endif %}}{DROPS}"


def said(*turns: tuple[str, str]) -> str:
    return json.dumps({"messages": [{"role": r, "content": c} for r, c in turns]})


GOOD = said(("user", "a"), ("assistant", "b"))
ODD = said(("system", "be kind"), ("user", "a"), ("assistant", "b"))


def chat(folder: Path, template: str, **data: Any) -> Recipe:
    """A recipe of conversations, of which bob's third is odd."""
    (folder / "t.jinja").write_text(template)
    raw = recipe(folder, "llama").model_dump(exclude_unset=True)
    raw["task"] = {"kind": "chat", "template": str(folder / "t.jinja"), "max_length": 64}
    raw["data"] |= data
    for file in (folder / "data").iterdir():
        file.write_text("\n".join([GOOD, "", GOOD] + [GOOD] * 3) + "\n")
    (folder / "data" / "bob.jsonl").write_text(f"{GOOD}\n\n{GOOD}\n{ODD}\n{GOOD}\n")
    return Recipe.model_validate(raw)


@pytest.mark.parametrize(
    "template, wrong",
    [
        (DROPS, r"task\.template: .*bob\.jsonl, line 4: the chat template leaves out turn 1"),
        (REFUSES, r"bob\.jsonl, line 4: the chat template refuses a conversation .*no system"),
    ],
)
def test_a_conversation_that_the_template_does_not_take(template, wrong, tmp_path, monkeypatch):
    made = chat(tmp_path, template)
    with pytest.raises(UserError, match=wrong):
        set_up(made)
    monkeypatch.setattr(stored, "ENCODED", 1)  # counted on from part to part
    with pytest.raises(UserError, match=wrong):
        set_up(chat(tmp_path, template, keep_in_memory=False))
    elsewhere = tmp_path / "elsewhere.jsonl"  # a client's own file, on its machine
    elsewhere.write_text(f"{ODD.replace('kind', 'brief')}\n")
    with pytest.raises(UserError, match=wrong.replace(r"bob\.jsonl, line 4", ".*elsewhere.*1")):
        set_up_client(made, "bob", elsewhere)


@pytest.mark.parametrize("template, wrong", [(DROPS, "leaves out"), (REFUSES, "refuses")])
def test_the_same_where_answers_are_predicted(template, wrong, command, tmp_path):
    tiny("llama", tmp_path / "model")
    (tmp_path / "t.jinja").write_text(template)
    file = tmp_path / "in.jsonl"
    file.write_text(f"{GOOD}\n\n{ODD}\n")
    where = ["--data", file, "--out", tmp_path / "out.jsonl"]
    sets = ["--task", "chat", "--set", f"task.template={tmp_path / 't.jinja'}"]
    code, _, told = command("predict", tmp_path / "model", *where, *sets)
    assert code == 2 and "in.jsonl, line 3: the chat template" in told and wrong in told
    assert not (tmp_path / "out.jsonl").exists()


def test_entities_that_cross_tokens(tmp_path, caplog):
    """Byte-level tokens of "Rome" may be one; an entity "Ro" ends within it."""
    raw = recipe(tmp_path).model_dump(exclude_unset=True)
    raw["task"] = {"kind": "token-classification", "labels": ["LOC"], "max_length": 32}
    text = "The quick brown fox"
    row = json.dumps({"text": text, "entities": [{"start": 4, "end": 9, "label": "LOC"}]})
    odd = json.dumps({"text": text, "entities": [{"start": 5, "end": 8, "label": "LOC"}]})
    for file in (tmp_path / "data").iterdir():
        file.write_text(f"{row}\n" * 3)
    (tmp_path / "data" / "cleo.jsonl").write_text(f"{row}\n{odd}\n")
    with caplog.at_level(logging.WARNING, "fedex_lora"):
        set_up(Recipe.model_validate(raw))
    assert "1 of 2 entities begin or end within a token" in caplog.text
    assert f"e.g. 'uic' in {tmp_path}/data/cleo.jsonl, line 2" in caplog.text
