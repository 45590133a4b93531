"""The command line of the fuzzer."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence

from . import kinds, processes
from .verdict import Wrong


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="fuzz", description="Random calls of the operators and public functions."
    )
    parser.add_argument("--seed", default="0", help="any text (default: 0)")
    parser.add_argument("--seconds", type=float, default=300, help="how long (default: 300)")
    parser.add_argument("--cases", type=int, help="the largest number of cases")
    parser.add_argument("--case", type=int, help="run this case only, in this process")
    parser.add_argument("--processes", type=int, default=1, help="child processes (default: 1)")
    parser.add_argument(
        "--patience", type=float, default=120, help="seconds that a case may take (default: 120)"
    )
    parser.add_argument(
        "--most", type=int, default=20, help="stop after this many findings (default: 20)"
    )
    options = parser.parse_args(arguments)
    options.until = time.time() + options.seconds
    if options.case is None:
        return 1 if processes.watch(options) else 0
    try:
        print(*kinds.run_case(options.seed, options.case), sep=": ")
    except Wrong as error:
        print(error)
        return 1
    return 0
