"""`relu-mlp info`: `DESCRIPTION` says what it does."""

from __future__ import annotations

import argparse

from ..info import BuildInfo, build_info
from . import Problem

DESCRIPTION = "Show what was built, what will run, and how to get what is missing."

EXAMPLE = "relu-mlp info"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    pass


def checked_build_info() -> BuildInfo:
    """`build_info`. Raises a `Problem` if an environment variable has a wrong value."""
    try:
        return build_info()
    except (RuntimeError, ValueError) as error:  # RELU_MLP_ISA, RELU_MLP_BACKEND
        raise Problem(str(error)) from None


def run(options: argparse.Namespace) -> int:
    info = checked_build_info()
    print(info)
    print()
    print(*info.advice() or ["Nothing to improve: the extension runs at its best."], sep="\n")
    return 0
