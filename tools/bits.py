"""Record the bits of many random networks' results, and compare another build's with them.

It checks a change that must not change any result:

    PYTHONPATH=. python tools/bits.py record bits.json     # before the change
    PYTHONPATH=. python tools/bits.py compare bits.json    # after it, and a new build

It draws the rows, widths, depth, dtype, output activation, biases, strides, number of threads and
`recompute` of each network at random, and runs it on every instruction set that the processor
has. A record is valid for one processor and one PyTorch: where PyTorch's matrix products are used,
the bits are PyTorch's.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import relu_mlp

SETS = relu_mlp.build_info().instruction_sets
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t,
    "transposed": lambda t: t.t().contiguous().t(),
    "in a larger matrix": lambda t: torch.nn.functional.pad(t, (1, 2))[:, 1:-2],
    "every other column": lambda t: t.repeat_interleave(2, dim=1)[:, ::2],
    "one row for all": lambda t: t[:1].expand(t.shape) if len(t) else t,
}


def size(rng: random.Random, largest: int) -> int:
    """From 0 to `largest`; small sizes are more frequent."""
    return rng.choice([0, 1, *(int(largest ** rng.random()) for _ in range(8))])


def results(seed: int) -> tuple[str, list[Tensor]]:
    """Draws a network by `seed`. Returns its description, and its output, gradients and loss."""
    rng = random.Random(seed)
    dtype = rng.choice(DTYPES)
    rows = size(rng, rng.choice([40, 700, 9000]))
    widths = [size(rng, rng.choice([12, 80, 300, 1100])) for _ in range(rng.randint(2, 5))]
    while rows * max(widths) > 2**20:
        rows //= 2
    activation = rng.choice([None, "relu", "sigmoid", "tanh"])
    layout = rng.choice(list(LAYOUTS))
    threads = rng.choice([1, 2])
    pattern = rng.choice(["all", "none", "some"])
    recompute = rng.random() < 0.3
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    x = LAYOUTS[layout](normal(rows, widths[0])).requires_grad_(rng.random() < 0.7)
    weights = [normal(n_out, n_in) for n_in, n_out in itertools.pairwise(widths)]
    if rng.random() < 0.2:
        weights = [LAYOUTS["transposed"](weight) for weight in weights]
    biases = [
        normal(n_out) if pattern == "all" or (pattern == "some" and rng.random() < 0.5) else None
        for n_out in widths[1:]
    ]
    leaves = [tensor for tensor in [x, *weights, *biases] if tensor is not None]
    for tensor in leaves[1:]:
        tensor.requires_grad_(rng.random() < 0.85)
    torch.set_num_threads(threads)
    kind = {"output_activation": activation}
    y = relu_mlp.relu_mlp(x, weights, biases, recompute=recompute, **kind)
    found = [y]
    wanted = [tensor for tensor in leaves if tensor.requires_grad]
    if wanted:
        grad = LAYOUTS[rng.choice(list(LAYOUTS))](normal(rows, widths[-1]))
        found += torch.autograd.grad(y, wanted, grad)
    plain = [None if bias is None else bias.detach() for bias in biases]
    loss, of_weights, of_biases = relu_mlp.loss_and_grads(
        x.detach(),
        normal(rows, widths[-1]),
        [weight.detach() for weight in weights],
        plain,
        loss=rng.choice(["sse", "half_sse", "mse"]),
        **kind,
    )
    found += [loss, *of_weights, *(bias for bias in of_biases or () if bias is not None)]
    text = (
        f"{seed}: {dtype}, {rows} rows, {widths}, {activation}, biases: {pattern}, x {layout}, "
        f"{threads} threads{', recompute' * recompute}"
    )
    return text, found


def digest(tensors: list[Tensor]) -> str:
    """A hash of the bytes of all tensors."""
    h = hashlib.sha256()
    for tensor in tensors:
        h.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return h.hexdigest()[:16]


def record_here(seeds: int) -> dict[str, str]:
    with relu_mlp.backend("extension"):
        return {text: digest(found) for text, found in map(results, range(seeds))}


def record(seeds: int) -> dict[str, dict[str, str]]:
    """Runs each instruction set in a process of its own."""
    found = {}
    for name in SETS:
        process = subprocess.run(
            [sys.executable, __file__, "here", "-", "--seeds", str(seeds)],
            env=os.environ | {"RELU_MLP_ISA": name},
            capture_output=True,
            text=True,
        )
        if process.returncode == 0:
            found[name] = json.loads(process.stdout)
            print(f"{name}: {len(found[name])} networks", file=sys.stderr)
        else:
            print(f"{name}: {process.stderr.strip().splitlines()[-1]}", file=sys.stderr)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("action", choices=["record", "compare", "here"])
    parser.add_argument("file", type=Path)
    parser.add_argument("--seeds", type=int, default=1500, help="networks for each instruction set")
    arguments = parser.parse_args()
    if arguments.action == "here":
        json.dump(record_here(arguments.seeds), sys.stdout)
    elif arguments.action == "record":
        arguments.file.write_text(json.dumps(record(arguments.seeds), indent=0))
    else:
        before = json.loads(arguments.file.read_text())
        after = record(len(next(iter(before.values()))))
        changed = [
            f"{name}, {text}"
            for name, networks in before.items()
            for text, bits in networks.items()
            if after.get(name, {}).get(text) != bits
        ]
        print(*changed, sep="\n")
        total = sum(map(len, before.values()))
        sys.exit(f"{len(changed)} of {total} networks have other bits" if changed else 0)


if __name__ == "__main__":
    main()
