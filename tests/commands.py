"""The command line as a fixture; import it where it is used."""

import pytest

from fedex_lora import cli


@pytest.fixture
def command(capsys, monkeypatch):
    """Runs a command; returns (exit code, output, errors)."""

    def call(*arguments):
        monkeypatch.setattr("sys.argv", ["fedex-lora", *map(str, arguments)])
        monkeypatch.setattr(cli.console, "width", 200)
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code or 0
        said = capsys.readouterr()
        return code, said.out, said.err

    return call
