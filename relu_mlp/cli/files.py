"""A person's files: read whole, replaced whole, and never overwritten unasked."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from . import Problem


def read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise Problem(f"{path} can't be read: {error.strerror}") from None


def read_text(path: Path) -> str:
    """The text of a file in UTF-8, with or without a byte order mark."""
    data = read_bytes(path)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise Problem(
            f"{path}, line {line}: expected text in UTF-8, got the byte 0x{data[error.start]:02x}"
        ) from None


def check_absent(paths: Iterable[Path], remedy: str) -> None:
    """A `Problem` that ends in the remedy, if one of the files is there."""
    for path in paths:
        if path.exists():
            raise Problem(f"{path} exists; {remedy}")


def make_folder(path: Path) -> None:
    """Makes a folder to write to, or says now, and not after an hour, that it can't be."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Problem(f"the folder {path} can't be made: {error.strerror}") from None
    if not os.access(path, os.W_OK | os.X_OK):
        raise Problem(f"the folder {path} can't be written to")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write to, whose file takes the place of `path` if nothing was raised."""
    temporary = path.with_name(f".{path.name}.partial")
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise Problem(f"{path} can't be written: {error.strerror or error}") from None
    finally:
        temporary.unlink(missing_ok=True)
