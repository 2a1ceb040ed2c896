"""Memory of a run above that of the process after its imports, against the number of clients."""

import json
import subprocess
import sys

import pytest
import yaml
from small_runs import TEXT
from tiny import tiny

MEASURE = """
import resource, sys
from pathlib import Path
import psutil
from fedex_lora.recipe_yaml import load_recipe
from fedex_lora.run import start_run
before = psutil.Process().memory_info().rss
recipe = load_recipe(Path(sys.argv[1]), sys.argv[3:])
start_run(recipe, Path(sys.argv[2]))
print("PEAK", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before)
"""
ADAPTER = 4 * 64 * (4 * (256 + 256) + 2 * (256 + 1024)) * 4  # bytes: 4 layers, r 64, all linear


def peak(folder, clients, method):
    path = folder / f"{method}-{clients}"
    sets = [f"federation.clients={clients}", f"method.name={method}"]
    command = [sys.executable, "-c", MEASURE, str(folder / "recipe.yaml"), str(path), *sets]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout.split("PEAK")[1])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("memory")
    wide = {"hidden_size": 256, "num_hidden_layers": 4, "intermediate_size": 1024}
    tiny("bert", folder / "model", num_labels=2, **wide)
    (folder / "data").mkdir()
    for split, size in (("train", 80), ("validation", 8)):
        rows = [{"text": f"{TEXT[i % 4]} {i}", "label": i % 2} for i in range(size)]
        text = "".join(json.dumps(r) + "\n" for r in rows)
        (folder / "data" / f"{split}.jsonl").write_text(text)
    recipe = {
        "name": "memory",
        "model": {"name": str(folder / "model")},
        "lora": {"r": 64, "target_modules": "all-linear"},
        "federation": {"rounds": 2},
        "task": {"kind": "text-classification", "labels": ["x", "y"], "max_length": 16},
        "data": {"path": str(folder / "data")},
        "training": {"max_steps": 1, "per_device_train_batch_size": 2},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder


@pytest.mark.parametrize("method", ["fedex", "fedit"])
def test_memory_grows_per_client_by_at_most_its_adapter_and_head(folder, method):
    grown = (peak(folder, 20, method) - peak(folder, 2, method)) / 18
    print(f"{method}: {grown / ADAPTER:.3f} of an adapter per further client")
    assert grown <= 1.2 * ADAPTER
