import pytest
import torch
from oracles import dense64, relative

from fedex_lora.aggregation.delta import Delta
from fedex_lora.aggregation.ledger import Ledger


def ledger_of(versions, layers=("q", "v"), rank=2, m=12, n=9):
    g = torch.Generator().manual_seed(0)
    ledger = Ledger()
    for version in range(1, versions + 1):
        increment = {
            s: Delta(torch.randn(m, rank, generator=g), torch.randn(rank, n, generator=g))
            for s in layers
        }
        ledger = ledger.append(version, increment)
    return ledger


def total(ledger, site="q"):
    found = ledger.total(site)
    assert found is not None
    return found


def test_total_is_the_sum_of_all_increments():
    ledger = ledger_of(5)
    expected = torch.stack([dense64(inc["q"]) for _, inc in ledger.entries]).sum(0)
    assert relative(total(ledger), expected) < 1e-6
    assert ledger.total("absent") is None and Ledger().total("q") is None


@pytest.mark.parametrize("at", [1, 3, 5])
def test_compaction_never_changes_the_bits_of_a_total(at):
    ledger = ledger_of(5)
    compacted = ledger.compacted(at)
    assert torch.equal(total(compacted), total(ledger))
    grown = ledger_of(7)
    for version, increment in grown.entries[5:]:
        compacted = compacted.append(version, increment)
    assert torch.equal(total(compacted, "v"), total(grown, "v"))


@pytest.mark.parametrize("held", range(6))
@pytest.mark.parametrize("compact", [0, 2, 4])
def test_whoever_holds_any_version_catches_up_to_the_same_bits(held, compact):
    veteran = ledger_of(5)
    server = veteran.compacted(compact)
    mine = Ledger(tuple(e for e in veteran.entries if e[0] <= held))
    caught_up = mine.extended(server.since(held))
    for site in ("q", "v"):
        assert torch.equal(total(caught_up, site), total(veteran, site))
    assert len(server.since(held).entries) <= 5 - min(held, 5)


def test_a_part_that_repeats_known_versions_changes_nothing():
    ledger = ledger_of(4)
    assert ledger.extended(ledger.since(1)) == ledger


def test_compaction_happens_only_where_it_saves_numbers():
    small = ledger_of(2, rank=1, m=50, n=40)
    assert small.compact_if_smaller(2) == small
    large = ledger_of(30, rank=2)
    assert large.compact_if_smaller(29).snapshot_version == 29


def test_factored_and_dense_totals_agree():
    few, many = ledger_of(2, rank=1), ledger_of(30)
    for ledger, is_dense in ((few, False), (many, True)):
        found = ledger.factored("q")
        assert found is not None
        assert (found.right is None) == is_dense
        assert relative(dense64(found), total(ledger).double()) < 1e-6


def test_versions_must_ascend():
    ledger = ledger_of(2)
    with pytest.raises(AssertionError, match="does not follow"):
        ledger.append(2, ledger.entries[0][1])
