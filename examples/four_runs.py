"""Four trainings from one start: by hand without and with biases, by autograd, by Adam.

    python examples/four_runs.py

Repeats source document 001: a network of 64 x 3 -> 2 -> 1, 500 steps, learning rate 1e-6.
Gradients by hand, by the package and by autograd must give the same loss curve, and so must the
package's training in one call. The program
stops with an error if two curves differ by more than rounding explains. At the end it shows what
the document's two mistakes do to the curve.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

import agreement
import relu_mlp
from agreement import by_autograd
from relu_mlp import LossAndGrads, TrainingStep, loss_and_grads

STEPS = 500
LEARNING_RATE = 1e-6


def by_hand(
    x: Tensor, target: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor] | None = None
) -> LossAndGrads:
    """The sum of (y - target)^2 and its gradients; a weight is (out, in), as in nn.Linear."""
    (w1, w2), (b1, b2) = weights, biases or (0, 0)
    z = x @ w1.T + b1  # (64, 2)
    h = z.clamp(min=0)  # (64, 2)
    y = h @ w2.T + b2  # (64, 1)
    loss = (y - target).square().sum()

    grad_y = 2 * (y - target)  # (64, 1)
    grad_w2 = grad_y.T @ h  # (1, 2)
    grad_h = grad_y @ w2  # (64, 2)
    grad_z = grad_h.masked_fill(z <= 0, 0)  # (64, 2): z as the ReLU saw it, with the bias
    grad_w1 = grad_z.T @ x  # (2, 3)
    # The loss is a sum over the rows, and a bias takes part in each of them.
    grad_biases = (grad_z.sum(0), grad_y.sum(0)) if biases else None  # (2,) and (1,)
    return LossAndGrads(loss, (grad_w1, grad_w2), grad_biases)


def as_in_the_document(
    x: Tensor,
    target: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    divided: bool = False,
    early: bool = False,
) -> LossAndGrads:
    """WRONG on purpose: with one of the document's two mistakes, or both."""
    (w1, w2), (b1, b2) = weights, biases
    z = x @ w1.T + b1
    h = z.clamp(min=0)
    grad_y = 2 * (h @ w2.T + b2 - target)
    off = (x @ w1.T if early else z) <= 0  # WRONG if early: the bias is not in it yet
    grad_z = (grad_y @ w2).masked_fill(off, 0)
    rows = len(x) if divided else 1  # WRONG if divided: the loss is a sum and not a mean
    grad_biases = (grad_z.sum(0) / rows, grad_y.sum(0) / rows)
    return LossAndGrads(grad_y.square().sum() / 4, (grad_z.T @ x, grad_y.T @ h), grad_biases)


def train(
    gradients: Callable[..., LossAndGrads],
    x: Tensor,
    target: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor] | None = None,
) -> Tensor:
    """The losses (STEPS,) of gradient descent."""
    weights, biases = [w.clone() for w in weights], biases and [b.clone() for b in biases]
    losses = []
    for _ in range(STEPS):
        loss, grad_weights, grad_biases = gradients(x, target, weights, biases)
        losses.append(loss)
        grads = [*grad_weights, *(grad_biases or ())]
        for parameter, grad in zip([*weights, *(biases or ())], grads, strict=True):
            parameter -= LEARNING_RATE * grad
    return torch.stack(losses)


def train_in_one_call(
    x: Tensor,
    target: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor] | None = None,
) -> Tensor:
    """What `train` does, by the package in one call."""
    net = agreement.network(weights, biases)
    optimizer = torch.optim.SGD(net.parameters(), lr=LEARNING_RATE)
    return TrainingStep(net, "sse", optimizer).repeat(x, target, STEPS)


def train_by_adam(
    x: Tensor, target: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]
) -> Tensor:
    """The same with Adam instead of gradient descent, with the package under autograd."""
    weights, biases = ([p.clone().requires_grad_() for p in kind] for kind in (weights, biases))
    optimizer = torch.optim.Adam([*weights, *biases], lr=LEARNING_RATE)
    losses = []
    for _ in range(STEPS):
        loss = (relu_mlp.relu_mlp(x, weights, biases) - target).square().sum()
        losses.append(loss.detach())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return torch.stack(losses)


def main() -> None:
    torch.manual_seed(0)
    shapes = (64, 3), (64, 1), (2, 3), (1, 2), (2,), (1,)
    x, target, w1, w2, b1, b2 = (torch.randn(shape, dtype=torch.float64) for shape in shapes)

    ways = {"by hand": by_hand, "by loss_and_grads": loss_and_grads, "by autograd": by_autograd}
    curves = {}
    for what, biases in [("without bias", None), ("with bias", [b1, b2])]:
        start = x, target, [w1, w2], biases
        expected, bounds = by_autograd(*start), agreement.gradient_bounds(*start)
        for by, gradients in ways.items():
            found = gradients(*start)
            agreement.compare_gradients(f"{what}, first step", found, by, expected, bounds)
        curves[what] = {"in one call": train_in_one_call(*start)}
        curves[what] |= {by: train(gradients, *start) for by, gradients in ways.items()}
        if_shaken = train(agreement.shaken(by_autograd), *start)
        n = agreement.roundings(x, [w1, w2])
        agreement.compare_curves(what, curves[what], if_shaken, n)

    right = curves["with bias"]["by autograd"]
    table = {
        "no bias, by hand": curves["without bias"]["by hand"],
        "bias, by hand": curves["with bias"]["by hand"],
        "loss_and_grads": curves["with bias"]["by loss_and_grads"],
        "bias, autograd": right,
        "bias, Adam": train_by_adam(*start),
    }
    print("\nstep" + "".join(f"{name:>18}" for name in table))
    for step in range(99, STEPS, 100):
        print(f"{step:4}" + "".join(f"{losses[step]:18.10f}" for losses in table.values()))

    mistakes = {
        "divided bias grads": partial(as_in_the_document, divided=True),
        "mask before bias": partial(as_in_the_document, early=True),
        "both": partial(as_in_the_document, divided=True, early=True),
    }
    wrong = {name: train(gradients, *start) for name, gradients in mistakes.items()}
    print("\nThe loss with the mistakes of document 001, and how far that is off")
    print("step             right" + "".join(f"{name:>24}" for name in wrong))
    for step in range(99, STEPS, 100):
        off = [f"{v[step]:15.6f} {v[step] / right[step] - 1:+8.4%}" for v in wrong.values()]
        print(f"{step:4}{right[step]:18.6f}" + "".join(off))


if __name__ == "__main__":
    main()
