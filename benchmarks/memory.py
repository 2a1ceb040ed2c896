"""Memory of a run above that of the process after its imports, against the number of clients."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import transformers
import yaml
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from benchmarks.results import Figure, Row

MEASURE = """
import sys
from pathlib import Path
import psutil
from fedex_lora.recipe.reader import load_recipe
from fedex_lora.runs.run import start_run
before = psutil.Process().memory_info().rss
recipe = load_recipe(Path(sys.argv[1]), sys.argv[3:])
Path("/proc/self/clear_refs").write_text("5")  # peak = now; ru_maxrss would be the parent's
start_run(recipe, Path(sys.argv[2]))
status = Path("/proc/self/status").read_text()
print("PEAK", int(status.split("VmHWM:")[1].split()[0]) * 1024 - before)
"""
LAYERS, WIDTH, INNER, RANK = 4, 256, 1024, 64
ADAPTER = LAYERS * RANK * (4 * (WIDTH + WIDTH) + 2 * (WIDTH + INNER)) * 4  # bytes, all linear
FEW, MANY = 2, 20


def growth(folder: Path, method: str) -> float:
    """Bytes that one more client takes at the peak of a run of two rounds."""
    peaks = [peak(folder, clients, method) for clients in (FEW, MANY)]
    return (peaks[1] - peaks[0]) / (MANY - FEW)


def prepare(folder: Path) -> None:
    """A small BERT with large adapters, rows for many clients and a recipe, in `folder`."""
    _save_model(folder / "model")
    (folder / "data").mkdir()
    for split, size in (("train", 80), ("validation", 8)):
        rows = [{"text": f"word{i % 9} word{i % 7}", "label": i % 2} for i in range(size)]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / "data" / f"{split}.jsonl").write_text(lines)
    recipe: dict[str, Any] = {
        "name": "memory",
        "model": {"name": str(folder / "model")},
        "lora": {"r": RANK, "target_modules": "all-linear"},
        "federation": {"rounds": 2},
        "task": {"kind": "text-classification", "labels": ["x", "y"], "max_length": 16},
        "data": {"path": str(folder / "data")},
        "training": {"max_steps": 1, "per_device_train_batch_size": 2},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))


def _save_model(folder: Path) -> None:
    words = ["[PAD]", "[UNK]", *(f"word{i}" for i in range(9))]
    numbered = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(WordLevel(numbered, unk_token="[UNK]"))  # type: ignore[call-arg]
    tokenizer.pre_tokenizer = Whitespace()  # type: ignore[assignment]
    config = transformers.BertConfig(
        vocab_size=len(words),
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        intermediate_size=INNER,
        max_position_embeddings=32,
    )
    transformers.BertForSequenceClassification(config).save_pretrained(folder)
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]"
    )
    fast.save_pretrained(folder)


def peak(folder: Path, clients: int, method: str) -> int:
    path = folder / f"{method}-{clients}"
    sets = [f"federation.clients={clients}", f"method.name={method}"]
    command = [sys.executable, "-c", MEASURE, str(folder / "recipe.yaml"), str(path), *sets]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout.split("PEAK")[1])


def row(methods: tuple[str, ...] = ("fedex", "fedit", "fedex-keep", "fedex-hetero")) -> Row:
    """Memory a further client for some methods, in adapters."""
    figures = []
    with TemporaryDirectory() as folder:
        prepare(Path(folder))
        for method in methods:
            value = growth(Path(folder), method) / ADAPTER
            figures.append(Figure(method, value, "×", at_most=1.2))
    return Row(
        "Memory a further client, of its adapter and head",
        figures,
        [
            f"The peak of a run of two rounds with {MANY} clients less that with {FEW}, each in a "
            f"process of its own; {LAYERS} layers {WIDTH} wide, rank {RANK} everywhere. Where "
            "factors are a client's own (fedex-keep, fedex-hetero) they lie on disk.",
        ],
    )
