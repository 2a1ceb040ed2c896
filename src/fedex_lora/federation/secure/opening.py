"""The server's side of one sum: what it knows of it, and how the masks are taken off."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

from fedex_lora.errors import ProtocolError
from fedex_lora.federation.secure.graph import least
from fedex_lora.federation.secure.primitives import Vector, add_mask, commitment, public
from fedex_lora.federation.secure.session import (
    Keys,
    commitments_to,
    neighbourhood,
    pair_seed,
    sign,
)
from fedex_lora.federation.secure.shamir import combine


class Unopened(ProtocolError):
    """The masks cannot be taken off: too few shares, or wrong ones; the text names whose."""


@dataclass
class Book:
    """What the server knows of one sum.

    Attributes:
        context: As of the clients' sessions.
        threshold: Of all clients; None for more than half.
        keys: Of all who sent some.
        commitments: By dealer and holder, to the shares; who sent none takes no part.
    """

    context: str
    threshold: int | None
    keys: dict[str, Keys] = field(default_factory=dict)
    commitments: dict[str, Mapping[str, Keys]] = field(default_factory=dict)

    @cached_property
    def around(self) -> dict[str, list[str]]:
        """Each client's neighbourhood, once all keys are there."""
        return {name: neighbourhood(self.keys, name) for name in self.keys}

    def least(self, name: str) -> int:
        """How many of a client's neighbourhood must stay."""
        return least(len(self.around[name]), len(self.keys), self.threshold)

    def check(self, holder: str, shares: Mapping[str, str], present: Iterable[str]) -> None:
        """That a client revealed the shares that it holds, one of each neighbour.

        Raises:
            ProtocolError: It did not, or revealed others than were dealt.
        """
        present = set(present)
        expected = {n for n in self.around[holder] if n in self.commitments}
        if shares.keys() != expected:
            wrong = sorted(shares.keys() ^ expected)[0]
            raise ProtocolError(f"revealed shares of others than its neighbours ({wrong!r})")
        for dealer, share in shares.items():
            kind = "seed" if dealer in present else "key"
            told = commitments_to(self.context, {kind: share})
            if told[kind] != self.commitments[dealer].get(holder, {}).get(kind):
                raise ProtocolError(f"revealed another share of {dealer} than it was dealt")

    def open(
        self,
        total: Vector,
        present: Iterable[str],
        shares: Mapping[str, Mapping[str, str]],
        told: str = "",
    ) -> None:
        """Takes the masks off the sum of the vectors of those present, in place.

        Args:
            shares: By holder and dealer; each was checked.
            told: What all clients of the sum were told; see `told.fingerprint`.

        Raises:
            Unopened: Too few shares of somebody, or its shares are of another secret.
        """
        present = sorted(present)
        secrets = {
            dealer: self._secret(dealer, dealer in present, shares) for dealer in self.commitments
        }
        for dealer, secret in secrets.items():
            if dealer in present:
                add_mask(total, secret, -1)
                continue
            for other in self.around[dealer]:
                if other in present:
                    keys = self.keys[other]
                    seed = pair_seed(self.context, secret.hex(), dealer, keys, other, told)
                    add_mask(total, seed, -sign(other, dealer))

    def _secret(self, dealer: str, here: bool, shares: Mapping[str, Mapping[str, str]]) -> bytes:
        """The seed of a client that is here, the mask key of one that is not."""
        held = {
            x: int(shares[holder][dealer], 16)
            for x, holder in enumerate(self.around[dealer], start=1)
            if dealer in shares.get(holder, {})
        }
        needed = self.least(dealer)
        if len(held) < needed:
            raise Unopened(
                f"{len(held)} of {dealer}'s neighbours are left (itself counted); {needed} must "
                "stay (privacy.secure_aggregation.threshold)"
            )
        try:
            secret = combine(dict(list(held.items())[:needed]))
        except ProtocolError as error:
            raise Unopened(f"{dealer} dealt {error}") from None
        told, keys = self.context, self.keys[dealer]
        right = (
            commitment("seed", told, secret.hex()) == keys["seed"]
            if here
            else public(secret).hex() == keys["mask"]
        )
        if not right:
            raise Unopened(f"{dealer} dealt shares of another secret than it committed to")
        return secret
