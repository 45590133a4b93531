"""The user's files: read whole, replaced whole, and never overwritten without --force."""

from __future__ import annotations

import os
import secrets
import stat
import sys
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from . import Problem


def read_bytes(path: Path) -> bytes:
    """The contents of a file or a pipe. Raises a `Problem` for devices such as /dev/zero."""
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            if (stat.S_ISCHR(mode) and not file.isatty()) or stat.S_ISBLK(mode):
                raise Problem(f"{path} can't be read: it is a device")
            return file.read()
    except OSError as error:
        raise Problem(f"{path} can't be read: {error.strerror or error}") from None


def read_text(path: Path) -> str:
    """The text of a file in UTF-8, with or without a byte order mark."""
    data = read_bytes(path)
    try:
        text, bad = data.decode("utf-8-sig"), data.find(0)  # valid in UTF-8, but not in a text
    except UnicodeDecodeError as error:
        text, bad = "", error.start
    if bad >= 0:
        line = data[:bad].count(b"\n") + 1
        raise Problem(
            f"{path}, line {line}: expected text in UTF-8, got the byte 0x{data[bad]:02x}"
        )
    return text


def check_absent(paths: Iterable[Path], remedy: str) -> None:
    """Raises a `Problem`, which ends with the remedy, if one of the files exists.

    Devices and pipes are ignored: nothing is lost by writing to them.
    """
    for path in paths:
        try:
            mode = path.stat().st_mode
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            raise Problem(f"{path} can't be written: {error.strerror or error}") from None
        if stat.S_ISREG(mode):
            raise Problem(f"{path} exists; {remedy}")
        if stat.S_ISDIR(mode):
            raise Problem(f"{path} can't be written: Is a directory")


def make_folder(path: Path) -> None:
    """Makes a folder, or raises a `Problem` before any work is done for it."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Problem(f"the folder {path} can't be made: {error.strerror or error}") from None
    if not os.access(path, os.W_OK | os.X_OK):
        raise Problem(f"the folder {path} can't be written to")


def write(path: Path, data: bytes) -> None:
    """Replaces a file by these bytes: all of them, or none.

    They go to a temporary file in the same folder, which is flushed to disk and renamed. If
    `path` is a link, its target is replaced. Devices and pipes are written to directly.

    Raises:
        Problem: if the file can't be written; then it is unchanged.
    """
    try:
        descriptor = _descriptor_of(path)
        if descriptor is not None:
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
        else:
            _replace(Path(os.path.realpath(path)), data)
    except OSError as error:
        raise Problem(f"{path} can't be written: {error.strerror or error}") from None


def _descriptor_of(path: Path) -> int | None:
    """A descriptor to write to, if `path` can't be replaced by a renamed file; else None."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    if not stat.S_ISREG(status.st_mode):
        return os.open(path, os.O_WRONLY)
    for descriptor in (1, 2):  # such as /dev/stdout, redirected to a file
        with suppress(OSError):
            if os.path.samestat(status, os.fstat(descriptor)):
                sys.stdout.flush()
                return os.dup(descriptor)
    if not os.access(path, os.W_OK):  # a rename ignores the permissions of the file
        raise PermissionError(13, "Permission denied")
    return None


def _replace(path: Path, data: bytes) -> None:
    temporary = path.with_name(f".relu-mlp.{secrets.token_hex(8)}.partial")
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            if path.exists():
                os.fchmod(file.fileno(), stat.S_IMODE(path.stat().st_mode))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    with suppress(OSError):  # flushes the name too, where the file system can do that
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
