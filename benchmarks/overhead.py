"""The cost of a call that has almost nothing to compute.

`python benchmarks/overhead.py` compares the layer with `nn.Sequential`, and `loss_and_grads` with
forward, loss and backward, in float32 on one thread. It writes the figures to
results/overhead.json. "eager again" is a second copy of the baseline: its distance from 1 shows
the noise.
"""

from __future__ import annotations

import copy
import json
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn

from relu_mlp import ReluMLP
from relu_mlp.cli.bench.candidates import (
    eager_loss_step,
    inference,
    loss_and_grads_step,
    training_step,
)
from relu_mlp.cli.bench.turns import machine, take_turns

SHAPES = [(64, 3, 2, 1), (1, 8, 64, 64, 4)]

#: Shapes whose products are PyTorch's, where nothing should be lost: training steps only.
WIDER = [(128, 64, 64, 10), (64, 1000, 100, 10), (256, 64, 64, 8), (2048, 64, 64, 64)]


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    figures = []
    for rows, n_in, *hidden, n_out in SHAPES + WIDER:
        shape = "x".join(map(str, (rows, n_in, *hidden, n_out)))
        net = ReluMLP(n_in, hidden, n_out)
        eager = nn.Sequential(*copy.deepcopy(list(net)))
        again = copy.deepcopy(eager)
        x, target = torch.randn(rows, n_in), torch.randn(rows, n_out)
        nets = {"eager": eager, "eager again": again, "relu_mlp": net}

        figures += take_turns(
            f"{shape} training step",
            {name: training_step(candidate, x, target) for name, candidate in nets.items()},
        )
        if (rows, n_in, *hidden, n_out) in WIDER:
            continue
        figures += take_turns(
            f"{shape} inference",
            {name: inference(candidate, x) for name, candidate in nets.items()},
        )
        figures += take_turns(
            f"{shape} loss and gradients",
            {
                "eager": eager_loss_step(eager, x, target),
                "eager again": eager_loss_step(again, x, target),
                "loss_and_grads": loss_and_grads_step(net, x, target),
            },
        )
    print(*figures, sep="\n")
    path = Path(__file__).parent / "results" / "overhead.json"
    document = {"machine": machine(), "figures": [asdict(figure) for figure in figures]}
    path.write_text(json.dumps(document, indent=1) + "\n")
    print("written to", path.name)


if __name__ == "__main__":
    main()
