"""What goes with an exported model: its card, and how to load it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedex_lora.aggregation.methods import METHODS
from fedex_lora.engines.setup import recipe_task
from fedex_lora.errors import number
from fedex_lora.model.config import CONFIG
from fedex_lora.model.files import resolved
from fedex_lora.model.inject import head_names
from fedex_lora.recipe import Recipe
from fedex_lora.runs.reopened import Trained
from fedex_lora.runs.rundir import versions
from fedex_lora.runs.spent import sentences
from fedex_lora.tasks import Task


def loading_lines(
    recipe: Recipe, path: Path, base: str | None = None, shown: str | None = None
) -> list[str]:
    """Python that loads the export at `path` with plain transformers and PEFT.

    Args:
        base: What the lines call an adapter's base; by default where it lies on this machine.
        shown: What they call the export; `path` by default.
    """
    task, spec = recipe_task(recipe), recipe.model
    here = _literal(shown or str(path))
    name = "processor" if task.image else "tokenizer"
    first = f"{name} = transformers.{task.processor}.from_pretrained({here})"
    load = f"transformers.{task.auto_model}.from_pretrained"
    if not (path / CONFIG).is_file():
        return ["import transformers", first, f"model = {load}({here})"]
    given = [_literal(base or resolved(spec.name))]
    given += [f"{key}={_literal(value)}" for key, value in base_options(recipe, task).items()]
    if not task.image:
        given.append("pad_token_id=tokenizer.pad_token_id")
    if spec.quantisation:
        given.append(f"quantization_config={_quantisation(recipe, task)}")
    return [
        "import peft, transformers",
        first,
        f"base = {load}({', '.join(given)})",
        f"model = peft.PeftModel.from_pretrained(base, {here})",
    ]


def base_options(recipe: Recipe, task: Task) -> dict[str, Any]:
    """What the base of an adapter is loaded with, besides its padding token."""
    known = task.model_kwargs()
    options = {key: known[key] for key in ("num_labels", "id2label", "label2id") if key in known}
    options |= {"revision": recipe.model.revision, "dtype": recipe.model.dtype}
    return {key: value for key, value in options.items() if value is not None}


def _quantisation(recipe: Recipe, task: Task) -> str:
    kept = ["lm_head", *head_names(recipe.lora, task.peft_task_type)]
    options: dict[str, Any] = {"load_in_8bit": True}
    if recipe.model.quantisation != "int8":
        options = {"load_in_4bit": True, "bnb_4bit_quant_type": recipe.model.quantisation}
        options["bnb_4bit_compute_dtype"] = recipe.model.dtype
    options["llm_int8_skip_modules"] = kept
    given = ", ".join(f"{key}={_literal(value)}" for key, value in options.items())
    return f"transformers.BitsAndBytesConfig({given})"


def _literal(value: Any) -> str:
    """Python source of a value of a recipe."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_literal(k)}: {_literal(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(_literal(item) for item in value) + "]"
    # not json.dumps's escapes: Python reads those of an emoji as two characters
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)


def model_card(
    trained: Trained, what: str, base: str, notes: Sequence[str] = (), usage: Sequence[str] = ()
) -> str:
    """A model card: method, rounds, clients, data, scores, notes, versions, how to load it.

    Args:
        base: The base model's name.
    """
    recipe, record = trained.recipe, trained.extra["record"]
    method, task = METHODS[recipe.method.name], recipe_task(recipe)
    scores = [f"| {rows} | {name} | {number(v)} |" for rows, name, v in _scores(record, task)]
    clients = [f"- {c}: {d['examples']} examples" for c, d in record["clients"].items()]
    labels = [f"{i}: {name}" for i, name in enumerate(task.labels or ())]
    holder = trained.extra.get("holder")
    by = f"{len(trained.settings.clients)} clients" if holder is None else f"{holder} with others"
    return "\n".join(
        [
            "---",
            f"base_model: {json.dumps(base, ensure_ascii=False)}",
            "library_name: " + ("peft" if "adapter" in what else "transformers"),
            "tags: [federated-learning, lora, fedex-lora]",
            "---",
            f"# {recipe.name}",
            "",
            f"A {what}, trained by {by} with the method `{recipe.method.name}` "
            f"({method.source}); round {trained.state.version} of {recipe.federation.rounds}, "
            f"seed {recipe.seed}.",
            "",
            f"Data: {_data(trained)}." + (" Clients of the last round:" if clients else ""),
            "",
            *([*clients, ""] if clients else []),
            *(["| rows | metric | score |", "|---|---|---|", *scores, ""] if scores else []),
            *([f"Classes: {', '.join(labels)}.", ""] if labels else []),
            *(f"{told}.\n" for told in sentences(record.get("privacy"))),
            *(f"Note: {note}.\n" for note in notes),
            *(["```python", *usage, "```", ""] if usage else []),
            "Made with " + ", ".join(f"{n} {v}" for n, v in versions().items()) + ".",
            "",
        ]
    )


def _data(trained: Trained) -> str:
    """What the rows were, by name: a card goes to others."""
    path = trained.recipe.data.path
    told = trained.extra["description"]
    return told if path is None else told.replace(str(path), Path(path).name)


def _scores(record: Mapping[str, Any], task: Task) -> Iterator[tuple[str, str, float | None]]:
    """(rows, metric, score): the server's splits, then the clients' own rows."""
    for split, metrics in record.get("scores", {}).items():
        yield from ((split, name, value) for name, value in metrics.items())
    own = record.get("client_scores", {})
    if own and not record.get("scores"):
        yield "clients' own, mean", task.primary, record.get("score")
    for client, metrics in own.items():
        yield from ((f"{client}'s own", name, value) for name, value in metrics.items())
