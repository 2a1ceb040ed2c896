"""Secrets in shares (Shamir, "How to share a secret", 1979): any `threshold` of them give it back,
fewer say nothing. In the field of integers modulo the prime 2⁵²¹ − 1."""

from __future__ import annotations

import secrets
from collections.abc import Mapping

from fedex_lora.errors import ProtocolError
from fedex_lora.federation.secure.primitives import SECRET

PRIME = 2**521 - 1


def split(secret: bytes, holders: int, threshold: int) -> list[int]:
    """f(1), ..., f(holders) of a random polynomial f of degree threshold − 1 with f(0) the secret.

    Example:
        >>> shares = split(bytes(31) + b"x", holders=5, threshold=3)
        >>> combine({2: shares[1], 4: shares[3], 5: shares[4]})[-1:]
        b'x'
    """
    assert len(secret) == SECRET and 1 <= threshold <= holders
    higher = [secrets.randbelow(PRIME) for _ in range(threshold - 1)]
    coefficients = [*higher, int.from_bytes(secret, "big")]
    shares = []
    for x in range(1, holders + 1):
        y = 0
        for c in coefficients:  # Horner
            y = (y * x + c) % PRIME
        shares.append(y)
    return shares


def combine(shares: Mapping[int, int]) -> bytes:
    """f(0) by Lagrange's formula, of shares f(x) by x; as many as the threshold.

    Raises:
        ProtocolError: They are not of one secret.
    """
    secret = 0
    for x, y in shares.items():
        over, under = 1, 1
        for other in shares:
            if other != x:
                over = over * other % PRIME
                under = under * (other - x) % PRIME
        secret = (secret + y * over * pow(under, -1, PRIME)) % PRIME
    if secret >= 1 << (8 * SECRET):
        raise ProtocolError("shares that belong to no secret")
    return secret.to_bytes(SECRET, "big")
