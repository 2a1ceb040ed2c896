"""A small real run for all tests of this folder."""

import pytest
from small_runs import recipe

from fedex_lora.run import start_run
from fedex_lora.trained import open_run


@pytest.fixture(scope="session")
def small_run(tmp_path_factory):
    """(path, model) of a finished run."""
    folder = tmp_path_factory.mktemp("small")
    start_run(recipe(folder), folder / "run")
    return folder / "run", open_run(folder / "run").model
