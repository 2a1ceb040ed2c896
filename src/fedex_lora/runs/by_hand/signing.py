"""The coordinator's ed25519 key, by which clients know that a folder is the coordinator's."""

from __future__ import annotations

import hashlib
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from fedex_lora.disk import reason, write_secret
from fedex_lora.errors import ProtocolError, StorageError


def signer(path: Path) -> Ed25519PrivateKey:
    """The key at `path`, which its owner alone may read; a new one where there is none.

    Raises:
        UserError: The file is no such key.
    """
    if not path.exists():
        key = Ed25519PrivateKey.generate()
        pem = key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        write_secret(path, pem)
        return key
    try:
        found = serialization.load_pem_private_key(path.read_bytes(), None)
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise StorageError(f"{path}: no key of a coordinator: {reason(error)}") from None
    if not isinstance(found, Ed25519PrivateKey):
        raise StorageError(f"{path}: a key of another kind; expected ed25519")
    return found


def public(key: Ed25519PrivateKey) -> bytes:
    """The public half, as PEM."""
    return key.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )


def fingerprint(pem: bytes) -> str:
    """What people compare of a public key: 16 hex digits of its SHA-256."""
    return hashlib.sha256(pem.strip()).hexdigest()[:16]


def verify(content: bytes, signature: bytes, pem: bytes, whose: str) -> None:
    """Raises a `UserError` where `signature` is not by the key `pem` of `content`."""
    try:
        key = serialization.load_pem_public_key(pem)
        if not isinstance(key, Ed25519PublicKey):
            raise ValueError("a key of another kind")
        key.verify(signature, content)
    except (InvalidSignature, ValueError, TypeError, UnsupportedAlgorithm):
        raise ProtocolError(
            f"{whose}: its signature is not by the coordinator's key {fingerprint(pem)}: it was "
            "changed, or is another's. Ask the coordinator for the folder once more"
        ) from None
