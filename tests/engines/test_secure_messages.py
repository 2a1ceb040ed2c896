"""Sums through messages: the bits of one process, clients lost at every exchange, forgeries."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cryptography.hazmat.primitives.asymmetric import ec
from small_runs import SIZES, recipe

from engines.in_process import InProcess, institutions, remote
from engines.test_wire import same_bits
from fedex_lora.engines.local import LocalEngine
from fedex_lora.engines.remote import engine as remote_module
from fedex_lora.engines.remote import guests
from fedex_lora.engines.remote.courier import Failed
from fedex_lora.engines.remote.engine import RemoteEngine
from fedex_lora.engines.remote.site import Institution, handle
from fedex_lora.engines.turn import Train, Trained, Turn
from fedex_lora.errors import QuorumLost
from fedex_lora.federation.codec import encode_about, encode_masked
from fedex_lora.federation.header import first_of
from fedex_lora.federation.loop import Exchange, run_round
from fedex_lora.federation.messages import Lost, Update
from fedex_lora.federation.secure.round import secure_round
from fedex_lora.federation.secure.signer import Signer
from fedex_lora.federation.settings import Settings
from fedex_lora.federation.state import ServerState, base_increment, begin, global_factors
from fedex_lora.model.adapted import AdaptedModel
from fedex_lora.recipe import Recipe
from fedex_lora.runs.across_machines import across_machines
from fedex_lora.runs.here import in_this_process
from fedex_lora.runs.run import resume_run, start_run
from fedex_lora.runs.watch import Silent

EXCHANGES = ["keys", "shares", "train", "open sizes", "send", "open numbers"]
Change = Callable[[str, dict[str, Any], bytes], bytes | Failed]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (guests, remote_module):
        monkeypatch.setattr(module, "OFTEN", 0.0)


def secured(spec: Recipe) -> Recipe:
    raw = spec.model_dump()
    raw["privacy"]["secure_aggregation"] = True
    raw["evaluation"]["where"] = "server"
    raw["federation"].pop("partition", None)
    return Recipe.model_validate(raw)


class Steps(InProcess):
    """Remembers which exchange a client answers, and makes of the answer what arrives."""

    step = ""
    becomes: Change = staticmethod(lambda node, about, reply: reply)

    def send(self, node: str, blob: bytes, round: int, seconds: float) -> str:
        asked = first_of(blob)["about"]
        self.step = f"{asked.get('step')} {asked.get('ask', {}).get('sum', '')}".strip()
        return super().send(node, blob, round, seconds)

    def lose(self, gone: dict[str, str]) -> None:
        """From now on clients vanish, each at its exchange."""

        def lost(node: str, about: dict[str, Any], reply: bytes) -> bytes | Failed:
            return Failed("gone") if gone.get(node) == self.step else reply

        self.becomes = lost


def steps(nodes: dict[str, Institution]) -> Steps:
    courier = Steps(nodes)
    courier.change = lambda node, reply: courier.becomes(node, first_of(reply)["about"], reply)
    return courier


class Once:
    """Trains every client once: all rounds begin from the same."""

    together = 1

    def __init__(self, train: Train) -> None:
        self._train, self._ends = train, dict[str, Trained]()

    def __call__(self, model: AdaptedModel, turns: Sequence[Turn]) -> list[Trained]:
        (turn,) = turns
        if turn.client not in self._ends:
            (trained,) = self._train(model, turns)
            self._ends[turn.client] = replace(trained, end=model.read())
        return [self._ends[turn.client]]


@dataclass
class World:
    """One coordinator and three clients that sign, greeted and before round 1."""

    courier: Steps
    engine: RemoteEngine
    state: ServerState
    plain: Callable[[str | None], dict[str, torch.Tensor]]

    def round(self) -> tuple[ServerState, dict[str, Any]]:
        return secure_round(self.state, self.engine.settings, self.engine)


def model(state: ServerState, s: Settings) -> dict[str, torch.Tensor]:
    """G − W0 of every layer, dense, and the head."""
    shared, found = global_factors(state, s), dict(state.head)
    assert shared is not None
    for name in s.layers:
        increment = base_increment(state.ledger, name)
        found[name] = shared[name].delta().dense()
        found[name] = found[name] + (0 if increment is None else increment.dense())
    return found


def close(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    for name, value in want.items():
        assert torch.linalg.vector_norm(got[name] - value) < 1e-6 * value.norm(), name


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("sums")
    plain = recipe(folder, federation={"clients": 3, "rounds": 1}, evaluation={"where": "server"})
    nodes, keys = institutions(secured(plain), folder / "cache"), {}
    for name in nodes:
        keys[name] = ec.generate_private_key(ec.SECP384R1())
    roster = {name: key.public_key() for name, key in keys.items()}
    for name, node in nodes.items():
        assert node.keeper is not None
        signing = replace(node.keeper, signer=Signer(keys[name], roster))
        nodes[name] = replace(node, keeper=signing, train=Once(node.train))
    courier = steps(nodes)
    (folder / "run").mkdir()
    across = across_machines(courier)
    federation, engine = across(remote(secured(plain)), folder / "run", None, Silent())
    assert isinstance(engine, RemoteEngine)
    state = begin(engine.settings, federation.initial)
    here, local = in_this_process(plain, folder / "here", None, Silent())
    assert isinstance(local, LocalEngine)
    local.train_with = Once(local.train_with)

    def without(absent: str | None) -> dict[str, torch.Tensor]:
        class Absent:
            def train(self, exchange: Exchange) -> Iterator[Update | Lost]:
                for reply in local.train(exchange):
                    yield Lost(reply.client, "away") if reply.client == absent else reply

            def evaluate(self, exchange: Exchange) -> Iterator[Lost]:
                yield from ()

        settings = replace(here.settings, examples=engine.examples)
        return model(run_round(begin(settings, here.initial), settings, Absent())[0], settings)

    return World(courier, engine, state, without)


@pytest.fixture
def world(begun: World) -> World:
    begun.courier.lose({})
    return begun


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_a_client_that_is_lost_at_any_exchange(world: World, exchange: str) -> None:
    world.courier.lose({"bob": exchange})
    after, record = world.round()
    stays = exchange == "open numbers"  # its numbers had come
    assert sorted(record["clients"]) == (sorted(SIZES) if stays else ["ann", "cleo"])
    assert record["lost"] == {"bob": "gone"}
    close(model(after, world.engine.settings), world.plain(None if stays else "bob"))


def test_below_the_threshold_the_state_stands_and_the_round_can_be_repeated(world: World) -> None:
    for gone in ({"bob": "train", "cleo": "send"}, {"bob": "open numbers", "cleo": "open numbers"}):
        world.courier.lose(gone)
        with pytest.raises(QuorumLost, match=r"2 must stay .*: gone; (bob|cleo): gone"):
            world.round()
    world.courier.lose({})
    after, record = world.round()
    assert world.state.version == 0 and record["lost"] == {}
    close(model(after, world.engine.settings), world.plain(None))


def test_bytes_are_those_of_the_messages(world: World) -> None:
    world.courier.down.clear()
    up = dict.fromkeys(SIZES, 0)

    def count(node: str, about: dict[str, Any], reply: bytes) -> bytes:
        up[node] += len(reply)
        return reply

    world.courier.becomes = count
    _, record = world.round()
    assert record["bytes_up"] == up
    assert record["bytes_down"] == {node: world.courier.down[1, node] for node in SIZES}


def changed(step: str, change: Callable[[dict[str, Any]], Any]) -> Change:
    """Of bob's answer at a step, with what it holds changed."""

    def becomes(node: str, about: dict[str, Any], reply: bytes) -> bytes:
        if node == "bob" and about.get("step") == step:
            change(about["answer"])
            return encode_about(about)
        return reply

    return becomes


def stranger(answer: dict[str, Any]) -> None:
    answer["keys"]["numbers"]["channel"] = "ab" * 32


def unsigned(answer: dict[str, Any]) -> None:
    answer["signature"] = None


@pytest.mark.parametrize("forge", [stranger, unsigned])
def test_who_stands_between_is_found_out_by_the_clients(world: World, forge: Any) -> None:
    world.courier.becomes = changed("keys", forge)
    with pytest.raises(QuorumLost, match=r"ann: keys .* not signed by bob's node key; somebody"):
        world.round()


def others_share(answer: dict[str, Any]) -> None:
    answer["shares"]["ann"] = answer["shares"]["cleo"]


def a_letter_too_many(answer: dict[str, Any]) -> None:
    answer["dealt"]["sizes"]["commitments"]["mallory"] = {}


@pytest.mark.parametrize(
    ("step", "change", "why"),
    [
        ("open", others_share, "revealed another share of ann than it was dealt"),
        ("open", lambda answer: answer["shares"].pop("ann"), "shares of others than its neigh"),
        ("shares", a_letter_too_many, "dealt shares to others than its neighbours"),
        ("keys", lambda answer: answer.clear(), "cannot be used"),
    ],
)
def test_a_client_that_sends_what_it_should_not_is_named(
    world: World, step: str, change: Any, why: str
) -> None:
    world.courier.becomes = changed(step, change)
    _, record = world.round()
    assert why in record["refused"]["bob"]


def test_masks_that_do_not_belong_to_the_keys_are_seen_in_the_sum(world: World) -> None:
    def other(node: str, about: dict[str, Any], reply: bytes) -> bytes:
        if node == "bob" and about.get("step") == "send":
            count = (len(reply) - 8 - int.from_bytes(reply[:8], "little")) // 8
            vector = torch.randint(-(2**62), 2**62, (count,), generator=torch.manual_seed(0))
            return encode_masked(about, vector)
        return reply

    world.courier.becomes = other
    with pytest.raises(QuorumLost, match=r"rows sum to .*; they declared 17\. Somebody sent other"):
        world.round()


def test_a_vector_of_floats_or_of_another_length_is_refused(world: World) -> None:
    def short(node: str, about: dict[str, Any], reply: bytes) -> bytes:
        if node == "bob" and about.get("step") == "train":
            return encode_masked(about, torch.zeros(3, dtype=torch.int64))
        if node == "cleo" and about.get("step") == "keys":
            return encode_masked(about, torch.zeros(3))
        return reply

    world.courier.becomes = short
    with pytest.raises(QuorumLost, match=r"bob: sent no vector|has dtype F32; expected int64"):
        world.round()


def test_a_client_whose_recipe_wants_sums_sends_no_update(world: World) -> None:
    node = world.courier.institutions["ann"]
    said = world.engine.guests.say("round") | {"client": "ann", "version": 0}
    said["recipe"] = world.engine._agreement
    about = first_of(handle(encode_about(said), node))["about"]
    assert about["kind"] == "failed" and "only sums are shown" in about["reason"]
    plain = replace(node, keeper=None)
    about = first_of(handle(encode_about(said | {"kind": "secure", "step": "keys"}), plain))
    assert "its own recipe has no privacy.secure_aggregation" in about["about"]["reason"]


@pytest.mark.parametrize("method", ["fedex", "flexlora"])
def test_messages_bring_the_bits_of_one_process(method: str, tmp_path: Path) -> None:
    """Though in the second round too many are lost, and the run is resumed."""
    lora = {"ranks": [2, 5, 3]} if method == "flexlora" else {}
    federation = {"clients": 3, "rounds": 2}
    spec = secured(recipe(tmp_path, method={"name": method}, lora=lora, federation=federation))
    start_run(spec, tmp_path / "local")
    courier = steps(institutions(spec, tmp_path / "cache"))
    lost = {"ann": "send", "cleo": "send"}

    class AfterOne(Silent):
        def round_done(self, record: dict[str, Any]) -> None:
            courier.lose(lost)
            (forgets,) = (tmp_path / "cache").glob("*/bob")  # and is sent all once more
            shutil.rmtree(forgets)

    with pytest.raises(QuorumLost, match="1 clients are left") as error:
        start_run(remote(spec), tmp_path / "remote", AfterOne(), across_machines(courier))
    assert "bob" not in str(error.value)
    courier = steps(institutions(spec, tmp_path / "cache"))
    resume_run(tmp_path / "remote", None, None, across_machines(courier))
    same_bits(tmp_path / "local", tmp_path / "remote")
    record = json.loads((tmp_path / "remote" / "metrics.jsonl").read_text().splitlines()[0])
    assert record["secure"] and set(record["clients"]) == set(SIZES)
    assert all(set(client) == {"examples"} for client in record["clients"].values())
