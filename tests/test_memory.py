"""Memory of a run above that of the process after its imports, against the number of clients."""

import pytest

from benchmarks.memory import ADAPTER, FEW, MANY, peak, prepare


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("memory")
    prepare(folder)
    return folder


@pytest.mark.parametrize("method", ["fedex", "fedit", "fedex-keep"])
def test_memory_grows_per_client_by_at_most_its_adapter_and_head(folder, method):
    few, many = (peak(folder, clients, method) for clients in (FEW, MANY))
    assert few > ADAPTER  # what there is once is seen
    assert (many - few) / (MANY - FEW) <= 1.2 * ADAPTER
