"""A training step of a language model: logits at labelled positions alone, against all of them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import mkdtemp
from time import process_time
from typing import Any

import psutil
import torch
import transformers
from peft import LoraConfig, get_peft_model

from benchmarks.results import Figure, Row
from benchmarks.timing import Times, ratio
from fedex_lora.engines.training import LabelledTrainer, training_arguments

ROWS, LENGTH = 4, 96
LABELS = {"6 labels a row": 6, "all positions labelled": LENGTH}
CONFIGS: Mapping[str, Callable[[], Any]] = {
    "Gemma 3 270M": lambda: transformers.Gemma3TextConfig(
        vocab_size=262144,
        hidden_size=640,
        intermediate_size=2048,
        num_hidden_layers=18,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=256,
    ),
    "Llama 3.2 1B, 4 of 16 layers": lambda: transformers.LlamaConfig(
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=4,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        tie_word_embeddings=True,
    ),
}
WAYS = {"labelled": LabelledTrainer, "Trainer": transformers.Trainer}


def stepping(kind: str, ways: Mapping[str, type], labels: int) -> dict[str, Callable[[], object]]:
    """What takes a step of training, one batch forward and back, for one model."""
    torch.manual_seed(0)
    config = CONFIGS[kind]()
    config.use_cache = False
    plain = transformers.AutoModelForCausalLM.from_config(config)
    model = get_peft_model(plain, LoraConfig(r=4, target_modules=["q_proj", "v_proj", "o_proj"]))
    model.train()
    tokens = torch.randint(3, config.vocab_size, (ROWS, LENGTH))
    targets = torch.where(torch.arange(LENGTH) < LENGTH - labels, -100, tokens)
    batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": targets}
    count = (targets[:, 1:] != -100).sum()

    def step(trainer: transformers.Trainer) -> object:
        model.zero_grad()
        return trainer.training_step(model, dict(batch), count)

    found: dict[str, Callable[[], object]] = {}
    for name, way in ways.items():
        args = training_arguments({}, 0, torch.device("cpu"), mkdtemp())
        trainer = way(model=model, args=args)
        trainer.current_gradient_accumulation_steps = 1
        found[name] = lambda trainer=trainer: step(trainer)
    return found


def peak(kind: str, way: str, labels: int) -> int:
    """Bytes that the second step takes at most, beside what is there before it."""
    step = stepping(kind, {way: WAYS[way]}, labels)[way]
    step()
    before = psutil.Process().memory_info().rss
    Path("/proc/self/clear_refs").write_text("5")  # peak = now
    step()
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024 - before


def _peak(kind: str, way: str, labels: int) -> int:
    """The same in a process of its own."""
    threads = torch.get_num_threads()
    code = (
        f"import torch; torch.set_num_threads({threads}); from benchmarks.language import peak; "
        f"print('PEAK', peak({kind!r}, {way!r}, {labels}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return int(done.stdout.split("PEAK")[1])


def _seconds(work: Callable[[], object]) -> float:
    began = process_time()
    work()
    return process_time() - began


def row(kinds: tuple[str, ...] = tuple(CONFIGS), repeats: int = 3) -> Row:
    """Time and memory a step, by model and by how many positions are labelled."""
    figures = []
    for kind in kinds:
        for told, labels in LABELS.items():
            steps = stepping(kind, WAYS, labels)
            for step in steps.values():
                step()
            turns = [{n: _seconds(s) for n, s in steps.items()} for _ in range(repeats)]
            times = {n: Times(tuple(turn[n] for turn in turns)) for n in steps}
            del steps
            value, spread = ratio(times["Trainer"], times["labelled"])
            few = labels < LENGTH
            what = f"{kind}, {told}"
            figures.append(Figure(f"{what}: times as fast", value, "×", spread, 2.5 if few else 1))
            figures += [Figure(f"{what}: {n}", t.median, "s", t.spread) for n, t in times.items()]
            peaks = {n: _peak(kind, n, labels) for n in WAYS}
            share = peaks["labelled"] / peaks["Trainer"]
            most = 1 / 3 if few else None
            figures.append(Figure(f"{what}: memory, of the Trainer's", share, "×", at_most=most))
            figures += [Figure(f"{what}: memory, {n}", p, "B") for n, p in peaks.items()]
    return Row(
        "A training step of a language model: logits at labelled positions, against the Trainer",
        figures,
        [
            f"Forward and back of {ROWS} rows of {LENGTH} tokens, random weights in float32, LoRA "
            "of rank 4 on query, value and output. Seconds of processor time over all threads, in "
            f"turn, {repeats} times. Memory: what a step takes at its peak, in a process of its "
            "own. Loss and gradients are equal to rounding (tests/tasks/test_labelled.py).",
        ],
    )
