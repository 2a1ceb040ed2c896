"""Commands for federations across machines."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from fedex_lora.cli.common import (
    Address,
    Out,
    ShowRows,
    app,
    comma_separated,
    complain,
    read_recipe,
    say,
    tell,
    this_command,
)
from fedex_lora.cli.json_lines import LogJson, emit
from fedex_lora.errors import MOST, RecipeError, check_installed, some

if TYPE_CHECKING:
    from fedex_lora.flower.deploy.asking import Asking
    from fedex_lora.flower.deploy.commands import Command
    from fedex_lora.flower.deploy.figures import Figures

deploys = typer.Typer(no_args_is_help=True, help="Across machines: see docs/deploy.md.")
app.add_typer(deploys, name="deploy")

Folder = Annotated[Path, typer.Argument(help="The deployment's folder.")]
ClientFolder = Annotated[Path, typer.Argument(help="The folder that the coordinator handed over.")]
Hosts = Annotated[
    list[str],
    typer.Option(help="The server's name or address; repeat it for each that clients use."),
]
INSECURE = "warning: no TLS and no keys; anybody on this machine can take part and read along"


@deploys.command("init")
def init_command(
    folder: Folder,
    clients: Annotated[str, typer.Option(help="Names of the institutions, comma-separated.")],
    host: Hosts = ["127.0.0.1"],  # noqa: B006
    port: Annotated[int, typer.Option(help="The server's port.")] = 9443,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="No TLS, no keys: to try things on one machine.")
    ] = False,
) -> None:
    """Make certificates, keys, and everything else that a deployment needs."""
    from fedex_lora.flower.deploy.init import Deployment, init
    from fedex_lora.flower.deploy.names import host_names

    first, *others = host_names(host)
    names = tuple(comma_separated(clients))
    init(folder, Deployment(first, port, names, insecure, tuple(others)))
    if insecure:
        say(INSECURE)
    say(f"Coordinator:  fedex-lora deploy server {folder}")
    _say_hand_over(folder, names)
    if not insecure:
        say(f"Keep {folder / 'ca' / 'ca.key'} off this machine once all is set up.")


def _say_hand_over(folder: Path, names: Sequence[str]) -> None:
    there = "fedex-lora deploy client FOLDER --name {} --recipe RECIPE --data FILE"
    for name in names if len(names) <= MOST else ():
        say(f"{name}: hand over {folder / 'clients' / name}; there: {there.format(name)}")
    if len(names) > MOST:
        say(
            f"{some(names)}: hand over {folder / 'clients'}/NAME to each institution; there: "
            f"{there.format('NAME')}"
        )


@deploys.command("add")
def add_command(
    folder: Folder,
    names: Annotated[list[str], typer.Argument(help="Names of the institutions.")],
) -> None:
    """Make folders for more institutions; a server that runs lets them in at once."""
    from fedex_lora.flower.deploy.changes import add

    add(folder, names, say)
    _say_hand_over(folder, names)
    say("Where the recipe names the institutions (federation.names), name these there too.")
    say("For secure aggregation the others put clients/NAME/key.pub into FOLDER/roster/NAME.pub.")


@deploys.command("revoke")
def revoke_command(
    folder: Folder,
    names: Annotated[list[str], typer.Argument(help="Names of the institutions.")],
) -> None:
    """Take institutions out: from now on the server refuses their keys."""
    from fedex_lora.flower.deploy.changes import revoke

    for name in names:
        revoke(folder, name, say)
        say(f"{name} is revoked; what was its folder lies in {folder / 'revoked'}")


@deploys.command("renew")
def renew_command(
    folder: Folder,
    host: Annotated[
        list[str], typer.Option(help="Other names or addresses of the server; repeat it.")
    ] = [],  # noqa: B006
    ca_key: Annotated[
        Path | None, typer.Option(help="The authority's ca.key, where it is kept elsewhere.")
    ] = None,
    certificate: Annotated[
        Path | None, typer.Option(help="One by your own authority, with its intermediates, in PEM.")
    ] = None,
    key: Annotated[Path | None, typer.Option(help="Its key, in PEM, without a password.")] = None,
    authority: Annotated[
        Path | None, typer.Option(help="Your authority's own certificates, if they are others now.")
    ] = None,
) -> None:
    """Make a new server certificate by the same authority, or take one by your own."""
    from fedex_lora.flower.deploy.changes import renew, take
    from fedex_lora.flower.deploy.names import host_names

    hosts, handed_out = host_names(host) if host else [], False
    if certificate is not None and key is not None and ca_key is None:
        until, handed_out = take(folder, certificate, key, authority, hosts)
    elif certificate or key or authority:
        raise RecipeError("--certificate: goes with --key, and not with --ca-key")
    else:
        until = renew(folder, hosts, ca_key)
    if handed_out:
        say(f"Hand {folder / 'server' / 'ca.crt'} out: it replaces ca.crt in all clients' folders.")
    say(f"{folder / 'server' / 'server.pem'} is good until {until:%Y-%m-%d}.")
    say("Start `deploy server` anew: clients and runs wait for it.")


@deploys.command("server")
def server_command(folder: Folder, log_json: LogJson = False) -> None:
    """Serve clients and runs until Ctrl-C (prints the Flower commands it runs)."""
    from fedex_lora.flower.deploy.init import read_deployment
    from fedex_lora.flower.deploy.keys import check_certificate
    from fedex_lora.flower.deploy.processes import alone, serve

    deployment = read_deployment(folder)
    if deployment.insecure:
        say(INSECURE)
    elif (
        soon := check_certificate(folder / "server", (*deployment.hosts, "127.0.0.1"))
    ) is not None:
        say(f"warning: {soon}")
    with alone(folder, "deploy server"):
        serve(folder.resolve(), deployment, tell)
    _say_ended()


@deploys.command("client")
def client_command(
    folder: ClientFolder,
    recipe: Annotated[Path, typer.Option(help="The agreed recipe, on this machine.")],
    name: Annotated[str, typer.Option(help="The institution's name.")],
    data: Annotated[Path | None, typer.Option(help="Its rows: JSON Lines, CSV or Parquet.")] = None,
    runs: Annotated[
        int, typer.Option(min=0, help="In how many runs it takes part in all; see deploy allow.")
    ] = 1,
    ask: Annotated[bool, typer.Option("--ask", help="Ask here before every run.")] = False,
    host: Annotated[
        str | None, typer.Option(help="Another of the server's names than the first.")
    ] = None,
    epsilon: Annotated[
        float | None,
        typer.Option(help="ε that its rows may cost over all runs; needs a private recipe."),
    ] = None,
    check: Annotated[bool, typer.Option(help="Read all rows before connecting.")] = True,
    port: Annotated[int, typer.Option(help="A free port of this machine; 0 finds one.")] = 0,
    ca: Annotated[
        Path | None, typer.Option(help="Certificates to trust in place of the folder's ca.crt.")
    ] = None,
    proxy: Annotated[
        str | None, typer.Option(help="http://HOST:PORT; by default as HTTPS_PROXY says.")
    ] = None,
    monitor: Address = None,
    log_json: LogJson = False,
    show_rows: ShowRows = False,
) -> None:
    """Take part as one institution until Ctrl-C (prints the Flower commands it runs)."""
    from fedex_lora.engines.private.begin import PRIVACY, own_account
    from fedex_lora.engines.remote.consent import FILE, Consent
    from fedex_lora.flower.deploy import commands, processes
    from fedex_lora.flower.deploy.asking import Asking, said_so_far
    from fedex_lora.flower.deploy.init import client_folder, new_folders, read_deployment
    from fedex_lora.flower.deploy.keys import check_private_key
    from fedex_lora.flower.deploy.names import host_name
    from fedex_lora.flower.deploy.proxy import proxy_for, trusted

    own = client_folder(folder, name)
    deployment = read_deployment(own)
    if host is not None:
        deployment = replace(deployment, host=host_name(host))
    if name not in deployment.clients:
        raise RecipeError(f"--name: {name!r}; this folder is for {some(deployment.clients)}")
    if ask and not sys.stdin.isatty():
        raise RecipeError("--ask: nobody can answer here; start it at a terminal, or use --runs")
    if not deployment.insecure:
        check_private_key(own / "key")
    if epsilon is not None and not 0 < epsilon < math.inf:
        raise RecipeError(f"--epsilon: expected a number above 0, got {epsilon:g}")
    spec = read_recipe(recipe, [])
    account = own_account(spec, own / PRIVACY, data, "", epsilon)
    if spec.privacy.secure_aggregation is not None and not deployment.insecure:
        _show_roster(own)
    if check:
        from fedex_lora.engines.rows import client_rows
        from fedex_lora.engines.setup import recipe_task

        client_rows(spec, recipe_task(spec), name, data)
        say("the rows can be used")
    if port:
        processes.check_port(port)
    if deployment.insecure and (proxy or ca):
        raise RecipeError("`proxy`, `ca`: this deployment is on one machine, without TLS")
    certificates, by = None, proxy_for(deployment.host, proxy)
    with processes.alone(own, "deploy client"):
        if not deployment.insecure:
            processes.check_server(deployment, certificates := trusted(own, ca), say, by)
        new_folders(own, own / "cache", own / "flower")
        consent = Consent(own / FILE, runs, ask)
        say(said_so_far(consent, folder))
        if account is not None:
            of = "" if epsilon is None else f" of {epsilon:g}"
            say(f"its rows have cost ε = {account.total():.4g}{of} so far ({own / PRIVACY})")
        rows, port = None if data is None else data.resolve(), port or processes.free_port()
        settings: dict[str, float] = {"runs": runs, "ask": int(ask), "show-rows": int(show_rows)}
        settings |= {} if epsilon is None else {"epsilon": float(epsilon)}
        node = commands.supernode(
            own, deployment, name, recipe.resolve(), rows, port, certificates, by, **settings
        )
        programs = [node, commands.client_superexec(own, port)]
        _attend(programs, own, name, spec.federation.rounds, Asking(consent, say), monitor)
    _say_ended()


def _show_roster(own: Path) -> None:
    """Whose signatures this institution believes under secure aggregation."""
    from fedex_lora.flower.deploy.roster import fingerprints, signer

    if signer(own) is None:
        raise RecipeError(f"{own}: no keys there; `deploy init` with --insecure makes none")
    for name, text in fingerprints(own).items():
        say(f"{name}: {text}")
    say(f"these keys are believed ({own / 'roster'}); compare them with the institutions")


@deploys.command("roster")
def roster_command(
    folder: ClientFolder,
    name: Annotated[str, typer.Option(help="The institution's, in a folder of several.")] = "",
) -> None:
    """Show the keys by which this institution knows the others under secure aggregation."""
    from fedex_lora.flower.deploy.init import client_folder, read_deployment

    own = client_folder(folder, name)
    read_deployment(own)
    _show_roster(own)


@deploys.command("key")
def key_command(
    folder: Annotated[Path, typer.Argument(help="The institution's folder, or the deployment.")],
    name: Annotated[str, typer.Option(help="The institution's name.")],
    public: Annotated[
        Path | None, typer.Option(help="At the coordinator: the key.pub that it sent.")
    ] = None,
) -> None:
    """Make this institution's own key pair; or, with --public, take what another one has made."""
    from fedex_lora.flower.deploy.changes import tell_server
    from fedex_lora.flower.deploy.init import client_folder, read_deployment
    from fedex_lora.flower.deploy.roster import own_pair, take_public

    deployment = read_deployment(folder)
    if name not in deployment.clients or deployment.insecure:
        raise RecipeError(f"--name: {name!r} has no key here; {some(deployment.clients)} may have")
    if public is not None:
        take_public(folder, name, public)
        tell_server(folder, say)
        say(f"{name} is known by {public} now")
        return
    own = client_folder(folder, name)
    own_pair(own, name)
    say(f"Send {own / 'key.pub'} to the coordinator: deploy key DEPLOYMENT --name {name} --public")
    say(f"and to the other institutions, who put it into FOLDER/roster/{name}.pub.")


def _attend(
    programs: Sequence[Command],
    own: Path,
    name: str,
    rounds: int,
    asking: Asking,
    monitor: str | None,
) -> None:
    """Runs a client's processes until Ctrl-C, with figures of it at `monitor`."""
    from fedex_lora.engines.remote.audit import FILE, appended
    from fedex_lora.flower.deploy.processes import attend

    messages = appended(own / FILE)
    with ExitStack() as stack:
        figures: Figures | None = None
        if monitor is not None:
            check_installed("prometheus_client", "--monitor")
            from fedex_lora.flower.deploy.figures import Figures
            from fedex_lora.runs.monitor import answering

            figures = Figures(name, rounds)
            stack.enter_context(answering(figures, monitor, say))

        def show(text: str, trouble: bool | None = None) -> None:
            tell(text, trouble)
            if figures is not None:
                figures.heard(text)

        def look() -> None:
            asking.look()
            for line in next(messages):
                emit("message", **line)
                if figures is not None:
                    figures.message(line)

        attend(programs, show, own / "flower.log", look)


def _say_ended() -> None:
    """After Ctrl-C."""
    complain(f"ended; this goes on:\n  {this_command()}")


@deploys.command("export")
def export_command(
    folder: ClientFolder,
    recipe: Annotated[Path, typer.Option(help="The agreed recipe, on this machine.")],
    name: Annotated[str, typer.Option(help="The institution's name.")],
    run: Annotated[
        str, typer.Option(help="First digits of the run's number; the newest if not.")
    ] = "",
    as_: Annotated[Literal["model", "adapter"], typer.Option("--as")] = "adapter",
    out: Out = None,
) -> None:
    """Write the model that this institution holds of a run: its own, where each has its own."""
    from fedex_lora.cli.runs import show_export
    from fedex_lora.flower.deploy.init import client_folder
    from fedex_lora.runs.export import export_adapter, export_model
    from fedex_lora.runs.held import open_held

    own = client_folder(folder, name)
    trained = open_held(own / "cache", read_recipe(recipe, []), name, run)
    path = out or own / "final" / f"{as_}-round{trained.state.version}"
    whose = name if trained.settings.method.personal else None
    export = export_model if as_ == "model" else export_adapter
    exported = export(trained, path, client=whose)
    say(f"Written: {path}")
    show_export(exported, trained.recipe)


@deploys.command("allow")
def allow_command(
    folder: ClientFolder,
    runs: Annotated[int, typer.Option(min=1, help="How many more.")] = 1,
    name: Annotated[str, typer.Option(help="The institution's, in a folder of several.")] = "",
) -> None:
    """Say that this institution takes part in one more run; `deploy client` need not be stopped."""
    from fedex_lora.engines.remote.consent import FILE, Consent
    from fedex_lora.flower.deploy.init import client_folder, read_deployment

    own = client_folder(folder, name)
    if len(names := read_deployment(own).clients) != 1 or (own / "server").exists():
        raise RecipeError(f"{own}: not one institution's folder; use --name: {some(names)}")
    consent = Consent(own / FILE)
    consent.allow(runs)
    say(f"{own}: takes part in {runs} more run{'s' if runs > 1 else ''}")
