"""What a call costs where there is next to nothing to compute.

`python benchmarks/overhead.py` compares the layer with `nn.Sequential`, and
`loss_and_grads` with forward, loss and backward, in float32 on one thread, and
keeps the figures in results/overhead.json. "eager again" is a second copy of
the baseline: its distance from 1 is what noise can do.

A training step is forward, backward from a given gradient, gradients reset,
and one weight changed in place, as an optimizer would.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from relu_mlp import ReluMLP, loss_and_grads
from turns import take_turns, write

SHAPES = [(64, 3, 2, 1), (1, 8, 64, 64, 4)]

#: Where the products are PyTorch's own, and nothing should be lost: training step only.
WIDER = [(128, 64, 64, 10), (64, 1000, 100, 10), (256, 64, 64, 8), (2048, 64, 64, 64)]


def training_step(net: nn.Module, x: Tensor, grad_output: Tensor) -> Callable[[], None]:
    parameters = list(net.parameters())

    def step() -> None:
        net(x).backward(grad_output)
        for parameter in parameters:
            parameter.grad = None
        with torch.no_grad():
            parameters[0].mul_(1.0)

    return step


def inference(net: nn.Module, x: Tensor) -> Callable[[], None]:
    def call() -> None:
        with torch.no_grad():
            net(x)

    return call


def eager_loss_step(net: nn.Module, x: Tensor, target: Tensor) -> Callable[[], None]:
    parameters = list(net.parameters())
    loss = nn.MSELoss(reduction="sum")

    def step() -> None:
        loss(net(x), target).backward()
        for parameter in parameters:
            parameter.grad = None

    return step


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
        linears = [child for child in net if isinstance(child, nn.Linear)]
        weights = [linear.weight for linear in linears]
        biases = [linear.bias for linear in linears]

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
                "loss_and_grads": lambda x=x, t=target, w=weights, b=biases: loss_and_grads(
                    x, t, w, b
                ),
            },
        )
    print(*figures, sep="\n")
    print("written to", write("overhead", figures).name)


if __name__ == "__main__":
    main()
