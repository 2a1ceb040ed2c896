"""FedDPA in whole runs: what is trained when, resumed, exported; test_wire.py has its messages."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from small_runs import StopAfter, products, recipe
from torch.testing import assert_close

from engines.test_wire import CLIENTS, same_bits
from fedex_lora.aggregation.ledger import Ledger
from fedex_lora.engines.setup import set_up
from fedex_lora.engines.stage import Stage
from fedex_lora.engines.turn import Trained, take_turns, turn_of
from fedex_lora.federation.state import begin, start_of
from fedex_lora.runs.export import export_adapter
from fedex_lora.runs.reopened import open_run
from fedex_lora.runs.run import resume_run, start_run

DPA = {"method": {"name": "feddpa", "options": {"mix": 0.3}}, "evaluation": CLIENTS}


@pytest.mark.parametrize("placement", ["fold", "side"])
def test_a_client_trains_its_own_pair_in_the_mixed_model_and_then_the_shared_one(
    placement, tmp_path
):
    federation = set_up(
        recipe(tmp_path, **DPA, model={"name": str(tmp_path / "roberta"), "placement": placement})
    )
    model, s = federation.model, federation.settings
    start = start_of(begin(s, federation.initial), s, "ann")
    g = torch.Generator().manual_seed(0)
    start = replace(
        start,
        layers={
            n: replace(f, B=10 * torch.randn(f.B.shape, generator=g))
            for n, f in start.layers.items()
        },
        pair={
            n: replace(f, B=10 * torch.randn(f.B.shape, generator=g)) for n, f in start.pair.items()
        },
    )
    seen = []

    class Watched:
        together = 1

        def __call__(self, given, turns):
            (turn,) = turns
            given.write(turn.start)
            given.freeze(turn.trained, turn.head)
            rows = federation.task.collator(given.tokenizer)([turn.rows[i] for i in range(3)])
            given.module.eval()
            logits = given.module(**rows).logits.detach()
            taking = {n for n, p in given.module.named_parameters() if p.requires_grad}
            seen.append(
                (
                    logits,
                    {n.split(".")[-3] for n in taking if ".lora_" in n},
                    any("classifier" in n for n in taking),
                    turn.seed,
                )
            )
            moved = {n: replace(f, A=f.A + 1) for n, f in turn.start.layers.items()}
            return [Trained({"loss": len(seen), "seconds": 1.0}, replace(turn.start, layers=moved))]

    stage, ledger = Stage(model, federation.task, s.method), Ledger()
    turn = turn_of(s, "ann", 2, federation.clients["ann"], start)
    (update,) = take_turns(stage, Watched(), [turn], ledger, s)
    rows = federation.task.collator(model.tokenizer)([turn.rows[i] for i in range(3)])
    stage.show(ledger, start)
    mixed = model.module.eval()(**rows).logits
    stage.show(ledger, replace(start, pair={}))
    shared = model.module(**rows).logits
    (first, taken, head, seed), (second, then, head_then, seed_then) = seen
    assert_close(first, mixed.detach(), rtol=0, atol=2e-5)
    assert_close(second, shared.detach(), rtol=0, atol=2e-5)
    assert (mixed - shared).abs().max() > 1e-3
    assert taken == then == {"lora_A", "lora_B"} and not head and head_then and seed != seed_then
    assert update.metrics == {"loss": 2, "own_loss": 1, "seconds": 2.0}
    for n, f in start.layers.items():
        assert torch.equal(update.tensors[f"A/{n}"], f.A + 1)
        assert torch.equal(update.kept[f"pair/A/{n}"], start.pair[n].A + 1)
    assert not [n for n in update.tensors if n.startswith("pair/")]


def test_a_run_that_stopped_goes_on_bit_for_bit_and_exports_a_clients_mix(tmp_path):
    wanted = recipe(tmp_path, **DPA)
    with pytest.raises(KeyboardInterrupt):
        start_run(wanted, tmp_path / "stopped", StopAfter(1))
    resume_run(tmp_path / "stopped")
    start_run(wanted, tmp_path / "whole")
    same_bits(tmp_path / "stopped", tmp_path / "whole")
    trained = open_run(tmp_path / "whole", "last")
    for client in ("ann", "bob"):
        export_adapter(trained, tmp_path / client, client=client)
        got, own = products(tmp_path / client), trained.state.own[client]
        assert got.keys() == trained.state.factors.keys()
        for n, f in trained.state.factors.items():
            private = own[f"pair/B/{n}"].double() @ own[f"pair/A/{n}"].double()
            expected = f.scale * (0.7 * f.B.double() @ f.A.double() + 0.3 * private)
            assert private.norm() > 0
            assert_close(got[n], expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    "blocks, why",
    [
        ({"engine": {"fuse": 3}}, "engine.fuse: feddpa trains each client twice"),
        ({"records": {"save_updates": True}}, "records.save_updates: of feddpa an update"),
        ({"privacy": {"secure_aggregation": {}}}, "privacy.secure_aggregation: feddpa leaves"),
        (
            {"privacy": {"example_level": {"noise_multiplier": 1.0, "delta": 1e-3}}},
            "method.name: feddpa trains on every row twice a round",
        ),
        ({"lora": {"ranks": [1, 2, 3]}}, "lora.ranks: feddpa needs equal ranks"),
        (
            {"federation": {"clients": 3, "mean": "median", "liars": 1, "min_clients": 3}},
            "federation.mean: does not go with median: clients go on from factors of their own",
        ),
    ],
)
def test_what_it_does_not_go_with_is_refused_by_name(blocks, why, tmp_path):
    with pytest.raises(ValueError, match=why):
        recipe(tmp_path, **{**DPA, **blocks})
