"""The command line: ``relu-mlp info`` and the other commands, also as ``python -m relu_mlp``.

A command is a module with a `DESCRIPTION`, which becomes its help (not a docstring, because
`python -OO` removes those), an `EXAMPLE`, `add_arguments(parser)`, and `run(options)`, which
returns the exit status. A command that needs an optional package imports it when it runs, with
`needs`. A mistake that the user can correct is a `Problem`: one line, and exit status 2.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from .._version import __version__
from .terminal import forgiving

#: The module of each command, in the order in which `relu-mlp --help` lists them.
COMMANDS = {
    "info": ".info",
    "build": ".build",
    "check": ".check",
    "train": ".train",
    "predict": ".predict",
    "bench": ".bench.command",
}


class Problem(Exception):
    """A mistake that the user can correct. The message says how, in one line."""


class Missing(Problem):
    """A package that is not installed."""


def needs(package: str, extra: str, purpose: str) -> Any:
    """Imports an optional package. Raises `Missing`, which names the extra, without it."""
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name is None or not package.startswith(error.name):
            raise
        raise Missing(
            f"{purpose} needs {error.name}, which is not installed: "
            f"pip install 'relu-mlp[{extra}]', or {error.name} alone"
        ) from None


class Parser(argparse.ArgumentParser):
    """A parser whose error messages are one line."""

    def error(self, message: str) -> NoReturn:
        message = " ".join(message.split())
        self.exit(2, f"{self.prog}: error: {message}; usage: {self.prog} --help\n")


def parser() -> argparse.ArgumentParser:
    top = Parser(
        prog="relu-mlp",
        description="Commands for relu_mlp, a fused multilayer perceptron for PyTorch.",
        epilog="`relu-mlp COMMAND --help` shows an example.",
    )
    top.add_argument("--version", action="version", version=f"relu-mlp {__version__}")
    commands = top.add_subparsers(title="commands", dest="command", metavar="COMMAND")
    for name, path in COMMANDS.items():
        module: Any = importlib.import_module(path, __name__)
        command = commands.add_parser(
            name,
            help=module.DESCRIPTION.splitlines()[0].rstrip("."),
            description=module.DESCRIPTION,
            epilog=f"example:\n  {module.EXAMPLE}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status.

    An error is one line on standard error, and status 2. (Status 1 comes from
    `relu-mlp check` alone: a result is beyond its limit.) With RELU_MLP_TRACEBACK=1,
    unexpected errors are raised.

    Args:
        arguments: the arguments after the program's name; by default those of the process.

    Raises:
        SystemExit: status 2 for wrong arguments, status 0 after --help.
    """
    with forgiving() as output:
        name = "relu-mlp"
        try:
            top = parser()
            try:
                options = top.parse_args(arguments)
            except SystemExit as stop:
                if not stop.code:  # --help
                    output.check()
                raise
            if options.command is None:
                top.error(f"expected a command, one of {', '.join(COMMANDS)}")
            name = f"relu-mlp {options.command}"
            status = int(options.run(options))
            output.check()
            return status
        except KeyboardInterrupt:
            return 130
        except Exception as error:
            if not is_expected(error) and os.environ.get("RELU_MLP_TRACEBACK") == "1":
                raise
            print(f"{name}: error: {in_one_line(error)}", file=sys.stderr)
            return 2


#: Words in the RuntimeError that PyTorch raises when memory runs out.
NO_MEMORY = ("allocate memory", "not enough memory", "out of memory")


def is_expected(error: Exception) -> bool:
    return isinstance(error, (Problem, OSError, MemoryError))


def in_one_line(error: Exception) -> str:
    """An error as one line for the user."""
    if isinstance(error, Problem):
        text = str(error)
    elif isinstance(error, OSError) and error.filename is not None:
        text = f"{error.filename}: {error.strerror}"
    elif isinstance(error, MemoryError) or any(words in str(error) for words in NO_MEMORY):
        text = "there is not enough memory for this"
    else:  # only the first line, because PyTorch may list its stack frames below it
        first = next(iter(str(error).splitlines()), "")
        text = f"{type(error).__name__}: {first} (RELU_MLP_TRACEBACK=1 shows where)"
    return " ".join(text.splitlines())
