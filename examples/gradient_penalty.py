"""A critic with a gradient penalty, as in WGAN-GP: the fused layer next to `nn.Sequential`.

    python examples/gradient_penalty.py

There are two samples in the plane; the second is the first, moved by 2. The critic D is trained to
be large on the second and small on the first. A penalty keeps the length of dD/dx near 1 between
them, and its gradient is a second derivative of D. Both critics start with the same parameters and
see the same points. An error ends the program if their losses differ by more than rounding
explains, or if D does not tell how far the sample was moved.
"""

import copy
import sys

import torch
from torch import Tensor, nn

import agreement
from relu_mlp import ReluMLP

# A power of two. Then the two samples' parts of the gradient of D's last bias cancel exactly.
# Otherwise a rounding error would be left, and Adam would make a full step of it.
ROWS = 128
HIDDEN, STEPS, PENALTY, LEARNING_RATE = 32, 150, 10, 2e-3
MOVED = torch.tensor([1.2, 1.6], dtype=torch.float64)  # a distance of 2

# With slope s, D rises by 2 s, and 10 (s - 1)^2 - 2 s has its minimum at s = 1.1.
KNOWN, ENOUGH = 2.2, 0.05


def slopes(critic: nn.Module, x: Tensor) -> Tensor:
    """|dD/dx| (rows,), which can be differentiated again. A row of D depends only on its x."""
    x = x.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(critic(x).sum(), x, create_graph=True)
    return gradient.norm(dim=1)


def terms_of(critic: nn.Module, x: Tensor, between: Tensor) -> Tensor:
    """The three terms of the loss."""
    penalty = PENALTY * (slopes(critic, between) - 1).square().mean()
    return torch.stack([critic(x).mean(), -critic(x + MOVED).mean(), penalty])


def train(critic: nn.Sequential, x: Tensor, shaken: bool = False) -> Tensor:
    """The terms of the loss in every step (STEPS, 3)."""
    draws = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(critic.parameters(), LEARNING_RATE, betas=(0.9, 0.99))
    weights, biases = ([p.data for p in critic.parameters() if p.dim() == d] for d in (2, 1))
    shake = agreement.shaken(lambda *parameters: None)  # it works in place and returns nothing
    curve = []
    for _ in range(STEPS):
        if shaken:
            shake(x, x, weights, biases)
        between = x + torch.rand(ROWS, 1, dtype=x.dtype, generator=draws) * MOVED
        terms = terms_of(critic, x, between)
        optimizer.zero_grad()
        terms.sum().backward()
        optimizer.step()
        curve.append(terms.detach())
    return torch.stack(curve)


def limits(curve: Tensor, if_shaken: Tensor, n: int) -> Tensor:
    """How far apart n roundings may move each of two curves; see agreement.compare_curves."""
    amplified = ((if_shaken - curve).abs().amax(1) / agreement.SHAKE).cummax(0).values
    limit = 2 * agreement.gamma(n) * amplified.maximum(curve.abs().sum(1))
    return limit[:, None].expand_as(curve)


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    x = 0.5 * torch.randn(ROWS, 2, dtype=torch.float64)
    fused = ReluMLP(2, [HIDDEN, HIDDEN], 1, dtype=torch.float64)
    children = [nn.Linear(2, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, HIDDEN), nn.ReLU()]
    native = nn.Sequential(*children, nn.Linear(HIDDEN, 1)).double()
    native.load_state_dict(fused.state_dict())
    shaken = train(copy.deepcopy(native), x, shaken=True)
    curve, found = train(native, x), train(fused, x)

    # The gradient of the penalty goes up and down the network twice. No other goes further.
    n = 2 * agreement.roundings(x, [p for p in native.parameters() if p.dim() == 2])
    limit = limits(curve, shaken, n)
    agreement.compare("term", (found, curve), ("by ReluMLP", "by nn.Sequential"), limit)
    print("step         ReluMLP   nn.Sequential      apart  rounding explains")
    for step in [0, *range(49, STEPS, 50)]:
        losses, apart = [c[step].sum().item() for c in (found, curve)], (found - curve)[step].abs()
        print("{:4}{:16.12f}{:16.12f}".format(step, *losses), end="")
        print(f"{apart.max().item():11.1e}{limit[step, 0].item():19.1e}")

    rise = (fused(x + MOVED) - fused(x)).mean().item()
    print(f"D rises by {rise:.4f}, with a slope of {slopes(fused, x + MOVED / 2).mean():.4f}")
    if not abs(rise - KNOWN) < ENOUGH:
        sys.exit(f"FAILED: D rises by {rise:.4f} where it should by {KNOWN}")


if __name__ == "__main__":
    main()
