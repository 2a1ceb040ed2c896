"""What people see of Flower's processes."""

import stat
import sys
import time

from fedex_lora.flower.deploy import words
from fedex_lora.flower.deploy.commands import Command
from fedex_lora.flower.deploy.processes import running
from fedex_lora.flower.deploy.words import Log, shown

# as flower-supernode and its apps print it
SESSION = """\
\x1b[92mINFO \x1b[0m:      Starting Flower SuperNode
\x1b[93mWARNING \x1b[0m:   EXPERIMENTAL: SuperExec authentication is experimental and may change.
INFO:     Started server process [5985]
\x1b[92mINFO \x1b[0m:      FastAPI lifespan: startup
INFO:     Uvicorn running on http://127.0.0.1:49471 (Press CTRL+C to quit)
\x1b[93mWARNING \x1b[0m:   Connection attempt failed, retrying in 0.53 seconds
\x1b[93mWARNING \x1b[0m:   Connection attempt failed, retrying in 1.47 seconds
\x1b[92mINFO \x1b[0m:      SuperNode ID: 10686340674967515786
\x1b[92mINFO \x1b[0m:      Connection successful after 12.49 seconds and 6 tries.
\x1b[92mINFO \x1b[0m:      \n\
\x1b[92mINFO \x1b[0m:      [RUN 1672580230902529274, ROUND 1]
\x1b[92mINFO \x1b[0m:      Receiving: train message (ID: dc518dfd7f548379d04008ff1e21bd50417d9e1)
\x1b[92mINFO \x1b[0m:      Received successfully
run 9357e544, round 1 of 3: 9.1 kB received, 5 rows here
run 9357e544, round 1 of 3: trained, loss 1.139, 5.1 kB to send
\x1b[92mINFO \x1b[0m:      \n\
\x1b[92mINFO \x1b[0m:      Sending: train message (ID: df7206ffd19ddda77390eee6588f916859c4346b8)
\x1b[92mINFO \x1b[0m:      Sent successfully
"""
REFUSED = """\
\x1b[93mWARNING \x1b[0m:   Giving up reconnection after 2.04 seconds and 3 tries.
\x1b[91mERROR \x1b[0m:     Exit Code: 305
Failed to initialize the connection to the SuperLink.
[code: 2004] refused
refused: its key was revoked (deploy revoke)
The SuperNode could not establish a connection to the SuperLink.

For more information, visit: <https://flower.ai/docs/framework/1.41/en/ref-exit-codes/305.html>
INFO:     Shutting down
"""
WORDS = "the server refuses this client: its key was revoked (deploy revoke)"


def told(log, lines):
    for line in lines.splitlines():
        log.take(line, "SuperNode")


def make(tmp_path):
    said = []
    return said, Log(lambda text, trouble: said.append(text), tmp_path / "flower.log")


def test_a_client_s_log_is_a_line_for_each_step_and_no_warning(tmp_path):
    said, log = make(tmp_path)
    told(log, SESSION)
    assert said == [
        "the server does not answer; trying again",
        "connected to the server; waiting for the coordinator",
        "the server answers",
        "run 9357e544, round 1 of 3: 9.1 kB received, 5 rows here",
        "run 9357e544, round 1 of 3: trained, loss 1.139, 5.1 kB to send",
        "sent; waiting for the coordinator",
    ]
    whole = (tmp_path / "flower.log").read_text()
    assert "SuperNode ID: 10686340674967515786" in whole and "\x1b" not in whole
    assert stat.S_IMODE((tmp_path / "flower.log").stat().st_mode) == 0o600


def test_a_refusal_is_words_and_comes_once(tmp_path, monkeypatch):
    said, log = make(tmp_path)
    for _ in range(5):
        told(log, REFUSED)
        log.say("SuperNode ended (1); starting it again", trouble=True)
    assert said == [WORDS, "SuperNode ended (1); starting it again"]
    assert log.last == WORDS  # why it does not stay up, in the end
    log.say("connected to the server")
    told(log, REFUSED)
    assert said[2:] == ["connected to the server", WORDS]
    monkeypatch.setattr(words, "_AGAIN", 0.0)
    told(log, REFUSED)
    assert said[4:] == [WORDS]


def test_what_another_process_says_of_its_connection_is_not_about_the_server():
    line = "\x1b[93mWARNING \x1b[0m:   Connection attempt failed, retrying in 0.53 seconds"
    assert shown(line, "SuperExec") == (None, True)
    assert shown(line, "SuperNode")[0] == "the server does not answer; trying again"


def test_what_nobody_foresaw_is_shown():
    line = "\x1b[91mERROR \x1b[0m:     the disk is on fire"
    assert shown(line) == ("the disk is on fire", True)
    assert shown("Traceback (most recent call last):")[0] == "Traceback (most recent call last):"
    assert shown("refused ann at 10.0.0.9: its clock is some 3600 s ahead")[0]  # the server's own


def test_a_program_s_output_is_shown_in_words_and_kept_whole(tmp_path):
    script = "import sys; print('INFO :      SuperNode ID: 1'); print('INFO :  x', file=sys.stderr)"
    said, log = [], tmp_path / "log"
    command = Command("SuperNode", (sys.executable, "-c", script), {})
    with running([command], lambda text, trouble=None: said.append(text), log) as ended:
        until = time.monotonic() + 30
        while "starting it again" not in " ".join(said) and time.monotonic() < until:
            ended()
            time.sleep(0.05)
    assert said[0].startswith("$ ") and any("connected to the server" in text for text in said)
    assert sorted(log.read_text().split("\n")) == ["", "INFO :      SuperNode ID: 1", "INFO :  x"]


def test_a_large_log_is_set_aside(tmp_path, monkeypatch):
    monkeypatch.setattr(words, "_LARGE", 10)
    (tmp_path / "flower.log").write_text("x" * 11)
    told(make(tmp_path)[1], "INFO : y")
    assert (tmp_path / "flower.log").read_text() == "INFO : y\n"
    assert (tmp_path / "flower.log.old").read_text() == "x" * 11


def test_a_full_disk_does_not_keep_people_in_the_dark(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(words, "append_private", full)
    said, log = make(tmp_path)
    told(log, SESSION)
    assert "sent; waiting for the coordinator" in said
