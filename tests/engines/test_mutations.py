"""Spoiled messages by the dozen; `python -m benchmarks.mutations` tries thousands."""

from dataclasses import replace

import pytest

from benchmarks import mutations


@pytest.mark.parametrize(("method", "dtype"), mutations.PAIRS)
def test_a_spoiled_message_is_refused_by_name_or_within_its_bounds(method, dtype):
    found = [one.what for one in mutations.trial(method, dtype, 64, seed=1)]
    assert set(found) <= {"refused", "lost", "accepted"}
    assert found.count("refused") > 30 and "accepted" in found


def test_without_the_bounds_messages_with_too_much_effect_are_seen(monkeypatch):
    known = mutations.settings_of
    monkeypatch.setattr(
        mutations, "settings_of", lambda *pair: replace(known(*pair), norm_ratio=None)
    )
    assert any(one.what == "beyond" for one in mutations.trial("fedex", "float32", 200))
