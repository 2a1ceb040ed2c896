"""A client's secrets between two processes, whose keys it believes, and what it answers."""

from __future__ import annotations

import json
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from flwr.app import RecordDict
from small_runs import recipe
from typer.testing import CliRunner

from engines.test_secure_messages import secured
from fedex_lora.cli import app
from fedex_lora.engines.chosen import secure_settings
from fedex_lora.errors import DeploymentError, ProtocolError
from fedex_lora.federation.codec import encode_about
from fedex_lora.federation.header import first_of
from fedex_lora.flower import client_app
from fedex_lora.flower.client_app import ROUND_KEY, most_turns, reply_to
from fedex_lora.flower.deploy.changes import add
from fedex_lora.flower.deploy.init import Deployment, init
from fedex_lora.flower.deploy.roster import fingerprints, signer
from fedex_lora.flower.memory import SealedMemory
from fedex_lora.recipe.reader import dump_recipe

NAMES = ("ann", "bob", "cleo")


def test_flower_s_state_opens_once_and_an_older_one_never(tmp_path: Path) -> None:
    state, path = RecordDict(), tmp_path / "home" / "round.key"
    memory = SealedMemory(state, path)
    assert memory.take() is None
    memory.keep(b"a secret of a round")
    older = RecordDict({"memory": state.config_records["memory"]})
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert b"a secret" not in bytes(older.config_records["memory"]["sealed"])  # type: ignore[arg-type]
    assert memory.take() == b"a secret of a round"
    assert memory.take() is None and not path.exists() and not state.config_records
    memory.keep(b"the next one")
    assert SealedMemory(older, path).take() is None
    memory.keep(b"and another")
    path.write_bytes(b"damaged")
    assert memory.take() is None


def deployment(folder: Path) -> Path:
    init(folder, Deployment("127.0.0.1", 9443, NAMES))
    return folder


def test_every_institution_is_handed_the_keys_of_all(tmp_path: Path) -> None:
    path = deployment(tmp_path / "deployment")
    add(path, ["dan"], print)
    keys = {name: (path / "clients" / name / "key.pub").read_text() for name in (*NAMES, "dan")}
    for name, known in (("ann", NAMES), ("dan", (*NAMES, "dan"))):
        files = sorted((path / "clients" / name / "roster").iterdir())
        assert [file.stem for file in files] == sorted(known)
        assert all(file.read_text() == keys[file.stem] for file in files)
    ann, dan = (signer(path / "clients" / name) for name in ("ann", "dan"))
    assert ann is not None and dan is not None
    dan.check("round 1", "ann", {}, ann.sign("round 1", "ann", {}))
    with pytest.raises(ProtocolError, match="'dan', who is not on the roster"):
        ann.check("round 1", "dan", {}, dan.sign("round 1", "dan", {}))


def test_a_roster_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    own = deployment(tmp_path / "deployment") / "clients" / "ann"
    (own / "roster" / "bob.pub").write_text("nonsense")
    with pytest.raises(DeploymentError, match=r"bob\.pub: no public key, or a damaged one"):
        signer(own)
    for file in (own / "roster").iterdir():
        file.unlink()
    with pytest.raises(DeploymentError, match=r"expected a NAME\.pub of every institution"):
        signer(own)
    assert signer(tmp_path) is None


def test_a_key_that_the_institution_made_takes_the_place_of_what_it_was_handed(tmp_path) -> None:
    path, runner = deployment(tmp_path / "deployment"), CliRunner()
    own = (path / "clients" / "ann").rename(tmp_path / "ann")
    (path / "clients" / "ann").mkdir()
    before = fingerprints(own)
    assert runner.invoke(app, ["deploy", "key", str(own), "--name", "ann"]).exit_code == 0
    after = fingerprints(own)
    assert {name for name in NAMES if before[name] != after[name]} == {"ann"}
    found = signer(own)
    assert found is not None and found.roster["ann"] == found.key.public_key()
    argv = ["deploy", "key", str(path), "--name", "ann", "--public", str(own / "key.pub")]
    assert runner.invoke(app, argv).exit_code == 0
    known = serialization.load_ssh_public_key((path / "clients" / "ann" / "key.pub").read_bytes())
    assert known == found.key.public_key()
    told = runner.invoke(app, ["deploy", "roster", str(own)])
    assert told.exit_code == 0 and f"ann: {after['ann']}" in told.output


def test_keys_are_made_and_signed_without_loading_a_model(tmp_path: Path, monkeypatch) -> None:
    own = deployment(tmp_path / "deployment") / "clients" / "ann"
    spec = secured(recipe(tmp_path))
    secure = secure_settings(spec)
    assert secure is not None and secure.threshold == 2  # of three, whatever a server says
    assert most_turns(spec) == 4 * 6 * spec.federation.rounds + 10
    (tmp_path / "recipe.yaml").write_text(dump_recipe(spec))
    node = {"client": "ann", "recipe": tmp_path / "recipe.yaml", "home": own, "runs": 1}
    monkeypatch.setattr(client_app, "institution", None)
    run, state = "0" * 32, RecordDict()

    def ask(step: str, version: int = 0, **about: Any) -> Mapping[str, Any]:
        asked = {"kind": "secure", "federation": run, "lineage": [[0, "a"]], "client": "ann"}
        asked |= {"version": version, "step": step, "ask": about}
        return first_of(reply_to(encode_about(asked), node, {}, state))["about"]

    answer = ask("keys", context="round 1")["answer"]
    known = signer(own)
    assert known is not None
    known.check("round 1", "ann", answer["keys"], answer["signature"])
    kept = bytes(state.config_records["memory"]["sealed"])  # type: ignore[arg-type]
    assert b"seed" not in kept and (own / f"ann-{ROUND_KEY}").exists()
    refused = ask("open", sum="sizes", present=["ann"])
    assert refused["kind"] == "failed" and "without its own numbers" in refused["reason"]
    assert "2 rounds" in ask("keys", version=2, context="round 3")["reason"]
    (own / f"ann-{ROUND_KEY}").unlink()
    gone = ask("shares", everybody={})
    assert "what this client knew of the round is gone" in gone["reason"]
    lines = [json.loads(line) for line in (own / "audit.jsonl").read_text().splitlines()]
    assert lines[0]["round"] == 1 and lines[0]["kind"] == "secure"
