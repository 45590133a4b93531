"""Fits a small `ReluMLP` by Levenberg-Marquardt, compared with Adam.

    python examples/levenberg_marquardt.py [--out demo]

The network learns a controller whose actuator has limits: u = 2 x + v, clipped to [-1, 1], at 400
states (x, v). A Levenberg-Marquardt step d solves (J^T J + damping I) d = -J^T r, where
r = y - target and J = dy/dw. Conjugate gradients solve it from products alone, so J is never
formed. An error ends the program unless J^T J v equals that of the full J, and unless the loss is
at most a millionth of Adam's, which runs at three learning rates and does more work. Writes
OUT/levenberg_marquardt.png.
"""

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import matplotlib
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from relu_mlp import Linearization, Parameters, ReluMLP, jacobian, linearize, loss_and_grads

# Work is counted in forward passes, which multiply by each weight matrix once. J v multiplies
# twice, for the change of a layer's input and for that of its weight, and so does J^T u.
FORWARD, PRODUCT, MOST, SHOWN = 1, 2, 3000, [30, 100, 300, 1000, 3000]

# At an exact fit J^T J is the Hessian. A step solved to 1 % then leaves some 1e-3 of the loss,
# until the rounding of y leaves 1e-32. EXACT is above that. 20 fits that rounded in other orders,
# 18 of them with permuted rows, reached it within 1206 passes. Adam is at 1e-8 after 3000.
EXACT, MARGIN = 1e-28, 1e-6
COLORS = "#2166ac", "#fdb863", "#e08214", "#b35806"
Steps = Iterator[tuple[int, Tensor]]  # the work since the last step, and the mean squared error


def flatten(parameters: Parameters) -> Tensor:
    return parameters_to_vector([*parameters.weights, *parameters.biases])


def unflatten(vector: Tensor, like: Parameters) -> Parameters:
    parameters = Parameters(*(tuple(map(torch.empty_like, tensors)) for tensors in like))
    vector_to_parameters(vector, [*parameters.weights, *parameters.biases])
    return parameters


def solve(net: Linearization, damping: float, b: Tensor, w: Parameters) -> tuple[Tensor, int]:
    """d with (J^T J + damping I) d = b to 1 % of b, and the number of products, 50 at most."""
    d, rest, direction, products = torch.zeros_like(b), b, b, 0
    while (square := rest @ rest) > 1e-4 * (b @ b) and products < 50:
        product = flatten(net.gauss_newton(unflatten(direction, w))) + damping * direction
        length = square / (direction @ product)
        d, rest = d + length * direction, rest - length * product
        direction = rest + (rest @ rest) / square * direction
        products += 1
    return d, products


def levenberg_marquardt(x: Tensor, target: Tensor, w: Parameters) -> Steps:
    net, work, damping = linearize(x, *w), FORWARD, 1e-2
    while True:
        residual = net.y - target
        yield work, residual.square().mean()
        gradient = flatten(net.vjp(residual))
        d, products = solve(net, damping, -gradient, w)
        work = PRODUCT * (1 + 2 * products) + FORWARD
        candidate = unflatten(flatten(w) + d, w)
        there = linearize(x, *candidate)
        # The gain is the decrease of ½ |residual|² over the decrease that J predicts. Above 1/2
        # the damping decreases (H. B. Nielsen's formula, here limited to 1/3 and 10).
        decrease = residual.square().sum() - (there.y - target).square().sum()
        gain = (decrease / (d @ (damping * d - gradient))).item()
        damping *= min(max(1 / 3, 1 - (2 * gain - 1) ** 3), 10)
        if gain > 0:
            w, net = candidate, there


def adam(x: Tensor, target: Tensor, w: Parameters, lr: float) -> Steps:
    vector = flatten(w)
    optimizer = torch.optim.Adam([vector], lr=lr)
    while True:
        loss, *grads = loss_and_grads(x, target, *unflatten(vector, w), loss="mse")
        yield FORWARD + PRODUCT, loss
        vector.grad = flatten(Parameters(*grads))
        optimizer.step()


def follow(steps: Steps) -> pd.DataFrame:
    """The smallest loss so far over the number of passes, and the seconds since the first."""
    passes, rows = 0, []
    while passes < MOST and not (rows and rows[-1][2] < EXACT):
        work, loss = next(steps)
        passes += work
        rows.append((passes, time.perf_counter(), loss.item()))
    curve = pd.DataFrame(rows, columns=["passes", "seconds", "loss"]).set_index("passes")
    return curve.assign(seconds=curve["seconds"] - rows[0][1], loss=curve["loss"].cummin())


def check_gauss_newton(rows: int, like: Parameters) -> None:
    """J^T J v in both ways. Sums and products of small integers are exact, without a tolerance."""
    x = torch.randint(-3, 4, (rows, like.weights[0].shape[1])).double()
    w, v = (unflatten(torch.randint(-3, 4, flatten(like).shape).double(), like) for _ in range(2))
    of_weights, of_biases = jacobian(x, *w)
    J = torch.cat([entry.flatten(2).flatten(0, 1) for entry in [*of_weights, *of_biases]], 1)
    apart = (flatten(linearize(x, *w).gauss_newton(v)) - J.T @ (J @ flatten(v))).abs()
    if not (apart == 0).all():
        sys.exit(f"FAILED: J^T J v by linearize and by jacobian are {apart.max():.3g} apart")
    print(f"J^T J v is that of the {len(J)} x {J.shape[1]} Jacobian, and did not form it")


def draw(path: Path, curves: dict[str, pd.DataFrame]) -> None:
    with matplotlib.rc_context({"axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(9, 3.6), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True)
    for color, (name, curve) in zip(COLORS, curves.items(), strict=True):
        left.plot(curve.index, curve["loss"], color=color)
        right.plot(curve["seconds"], curve["loss"], color=color, label=name)
    left.set(xlabel="work, in forward passes", ylabel="smallest loss so far", yscale="log")
    right.set(xlabel="seconds")
    right.legend(frameon=False)
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description="Levenberg-Marquardt compared with Adam.")
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder for the picture")
    picture = parser.parse_args().out / "levenberg_marquardt.png"
    picture.parent.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    first, _, second = ReluMLP(2, 16, 1, dtype=torch.float64).requires_grad_(False)
    w = Parameters((first.weight, second.weight), (first.bias, second.bias))
    check_gauss_newton(400, w)
    x = 2 * torch.rand(400, 2, dtype=torch.float64) - 1
    target = (2 * x[:, :1] + x[:, 1:]).clamp(-1, 1)
    curves = {"Levenberg-Marquardt": follow(levenberg_marquardt(x, target, w))}
    for lr in (1e-2, 3e-2, 1e-1):
        curves[f"Adam, lr {lr:g}"] = follow(adam(x, target, w, lr))
    draw(picture, curves)
    losses = pd.DataFrame({name: curve["loss"].asof(SHOWN) for name, curve in curves.items()})
    print(losses.rename_axis("passes").map("{:.1e}".format).to_string(), f"\nWrote {picture}")
    final, *others = (curve["loss"].iloc[-1] for curve in curves.values())
    if not final <= MARGIN * min(others):
        sys.exit(f"FAILED: Levenberg-Marquardt ends at {final:.1e}, Adam at {min(others):.1e}")


if __name__ == "__main__":
    main()
