"""No recipe rots: each is read, built on a tiny model of its architecture, and trained a little."""

from __future__ import annotations

import json
import runpy
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny import tiny

from fedex_lora.engines.setup import set_up
from fedex_lora.experiments.grid.plan import plan
from fedex_lora.experiments.grid.spec import is_grid
from fedex_lora.recipe import Recipe
from fedex_lora.recipe.reader import load_recipe
from fedex_lora.runs.run import start_run
from fedex_lora.tasks import nlg
from fedex_lora.tasks.kinds.glue import GLUE

FOLDER = Path(__file__).parents[1] / "recipes"
FILES = sorted(FOLDER.rglob("*.yaml"))
GRIDS = [file for file in FILES if is_grid(file)]
RECIPES = [file for file in FILES if file not in GRIDS]

KINDS = {  # of tiny models, by what a recipe's model is called
    "roberta": "roberta",
    "MiniLM": "bert",
    "minilm": "bert",
    "gpt2": "gpt2",
    "lama": "llama",
    "stories": "llama",
    "istral": "mistral",
    "gemma": "gemma2",
    "vit": "vit",
    "llava": "llava",
    "t5": "t5",
    "mpnet": "mpnet",
}
LONGEST = {
    "roberta": 128,
    "bert": 128,
    "mpnet": 128,
    "gpt2": 128,
    "vit": 128,
    "llava": 128,
    "llama": 512,
    "mistral": 512,
}
LONGEST |= {"gemma2": 512, "t5": 128, "masked": 128}
ROWS = 8  # of training; others have half as many


def name_of(file: Path) -> str:
    return str(file.relative_to(FOLDER))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The tiny model for a recipe, made when first asked for."""
    folder = tmp_path_factory.mktemp("models")

    def model(recipe: Recipe) -> Path:
        kind = next(kind for part, kind in KINDS.items() if part in recipe.model.name)
        if recipe.task.kind == "masked-lm":  # encoders have no head otherwise
            return tiny(kind, folder / "masked", auto="AutoModelForMaskedLM")
        return folder / kind if (folder / kind).exists() else tiny(kind, folder / kind)

    return model


@pytest.fixture(autouse=True)
def no_java(monkeypatch):
    """METEOR and others start a Java program for minutes; BLEU and NIST do without."""
    monkeypatch.setattr(nlg, "has_java", lambda: False)


def small(recipe: Recipe, model: Path, data: Path) -> Recipe:
    """The recipe with another model and rows, one round of two steps, and little to generate."""
    raw = recipe.model_dump(exclude_unset=True)
    raw["model"] |= {"name": str(model), "device": "cpu"}
    raw["data"] = write_rows(recipe, data)
    clients = len(recipe.data.clients or []) or 2
    raw["federation"] = {**raw.get("federation", {}), "clients": clients, "rounds": 1}
    raw["federation"] |= {"min_clients": 1} | ({} if recipe.data.clients else {"partition": {}})
    if recipe.lora.r > 8:  # above the sides of tiny layers
        raw["lora"] |= {"r": 8}
    if isinstance(names := recipe.lora.target_modules, list):  # a tiny model has two layers
        raw["lora"] |= {"target_modules": [name.lstrip("0123456789.") for name in names]}
    raw["training"] |= {"max_steps": 2, "per_device_train_batch_size": 2}
    raw["training"] |= {"gradient_accumulation_steps": 1, "warmup_steps": 1}
    raw["task"] |= {
        k: v for k, v in {"max_new_tokens": 3, "num_beams": 2}.items() if k in raw["task"]
    }
    raw["task"]["max_length"] = min(recipe.task.evaluated_length, LONGEST[model.name])
    raw["task"].pop("evaluation_max_length", None)
    if recipe.task.kind == "chat":  # tokenizers of tiny models have no template
        raw["task"].setdefault("template", "chatml")
    if recipe.data.source is not None:
        raw["task"]["labels"] = ["yes", "no"]
    raw.pop("engine", None)
    return Recipe.model_validate(raw)


def write_rows(recipe: Recipe, folder: Path) -> dict[str, Any]:
    """Rows in the task's columns, in as many files as the recipe's data have."""
    folder.mkdir()
    spec = recipe.data
    splits = {"train": ROWS, "validation": ROWS // 2}
    if recipe.task.title == "mnli":
        splits = {"train": ROWS, "validation_matched": 4, "validation_mismatched": 4}
    clients = [folder / file.name for _, (file,) in spec.files()]
    further = {split: str(folder / f"{split}.jsonl") for split in spec.evaluation}
    if recipe.task.kind.startswith("image-"):
        pytest.importorskip("PIL.Image").new("RGB", (16, 16), "red").save(folder / "x.png")
    counts = {**splits, **dict.fromkeys(further, ROWS // 2)}
    counts |= {file.stem: ROWS for file in clients}
    for name, count in counts.items():
        lines = [json.dumps(row) for row in rows(recipe, name, count)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    found: dict[str, Any] = {"path": folder, **({"evaluation": further} if further else {})}
    return found | ({"clients": clients} if clients else {})


def rows(recipe: Recipe, split: str, count: int) -> Iterator[dict[str, Any]]:
    """Rows as the recipe's task wants them."""
    task: Any = recipe.task  # with the keys of its kind
    for i in range(count):
        match task.kind:
            case "glue":
                known = GLUE[task.name or ""]
                classes = known.labels
                label = i % len(classes) if classes else float(i % 6)
                yield {**{c: f"{c} has {i} words." for c in known.texts}, "label": label}
            case "text-classification":
                labels = task.labels or ["yes", "no"]
                yield {
                    task.text_column or "": f"Row {i} is fine.",
                    "label": labels[i % len(labels)],
                }
            case "instruction":
                yield {"question": f"What is {i}?", "answer": f"It is {i}."}
            case "chat":
                said = (("user", f"What is {i}?"), ("assistant", f"It is {i}."))
                yield {"messages": [{"role": role, "content": text} for role, text in said]}
            case "text-regression":
                yield {"text": f"Row {i} is fine.", "label": i}
            case "multi-label-classification":
                yield {"text": f"Row {i} is fine.", "labels": task.labels[: i % 3]}
            case "token-classification":
                yield {"tokens": ["In", "Rome"], "tags": ["O", f"B-{task.labels[i % 3]}"]}
            case "masked-lm":
                yield {"text": f"Row {i} is fine."}
            case "multiple-choice":
                yield {"question": f"{i}?", "choices": ["no", "yes", "both"], "label": i % 3}
            case "seq2seq":
                yield {"document": f"Row {i} is fine.", "summary": f"{i} fine"}
            case "e2e":
                about = f"name[Place {i // 2}], food[Thai]"
                yield {"meaning_representation": about, "human_reference": f"Eat Thai at {i // 2}."}
            case "math":
                yield arithmetic_row(task.name if split == "train" else split, i)
            case "commonsense":
                yield commonsense_row(task.name or "boolq", i)
            case "image-classification":
                labels = task.labels or ["yes", "no"]
                yield {task.image_column or "image": "x.png", task.label_column: labels[i % 2]}
            case "image-text":
                yield {"image": "x.png", "question": f"What is {i}?", "answer": f"It is {i}."}
            case _:
                raise AssertionError(f"no rows for {task.kind}; add some here")


def arithmetic_row(name: str | None, i: int) -> dict[str, str]:
    if name == "metamath":
        return {"query": f"{i} + 1?", "response": f"One more. The answer is: {i + 1}"}
    if name in ("math", "test_math"):
        return {"problem": f"${i} + 1$?", "solution": rf"It is $\boxed{{{i + 1}}}$."}
    return {"question": f"{i} + 1?", "answer": f"One more.\n#### {i + 1}"}


def commonsense_row(name: str, i: int) -> dict[str, str]:
    options = ("true", "false") if name == "boolq" else ("answer1", "answer2")
    text = f"Is {i} even? Answer format: {'/'.join(options)}"
    answer = options[i % 2]
    output = f"the correct answer is {answer}"
    return {"instruction": text, "input": "", "output": output, "answer": answer}


def check(recipe: Recipe, models, folder: Path) -> None:
    """Trains and evaluates, and looks at what came of it."""
    tried = small(recipe, models(recipe), folder / "data")
    results = start_run(tried, folder / "run")
    record = json.loads((folder / "run" / "metrics.jsonl").read_text().splitlines()[0])
    steps = 0 if recipe.method.chosen.sends_gradients(1) else 2
    assert all(client["steps"] == steps for client in record["clients"].values())
    assert not record["refused"] and results["best"]["score"] is not None


@pytest.mark.parametrize("file", RECIPES, ids=name_of)
def test_a_recipe_is_trained_and_evaluated(file, models, tmp_path):
    check(load_recipe(file), models, tmp_path)


@pytest.fixture(scope="module")
def built():
    """Architecture, task and method of the grids' runs that were built already."""
    return set()


@pytest.mark.parametrize("file", GRIDS, ids=name_of)
def test_every_run_of_a_grid_is_valid_and_every_kind_of_run_is_built(file, models, built, tmp_path):
    runs = plan(file).runs
    assert len(runs) == len({run.name for run in runs})
    for run in runs:
        kind = (models(run.recipe), run.recipe.task.kind, run.recipe.method.name)
        if kind not in built:
            built.add(kind)
            set_up(small(run.recipe, models(run.recipe), tmp_path / str(len(built))))


LLM = {"lora.r": 32, "lora.lora_alpha": 16, "lora.lora_dropout": 0, "federation.rounds": 1}
LLM |= {"training.learning_rate": 5e-4, "training.warmup_steps": 0.02}
SEVEN = {"training.lr_scheduler_type": "cosine", "training.gradient_accumulation_steps": 32}
SEVEN |= {"task.max_length": 512}
SEVEN |= LLM | {"training.per_device_train_batch_size": 1, "data.train_examples": 10_000}
ROBERTA = {"lora.r": 4, "lora.lora_alpha": 8, "lora.lora_dropout": 0.1}
ROBERTA |= {"training.learning_rate": 1e-3, "training.per_device_train_batch_size": 128}
ROBERTA |= {"training.weight_decay": 0.01, "training.num_train_epochs": 3}
ROBERTA |= {"training.warmup_steps": 0.6, "task.max_length": 512}
PRINTED = {  # Tables 6 and 7, and section 4
    "mistral-7b-math": SEVEN,
    "gemma-2-9b-math": SEVEN,
    "llama-3.2-3b-commonsense": {
        **LLM,
        "task.max_length": 256,
        "training.lr_scheduler_type": "linear",
        "training.per_device_train_batch_size": 6,
        "training.gradient_accumulation_steps": 24,
    },
    "gpt2-e2e": {
        "lora.lora_alpha": 32,
        "lora.lora_dropout": 0.1,
        "training.learning_rate": 2e-3,
        "training.weight_decay": 0.01,
        "training.per_device_train_batch_size": 8,
        "training.warmup_steps": 500,
        "training.label_smoothing_factor": 0.1,
        "federation.rounds": 6,
        "task.num_beams": 10,
        "task.max_length": 128,
    },
    "roberta-base": {**ROBERTA, "federation.rounds": 50},
    "roberta-large": {**ROBERTA, "federation.rounds": 15},
}


@pytest.mark.parametrize("name", PRINTED)
def test_the_papers_recipes_have_what_the_paper_prints(name):
    recipe = load_recipe(FOLDER / "paper" / f"{name}.yaml").model_dump()
    found = {key: recipe[key.split(".")[0]][key.split(".")[1]] for key in PRINTED[name]}
    assert found == PRINTED[name]
    assert recipe["federation"]["clients"] == 3 and recipe["federation"]["weights"] == "uniform"
    assert recipe["federation"]["partition"]["kind"] == "iid"
    assert recipe["model"]["dtype"] == "bfloat16"


def test_the_small_gpt2_is_made_with_its_real_tokenizer(shared, tmp_path):
    script = runpy.run_path(str(FOLDER / "small" / "make_gpt2.py"))
    script["main"](shared / "models" / "gpt2-tokenizer", tmp_path / "gpt2")
    recipe = load_recipe(FOLDER / "small" / "gpt2-e2e.yaml")
    federation = set_up(small(recipe, tmp_path / "gpt2", tmp_path / "data"))
    assert len(federation.model.tokenizer) == 50257
    assert len(federation.model.layers) == 2 * 4  # c_attn and attn.c_proj of four layers


def test_every_file_of_recipes_goes_into_the_wheel():
    """setuptools knows no folders within folders: each is a line of its own."""
    root = Path(__file__).resolve().parents[1]
    named = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["data-files"]
    sent = {
        f"{folder}/{path.name}"
        for folder, patterns in named.items()
        for pattern in patterns
        for path in root.glob(pattern)
    }
    there = [path for path in (root / "recipes").rglob("*.*") if path.suffix in (".yaml", ".py")]
    assert {f"share/fedex-lora/{path.relative_to(root).as_posix()}" for path in there} == sent
