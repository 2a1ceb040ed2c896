"""Memory of a run above that of the process after its imports, against the number of clients."""

import pytest

from benchmarks.memory import ADAPTER, growth, prepare


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("memory")
    prepare(folder)
    return folder


@pytest.mark.parametrize("method", ["fedex", "fedit", "fedex-keep"])
def test_memory_grows_per_client_by_at_most_its_adapter_and_head(folder, method):
    assert 0.1 * ADAPTER < growth(folder, method) <= 1.2 * ADAPTER  # it is seen at all
