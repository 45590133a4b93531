"""Say what was built, what will run, and what to do if that is less than it could be."""

from __future__ import annotations

import argparse

from ..info import build_info
from . import Problem

EXAMPLE = "relu-mlp info"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    pass


def run(options: argparse.Namespace) -> int:
    try:
        info = build_info()
    except (RuntimeError, ValueError) as error:  # RELU_MLP_ISA, RELU_MLP_BACKEND
        raise Problem(str(error)) from None
    print(info)
    print()
    print(*info.advice() or ["Nothing to improve: the extension runs at its best."], sep="\n")
    return 0
