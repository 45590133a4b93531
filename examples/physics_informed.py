"""A network solves u'' = -sin x on [0, pi], u(0) = u(pi) = 0, from the equation alone.

    python examples/physics_informed.py

The solution is sin x. The network u(x) = v tanh(w x + b) + c is two fused layers. L-BFGS trains it
on the residual of the equation at 40 points, which contains the second derivative of the network
with respect to its input. `torch.func` and autograd's `create_graph` both compute that, and both
must give the loss that follows from the formula for tanh'', up to rounding. An error ends the
program unless they do, and unless u ends within 1e-3 of sin x.
"""

import math
import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import grad, vmap

import agreement
from agreement import Rounded, exact, gamma, product
from relu_mlp import ReluMLP

HIDDEN, STEPS, ENOUGH = 32, 240, 1e-3
POINTS = torch.linspace(0, math.pi, 40, dtype=torch.float64)[:, None]
ENDS = torch.tensor([[0.0], [math.pi]], dtype=torch.float64)


def by_func(net: nn.Module, x: Tensor) -> Tensor:
    """u'' (rows, 1): the second derivative at one point, for all points at once."""
    return vmap(grad(grad(lambda point: net(point[None])[0])))(x[:, 0])[:, None]


def by_create_graph(net: nn.Module, x: Tensor) -> Tensor:
    """u'' (rows, 1). A row of u depends only on its x, so the gradient of the sum has all rows."""
    x = x.detach().requires_grad_()
    (slope,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
    return torch.autograd.grad(slope.sum(), x, create_graph=True)[0]


def loss_of(net: nn.Module, second_derivative: Callable[[nn.Module, Tensor], Tensor]) -> Tensor:
    in_equation = second_derivative(net, POINTS) + POINTS.sin()
    return in_equation.square().mean() + net(ENDS).square().sum()


def by_hand(net: nn.Module) -> tuple[Tensor, Tensor]:
    """The loss from u'' = sum of v w^2 tanh''(z), and how far two correct ones may be apart."""
    w, b, v, c = (parameter.detach() for parameter in net.parameters())

    def tanh(x: Tensor) -> Rounded:
        z = product(exact(F.pad(x, (0, 1), value=1.0)), exact(torch.cat([w, b[:, None]], 1).T))
        return Rounded(z.value.tanh(), z.error + gamma(4))  # tanh' <= 1; tanh is good to 4 units

    y = tanh(POINTS)
    # tanh'' = -2 y + 2 y^3. Both terms are at most 2, and the derivative with respect to y is at
    # most 4. The two ways multiply the same factors, at most eight, in different orders.
    curvature = Rounded(-2 * y.value * (1 - y.value**2), 4 * y.error + 4 * gamma(8))
    of_unit = Rounded(v.T * w**2, gamma(8) * (v.T * w**2).abs())
    second = product(curvature, of_unit)
    ends = product(tanh(ENDS), exact(v.T))
    parts = [(second, POINTS.sin(), len(POINTS)), (ends, c.expand(2, 1), 1)]
    loss = bound = torch.zeros(())
    for part, added, rows in parts:
        left = part.value + added
        off = part.error + gamma(3) * (part.value.abs() + part.error + added.abs())
        loss = loss + left.square().sum() / rows
        within = (2 * left.abs() + off) * off + gamma(rows + 4) * (left.abs() + off).square()
        bound = bound + 2 * within.sum() / rows
    return loss, bound


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    smooth = ReluMLP(1, [], HIDDEN, output_activation="tanh", dtype=torch.float64)
    net = nn.Sequential(smooth, ReluMLP(HIDDEN, [], 1, dtype=torch.float64))
    known, bound = by_hand(net)
    print(f"loss by hand          {known.item():.12f}")
    for by, way in {"by torch.func": by_func, "by create_graph": by_create_graph}.items():
        loss = loss_of(net, way).detach()
        agreement.compare("the loss", (loss, known), (by, "by hand"), bound)
        apart = (loss - known).abs().item()
        print(f"loss {by:16} {loss.item():.12f}, {apart:.1e} apart; rounding explains {bound:.1e}")

    options = {"max_iter": 20, "tolerance_change": 0, "line_search_fn": "strong_wolfe"}
    optimizer = torch.optim.LBFGS(net.parameters(), **options)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(net, by_func)
        loss.backward()
        return loss

    x = torch.linspace(0, math.pi, 1001, dtype=torch.float64)[:, None]
    for step in range(20, STEPS + 1, 20):
        optimizer.step(closure)
        error = (net(x) - x.sin()).abs().max().item()
        print(f"{step:4} iterations: u is within {error:.1e} of sin x")
    if not error < ENOUGH:
        sys.exit(f"FAILED: u is {error:.1e} from sin x, and should be within {ENOUGH:g}")


if __name__ == "__main__":
    main()
