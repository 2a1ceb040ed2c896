"""Generated texts: searches that drop ended texts, against those of transformers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import mkdtemp
from time import process_time
from typing import Any

import torch
import transformers
from datasets import Dataset
from peft import LoraConfig, get_peft_model

from benchmarks.results import Figure, Row
from benchmarks.timing import Times, ratio
from fedex_lora.engines.training import LabelledTrainer, training_arguments
from fedex_lora.recipe import TaskSpec
from fedex_lora.tasks.generation import Decoding, generate
from fedex_lora.tasks.kinds.e2e import E2E, LENGTH_PENALTY, NO_REPEAT_NGRAM
from fedex_lora.tasks.kinds.math import Math
from fedex_lora.tasks.language import prompt_of

STEPS, TRAINED, LENGTH, ASKED, BATCH = 15, 4, 256, 8, 32
KINDS: Mapping[str, tuple[str, TaskSpec, Mapping[str, Decoding]]] = {
    "E2E": (
        "e2e_nlg",
        E2E(kind="e2e"),
        {
            "greedy": Decoding(64, no_repeat_ngram=NO_REPEAT_NGRAM),
            "4 beams": Decoding(64, 4, LENGTH_PENALTY, NO_REPEAT_NGRAM),
        },
    ),
    "GSM8K": ("gsm8k", Math(kind="math"), {"greedy": Decoding(96)}),
}


def theirs(model: Any, tokenizer: Any, prompts: list[list[int]], decoding: Decoding) -> list[str]:
    """The same with transformers' own searches."""
    own = model.generate

    def called(custom_generate: Any, generation_config: Any, **inputs: Any) -> Any:
        if decoding.num_beams > 1:
            generation_config.num_beams = decoding.num_beams
            generation_config.length_penalty = decoding.length_penalty
            generation_config.early_stopping = False
        return own(generation_config=generation_config, **inputs)

    model.generate = called
    try:
        return generate(model, tokenizer, prompts, decoding, BATCH)
    finally:
        model.generate = own


def tuned(folder: Path, rows: Dataset, spec: TaskSpec) -> tuple[Any, Any, list[list[int]]]:
    """A model that has learned a little how the texts go and end; and prompts of other rows."""
    transformers.set_seed(0)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = get_peft_model(plain, LoraConfig(r=4, target_modules=["q_proj", "v_proj", "o_proj"]))
    task = spec.build(None)
    encoded = task.encode(rows.select(range(STEPS * TRAINED + ASKED)), tokenizer, LENGTH)
    asked = [prompt_of(encoded[i]) for i in range(len(encoded) - ASKED, len(encoded))]
    given = {
        "max_steps": STEPS,
        "per_device_train_batch_size": TRAINED,
        "learning_rate": 2e-3,
        "bf16": True,
    }
    args = training_arguments(given, 0, torch.device("cpu"), mkdtemp())
    collate = task.collator(tokenizer)
    learned = encoded.select(range(len(encoded) - ASKED))
    LabelledTrainer(model=model, args=args, train_dataset=learned, data_collator=collate).train()
    return model.eval(), tokenizer, asked


def _timed(work: Callable[..., list[str]], *given: Any) -> tuple[float, list[str]]:
    began = process_time()
    texts = work(*given)
    return process_time() - began, texts


def ours(model: Any, tokenizer: Any, prompts: list[list[int]], decoding: Decoding) -> list[str]:
    """The texts of prompts, as runs generate them."""
    return generate(model, tokenizer, prompts, decoding, BATCH)


def row(data: Path, folder: Path | None, repeats: int = 2) -> Row:
    """Seconds to generate, by task and search."""
    if folder is None:
        return Row("", skipped="--model: name the directory of a pretrained language model")
    figures: list[Figure] = []
    for kind, (name, spec, ways) in KINDS.items():
        rows = Dataset.from_json(str(data / name / "train.jsonl"))
        model, tokenizer, asked = tuned(folder, rows, spec)
        # a meaning has several references
        asked = [list(ids) for ids in dict.fromkeys(map(tuple, asked))]
        for way, decoding in ways.items():
            given = model, tokenizer, asked, decoding
            turns = [(_timed(ours, *given), _timed(theirs, *given)) for _ in range(repeats)]
            own, other = (Times(tuple(s for s, _ in times)) for times in zip(*turns))
            alike = sum(a == b for a, b in zip(turns[0][0][1], turns[0][1][1]))
            value, spread = ratio(other, own)
            what = f"{kind}, {way}"
            figures += [
                Figure(f"{what}: times as fast", value, "×", spread, 1),
                Figure(f"{what}: here", own.median, "s", own.spread),
                Figure(f"{what}: transformers", other.median, "s", other.spread),
                Figure(f"{what}: texts alike", alike / len(asked), "", at_least=1),
            ]
    return Row(
        "Texts that a language model generates: ended ones leave the batch, against transformers",
        figures,
        [
            f"{folder.name} in float32 with LoRA of rank 4, after {STEPS} steps of {TRAINED} rows, "
            f"so that it ends its texts; {ASKED} rows, {BATCH} sequences at once. Seconds of "
            f"processor time over all threads, in turn, {repeats} times.",
        ],
    )
