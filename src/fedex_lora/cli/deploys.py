"""Commands for federations across machines."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedex_lora.cli.common import app, comma_separated, read_recipe, say
from fedex_lora.errors import UserError
from fedex_lora.setup import client_rows, recipe_task

deploys = typer.Typer(no_args_is_help=True, help="Across machines: see docs/deploy.md.")
app.add_typer(deploys, name="deploy")

Folder = Annotated[Path, typer.Argument(help="The deployment's folder.")]


@deploys.command("init")
def init_command(
    folder: Folder,
    clients: Annotated[str, typer.Option(help="Names of the institutions, comma-separated.")],
    host: Annotated[str, typer.Option(help="The server's name or address.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="The server's port.")] = 9443,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="No TLS, no keys: to try things on one machine.")
    ] = False,
) -> None:
    """Make certificates, keys, and everything else that a deployment needs."""
    from fedex_lora.deploy.init import Deployment, init  # noqa: PLC0415 (needs Flower)

    deployment = Deployment(host, port, tuple(comma_separated(clients)), insecure)
    init(folder, deployment)
    if insecure:
        say("warning: no TLS and no keys; anybody on this machine can take part and read along")
    say(f"Coordinator:  fedex-lora deploy server {folder}")
    for name in deployment.clients:
        say(
            f"{name}: hand over {folder / 'clients' / name}; there: fedex-lora deploy client "
            f"FOLDER --name {name} --recipe RECIPE --data FILE"
        )
    say(f"Keep {folder / 'ca' / 'ca.key'} off this machine once all is set up.")


@deploys.command("server")
def server_command(folder: Folder) -> None:
    """Serve clients and runs until Ctrl-C (prints the Flower commands it runs)."""
    from fedex_lora.deploy.init import read_deployment  # noqa: PLC0415 (needs Flower)
    from fedex_lora.deploy.keys import check_certificate  # noqa: PLC0415
    from fedex_lora.deploy.processes import serve  # noqa: PLC0415

    deployment = read_deployment(folder)
    if deployment.insecure:
        say("warning: no TLS and no keys; anybody on this machine can take part and read along")
    else:
        check_certificate(folder / "server" / "server.pem", deployment.host)
    serve(folder.resolve(), deployment, say)


@deploys.command("client")
def client_command(
    folder: Folder,
    recipe: Annotated[Path, typer.Option(help="The agreed recipe, on this machine.")],
    name: Annotated[str, typer.Option(help="The institution's name.")],
    data: Annotated[Path | None, typer.Option(help="Its rows: JSON Lines, CSV or Parquet.")] = None,
    check: Annotated[bool, typer.Option(help="Read all rows before connecting.")] = True,
    port: Annotated[int, typer.Option(help="A free port of this machine; 0 finds one.")] = 0,
) -> None:
    """Take part as one institution until Ctrl-C (prints the Flower commands it runs)."""
    from fedex_lora.deploy import commands, processes  # noqa: PLC0415 (needs Flower)
    from fedex_lora.deploy.init import FILE, read_deployment  # noqa: PLC0415

    own = folder if (folder / "key").exists() else folder / "clients" / name
    own = (own if (own / FILE).exists() else folder).resolve()
    deployment = read_deployment(own)
    if name not in deployment.clients:
        raise UserError(f"--name: {name!r}; this folder is for {', '.join(deployment.clients)}")
    spec = read_recipe(recipe, [])
    if check:
        client_rows(spec, recipe_task(spec), name, data)
        say("the rows can be used")
    if port:
        processes.check_port(port)
    if not deployment.insecure:
        processes.check_server(deployment, own / "ca.crt", say)
    rows, port = None if data is None else data.resolve(), port or processes.free_port()
    node = commands.supernode(own, deployment, name, recipe.resolve(), rows, port)
    processes.attend([node, commands.client_superexec(own, port)], say)
