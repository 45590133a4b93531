"""A network of 64 x 1000 -> 100 -> 10, 500 steps: one loss curve by hand and by autograd.

    python examples/full_size.py

Repeats source document 003 at its full size: no biases, learning rate 1e-6, the same start for
all. In double precision the gradients of the first step and the losses of all steps must agree
within the bounds of rounding; otherwise the program stops with an error. For single precision,
which the document uses, it only shows how far they are apart.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

import agreement
from agreement import by_autograd
from relu_mlp import LossAndGrads, TrainingStep, loss_and_grads

STEPS = 500
LEARNING_RATE = 1e-6


def by_hand(x: Tensor, target: Tensor, weights: Sequence[Tensor]) -> LossAndGrads:
    """The sum of (y - target)^2 and its gradients; a weight is (out, in), as in nn.Linear."""
    w1, w2 = weights
    z = x @ w1.T  # (64, 100)
    h = z.clamp(min=0)  # (64, 100)
    y = h @ w2.T  # (64, 10)
    loss = (y - target).square().sum()

    grad_y = 2 * (y - target)  # (64, 10)
    grad_w2 = grad_y.T @ h  # (10, 100)
    grad_h = grad_y @ w2  # (64, 100)
    grad_z = grad_h.masked_fill(z <= 0, 0)  # (64, 100)
    grad_w1 = grad_z.T @ x  # (100, 1000)
    return LossAndGrads(loss, (grad_w1, grad_w2), None)


def train(
    gradients: Callable[..., LossAndGrads], x: Tensor, target: Tensor, weights: Sequence[Tensor]
) -> Tensor:
    """The losses (STEPS,) of gradient descent."""
    weights = [w.clone() for w in weights]
    losses = []
    for _ in range(STEPS):
        loss, grads, _ = gradients(x, target, weights)
        losses.append(loss)
        for weight, grad in zip(weights, grads, strict=True):
            weight -= LEARNING_RATE * grad
    return torch.stack(losses)


def train_in_one_call(x: Tensor, target: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """What `train` does, by the package in one call."""
    net = agreement.network(weights)
    optimizer = torch.optim.SGD(net.parameters(), lr=LEARNING_RATE)
    return TrainingStep(net, "sse", optimizer).repeat(x, target, STEPS)


def main() -> None:
    torch.manual_seed(0)
    shapes = (64, 1000), (64, 10), (100, 1000), (10, 100)
    x, target, w1, w2 = (torch.randn(shape, dtype=torch.float64) for shape in shapes)
    start = x, target, [w1, w2]

    ways = {"by hand": by_hand, "by loss_and_grads": loss_and_grads, "by autograd": by_autograd}
    expected, bounds = by_autograd(*start), agreement.gradient_bounds(*start)
    for by, gradients in ways.items():
        agreement.compare_gradients("first step", gradients(*start), by, expected, bounds)

    trainings = {"in one call": train_in_one_call}
    trainings |= {by: partial(train, gradients) for by, gradients in ways.items()}
    torch.optim.SGD([w1], lr=LEARNING_RATE)  # the first one imports much of PyTorch, for a second
    double, seconds = {}, {}
    for by, training in trainings.items():
        started = time.perf_counter()
        double[by] = training(*start)
        seconds[by] = time.perf_counter() - started
    if_shaken = train(agreement.shaken(by_autograd), *start)
    agreement.compare_curves("float64", double, if_shaken, agreement.roundings(x, [w1, w2]))

    in_single = x.float(), target.float(), [w1.float(), w2.float()]
    single = {by: train(gradients, *in_single) for by, gradients in ways.items()}
    relative = [losses / single["by autograd"] - 1 for losses in single.values()]
    apart = torch.stack(relative).abs().max().item()
    print(f"float32: losses are at most {apart:.1e} of their value apart")

    print(f"\n    {'in float64':>16}{'in float32':>48}")
    print("step" + "".join(f"{by.removeprefix('by '):>16}" for by in [*ways, *ways]))
    for step in [*range(10), 49, *range(99, STEPS, 100)]:
        losses = [curves[by] for curves in (double, single) for by in ways]
        print(f"{step:4}" + "".join(f"{curve[step].item():16.9g}" for curve in losses))
    times = ", ".join(f"{by} {time:.2f} s" for by, time in seconds.items())
    print(f"\n{STEPS} steps in float64: {times}")


if __name__ == "__main__":
    main()
