"""Conversations: what is read of rows, and which tokens of a template's text are learned."""

from __future__ import annotations

import json

import pytest
from datasets import Dataset
from tiny import tiny, tokenizer_of

from fedex_lora.data.read import read
from fedex_lora.errors import UserError
from fedex_lora.recipe import task_spec
from fedex_lora.tasks import build_task
from fedex_lora.tasks.chat_templates import TEMPLATES

SAID = [
    ("system", "Be brief."),
    ("user", "What jumps?"),
    ("assistant", "The fox."),
    ("user", "Over what?"),
    ("assistant", "The lazy dog."),
]
MESSAGES = [{"role": role, "content": content} for role, content in SAID]
# an answer's turn holds its thought; earlier ones lose it, as in templates of models that reason
THINKS = (
    "{% for m in messages %}<|{{ m.role }}|>"
    "{% if m.role == 'assistant' and loop.last %}<think></think>{% endif %}{{ m.content }}<e>\n"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# the system prompt stands in the last question, wherever that is
LAST = (
    "{% set s = namespace(n=0) %}{% for m in messages if m.role == 'user' %}"
    "{% set s.n = s.n + 1 %}{% endfor %}{% set c = namespace(n=0) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set c.n = c.n + 1 %}[I]"
    "{% if c.n == s.n and messages[0].role == 'system' %}{{ messages[0].content }} {% endif %}"
    "{{ m.content }}[/I]{% elif m.role == 'assistant' %}{{ m.content }}<e>{% endif %}{% endfor %}"
)
DROPS = "{% for m in messages if m.role != 'system' %}{{ m.role }}: {{ m.content }}\n{% endfor %}"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return tokenizer_of(tiny("llama", tmp_path_factory.mktemp("llama")))


def chat(tokenizer, template, rows, max_length=400):
    task = build_task(task_spec(kind="chat", template=template))
    data = Dataset.from_list(rows)
    task.check(data, "x")
    return task.encode(data, tokenizer, max_length)


def parts(tokenizer, row) -> list[str]:
    """The stretches of tokens that are learned, as texts."""
    found, last = [], False
    for token, label in zip(row["input_ids"], row["labels"]):
        assert label in (-100, token)
        if label != -100:
            found[-1:] = [found[-1] + [token]] if last else [*found[-1:], [token]]
        last = label != -100
    return [tokenizer.decode(ids) for ids in found]


def from_file(tmp_path, text: str) -> str:
    (tmp_path / "template.jinja").write_text(text)
    return str(tmp_path / "template.jinja")


LEARNED = {
    "alpaca": ["The fox.</s>\n\n", "The lazy dog.</s>\n\n"],
    "chatml": ["The fox.<|im_end|>\n", "The lazy dog.<|im_end|>\n"],
    "gemma": ["The fox.<end_of_turn>\n", "The lazy dog.<end_of_turn>\n"],
    "llama-2": [" The fox. </s>", " The lazy dog. </s>"],
    "llama-3": ["The fox.<|eot_id|>", "The lazy dog.<|eot_id|>"],
    "mistral": [" The fox.</s>", " The lazy dog.</s>"],
    "phi-3": ["The fox.<|end|>\n", "The lazy dog.<|end|>\n"],
    "vicuna": [" The fox.</s>", " The lazy dog.</s>"],
    "zephyr": ["The fox.</s>\n", "The lazy dog.</s>\n"],
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_named_templates_teach_both_answers_and_what_ends_them(tokenizer, name):
    (row,) = chat(tokenizer, name, [{"messages": MESSAGES}])
    text = tokenizer.decode(row["input_ids"])
    assert all(content in text for _, content in SAID)
    assert parts(tokenizer, row) == LEARNED[name]
    if name == "llama-2":
        assert text == (
            "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nWhat jumps? [/INST] The fox. </s>"
            "[INST] Over what? [/INST] The lazy dog. </s>"
        )


@pytest.mark.parametrize("name", TEMPLATES)
def test_an_answer_that_nothing_precedes_is_learned_without_what_the_template_writes_before_it(
    tokenizer, name
):
    try:
        (row,) = chat(tokenizer, name, [{"messages": MESSAGES[2:]}])
    except UserError as error:
        assert "refuses a conversation (assistant, user, assistant)" in str(error)
        return
    assert parts(tokenizer, row) == LEARNED[name]


def test_a_default_system_prompt_before_the_first_answer_is_not_learned(tokenizer, tmp_path):
    text = "<|system|>Be brief.<e>\n" + THINKS  # as Qwen 2.5's template has one
    (row,) = chat(tokenizer, from_file(tmp_path, text), [{"messages": MESSAGES[4:]}])
    assert parts(tokenizer, row) == ["The lazy dog.<e>\n"]


def test_a_thought_that_only_the_last_answer_has_is_learned_there(tokenizer, tmp_path, caplog):
    (row,) = chat(tokenizer, from_file(tmp_path, THINKS), [{"messages": MESSAGES}])
    assert parts(tokenizer, row) == ["The fox.<e>\n", "<think></think>The lazy dog.<e>\n"]
    assert "not learned" not in caplog.text


def test_an_answer_to_what_is_written_otherwise_later_is_not_learned(tokenizer, tmp_path, caplog):
    (row,) = chat(tokenizer, from_file(tmp_path, LAST), [{"messages": MESSAGES}])
    assert tokenizer.decode(row["input_ids"]) == (
        "[I]What jumps?[/I]The fox.<e>[I]Be brief. Over what?[/I]The lazy dog.<e>"
    )
    assert parts(tokenizer, row) == ["The lazy dog.<e>"]
    assert "1 answers in 1 of 1 conversations are not learned" in caplog.text
    (row,) = chat(tokenizer, from_file(tmp_path, LAST), [{"messages": MESSAGES[1:]}])
    assert parts(tokenizer, row) == ["The fox.<e>", "The lazy dog.<e>"]


def test_a_token_across_the_border_is_learned_and_told(tokenizer, tmp_path, caplog):
    text = "{% for m in messages %}{{ m.content }}{% endfor %}"
    spelled = [{"role": "user", "content": "It is ov"}, {"role": "assistant", "content": "er the"}]
    (row,) = chat(tokenizer, from_file(tmp_path, text), [{"messages": spelled}])
    assert tokenizer.decode(row["input_ids"]) == "It is over the"
    assert parts(tokenizer, row) == [" over the"]
    assert "a token runs from the prompt" in caplog.text


def test_a_template_that_drops_turns_is_refused(tokenizer, tmp_path):
    with pytest.raises(UserError, match=r"task\.template: .* leaves out turn 1, the system's"):
        chat(tokenizer, from_file(tmp_path, DROPS), [{"messages": MESSAGES}])
    chat(tokenizer, from_file(tmp_path, DROPS), [{"messages": MESSAGES[1:]}])


def test_templates_that_are_absent_broken_or_refuse(tokenizer, tmp_path):
    rows = [{"messages": MESSAGES}]
    with pytest.raises(UserError, match=r"task\.template: missing; the tokenizer of .*no chat"):
        chat(tokenizer, None, rows)
    with pytest.raises(UserError, match=r"task\.template: 'chatlm' is neither.*mean 'chatml'"):
        chat(tokenizer, "chatlm", rows)
    with pytest.raises(UserError, match=r"task\.template: line 1: "):
        chat(tokenizer, from_file(tmp_path, "{% for m in %}"), rows)
    refuses = "{{ raise_exception('System role not supported') }}"
    with pytest.raises(UserError, match=r"refuses a conversation \(system, .*System role not sup"):
        chat(tokenizer, from_file(tmp_path, refuses), rows)


def test_the_tokenizers_own_template_is_the_default(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", TEMPLATES["zephyr"])
    (row,) = chat(tokenizer, None, [{"messages": MESSAGES}])
    assert parts(tokenizer, row) == LEARNED["zephyr"]


ASKED = [{"role": "user", "content": "Add.\n\n2, 2"}, {"role": "assistant", "content": "4"}]
CALL = {"role": "assistant", "content": None, "tool_calls": [{"name": "add"}]}
FORMS = [
    {"instruction": "Add.", "input": "2, 2", "output": "4"},
    {"instruction": "Add.\n\n2, 2", "input": "", "output": 4},
    {"instruction": "Add.\n\n2, 2", "output": "4"},
    {"conversations": [{"from": "human", "value": "Add.\n\n2, 2"}, {"from": "gpt", "value": "4"}]},
    {"messages": ASKED},
    {"messages": [*ASKED, {"role": "user", "content": "And then?"}]},
    {"messages": json.dumps(ASKED)},
    {"messages": [{"role": "system", "content": ""}, *ASKED]},
    {"messages": [ASKED[0], CALL, {"role": "tool", "content": "4"}, ASKED[1]]},
    {"messages": [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in ASKED]},
]


@pytest.mark.parametrize("row", FORMS)
def test_the_forms_of_conversations(tokenizer, row):
    (wanted,) = chat(tokenizer, "chatml", [{"messages": ASKED}])
    assert list(chat(tokenizer, "chatml", [row])) == [wanted]


def test_system_prompts_of_a_column_and_skipped_tools_are_counted(tokenizer, caplog):
    rows = [{"messages": [ASKED[0], CALL, {"role": "tool", "content": "4"}, ASKED[1]]}]
    chat(tokenizer, "chatml", rows)
    assert "2 turns of tools skipped, in 1 of 1 conversations" in caplog.text
    (row,) = chat(tokenizer, "chatml", [{"messages": ASKED, "system": "Be exact."}])
    assert tokenizer.decode(row["input_ids"]).startswith("<|im_start|>system\nBe exact.<|im_end|>")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "a"}, r"x: expected a column 'messages' or .*there are: text.*task\.columns"),
        ({"messages": [ASKED[0]]}, "line 2: a conversation without an assistant"),
        ({"messages": []}, r"line 2: messages is \[\]; expected a list"),
        ({"messages": None}, "line 2: messages is missing"),
        ({"messages": "Hello"}, "line 2: messages is 'Hello', which is no list"),
        ({"messages": json.dumps(["Hi"])}, "line 2: message 1 is 'Hi'; expected an object"),
        ({"messages": [{**ASKED[0], "role": "cat"}]}, "line 2: message 1 has the role 'cat'"),
        ({"messages": [{"content": "a"}]}, "line 2: message 1 has no role"),
        ({"messages": [{**ASKED[0], "content": " "}]}, r"content of message 1 \(user\) is empty"),
        ({"messages": [{**ASKED[0], "content": None}]}, r"message 1 \(user\) is missing"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "has a part of type 'image_url'; only texts",
        ),
        ({"instruction": "a", "output": ""}, "line 2: output is empty"),
        ({"instruction": None, "output": "b"}, "line 2: instruction is missing"),
    ],
)
def test_bad_rows_are_named(row, message, tmp_path):
    task = build_task(task_spec(kind="chat"))
    good = {"messages": json.dumps(ASKED)} if isinstance(row.get("messages"), str) else {}
    alpaca = {"instruction": "a", "output": "b"}
    good = good or ({"messages": ASKED} if "messages" in row else alpaca)
    first = {"text": "b"} if "text" in row else good
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(r) + "\n" for r in (first, row)))
    with pytest.raises(UserError, match=message):
        task.check(read(tmp_path / "x.jsonl"), "x")


def test_rows_whose_first_answer_lies_beyond_max_length_are_left_out(tokenizer, caplog):
    long = [{"role": "user", "content": "fox " * 50}, MESSAGES[2]]
    encoded = chat(tokenizer, "chatml", [{"messages": ASKED}, {"messages": long}], 60)
    assert len(encoded) == 1 and "1 of 2 rows left out: their first answer" in caplog.text
