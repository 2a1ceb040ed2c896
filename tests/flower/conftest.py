from __future__ import annotations

import pytest

from flower.worlds import World


@pytest.fixture
def world() -> World:
    """Unequal weights, out ≠ in ≠ r, scale ≠ 1."""
    return World({"h.0.q": (20, 31, 3), "h.0.v": (17, 20, 2)}, [1, 5, 2])
