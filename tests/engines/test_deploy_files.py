"""What `deploy init` writes, what the guard lets through, and what runs tell of themselves."""

import json
import re
import socket
import ssl
import stat
import threading
import time
from contextlib import contextmanager, suppress
from datetime import timedelta
from email.utils import formatdate
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from small_runs import recipe as tiny_recipe

from engines.in_process import remote, without_files
from fedex_lora.errors import QuorumLost, UserError
from fedex_lora.flower.deploy import commands, keys, processes
from fedex_lora.flower.deploy.init import Deployment, init, read_deployment
from fedex_lora.flower.deploy.keys import check_certificate
from fedex_lora.flower.deploy.processes import check_server, free_port
from fedex_lora.flower.progress import Recorder, follow
from fedex_lora.recipe.reader import dump_recipe, load_recipe
from fedex_lora.runs.watch import Silent, Start


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("deployment") / "d"
    init(path, Deployment("fed.example.org", 9443, ("hospital-a", "hospital-b")))
    return path


def test_the_server_s_certificate_is_signed_for_its_names(folder):
    server = folder / "server"
    authority = x509.load_pem_x509_certificate((server / "ca.crt").read_bytes())
    certificate = x509.load_pem_x509_certificate((server / "server.pem").read_bytes())
    certificate.verify_directly_issued_by(authority)
    assert check_certificate(server, ["fed.example.org", "127.0.0.1"]) is None
    with pytest.raises(UserError, match=r"made for .*fed\.example\.org.*not for other.*renew"):
        check_certificate(server, ["fed.example.org", "other.example.org"])
    ssl.create_default_context(cafile=str(server / "ca.crt")).load_cert_chain(
        server / "server.pem", server / "server.key"
    )


def test_every_institution_has_a_key_of_its_own_that_nobody_else_may_read(folder):
    public = set()
    for name in ("hospital-a", "hospital-b"):
        key = folder / "clients" / name / "key"
        assert stat.S_IMODE(key.stat().st_mode) == 0o600
        private = serialization.load_ssh_private_key(key.read_bytes(), None)
        written = key.with_name("key.pub").read_bytes().split()
        derived = private.public_key().public_bytes(
            serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
        )
        assert derived.split()[:2] == written[:2] and written[0] == b"ecdsa-sha2-nistp384"
        public.add(written[1])
        assert read_deployment(key.parent).clients == (name,)
    assert len(public) == 2
    assert not (folder / "clients" / "hospital-a" / "ca.key").exists()


def test_a_folder_in_use_is_left_alone_and_insecure_stays_on_this_machine(folder, tmp_path):
    before = sorted(folder.rglob("*"))
    with pytest.raises(UserError, match="is in use"):
        init(folder, Deployment("127.0.0.1", 9443, ("a",)))
    assert sorted(folder.rglob("*")) == before
    with pytest.raises(UserError, match="reachable from this machine alone"):
        init(tmp_path / "x", Deployment("10.0.0.1", 9443, ("a",), insecure=True))
    init(tmp_path / "y", Deployment("127.0.0.1", 9443, ("a",), insecure=True))
    link = commands.superlink(tmp_path / "y", Deployment("127.0.0.1", 9443, ("a",), insecure=True))
    assert link.argv[link.argv.index("--host") + 1] == "127.0.0.1" and "--insecure" in link.argv


def test_names_that_would_leave_the_folder_are_refused(tmp_path):
    for name in ("../a", "a/b", "", "-x", "a" * 65):
        with pytest.raises(UserError, match="`clients`"):
            init(tmp_path / "d", Deployment("127.0.0.1", 9443, (name,)))


def test_a_run_is_followed_to_its_end_and_its_error_is_this_one_s(tmp_path):
    file = tmp_path / "progress.jsonl"
    file.touch()
    recorder, seen = Recorder(file), []

    class Sees(Silent):
        def started(self, start):
            seen.append(start)

        def round_done(self, record):
            seen.append(record)

    start = Start("n", "fedex", 0, 2, {"a": 3}, "out")
    recorder.started(start)
    recorder.turn(1, "replies", 0, 3)
    recorder.round_done({"round": 1, "score": float("nan")})
    recorder.ended("done", "", {"rounds": 2})
    assert follow(file, Sees(), lambda: True) == {"rounds": 2}
    assert seen == [start, {"round": 1, "score": None}]
    for how, error in (("quorum", QuorumLost), ("user", UserError), ("fault", UserError)):
        file.write_text(json.dumps({"event": "ended", "value": {"how": how, "text": "because"}}))
        with file.open("a") as log:
            log.write("\n")
        with pytest.raises(error, match="because"):
            follow(file, Silent(), lambda: True)
    file.write_text('{"event": "note", "val')
    with pytest.raises(UserError, match="ended without a word"):
        follow(file, Silent(), lambda: False)


@pytest.fixture
def nothing_starts(monkeypatch):
    monkeypatch.setattr(processes, "attend", lambda *_: pytest.fail("a node was started"))
    monkeypatch.setattr(processes, "running", lambda *_: pytest.fail("a server was started"))


@pytest.mark.usefixtures("nothing_starts")
def test_what_is_wrong_is_said_by_the_command_that_can_mend_it(command, tmp_path):
    def told(*arguments):
        code, _, errors = command("deploy", *arguments)
        assert code == 2
        return " ".join(errors.split())

    folder, rows = tmp_path / "d", tmp_path / "rows.jsonl"
    assert "letters, digits" in told("init", folder, "--clients", "../x")
    elsewhere = ("--clients", "a", "--insecure", "--host", "10.1.2.3")
    assert "not; use --host" in told("init", folder, *elsewhere)
    assert "no deployment there" in told("server", folder)
    assert command("deploy", "init", folder, "--clients", "ann", "--port", free_port())[0] == 0
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(dump_recipe(remote(without_files(tiny_recipe(tmp_path)))))
    client = ("client", folder, "--name", "ann", "--recipe", recipe, "--data")
    rows.write_text('{"txt": "a", "label": 0}\n')
    assert "no column 'text'" in told(*client, rows)
    rows.write_text('{"text": "a", "label": "q"}\n')
    assert "line 1: label is 'q'" in told(*client, rows)
    assert "no such file" in told(*client, tmp_path / "none.jsonl")
    assert "this folder is for ann" in told("client", folder, "--name", "bob", *client[4:], rows)


@pytest.mark.usefixtures("nothing_starts")
def test_a_port_in_use_and_an_expired_certificate_are_named_before_anything_starts(
    command,
    monkeypatch,
    tmp_path,
):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        init(tmp_path / "d", Deployment("127.0.0.1", port, ("ann",)))
        code, _, errors = command("deploy", "server", tmp_path / "d")
    assert code == 2 and f"port {port} is in use" in errors
    monkeypatch.setattr(keys, "_SERVER_DAYS", -1 / 48)
    init(tmp_path / "old", Deployment("127.0.0.1", free_port(), ("ann",)))
    code, _, errors = command("deploy", "server", tmp_path / "old")
    assert code == 2 and "server.pem: expired on" in errors


@contextmanager
def tls_server(folder, date="", host="127.0.0.1"):
    """Somebody who answers with the certificate in that deployment; its port."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(folder / "server" / "server.pem", folder / "server" / "server.key")
    with socket.create_server((host, 0)) as plain:

        def answer():
            with suppress(OSError), context.wrap_socket(plain.accept()[0], server_side=True) as to:
                to.recv(1000)
                to.sendall(f"HTTP/1.1 200 OK\r\nDate: {date}\r\n\r\n".encode())

        thread = threading.Thread(target=answer)
        thread.start()
        yield plain.getsockname()[1]
        thread.join(10)


def answer_to_client(command, folder, tmp_path, host="127.0.0.1", date=None):
    """What `deploy client` of the institution in `folder` says, to a server of deployment d."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(dump_recipe(remote(without_files(tiny_recipe(tmp_path)))))
    rows, date = tmp_path / "data" / "ann.jsonl", date or formatdate(usegmt=True)
    with tls_server(tmp_path / "d", date, host) as port:
        own = folder / "clients" / "ann" / "deployment.json"
        own.write_text(json.dumps({**json.loads(own.read_text()), "host": host, "port": port}))
        arguments = ("--name", "ann", "--recipe", recipe, "--data", rows, "--no-check")
        return command("deploy", "client", folder, *arguments)


@pytest.mark.parametrize(
    ("days", "folder", "host", "reason"),
    [
        (-1 / 48, "d", "127.0.0.1", "certificate has expired"),
        (730, "other", "127.0.0.1", "unable to get local issuer"),
        (730, "d", "127.0.0.2", "IP address mismatch, certificate is not valid for '127.0.0.2'"),
    ],
)
@pytest.mark.usefixtures("nothing_starts")
def test_a_client_refuses_a_certificate_that_does_not_fit(
    days, folder, host, reason, command, monkeypatch, tmp_path
):
    monkeypatch.setattr(keys, "_SERVER_DAYS", days)
    for name in {"d", folder}:
        init(tmp_path / name, Deployment("127.0.0.1", 9443, ("ann",)))
    code, _, errors = answer_to_client(command, tmp_path / folder, tmp_path, host)
    errors = " ".join(errors.split())
    assert code == 2 and f"its certificate is not accepted: {reason}" in errors


@pytest.mark.parametrize(("seconds", "way"), [(-3600, "ahead of"), (3600, "behind"), (0, None)])
def test_a_client_whose_clock_is_off_is_told_before_it_connects(
    seconds, way, command, monkeypatch, tmp_path
):
    attended = []
    monkeypatch.setattr(processes, "attend", lambda *_: attended.append(True))
    init(tmp_path / "d", Deployment("127.0.0.1", 9443, ("ann",)))
    date = formatdate(time.time() + seconds, usegmt=True)
    code, _, errors = answer_to_client(command, tmp_path / "d", tmp_path, date=date)
    assert (code, bool(attended)) == ((2, False) if way else (0, True)), errors
    told = rf"clock is (3599|3600|3601) s {way} the coordinator's"  # a date has whole seconds
    assert way is None or re.search(told, " ".join(errors.split()))


def test_the_recipe_on_the_page_is_one(tmp_path):
    page = Path(__file__).resolve().parents[2] / "docs" / "deploy.md"
    found = re.search(r"```yaml\n(.*?)```", page.read_text(), re.DOTALL)
    assert found
    (tmp_path / "recipe.yaml").write_text(found[1])
    recipe = load_recipe(tmp_path / "recipe.yaml")
    assert recipe.engine.kind == "flower" and len(recipe.federation.names or ()) == 3


def test_a_certificate_from_the_future_is_a_clock_that_is_off(monkeypatch, tmp_path):
    monkeypatch.setattr(keys, "_EARLIER", -timedelta(hours=1))
    init(tmp_path / "d", Deployment("127.0.0.1", 9443, ("ann",)))
    with pytest.raises(UserError, match=r"valid from .* but this machine's clock says .*set the"):
        check_certificate(tmp_path / "d" / "server", ["127.0.0.1"])


@pytest.mark.usefixtures("nothing_starts")
def test_a_client_s_port_in_use_is_named(command, tmp_path):
    init(tmp_path / "d", Deployment("127.0.0.1", free_port(), ("ann",)))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(dump_recipe(remote(without_files(tiny_recipe(tmp_path)))))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        client = ("--name", "ann", "--recipe", recipe, "--no-check", "--port", port)
        code, _, errors = command("deploy", "client", tmp_path / "d", *client)
    assert code == 2 and f"port {port} is in use" in errors


def test_a_server_that_is_down_is_waited_for(tmp_path):
    init(tmp_path / "d", Deployment("127.0.0.1", 9443, ("ann",)))
    said = []
    down = Deployment("127.0.0.1", free_port(), ("ann",))
    check_server(down, tmp_path / "d" / "server" / "ca.crt", said.append)
    assert "does not answer yet" in said[0]
