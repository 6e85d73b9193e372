"""Running commands as a user does."""

import pytest

from bnsurgery.cli import main


@pytest.fixture
def cli(tmp_path, monkeypatch, capfd):
    """Run a command in an empty folder; returns (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(*args):
        with pytest.raises(SystemExit) as exit_:
            main([str(arg) for arg in args])
        out, err = capfd.readouterr()
        assert "Traceback" not in err
        return exit_.value.code, out, err

    return run
