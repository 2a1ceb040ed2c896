"""A client behind a proxy, and one whose authority is its own."""

from __future__ import annotations

from base64 import b64encode
from pathlib import Path

import pytest
from flwr.supercore.protobuf.client import ProtobufClient
from small_runs import recipe as tiny_recipe

from engines.deployed import Deployed
from engines.proxies import tunnelling
from engines.test_deploy_files import tls_server
from engines.test_deployment import across
from fedex_lora.errors import UserError
from fedex_lora.flower.deploy import commands
from fedex_lora.flower.deploy.init import Deployment, init, read_deployment
from fedex_lora.flower.deploy.launch import launch
from fedex_lora.flower.deploy.processes import check_server, free_port
from fedex_lora.flower.deploy.proxy import Proxy, proxy_for, trusted
from fedex_lora.recipe.reader import dump_recipe
from fedex_lora.runs.lock import interrupted_by_signals
from fedex_lora.runs.watch import Silent

HOST = "fed.example.org"


@pytest.fixture
def d(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    init(tmp_path / "d", Deployment(HOST, 9443, ("ann",)))
    return tmp_path / "d"


def test_which_proxy(d: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert proxy_for(HOST) is None
    monkeypatch.setenv("HTTPS_PROXY", "http://me:p%40ss@proxy.org:3128")
    found = proxy_for(HOST)
    assert found is not None and str(found) == "proxy.org:3128"
    told = "Basic " + b64encode(b"me:p@ss").decode()
    assert found.headers() == {"Proxy-Authorization": told}
    assert proxy_for("127.0.0.1") is None
    monkeypatch.setenv("NO_PROXY", ".example.org,other")
    assert proxy_for(HOST) is None
    assert proxy_for(HOST, "far:8080") == Proxy("http://far:8080")  # what is named counts
    for odd in ("socks5://x:1", "http://:80", "http://x:port"):
        with pytest.raises(UserError, match="`proxy`: expected http://HOST:PORT"):
            proxy_for(HOST, odd)


def test_the_way_through_a_proxy_is_tried_and_what_is_wrong_with_it_named(d: Path) -> None:
    certificates, said = trusted(d / "clients" / "ann", None), list[str]()
    with tls_server(d) as port, tunnelling() as tunnels:
        there = Deployment(HOST, port, ("ann",))

        def check(address: str = f"http://127.0.0.1:{tunnels.port}") -> None:
            check_server(there, certificates, said.append, Proxy(address))

        tunnels.status = "403 Forbidden"
        with pytest.raises(UserError, match=r"proxy .* does not let through .*: 403 Forbidden"):
            check()
        tunnels.status, tunnels.word = "", "Basic " + b64encode(b"me:word").decode()
        with pytest.raises(UserError, match="407 Proxy Authentication"):
            check()
        with pytest.raises(UserError, match=r"proxy 127\.0\.0\.1:.* does not answer: .*NO_PROXY"):
            check(f"http://127.0.0.1:{free_port()}")
        tunnels.status, tunnels.word = "503 Down", ""
        check()  # the server may be down; it is waited for
        assert "does not answer yet" in said.pop()
        tunnels.status, tunnels.word = "", "Basic " + b64encode(b"me:word").decode()
        check(f"http://me:word@127.0.0.1:{tunnels.port}")
        assert not said and set(tunnels.asked) == {f"CONNECT {HOST}:{port}"}


def test_flower_s_client_goes_through_the_proxy_and_past_it_on_this_machine(
    d: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_PROXY", HOST)  # overruled by what is named
    ann = d / "clients" / "ann"
    executor = commands.client_superexec(ann, 5).env
    with tls_server(d) as port, tunnelling() as tunnels:
        there, proxy = Deployment(HOST, port, ("ann",)), Proxy(f"http://127.0.0.1:{tunnels.port}")
        node = commands.supernode(ann, there, "ann", d, None, 1, None, proxy)
        for key, value in node.env.items():
            monkeypatch.setenv(key, value)
        root = Path(node.argv[node.argv.index("--root-certificates") + 1]).read_bytes()
        client = ProtobufClient.from_server_address(there.address, False, root, [])
        assert client._client.get(f"https://{there.address}/health").status_code == 200
        assert tunnels.asked == [f"CONNECT {HOST}:{port}"]
    assert executor["NO_PROXY"] == f"{HOST},127.0.0.1,localhost,::1"
    with tls_server(d) as port, tunnelling() as tunnels:
        for name in ("HTTPS_PROXY", "https_proxy", "HTTP_PROXY"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{tunnels.port}")
        for key, value in executor.items():
            monkeypatch.setenv(key, value)
        here = ProtobufClient.from_server_address(f"127.0.0.1:{port}", False, root, [])
        assert here._client.get(f"https://127.0.0.1:{port}/health").status_code == 200
        assert not tunnels.asked
    direct = commands.supernode(ann, there, "ann", d, None, 1).env
    assert "HTTPS_PROXY" not in direct and HOST in direct["NO_PROXY"].split(",")


def test_an_authority_of_one_s_own(d: Path, tmp_path: Path) -> None:
    init(tmp_path / "other", Deployment("127.0.0.1", 9443, ("ann",)))
    ann, theirs = d / "clients" / "ann", tmp_path / "other" / "ca" / "ca.crt"
    bundle, said = tmp_path / "bundle.pem", list[str]()
    bundle.write_bytes("# Autorité de l'hôpital\n".encode() + theirs.read_bytes())
    refused = pytest.raises(UserError, match=r"certificate is not accepted: .* with `ca`")
    with tls_server(tmp_path / "other") as port, refused:
        check_server(Deployment("127.0.0.1", port, ("ann",)), trusted(ann, None), said.append)
    own = trusted(ann, bundle)
    assert own.read_bytes() == theirs.read_bytes()  # without the remark, which Flower cannot read
    with tls_server(tmp_path / "other") as port:
        there = Deployment("127.0.0.1", port, ("ann",))
        check_server(there, own, said.append)
        assert not said
    node = commands.supernode(ann, there, "ann", d, None, 1, own)
    assert node.argv[node.argv.index("--root-certificates") + 1] == str(own)
    bundle.write_text("nothing")
    with pytest.raises(UserError, match=r"bundle\.pem: no certificates of an authority"):
        trusted(ann, bundle)


@pytest.mark.deployment
def test_a_run_goes_through_a_proxy_which_server_and_superexec_do_not_ask(tmp_path: Path) -> None:
    deployment = Deployed(tmp_path / "deployment", ["ann"])
    if deployment.host == "127.0.0.1":
        pytest.skip("this machine has no address but loopback, which needs no proxy")
    text = deployment.folder / "recipe.yaml"
    data = {"clients": [tmp_path / "data" / "ann.jsonl"]}
    blocks = {"federation": {"clients": 1}, "evaluation": {"where": "clients"}, "data": data}
    spec = across(tiny_recipe(tmp_path, **blocks), min_clients=1)
    text.write_text(dump_recipe(spec))
    with interrupted_by_signals(), tunnelling() as tunnels:
        deployment.environment["HTTPS_PROXY"] = f"http://127.0.0.1:{tunnels.port}"
        try:
            deployment.start_server()
            assert not tunnels.asked
            deployment.start_client("ann", text, tmp_path / "data" / "ann.jsonl")
            results = launch(spec, tmp_path / "run", deployment.folder, False, Silent())
        finally:
            deployment.end()
        port = read_deployment(deployment.folder).port
        assert {*tunnels.asked} == {f"CONNECT {deployment.host}:{port}"}
    assert results is not None and results["rounds"] == spec.federation.rounds
