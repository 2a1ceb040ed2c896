"""Text of the files that `deploy init` writes."""

from __future__ import annotations

APP = """\
# The thin Flower app of this federation: its code is the installed package fedex-lora, so nothing
# but this file travels. `fedex-lora run --engine flower` fills in [tool.flwr.app.config].
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "fedex-lora-app"
version = "1.0.0"
description = "Federated LoRA across machines"
license = "Apache-2.0"
dependencies = []

[tool.hatch.build.targets.wheel]
packages = ["."]

[tool.flwr.app]
publisher = "fedex-lora"

[tool.flwr.app.components]
serverapp = "fedex_lora.flower.server_app:app"
clientapp = "fedex_lora.flower.client_app:app"

[tool.flwr.app.config]
folder = ""
recipe = ""
out = ""
progress = ""
resume = false
show-rows = false
"""

CONNECTION = """\
# Where Flower's own commands find this federation's SuperLink; FLWR_HOME names this folder.
[superlink]
default = "fedex"

[superlink.fedex]
address = "{address}"
{security}
"""

SERVER_UNIT = """\
# The coordinator as a service: copy to /etc/systemd/system/fedex-lora-server.service, then
#   systemctl daemon-reload && systemctl enable --now fedex-lora-server
[Unit]
Description=fedex-lora coordinator (Flower SuperLink)
After=network-online.target
Wants=network-online.target

[Service]
# the account that owns the folder; runs are written with its rights
User={user}
WorkingDirectory={folder}
ExecStart={program} deploy server {folder}
Restart=on-failure
# its children are ended with it
KillMode=control-group
TimeoutStopSec=30

[Install]
WantedBy=multi-user.target
"""

CLIENT_UNIT = """\
# One institution as a service: copy to /etc/systemd/system/fedex-lora-client.service, set the
# three paths below, then systemctl daemon-reload && systemctl enable --now fedex-lora-client
[Unit]
Description=fedex-lora client {name} (Flower SuperNode)
After=network-online.target
Wants=network-online.target

[Service]
# an account that may read the rows and nothing else of value: see docs/deploy.md, Trust
User=fedex
WorkingDirectory=/srv/fedex-lora/{name}
ExecStart={program} deploy client /srv/fedex-lora/{name} --name {name} \\
    --recipe /srv/fedex-lora/{name}/recipe.yaml --data /srv/fedex-lora/{name}/rows.jsonl
# a coordinator that is down or refuses a node which it still takes for online: try again
# (it takes part in one run for all that; for another: fedex-lora deploy allow FOLDER, or --runs)
Restart=always
RestartSec=20
KillMode=control-group

[Install]
WantedBy=multi-user.target
"""

COMPOSE = """\
# The same in containers. `image`, by the Dockerfile of the sources: docker build -t fedex-lora .
services:
  server:                                  # at the coordinator
    image: fedex-lora
    command: fedex-lora deploy server /deployment
    volumes: ["./:/deployment", "./runs:/runs"]
    # the control paths answer on loopback only, so start runs inside:
    #   docker compose exec server fedex-lora run /deployment/recipe.yaml --engine flower \\
    #     --deployment /deployment --out /runs/first
    ports: ["{port}:{port}"]
    restart: unless-stopped
{clients}"""

COMPOSE_CLIENT = """\
  {name}:                                  # at that institution, on its own machine
    image: fedex-lora
    command: >-
      fedex-lora deploy client /client --name {name}
      --recipe /client/recipe.yaml --data /data/rows.jsonl
    volumes: ["./clients/{name}:/client", "/path/to/rows.jsonl:/data/rows.jsonl:ro"]
    restart: unless-stopped
"""

CLIENT_README = """\
This folder is for {name} alone: `key` is its private key. Hand it over by a way you trust.

    pip install 'fedex-lora[flower]=={version}'
    fedex-lora deploy client . --name {name} --recipe RECIPE.yaml --data ROWS.jsonl

The recipe is the coordinator's, on your own disk: read it before you agree to it. Only model.name
(where the same model lies on your machine) and engine.threads may differ.

That is one run. For another one: fedex-lora deploy allow . (or --runs 2, or --ask). All messages
are in audit.jsonl.
"""
