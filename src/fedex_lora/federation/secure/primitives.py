"""What the protocol is made of: keys that two agree on, a generator of masks, sealed letters."""

from __future__ import annotations

import hashlib
import json

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from numpy.typing import NDArray

from fedex_lora.errors import ProtocolError

Vector = NDArray[np.uint64]
SECRET = 32  # bytes of a key and of a seed

_AT_ONCE = 1 << 19  # bytes of a mask: they stay in the processor's cache
_ZEROS = bytes(_AT_ONCE)
_ONCE = bytes(12)  # a nonce: every key seals one letter


def new_key() -> bytes:
    """A private key of X25519."""
    return X25519PrivateKey.generate().private_bytes_raw()


def public(key: bytes) -> bytes:
    """The public key that belongs to a private one."""
    return X25519PrivateKey.from_private_bytes(key).public_key().public_bytes_raw()


def agreed(key: bytes, other: bytes, *context: str) -> bytes:
    """32 bytes that two agree on: HKDF-SHA256 of X25519, for one purpose.

    Args:
        key: One's own private key.
        other: The other's public key.
        context: What it is for, in the same words on both sides.

    Raises:
        ProtocolError: The other's key is none.

    Example:
        >>> a, b = new_key(), new_key()
        >>> agreed(a, public(b), "mask") == agreed(b, public(a), "mask")
        True
    """
    try:
        own = X25519PrivateKey.from_private_bytes(key)
        secret = own.exchange(X25519PublicKey.from_public_bytes(other))
    except ValueError as error:
        raise ProtocolError(f"a public key that is none: {error}") from None
    return HKDF(hashes.SHA256(), SECRET, None, canonical(context)).derive(secret)


def canonical(value: object) -> bytes:
    """JSON of which there is one for each value: what is signed, hashed, or names a purpose."""
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def commitment(*what: str) -> str:
    """SHA-256 in hex. It hides what nobody can guess, and binds to it."""
    return hashlib.sha256(canonical(what)).hexdigest()


def add_mask(vector: Vector, seed: bytes, sign: int) -> None:
    """vector += sign·PRG(seed) mod 2⁶⁴, in place; PRG is the key stream of ChaCha20.

    Args:
        sign: 1 or −1.

    Example:
        >>> vector = np.array([5, 6], np.uint64)
        >>> add_mask(vector, bytes(32), 1); add_mask(vector, bytes(32), -1)
        >>> vector.tolist()
        [5, 6]
    """
    stream = Cipher(ChaCha20(seed, bytes(16)), None).encryptor()
    buffer = bytearray(_AT_ONCE)
    mask = np.frombuffer(buffer, "<u8")
    change = np.add if sign > 0 else np.subtract
    for first in range(0, len(vector), len(mask)):
        part = vector[first : first + len(mask)]
        stream.update_into(_ZEROS[: 8 * len(part)], buffer)
        change(part, mask[: len(part)], out=part)


def seal(key: bytes, letter: bytes, *context: str) -> bytes:
    """ChaCha20-Poly1305 under a key that seals one letter."""
    return ChaCha20Poly1305(key).encrypt(_ONCE, letter, canonical(context))


def unseal(key: bytes, sealed: bytes, *context: str) -> bytes:
    """The inverse of `seal`.

    Raises:
        ProtocolError: It was sealed by another key, for another purpose, or was changed.
    """
    try:
        return ChaCha20Poly1305(key).decrypt(_ONCE, sealed, canonical(context))
    except InvalidTag:
        raise ProtocolError("a sealed letter that does not open") from None
