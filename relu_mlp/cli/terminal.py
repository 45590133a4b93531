"""Output streams that do not stop a command for a character or a closed pipe."""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any


class Output:
    """A text stream that accepts every character, and survives a failed write.

    Characters that the encoding lacks are written as escapes. After a failed write, all
    further output is dropped: the files of a long run are worth more than its messages.
    """

    def __init__(self, stream: Any) -> None:
        self.stream = stream
        self.error: OSError | None = None  #: from the first write that failed

    def __getattr__(self, name: str) -> Any:  # isatty, encoding, ...
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        if self.error is None:
            encoding = self.stream.encoding or "utf-8"
            shown = text.encode(encoding, "backslashreplace").decode(encoding)
            try:
                self.stream.write(shown)
            except OSError as error:
                self._give_up(error)
        return len(text)

    def flush(self) -> None:
        if self.error is None:
            try:
                self.stream.flush()
            except OSError as error:
                self._give_up(error)

    def check(self) -> None:
        """Raises the error of a failed write, unless the reader has merely closed the pipe."""
        self.flush()
        if self.error is not None and self.error.errno != errno.EPIPE:
            reason = self.error.strerror or str(self.error)
            raise OSError(self.error.errno, reason, "the standard output") from None

    def _give_up(self, error: OSError) -> None:
        self.error = error
        # The rest of the buffer is written when the process ends. That must not fail again.
        with suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.stream.fileno())
            os.close(nowhere)


@contextmanager
def forgiving() -> Iterator[Output]:
    """Replaces sys.stdout and sys.stderr, which may be closed, by an `Output`. Yields the first."""
    saved = sys.stdout, sys.stderr
    out, err = (Output(io.StringIO() if stream is None else stream) for stream in saved)
    sys.stdout, sys.stderr = out, err
    try:
        yield out
    finally:
        out.flush()
        err.flush()
        sys.stdout, sys.stderr = saved
