"""Entry point of the `bnncc` command: errors become one line on stderr and exit status 2.

The commands stand in `bnncc.commands`, imported late: a plain `pip install bnncc` lacks what they need.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from bnncc.runtime.errors import BnnccError

ERROR = 2
INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line and exits: 0 done, 1 a validation found differences, 2 an error, 130 interrupted."""
    sys.exit(run(arguments))


def run(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line on `arguments` (default: those of the process) and returns the exit status."""
    try:
        import click

        from bnncc.commands import bnncc
    except ModuleNotFoundError as error:
        return _fail(f"the command line needs the package '{error.name}': pip install 'bnncc[compile]'")
    try:
        return bnncc.main(arguments, prog_name="bnncc", standalone_mode=False) or 0
    except click.exceptions.NoArgsIsHelpError as error:
        print(error.format_message())
        return 0
    except click.ClickException as error:
        return _fail(error.format_message())
    except BnnccError as error:
        return _fail(str(error))
    except (click.Abort, KeyboardInterrupt):
        print(file=sys.stderr)
        return INTERRUPTED


def _fail(message: str) -> int:
    print("error:", " ".join(message.split()), file=sys.stderr)
    return ERROR
