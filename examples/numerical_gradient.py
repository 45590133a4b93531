"""A gradient by hand, by autograd and by finite differences, and which step they need.

    python examples/numerical_gradient.py

Repeats source document 002: one layer, 4 x 3 -> 2, without and with a sigmoid, and the loss
1/2 sum of (Y - T)^2. The program stops with an error if a gradient by hand differs from
autograd's or from the values known to ten digits, or if a numerical gradient is farther away
than Taylor's theorem and rounding explain. X, W, Y and T are the document's names.
"""

from __future__ import annotations

import torch
from torch import Tensor

import agreement
from relu_mlp import ReluMLP, TrainingStep, loss_and_grads

N, D, C = 4, 3, 2  # rows, inputs, outputs
STEP = 1e-4  # the document's

# The gradient with the sigmoid, in the order of the document, to ten digits.
EXACT = [-0.1916842751, -0.1505403047, -0.5027215624, -0.0967040759, -0.0302279895, -0.2850716981]


def loss(W: Tensor, X: Tensor, T: Tensor, activation: str | None) -> Tensor:
    Z = X @ W  # (4, 2)
    Y = torch.sigmoid(Z) if activation else Z  # (4, 2)
    return 0.5 * (Y - T).square().sum()


def by_hand(W: Tensor, X: Tensor, T: Tensor, activation: str | None) -> Tensor:
    """d loss / dW = X^T ((Y - T) * dY/dZ), of the shape (3, 2) of W."""
    Z = X @ W
    Y = torch.sigmoid(Z) if activation else Z
    dY_dZ = Y * (1 - Y) if activation else torch.ones_like(Z)
    return X.T @ ((Y - T) * dY_dZ)


def numerical(W: Tensor, X: Tensor, T: Tensor, activation: str | None, step: float) -> Tensor:
    """(loss(W + step) - loss(W - step)) / (2 step), for each element of W in turn."""
    gradient = torch.zeros_like(W)
    for element in range(W.numel()):
        shift = torch.zeros_like(W)
        shift.view(-1)[element] = step
        rise = loss(W + shift, X, T, activation) - loss(W - shift, X, T, activation)
        gradient.view(-1)[element] = rise / (2 * step)
    return gradient


def third_derivative(W: Tensor, X: Tensor, T: Tensor) -> Tensor:
    """d^3 loss / dW^3 with the sigmoid. The error of a central difference is h^2 / 6 times that."""
    Y = torch.sigmoid(X @ W)
    d1 = Y * (1 - Y)
    d2, d3 = d1 * (1 - 2 * Y), d1 * (1 - 6 * d1)
    return (X**3).T @ ((Y - T) * d3 + 3 * d1 * d2)


def by_one_step(W: Tensor, X: Tensor, T: Tensor, activation: str | None) -> Tensor:
    """How far one step of gradient descent with the learning rate 1 moves W: by the gradient."""
    net = ReluMLP(D, [], C, bias=False, output_activation=activation, dtype=W.dtype)
    net.load_state_dict({"0.weight": W.T})
    step = TrainingStep(net, "half_sse", torch.optim.SGD(net.parameters(), lr=1.0))
    step.repeat(X, T, 1)  # with 100 in place of 1, this is a training
    return W - net[0].weight.detach().T


def numerical_bound(
    W: Tensor, X: Tensor, T: Tensor, activation: str | None, step: float, dtype: torch.dtype
) -> Tensor:
    """How far `numerical` may be off, (3, 2).

    Truncation: at most step^2 / 6 times the largest third derivative, where |d1 d2| < 0.025 and
    |d3| <= 1/8. Rounding: Y has 4 roundings up to Z (X, W and the step are not negative) and 4 in
    the sigmoid; Y - T has one more, its square 19, and the sum of 8 squares 27; the difference,
    the quotient and the step add 3.
    """
    Z = X @ (W + step)
    Y = torch.sigmoid(Z) if activation else Z
    rounding = agreement.gamma(30, dtype) * 0.5 * (Y + T).square().sum() / step
    third = (X**3).T @ (T.clamp(min=1) / 8 + 3 * 0.025) if activation else 0 * W
    return step**2 / 6 * third + rounding


def check(X: Tensor, W: Tensor, T: Tensor, activation: str | None) -> None:
    """Compares the gradients, and prints them in the order of the document."""
    network = "Y = sigmoid(X W)" if activation else "Y = X W"
    hand = by_hand(W, X, T, activation)
    leaf = W.clone().requires_grad_()
    (autograd,) = torch.autograd.grad(loss(leaf, X, T, activation), leaf)
    # In the package a weight is (out, in), as in nn.Linear: the transpose of W.
    result = loss_and_grads(X, T, [W.T], loss="half_sse", output_activation=activation)
    package = result.weights[0].T
    double = numerical(W, X, T, activation, STEP)
    single = numerical(W.float(), X.float(), T.float(), activation, STEP)

    # Without the sigmoid all are exact sums of integers. With it, Y occurs three times, with 4
    # roundings each; 4 operations and a sum of 4 products add 8.
    Y = torch.sigmoid(X @ W)
    size = X.T @ ((Y + T) * Y * (1 + Y)) if activation else 0 * W
    bound = agreement.gamma(20) * size
    what = f"{network}: gradient of W"
    agreement.compare(what, (hand, autograd), ("by hand", "by autograd"), 2 * bound)
    agreement.compare(what, (package, autograd), ("by loss_and_grads", "by autograd"), 2 * bound)
    moved = by_one_step(W, X, T, activation)
    limit = 2 * bound + agreement.gamma(2) * (W.abs() + moved.abs())  # of two differences
    agreement.compare(what, (moved, autograd), ("by one step", "by autograd"), limit)
    limit = bound + numerical_bound(W, X, T, activation, STEP, torch.float64)
    agreement.compare(what, (double, hand), ("numerically", "by hand"), limit)
    if activation:
        known = torch.tensor(EXACT, dtype=torch.float64).view(D, C)
        # Half a unit of the tenth digit.
        agreement.compare(what, (hand, known), ("by hand", "to ten digits"), bound + 0.5e-10)

    print(f"{network}{'numerical gradient, step 1e-4, in':>{87 - len(network)}}")
    names = ["by hand", "loss_and_grads", "autograd", "float64", "float32"]
    print("element" + "".join(f"{name:>16}" for name in names))
    columns = [t.flatten().tolist() for t in (hand, package, autograd, double, single)]
    for element, row in enumerate(zip(*columns, strict=True)):
        print(f"W[{element // C}, {element % C}]" + "".join(f"{value:16.10f}" for value in row))


def compare_steps(X: Tensor, W: Tensor, T: Tensor) -> None:
    """Prints the largest error of the numerical gradient with the sigmoid, step by step."""
    hand = by_hand(W, X, T, "sigmoid")
    curved = third_derivative(W, X, T).abs().max().item()
    print("\nThe largest error of the numerical gradient, and what to expect of it:")
    print("step^2 / 6 times the third derivative, and the rounding of the loss over the step")
    print(
        f"{'step':>7}{'step^2':>14}{'float32':>14}{'rounding':>14}{'float64':>14}{'rounding':>14}"
    )
    for step in [10.0**-n for n in range(1, 10)]:
        row = f"{step:7.0e}{step**2 / 6 * curved:14.1e}"
        for dtype in (torch.float32, torch.float64):
            found = numerical(*(t.to(dtype) for t in (W, X, T)), "sigmoid", step).double()
            bound = numerical_bound(W, X, T, "sigmoid", step, dtype)
            what = f"gradient of W, step {step:.0e}, {dtype}"
            agreement.compare(what, (found, hand), ("numerically", "by hand"), bound)
            rounding = torch.finfo(dtype).eps / 2 * loss(W, X, T, "sigmoid").item() / step
            row += f"{(found - hand).abs().max().item():14.1e}{rounding:14.1e}"
        print(row)


def main() -> None:
    torch.manual_seed(42)
    T = torch.randint(10, (N, C)).double()
    X = torch.randint(3, (N, D)).double()
    W = torch.randint(3, (D, C)).double()
    check(X, W, T, None)
    check(X, W, T, "sigmoid")
    compare_steps(X, W, T)


if __name__ == "__main__":
    main()
