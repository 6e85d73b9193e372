"""Running commands as a user does."""

import re

import pytest

from bnsurgery.cli import main


@pytest.fixture
def cli(tmp_path, monkeypatch, capfd):
    """Run a command in an empty folder; returns (exit code, stdout, stderr).

    Texts name options that the command has, and no field of the library, unless `fields` is true.
    """
    monkeypatch.chdir(tmp_path)

    def run(*args, fields=False):
        with pytest.raises(SystemExit) as exit_:
            main([str(arg) for arg in args])
        out, err = capfd.readouterr()
        assert "Traceback" not in err
        assert fields or not re.search(r"`\w+(=[^`]*)?`", err), err
        assert fields or "--json" in args or not re.search(r"`\w+=[^`]*`", out), out
        return exit_.value.code, out, err

    return run
