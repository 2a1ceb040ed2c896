"""Digests of what runs come to, so that a redesign can show that it changed no bit.

    PYTHONPATH=tests:. python -m golden record before.json     # at the commit that it begins from
    PYTHONPATH=tests:. python -m golden compare before.json    # at any later one, on that machine

Every method, in this process and through messages, on two small architectures; with unequal ranks
and weights, absent clients, a server learning rate, a bfloat16 wire, error feedback, and a resume
in between. Bits depend on the processor and on torch, so a record is of one machine.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from engines.in_process import InProcess, institutions, remote, without
from safetensors import safe_open
from small_runs import StopAfter, recipe

from fedex_lora.aggregation.methods import METHODS
from fedex_lora.runs.across_machines import across_machines
from fedex_lora.runs.here import in_this_process
from fedex_lora.runs.run import resume_run, start_run

CLIENTS = {"where": "both", "client_fraction": 0.4}
GONE = {2: ["bob"], 3: ["ann"]}
LEFT_OUT = ("seconds", "description", "bytes_up", "bytes_down", "bytes_delivery")
KINDS = ("roberta", "llama")
ROUNDS = 4


def cases() -> Iterator[tuple[str, str, str, dict[str, Any]]]:
    """(name, architecture, how, blocks of the recipe)."""
    for kind in KINDS:
        for name, method in METHODS.items():
            chosen = {"name": name, **({"rank": 2} if method.residual == "truncated" else {})}
            alone = method.assignment.private  # nobody has a global model to score
            scored = {**CLIENTS, "where": "clients"} if alone else CLIENTS
            plain = {"method": chosen, "evaluation": scored}
            yield f"{kind} {name}", kind, "local", plain
            if method.pooled:
                continue
            varied: dict[str, dict[str, Any]] = {
                "uniform": {"federation": {"weights": "uniform"}},
                "eta": {"federation": {"server_learning_rate": 0.7}},
            }
            if method.exchanges:
                varied["bfloat16"] = {"federation": {"wire_dtype": "bfloat16"}}
            if method.ranks_may_differ:
                varied["ranks"] = {"lora": {"ranks": [2, 5, 3]}}
            if method.residual == "truncated":
                varied["no carry"] = {"method": {**chosen, "carry": False}}
            for what, blocks in varied.items():
                yield f"{kind} {name} {what}", kind, "local", {**plain, **blocks}
            yield f"{kind} {name} absent", kind, "absent", plain
            yield f"{kind} {name} resumed", kind, "resumed", plain
            if method.exchanges:
                yield f"{kind} {name} messages", kind, "messages", {**plain, **varied["bfloat16"]}
    yield "roberta fedex side", "roberta", "local", {"model": {"placement": "side"}}
    yield "roberta fedex fused", "roberta", "local", {"engine": {"fuse": 3}}


def run(folder: Path, kind: str, how: str, blocks: dict[str, Any], out: Path) -> None:
    """One run in `out`."""
    federation = {"clients": 3, "rounds": ROUNDS, **blocks.get("federation", {})}
    spec = recipe(folder, kind, **{**blocks, "federation": federation})
    if how == "messages":
        courier = InProcess(institutions(spec, out.with_name("cache")))
        start_run(remote(spec), out, None, across_machines(courier))
    elif how == "absent":
        start_run(spec, out, None, without(GONE))
    elif how == "resumed":
        try:
            start_run(spec, out, StopAfter(2), in_this_process)
        except KeyboardInterrupt:
            resume_run(out)
    else:
        start_run(spec, out)


def digests(out: Path) -> dict[str, str]:
    """What a run came to: its last state, its records, its results and its export."""
    last = sorted((out / "checkpoints").glob("round-*.safetensors"))[-1]
    own = sorted((out / "checkpoints" / "own").glob(f"{ROUNDS:04d}-*.safetensors"))
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    final = sorted((out / "final").rglob("*.safetensors"))
    return {
        "state": tensors_of([last, *own]),
        "records": text_of(timeless(records)),
        "results": text_of(timeless(json.loads((out / "results.json").read_text()))),
        "export": tensors_of(final),
    }


def tensors_of(files: list[Path]) -> str:
    """SHA-256 of the tensors' names, types, shapes and contents."""
    found = hashlib.sha256()
    for file in files:
        with safe_open(file, framework="pt") as opened:
            for name in sorted(opened.keys()):
                value = opened.get_tensor(name).contiguous()
                found.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
                found.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


def text_of(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: timeless(v) for key, v in value.items() if key not in LEFT_OUT}
    return [timeless(v) for v in value] if isinstance(value, list) else value


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m golden")
    parser.add_argument("what", choices=("record", "compare"))
    parser.add_argument("file", type=Path)
    parser.add_argument("--only", default="", help="cases whose name contains this")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    found = {}
    with tempfile.TemporaryDirectory() as temporary:
        for i, (name, kind, how, blocks) in enumerate(cases()):
            if asked.only in name:
                folder = Path(temporary) / str(i)
                run(Path(temporary) / kind, kind, how, blocks, folder / "run")
                found[name] = digests(folder / "run")
                print(name, found[name]["state"], flush=True)
    if asked.what == "record":
        asked.file.write_text(json.dumps(found, indent=1) + "\n")
        return
    known = json.loads(asked.file.read_text())
    different = [
        f"{name}: {', '.join(k for k in found[name] if found[name][k] != known[name].get(k))}"
        for name in found
        if name in known and found[name] != known[name]
    ]
    new = [name for name in found if name not in known]
    same = len(found) - len(new) - len(different)
    print(f"{same} of {len(found) - len(new)} as before; {len(new)} are new")
    sys.exit("\n".join(different) or None)


if __name__ == "__main__":
    main()
