"""What all tests share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)  # tiny matrices: more threads are slower, by far on a busy machine


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with published data and models, if there is one."""
    beside = Path(__file__).resolve().parents[2] / "shared"
    path = Path(os.environ.get("FEDEX_LORA_SHARED", beside))
    if not path.is_dir():
        pytest.skip(f"no shared data in {path}; set FEDEX_LORA_SHARED")
    return path
