"""A client's part in a round of secure aggregation: it answers what the server asks.

keys      a round begins: public keys for two sums, signed
shares    everybody's keys → letters with shares of both sums' secrets
train     the letters; trains → the sizes of its tensors, under masks
open      who sent sizes → shares that open their sum
send      the sizes that all agreed on → its numbers, under masks
open      who sent numbers → shares that open their sum
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from fedex_lora.errors import ProtocolError
from fedex_lora.federation.noise import SumNoise
from fedex_lora.federation.secure import fixed
from fedex_lora.federation.secure.messages import SUMS, Answer, Ask
from fedex_lora.federation.secure.session import Session
from fedex_lora.federation.secure.signer import Signer
from fedex_lora.federation.secure.sums import Summand, noised, sized
from fedex_lora.federation.secure.told import fingerprint
from fedex_lora.federation.settings import Secure

Added = Callable[[Mapping[str, int]], Summand]
"""What a client adds, by the widths of the sketches; see `sums.summand`."""

_HALVINGS = 40  # of weights, at most


@dataclass
class Member:
    """What a client remembers from one message of a round to the next. It lives in memory.

    Attributes:
        context: The round's, as the server gave it.
        sessions: One for each of the two sums.
        everybody: Who takes part.
        widths: Of the sketches, by layer.
        round: That is trained.
        clip: The round's bound, where it follows the clients' norms.
        told: What it was told of the round that the others have to be told too.
    """

    name: str
    context: str = ""
    sessions: dict[str, Session] = field(default_factory=dict, repr=False)
    everybody: list[str] = field(default_factory=list)
    widths: dict[str, int] = field(default_factory=dict)
    round: int = 0
    clip: float | None = None
    told: str = ""

    def dump(self) -> dict[str, Any]:
        """As JSON. It holds secrets, and goes into no file."""
        sessions = {label: session.dump() for label, session in self.sessions.items()}
        return {**self.__dict__, "sessions": sessions}

    @classmethod
    def load(cls, value: Mapping[str, Any]) -> Self:
        """The inverse of `dump`."""
        sessions = {label: Session.load(found) for label, found in value["sessions"].items()}
        return cls(**{**value, "sessions": sessions})

    def answer(
        self, ask: Ask, secure: Secure, added: Added, signer: Signer | None = None
    ) -> Answer:
        """The answer to one message.

        Args:
            secure: As in this client's own recipe.
            added: Trains, or gives what came of that before in this round.
            signer: Signs, and knows the others' signatures; None where nobody has keys.

        Raises:
            UserError: What is asked would show more than a sum, or cannot be done.
        """
        about = ask.about
        if ask.step == "keys":
            return self._keys(_text(about, "context"), signer)
        if not self.sessions:
            raise ProtocolError("what this client knew of the round is gone; it sits this one out")
        if ask.step == "shares":
            return self._shares(about, secure.threshold, signer)
        if ask.step == "open":
            present = about.get("present")
            if about.get("sum") not in SUMS or not isinstance(present, list):
                raise ProtocolError("asked to open a sum that is none")
            if secure.noise is not None:
                self._check_noise(secure.noise, map(str, present))
            return self._says(shares=self.sessions[about["sum"]].reveal(map(str, present)))
        if ask.step == "train":
            for label, session in self.sessions.items():
                session.receive(about["letters"][label], about["commitments"][label])
            self.widths = {str(name): width for name, width in about["widths"].items()}
            self.round, self.clip = int(about["round"]), about.get("clip")
            noise = self._noise(secure)
            found = added(self.widths)
            votes = fixed.votes(sized(found, noise).tensors)
            self.told = fingerprint(self.round, self.clip, self.widths, found.start)
            self.sessions["sizes"].mask(votes, self.told)
            return Answer(self.name, {**found.told, "start": found.start}, votes)
        if ask.step != "send":
            raise ProtocolError(f"asked for {str(ask.step)[:40]!r}, which is no step of a round")
        return self._send(about, secure, added(self.widths))

    def _keys(self, context: str, signer: Signer | None) -> Answer:
        """A new round: new secrets, and those of the one before are forgotten."""
        self.context = context
        self.sessions = {label: Session(self.name, f"{context} {label}") for label in SUMS}
        keys = {label: session.keys() for label, session in self.sessions.items()}
        signature = None if signer is None else signer.sign(context, self.name, keys)
        return self._says(keys=keys, signature=signature)

    def _shares(
        self, about: Mapping[str, Any], threshold: int | None, signer: Signer | None
    ) -> Answer:
        everybody = about["everybody"]
        for name, told in everybody.items():
            if signer is not None:
                signer.check(self.context, name, told["keys"], told["signature"])
        self.everybody = sorted(everybody)
        found = {}
        for label, session in self.sessions.items():
            keys = {name: told["keys"][label] for name, told in everybody.items()}
            found[label] = session.share(keys, threshold)
        return self._says(dealt=found)

    def _noise(self, secure: Secure) -> SumNoise | None:
        return None if secure.noise is None else secure.noise.at(self.clip)

    def _check_noise(self, noise: SumNoise, present: Iterable[str]) -> None:
        """That the shares of noise in a sum are as many as it is to have."""
        count = len(set(present) & set(self.everybody))
        if count < noise.least:
            raise ProtocolError(
                f"asked to open a sum over {count} clients; the noise is shared among {noise.least}"
            )

    def _send(self, about: Mapping[str, Any], secure: Secure, added: Summand) -> Answer:
        exponents, halvings = about.get("exponents"), about.get("halvings")
        if type(halvings) is not int or not 0 <= halvings <= _HALVINGS:
            raise ProtocolError("asked for weights in a strange unit")
        expected = sized(added, noise := self._noise(secure)).tensors.values()
        if not isinstance(exponents, list) or len(exponents) != len(expected):
            raise ProtocolError("the sizes that were agreed on are not those of its tensors")
        if noise is not None:
            if exponents != [fixed.exponent(t) for t in expected]:
                raise ProtocolError("asked for a unit that is not the bound's and the noise's")
            added = noised(added, noise, self.name, self.round)
        weight = added.weight * 2.0**-halvings
        vector = fixed.encode(
            added.tensors,
            list(map(int, exponents)),
            weight,
            secure.bits,
            len(self.everybody),
        )
        self.sessions["numbers"].mask(vector, fingerprint(self.told, exponents, halvings))
        return Answer(self.name, vector=vector)

    def _says(self, **about: Any) -> Answer:
        return Answer(self.name, about)


def _text(about: Mapping[str, Any], name: str) -> str:
    value = about.get(name)
    if not isinstance(value, str) or not 0 < len(value) <= 200:
        raise ProtocolError(f"a message without its {name}")
    return value
