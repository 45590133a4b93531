"""Random calls of the operators and public functions: `make fuzz`.

A case is one call with random sizes, layouts, dtypes, values, modes and settings. Most calls are
valid. In the others something is wrong: a tensor of another dtype, shape, device or layout, or
without memory; a list that is too short; an unknown name. Every case must meet three demands:

- The answer is right, or the call raises. Most numbers are small integers times a power of two,
  whose sums are exact. Then the answer must have the bits of the network in float64 (or of the
  native layers), including NaN and infinities. Real numbers must be within the error bounds of
  tests/support/bounds.py.
- An exception is of a kind that PyTorch raises, and its message names no C++ file. A valid call
  must not raise. Where the native layers raise, the call must raise too.
- The arguments do not change, nor does the memory around them.

A case follows from the seed and its number:

    make fuzz ARGS="--seed 5 --seconds 60"      another seed, another duration
    make fuzz ARGS="--seed 5 --case 1234"       one case, with a log of its arguments

Cases run in a child process, so a case that crashes or hangs is reported like any other.

case.py          the random choices of a case
network.py       a random network, and whether its sums are exact
breaking.py      mistakes that are put into the arguments of a valid call
verdict.py       the comparison of answers, exceptions and arguments with the expected ones
operators.py     the raw operators against the reference in float64
functions.py     the public functions against the native layers
transforms.py    transforms of torch.func, and fake tensors
modules.py       `ReluMLP` and `fuse` against `nn.Sequential`
kinds.py         all kinds of cases, and their frequencies
processes.py     child processes, and the process that watches them
command_line.py  the command line
"""

import sys
from pathlib import Path

# For `support`: the native layers, and networks in float64 with error bounds.
sys.path.append(str(Path(__file__).resolve().parents[2] / "tests"))
