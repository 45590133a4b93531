"""Types of the commands' arguments: each raises an `ArgumentTypeError` for wrong text."""

from __future__ import annotations

import argparse
import math
from typing import NoReturn


def _refuse(expected: str, text: str) -> NoReturn:
    raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")


def positive_integer(text: str) -> int:
    if not (text.isdecimal() and int(text) > 0):
        _refuse("an integer of at least 1", text)
    return int(text)


def count(text: str) -> int:
    """A positive integer that fits into a C int."""
    if (value := positive_integer(text)) >= 2**31:
        _refuse("an integer below 2**31", text)
    return value


def count_or_zero(text: str) -> int:
    return 0 if text == "0" else count(text)


def threads(text: str) -> int:
    # The system may refuse more than this, and end the process.
    if (value := positive_integer(text)) > 1024:
        _refuse("at most 1024 threads", text)
    return value


def seed(text: str) -> int:
    """Any seed that `torch.manual_seed` takes."""
    if not text.removeprefix("-").isdecimal() or not -(2**63) <= int(text) < 2**63:
        _refuse("an integer of 64 bits", text)
    return int(text)


def nonnegative_seed(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**63:
        _refuse("an integer from 0 to 2**63 - 1", text)
    return int(text)


def number(text: str, least: float, most: float) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not least <= value <= most:
        _refuse(f"a number from {least:g} to {most:g}", text)
    return value


def network_shape(text: str) -> tuple[int, ...]:
    """rows, in_features, hidden widths and out_features."""
    sizes = tuple(positive_integer(size.strip()) for size in text.split(","))
    if len(sizes) < 3:
        _refuse("rows,in,hidden...,out", text)
    return sizes
