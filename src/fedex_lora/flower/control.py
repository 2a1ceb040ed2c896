"""What the coordinator alone may do at its SuperLink: `flwr` with the deployment's secret.

    python -m fedex_lora.flower.control members CLIENTS   # the keys in that folder are the known
    python -m fedex_lora.flower.control ready             # where nodes have no keys
    python -m fedex_lora.flower.control ARGUMENTS         # anything else: flwr ARGUMENTS

$FEDEX_LORA_CONTROL names the file with the secret, $FLWR_HOME the folder with the connection.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import httpx
from flwr.cli.app import app as flwr
from flwr.cli.cli_client_interceptor import CliClientHttpInterceptor
from flwr.cli.flower_config import read_superlink_connection
from flwr.cli.utils import init_http_client_from_connection
from flwr.proto.control_pb2 import (
    ListNodesRequest,
    RegisterNodeRequest,
    UnregisterNodeRequest,
)
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.protobuf.client import ProtobufCall, ProtobufRequestContext

from fedex_lora.flower.refusals import known_keys

HEADER = "fedex-lora-secret"
SECRET = "FEDEX_LORA_CONTROL"  # environment: the file


def read_secret() -> bytes:
    """The secret that the control paths ask for; exits where there is none."""
    try:
        found = Path(os.environ[SECRET]).read_bytes().strip()
    except (KeyError, OSError) as error:
        sys.exit(f"${SECRET} has to name the file with the deployment's secret: {error}")
    return found or sys.exit(f"{os.environ[SECRET]}: empty; delete it, deploy server makes one")


def with_secret() -> None:
    """From now on this process's calls to a SuperLink's control paths carry the secret."""
    secret, plain = read_secret().decode(), CliClientHttpInterceptor.intercept

    def intercept(
        self: CliClientHttpInterceptor, context: ProtobufRequestContext, call_next: ProtobufCall
    ) -> httpx.Response:
        context.request.headers[HEADER] = secret
        return plain(self, context, call_next)

    CliClientHttpInterceptor.intercept = intercept  # type: ignore[method-assign]


def members(client: ControlHttpClient, clients: Path) -> None:
    """Registers the institutions whose public keys lie in `clients`; forgets all other nodes."""
    names = known_keys(clients)
    listed = client.ListNodes(ListNodesRequest()).nodes_info
    nodes = {node.public_key: node.node_id for node in listed if not node.unregistered_at}
    for key, name in names.items():
        if key not in nodes:
            client.RegisterNode(RegisterNodeRequest(public_key=key, name=name))
            print(f"registered {name}", flush=True)
    for key in nodes.keys() - names.keys():
        client.UnregisterNode(UnregisterNodeRequest(node_id=nodes[key]))
        print("forgot a node whose key is none of this deployment's", flush=True)


def ready_file() -> Path:
    """Is there when clients may come in; `deploy server` takes it away before it starts."""
    return Path(os.environ[SECRET]).with_name("ready")


def main() -> None:
    """Calls the SuperLink."""
    with_secret()
    what = sys.argv[1] if len(sys.argv) > 1 else ""
    if what not in ("members", "ready"):
        flwr()
        return
    if what == "members":
        with init_http_client_from_connection(read_superlink_connection(None)) as client:
            members(client, Path(sys.argv[2]))
    ready_file().touch()


if __name__ == "__main__":
    main()
