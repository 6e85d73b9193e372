"""The `bnsurgery` command: one file per subcommand, loaded when it is called, so that help needs no torch."""

import importlib
import io
import os
import sys
import warnings
from collections.abc import Sequence

import click

from bnsurgery._version import __version__
from bnsurgery.errors import BNSurgeryError, BNSurgeryWarning, printable
from bnsurgery.machine.system import require_torch

from .options import with_flags

_COMMANDS = ("insert", "plan", "verify", "finetune", "compare", "report", "predict", "fold", "export", "archs")
_MAX_LINE, _MAX_LINES = 2000, 200  # characters; of a message


class _LazyGroup(click.Group):
    """Finds the subcommand `name` in the sibling module `cmd_<name>`."""

    at_hand: click.Command | None = None  # the command that runs, once it is known: messages name its options

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        self.at_hand = importlib.import_module(f".cmd_{cmd_name}", __name__).command
        return self.at_hand


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
    """Run the command line and exit: 0 success, 1 refused or failed, 2 wrong usage, 130 interrupted.

    The one place where errors and warnings become messages: bad input gives no traceback, and a message names the
    options of the command instead of the library's fields.
    """
    for stream in (sys.stdout, sys.stderr):  # a terminal without UTF-8, a file name that is not UTF-8
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", BNSurgeryWarning)
    warnings.showwarning = lambda message, *_, **__: _complain(str(message), "Warning", "yellow")
    cli.at_hand = None
    code = 1
    try:
        returned = cli.main(args=args, prog_name="bnsurgery", standalone_mode=False)
        code = returned if isinstance(returned, int) else 0
    except click.ClickException as error:
        error.show(usage := io.StringIO())
        click.echo(_printable(usage.getvalue().rstrip(), indent=""), err=True)
        code = error.exit_code
    except (click.Abort, KeyboardInterrupt):
        sys.unraisablehook = lambda _: None  # an interrupted progress bar complains when it is freed
        _complain("interrupted; nothing was written.")
        code = 130
    except BNSurgeryError as error:
        _complain(str(error))
        code = 128 + getattr(error, "signum", 1 - 128)
    except BrokenPipeError:  # the reader has gone, as in `bnsurgery archs | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except MemoryError:
        _complain("out of memory: use fewer images at a time, or smaller ones.")
    except OSError as error:
        _complain(f"{error.filename or 'standard output, perhaps after a file was written'}: {error.strerror or error}")
    if args is None:
        sys.stdout = sys.stderr  # a library that prints as the process ends does not spoil the output
    sys.exit(code)


def _complain(message: str, kind: str = "Error", colour: str = "red") -> None:
    color = False if os.environ.get("NO_COLOR") else None
    click.echo(f"{click.style(f'{kind}:', fg=colour, bold=True)} {_printable(message)}", err=True, color=color)


def _printable(message: str, indent: str = "  ") -> str:
    """The message with flags, in which no name from a file steers the terminal, fills it, or looks like a message."""
    lines = with_flags(message, cli.at_hand).split("\n")[:_MAX_LINES]
    return f"\n{indent}".join(printable(line, _MAX_LINE) for line in lines)
