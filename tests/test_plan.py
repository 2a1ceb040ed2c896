"""What is foretold of a run against the run itself, and what is refused before it starts."""

import json
import socket
from pathlib import Path

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from small_runs import SIZES, recipe

from fedex_lora.recipe import Recipe
from fedex_lora.recipe.reader import dump_recipe, load_recipe
from fedex_lora.runs.plan.memory import activations
from fedex_lora.runs.plan.plan import plan
from fedex_lora.runs.run import start_run

RECIPES = Path(__file__).parents[1] / "recipes"


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    def refuse(*_):
        raise AssertionError("a network was asked for")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("plan")


def changed(r: Recipe, block: str, **values) -> Recipe:
    return r.model_copy(update={block: getattr(r, block).model_copy(update=values)})


def test_a_plan_is_what_the_run_turns_out_to_be(folder):
    r = recipe(folder, "gpt2", federation={"rounds": 3})
    found = plan(r)
    results = start_run(r, folder / "run")
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    for planned, record in zip(found.rounds, map(json.loads, lines), strict=True):
        assert {c: s.bytes for c, s in planned.up.items()} == record["bytes_up"]
        assert {c: s.bytes for c, s in planned.down.items()} == record["bytes_down"]
        assert found.timing
        assert {c: v["steps"] for c, v in record["clients"].items()} == found.timing.steps
    assert found.delivery.bytes == results["bytes_delivery"]
    assert found.examples == SIZES
    checkpoint = (folder / "run" / "checkpoints" / "round-0003.safetensors").stat().st_size
    assert 0 <= checkpoint - found.rounds[-1].checkpoint < 8192  # its header
    assert found.timing
    assert found.timing.run > 3 * sum(found.timing.steps.values()) * found.timing.step


@pytest.mark.parametrize("name", ["fedsvd", "fedex-hetero", "feddpa"])
def test_models_that_clients_score_are_sent_to_them(name, folder):
    where = {"where": "clients", "every": 2, "client_fraction": 0.4}
    asked = {"rounds": 3, "clients_per_round": 2}
    r = recipe(folder, method={"name": name}, federation=asked, evaluation=where)
    found = plan(r, measured=False)
    results = start_run(r, folder / name)
    lines = (folder / name / "metrics.jsonl").read_text().splitlines()
    for planned, record in zip(found.rounds, map(json.loads, lines), strict=True):
        assert {c: s.bytes for c, s in planned.down.items()} == record["bytes_down"]
    assert len(found.rounds[1].down) == len(found.rounds[2].down) == 3
    assert found.delivery.bytes == results["bytes_delivery"]


def test_what_clients_keep_for_themselves_counts_on_the_disk_and_not_in_memory(folder):
    r = recipe(folder, "gpt2", method={"name": "fedex-keep"}, federation={"rounds": 1})
    found = plan(r, measured=False)
    start_run(r, folder / "keeps")
    files = list((folder / "keeps" / "checkpoints" / "own").iterdir())
    assert len(files) == len(found.clients)
    headers = 4096 * len(files)
    assert 0 <= sum(f.stat().st_size for f in files) - found.rounds[0].own < headers
    assert found.disk == 4 * (found.rounds[0].checkpoint + found.rounds[0].own)
    parts = {part.what: part.bytes for part in found.server}
    assert parts["state"] == found.rounds[0].checkpoint


def test_the_rank_grows_until_the_sum_is_dense(folder):
    found = plan(recipe(folder, "gpt2", federation={"rounds": 6}), measured=False)
    assert found.timing is None and found.about_time
    ranks = [r.rank for r in found.rounds]
    assert ranks[0] == (3 - 1) * 3 and ranks[1] == 2 * ranks[0]
    assert ranks[-1] == found.rounds[-1].full == 16
    first, second = found.rounds[:2]
    assert first.catch_up and second.catch_up
    assert first.catch_up.bytes < second.catch_up.bytes and first.ledger < second.ledger
    dense = 4 * 2 * (48 * 16)  # of both layers' c_attn: a snapshot, and at most one entry
    assert found.rounds[-1].ledger <= 2 * dense


def test_a_recipe_of_the_hub_is_planned_without_it():
    found = plan(load_recipe(RECIPES / "glue" / "cola.yaml", ["federation.rounds=5"]))
    assert (found.parameters, found.adapter) == (124_647_170, 147_456)
    assert found.examples is None and "nyu-mll/glue" in found.about_examples
    assert found.timing is None and "FacebookAI/roberta-base" in found.about_time
    parts = {part.what: part.bytes for part in found.client}
    trained = 4 * (found.adapter + found.head)
    assert parts["model"] == 4 * found.parameters
    assert parts["optimizer"] == 2 * parts["gradients"] == 2 * trained


def test_quantised_and_half_precision_models_take_less():
    whole = load_recipe(RECIPES / "glue" / "cola.yaml", ["federation.rounds=1"])
    weights = [
        plan(changed(whole, "model", **values), measured=False).client[0].bytes
        for values in (
            {},
            {"dtype": "bfloat16"},
            {"dtype": "bfloat16", "placement": "side", "quantisation": "nf4"},
        )
    ]
    assert weights[0] == 2 * weights[1]
    linear = 12 * (4 * 768 * 768 + 2 * 768 * 3072)  # of the encoder
    assert weights[2] == weights[1] - linear * (2 - 0.5625)


def test_activations_are_estimated_within_a_factor_of_two(folder):
    r = recipe(folder, "gpt2", task={"max_length": 128})
    config = transformers.GPT2Config(vocab_size=320, n_embd=64, n_layer=3, n_head=4)
    model = get_peft_model(
        transformers.GPT2LMHeadModel(config), LoraConfig(r=4, fan_in_fan_out=True)
    ).train()
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(tensor):  # kept, so that no address is used twice
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    ids = torch.zeros(4, 128, dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(input_ids=ids, labels=ids)
    size = sum(t.untyped_storage().nbytes() for at, t in kept.items() if at not in own)
    assert 0.5 < size / activations(r, config) < 2


def test_full_fine_tuning_trains_the_model_itself(folder):
    r = recipe(folder, "gpt2", method={"name": "full"})
    found = plan(r, measured=False)
    parts = {part.what: part.bytes for part in found.client}
    assert found.adapted == 0 and found.head == found.parameters
    assert parts["gradients"] == parts["model"] == 4 * found.parameters
    assert "adapter and head" not in parts


def test_the_plan_command(command, folder):
    file = folder / "recipe.yaml"
    file.write_text(dump_recipe(recipe(folder, "gpt2")))
    code, out, _ = command("plan", file, "--no-measure", "--set", "federation.rounds=4")
    assert code == 0 and "3 client(s), 4 rounds" in out and "Time: not asked for" in out
    code, out, _ = command("plan", file, "--no-measure", "--json")
    whole = json.loads(out)
    assert code == 0 and whole["recipe"]["method"]["name"] == "fedex" and len(whole["rounds"]) == 2
    code, _, err = command("plan", file, "--set", "model.name=FacebookAI/roberta-bose")
    assert code == 2 and "did you mean 'FacebookAI/roberta-base'?" in err and "gemma-2-9b" in err
    code, _, err = command("plan", file, "--set", "lora.target_modules=[quary]")
    assert code == 2 and "quary" in err


def test_a_plan_has_the_rounds_and_the_noise_of_a_private_run(command, folder):
    """One round of noise 0.8 costs 4.15 at δ = 10⁻³, two 6.45."""
    file = folder / "private.yaml"
    level = {"noise_multiplier": 0.8, "clip": 0.1, "delta": 1e-3, "epsilon": 5.0}
    private = {"client_level": level, "secure_aggregation": True}
    spec = recipe(
        folder, method={"name": "ffa"}, federation={"weights": "uniform"}, privacy=private
    )
    file.write_text(dump_recipe(spec))
    code, out, _ = command("plan", file, "--no-measure")
    assert code == 0 and ", 1 rounds" in out and "ε = 5 allows 1 of 2 rounds" in out
    code, _, err = command("plan", file, "--set", "privacy.client_level.epsilon=1")
    assert code == 2 and "allows no round" in err
    batch = {"per_device_train_batch_size": 3}
    rows = {"example_level": {"epsilon": 8.0, "delta": 1e-3}}
    file.write_text(dump_recipe(recipe(folder, privacy=rows, training=batch)))
    code, out, _ = command("plan", file, "--no-measure")
    assert code == 0 and ", 2 rounds" in out and "noise multiplier 0." in out


def test_the_cost_command(command, tmp_path):
    code, out, _ = command("cost", "--model", "gpt2", "--method", "fedit,full", "--json")
    assert code == 0
    assert [c["method"] for c in json.loads(out)["costs"]] == ["fedit", "full", "fedex"]
    code, out, _ = command("cost", "--model", "gpt2", "--method", "ffa")
    assert code == 0 and "124,439,808 parameters" in out and "12 layers (c_attn)" in out
    once = ["cost", "--model", "gpt2", "--method", "fedex", "--plot-clients", "1,2", "--plot"]
    code, out, _ = command(*once, tmp_path / "plots")
    assert code == 0 and len(json.loads((tmp_path / "plots" / "cost-gpt2.json").read_text())) == 2
    assert {p.suffix for p in (tmp_path / "plots").iterdir()} == {".svg", ".png", ".json"}
    mine = tmp_path / "mine.md"
    mine.write_text("notes")
    for wrong, said in {
        (*once, tmp_path / "plots"): "is there already",
        (*once[:-3], "--plot-clients", "0,x", "--plot", tmp_path / "no"): "is no whole number",
        ("cost",): "--model: missing",
        ("cost", "--model", "gpt-2"): "did you mean 'gpt2'?",
        ("cost", "--model", "gpt2", "--method", "fedx"): "did you mean 'fedex'?",
        ("cost", "--model", "gpt2", "--out", mine): "only --table8",
        ("cost", "--table8", "--out", mine): "is something else",
    }.items():
        code, _, err = command(*wrong)
        assert code == 2 and said in err.replace("\n", " ")
    assert mine.read_text() == "notes"
