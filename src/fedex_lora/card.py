"""What goes with an exported model: its card, and how to load it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from fedex_lora.methods import METHODS
from fedex_lora.model.files import CONFIG, resolved
from fedex_lora.recipe import Recipe
from fedex_lora.rundir import number, versions
from fedex_lora.setup import recipe_task
from fedex_lora.trained import Trained


def loading_lines(recipe: Recipe, path: Path) -> list[str]:
    """Python that loads the export at `path` with plain transformers and PEFT."""
    task, spec = recipe_task(recipe), recipe.model
    load = f"transformers.{task.auto_model}.from_pretrained"
    if not (path / CONFIG).is_file():
        return ["import transformers", f"model = {load}({json.dumps(str(path))})"]
    labels = task.model_kwargs().get("num_labels")
    options = {"num_labels": labels, "revision": spec.revision, "dtype": spec.dtype}
    given = [json.dumps(resolved(spec.name))]
    given += [f"{key}={json.dumps(value)}" for key, value in options.items() if value is not None]
    return [
        "import peft, transformers",
        f"base = {load}({', '.join(given)})",
        f"model = peft.PeftModel.from_pretrained(base, {json.dumps(str(path))})",
    ]


def model_card(trained: Trained, what: str, notes: Sequence[str] = ()) -> str:
    """A model card: method, rounds, clients, data, scores, notes, versions."""
    recipe, record = trained.recipe, trained.extra["record"]
    method = METHODS[recipe.method.name]
    scores = [
        f"| {split} | {name} | {number(value)} |"
        for split, metrics in record.get("scores", {}).items()
        for name, value in metrics.items()
    ]
    clients = [f"- {c}: {d['examples']} examples" for c, d in record["clients"].items()]
    return "\n".join(
        [
            "---",
            f"base_model: {resolved(recipe.model.name)}",
            "library_name: " + ("peft" if "adapter" in what else "transformers"),
            "tags: [federated-learning, lora, fedex-lora]",
            "---",
            f"# {recipe.name}",
            "",
            f"A {what}, trained by {len(trained.settings.clients)} clients with the method "
            f"`{recipe.method.name}` ({method.source}); round {trained.state.version} of "
            f"{recipe.federation.rounds}, seed {recipe.seed}.",
            "",
            f"Data: {trained.extra['description']}. Clients of the last round:",
            "",
            *clients,
            "",
            "| split | metric | score |",
            "|---|---|---|",
            *scores,
            "",
            *(f"Note: {note}.\n" for note in notes),
            "Made with " + ", ".join(f"{n} {v}" for n, v in versions().items()) + ".",
            "",
        ]
    )
