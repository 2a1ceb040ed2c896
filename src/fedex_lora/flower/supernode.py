"""flower-supernode that ends when the `deploy client` that started it is gone, however it ended.

An operator who has ended that believes that the institution takes part no more.

A run's program stays packed here too: Flower's SuperNode would unpack its configuration, of
whatever size, for an app that does not read it. Takes the arguments of flower-supernode.
"""

from __future__ import annotations

import os

from flwr.supercore.app_utils import start_parent_process_monitor
from flwr.supernode import start_client_internal
from flwr.supernode.cli.flower_supernode import flower_supernode

UNPACKS = "get_fused_config_from_fab"


def main() -> None:
    """Starts the SuperNode."""
    os.umask(0o077)
    if not hasattr(start_client_internal, UNPACKS):
        raise RuntimeError(f"this version of Flower has no {UNPACKS}")
    setattr(start_client_internal, UNPACKS, lambda fab, run: {})
    start_parent_process_monitor(os.getppid())
    flower_supernode()


if __name__ == "__main__":
    main()
