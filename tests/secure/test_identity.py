"""Keys are signed, and checked against the roster: nobody can stand between."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from fedex_lora.errors import ProtocolError
from fedex_lora.federation.secure.member import Member
from fedex_lora.federation.secure.messages import Answer, Ask
from fedex_lora.federation.secure.signer import Signer
from fedex_lora.federation.secure.sums import Summand
from fedex_lora.federation.settings import Secure


def untrained(widths: Mapping[str, int]) -> Summand:
    raise AssertionError


def test_keys_that_their_owner_did_not_sign_are_refused() -> None:
    names, s = ("a", "b", "c"), Secure()
    nodes = {name: ec.generate_private_key(ec.SECP384R1()) for name in names}
    roster = {name: key.public_key() for name, key in nodes.items()}
    members = {name: Member(name) for name in names}

    def ask(name: str, step, about: dict) -> Answer:
        return members[name].answer(Ask(step, about), s, untrained, Signer(nodes[name], roster))

    told = {name: dict(ask(name, "keys", {"context": "round 1"}).about) for name in names}
    first, second, third = names
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
