"""What the user can mend is a `UserError`; everything else is a fault of this program."""


class UserError(ValueError):
    """Something the user gave is wrong. The text says what, where, what was expected, what to do.

    The command line prints it without a traceback and exits with code 2.
    """


class Withheld(UserError):
    """Its text may quote data: it stays on the machine where it arose."""


class UpdateRefused(UserError):
    """A client's update may not be aggregated; the round goes on without it."""


class QuorumLost(UserError):
    """Fewer clients than `min_clients` delivered a valid update; the last checkpoint stands."""


SHOWN = 40  # characters of a value that an error shows


def shown(value: object) -> str:
    """A value from somebody's data in an error: its first characters.

    Example:
        >>> shown("yes"), shown("x" * 1000)
        ("'yes'", "'xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx'... (1000 characters)")
    """
    text = value if isinstance(value, str) else repr(value)
    if len(text) <= SHOWN:
        return repr(value)
    head = repr(text[:SHOWN]) if isinstance(value, str) else text[:SHOWN]
    return f"{head}... ({len(text)} characters)"
