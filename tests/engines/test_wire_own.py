"""A method that others write, FedSA-LoRA, in whole runs: local, resumed and through messages."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from own_methods import registered
from small_runs import StopAfter, products, recipe

from engines.in_process import ANY, InProcess, institutions, remote, without
from engines.test_wire import CLIENTS, checkpoint, same_bits, timeless
from fedex_lora.engines.remote import engine as remote_module
from fedex_lora.engines.remote import guests
from fedex_lora.engines.remote.cache import Cache
from fedex_lora.engines.remote.courier import Failed
from fedex_lora.errors import UserError
from fedex_lora.federation.header import read_header
from fedex_lora.federation.state import start_of
from fedex_lora.runs.across_machines import across_machines
from fedex_lora.runs.export import export_adapter, export_model
from fedex_lora.runs.here import in_this_process
from fedex_lora.runs.plan.plan import plan
from fedex_lora.runs.reopened import open_run, read_round
from fedex_lora.runs.run import resume_run, start_run

# their updates are lost on the way: they trained, and have to go back to what was taken of them
GONE = {2: ["bob"], 3: ["ann"]}


@pytest.fixture(autouse=True, scope="module")
def _own():
    with registered():
        yield


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    for module in (guests, remote_module):
        monkeypatch.setattr(module, "OFTEN", 0.0)


def spec(folder, name="own-fedsa", **blocks):
    federation = {"clients": 3, "rounds": 4, **blocks.pop("federation", {})}
    blocks = {"evaluation": CLIENTS, **blocks}
    return recipe(folder, method={"name": name}, federation=federation, **blocks)


def own_of(run):
    """Each client's own tensors after the last round."""
    return {c: dict(own.items()) for c, own in read_round(run, "last").state.own.items()}


def same(a, b):
    assert a.keys() == b.keys() and all(torch.equal(t, b[name]) for name, t in a.items())


@pytest.mark.parametrize("wire", ["float32", "bfloat16"])
def test_through_messages_it_is_the_local_run_and_B_never_leaves_its_client(wire, tmp_path):
    recipe = spec(tmp_path, federation={"wire_dtype": wire})
    start_run(recipe, tmp_path / "local", None, without(GONE))
    blobs: dict[str, list[bytes]] = {}

    def overheard(node, reply):
        blobs.setdefault(node, []).append(reply)
        meta = read_header(reply, ANY).meta
        lost = meta["about"]["kind"] == "update" and node in GONE.get(meta["round"], ())
        return Failed("lost on the way") if lost else reply

    courier = InProcess(institutions(recipe, tmp_path / "cache"), change=overheard)
    start_run(remote(recipe), tmp_path / "remote", None, across_machines(courier))
    same_bits(tmp_path / "local", tmp_path / "remote")
    assert not own_of(tmp_path / "remote")
    kept = own_of(tmp_path / "local")
    for name, own in kept.items():
        (folder,) = (tmp_path / "cache").glob(f"*/{name}")
        held = Cache(folder).load()
        assert held is not None and {n[0] for n in own} == {"B"}
        same(own, held.ends[max(held.ends)])  # what only the client has, bit for bit
        for blob in blobs[name]:
            assert not [n for n in read_header(blob, ANY).shapes if n.startswith("B/")]
            for end in held.ends.values():
                for value in end.values():
                    assert value.numpy().tobytes() not in blob


def test_both_sides_stop_after_two_of_four_rounds_and_go_on_bit_for_bit(tmp_path):
    recipe = spec(tmp_path)
    start_run(recipe, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        start_run(recipe, tmp_path / "local", StopAfter(2), in_this_process)
    resume_run(tmp_path / "local")
    with pytest.raises(KeyboardInterrupt):
        courier = InProcess(institutions(recipe, tmp_path / "cache"))
        start_run(remote(recipe), tmp_path / "remote", StopAfter(2), across_machines(courier))
    courier = InProcess(institutions(recipe, tmp_path / "cache"))
    resume_run(tmp_path / "remote", None, None, across_machines(courier))
    for run in ("local", "remote"):
        same_bits(tmp_path / "whole", tmp_path / run)
        assert timeless(tmp_path / "whole") == timeless(tmp_path / run)
    whole, resumed = own_of(tmp_path / "whole"), own_of(tmp_path / "local")
    assert sorted(whole) == ["ann", "bob", "cleo"] == sorted(resumed)
    for client, own in whole.items():
        same(own, resumed[client])


def test_every_client_exports_its_own_model_and_nobody_a_global_one(tmp_path):
    start_run(spec(tmp_path, evaluation={"where": "both"}), tmp_path / "run")
    trained = open_run(tmp_path / "run", "last")
    for write in (export_adapter, export_model):
        with pytest.raises(
            UserError, match="every client has its own model under own-fedsa; name one"
        ):
            write(trained, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not list((tmp_path / "run" / "final").glob("*"))
    for client in ("ann", "bob"):
        export_adapter(trained, tmp_path / client, client=client)
        start = start_of(trained.state, trained.settings, client)
        for layer, product in products(tmp_path / client).items():
            f = start.layers[layer]
            expected = f.scale * f.B.double() @ f.A.double()
            assert expected.norm() > 0 and (product - expected).norm() < 1e-6 * expected.norm()
    alone = trained.extra["record"]["scores_alone"]
    assert sorted(alone) == ["ann", "bob", "cleo"]
    coordinator = replace(trained.state, own={})  # private factors are not there
    elsewhere = replace(trained, recipe=remote(spec(tmp_path)), state=coordinator)
    with pytest.raises(
        UserError, match="own-fedsa: every client has its own model, a part of which"
    ):
        export_adapter(elsewhere, tmp_path / "out", client="ann")


def test_what_is_sent_is_foreseen_to_the_byte(tmp_path):
    for wire in ("float32", "bfloat16"):
        recipe = spec(tmp_path, federation={"wire_dtype": wire})
        start_run(recipe, tmp_path / wire)
        for foreseen, record in zip(plan(recipe).rounds, timeless(tmp_path / wire)):
            assert {c: s.bytes for c, s in foreseen.up.items()} == record["bytes_up"]
            own = sum(
                t.numel() * 4 for own in own_of(tmp_path / wire).values() for t in own.values()
            )
            assert foreseen.own == own


def test_what_cannot_be_is_refused_before_the_run(tmp_path):
    recipe = spec(tmp_path, evaluation={"where": "server"})
    with pytest.raises(
        ValueError, match=r"evaluation.where: own-fedsa leaves a part .* set it to cl"
    ):
        remote(recipe)
    with pytest.raises(ValueError, match=r"records.save_updates: own-fedsa leaves a part"):
        remote(spec(tmp_path, records={"save_updates": True}))
    with pytest.raises(ValueError, match=r"lora.ranks: own-fedsa needs equal ranks"):
        spec(tmp_path, lora={"ranks": [1, 2, 3]})


def test_saved_updates_of_clients_in_this_process_are_whole(tmp_path):
    start_run(spec(tmp_path, records={"save_updates": True}), tmp_path / "run")
    state = read_round(tmp_path / "run", "last").state
    own = own_of(tmp_path / "run")
    found = products(tmp_path / "run" / "rounds" / "0004" / "clients" / "ann")
    assert checkpoint(tmp_path / "run") and found.keys() == state.factors.keys()
    for layer, product in found.items():
        # the columns of what B·A spans are those of B
        b = own["ann"][f"B/{layer}"].double()
        missed = product - b @ torch.linalg.lstsq(b, product).solution
        assert product.norm() > 0 and missed.norm() < 1e-6 * product.norm()
