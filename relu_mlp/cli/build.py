"""`relu-mlp build`: `DESCRIPTION` says what it does."""

from __future__ import annotations

import argparse
import os
import platform
import time

import torch

from .. import ops
from ..ops import native_node, node_build
from . import Problem

DESCRIPTION = """\
Compile the native autograd node for the PyTorch and Python that run.

The package works without it. A file for another PyTorch, Python or version of this package is
never used: run the command again after one of them has changed. It needs a C++20 compiler,
setuptools and, to be quick, ninja. The file goes into $RELU_MLP_CACHE, or else relu_mlp in
$XDG_CACHE_HOME or ~/.cache, where the next import finds it."""

EXAMPLE = "relu-mlp build"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--force", action="store_true", help="build it even if it runs already")
    parser.add_argument("--verbose", action="store_true", help="show the compiler's output")


def run(options: argparse.Namespace) -> int:
    if ops.LIBRARY_PATH is None:
        raise Problem(
            f"the node calls the extension, which is missing: {ops.LIBRARY_PROBLEM}. {ops.REMEDY}"
        )
    if os.environ.get("RELU_MLP_NODE") == "0":
        raise Problem("RELU_MLP_NODE is 0, so the node would not be loaded; unset it")
    if ops.node is not None and not options.force:
        print(f"already built: {ops.node.__file__} (--force builds it again)")
        return 0
    start = time.perf_counter()
    try:
        path = node_build.build(node_build.cache_folder(), show=options.verbose)
    except node_build.NotBuilt as error:
        raise Problem(str(error)) from None
    _, problem = native_node.load_node()
    if problem is not None:
        raise Problem(f"the node was built, but {problem}")
    print(
        f"built for PyTorch {torch.__version__} and Python {platform.python_version()} "
        f"in {time.perf_counter() - start:.0f} s: {path}"
    )
    return 0
