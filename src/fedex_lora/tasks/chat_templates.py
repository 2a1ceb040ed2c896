"""Chat templates by name, for base models whose tokenizers bring none, and from files.

Each writes an assistant's turn with what ends it, so that a model learns to stop there.
"""

from __future__ import annotations

from pathlib import Path

from fedex_lora.disk import read_text
from fedex_lora.errors import RecipeError, did_you_mean

_SYSTEM_FIRST = (  # the system prompt, for formats that put it into the first question
    "{% set ns = namespace(system='') %}"
    "{% for m in messages if m.role == 'system' %}{% set ns.system = ns.system + m.content %}"
    "{% endfor %}"
)


def _tagged(begin: str, end: str, more: str = "") -> str:
    """Every turn between marks, whatever its role."""
    opened = begin.replace("ROLE", "{{ m.role }}")
    return (
        f"{more}{{% for m in messages %}}{opened}{{{{ m.content | trim }}}}{end}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{begin.replace('ROLE', 'assistant')}{{% endif %}}"
    )


def _asked(begin: str, user: str, prompt: str, answer: str) -> str:
    """Questions (SYSTEM of the first, TEXT) and answers (TEXT), with a prompt before an answer."""
    first = "{% if ns.system %}" + begin.replace("TEXT", "{{ ns.system }}")
    first += "{% set ns.system = '' %}{% endif %}"
    question = user.replace("SYSTEM", first).replace("TEXT", "{{ m.content | trim }}")
    return (
        _SYSTEM_FIRST + "{{ bos_token }}{% for m in messages %}"
        "{% if m.role == 'user' %}" + question + "{% elif m.role == 'assistant' %}"
        + prompt + answer.replace("TEXT", "{{ m.content | trim }}") + "{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}" + prompt + "{% endif %}"
    )  # fmt: skip


TEMPLATES: dict[str, str] = {
    "alpaca": _asked(
        "TEXT\n\n",
        "SYSTEM### Instruction:\nTEXT\n\n",
        "### Response:\n",
        "TEXT{{ eos_token }}\n\n",
    ),
    "chatml": _tagged("<|im_start|>ROLE\n", "<|im_end|>\n"),
    "gemma": _asked(
        "TEXT\n\n",
        "<start_of_turn>user\nSYSTEMTEXT<end_of_turn>\n",
        "<start_of_turn>model\n",
        "TEXT<end_of_turn>\n",
    ),
    "llama-2": _asked(
        "<<SYS>>\nTEXT\n<</SYS>>\n\n", "[INST] SYSTEMTEXT [/INST]", "", " TEXT {{ eos_token }}"
    ),
    "llama-3": _tagged(
        "<|start_header_id|>ROLE<|end_header_id|>\n\n", "<|eot_id|>", "{{ bos_token }}"
    ),
    "mistral": _asked("TEXT\n\n", "[INST] SYSTEMTEXT[/INST]", "", " TEXT{{ eos_token }}"),
    "phi-3": _tagged("<|ROLE|>\n", "<|end|>\n"),
    "vicuna": _asked("TEXT ", "SYSTEMUSER: TEXT ", "ASSISTANT:", " TEXT{{ eos_token }}"),
    "zephyr": _tagged("<|ROLE|>\n", "{{ eos_token }}\n"),
}
"""By the names that `task.template` takes."""


def template_of(given: str) -> str:
    """The Jinja text of a template: one of `TEMPLATES`, or a file's.

    Raises:
        UserError: There is no such name or file.
    """
    if given in TEMPLATES:
        return TEMPLATES[given]
    try:
        return read_text(Path(given).expanduser())
    except (OSError, UnicodeDecodeError):
        raise RecipeError(
            f"task.template: {given!r} is neither a template's name ({', '.join(TEMPLATES)}) nor "
            f"a file of text{did_you_mean(given, TEMPLATES)}"
        ) from None
