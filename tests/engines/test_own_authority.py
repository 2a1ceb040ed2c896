"""A server's certificate by an authority of the institutions' own."""

from __future__ import annotations

import ipaddress
import re
import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from commands import Command
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.x509.oid import NameOID

from engines.test_deploy_files import tls_server
from fedex_lora.flower.deploy.init import Deployment, init, read_deployment
from fedex_lora.flower.deploy.keys import check_certificate
from fedex_lora.flower.deploy.processes import check_server
from fedex_lora.flower.deploy.proxy import trusted

HOST, NOW = "fed.example.org", datetime.now(UTC)


class Signed:
    """A key, and a certificate for it by another (or by itself)."""

    def __init__(
        self, name: str, by: Signed | None, hosts: tuple[str, ...] = (), days: int = 90
    ) -> None:
        self.key = rsa.generate_private_key(65537, 2048)
        self.name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        signer = by or self
        found = (
            x509.CertificateBuilder()
            .subject_name(self.name)
            .issuer_name(signer.name)
            .public_key(self.key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(NOW - timedelta(days=200))
            .not_valid_after(NOW + timedelta(days=days))
            .add_extension(x509.BasicConstraints(ca=not hosts, path_length=None), critical=True)
        )
        if hosts:
            names = [x509.DNSName(host) for host in hosts if host[0].isalpha()]
            here = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
            named = [*names, here] if "127.0.0.1" in hosts else names
            found = found.add_extension(x509.SubjectAlternativeName(named), critical=False)
        self.certificate = found.sign(signer.key, hashes.SHA256())

    @property
    def pem(self) -> bytes:
        return self.certificate.public_bytes(serialization.Encoding.PEM)

    def private(self, password: bytes | None = None) -> bytes:
        kind = serialization.BestAvailableEncryption(password) if password else None
        return self.key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            kind or serialization.NoEncryption(),
        )


@pytest.fixture(scope="module")
def firm() -> dict[str, Signed]:
    root = Signed("The Firm", None)
    between = Signed("The Firm's Servers", root)
    good = (HOST, "127.0.0.1")
    return {
        "root": root,
        "between": between,
        "server": Signed(HOST, between, good),
        "other name": Signed("x", between, ("x.example.org", "127.0.0.1")),
        "not here": Signed("x", between, (HOST,)),
        "old": Signed("x", between, good, days=-1),
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    init(tmp_path / "d", Deployment(HOST, 9443, ("ann", "bob")))
    return tmp_path / "d"


def files(folder: Path, firm: dict[str, Signed], which: str = "server") -> list[str | Path]:
    """Options of `deploy renew`."""
    one = firm[which]
    (folder / "given.pem").write_bytes(b"# of the firm\n" + one.pem + firm["between"].pem)
    (folder / "given.key").write_bytes(one.private())
    (folder / "firm.crt").write_bytes(firm["root"].pem)
    return ["--certificate", folder / "given.pem", "--key", folder / "given.key"]


def test_clients_reach_a_server_whose_certificate_the_firm_signed(
    command: Command, folder: Path, firm: dict[str, Signed]
):
    given = files(folder, firm)
    code, told, _ = command("deploy", "renew", folder, *given, "--authority", folder / "firm.crt")
    assert code == 0 and "server/ca.crt out" in told
    assert f"good until {NOW + timedelta(days=90):%Y-%m-%d}" in told
    assert check_certificate(folder / "server", [HOST, "127.0.0.1"]) is None
    assert stat.S_IMODE((folder / "server" / "server.key").stat().st_mode) == 0o600
    for name in ("ann", "bob"):
        assert (folder / "clients" / name / "ca.crt").read_bytes() == firm["root"].pem
    said: list[str] = []
    with tls_server(folder) as port:
        there = Deployment("127.0.0.1", port, ("ann",))
        check_server(there, trusted(folder / "clients" / "ann", None), said.append)
    assert not said
    again = command("deploy", "renew", folder, *given)  # the authority is known by now
    assert again[0] == 0 and "ca.crt out" not in again[1]
    assert command("deploy", "add", folder, "cleo")[0] == 0
    assert (folder / "clients" / "cleo" / "ca.crt").read_bytes() == firm["root"].pem
    code, _, errors = command("deploy", "renew", folder)  # by the authority that was made here
    assert code == 2 and "is taken with --certificate and --key" in errors


@pytest.mark.parametrize(
    ("which", "spoil", "text"),
    [
        ("other name", "", f"not accept it for {HOST}: Hostname mismatch"),
        ("not here", "", "not accept it for 127.0.0.1: IP address mismatch"),
        ("old", "", "certificate has expired"),
        ("server", "authority", "unable to get (local )?issuer certificate"),
        ("server", "intermediate", "unable to get local issuer certificate"),
        ("server", "password", r"given\.key: no key that can be read: .*without a password"),
        ("server", "another key", r"given\.key: not the key of the first certificate"),
        ("server", "no certificate", r"given\.pem: no certificate: .*expected a PEM file"),
        ("server", "no authority", r"firm\.crt: no certificates of an authority"),
    ],
)
def test_what_clients_would_not_accept_is_refused_and_all_stays_as_it_was(
    which: str, spoil: str, text: str, command: Command, folder: Path, firm: dict[str, Signed]
):
    given = files(folder, firm, which)
    if spoil != "authority":
        given += ["--authority", folder / "firm.crt"]
    if spoil == "intermediate":
        (folder / "given.pem").write_bytes(firm[which].pem)
    elif spoil == "password":
        (folder / "given.key").write_bytes(firm[which].private(b"secret"))
    elif spoil == "another key":
        (folder / "given.key").write_bytes(firm["root"].private())
    elif spoil == "no certificate":
        (folder / "given.pem").write_bytes(firm[which].private())
    elif spoil == "no authority":
        (folder / "firm.crt").unlink()
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    code, _, errors = command("deploy", "renew", folder, *given, "--host", HOST)
    assert code == 2
    assert re.search(text, " ".join(errors.split()))
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before
    assert read_deployment(folder).hosts == (HOST,)


def test_the_options_go_together(command: Command, folder: Path, firm: dict[str, Signed]):
    given = files(folder, firm)
    for options in (given[:2], given[2:], ["--authority", folder / "firm.crt"]):
        code, _, errors = command("deploy", "renew", folder, *options)
        assert code == 2 and "goes with --key" in errors
    code, _, errors = command("deploy", "renew", folder, *given, "--ca-key", folder / "x")
    assert code == 2 and "not with --ca-key" in errors
