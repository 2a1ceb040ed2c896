"""One client's side of one sum: its keys, its masks, and the shares that it holds of others.

    keys      public keys for masks and for letters, and a commitment to a seed
    shares    the seed and the mask key in shares, sealed for each neighbour
    mask      x + PRG(seed) + Σ_{j > i} PRG(sᵢⱼ) − Σ_{j < i} PRG(sᵢⱼ)  mod 2⁶⁴
    reveal    of each neighbour one share: of the seed, if its numbers arrived; else of its mask key

The masks sᵢⱼ that two agree on cancel in the sum. Those of a client that vanished follow from its
mask key; the seed hides its numbers even then, should they arrive after all.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Self

from fedex_lora.errors import ProtocolError
from fedex_lora.federation.secure.graph import least, neighbours
from fedex_lora.federation.secure.primitives import (
    SECRET,
    Vector,
    add_mask,
    agreed,
    commitment,
    new_key,
    public,
    seal,
    unseal,
)
from fedex_lora.federation.secure.shamir import split

Keys = Mapping[str, str]
"""A client's public keys: `mask`, `channel`, and `seed`, the commitment to it; all in hex."""

_SHARE = 66  # bytes of a number below the prime
SHARE = 2 * _SHARE  # hex digits of one that is revealed, and
LETTER = 2 * (2 * _SHARE + 16)  # of two in a letter, with what tells that they are whole


@dataclass
class Session:
    """A client's secrets for one sum. It lives in memory, and as long as the sum.

    Attributes:
        name: The client's.
        context: Run, round and sum: keys and letters are good for nothing else.
        peers: Public keys of those whose numbers go into the sum with this client's, by name.
        held: Shares by whose secret they are of: `seed` and `key`.
        masked: Whether the masks were used.
        told: Which of the two was revealed. Never is the other one as well.
    """

    name: str
    context: str
    mask_key: str = field(default_factory=lambda: new_key().hex(), repr=False)
    channel_key: str = field(default_factory=lambda: new_key().hex(), repr=False)
    seed: str = field(default_factory=lambda: secrets.token_hex(SECRET), repr=False)
    threshold: int = 0
    masked: bool = False
    peers: dict[str, dict[str, str]] = field(default_factory=dict)
    held: dict[str, dict[str, str]] = field(default_factory=dict, repr=False)
    told: dict[str, str] = field(default_factory=dict)

    def dump(self) -> dict[str, Any]:
        """As JSON, for a client whose next message is answered by another process."""
        return asdict(self)

    @classmethod
    def load(cls, value: Mapping[str, Any]) -> Self:
        """The inverse of `dump`."""
        return cls(**value)

    def keys(self) -> Keys:
        """What all others are told."""
        found = {x: public(bytes.fromhex(getattr(self, f"{x}_key"))) for x in ("mask", "channel")}
        known = {x: key.hex() for x, key in found.items()}
        return {**known, "seed": commitment("seed", self.context, self.seed)}

    def share(self, everybody: Mapping[str, Keys], threshold: int | None) -> dict[str, Any]:
        """Letters to the neighbours, each with a share of both secrets, and commitments to these.

        Args:
            everybody: The keys of all clients, this one among them.
            threshold: Of all clients; None for more than half.

        Raises:
            ProtocolError: The keys are not what they should be.
        """
        if everybody.get(self.name) != self.keys():
            raise ProtocolError(f"the keys of {self.name} are given as others than it sent")
        for kind in ("mask", "channel", "seed"):
            if len({keys[kind] for keys in everybody.values()}) < len(everybody):
                raise ProtocolError(f"two clients are given with one key ({kind})")
        if self.peers:
            raise ProtocolError("asked for shares twice; they are dealt once")
        around = neighbourhood(everybody, self.name)
        self.threshold = least(len(around), len(everybody), threshold)
        if not 2 <= self.threshold <= len(around):
            raise ProtocolError(
                f"{len(everybody)} clients, of which {threshold or self.threshold} must stay; "
                "expected at least 2, and no more than there are"
            )
        self.peers = {name: dict(everybody[name]) for name in around}
        parts = {
            kind: split(bytes.fromhex(secret), len(around), self.threshold)
            for kind, secret in (("seed", self.seed), ("key", self.mask_key))
        }
        letters, commitments = {}, {}
        for i, name in enumerate(around):
            mine = {kind: shares[i].to_bytes(_SHARE, "big").hex() for kind, shares in parts.items()}
            commitments[name] = commitments_to(self.context, mine)
            if name == self.name:
                self.held[name] = mine
            else:
                letter = bytes.fromhex(mine["seed"] + mine["key"])
                key = self._channel(self.name, name)
                letters[name] = seal(key, letter, self.context, self.name, name).hex()
        return {"letters": letters, "commitments": commitments}

    def receive(self, letters: Mapping[str, str], commitments: Mapping[str, Keys]) -> None:
        """Takes in the neighbours' letters. Who sent none takes no part in the sum.

        Args:
            letters: By sender.
            commitments: By sender, to the share of each secret that is in the letter.

        Raises:
            ProtocolError: One cannot be opened, or holds other shares than were committed to. It
                may be the sender's fault, or of who carried it.
        """
        for name, sealed in letters.items():
            if name not in self.peers or name == self.name:
                raise ProtocolError(f"a letter of {name!r}, who is no neighbour")
            try:
                key = self._channel(name, self.name)
                letter = unseal(key, bytes.fromhex(sealed), self.context, name, self.name).hex()
            except (ProtocolError, ValueError) as error:
                raise ProtocolError(f"the letter of {name}: {error}") from None
            share = {"seed": letter[: 2 * _SHARE], "key": letter[2 * _SHARE :]}
            if commitments_to(self.context, share) != commitments.get(name):
                raise ProtocolError(f"the letter of {name}: not the shares that it committed to")
            self.held[name] = share
        self.peers = {name: keys for name, keys in self.peers.items() if name in self.held}
        self._check_enough(self.held)

    def mask(self, vector: Vector, told: str = "") -> None:
        """Adds the masks in place.

        Args:
            told: What all clients of the sum were told; see `told.fingerprint`.

        Raises:
            ProtocolError: It was done already. A mask that is used twice hides nothing.
        """
        if not self.held:
            raise ProtocolError("asked for a sum before shares were dealt")
        if self.masked:
            raise ProtocolError("asked for the same sum twice")
        self.masked = True
        add_mask(vector, bytes.fromhex(self.seed), 1)
        for name, keys in self.peers.items():
            if name != self.name:
                seed = pair_seed(self.context, self.mask_key, self.name, keys, name, told)
                add_mask(vector, seed, sign(self.name, name))

    def reveal(self, present: Iterable[str]) -> dict[str, str]:
        """One share of each neighbour, and of itself.

        Args:
            present: Those whose numbers arrived.

        Raises:
            ProtocolError: They are too few, this client is not among them, or another kind of a
                share was revealed before.
        """
        present = set(present)
        if self.name not in present or not self.masked:
            raise ProtocolError("asked to open a sum without its own numbers in it")
        self._check_enough(present & self.held.keys())
        shares = {}
        for name, share in self.held.items():
            kind = "seed" if name in present else "key"
            if self.told.setdefault(name, kind) != kind:
                raise ProtocolError(
                    f"asked for both kinds of shares of {name}, which would show its numbers; "
                    f"that of its {self.told[name]} was given"
                )
            shares[name] = share[kind]
        return shares

    def _check_enough(self, names: Iterable[str]) -> None:
        if (count := len(set(names))) < self.threshold:
            raise ProtocolError(
                f"{count} of this client's neighbours (itself counted) are left; "
                f"{self.threshold} must stay (privacy.secure_aggregation.threshold)"
            )

    def _channel(self, sender: str, receiver: str) -> bytes:
        other = sender if receiver == self.name else receiver
        key = bytes.fromhex(self.peers[other]["channel"])
        own = bytes.fromhex(self.channel_key)
        return agreed(own, key, "letter", self.context, sender, receiver)


def pair_seed(
    context: str, mask_key: str, name: str, keys: Keys, other: str, told: str = ""
) -> bytes:
    """The seed of the mask that two clients share, if they were told the same."""
    first, second = sorted((name, other))
    own, their = bytes.fromhex(mask_key), bytes.fromhex(keys["mask"])
    return agreed(own, their, "mask", context, first, second, told)


def sign(name: str, other: str) -> int:
    """Whether a client adds the mask that it shares with another one (1), or subtracts it (−1)."""
    return 1 if name < other else -1


def neighbourhood(everybody: Mapping[str, Keys], name: str) -> list[str]:
    """A client's neighbours and itself, sorted; a share's x is the place in it, from 1 on."""
    keys = (f"{n} {k['mask']} {k['seed']}" for n, k in sorted(everybody.items()))
    draw = commitment("draw", *keys)
    return sorted([*neighbours(everybody, draw)[name], name])


def commitments_to(context: str, share: Mapping[str, str]) -> dict[str, str]:
    """To each share of a letter."""
    return {kind: commitment("share", context, kind, text) for kind, text in share.items()}
