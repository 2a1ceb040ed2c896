"""What the fixture `command` (conftest.py) gives to tests."""

from collections.abc import Callable

Command = Callable[..., tuple[int, str, str]]
"""Runs the command line on its arguments: exit code, output, errors."""
