"""Everything random derives from the run's seed and a name for what it is used for."""

import hashlib


def derive(seed: int, *what: int | str) -> int:
    """A 31-bit seed that depends on `seed` and on every part of `what`, and on nothing else.

    Args:
        seed: The run's seed.
        what: A path of names, e.g. `("train", round, client)`.

    Returns:
        An integer in [0, 2**31), the same on every machine and in every process.

    Example:
        >>> derive(0, "train", 1, "a") == derive(0, "train", 1, "a")
        True
        >>> derive(0, "train", 1, "a") == derive(0, "train", 2, "a")
        False
    """
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in (seed, *what))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") >> 1
