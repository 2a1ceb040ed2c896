"""flower-supernode that ends when the `deploy client` that started it is gone, however it ended.

An operator who has ended that believes that the institution takes part no more. Takes the arguments
of flower-supernode.
"""

from __future__ import annotations

import os

from flwr.supercore.app_utils import start_parent_process_monitor
from flwr.supernode.cli.flower_supernode import flower_supernode


def main() -> None:
    """Starts the SuperNode."""
    os.umask(0o077)
    start_parent_process_monitor(os.getppid())
    flower_supernode()


if __name__ == "__main__":
    main()
