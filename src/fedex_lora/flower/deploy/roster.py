"""What an institution signs with, and by whose signatures it knows the others."""

from __future__ import annotations

import hashlib
import shutil
from base64 import b64decode, b64encode
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ec import (
    EllipticCurvePrivateKey,
    EllipticCurvePublicKey,
)

from fedex_lora.disk import reason, write_atomic
from fedex_lora.errors import DeploymentError
from fedex_lora.federation.secure.signer import Signer
from fedex_lora.flower.deploy.init import ROSTER, new_folders, writing
from fedex_lora.flower.deploy.keys import check_private_key, write_key_pair


def signer(home: Path) -> Signer | None:
    """The key of an institution's folder, and the roster in it; None where nodes have no keys.

    Raises:
        UserError: The key or the roster is missing or damaged.
    """
    path, folder = home / "key", home / ROSTER
    if not path.exists() and not folder.exists():
        return None
    check_private_key(path)
    key = serialization.load_ssh_private_key(path.read_bytes(), None)
    assert isinstance(key, EllipticCurvePrivateKey)
    found = {file.stem: _public(file) for file in sorted(folder.glob("*.pub"))}
    if len(found) < 2:
        raise DeploymentError(
            f"{folder}: expected a NAME.pub of every institution, by which secure aggregation "
            "knows them; put them there, and compare them with the institutions (deploy roster)"
        )
    return Signer(key, found)


def fingerprints(home: Path) -> dict[str, str]:
    """By name, what people compare of the keys in a roster; as `ssh-keygen -l` shows it."""
    found = {}
    for file in sorted((home / ROSTER).glob("*.pub")):
        digest = hashlib.sha256(b64decode(_openssh(_public(file)).split()[1])).digest()
        found[file.stem] = "SHA256:" + b64encode(digest).decode().rstrip("=")
    return found


def own_pair(home: Path, name: str) -> None:
    """A new key pair of an institution, made by itself, so that nobody else had the private one.

    The pair before is set aside as `key.before`.

    Raises:
        UserError: The folder cannot be written.
    """
    with writing(home):
        for file in ("key", "key.pub"):
            if (home / file).exists():
                (home / file).replace(home / file.replace("key", "key.before", 1))
        write_key_pair(home / "key")
        new_folders(home / ROSTER)
        shutil.copy(home / "key.pub", home / ROSTER / f"{name}.pub")


def take_public(deployment: Path, name: str, file: Path) -> None:
    """The public key that an institution made becomes the one by which the server knows it.

    Raises:
        UserError: It is no such key.
    """
    content = _openssh(_public(file)) + b"\n"
    folder = deployment / "clients" / name
    with writing(deployment):
        (folder / "key").unlink(missing_ok=True)  # of a pair that nobody uses any more
        write_atomic(folder / "key.pub", content)


def _openssh(key: EllipticCurvePublicKey) -> bytes:
    return key.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)


def _public(file: Path) -> EllipticCurvePublicKey:
    try:
        key = serialization.load_ssh_public_key(file.read_bytes())
    except (OSError, ValueError, UnsupportedAlgorithm) as error:
        raise DeploymentError(f"{file}: no public key, or a damaged one: {reason(error)}") from None
    if not isinstance(key, EllipticCurvePublicKey):
        raise DeploymentError(f"{file}: a key of another kind, not EC P-384")
    return key
