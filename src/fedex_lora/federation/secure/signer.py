"""Who a key belongs to: clients sign what they publish, and check the others' against the roster.

Without it a server could hand out keys of its own in everybody's name, and read all letters.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.ec import (
    ECDSA,
    EllipticCurvePrivateKey,
    EllipticCurvePublicKey,
)

from fedex_lora.errors import ProtocolError
from fedex_lora.federation.secure.primitives import canonical
from fedex_lora.federation.secure.session import Keys

_HASH = ECDSA(hashes.SHA384())


@dataclass(frozen=True)
class Signer:
    """A client's own signature, and those that it knows.

    Attributes:
        key: Its private key, that of its node.
        roster: The public keys of all clients, by name, as they were handed to it before.
    """

    key: EllipticCurvePrivateKey
    roster: Mapping[str, EllipticCurvePublicKey]

    def sign(self, context: str, name: str, keys: Mapping[str, Keys]) -> str:
        """A signature of a client's keys for one round, in hex."""
        return self.key.sign(_statement(context, name, keys), _HASH).hex()

    def check(self, context: str, name: str, keys: Mapping[str, Keys], signature: object) -> None:
        """That the client of that name has signed these keys for this round.

        Raises:
            ProtocolError: It has not, or is not on the roster.
        """
        if name not in self.roster:
            known = ", ".join(sorted(self.roster))
            raise ProtocolError(f"keys of {name!r}, who is not on the roster ({known})")
        try:
            if not isinstance(signature, str):
                raise ValueError
            signed = bytes.fromhex(signature)
            self.roster[name].verify(signed, _statement(context, name, keys), _HASH)
        except (InvalidSignature, ValueError):
            raise ProtocolError(
                f"keys that are given as {name}'s were not signed by {name}'s node key; somebody "
                "stands between"
            ) from None


def _statement(context: str, name: str, keys: Mapping[str, Keys]) -> bytes:
    return canonical(["fedex-lora keys", context, name, keys])
