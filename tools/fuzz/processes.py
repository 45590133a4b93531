"""Child processes that run cases, and the process that watches them."""

from __future__ import annotations

import argparse
import collections
import faulthandler
import math
import mmap
import os
import select
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator

from . import case, kinds
from .verdict import Wrong


def child(seed: object, numbers: Iterator[int], pipe: int) -> None:
    """Runs cases. Writes a line to the pipe when one begins, and a line when it ends."""
    for number in numbers:
        if case.LIVE is not None:
            case.LIVE.seek(0)
        os.write(pipe, f"{number}\n".encode())
        try:
            kind, ending = kinds.run_case(seed, number)
            os.write(pipe, f"={kind}, {ending}\n".encode())
        except Wrong as error:
            text = str(error).encode("ascii", "backslashreplace").decode().replace("\n", "\\n")
            os.write(pipe, f"!{text}\n".encode())


class Watch:
    """Runs the cases first, first + step, ... in a child, and in a new one after a crash."""

    def __init__(self, options: argparse.Namespace, first: int) -> None:
        self.options, self.next = options, first
        self.counts: collections.Counter[str] = collections.Counter()
        self.found: list[str] = []
        self.begin()

    def begin(self) -> None:
        options = self.options
        end = math.inf if options.cases is None else options.cases
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115
        self.notes = mmap.mmap(-1, 1 << 20)
        self.pipe, writing = os.pipe()
        self.pid, self.buffer, self.running = os.fork(), b"", None
        if self.pid == 0:
            case.LIVE = self.notes
            os.dup2(self.errors.fileno(), 2)
            status = 1
            try:
                if not case.SANITIZED:  # sanitizers have handlers of their own
                    faulthandler.enable()

                def numbers() -> Iterator[int]:
                    number = self.next
                    while number < end and time.time() < options.until:
                        yield number
                        number += options.processes

                child(options.seed, numbers(), writing)
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
        os.close(writing)
        self.heard = time.time()

    def read(self) -> bool:
        """Reads what the child wrote; returns whether there is more to come."""
        data = os.read(self.pipe, 1 << 16)
        self.heard = time.time()
        *lines, self.buffer = (self.buffer + data).split(b"\n")
        for line in lines:
            text = line.decode()
            if text[0] == "=":
                self.counts[text[1:]] += 1
                self.running = None
            elif text[0] == "!":
                self.report(text[1:].replace("\\n", "\n"))
                self.running = None
            else:
                self.running = int(text)
                self.next = self.running + self.options.processes
        if data:
            return True
        os.close(self.pipe)
        _, status = os.waitpid(self.pid, 0)
        code = os.waitstatus_to_exitcode(status)
        if code != 0:
            self.errors.seek(0)
            said = self.errors.read().decode(errors="replace")[-8000:]
            said = said.split("Extension modules:")[0] + self.notes[:].split(b"\0")[0].decode()
            name = signal.Signals(-code).name if code < 0 else f"status {code}"
            self.report(f"case {self.running}: the process ended with {name}\n{said}")
            if self.running is None:
                return False
            self.begin()
            return True
        return False

    def report(self, text: str) -> None:
        self.counts["WRONG"] += 1
        self.found.append(text)
        number = text.split(",")[0].split(":")[0].removeprefix("case ")
        print(f'{text}\n    make fuzz ARGS="--seed {self.options.seed} --case {number}"\n')
        sys.stdout.flush()

    def stop_if_silent(self) -> None:
        if time.time() - self.heard > self.options.patience:
            os.kill(self.pid, signal.SIGABRT)  # then read() sees a crash
            self.heard = time.time()


def watch(options: argparse.Namespace) -> int:
    """Runs all cases, and returns how many were wrong."""
    watches = {w.pipe: w for w in (Watch(options, n) for n in range(options.processes))}
    everything = [*watches.values()]
    while watches:
        ready, _, _ = select.select([*watches], [], [], 1)
        for pipe in ready:
            one = watches.pop(pipe)
            if one.read():
                watches[one.pipe] = one
        for one in watches.values():
            one.stop_if_silent()
        if sum(len(w.found) for w in everything) >= options.most:
            for one in watches.values():
                os.kill(one.pid, signal.SIGKILL)
                os.waitpid(one.pid, 0)
            print(f"stopped after {options.most} findings")
            break
    counts = sum((w.counts for w in everything), collections.Counter())
    for name, count in sorted(counts.items()):
        print(f"{count:8}  {name}")
    found = counts["WRONG"]
    print(f"seed {options.seed}: {sum(counts.values())} cases, {found} of them wrong")
    return found
