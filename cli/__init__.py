"""The `bnsurgery` command: one file per subcommand, loaded when it is called, so that help needs no torch."""

import importlib
import io
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Any

import click

from bnsurgery._version import __version__
from bnsurgery.errors import BNSurgeryError, BNSurgeryWarning, printable
from bnsurgery.machine.torch_version import require_torch

_COMMANDS = ("insert", "plan", "verify", "finetune", "compare", "report", "predict", "fold", "export", "archs")
_MAX_LINE, _MAX_LINES = 2000, 200  # characters; of a message


class _LazyGroup(click.Group):
    """Finds the subcommand `name` in the sibling module `cmd_<name>`."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        command: click.Command = importlib.import_module(f".cmd_{cmd_name}", __name__).command
        return command


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, package_name="bnsurgery")
def cli() -> None:
    """Put BatchNorm into a pretrained network without changing what it computes.

    \b
      bnsurgery insert vgg16                  the same function, with BatchNorm
      bnsurgery verify vgg16-bn.safetensors   prove it
      bnsurgery finetune vgg16 --data DIR     train it on your images
      bnsurgery compare vgg16 --data DIR      does BatchNorm help on them?
      bnsurgery fold vgg16-bn.safetensors     back to the original architecture

    Every command has its own --help.
    """  # noqa: D301 (the \b is click's: leave the lines as they are)
    require_torch()


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 1 refused or failed, 2 wrong usage, 130 interrupted.

    The one place where errors become messages: no traceback for bad input.
    """
    for stream in (sys.stdout, sys.stderr):  # a terminal without UTF-8, a file name that is none
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", BNSurgeryWarning)
    warnings.showwarning = _show_warning
    try:
        code = cli.main(args=args, prog_name="bnsurgery", standalone_mode=False)
    except click.ClickException as error:
        error.show(usage := io.StringIO())
        click.echo(_printable(usage.getvalue()), err=True, nl=False)
        code = error.exit_code
    except (click.Abort, KeyboardInterrupt):
        sys.unraisablehook = lambda _: None  # a progress bar that was interrupted half-made complains when it is freed
        code = _fail("interrupted; nothing was written.", 130)
    except BNSurgeryError as error:
        code = _fail(str(error), 128 + getattr(error, "signum", 1 - 128))
    except BrokenPipeError:  # the reader has gone, as in `bnsurgery archs | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except MemoryError:
        code = _fail("out of memory: try a smaller --batch-size or --image-size.")
    except OSError as error:
        code = _fail(
            f"{error.filename or 'standard output, perhaps after a file was written'}: {error.strerror or error}"
        )
    sys.exit(code if isinstance(code, int) else 0)


def _fail(message: str, code: int = 1) -> int:
    _complain("Error", "red", message)
    return code


def _complain(what: str, colour: str, message: Warning | str) -> None:
    color = False if os.environ.get("NO_COLOR") else None
    click.echo(f"{click.style(f'{what}:', fg=colour, bold=True)} {_printable(str(message))}", err=True, color=color)


def _printable(message: str) -> str:
    """Names in it come from files and their names: none steers the terminal, fills it, or passes for a message."""
    return "\n  ".join(printable(line, _MAX_LINE) for line in message.split("\n")[:_MAX_LINES])


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    _complain("Warning", "yellow", message)
