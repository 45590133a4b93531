"""Two layers with biases: gradients derived by hand compared with autograd's, in every step.

    python examples/two_layers.py

Repeats source document 000. Trains a network of 64 x 3 -> 2 -> 1 by gradient descent, and then
one with three outputs. Every step computes the loss and all gradients three times: by hand, in
the lines below; by the package, in one call; and by autograd. The program stops with an error if
two of them differ by more than rounding explains. Then the package does the same training in one
call, and must find the same losses. It runs on the CPU, and also on a GPU if there
is one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

import agreement
from agreement import by_autograd
from relu_mlp import LossAndGrads, TrainingStep, loss_and_grads

ROWS, INPUTS, HIDDEN = 64, 3, 2
STEPS = 500
LEARNING_RATE = 1e-6


def by_hand(
    x: Tensor, target: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]
) -> LossAndGrads:
    """The sum of (y - target)^2 and its gradients; a weight is (out, in), as in nn.Linear."""
    (w1, w2), (b1, b2) = weights, biases

    z = x @ w1.T + b1  # (rows, hidden)
    h = z.clamp(min=0)  # (rows, hidden)
    y = h @ w2.T + b2  # (rows, outputs)
    loss = (y - target).square().sum()

    grad_y = 2 * (y - target)  # (rows, outputs)
    grad_w2 = grad_y.T @ h  # (outputs, hidden)
    grad_b2 = grad_y.sum(0)  # (outputs,): over the rows, each output for itself
    grad_h = grad_y @ w2  # (rows, hidden)
    grad_z = grad_h.masked_fill(z <= 0, 0)  # (rows, hidden): nothing passes a unit that is off
    grad_w1 = grad_z.T @ x  # (hidden, inputs)
    grad_b1 = grad_z.sum(0)  # (hidden,)
    return LossAndGrads(loss, (grad_w1, grad_w2), (grad_b1, grad_b2))


def train_in_one_call(
    x: Tensor, target: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]
) -> Tensor:
    """The losses (STEPS,) of the whole training, by the package."""
    net = agreement.network(weights, biases)
    optimizer = torch.optim.SGD(net.parameters(), lr=LEARNING_RATE)
    return TrainingStep(net, "sse", optimizer).repeat(x, target, STEPS)


def train(outputs: int, device: str) -> None:
    """Trains with the gradients by hand, and compares all three in every step."""
    torch.manual_seed(0)

    def random(*shape: int) -> Tensor:  # on the CPU, so that a GPU gets the same numbers
        return torch.randn(*shape, dtype=torch.float64).to(device)

    x, target = random(ROWS, INPUTS), random(ROWS, outputs)
    weights = [random(HIDDEN, INPUTS), random(outputs, HIDDEN)]
    biases = [random(HIDDEN), random(outputs)]
    start = x, target, [w.clone() for w in weights], [b.clone() for b in biases]

    print(f"{ROWS} x {INPUTS} -> {HIDDEN} -> {outputs} on {device}: loss and norm of each gradient")
    print(f"{'step':>4}  {'':10}  {'by hand':>16}  {'loss_and_grads':>16}  {'autograd':>16}")
    largest, losses = 0.0, []
    for step in range(STEPS):
        hand = by_hand(x, target, weights, biases)
        package = loss_and_grads(x, target, weights, biases)
        autograd = by_autograd(x, target, weights, biases)

        bounds = agreement.gradient_bounds(x, target, weights, biases)
        for result, by in [(hand, "by hand"), (package, "by loss_and_grads")]:
            fraction = agreement.compare_gradients(f"step {step}", result, by, autograd, bounds)
            largest = max(largest, fraction)

        if step % 100 == 99:
            columns = [agreement.named(result) for result in (hand, package, autograd)]
            for name in columns[0]:
                norms = "".join(f"  {column[name].norm().item():16.9f}" for column in columns)
                print(f"{step:4}  {name:10}{norms}")

        losses.append(hand.loss)
        for parameter, grad in zip([*weights, *biases], [*hand.weights, *hand.biases], strict=True):
            parameter -= LEARNING_RATE * grad

    print(f"largest difference in {STEPS} steps: {largest:.2g} of what rounding explains")
    curves = {"in one call": train_in_one_call(*start), "by hand": torch.stack(losses)}
    if_shaken = agreement.losses_if_shaken(*start, LEARNING_RATE, STEPS)
    n = agreement.roundings(x, weights)
    agreement.compare_curves(f"all {STEPS} steps", curves, if_shaken, n)
    print()
    if outputs > 1:
        y = F.linear(F.relu(F.linear(x, weights[0], biases[0])), weights[1], biases[1])
        grad_y = 2 * (y - target)
        rows, everything = grad_y.sum(0).tolist(), grad_y.sum().item()
        print("The gradient of the output bias after that, summed over")
        print("  the rows:                       " + "".join(f"{g:12.4f}" for g in rows))
        print("  everything, as in document 000: " + f"{everything:12.4f}" * outputs + "\n")


def main() -> None:
    for device in ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]:
        for outputs in (1, 3):
            train(outputs, device)


if __name__ == "__main__":
    main()
