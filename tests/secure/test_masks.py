"""Sums under masks: exact, whoever vanishes; and what a server may not be told."""

from __future__ import annotations

import secrets
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedex_lora.errors import ProtocolError
from fedex_lora.federation.secure.graph import neighbours
from fedex_lora.federation.secure.opening import Book, Unopened
from fedex_lora.federation.secure.primitives import add_mask
from fedex_lora.federation.secure.session import Session, pair_seed, sign
from fedex_lora.federation.secure.shamir import PRIME, combine, split

LENGTH = 300


class Sum:
    """One sum of random vectors, as far as it is played."""

    def __init__(self, clients: int, threshold: int | None = None) -> None:
        self.names = [f"c{i:02}" for i in range(clients)]
        self.sessions = {name: Session(name, "run 1 sum") for name in self.names}
        self.book = Book("run 1 sum", threshold)
        self.book.keys = {name: s.keys() for name, s in self.sessions.items()}
        self.vectors = {
            name: np.frombuffer(secrets.token_bytes(8 * LENGTH), np.uint64) for name in self.names
        }
        self.sent: dict[str, np.ndarray] = {}

    def share(self, without=()) -> None:
        self.dealt = {
            name: session.share(self.book.keys, self.book.threshold)
            for name, session in self.sessions.items()
            if name not in without
        }
        self.book.commitments = {name: dealt["commitments"] for name, dealt in self.dealt.items()}

    def mask(self, without=()) -> None:
        for name in self.dealt:
            senders = {d: v for d, v in self.dealt.items() if name in v["letters"]}
            self.sessions[name].receive(
                {d: v["letters"][name] for d, v in senders.items()},
                {d: v["commitments"][name] for d, v in senders.items()},
            )
            if name not in without:
                self.sent[name] = self.vectors[name].copy()
                self.sessions[name].mask(self.sent[name])

    def open(self, without=()) -> np.ndarray:
        present, shares = sorted(self.sent), {}
        for name in present:
            if name not in without:
                shares[name] = self.sessions[name].reveal(present)
                self.book.check(name, shares[name], present)
        total = np.add.reduce([*self.sent.values()])
        self.book.open(total, present, shares)
        return total

    def expected(self) -> np.ndarray:
        return np.add.reduce([self.vectors[name] for name in self.sent])


@given(st.data())
def test_the_sum_is_exact_whoever_vanishes_when(data: st.DataObject) -> None:
    count = data.draw(st.integers(2, 9))
    one = Sum(count)
    least = count // 2 + 1
    gone: list[list[str]] = []
    left = list(one.names)
    for _ in range(3):  # before shares, before numbers, before the sum is opened
        some = data.draw(st.lists(st.sampled_from(one.names), unique=True))
        gone.append([name for name in some if name in left][: len(left) - least])
        left = [name for name in left if name not in gone[-1]]
    one.share(gone[0])
    one.mask(gone[1])
    np.testing.assert_array_equal(one.open(gone[2]), one.expected())


def test_many_clients_share_masks_along_a_regular_graph() -> None:
    one = Sum(40)
    one.share(one.names[:2])
    assert {len(around) for around in one.book.around.values()} == {33}
    assert one.sessions["c05"].threshold == 17
    one.mask(one.names[5:8])
    np.testing.assert_array_equal(one.open(one.names[10:12]), one.expected())
    found = neighbours(one.names, "draw")
    assert all(name in found[other] for name in found for other in found[name])


def test_below_the_threshold_nothing_opens() -> None:
    one = Sum(4)
    one.share()
    one.mask(["c03"])
    with pytest.raises(Unopened, match=r"2 of c00's neighbours are left .*; 3 must stay"):
        one.open(["c02"])
    with pytest.raises(ProtocolError, match=r"2 of this client's neighbours .* 3 must stay"):
        one.sessions["c00"].reveal(["c00", "c01"])


def test_a_client_never_reveals_both_kinds_of_shares() -> None:
    one = Sum(4)
    one.share()
    one.mask()
    told = one.sessions["c00"].reveal(["c00", "c01", "c02", "c03"])
    assert told["c03"] == one.sessions["c00"].held["c03"]["seed"]
    with pytest.raises(ProtocolError, match="asked for both kinds of shares of c03"):
        one.sessions["c00"].reveal(["c00", "c01", "c02"])
    again = Session.load(one.sessions["c00"].dump())  # in another process as well
    with pytest.raises(ProtocolError, match="both kinds"):
        again.reveal(["c00", "c01", "c02"])


def test_the_server_cannot_have_a_sum_of_one() -> None:
    one = Sum(3)
    one.share()
    one.mask()
    with pytest.raises(ProtocolError, match="1 of this client's neighbours"):
        one.sessions["c00"].reveal(["c00"])
    with pytest.raises(ProtocolError, match="without its own numbers"):
        one.sessions["c00"].reveal(["c01", "c02"])
    with pytest.raises(ProtocolError, match="the same sum twice"):
        one.sessions["c00"].mask(np.zeros(3, np.uint64))
    with pytest.raises(ProtocolError, match="asked for shares twice"):
        one.sessions["c00"].share(one.book.keys, None)
    alone = Session("x", "sum")
    with pytest.raises(ProtocolError, match="expected at least 2"):
        alone.share({"x": alone.keys()}, None)


def test_other_keys_and_letters_are_found_out() -> None:
    one = Sum(3)
    keys = dict(one.book.keys)
    with pytest.raises(ProtocolError, match="keys of c00 are given as others"):
        one.sessions["c00"].share({**keys, "c00": keys["c01"]}, None)
    with pytest.raises(ProtocolError, match="two clients are given with one key"):
        one.sessions["c00"].share({**keys, "c01": keys["c02"]}, None)
    one.share()
    letter, told = one.dealt["c01"]["letters"]["c00"], one.dealt["c01"]["commitments"]
    with pytest.raises(ProtocolError, match="letter of c01: a sealed letter that does not open"):
        one.sessions["c00"].receive({"c01": one.dealt["c02"]["letters"]["c00"]}, told)
    with pytest.raises(ProtocolError, match="letter of c01: not the shares"):
        one.sessions["c00"].receive({"c01": letter}, {"c01": told["c02"]})


def test_false_shares_are_named_by_who_gave_them() -> None:
    one = Sum(3)
    one.share()
    one.mask()
    present = sorted(one.sent)
    shares = one.sessions["c00"].reveal(present)
    with pytest.raises(ProtocolError, match="another share of c02 than it was dealt"):
        one.book.check("c00", {**shares, "c02": shares["c01"]}, present)
    with pytest.raises(ProtocolError, match="shares of others than its neighbours"):
        one.book.check("c00", {"c02": shares["c02"]}, present)


def test_who_deals_shares_of_another_secret_is_named() -> None:
    one = Sum(3)
    liar = one.sessions["c01"]
    right, liar.seed = liar.seed, secrets.token_hex(32)
    lied = dict(one.book.keys)
    liar.keys = lambda: lied["c01"]
    one.share()
    liar.seed = right
    one.mask()
    with pytest.raises(Unopened, match="c01 dealt shares of another secret"):
        one.open()


@given(st.binary(min_size=32, max_size=32), st.integers(1, 6), st.data())
def test_shares_give_the_secret_back_from_any_threshold_of_them(secret, threshold, data) -> None:
    shares = split(secret, 6, threshold)
    some = data.draw(st.permutations(range(6)))[:threshold]
    assert combine({i + 1: shares[i] for i in some}) == secret


@given(st.binary(min_size=32, max_size=32))
def test_fewer_shares_fit_any_secret(other: bytes) -> None:
    first, second, _ = split(bytes(32), 3, 3)
    third = (int.from_bytes(other, "big") - 3 * first + 3 * second) % PRIME  # f(0) = 3f₁ − 3f₂ + f₃
    assert combine({1: first, 2: second, 3: third}) == other
    with pytest.raises(ProtocolError, match="belong to no secret"):
        combine({1: first, 2: second, 3: (third + 2**300) % PRIME})


def _chi2(vector: np.ndarray) -> float:
    """Pearson's χ² of the bytes against a uniform distribution, 255 degrees of freedom."""
    counts = np.bincount(vector.view(np.uint8), minlength=256)
    expected = counts.sum() / 256
    return float(((counts - expected) ** 2 / expected).sum())


LIKELY = (160.0, 380.0)  # χ² with 255 degrees of freedom leaves it once in a million


def test_what_the_server_receives_of_one_client_is_uniform_whatever_it_holds() -> None:
    recorded = []
    for value in (0, 12345):  # two clients' data, which differ
        one = Sum(3)
        one.vectors = dict.fromkeys(one.names, np.full(LENGTH * 40, value, np.uint64))
        one.share()
        one.mask()
        recorded.append(one.sent["c00"])
        bare = one.vectors["c00"]
        assert not LIKELY[0] < _chi2(bare) < LIKELY[1]  # without masks it shows
    assert all(LIKELY[0] < _chi2(vector) < LIKELY[1] for vector in recorded)
    difference = recorded[1] - recorded[0]
    assert LIKELY[0] < _chi2(difference) < LIKELY[1]


def test_half_the_masks_hide_nothing_less() -> None:
    """The seed alone still hides a client whose mask key the server was given."""
    one = Sum(3)
    one.vectors = dict.fromkeys(one.names, np.zeros(LENGTH * 40, np.uint64))
    one.share()
    one.mask()
    late = one.sent.pop("c00")  # said to be lost; its numbers came after all
    one.open()
    session = one.sessions["c00"]
    for name in ("c01", "c02"):
        seed = pair_seed(session.context, session.mask_key, "c00", one.book.keys[name], name)
        add_mask(late, seed, -sign("c00", name))
    assert LIKELY[0] < _chi2(late) < LIKELY[1]
    add_mask(late, bytes.fromhex(session.seed), -1)
    assert not late.any()


def test_masks_do_not_repeat() -> None:
    vector = np.zeros(1 << 17, np.uint64)
    add_mask(vector, b"k" * 32, 1)
    assert max(Counter(vector.tolist()).values()) == 1
