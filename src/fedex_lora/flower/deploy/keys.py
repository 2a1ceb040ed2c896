"""A certificate authority, a server certificate, and a key pair for every institution."""

from __future__ import annotations

import ipaddress
import ssl
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedex_lora.disk import reason, write_secret
from fedex_lora.errors import DeploymentError, StorageError

_CA_DAYS, _SERVER_DAYS = 3650, 730
_EARLIER = timedelta(hours=1)  # clocks differ
_SOON = 30  # days before the end of a certificate


def write_certificates(ca: Path, server: Path, hosts: Sequence[str]) -> None:
    """Writes ca/ca.key, ca/ca.crt, and server/server.key, server/server.pem, server/ca.crt.

    Args:
        hosts: Names and addresses under which the server is reached; this machine's own are added.
    """
    ca_key = ec.generate_private_key(ec.SECP384R1())
    name = _name("fedex-lora certificate authority")
    ca_certificate = _certificate(name, name, ca_key.public_key(), ca_key, _CA_DAYS, None)
    write_secret(ca / "ca.key", _pem(ca_key))
    for path in (ca / "ca.crt", server / "ca.crt"):
        path.write_bytes(_text(ca_certificate))
    _certify(server, hosts, ca_certificate, ca_key)


def renew_certificate(ca_key: Path, server: Path, hosts: Sequence[str]) -> datetime:
    """Writes server/server.key and server/server.pem anew, by the authority of server/ca.crt.

    Returns:
        Until when the certificate is good.

    Raises:
        UserError: The authority's key cannot be read, is not that of ca.crt, or has expired.
    """
    authority = x509.load_pem_x509_certificate((server / "ca.crt").read_bytes())
    try:
        key = serialization.load_pem_private_key(ca_key.read_bytes(), None)
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise DeploymentError(
            f"{ca_key}: no key of the certificate authority: {reason(error)}. Put ca.key there for "
            "this once, or name it with `ca_key`"
        ) from None
    if key.public_key() != authority.public_key():
        raise DeploymentError(
            f"{ca_key}: not the key of {server / 'ca.crt'}, which the clients trust; a certificate "
            "of another authority is taken with `certificate` and `key`"
        )
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    until = authority.not_valid_after_utc
    if datetime.now(UTC) > until:
        raise DeploymentError(
            f"{server / 'ca.crt'}: the authority itself expired on {until:%Y-%m-%d}; run deploy "
            "init for another directory and hand out its folders"
        )
    _certify(server, hosts, authority, key)
    new = x509.load_pem_x509_certificate((server / "server.pem").read_bytes())
    return new.not_valid_after_utc


def _certify(
    server: Path,
    hosts: Sequence[str],
    authority: x509.Certificate,
    signer: ec.EllipticCurvePrivateKey,
) -> None:
    """A new key and certificate of the server; those before are replaced when both are written."""
    key = ec.generate_private_key(ec.SECP384R1())
    alternatives = _alternatives([*hosts, "localhost", "127.0.0.1", "::1"])
    certificate = _certificate(
        _name(hosts[0]), authority.subject, key.public_key(), signer, _SERVER_DAYS, alternatives
    )
    new = [server / f"server.{suffix}.new" for suffix in ("key", "pem")]
    for path in new:
        path.unlink(missing_ok=True)
    write_secret(new[0], _pem(key))
    new[1].write_bytes(_text(certificate))
    for path in new:
        path.replace(path.with_suffix(""))


def take_certificate(
    certificate: Path, key: Path, authority: Path | None, server: Path, hosts: Sequence[str]
) -> datetime:
    """Puts a certificate of another authority in place of server/server.pem, and its key; before
    that it is tried as clients will: they trust the authority alone.

    Args:
        certificate: The server's, with its intermediates, in PEM.
        key: Its key in PEM, without a password.
        authority: What clients trust from now on, in PEM; by default what they trust already.
        hosts: Names and addresses that it has to be good for, besides 127.0.0.1.

    Returns:
        Until when it is good.

    Raises:
        UserError: A file is none of those; the key is another's, or clients would not accept it.
    """
    chain = read_certificates(certificate, "certificate")
    trusted = read_certificates(authority or server / "ca.crt", "certificates of an authority")
    try:
        private = serialization.load_pem_private_key(key.read_bytes(), None)
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise StorageError(
            f"{key}: no key that can be read: {reason(error)}; expected PEM without a password"
        ) from None
    if private.public_key() != chain[0].public_key():
        raise DeploymentError(f"{key}: not the key of the first certificate in {certificate}")
    texts = {
        "server.key": _pem(private),
        "server.pem": b"".join(map(_text, chain)),
        "ca.crt": b"".join(map(_text, trusted)),
    }
    new = {name: server / f"{name}.new" for name in texts}
    try:
        for name, path in new.items():
            path.unlink(missing_ok=True)
            write_secret(path, texts[name])
        for host in (*hosts, "127.0.0.1"):
            if why := _unaccepted(new["server.pem"], new["server.key"], new["ca.crt"], host):
                raise DeploymentError(
                    f"{certificate}: clients would not accept it for {host}: {why}; expected one "
                    f"for {', '.join((*hosts, '127.0.0.1'))} with its intermediates, by the "
                    "authority named"
                )
        for name, path in new.items():
            path.replace(server / name)
    finally:
        for path in new.values():
            path.unlink(missing_ok=True)
    return chain[0].not_valid_after_utc


def read_certificates(path: Path, what: str) -> list[x509.Certificate]:
    """Those of a PEM file.

    Raises:
        UserError: There are none; `what` says what was expected.
    """
    try:
        return x509.load_pem_x509_certificates(path.read_bytes())
    except (OSError, ValueError) as error:
        raise StorageError(f"{path}: no {what}: {reason(error)}; expected a PEM file") from None


def _unaccepted(certificate: Path, key: Path, authority: Path, host: str) -> str:
    """Why a client that trusts this authority alone breaks off; "" if it does not."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(certificate, key)
        server = context.wrap_bio(to_server, to_client, server_side=True)
        client = client_context(authority).wrap_bio(to_client, to_server, server_hostname=host)
        for side in (client, server, client):
            with suppress(ssl.SSLWantReadError):
                side.do_handshake()
    except ssl.SSLCertVerificationError as error:
        return error.verify_message
    except ssl.SSLError as error:
        return str(error.reason)
    return ""


def client_context(certificates: Path) -> ssl.SSLContext:
    """As Flower makes it: nothing but these certificates is trusted."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(certificates)
    return context


def write_key_pair(path: Path) -> None:
    """An EC P-384 pair as OpenSSH writes it: `path` and `path`.pub."""
    key = ec.generate_private_key(ec.SECP384R1())
    private = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.OpenSSH,
        serialization.NoEncryption(),
    )
    public = key.public_key().public_bytes(
        serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    )
    write_secret(path, private)
    path.with_name(path.name + ".pub").write_bytes(public + b"\n")


def check_certificate(server: Path, hosts: Sequence[str]) -> str | None:
    """That the server's certificate can be used now, under its names, with its key.

    Returns:
        What to know before long: that it expires soon.

    Raises:
        UserError: It is expired, not valid yet (or this machine's clock is wrong), for others, or
            not of server.key.
    """
    path = server / "server.pem"
    try:
        certificate = x509.load_pem_x509_certificate(path.read_bytes())
        key = serialization.load_pem_private_key((server / "server.key").read_bytes(), None)
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise StorageError(
            f"{server}: its server.pem or server.key cannot be read: {reason(error)}; "
            "`fedex-lora deploy renew` makes new ones"
        ) from None
    now = datetime.now(UTC)
    until, since = certificate.not_valid_after_utc, certificate.not_valid_before_utc
    if now > until:
        raise DeploymentError(
            f"{path}: expired on {until:%Y-%m-%d}; `fedex-lora deploy renew` makes a new one, and "
            "the institutions need nothing new"
        )
    if now < since:
        raise DeploymentError(
            f"{path}: valid from {since:%Y-%m-%d %H:%M} UTC, but this machine's clock says "
            f"{now:%Y-%m-%d %H:%M}; set the clock"
        )
    if key.public_key() != certificate.public_key():
        raise DeploymentError(
            f"{path}: not of server.key; `fedex-lora deploy renew` makes a new pair"
        )
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    known = {str(n.value) for n in names}
    for host in hosts:
        if host not in known:
            raise DeploymentError(
                f"{path}: made for {', '.join(sorted(known))}, not for {host}; "
                f"`fedex-lora deploy renew --host {host}` makes one for it"
            )
    left = (until - now).days
    if left < _SOON:
        return f"{path}: expires in {left} days; `fedex-lora deploy renew` makes a new one"
    return None


def check_private_key(path: Path) -> None:
    """That an institution's key can be read, is one of those made here, and belongs to key.pub.

    Raises:
        UserError: It is missing, may not be read, is damaged, or is another.
    """
    fetch = "take the folder that the coordinator handed over once more, or ask for a new one"
    try:
        key = serialization.load_ssh_private_key(path.read_bytes(), None)
    except FileNotFoundError:
        raise DeploymentError(f"{path}: the private key is missing; {fetch}") from None
    except OSError as error:
        raise StorageError(
            f"{path}: the private key cannot be read: {reason(error)}; run this under the account "
            "that owns it"
        ) from None
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        kind = type(error).__name__
        raise StorageError(f"{path}: no private key, or a damaged one ({kind}); {fetch}") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise DeploymentError(f"{path}: a key of another kind, not EC P-384; {fetch}")
    public = path.with_name(path.name + ".pub")
    derived = key.public_key().public_bytes(
        serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    )
    if public.exists() and public.read_bytes().split()[:2] != derived.split()[:2]:
        raise DeploymentError(f"{path}: does not belong to {public.name}; {fetch}")


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text[:64])])


def _alternatives(hosts: Sequence[str]) -> x509.SubjectAlternativeName:
    found: list[x509.GeneralName] = []
    for host in dict.fromkeys(hosts):
        try:
            found.append(x509.IPAddress(ipaddress.ip_address(host)))
        except ValueError:
            found.append(x509.DNSName(host))
    return x509.SubjectAlternativeName(found)


def _certificate(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePublicKey,
    signer: ec.EllipticCurvePrivateKey,
    days: int,
    alternatives: x509.SubjectAlternativeName | None,
) -> x509.Certificate:
    authority, now = alternatives is None, datetime.now(UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _EARLIER)
        .not_valid_after(now + timedelta(days=days))
        .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
        .add_extension(_usage(authority), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False
        )
    )
    if alternatives is not None:
        server = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH])
        builder = builder.add_extension(alternatives, critical=False)
        builder = builder.add_extension(server, critical=False)
    return builder.sign(signer, hashes.SHA384())


def _usage(authority: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not authority,
        key_cert_sign=authority,
        crl_sign=authority,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _text(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _pem(key: PrivateKeyTypes) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
