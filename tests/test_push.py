"""What is sent to the hub, and that it is no more."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from commands import Command
from huggingface_hub import HfApi

from fedex_lora.runs.service import push


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("adapter_config.json", "adapter_model.safetensors", "README.md"):
        (tmp_path / name).write_text("{}")
    (tmp_path / "notes.txt").write_text("our own")
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs/config.json").write_text("{}")
    return tmp_path


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    told: list[dict[str, Any]] = []
    monkeypatch.setattr(push, "get_token", lambda: "hf_x")
    monkeypatch.setattr(push.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(HfApi, "create_repo", lambda self, repo, **k: told.append(k) or repo)
    monkeypatch.setattr(HfApi, "upload_folder", lambda self, **k: told.append(k))
    return told


def test_only_the_parts_of_an_export_are_sent(
    command: Command, folder: Path, sent: list[dict[str, Any]]
) -> None:
    code, said, _ = command("push", folder, "ann/mine")
    assert code == 0 and "Sent 3 files" in said
    assert "not sent: logs/config.json, notes.txt" in said
    assert sent[0]["private"] is True
    assert set(sent[1]["allow_patterns"]) == {
        "adapter_config.json", "adapter_model.safetensors", "README.md",
    }  # fmt: skip
    assert command("push", folder, "ann/mine", "--public")[0] == 0
    assert sent[2]["private"] is False


@pytest.mark.parametrize("way", ["option", "token", "offline"])
def test_nothing_is_sent_unless_it_can_be(
    way: str,
    command: Command,
    folder: Path,
    sent: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if way == "token":
        monkeypatch.setattr(push, "get_token", lambda: None)
    if way == "offline":
        monkeypatch.setattr(push.constants, "HF_HUB_OFFLINE", True)
    code, said, _ = command("push", folder, "ann/mine", *(["--dry-run"] * (way == "option")))
    assert code == 0 and "Nothing is sent" in said and "adapter_model.safetensors" in said
    assert sent == []


def test_what_cannot_be_sent(
    command: Command,
    folder: Path,
    sent: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert "expected ORGANISATION/NAME" in command("push", folder, "a b/c")[2]

    def refuses(*_: object, **__: object) -> None:
        raise OSError("no route")

    monkeypatch.setattr(HfApi, "upload_folder", refuses)
    code, _, told = command("push", folder, "ann/mine")
    assert code == 2 and "the hub did not take it: no route" in told
    (folder / "README.md").unlink()
    assert "has no card" in command("push", folder, "ann/mine")[2]
    (folder / "adapter_config.json").unlink()
    code, _, told = command("push", folder, "ann/mine")
    assert code == 2 and "no adapter and no model" in told


def test_a_run_s_adapter_is_what_it_exported(
    command: Command, small_run: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(push, "get_token", lambda: None)
    code, said, _ = command("push", small_run[0], "ann/mine")
    assert code == 0 and f"from {small_run[0]}/final/adapter" in said and "README.md" in said
