"""Tensors on disk: they come back as they were, equal ones once, and go with their checkpoints."""

import pytest
import torch
from simulation import same_tensors, settings, simulate

from fedex_lora.errors import UserError
from fedex_lora.federation.loop import run_round
from fedex_lora.runs import shelf
from fedex_lora.runs.checkpoint import (
    OWN,
    checkpoints,
    latest,
    load_checkpoint,
    prune,
    save_checkpoint,
    shelve,
)


def tensors(seed=0):
    g = torch.Generator().manual_seed(seed)
    wide = torch.randn(7, 4, generator=g)  # a part of it is a view that is not contiguous
    return {"A/layer.q": torch.randn(2, 5, generator=g), "B/layer.q": wide[:, :2]}


def test_they_come_back_as_they_were_and_only_what_is_asked_for_is_read(tmp_path):
    there = shelf.put(tmp_path / "own", 3, tensors())
    same_tensors(there, tensors())
    assert there["A/layer.q"] is not there["A/layer.q"]  # nothing is kept in memory
    with pytest.raises(KeyError):
        there["A/layer.k"]


def test_equal_ones_of_a_version_are_one_file(tmp_path):
    paths = {shelf.put(tmp_path, 3, tensors(seed)).path for seed in (0, 0, 1)}
    assert len(paths) == 2 == len(list(tmp_path.iterdir()))


def test_a_shelf_that_cannot_be_made_is_told(tmp_path):
    with pytest.raises(UserError, match="cannot be written"):
        shelf.put(tmp_path / "missing" / "own", 1, tensors())


@pytest.mark.parametrize("damage", ["gone", "changed"])
def test_a_checkpoint_whose_clients_factors_are_damaged_is_not_used(tmp_path, damage):
    states, _, _ = simulate(settings("fedex-keep"), 2)
    for state in states[1:]:
        save_checkpoint(tmp_path, state, {})
    (path, _, _), (older, _, _) = list(latest(tmp_path))
    own = load_checkpoint(path)[0].own["b"]
    assert isinstance(own, shelf.OnDisk)
    victim = own.path
    content = victim.read_bytes()
    victim.unlink() if damage == "gone" else victim.write_bytes(content[:-1] + b"?")
    assert [state is None for _, state, _ in latest(tmp_path)] == [True, False]
    with pytest.raises(UserError, match="lacks the factors of b"):
        load_checkpoint(path)
    assert load_checkpoint(older)[0].version == 1


@pytest.mark.parametrize("name", ["fedex-keep", "fedex-hetero", "local"])
def test_rounds_from_the_shelf_are_those_from_memory_and_old_files_go(tmp_path, name):
    s = settings(name, clients_per_round=2)
    states, _, _ = simulate(s, 5)
    _, clients, _ = simulate(s, 0)
    state = states[0]
    for expected in states[1:]:
        state, _ = run_round(state, s, clients, None, lambda v, own: shelve(tmp_path, v, own))
        save_checkpoint(tmp_path, state, {})
        prune(tmp_path, {1})
        for client in s.clients:
            same_tensors(state.own[client], expected.own[client])
    kept = [load_checkpoint(path)[0] for path in checkpoints(tmp_path)]
    assert [k.version for k in kept] == [5, 4, 1]
    owns = [own for k in kept for own in k.own.values()]
    used = {own.path for own in owns if isinstance(own, shelf.OnDisk)}
    assert len(owns) == 12
    assert used == set((tmp_path / OWN).iterdir())


def test_a_damaged_checkpoint_does_not_keep_others_from_being_pruned(tmp_path):
    states, _, _ = simulate(settings("fedex-keep"), 3)
    for state in states[1:]:
        save_checkpoint(tmp_path, state, {})
    (tmp_path / "round-0002.safetensors").write_bytes(b"damaged")
    prune(tmp_path, set())
    assert load_checkpoint(tmp_path / "round-0003.safetensors")[0].version == 3
    assert {f.name[:4] for f in (tmp_path / OWN).iterdir()} == {"0003"}
