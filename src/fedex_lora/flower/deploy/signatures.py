"""What an institution signs with, and by whose signatures it knows the others."""

from __future__ import annotations

from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ec import (
    EllipticCurvePrivateKey,
    EllipticCurvePublicKey,
)

from fedex_lora.disk import reason
from fedex_lora.errors import DeploymentError
from fedex_lora.federation.secure.identity import Identity
from fedex_lora.flower.deploy.keys import check_private_key

ROSTER = "roster"  # folder with a NAME.pub for every institution


def signing(home: Path) -> Identity | None:
    """The key of an institution's folder, and the roster in it; None where nodes have no keys, on
    one machine alone.

    Raises:
        UserError: The key or the roster is missing or damaged.
    """
    path, folder = home / "key", home / ROSTER
    if not path.exists() and not folder.exists():
        return None
    check_private_key(path)
    key = serialization.load_ssh_private_key(path.read_bytes(), None)
    assert isinstance(key, EllipticCurvePrivateKey)
    files = sorted(folder.glob("*.pub"))
    if not files:
        raise DeploymentError(
            f"{folder}: no public keys of the others there, and secure aggregation needs them; "
            "take the folder that the coordinator handed over once more, and compare the keys "
            "with the other institutions"
        )
    return Identity(key, {file.stem: _public(file) for file in files})


def _public(file: Path) -> EllipticCurvePublicKey:
    try:
        key = serialization.load_ssh_public_key(file.read_bytes())
    except (OSError, ValueError, UnsupportedAlgorithm) as error:
        raise DeploymentError(f"{file}: no public key, or a damaged one: {reason(error)}") from None
    if not isinstance(key, EllipticCurvePublicKey):
        raise DeploymentError(f"{file}: a key of another kind, not EC P-384")
    return key
