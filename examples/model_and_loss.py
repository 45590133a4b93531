"""The gradient of a loss: one part from the model, the other from the loss.

    python examples/model_and_loss.py

With y = model(x, w), a loss L(y) and the Jacobian J = dy/dw, dL/dw = J^T dL/dy. J does not depend
on the loss, and dL/dy does not depend on the model. The example computes J in one call and by
autograd. Then it computes the gradient in four ways, for a straight line in training and for a
network. An error ends the program unless they agree and match the known figures.
"""

import sys
from collections.abc import Callable, Sequence
from functools import partial

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from relu_mlp import (
    LossAndGrads,
    Parameters,
    ReluMLP,
    TrainingStep,
    jacobian,
    linearize,
    loss_and_grads,
    relu_mlp,
)

# The data of the document: temperatures in an unknown unit, scaled, and in degrees Celsius.
X = 0.1 * torch.tensor([35.7, 55.9, 58.2, 81.9, 56.3, 48.9, 33.9, 21.8, 48.4, 60.4, 68.4])[:, None]
TARGET = torch.tensor([0.5, 14.0, 15.0, 28.0, 11.0, 8.0, 3.0, -4.0, 6.0, 13.0, 21.0])[:, None]

# What the document prints for the straight line: the losses of EPOCHS, then b and w.
EPOCHS = range(500, 5001, 500)
LOSSES = [7.8601151, 3.8285379, 3.0921912, 2.9576979, 2.9331338]
LOSSES += [2.9286485, 2.9278297, 2.9276793, 2.9276519, 2.9276469]
KNOWN = torch.tensor([*LOSSES, -17.3012, 5.3671])

# How far a result may be from these. Rounding moves a loss by 4e-7 of its value, and a relative
# error of 1e-5 in the gradient moves the first loss by 1e-5. b and w have four decimals.
LIMIT = torch.cat([1e-5 * KNOWN[:-2], torch.tensor([5e-5, 5e-5])])


def by_jacobian(x: Tensor, target: Tensor, *w: Sequence[Tensor]) -> LossAndGrads:
    """Like all four, for the mean of (y - target)^2. w is the weights and the biases."""
    error = relu_mlp(x, *w) - target
    grad_y = 2 / error.numel() * error
    grads = [[torch.einsum("no,no...->...", grad_y, J) for J in kind] for kind in jacobian(x, *w)]
    return LossAndGrads(error.square().mean(), *map(tuple, grads))


def by_product(x: Tensor, target: Tensor, *w: Sequence[Tensor]) -> LossAndGrads:
    """J^T dL/dy without J: a backward pass that starts from dL/dy."""
    net = linearize(x, *w)
    error = net.y - target
    return LossAndGrads(error.square().mean(), *net.vjp(2 / error.numel() * error))


def by_autograd(x: Tensor, target: Tensor, *w: Sequence[Tensor]) -> LossAndGrads:
    weights, biases = ([tensor.detach().requires_grad_() for tensor in kind] for kind in w)
    loss = F.mse_loss(model(x, weights, biases), target)
    grads = torch.autograd.grad(loss, weights + biases)
    return LossAndGrads(loss.detach(), grads[: len(weights)], grads[len(weights) :])


def model(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> Tensor:
    """y by PyTorch's own operations."""
    for n, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        x = F.linear(F.relu(x) if n else x, weight, bias)
    return x


def check(what: str, found: Tensor, known: Tensor, limit: Tensor | float = 0.0) -> None:
    """Sums and products of small integers have no rounding, and need no limit."""
    excess = (found - known).abs() - limit
    if not (excess <= 0).all():
        one, other = (tensor.flatten()[excess.argmax()].item() for tensor in (found, known))
        sys.exit(f"FAILED: {what} has {one!r} where {other!r} should be")


def check_all(what: str, found: Sequence, known: Sequence) -> None:
    for kind, of_found, of_known in zip(["weights", "biases"], found, known, strict=True):
        for n, (one, other) in enumerate(zip(of_found, of_known, strict=True)):
            check(f"{what} {kind}[{n}]", one, other)


def compare_jacobians(x: Tensor, *w: Sequence[Tensor]) -> Parameters:
    J = jacobian(x, *w)
    check_all("the Jacobian of", J, torch.func.jacrev(partial(model, x), argnums=(0, 1))(*w))
    return J


def fit_line(gradients: Callable[..., LossAndGrads]) -> list[float]:
    """The losses of EPOCHS, then b and w, starting from w = 1 and b = 0."""
    w, b, shown = torch.ones(1, 1), torch.zeros(1), []
    for epoch in range(1, EPOCHS[-1] + 1):
        loss, (grad_w,), (grad_b,) = gradients(X, TARGET, [w], [b])
        w, b = w - 1e-2 * grad_w, b - 1e-2 * grad_b
        if epoch in EPOCHS:
            shown.append(loss.item())
    return [*shown, b.item(), w.item()]


def fit_line_in_one_call() -> list[float]:
    """What `fit_line` does. A network without hidden layers is a straight line."""
    net = ReluMLP(1, [], 1)
    net.load_state_dict({"0.weight": torch.ones(1, 1), "0.bias": torch.zeros(1)})
    step = TrainingStep(net, "mse", torch.optim.SGD(net.parameters(), lr=1e-2))
    losses = step.repeat(X, TARGET, EPOCHS[-1])
    return [
        *(losses[epoch - 1].item() for epoch in EPOCHS),
        net[0].bias.item(),
        net[0].weight.item(),
    ]


def main() -> None:
    x = torch.arange(1.0, 9.0).view(4, 2)
    J = compare_jacobians(x, [torch.ones(1, 2)], [torch.zeros(1)]).weights[0].view(4, 2)
    check("the Jacobian of x w", J, x)
    print(f"The Jacobian of x w, by hand and by autograd, is x:\n{J}\n")

    ways = {"J^T dL/dy": by_jacobian, "without J": by_product}
    ways |= {"one call": partial(loss_and_grads, loss="mse"), "autograd": by_autograd}
    table = pd.DataFrame({"known": KNOWN}, [*(f"loss {epoch}" for epoch in EPOCHS), "b", "w"])
    for way, gradients in ways.items():
        table[way] = fit_line(gradients)
    table["TrainingStep"] = fit_line_in_one_call()
    for way in table.columns[1:]:
        check(f"the line by {way}", torch.tensor(table[way].to_list()), KNOWN, LIMIT)
    print(table.map("{:.6f}".format).to_string(), "\n")

    torch.manual_seed(0)
    sizes = (8, 3), (8, 2), (4, 3), (2, 4), (4,), (2,)
    x, target, *w = (torch.randint(-3, 4, size).float() for size in sizes)
    J, known = compare_jacobians(x, w[:2], w[2:]), by_autograd(x, target, w[:2], w[2:])
    print("Of a network 3-4-2 and 8 rows, J has", [tuple(part.shape) for part in J[0] + J[1]])
    for way, gradients in ways.items():
        loss, *grads = gradients(x, target, w[:2], w[2:])
        check(f"the network by {way}: loss", loss, known.loss)
        check_all(f"the network by {way}: gradient of", grads, known[1:])
    print("and all ways lead to the same gradient, in every bit:", known.biases[1].tolist(), "...")


if __name__ == "__main__":
    main()
