"""What the examples share: autograd's answer, a bound on the rounding errors, and a comparison
that ends the program if two answers differ by more than the bound.

No tolerance here is a guess. A computer rounds every sum and every product by a factor of at
most 1 + u, where u = 1.1e-16 in double precision. So a sum of n products is off by at most
gamma(n) = n u / (1 - n u) times the sum of their absolute values, in any order of summation
(Higham, Accuracy and Stability of Numerical Algorithms, section 3.1).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from relu_mlp import LossAndGrads, ReluMLP


def by_autograd(
    x: Tensor, target: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor] | None = None
) -> LossAndGrads:
    """The result of `relu_mlp.loss_and_grads`, computed by PyTorch's layers and autograd."""
    leaves = [parameter.detach().requires_grad_() for parameter in [*weights, *(biases or ())]]
    a = x
    for layer in range(len(weights)):
        a = F.linear(a, leaves[layer], leaves[len(weights) + layer] if biases else None)
        if layer < len(weights) - 1:
            a = F.relu(a)
    loss = (a - target).square().sum()
    grads = torch.autograd.grad(loss, leaves)
    grad_biases = grads[len(weights) :] if biases else None
    return LossAndGrads(loss.detach(), grads[: len(weights)], grad_biases)


def network(weights: Sequence[Tensor], biases: Sequence[Tensor] | None = None) -> ReluMLP:
    """A `ReluMLP` that starts from copies of these parameters."""
    sizes = [weights[0].shape[1], *map(len, weights)]
    net = ReluMLP(sizes[0], sizes[1:-1], sizes[-1], bias=biases is not None).to(weights[0])
    pairs = zip(weights, biases or [None] * len(weights), strict=True)
    for linear, (weight, bias) in zip(net[::2], pairs, strict=True):
        linear.weight.data.copy_(weight)
        if bias is not None:
            linear.bias.data.copy_(bias)
    return net


def named(result: LossAndGrads) -> dict[str, Tensor]:
    """The loss and the gradients by name: "loss", "weights[0]", ..., "biases[0]", ..."""
    tensors = {"loss": result.loss}
    tensors |= {f"weights[{layer}]": grad for layer, grad in enumerate(result.weights)}
    tensors |= {f"biases[{layer}]": grad for layer, grad in enumerate(result.biases or ())}
    return tensors


def compare(what: str, values: tuple[Tensor, Tensor], by: tuple[str, str], bound: Tensor) -> float:
    """Ends the program if two `values`, computed in two ways `by`, differ by more than `bound`.

    All have the same shape. Returns the largest difference as a fraction of its bound.
    """
    found, expected = values
    if found.shape != expected.shape:
        shapes = [tuple(value.shape) for value in values]
        sys.exit(f"FAILED: {what} has shape {shapes[0]} {by[0]} and {shapes[1]} {by[1]}")
    difference = (found - expected).abs()
    # If nothing is rounded, the bound is 0. Then 0 / 0 counts as 0.
    fraction = difference / bound.clamp(min=torch.finfo(bound.dtype).tiny)
    largest = fraction.max().item()
    if not largest <= 1:
        worst = tuple((fraction.isnan() | (fraction == largest)).nonzero()[0].tolist())
        sys.exit(
            f"FAILED: {what}{list(worst) or ''} is {found[worst].item()!r} {by[0]} and "
            f"{expected[worst].item()!r} {by[1]}: {difference[worst].item():.3g} apart, "
            f"and the bound is {bound[worst].item():.3g}"
        )
    return largest


def compare_gradients(
    when: str, found: LossAndGrads, by: str, expected: LossAndGrads, bounds: LossAndGrads
) -> float:
    """Applies `compare` to the loss and every gradient. The `expected` ones are by autograd."""
    values, limits = named(found), named(bounds)
    return max(
        compare(f"{when}, {name}", (values[name], tensor), (by, "by autograd"), limits[name])
        for name, tensor in named(expected).items()
    )


# -- One step: bounds for the loss and the gradients ---------------------------


def gamma(n: int, dtype: torch.dtype = torch.float64) -> float:
    """How far n roundings can move a number, as a fraction of the number."""
    u = torch.finfo(dtype).eps / 2
    return n * u / (1 - n * u)


class Rounded(NamedTuple):
    """Values, and how far a computation of them may be off."""

    value: Tensor
    error: Tensor


def exact(value: Tensor) -> Rounded:
    return Rounded(value, torch.zeros_like(value))


def product(a: Rounded, b: Rounded) -> Rounded:
    """The matrix product a b, with the errors carried over from a and b and its own."""
    a_size, b_size = a.value.abs() + a.error, b.value.abs() + b.error
    carried = a.error @ b_size + a.value.abs() @ b.error
    return Rounded(a.value @ b.value, carried + gamma(a.value.shape[1]) * (a_size @ b_size))


def gradient_bounds(
    x: Tensor, target: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor] | None = None
) -> LossAndGrads:
    """How far two correct computations of the loss, the sum of (y - target)^2, and of its
    gradients may be apart: twice as far as one of them may be from the exact values.

    Takes the arguments of `relu_mlp.loss_and_grads`, in float64. Returns the bounds in the
    places of the loss and the gradients.
    """
    a, inputs, masks = exact(x), [], []
    for layer, weight in enumerate(weights):
        if biases:  # a bias is the weight of one more input, which is 1
            a = Rounded(F.pad(a.value, (0, 1), value=1.0), F.pad(a.error, (0, 1)))
            weight = torch.cat([weight, biases[layer][:, None]], 1)
        inputs.append(a)
        z = product(a, exact(weight.T))
        if layer < len(weights) - 1:
            if not (z.value.abs() > z.error).all():
                sys.exit(
                    "FAILED: a hidden unit is so close to 0 that rounding decides whether it is "
                    "on, so its gradient has no bound. Take another seed"
                )
            masks.append(z.value > 0)
            a = Rounded(z.value * masks[layer], z.error * masks[layer])

    error = (z.value - target).abs()
    off = z.error + gamma(1) * (error + z.error)  # how far the error is off
    in_squares = (2 * error + off) * off + gamma(error.numel() + 1) * (error + off).square()
    delta = Rounded(2 * (z.value - target), 2 * off)
    in_weights: list[Tensor] = []
    in_biases: list[Tensor] = []
    for layer in reversed(range(len(weights))):
        grad = product(Rounded(*(t.T for t in delta)), inputs[layer])
        in_weights.insert(0, 2 * grad.error[:, : weights[layer].shape[1]])
        in_biases.insert(0, 2 * grad.error[:, -1])
        if layer:
            below = product(delta, exact(weights[layer]))
            delta = Rounded(*(t * masks[layer - 1] for t in below))
    bias_bounds = tuple(in_biases) if biases else None
    return LossAndGrads(2 * in_squares.sum(), tuple(in_weights), bias_bounds)


# -- Many steps: bounds for a curve of losses ----------------------------------
#
# A step carries the errors of earlier steps along, and makes them smaller or larger. How much
# larger depends on the training and not on the arithmetic. It can be measured: disturb a run in
# every step by a known amount, far above rounding, and see how far its losses move. Rounding
# does the same to a smaller extent.

#: `shaken` moves a parameter by this fraction of its value: a million times more than rounding,
#: and little enough for the effect to be proportional.
SHAKE = 1e-9


def shaken(gradients: Callable[..., LossAndGrads]) -> Callable[..., LossAndGrads]:
    """The same gradients, but they first move every parameter, in place, up or down by SHAKE."""
    generator = torch.Generator().manual_seed(0)

    def sign(n: int) -> Tensor:
        return torch.randint(2, (n,), generator=generator).double() * 2 - 1

    def disturbed(
        x: Tensor, target: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor] | None = None
    ) -> LossAndGrads:
        for weight in weights:  # a sign for each row times one for each column
            weight *= 1 + SHAKE * torch.outer(*map(sign, weight.shape))
        for bias in biases or ():
            bias *= 1 + SHAKE * sign(len(bias))
        return gradients(x, target, weights, biases)

    return disturbed


def losses_if_shaken(
    x: Tensor,
    target: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    rate: float,
    n: int,
) -> Tensor:
    """The losses (n,) of gradient descent by autograd, with `shaken` gradients."""
    weights, biases = [w.clone() for w in weights], [b.clone() for b in biases]
    gradients, losses = shaken(by_autograd), []
    for _ in range(n):
        loss, *grads = gradients(x, target, weights, biases)
        losses.append(loss)
        for parameter, grad in zip([*weights, *biases], [*grads[0], *grads[1]], strict=True):
            parameter -= rate * grad
    return torch.stack(losses)


def roundings(x: Tensor, weights: Sequence[Tensor]) -> int:
    """The largest number of roundings that a product in the loss or in a gradient goes through.

    A gradient multiplies a delta by an activation. Both went up through the layers, each of
    which is a sum of in_features products and a bias. The delta went down again, through sums
    over out_features. A gradient ends with a sum over the rows; the loss ends with a sum over
    all elements of y, which is no shorter. The other five are y - target, its double or its
    square, and the step that made the weights.
    """
    up = sum(weight.shape[1] + 1 for weight in weights)
    down = sum(weight.shape[0] for weight in weights[1:])
    return 2 * up + down + len(x) * weights[-1].shape[0] + 5


def compare_curves(what: str, curves: dict[str, Tensor], if_shaken: Tensor, n: int) -> None:
    """Ends the program if two curves of losses differ by more than rounding explains.

    In every step a product goes through n roundings. At worst they all go in one direction and
    move it by gamma(n) of its value. Shaking moves it by SHAKE, up or down. So each of two runs
    moves by at most gamma(n) / SHAKE times what shaking did in that step or before it, as a
    fraction of the loss; and by gamma(n) in any case. (Roundings seldom reach a tenth of their
    worst. This makes up for the chance in up and down.)

    Args:
        curves: the losses (steps,) by the way they were computed; the last are by autograd.
        if_shaken: the losses by autograd, with `shaken` gradients.
        n: the result of `roundings`.
    """
    *others, by_whom = curves
    losses = curves[by_whom]
    amplified = ((if_shaken - losses) / losses).abs() / SHAKE
    limits = 2 * gamma(n) * amplified.cummax(0).values.clamp(min=1)
    for by in others:
        compare(f"{what}, losses", (curves[by], losses), (by, by_whom), limits * losses)
    apart = max(((curves[by] - losses) / losses).abs().max().item() for by in others)
    print(
        f"{what}: losses {', '.join(others)} and {by_whom}\n"
        f"  are apart by at most {apart:.1e} of their value; rounding explains {limits[0]:.1e} in "
        f"the first step, {limits[-1]:.1e} in the last"
    )
