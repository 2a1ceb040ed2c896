"""The public API: what a federation in Python comes to, and what it refuses."""

from __future__ import annotations

import json

import pytest
import torch
from datasets import Dataset
from oracles import ideal_change, relative
from peft import LoraConfig, PeftModel
from tiny import TEXT, tiny, tokenizer_of
from transformers import AutoModelForSequenceClassification

import fedex_lora as fl
from fedex_lora.federation.messages import flat

COUNTS = {"ann": 5, "bob": 2, "cleo": 3}
LORA = {"r": 3, "lora_alpha": 6, "target_modules": ["query", "value"]}
TRAINING = {"learning_rate": 2e-2, "per_device_train_batch_size": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny("roberta", tmp_path_factory.mktemp("api"))


@pytest.fixture(scope="module")
def model(folder):
    return loaded(folder)


def loaded(folder, **lora):
    config = LoraConfig(**{**LORA, **lora})
    return fl.Model.from_pretrained(str(folder), config, num_labels=3)


@pytest.fixture(scope="module")
def clients(folder):
    tokenizer = tokenizer_of(folder)

    def rows(count):
        texts = [TEXT[i % len(TEXT)] for i in range(count)]
        columns = {"text": texts, "label": [i % 3 for i in range(count)]}
        return Dataset.from_dict({**columns, **tokenizer(texts)})  # the text is left out by itself

    return {name: rows(count) for name, count in COUNTS.items()}


def federated(model, clients, method="fedex", **options):
    train = options.pop("train", fl.HFTrainer(**TRAINING))
    return fl.Federation(model, clients, method, train, **options)


def logits(module):
    with torch.no_grad():
        return module(input_ids=torch.arange(5, 15).reshape(2, 5)).logits


def same(one, other):
    assert one.state.version == other.state.version
    for name, f in one.state.factors.items():
        assert torch.equal(f.A, other.state.factors[name].A)
        assert torch.equal(f.B, other.state.factors[name].B)
        mine, theirs = (x.state.ledger.total(name) for x in (one, other))
        assert mine is theirs is None or torch.equal(mine, theirs)


def test_the_global_model_is_the_weighted_mean_of_where_the_clients_ended(model, clients):
    federation, ends = federated(model, clients), {}
    trained = federation.engine.train_with

    class Watched:
        together = 1

        def __call__(self, model, turns):
            found = trained(model, turns)
            ends.update({turn.client: one.end for turn, one in zip(turns, found, strict=True)})
            return found

    federation.engine.train_with, start = Watched(), federation.state.factors
    (round,) = federation.rounds(1)
    assert round.number == 1 and round.deviation > 0 and round.metrics.keys() == COUNTS.keys()
    for name, shape in model.adapted.layers.items():
        ideal = ideal_change(
            [start[name]] * 3, [ends[c].layers[name] for c in COUNTS], list(COUNTS.values())
        )
        total = federation.state.ledger.total(name)
        got = federation.state.factors[name].delta().dense().double() + total.double()
        assert got.shape == (shape.out, shape.inp) and relative(got, ideal) < 1e-6


def test_four_rounds_are_two_saved_and_two_more_bit_for_bit(folder, model, clients, tmp_path):
    whole = federated(model, clients, "fedex-keep", seed=3)
    list(whole.rounds(2))
    whole.save(tmp_path / "run")
    list(whole.rounds(2))
    again = fl.Federation.resume(
        tmp_path / "run", loaded(folder), clients, "fedex-keep", fl.HFTrainer(**TRAINING), seed=3
    )
    assert [r.number for r in again.history] == [1, 2]
    list(again.rounds(2))
    same(again, whole)
    for client, own in whole.state.own.items():
        assert all(torch.equal(t, again.state.own[client][name]) for name, t in own.items())
    assert again.history._repr_html_().count("<tr>") == 5
    with pytest.raises(fl.UserError, match="was saved with another seed: 3 then, 0 now"):
        fl.Federation.resume(tmp_path / "run", model, clients, "fedex-keep")
    with pytest.raises(fl.UserError, match="was saved with another weights: 'examples' then"):
        fl.Federation.resume(
            tmp_path / "run", model, clients, "fedex-keep", seed=3, weights="uniform"
        )
    with pytest.raises(fl.UserError, match="there is no checkpoint"):
        fl.Federation.resume(tmp_path / "nothing", model, clients)


@pytest.mark.parametrize("method", ["fedex", "fedex-reinit", "ffa"])
def test_what_is_saved_loads_with_plain_peft_and_gives_the_same_logits(
    folder, model, clients, method, tmp_path
):
    federation = federated(model, clients, method)
    list(federation.rounds(2))
    federation.save_adapter(tmp_path / "adapter")
    expected = logits(federation.show())
    base = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3)
    plain = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    torch.testing.assert_close(logits(plain), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(fl.UserError, match="adapter"):  # what is there is not written over
        federation.save_adapter(tmp_path / "adapter")


def test_scores_are_those_of_the_global_model(model, clients):
    federation = federated(model, clients)
    list(federation.rounds(1))
    rows = clients["ann"]
    told = federation.evaluate(rows, lambda p: {"n": float(len(p.label_ids))}, batch_size=2)
    module, losses = federation.show(), []
    for row in rows:
        given = {
            "input_ids": torch.tensor([row["input_ids"]]),
            "labels": torch.tensor(row["label"]),
        }
        losses.append(module(**given).loss.item())
    assert told.keys() == {"loss", "n"} and told["n"] == len(rows)
    assert told["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-4)


def sgd(module, rows, *, round, client, rng):
    chosen = [p for p in module.parameters() if p.requires_grad]
    row = rows[int(torch.randint(len(rows), (), generator=rng))]
    given = {"input_ids": torch.tensor([row["input_ids"]]), "labels": torch.tensor(row["labels"])}
    loss = module(**given).loss
    loss.backward()
    with torch.no_grad():
        for p in chosen:
            p -= 0.1 * p.grad
            p.grad = None
    return fl.Trained({"loss": loss.item(), "round": float(round)})


def test_a_loop_of_ones_own_repeats_and_has_its_own_numbers_on_record(folder, model, clients):
    runs = [federated(m, clients, train=sgd, seed=5) for m in (model, loaded(folder))]
    for run in runs:
        list(run.rounds(2))
    same(*runs)
    assert runs[0].history[1].metrics["bob"]["round"] == 2.0


def test_transforms_are_of_what_is_sent(model, clients):
    """Clipped, then doubled: the update's norm on record is twice the bound."""
    doubled = lambda drift, turn: {name: 2 * t for name, t in drift.items()}  # noqa: E731
    federation = federated(model, clients, transform=fl.chain(fl.clip(0.01), doubled))
    (round,) = federation.rounds(1)
    assert round.record["norms"] == pytest.approx(dict.fromkeys(COUNTS, 0.02), rel=1e-4)


def test_noise_has_the_deviation_asked_for_and_is_not_known_beforehand():
    drift = {"A/q": torch.zeros(300, 300)}
    one, other = (fl.gaussian_noise(0.3)(drift, None)["A/q"] for _ in range(2))
    assert one.std().item() == pytest.approx(0.3, rel=0.02) and not torch.equal(one, other)
    again = [fl.gaussian_noise(0.3, seed=1)(drift, None)["A/q"] for _ in range(2)]
    assert torch.equal(*again)


def test_who_is_alone_has_a_model_alone(model, clients):
    federation = federated(model, clients, "local")
    list(federation.rounds(1))
    with pytest.raises(fl.UserError, match="every client has a model of its own; name one of ann"):
        federation.show()
    losses = {c: federation.evaluate(clients[c], client=c)["loss"] for c in COUNTS}
    assert len(set(losses.values())) == 3


def nothing(module, rows, **_):
    return None


def not_a_number(module, rows, **_):
    for p in module.parameters():
        if p.requires_grad:
            p.data.fill_(float("nan"))
    return fl.Trained()


def meddling(module, rows, **_):
    next(p for p in module.parameters() if not p.requires_grad).data.mul_(1.01)
    return fl.Trained()


@pytest.mark.parametrize(
    ("train", "reason"),
    [
        (nothing, "nothing: returned NoneType; expected fedex_lora.Trained"),
        (not_a_number, "0 valid updates.*ann: .* has entries that are NaN or infinite"),
        (meddling, "meddling: changed .*, which is frozen"),
    ],
)
def test_a_train_function_that_does_not_do_its_part_is_named(folder, clients, train, reason):
    with pytest.raises(fl.UserError, match=reason):
        list(federated(loaded(folder), clients, train=train).rounds(1))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"method": "fedx"}, "no method 'fedx'; did you mean 'fedex'"),
        ({"method": "fedex-svd"}, "rank: fedex-svd needs the rank"),
        ({"ranks": {"ann": 1, "bob": 2, "cleo": 3}}, "ranks: fedex needs one rank"),
        ({"method": "flexlora", "ranks": {"ann": 1}}, "ranks: expected one for each of ann, bob"),
        ({"wieghts": "uniform"}, "no option 'wieghts'; did you mean 'weights'"),
        ({"layers": {}}, "Federation: there is no option 'layers'"),
        ({"max_share": 0.4}, "client ann declares 5 of 10 rows"),
    ],
)
def test_what_cannot_be_is_refused_before_round_1(model, clients, options, reason):
    with pytest.raises(fl.UserError, match=reason):
        federated(model, clients, **options)


def test_rows_and_lora_that_cannot_be_used_are_refused(folder, model, clients):
    with pytest.raises(fl.UserError, match=r"dora.*cannot be aggregated exactly"):
        loaded(folder, use_dora=True)
    with pytest.raises(
        fl.UserError, match=r"LoraConfig\.init_lora_weights: expected .*got \"pissa\""
    ):
        loaded(folder, init_lora_weights="pissa")
    with pytest.raises(fl.UserError, match=r"LoraConfig\.rank_pattern\.query: expected a rank"):
        loaded(folder, rank_pattern={"query": 0})
    with pytest.raises(fl.UserError, match=r"Model\.dtype: expected .*got \"int3\""):
        fl.Model.from_pretrained(str(folder), None, dtype="int3")
    with pytest.raises(fl.UserError, match="expected peft's LoraConfig, got dict"):
        fl.Model.from_pretrained(str(folder), {"r": 2})  # type: ignore[arg-type]
    with pytest.raises(fl.UserError, match=r"ann: expected a datasets\.Dataset, got list"):
        federated(model, {**clients, "ann": [{"input_ids": [3]}]})
    with pytest.raises(fl.UserError, match=r"expected rows by client.*, got list"):
        federated(model, [*clients.values()])
    raw = Dataset.from_dict({"sentence": ["a"], "class": [1]})
    with pytest.raises(
        fl.UserError, match="eve: 1 rows with the columns sentence, class; expected"
    ):
        federated(model, {**clients, "eve": raw})
    with pytest.raises(fl.UserError, match="clients: there are none"):
        federated(model, {})
    with pytest.raises(fl.UserError, match="learning_rat"):
        list(federated(model, clients, train=fl.HFTrainer(learning_rat=1)).rounds(1))


def test_adapters_are_merged_exactly(model, clients, tmp_path):
    for name in ("one", "two"):
        federation = federated(model, clients, seed=len(name) + (name == "two"))
        list(federation.rounds(1))
        federation.save_adapter(tmp_path / name)
    fl.Merge([tmp_path / "one", tmp_path / "two"], [3, 1]).save(tmp_path / "both")
    config = json.loads((tmp_path / "both" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"]  # scale 1


def test_the_server_alone_counts_what_is_sent_and_refuses_what_it_did_not_ask_for():
    layers = {"q": fl.LayerShape(out=4, inp=3, rank=2, scale=0.5)}
    server = fl.Server("fedex", layers, ["a", "b"], seed=1)
    state = server.init()
    updates = {c: server.update(state, c, server.start(state, c), 3) for c in "ab"}
    after, record = server.step(state, updates)
    assert after.version == 1 and record["weights"] == {"a": 0.5, "b": 0.5}
    assert torch.equal(after.factors["q"].A, state.factors["q"].A)
    stale = {c: server.update(state, c, server.start(after, c), 3) for c in "ab"}
    with pytest.raises(fl.QuorumLost, match="sent an update of round 1; expected round 2"):
        server.step(after, stale)
    with pytest.raises(fl.UserError, match="the update of 'a' is given as 'b''s"):
        server.step(after, {"b": updates["a"]})
    assert set(flat(server.start(after, "a"))) == {"A/q", "B/q"}
    with pytest.raises(fl.UserError, match="Server: there is no option 'rnak'; did you"):
        fl.Server("fedex", layers, rnak=3)


def test_every_public_name_is_there_and_has_words():
    for name in fl.__all__:
        assert (getattr(fl, name).__doc__ or "").strip(), name
    assert set(fl.__all__) <= set(dir(fl))
    with pytest.raises(AttributeError, match="has no attribute 'Sever'"):
        _ = fl.Sever
