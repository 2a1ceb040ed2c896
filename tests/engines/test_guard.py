"""Who reaches which part of the coordinator's server, and what others are told."""

import asyncio
from base64 import b64encode
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace

import pytest
from flwr.cli.cli_client_interceptor import CliClientHttpInterceptor
from flwr.supercore.error import FlowerError

from fedex_lora.flower import control
from fedex_lora.flower.control import HEADER, read_secret, with_secret
from fedex_lora.flower.deploy import changes
from fedex_lora.flower.deploy.init import Deployment, init
from fedex_lora.flower.refusals import Keys, admitting, known_keys
from fedex_lora.flower.superlink import guarded

SECRET = b"0123456789abcdef"


def called(app, path, client="127.0.0.1", headers=()):
    """What an ASGI app sends to one request."""
    sent = []

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "path": path, "headers": list(headers)}
    scope["client"] = (client, 5) if client else None
    asyncio.run(app(scope, None, send))
    return sent


def answering(status):
    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": status, "headers": []})
        await send({"type": "http.response.body", "body": b"from within"})

    return app


def status(sent):
    return sent[0]["status"]


OURS = ((HEADER.encode(), SECRET),)


@pytest.mark.parametrize(
    ("path", "client", "headers", "passes"),
    [
        ("/v1/control/start-run", "127.0.0.1", OURS, True),
        ("/v1/control/start-run", "127.0.0.1", (), False),  # another account of this machine
        ("/v1/control/start-run", "127.0.0.1", ((HEADER.encode(), b"0" * 16),), False),
        ("/v1/control/start-run", "127.0.0.1", ((HEADER.encode(), b""),), False),
        ("/v1/control/start-run", "127.0.0.1", OURS * 2, False),
        ("/v1/control/start-run", "10.0.0.9", OURS, False),
        ("/v1/control/list-nodes", "127.0.0.1", (), False),
        ("/v1/runtime/pull-task", "127.0.0.1", (), True),
        ("/v1/runtime/pull-task", "10.0.0.9", OURS, False),
        ("/v1/runtime/../control/start-run", "127.0.0.1", (), False),
        ("/v1/fleet/pull-messages", "10.0.0.9", (), True),
        ("/v1/fleet/../control/start-run", "10.0.0.9", (), False),
        ("/health", "10.0.0.9", (), True),
        ("/docs", "127.0.0.1", (), False),
        ("/docs", "10.0.0.9", (), False),
        ("/docs", "", (), False),
    ],
)
def test_the_network_reaches_the_fleet_and_only_the_secret_the_control(
    path, client, headers, passes
):
    guard = guarded(answering(200), SECRET, lambda: True)
    assert status(called(guard, path, client, headers)) == (200 if passes else 403)


def test_clients_are_let_in_when_all_are_registered():
    ready = [False]
    guard = guarded(answering(200), SECRET, lambda: ready[0])
    assert status(called(guard, "/v1/fleet/activate-node")) == 503  # SuperNodes try again
    assert status(called(guard, "/v1/control/x", headers=OURS)) == 200
    ready[0] = True
    assert status(called(guard, "/v1/fleet/activate-node")) == 200


def test_the_secret_is_sent_by_those_who_can_read_it(tmp_path, monkeypatch):
    for value in (None, str(tmp_path / "none")):
        monkeypatch.setenv(control.SECRET, value or "")
        with pytest.raises(SystemExit, match="FEDEX_LORA_CONTROL has to name the file"):
            read_secret()
    (tmp_path / "secret").write_bytes(b"")
    monkeypatch.setenv(control.SECRET, str(tmp_path / "secret"))
    with pytest.raises(SystemExit, match="empty"):
        read_secret()
    (tmp_path / "secret").write_bytes(SECRET + b"\n")
    plain = CliClientHttpInterceptor.intercept
    monkeypatch.setattr(CliClientHttpInterceptor, "intercept", plain)  # put back afterwards
    with_secret()

    context = SimpleNamespace(request=SimpleNamespace(headers={}))
    CliClientHttpInterceptor().intercept(context, lambda one: one)  # type: ignore[arg-type]
    assert context.request.headers[HEADER] == SECRET.decode()


@pytest.fixture
def keys(tmp_path):
    init(tmp_path / "d", Deployment("127.0.0.1", 9443, ("ann", "bob")))
    return tmp_path / "d" / "clients"


def signed(key, seconds=0):
    when = (datetime.now(UTC) + timedelta(seconds=seconds)).isoformat()
    return [(b"flwr-timestamp", when.encode()), (b"flwr-public-key", b64encode(key))]


@pytest.mark.parametrize(
    ("whose", "seconds", "code", "reason"),
    [
        ("ann", 3600, 401, "refused ann at 10.0.0.9: its clock is some 3600 s ahead of"),
        ("ann", -3600, 401, "refused ann at 10.0.0.9: its clock is some 3600 s behind"),
        ("ann", 0, 401, "refused ann at 10.0.0.9: status 401"),
        ("ann", 0, 412, "refused ann at 10.0.0.9: a node with this key is connected already"),
        ("none", 0, 200, "refused a client at 10.0.0.9: its key is none of those"),
        (None, 0, 200, "refused a client at 10.0.0.9: its key is none of those"),
    ],
)
def test_who_is_refused_is_told_why_on_both_sides(whose, seconds, code, reason, keys):
    known = {name: key for key, name in known_keys(keys).items()}
    assert sorted(known) == ["ann", "bob"]
    headers = signed(known.get(whose, b"another"), seconds) if whose else []
    said, sent = [], []
    app = admitting(answering(code), Keys(keys), said.append)
    for _ in range(3):  # it tries again, and is named once
        sent = called(app, "/v1/fleet/activate-node", "10.0.0.9", headers)
    assert len(said) == 1 and said[0].startswith(reason)
    # Flower's SuperNode shows the details of such an error, and ends with status 412
    assert status(sent) == 412 and len(sent) == 2
    error = FlowerError.from_json(sent[1]["body"].decode())
    assert error is not None and error.public_details == said[0].replace(
        f"refused {whose if whose == 'ann' else 'a client'} at 10.0.0.9", "refused"
    )
    other = called(app, "/v1/fleet/pull-messages", "10.0.0.9", headers)
    assert status(other) == (code if whose == "ann" else 401)


def test_who_is_known_is_let_in_and_named(keys):
    known = {name: key for key, name in known_keys(keys).items()}
    said = []
    app = admitting(answering(200), Keys(keys), said.append)
    for path in ("activate-node", "pull-messages", "deactivate-node"):
        sent = called(app, f"/v1/fleet/{path}", "10.0.0.9", signed(known["ann"]))
        assert sent[1]["body"] == b"from within"
    assert said == ["ann is connected, from 10.0.0.9", "ann has left"]
    assert called(app, "/v1/control/x")[1]["body"] == b"from within"  # of no concern here


def test_a_key_that_is_revoked_is_refused_at_the_next_request(keys, monkeypatch):
    known = {name: key for key, name in known_keys(keys).items()}
    said, seen = [], Keys(keys)
    monkeypatch.setattr("fedex_lora.flower.refusals._OFTEN", 0.0)
    app = admitting(answering(200), seen, said.append)
    assert status(called(app, "/v1/fleet/pull-messages", "10.0.0.9", signed(known["ann"]))) == 200
    changes.revoke(keys.parent, "ann", said.append)
    # 401, upon which a SuperNode ends itself
    assert status(called(app, "/v1/fleet/pull-messages", "10.0.0.9", signed(known["ann"]))) == 401
    assert said == ["refused ann at 10.0.0.9: its key was revoked (deploy revoke)"]
    assert status(called(app, "/v1/fleet/pull-messages", "10.0.0.9", signed(known["bob"]))) == 200
    changes.add(keys.parent, ["dora"], said.append)
    dora = {name: key for key, name in known_keys(keys).items()}["dora"]
    assert status(called(app, "/v1/fleet/pull-messages", "10.0.0.9", signed(dora))) == 200


def test_without_keys_everybody_is_let_in():
    app = admitting(answering(200), Keys(None), pytest.fail)
    assert status(called(app, "/v1/fleet/activate-node")) == 200
