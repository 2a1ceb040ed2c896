"""Peak memory of a merge above that of the process after its imports, for few and many adapters."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

MEASURE = """
import os, sys
from pathlib import Path
import psutil, torch
from fedex_lora.merge.adapters import open_adapter
from fedex_lora.merge.plan import make_plan
from fedex_lora.merge.write import Options, merge_adapters

torch.set_num_threads(1)

def merge(adapters, out, rank):
    plan = make_plan([open_adapter(a) for a in adapters], None, True)
    merge_adapters(plan, Path(out), Options(rank=rank or None))

def measure(adapters, out, rank):
    merge(adapters[:1], out + "-small", 8)  # loads code and libraries' own buffers
    Path("/proc/self/clear_refs").write_text("5")  # peak = now; ru_maxrss would be the parent's
    before = psutil.Process().memory_info().rss
    merge(adapters, out, rank)
    status = Path("/proc/self/status").read_text()
    print("PEAK", int(status.split("VmHWM:")[1].split()[0]) * 1024 - before, flush=True)

folder, *jobs = sys.argv[1:]
for i, job in enumerate(jobs):
    count, rank = map(int, job.split(","))
    if os.fork() == 0:
        measure([f"{folder}/a{n}" for n in range(count)], f"{folder}/out{i}", rank)
        os._exit(0)
    assert os.wait()[1] == 0
"""
LAYERS, OUT, IN, RANK = 48, 1024, 1536, 16
SITE = OUT * IN * 4  # bytes of one dense layer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Twelve adapters of 7.9 MB each."""
    folder = tmp_path_factory.mktemp("memory")
    config = {"peft_type": "LORA", "base_model_name_or_path": "x", "r": RANK, "lora_alpha": 8}
    for i in range(12):
        g = torch.Generator().manual_seed(i)
        tensors = {}
        for n in range(LAYERS):
            site = f"base_model.model.layers.{n}.q"
            tensors[f"{site}.lora_A.weight"] = torch.randn(RANK, IN, generator=g)
            tensors[f"{site}.lora_B.weight"] = torch.randn(OUT, RANK, generator=g)
        (folder / f"a{i}").mkdir()
        save_file(tensors, folder / f"a{i}" / "adapter_model.safetensors")
        text = json.dumps(config | {"target_modules": ["q"]})
        (folder / f"a{i}" / "adapter_config.json").write_text(text)
    return folder


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
def test_a_merge_takes_one_layer_however_many_adapters(folder):
    jobs = [(2, 0), (12, 0), (12, 16)]
    arguments = [str(folder), *(f"{count},{rank}" for count, rank in jobs)]
    command = [sys.executable, "-c", MEASURE, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    peaks = [int(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("PEAK")]
    for i, ((count, rank), peak) in enumerate(zip(jobs, peaks, strict=True)):
        size = (folder / f"out{i}" / "adapter_model.safetensors").stat().st_size
        print(
            f"{count} adapters, rank {rank}: peak {peak / 1e6:.1f} MB, output {size / 1e6:.1f} MB"
        )
        assert size >= (rank or count * RANK) * LAYERS * (OUT + IN) * 4
        assert peak <= 1.5 * size + SITE
    # six times the adapters and the output: what is in memory is one layer of each
    assert peaks[1] - peaks[0] <= 2 * SITE
