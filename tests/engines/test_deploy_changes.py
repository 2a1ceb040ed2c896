"""Names of servers and institutions, folders' rights, and changes of a deployment in use."""

import ipaddress
import json
import os
import stat
from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from hypothesis import given
from hypothesis import strategies as st

from fedex_lora.errors import UserError
from fedex_lora.flower.deploy import commands, keys, processes
from fedex_lora.flower.deploy.init import Deployment, init, read_deployment
from fedex_lora.flower.deploy.keys import check_certificate
from fedex_lora.flower.deploy.names import check_client_names, host_name
from fedex_lora.flower.deploy.processes import alone, free_port, make_private
from fedex_lora.flower.refusals import known_keys


def served_names(folder):
    text = (folder / "server" / "server.pem").read_bytes()
    found = x509.load_pem_x509_certificate(text).extensions
    return {str(n.value) for n in found.get_extension_for_class(x509.SubjectAlternativeName).value}


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("fed.example.org", "fed.example.org"),
        ("Fed.Example.ORG.", "fed.example.org"),
        (" fed.example.org ", "fed.example.org"),
        ("10.0.0.5", "10.0.0.5"),
        ("::1", "::1"),
        ("2001:DB8::5", "2001:db8::5"),
        ("zürich.example", "xn--zrich-kva.example"),
        ("ZÜRICH.example", "xn--zrich-kva.example"),
        ("例え.テスト", "xn--r8jz45g.xn--zckzah"),
        ("host_1", "host_1"),
    ],
)
def test_names_of_a_server_as_certificates_have_them(text, name):
    assert host_name(text) == name


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("fed.example.org:9443", "without a port, which is `port`"),
        ("10.0.0.5:9443", "without a port"),
        ("[::1]:9443", "without brackets"),
        ("[::1]", "without brackets"),
        ("https://fed.example.org", "without a scheme"),
        ("fed.example.org/path", "without a path"),
        ("10.0.0.5,fed.example.org", "repeat `host`"),
        ("a;b", "repeat `host`"),
        ("fed example", "has blanks"),
        ("fed\nexample", "has blanks"),
        ("", "no name of a server"),
        ("   ", "no name of a server"),
        ("a..b", "no name of a server"),
        ("-a.example", "no name of a server"),
        ("a" * 64, "no name of a server"),
        ("300.1.1.1", "no address"),
        ("10.0.5", "no address"),
        ("*.example.org", "no pattern"),
        ("me@example.org", "without an account"),
        ("0.0.0.0", "nobody can reach"),
        ("::", "nobody can reach"),
        ("fe80::1%eth0", "nobody can reach"),
        ("a💥.example", "no name of a server"),
        ("$(reboot)", "no name of a server"),
        ('a"b', "no name of a server"),
    ],
)
def test_what_is_no_name_of_a_server_is_refused(text, reason, command, tmp_path):
    with pytest.raises(UserError, match="`host`") as error:
        host_name(text)
    assert reason in str(error.value)
    code, _, errors = command("deploy", "init", tmp_path / "d", "--host", text, "--clients", "a")
    assert code == 2 and "--host" in errors and not (tmp_path / "d").exists()


@given(st.text(max_size=30))
def test_a_name_is_taken_as_it_can_be_certified_or_refused(text):
    try:
        name = host_name(text)
    except UserError:
        return
    assert host_name(name) == name and name.isascii() and name.strip() == name
    keys._alternatives([name])  # as certificates take it
    assert ":" not in name or ipaddress.ip_address(name)


def test_a_server_has_several_names_and_clients_use_the_first(command, tmp_path):
    names = ("--host", "fed.example.org", "--host", "10.0.0.5", "--host", "zürich.example")
    code, _, _ = command("deploy", "init", tmp_path / "d", *names, "--clients", "a,b")
    known = ("fed.example.org", "10.0.0.5", "xn--zrich-kva.example")
    assert code == 0 and set(known) < served_names(tmp_path / "d")
    for folder in (tmp_path / "d", tmp_path / "d" / "clients" / "a"):
        assert read_deployment(folder).hosts == known
        assert read_deployment(folder).address == "fed.example.org:9443"


@pytest.mark.parametrize(
    ("hosts", "bind"),
    [
        (("127.0.0.1",), "127.0.0.1"),
        (("localhost", "::1"), "::1"),
        (("fed.example.org",), "0.0.0.0"),
        (("127.0.0.1", "10.0.0.5"), "0.0.0.0"),
        (("10.0.0.5", "2001:db8::5"), "::"),
    ],
)
def test_a_server_listens_where_its_names_are(hosts, bind, tmp_path):
    deployment = Deployment(hosts[0], 9443, ("a",), False, hosts[1:])
    argv = commands.superlink(tmp_path, deployment).argv
    assert argv[argv.index("--host") + 1] == bind


@pytest.mark.parametrize(
    ("names", "known", "reason"),
    [
        (("Ann", "ann"), (), "'Ann' and 'ann' are one folder"),
        (("ann",), ("ANN",), "'ANN' and 'ann' are one folder"),
        (("ann", "ann"), (), "'ann' is there twice"),
        (("ann",), ("ann",), "'ann' is there twice"),
        (("con",), (), "cannot be a folder on Windows"),
        (("NUL.txt",), (), "cannot be a folder on Windows"),
        (("lpt1",), (), "cannot be a folder on Windows"),
        (("ann.",), (), "cannot be a folder on Windows"),
        (("a b",), (), "expected letters"),
        (("ann\n",), (), "expected letters"),
        (("..",), (), "expected letters"),
        ((), (), "one or more names"),
    ],
)
def test_institutions_that_would_share_a_folder_somewhere_are_refused(names, known, reason):
    with pytest.raises(UserError, match="`clients`") as error:
        check_client_names(names, known)
    assert reason in str(error.value)
    check_client_names(("console", "ann", "ann.2", "Bob"), ("dora",))


def test_a_deployment_is_its_owner_s_alone(tmp_path):
    before = os.umask(0o000)
    try:
        init(tmp_path / "d", Deployment("127.0.0.1", 9443, ("ann",)))
    finally:
        os.umask(before)
    secrets = 0
    for path in (tmp_path / "d", *(tmp_path / "d").rglob("*")):
        mode = stat.S_IMODE(path.stat().st_mode)
        assert path.is_file() or mode == 0o700, path
        if path.name in ("key", "ca.key", "server.key") or path.suffix == ".secret":
            assert mode == 0o600, path
            secrets += 1
    assert secrets == 6


def test_a_deployment_of_an_earlier_version_is_closed_at_the_start(tmp_path):
    init(tmp_path / "d", Deployment("127.0.0.1", 9443, ("ann",)))
    secret = tmp_path / "d" / "server" / "control.secret"
    secret.unlink()
    database = tmp_path / "d" / "server" / "state.db"
    database.touch()
    database.chmod(0o644)
    for folder in (tmp_path / "d", tmp_path / "d" / "server", tmp_path / "d" / "runs"):
        folder.chmod(0o755)
    make_private(tmp_path / "d")
    for path, mode in ((tmp_path / "d", 0o700), (tmp_path / "d" / "runs", 0o700)):
        assert stat.S_IMODE(path.stat().st_mode) == mode
    for path in (secret, database):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert len(secret.read_text()) == 64
    written = secret.read_text()
    make_private(tmp_path / "d")
    assert secret.read_text() == written


def test_institutions_come_and_go(command, tmp_path):
    folder = tmp_path / "d"
    port = free_port()
    command("deploy", "init", folder, "--clients", "ann,bob", "--port", port)
    before = {name: key for key, name in known_keys(folder / "clients").items()}
    code, told, _ = command("deploy", "add", folder, "cleo", "dora")
    assert code == 0 and f"cleo: hand over {folder / 'clients' / 'cleo'}" in told
    assert read_deployment(folder).clients == ("ann", "bob", "cleo", "dora")
    assert read_deployment(folder / "clients" / "dora").clients == ("dora",)
    after = {name: key for key, name in known_keys(folder / "clients").items()}
    assert sorted(after) == ["ann", "bob", "cleo", "dora"] and before.items() < after.items()
    for name, reason in (("Bob", "are one folder"), ("../x", "expected letters")):
        code, _, errors = command("deploy", "add", folder, name)
        assert code == 2 and reason in errors
    assert command("deploy", "revoke", folder, "bob")[0] == 0
    assert read_deployment(folder).clients == ("ann", "cleo", "dora")
    assert sorted(known_keys(folder / "clients").values()) == ["ann", "cleo", "dora"]
    assert known_keys(folder / "revoked") == {before["bob"]: "bob"}
    assert not (folder / "revoked" / "bob" / "key").exists()
    code, _, errors = command("deploy", "revoke", folder, "bob")
    assert code == 2 and "'bob' is not in this deployment" in errors
    assert command("deploy", "add", folder, "bob")[0] == 0  # with a key of its own
    again = {name: key for key, name in known_keys(folder / "clients").items()}
    assert again["bob"] != before["bob"]
    assert command("deploy", "revoke", folder, "bob")[0] == 0
    assert len(known_keys(folder / "revoked")) == 2
    code, _, errors = command("deploy", "add", tmp_path / "none", "x")
    assert code == 2 and "no deployment there" in errors


def test_a_certificate_is_renewed_by_the_same_authority(command, monkeypatch, tmp_path):
    folder = tmp_path / "d"
    monkeypatch.setattr(keys, "_SERVER_DAYS", 5)
    command("deploy", "init", folder, "--clients", "ann", "--host", "old.example.org")
    authority = (folder / "server" / "ca.crt").read_bytes()
    assert "expires in 4 days" in (check_certificate(folder / "server", ["old.example.org"]) or "")
    monkeypatch.setattr(keys, "_SERVER_DAYS", 100)
    old = (folder / "server" / "server.pem").read_bytes()
    code, told, _ = command("deploy", "renew", folder)
    until = datetime.now(UTC) + timedelta(days=100)
    assert code == 0 and f"good until {until:%Y-%m-%d}" in told
    assert (folder / "server" / "server.pem").read_bytes() != old
    assert check_certificate(folder / "server", ["old.example.org"]) is None
    hosts = ("--host", "new.example.org", "--host", "10.0.0.5")
    assert command("deploy", "renew", folder, *hosts)[0] == 0
    assert {"new.example.org", "10.0.0.5"} < served_names(folder)
    assert read_deployment(folder).hosts == ("new.example.org", "10.0.0.5")
    assert (folder / "server" / "ca.crt").read_bytes() == authority  # nothing to hand out
    certificate = x509.load_pem_x509_certificate((folder / "server" / "server.pem").read_bytes())
    certificate.verify_directly_issued_by(x509.load_pem_x509_certificate(authority))
    assert stat.S_IMODE((folder / "server" / "server.key").stat().st_mode) == 0o600
    elsewhere = tmp_path / "ca.key"
    (folder / "ca" / "ca.key").rename(elsewhere)
    code, _, errors = command("deploy", "renew", folder)
    assert code == 2 and "name it with --ca-key" in errors
    assert command("deploy", "renew", folder, "--ca-key", elsewhere)[0] == 0
    init(tmp_path / "other", Deployment("127.0.0.1", 9443, ("ann",)))
    before = (folder / "server" / "server.pem").read_bytes()
    for key, reason in (
        (tmp_path / "other" / "ca" / "ca.key", "not the key of"),
        (folder / "server" / "ca.crt", "no key of the certificate authority"),
    ):
        code, _, errors = command("deploy", "renew", folder, "--ca-key", key)
        assert code == 2 and reason in errors
    assert (folder / "server" / "server.pem").read_bytes() == before
    code, _, errors = command("deploy", "renew", folder, "--host", "a:1", "--ca-key", elsewhere)
    assert code == 2 and "without a port" in errors


@pytest.mark.parametrize("damage", ["missing", "garbage", "another"])
def test_a_server_s_damaged_certificate_is_named_with_the_remedy(damage, command, tmp_path):
    init(tmp_path / "d", Deployment("127.0.0.1", free_port(), ("ann",)))
    file = tmp_path / "d" / "server" / "server.key"
    if damage == "missing":
        file.unlink()
    else:
        other = keys._pem(keys.ec.generate_private_key(keys.ec.SECP384R1()))
        file.write_bytes(other if damage == "another" else b"\x00" * 40)
    code, _, errors = command("deploy", "server", tmp_path / "d")
    assert code == 2 and "deploy renew" in errors


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        ("missing", "the private key is missing"),
        ("garbage", "no private key, or a damaged one"),
        ("cut", "no private key, or a damaged one"),
        ("a folder", "cannot be read: Is a directory"),
        ("public", "no private key, or a damaged one"),
        ("another", "does not belong to key.pub"),
        ("kind", "a key of another kind"),
    ],
)
def test_a_key_that_cannot_be_used_is_told_in_words(damage, reason, command, tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "attend", lambda *_: pytest.fail("a node was started"))
    init(tmp_path / "d", Deployment("127.0.0.1", free_port(), ("ann",)))
    file = tmp_path / "d" / "clients" / "ann" / "key"
    whole = file.read_bytes()
    file.unlink()
    if damage == "a folder":
        file.mkdir()
    elif damage == "another":
        keys.write_key_pair(tmp_path / "other")
        file.write_bytes((tmp_path / "other").read_bytes())
    elif damage == "kind":
        file.write_bytes(_ed25519())
    elif damage != "missing":
        public = file.with_name("key.pub").read_bytes()
        file.write_bytes({"garbage": b"\xff" * 9, "cut": whole[:-200], "public": public}[damage])
    (tmp_path / "recipe.yaml").write_text("name: x")
    client = ("--name", "ann", "--recipe", tmp_path / "recipe.yaml")
    code, _, errors = command("deploy", "client", tmp_path / "d", *client)
    assert code == 2 and reason in errors and str(file) in errors


def _ed25519():
    from cryptography.hazmat.primitives import serialization  # noqa: PLC0415
    from cryptography.hazmat.primitives.asymmetric import ed25519  # noqa: PLC0415

    return ed25519.Ed25519PrivateKey.generate().private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.OpenSSH,
        serialization.NoEncryption(),
    )


def test_two_programs_do_not_share_a_folder(tmp_path):
    told = rf"process {os.getpid()} runs `deploy client`"
    with (
        alone(tmp_path, "deploy client"),
        pytest.raises(UserError, match=told),
        alone(tmp_path, "deploy client"),
    ):
        pytest.fail("it was let in")
    with alone(tmp_path, "deploy client"):
        pass


def test_a_hundred_institutions_are_not_a_hundred_lines(command, tmp_path, monkeypatch):
    monkeypatch.setattr("fedex_lora.flower.deploy.init.write_key_pair", lambda path: path.touch())
    names = [f"hospital-{i}" for i in range(100)]
    code, told, _ = command("deploy", "init", tmp_path / "d", "--clients", ",".join(names))
    assert code == 0 and len(told.splitlines()) == 3 and "and 92 more" in told
    assert json.loads((tmp_path / "d" / "deployment.json").read_text())["clients"] == names


def test_what_cannot_be_written_is_told_in_words(command, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    code, _, errors = command("deploy", "init", tmp_path / "file" / "d", "--clients", "ann")
    assert code == 2 and "cannot be written: Not a directory" in errors
    init(tmp_path / "d", Deployment("127.0.0.1", free_port(), ("ann", "bob")))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("name: x")

    def full(path, *_):
        raise OSError(28, "No space left on device", str(path))

    with monkeypatch.context() as patch:
        patch.setattr("fedex_lora.flower.deploy.init.write_key_pair", full)
        code, _, errors = command("deploy", "add", tmp_path / "d", "cleo")
        assert code == 2 and "No space left on device" in errors
    assert read_deployment(tmp_path / "d").clients == ("ann", "bob")
    assert command("deploy", "add", tmp_path / "d", "cleo")[0] == 0  # nothing is in its way
    (tmp_path / "d" / ".lock").mkdir()
    code, _, errors = command("deploy", "server", tmp_path / "d")
    assert code == 2 and "run this under the account that owns it" in errors
