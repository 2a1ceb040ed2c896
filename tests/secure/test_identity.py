"""Keys are signed, and checked against the roster: nobody can stand between."""

from __future__ import annotations

import pytest
from crowd import settings
from cryptography.hazmat.primitives.asymmetric import ec

from fedex_lora.errors import ProtocolError
from fedex_lora.federation.secure.identity import Identity
from fedex_lora.federation.secure.member import Member, Trained
from fedex_lora.federation.secure.messages import Answer, Ask


def untrained() -> Trained:
    raise AssertionError


def test_keys_that_their_owner_did_not_sign_are_refused() -> None:
    s = settings("fedex", 3)
    nodes = {name: ec.generate_private_key(ec.SECP384R1()) for name in s.clients}
    roster = {name: key.public_key() for name, key in nodes.items()}
    members = {name: Member(name) for name in s.clients}

    def ask(name: str, step, about: dict) -> Answer:
        return members[name].answer(Ask(step, about), s, untrained, Identity(nodes[name], roster))

    told = {name: dict(ask(name, "keys", {"context": "round 1"}).about) for name in s.clients}
    first, second, third = s.clients
    between = Member(second).answer(Ask("keys", {"context": "round 1"}), s, untrained).about
    forged = {**told, second: {**between, "signature": told[second]["signature"]}}
    with pytest.raises(ProtocolError, match=f"not signed by {second}'s node key"):
        ask(first, "shares", {"everybody": forged})
    with pytest.raises(ProtocolError, match=f"not signed by {second}'s node key"):
        ask(first, "shares", {"everybody": {**told, second: between}})
    with pytest.raises(ProtocolError, match="'mallory', who is not on the roster"):
        ask(first, "shares", {"everybody": {**told, "mallory": told[third]}})
    late = dict(ask(third, "keys", {"context": "round 2"}).about)  # of another round
    with pytest.raises(ProtocolError, match=f"not signed by {third}'s node key"):
        ask(first, "shares", {"everybody": {**told, third: late}})
    assert ask(first, "shares", {"everybody": {**told, third: told[third]}}).about["dealt"]
