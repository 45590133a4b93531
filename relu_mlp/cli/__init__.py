"""The command line: ``relu-mlp info`` and the rest, also as ``python -m relu_mlp``.

A command is a module beside this one, with a docstring that becomes its help, an
`EXAMPLE`, `add_arguments(parser)` and `run(options)`, which returns the exit
status. What needs an optional package imports it with `needs`, when it runs. What
the person at the terminal can mend is a `Problem`: one line and exit status 2.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from typing import Any

from .._version import __version__

#: In the order in which `relu-mlp --help` lists them.
COMMANDS = ("info", "check", "train", "predict", "bench")


class Problem(Exception):
    """What the person at the terminal can mend; the text says how, in one line."""


def needs(package: str, extra: str, purpose: str) -> Any:
    """Imports an optional package; a `Problem` that names the extra if it is missing."""
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name is None or not package.startswith(error.name):
            raise
        raise Problem(
            f"{purpose} needs {error.name}, which is not installed: "
            f"pip install 'relu-mlp[{extra}]', or {error.name} by itself"
        ) from None


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="relu-mlp",
        description="A fused multilayer perceptron for PyTorch, at the terminal.",
        epilog="`relu-mlp COMMAND --help` shows an example of each.",
    )
    top.add_argument("--version", action="version", version=f"relu-mlp {__version__}")
    commands = top.add_subparsers(title="commands", dest="command", required=True, metavar="")
    for name in COMMANDS:
        module: Any = importlib.import_module(f".{name}", __name__)
        command = commands.add_parser(
            name,
            help=module.__doc__.splitlines()[0].rstrip("."),
            description=module.__doc__,
            epilog=f"example:\n  {module.EXAMPLE}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status.

    Args:
        arguments: without the program's name; by default those of the process.

    Raises:
        SystemExit: with status 2 where argparse refuses the arguments.
    """
    options = parser().parse_args(arguments)
    try:
        return int(options.run(options))
    except Problem as problem:
        print(f"relu-mlp {options.command}: error: {problem}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
