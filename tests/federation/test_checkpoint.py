import pytest
import torch
from simulation import assert_same, same_tensors, settings, simulate

from fedex_lora import disk
from fedex_lora.aggregation.adapter import AdapterState
from fedex_lora.aggregation.methods import METHODS
from fedex_lora.errors import UserError
from fedex_lora.federation.loop import run_round
from fedex_lora.federation.state import start_of
from fedex_lora.runs import checkpoint
from fedex_lora.runs.checkpoint import checkpoints, latest, load_checkpoint, prune, save_checkpoint


def same_state(a, b):
    assert (a.version, a.held, a.changed) == (b.version, b.held, b.changed)
    assert a.taken == b.taken
    assert_same(AdapterState(a.factors, a.head), AdapterState(b.factors, b.head))
    assert a.ledger.layers() == b.ledger.layers()
    for one, other in ((a.own, b.own), (a.variates, b.variates)):
        assert one.keys() == other.keys()
        for client in one:
            same_tensors(one[client], other[client])
    same_tensors(a.variate, b.variate)
    assert a.ranks == b.ranks
    for site in a.ledger.layers():
        assert torch.equal(a.ledger.total(site), b.ledger.total(site))
    assert a.carry.keys() == b.carry.keys() and a.late.keys() == b.late.keys()
    assert all(torch.equal(w.dense(), b.carry[n].dense()) for n, w in a.carry.items())
    assert all(torch.equal(t, b.late[n]) for n, t in a.late.items())


@pytest.mark.parametrize("name", list(METHODS))
@pytest.mark.parametrize("extra", [{}, {"wire_dtype": torch.bfloat16}, {"clients_per_round": 2}])
def test_four_rounds_are_two_and_two_more_bit_for_bit(name, extra, tmp_path):
    layers = {"layers": {}} if METHODS[name].trains == "all" else {}
    s = settings(name, **extra, **layers)
    states, _, _ = simulate(s, 4)
    save_checkpoint(tmp_path, states[2], {"record": {"round": 2}})
    state, extra = load_checkpoint(tmp_path / "round-0002.safetensors")
    assert extra == {"record": {"round": 2}}
    same_state(state, states[2])
    _, again, _ = simulate(s, 2)
    for expected in states[3:]:
        state, _ = run_round(state, s, again)
        same_state(state, expected)
    assert {c: start_of(state, s, c).nbytes() for c in s.clients}


@pytest.fixture
def saved(tmp_path):
    states, _, _ = simulate(settings("fedex"), 4)
    for state in states[1:]:
        save_checkpoint(tmp_path, state, {})
    return tmp_path, states


@pytest.mark.parametrize("damage", ["truncated", "flipped", "no digest", "empty"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(saved, damage):
    directory, states = saved
    newest = directory / "round-0004.safetensors"
    content = newest.read_bytes()
    if damage == "truncated":
        newest.write_bytes(content[:-7])
    if damage == "flipped":
        newest.write_bytes(content[:-7] + bytes([content[-7] ^ 1]) + content[-6:])
    if damage == "empty":
        newest.write_bytes(b"")
    if damage == "no digest":
        newest.with_suffix(".sha256").unlink()
    found = list(latest(directory))
    if damage != "no digest":  # an unfinished one is not listed
        path, state, why = found.pop(0)
        assert path == newest and state is None and "corrupted or truncated" in why
    same_state(found[0][1], states[3])


def test_a_checkpoint_of_another_version_is_named_as_such(tmp_path, monkeypatch):
    states, _, _ = simulate(settings("fedex"), 1)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_meta", lambda state: {"version": state.version})
        save_checkpoint(tmp_path, states[1], {})
    ((_, state, why),) = latest(tmp_path)
    assert state is None and "of another version of fedex-lora (it lacks 'held')" in why


def test_a_failed_write_leaves_what_was_there(saved, monkeypatch):
    directory, states = saved
    before = {p.name: p.read_bytes() for p in directory.iterdir()}

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(disk.os, "fsync", full)
    with pytest.raises(UserError, match="No space left on device"):
        save_checkpoint(directory, states[4], {"other": 1})
    assert {p.name: p.read_bytes() for p in directory.iterdir()} == before


def test_pruning_keeps_the_two_newest_and_the_best(saved):
    directory, _ = saved
    prune(directory, {1})
    assert [p.name for p in checkpoints(directory)] == [
        "round-0004.safetensors",
        "round-0003.safetensors",
        "round-0001.safetensors",
    ]
    assert len(list(directory.iterdir())) == 6


def test_round_10_000_comes_after_9_999(tmp_path):
    states, _, _ = simulate(settings("fedex-keep"), 2)
    for name, state in (("round-9999", states[1]), ("round-10000", states[2])):
        made = save_checkpoint(tmp_path, state, {})
        for suffix in (".safetensors", ".sha256"):
            made.with_suffix(suffix).rename(tmp_path / f"{name}{suffix}")
    assert [p.stem for p in checkpoints(tmp_path)] == ["round-10000", "round-9999"]
    assert [state.version for _, state, _ in latest(tmp_path)] == [2, 1]
    (tmp_path / "round-x.safetensors").write_bytes(b"")  # a hand's
    (tmp_path / "round-x.sha256").write_text("")
    (tmp_path / "own" / "12a-b.safetensors").write_bytes(b"")
    prune(tmp_path, set())
    assert (tmp_path / "round-10000.safetensors").exists() and (
        tmp_path / "round-x.sha256"
    ).exists()
