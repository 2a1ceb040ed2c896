"""Whole runs on tiny real models: exactness of exports, resuming, best rounds, failures."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from small_runs import SIZES, StopAfter, oracle, products, recipe

from fedex_lora.aggregation.methods import METHODS
from fedex_lora.engines.stage import Stage
from fedex_lora.errors import QuorumLost, UserError
from fedex_lora.recipe.reader import dump_recipe
from fedex_lora.runs.checkpoint import load_checkpoint
from fedex_lora.runs.export import export_adapter, export_model
from fedex_lora.runs.reopened import open_run
from fedex_lora.runs.run import resume_run, start_run
from fedex_lora.runs.rundir import RunDir
from fedex_lora.runs.watch import Silent

EXACT = [
    name
    for name, m in METHODS.items()
    if m.residual == "exact" and m.exchanges and not m.pooled and m.trains == "both"
]
SAVE = {"records": {"save_updates": True}}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for f in folder.glob("*.safetensors") for k, v in load_file(f).items()}


def oriented(change, weight):
    """The oracle is out × in; Conv1D and embeddings store the transpose."""
    return change if change.shape == weight.shape else change.T


def check_exported(run: Path, out: Path, bound: float) -> None:
    """Every adapted weight of the exported model against W0 + oracle in float64."""
    trained = open_run(run, "last")
    export_model(trained, out, torch.float32)
    got, change = weights(out), oracle(run)
    assert set(change) == set(trained.model.layers)
    for site, delta in change.items():
        w0 = trained.model.pretrained(site).double()
        key = next(k for k in got if k.endswith(f"{site}.weight"))
        exact = oriented(w0 + delta, got[key])
        assert delta.norm() > 1e-3 * w0.norm()  # there was something to get wrong
        assert (got[key].double() - exact).norm() / exact.norm() <= bound


@pytest.mark.parametrize("kind", ["gpt2", "llama", "gemma2", "bert"])
@pytest.mark.parametrize("rounds", [1, 5])
def test_the_exported_model_is_the_oracle_s(kind, rounds, tmp_path):
    federation = {"clients": 3, "rounds": rounds, "clients_per_round": 2 if rounds == 5 else "all"}
    start_run(recipe(tmp_path, kind, federation=federation, **SAVE), tmp_path / "run")
    check_exported(tmp_path / "run", tmp_path / "out", 1e-6)


@pytest.mark.parametrize("name", [*EXACT, "fedex-svd", "ffa", "rolora"])
@pytest.mark.parametrize("rounds", [1, 5])
def test_every_exact_method_exports_the_oracle_s_model(name, rounds, tmp_path):
    """fedex-svd flushes its carry in the last round; five rounds with a client absent in each."""
    method = {"name": name, **({"rank": 2} if name == "fedex-svd" else {})}
    lora = {"ranks": [2, 5, 3]} if METHODS[name].ranks_may_differ else {}
    federation = {"clients": 3, "rounds": rounds, "clients_per_round": 2 if rounds == 5 else "all"}
    spec = recipe(tmp_path, method=method, lora=lora, federation=federation, **SAVE)
    start_run(spec, tmp_path / "run")
    check_exported(tmp_path / "run", tmp_path / "out", 1e-6)


@pytest.mark.parametrize("name", [*EXACT, "ffa"])
def test_a_run_can_start_from_an_adapter(name, tmp_path):
    start_run(recipe(tmp_path, federation={"rounds": 1}, **SAVE), tmp_path / "first")
    first = tmp_path / "first" / "rounds" / "0001" / "global"
    spec = recipe(tmp_path, method={"name": name}, lora={"init": first}, **SAVE)
    start_run(spec, tmp_path / "run")
    assert all(p.norm() > 0 for p in products(first).values())
    check_exported(tmp_path / "run", tmp_path / "out", 1e-6)


def test_a_bf16_base_is_one_rounding_from_the_exact_weight_after_fifty_rounds(tmp_path):
    spec = recipe(
        tmp_path,
        model={"dtype": "bfloat16"},
        federation={"clients": 3, "rounds": 50},
        training={"max_steps": 1, "learning_rate": 2e-3},
        evaluation={"every": 50},
        **SAVE,
    )
    start_run(spec, tmp_path / "run")
    trained = open_run(tmp_path / "run", "last")
    export_model(trained, tmp_path / "out")
    got = weights(tmp_path / "out")
    for site, delta in oracle(tmp_path / "run").items():
        exact = trained.model.pretrained(site).double() + delta
        weight = got[next(k for k in got if k.endswith(f"{site}.weight"))]
        assert weight.dtype == torch.bfloat16
        once = exact.to(torch.bfloat16).double()
        assert ((weight.double() - exact).abs() <= (once - exact).abs() + 1e-6 * exact.abs()).all()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of four rounds that was not interrupted."""
    folder = tmp_path_factory.mktemp("finished")
    spec = recipe(
        folder,
        federation={"clients": 3, "rounds": 4, "clients_per_round": 2},
        evaluation={"where": "both", "client_fraction": 0.4},
    )
    results = start_run(spec, folder / "run")
    return folder, spec, results


def newest(run: Path):
    return RunDir(run).newest()[0]


def same_bits(a, b):
    one, other = (load_file(sorted((p / "checkpoints").glob("*.safetensors"))[-1]) for p in (a, b))
    assert one.keys() == other.keys() and all(torch.equal(v, other[k]) for k, v in one.items())


def timeless(run: Path):
    """The records without what depends on the clock."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for record in records:
        record.pop("seconds")
        for client in record["clients"].values():
            client.pop("seconds")
    return records


def test_two_rounds_and_a_resumed_two_are_four_bit_for_bit(finished, tmp_path):
    folder, spec, results = finished
    with pytest.raises(KeyboardInterrupt):
        start_run(spec, tmp_path / "run", StopAfter(2))
    resumed = resume_run(tmp_path / "run", spec)
    same_bits(tmp_path / "run", folder / "run")
    assert timeless(tmp_path / "run") == timeless(folder / "run")
    assert resumed["best"] == results["best"] and resumed["bytes_up"] == results["bytes_up"]


def test_scores_that_are_no_numbers_count_as_no_better_and_survive_a_resume(tmp_path, monkeypatch):
    def infinite(*asked):
        return {"perplexity": float("inf"), "loss": float("nan")}

    monkeypatch.setattr(Stage, "score", infinite)
    spec = recipe(tmp_path, "llama", evaluation={"patience": 2}, federation={"rounds": 9})
    results = start_run(spec, tmp_path / "run")
    assert results["rounds"] == 9 and results["best"]["score"] is None
    with pytest.raises(KeyboardInterrupt):
        start_run(spec, tmp_path / "again", StopAfter(2))
    assert resume_run(tmp_path / "again")["best_round"] == results["best_round"]


@pytest.mark.parametrize("damage", [b"", None])
def test_after_a_damaged_checkpoint_the_one_before_is_used_and_said_so(finished, tmp_path, damage):
    folder, spec, _ = finished
    with pytest.raises(KeyboardInterrupt):
        start_run(spec, tmp_path / "run", StopAfter(3))
    file = tmp_path / "run" / "checkpoints" / "round-0003.safetensors"
    file.write_bytes(file.read_bytes()[:-9] if damage is None else damage)
    notes = []

    class Notes(Silent):
        def note(self, text):
            notes.append(text)

    resume_run(tmp_path / "run", None, Notes())
    assert "round-0003.safetensors: checkpoint is corrupted or truncated" in notes[0]
    same_bits(tmp_path / "run", folder / "run")
    assert timeless(tmp_path / "run") == timeless(folder / "run")


def test_kill_9_at_any_moment_loses_at_most_the_round_in_progress(finished, tmp_path):
    folder, spec, _ = finished
    file, run = tmp_path / "recipe.yaml", tmp_path / "run"
    file.write_text(dump_recipe(spec))
    command = [sys.executable, "-m", "fedex_lora", "run", str(file), "--out", str(run)]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        deadline = time.monotonic() + 120
        while not (run / "checkpoints" / "round-0002.safetensors").exists():
            assert process.poll() is None and time.monotonic() < deadline, log.name
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    state = newest(run)
    assert state is not None and state.version >= 1
    resume_run(run)
    same_bits(run, folder / "run")
    assert timeless(run) == timeless(folder / "run")


def test_resuming_with_another_recipe_is_refused_by_name(finished):
    folder, spec, _ = finished
    other = spec.model_copy(update={"seed": 1})
    with pytest.raises(UserError, match=r"another recipe: seed: 1 != 0"):
        resume_run(folder / "run", other)


def test_a_directory_that_holds_another_run_is_left_alone(finished):
    folder, spec, _ = finished
    before = sorted(p.name for p in (folder / "run").rglob("*"))
    with pytest.raises(UserError, match="holds another run"):
        start_run(spec, folder / "run")
    assert sorted(p.name for p in (folder / "run").rglob("*")) == before


def test_the_records_hold_what_a_reader_needs(finished):
    folder, _, results = finished
    records = timeless(folder / "run")
    assert [r["round"] for r in records] == [1, 2, 3, 4]
    last = records[-1]
    assert set(last["scores"]) == {"validation"} and set(last["client_scores"]) == set(SIZES)
    assert len(last["clients"]) == 2 and set(last["bytes_up"]) == set(last["clients"])
    assert abs(sum(last["weights"].values()) - 1) < 1e-9
    assert last["deviation"] > 0 and set(last["deviation_by_site"]) == set(last["ideal_by_site"])
    assert set(results["best"]["scores"]) == {"validation", "test"}
    assert results["best"]["score"] == max(r["score"] for r in records)
    environment = json.loads((folder / "run" / "environment.json").read_text())
    assert environment["threads"] == 1 and environment["packages"]["torch"]


def test_exports_load_with_plain_libraries_and_give_the_run_s_logits(finished, tmp_path):
    folder, spec, _ = finished
    trained = open_run(folder / "run", "last")
    model = export_model(trained, tmp_path / "model").path
    adapter = export_adapter(trained, tmp_path / "adapter").path
    auto = transformers.AutoModelForSequenceClassification
    merged = auto.from_pretrained(model).eval()
    base = auto.from_pretrained(spec.model.name, num_labels=3)
    adapted = peft.PeftModel.from_pretrained(base, str(adapter)).eval()
    ids = torch.arange(3, 19).reshape(2, 8)
    expected = _run_logits(folder, ids)
    for loaded in (merged, adapted):
        with torch.no_grad():
            torch.testing.assert_close(loaded(ids).logits, expected, rtol=0, atol=1e-4)
    card = (model / "README.md").read_text()
    clients = load_checkpoint(folder / "run" / "checkpoints" / "round-0004.safetensors")[1]
    for word in ("fedex", "accuracy", "torch", *clients["record"]["clients"]):
        assert word in card


def _run_logits(folder, ids):
    trained = open_run(folder / "run", "last")
    trained.show()
    with torch.no_grad():
        return trained.model.module.eval()(input_ids=ids).logits


def test_an_adapter_cut_to_a_rank_states_its_error(finished, tmp_path):
    trained = open_run(finished[0] / "run", "last")
    whole = products(export_adapter(trained, tmp_path / "whole").path)
    cut = export_adapter(trained, tmp_path / "cut", rank=2)
    best = products(cut.path)
    for site, matrix in whole.items():
        values = torch.linalg.svdvals(matrix)
        tail = (values[2:].norm() / values.norm()).item()
        assert cut.errors is not None and abs(cut.errors[site] - tail) < 1e-5
        assert abs((best[site] - matrix).norm() / matrix.norm() - tail) < 1e-5
    assert cut.rank == 2 and 0 < cut.error < 1


@pytest.mark.parametrize("name", ["local", "full", "centralized", "fedsvd", "flexlora", "fedit"])
def test_the_other_methods_run_too(name, tmp_path):
    spec = recipe(tmp_path, method={"name": name}, evaluation={"where": "both"})
    results = start_run(spec, tmp_path / "run")
    assert 0 <= results["best"]["score"] <= 1
    assert set(results["best"]["client_scores"]) == set(SIZES)
    exchanged = METHODS[name].exchanges
    assert (results["bytes_up"] > 0) == exchanged
    final = tmp_path / "run" / "final"
    assert final.exists() == exchanged
    if not exchanged:
        with pytest.raises(UserError, match="name one of ann, bob, cleo"):
            export_model(open_run(tmp_path / "run"), tmp_path / "out")
        export_model(open_run(tmp_path / "run"), tmp_path / "out", client="bob")


def test_placements_agree(tmp_path):
    runs = {}
    for placement in ("fold", "side"):
        spec = recipe(tmp_path, model={"placement": placement}, federation={"rounds": 3})
        start_run(spec, tmp_path / placement)
        runs[placement] = newest(tmp_path / placement)
    for site, f in runs["fold"].factors.items():
        torch.testing.assert_close(f.A, runs["side"].factors[site].A, rtol=1e-3, atol=1e-4)


def test_going_back_to_a_round_gives_the_same_run_once_more(tmp_path):
    spec = recipe(tmp_path, federation={"rounds": 4})
    results = start_run(spec, tmp_path / "run")
    copied = shutil.copytree(tmp_path / "run", tmp_path / "copy")
    directory = RunDir(copied)
    aside = directory.go_back(3)
    assert {p.name for p in aside.iterdir()} == {
        "round-0004.safetensors",
        "round-0004.sha256",
        "results.json",
        "final",
    }
    with pytest.raises(UserError, match=r"no checkpoint of round 2; there are: .*3"):
        directory.go_back(2)
    again = resume_run(copied)
    assert again["best_round"] == results["best_round"] and again["last"] == results["last"]
    same_bits(tmp_path / "run", copied)
    assert timeless(tmp_path / "run") == timeless(copied)


def test_early_stopping_and_the_best_round_s_checkpoint(tmp_path):
    spec = recipe(tmp_path, federation={"rounds": 12}, evaluation={"patience": 2})
    results = start_run(spec, tmp_path / "run")
    records = timeless(tmp_path / "run")
    best = max(records, key=lambda r: (r["score"], -r["scores"]["validation"]["loss"], r["round"]))
    assert results["best_round"] == best["round"]
    assert results["rounds"] == min(12, best["round"] + 2)
    load_checkpoint(tmp_path / "run" / "checkpoints" / f"round-{best['round']:04d}.safetensors")


def test_clients_that_vanish_cost_only_themselves(tmp_path):
    federation = {"rounds": 6, "failure_rate": 0.3}
    spec = recipe(tmp_path, federation=federation, seed=3)
    start_run(spec, tmp_path / "run")
    lost = [sorted(r["lost"]) for r in timeless(tmp_path / "run")]
    assert any(lost) and len({tuple(x) for x in lost}) > 1


def test_a_client_that_diverges_is_refused_and_below_the_quorum_the_run_stops(tmp_path):
    spec = recipe(tmp_path, training={"learning_rate": 6e11, "max_grad_norm": 0.0})
    with pytest.raises(
        QuorumLost,
        match=r"round 2: 0 valid updates.*ann: head of .* has entries of .*; at most 1e\+12",
    ):
        start_run(spec, tmp_path / "run")
    assert newest(tmp_path / "run").version == 1


@pytest.mark.parametrize("name", ["fedex", "local"])
def test_no_row_is_scored_twice_by_one_model(tmp_path, monkeypatch, name):
    scored = []
    given = Stage.score

    def evaluate(stage, rows, *more):
        scored.append(rows)
        return given(stage, rows, *more)

    monkeypatch.setattr(Stage, "score", evaluate)
    results = start_run(
        recipe(tmp_path, method={"name": name}, federation={"rounds": 1}), tmp_path / "run"
    )
    models = len(results["last"].get("scores_alone", "1"))
    assert sorted(map(len, scored)) == sorted([6, 4] * models)  # validation, and then test alone
    assert set(results["last"]["scores"]) == {"validation", "test"}
