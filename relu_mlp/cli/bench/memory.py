"""The peak memory of a training step, measured in a process of its own.

The figure is the growth of the resident set over its size just before the step. By then input
and weights exist, and a tiny step has warmed up the libraries. Memory that a C++ kernel takes
counts like that of a tensor. Linux only.

`python -m relu_mlp.cli.bench.memory ROWS CANDIDATE THREADS` is such a process; it prints bytes.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import torch
from torch import nn

from ... import ReluMLP
from .candidates import WIDE, training_step

ROWS = [4096, 8192, 16384, 32768, 65536]
CANDIDATES = ["eager", "relu_mlp", "recompute"]
CAN_BE_MEASURED = Path("/proc/self/clear_refs").exists()


def peak_of_a_step(rows: int, candidate: str, threads: int) -> int:
    """The growth of memory in bytes, measured in a new process."""
    command = [
        sys.executable,
        "-m",
        "relu_mlp.cli.bench.memory",
        str(rows),
        candidate,
        str(threads),
    ]
    # `-m` looks in the current folder first, where it must find this very package.
    here = Path(__file__).parents[3]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=here)
    return int(done.stdout)


def _step(rows: int, candidate: str, threads: int) -> int:
    torch.set_num_threads(threads)
    fused = ReluMLP(WIDE[0], WIDE[1:-1], WIDE[-1], recompute=candidate == "recompute")
    net = nn.Sequential(*fused) if candidate == "eager" else fused
    x, grad_output = torch.randn(rows, WIDE[0]), torch.randn(rows, WIDE[-1])
    step = training_step(net, x, grad_output)
    training_step(net, x[:8], grad_output[:8])()

    # The imports have set the high-water mark. Writing 5 resets it to the present size.
    Path("/proc/self/clear_refs").write_text("5")
    before = _resident_bytes("VmRSS")
    step()
    return _resident_bytes("VmHWM") - before


def _resident_bytes(field: str) -> int:
    status = Path("/proc/self/status").read_text()
    match = re.search(rf"{field}:\s*(\d+) kB", status)
    if match is None:
        raise RuntimeError(f"/proc/self/status has no {field}")
    return int(match[1]) * 1024


if __name__ == "__main__":
    print(_step(int(sys.argv[1]), sys.argv[2], int(sys.argv[3])))
