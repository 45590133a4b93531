"""Differentially private training: every sample's gradient, or every sample's norm.

    python examples/per_sample.py

Such training clips the gradient of each sample to the length CLIP, adds up the clipped gradients,
and adds noise. One way gets every sample's gradient from `torch.func`. The other way gets only
their norms, and then one gradient of all samples, each scaled by its factor; it never holds the
gradient of a single sample. An error ends the program unless the gradients of the first step equal
those of a loop over the samples with PyTorch's layers, and unless both ways agree in every step,
each up to rounding.
"""

import torch
from torch import Tensor
from torch.func import grad_and_value, vmap
from torch.nn.utils import parameters_to_vector, vector_to_parameters

import agreement
from relu_mlp import LossAndGrads, Parameters, ReluMLP, linearize, relu_mlp

ROWS, SIZES, STEPS, LEARNING_RATE = 256, (8, [64, 64], 1), 50, 0.5
CLIP, NOISE = 1.0, 1.0  # the noise of each parameter, as a multiple of CLIP


def every_gradient(x: Tensor, target: Tensor, w: Parameters) -> LossAndGrads:
    """(y - target)^2 and its gradients, each (rows, *parameter.shape)."""

    def loss(w: Parameters, row: Tensor, target: Tensor) -> Tensor:
        return (relu_mlp(row, *w) - target).square().sum()

    grads, losses = vmap(grad_and_value(loss), in_dims=(None, 0, 0))(w, x, target)
    return LossAndGrads(losses, *grads)


def factors(norms: Tensor) -> Tensor:
    return (CLIP / norms).clamp(max=1)


def by_gradients(x: Tensor, target: Tensor, w: Parameters) -> tuple[Tensor, Tensor]:
    """The norms (rows,), and the sum of the clipped gradients (parameters,)."""
    _, of_weights, of_biases = every_gradient(x, target, w)
    grads = torch.cat([grad.flatten(1) for grad in (*of_weights, *of_biases)], 1)
    norms = grads.norm(dim=1)
    return norms, factors(norms) @ grads


def by_norms(x: Tensor, target: Tensor, w: Parameters) -> tuple[Tensor, Tensor]:
    """The same. It holds only activations and their gradients."""
    net = linearize(x, *w)
    grad_y = 2 * (net.y - target)
    norms = net.row_norms(grad_y)
    grads = net.vjp(factors(norms)[:, None] * grad_y)
    return norms, parameters_to_vector([*grads.weights, *grads.biases])


def bounds(x: Tensor, target: Tensor, w: Parameters, norms: Tensor) -> tuple[Tensor, Tensor]:
    """How far two correct computations of both may be apart.

    n roundings move a sum of products by at most gamma(n) times the sum of their absolute values.
    A network of absolute values, whose units are all on, gives at least that sum. A factor has the
    relative error of its norm.
    """
    gamma, parameters = agreement.gamma, sum(p.numel() for kind in w for p in kind)
    n = agreement.roundings(x, w.weights)
    size = linearize(x.abs(), *([p.abs() for p in kind] for kind in w))
    grad_y = 2 * (size.y + target.abs())
    in_norms = 2 * (gamma(n) * size.row_norms(grad_y) + gamma(parameters + 5) * norms)
    off = factors(norms) * (2 * gamma(n) + in_norms / norms)
    grads = size.vjp(off[:, None] * grad_y)
    return in_norms, parameters_to_vector([*grads.weights, *grads.biases])


def check_every_gradient(x: Tensor, target: Tensor, w: Parameters) -> None:
    found = every_gradient(x, target, w)
    for n in range(ROWS):
        sample = x[n : n + 1], target[n : n + 1], *w
        of_one = LossAndGrads(found.loss[n], *([g[n] for g in kind] for kind in found[1:]))
        expected, bound = agreement.by_autograd(*sample), agreement.gradient_bounds(*sample)
        agreement.compare_gradients(f"sample {n}", of_one, "by vmap", expected, bound)


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    net = ReluMLP(*SIZES, dtype=torch.float64).requires_grad_(False)
    w = Parameters(tuple(net[n].weight for n in (0, 2, 4)), tuple(net[n].bias for n in (0, 2, 4)))
    vector = parameters_to_vector([*w.weights, *w.biases])
    x = torch.randn(ROWS, SIZES[0], dtype=torch.float64)
    target = x[:, :1].abs() - x[:, 1:2]

    check_every_gradient(x, target, w)
    units = sum(weight.shape[0] for weight in w.weights)
    print(f"{ROWS} gradients of {len(vector)} parameters are {ROWS * len(vector)} numbers;")
    print(f"the activations and their gradients, which the norms need, are {2 * ROWS * units}")
    print("step  mean loss  longest gradient  shortened  apart, of what rounding explains")
    for step in range(STEPS):
        (norms, found), (known, expected) = by_norms(x, target, w), by_gradients(x, target, w)
        in_norms, in_sums = bounds(x, target, w, norms)
        by, when = ("by norms", "by gradients"), f"step {step}, "
        apart = agreement.compare(when + "norms", (norms, known), by, in_norms)
        apart = max(apart, agreement.compare(when + "sum", (found, expected), by, in_sums))
        if step % 10 == 9 or not step:
            loss, clipped = (net(x) - target).square().mean(), (norms > CLIP).sum()
            print(f"{step:4}{loss:11.6f}{norms.max():18.6f}{clipped:11}{apart:12.2g}")
        noise = NOISE * CLIP * torch.randn(len(vector), dtype=vector.dtype)
        vector -= LEARNING_RATE / ROWS * (found + noise)
        vector_to_parameters(vector, [*w.weights, *w.biases])


if __name__ == "__main__":
    main()
