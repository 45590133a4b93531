"""`relu-mlp check`: `DESCRIPTION` says what it does."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from .. import backend, check_gradients, loss_and_grads, ops, relu_mlp
from ..activations import ACTIVATION_NAMES, OutputActivation
from ..checks import name_of
from ..functional import native
from ..gradient_checks.rounding import ulp
from . import Problem, rounding
from .arguments import count, seed
from .rounding import Arithmetic, Bounded

DESCRIPTION = """\
Compare every backend, dtype and output activation on this processor with float64.

Runs one random network and prints the largest error of its outputs and of its
gradients (loss_and_grads, sum of squared errors), in units in the last place of the
largest entry of the tensor. "limit" is the worst that rounding can do; "native" is the
error of PyTorch's own layers and autograd. float64 is compared with PyTorch's layers.
Then prints the gradients of a small network by hand, by autograd and by central
differences, side by side. The exit status is 1 if a result is beyond its limit.
"""

EXAMPLE = "relu-mlp check --network 8 16 16 4 --rows 256"

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
ACTIVATIONS = (None, *get_args(OutputActivation))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--network",
        type=count,
        nargs="+",
        default=[8, 16, 16, 4],
        metavar="WIDTH",
        help="in_features, hidden widths and out_features (default: 8 16 16 4)",
    )
    parser.add_argument("--rows", type=count, default=256, help="rows of the input (default: 256)")
    parser.add_argument("--seed", type=seed, default=0, help="seed of the network (default: 0)")


def run(options: argparse.Namespace) -> int:
    if len(options.network) < 2:
        raise Problem("--network must have at least two widths, in_features and out_features")
    backends = ["reference"] if ops.LIBRARY_PATH is None else ["extension", "reference"]
    print(f"{'':<32} {'outputs, in ulps':>26}  {'gradients, in ulps':>26}")
    columns = f"{'error':>8} {'limit':>8} {'native':>8}"
    print(f"{'backend':<10} {'dtype':<9} {'activation':<11} {columns}  {columns}")
    all_right = True
    for dtype in DTYPES:
        for activation in ACTIVATIONS:
            case = Case.random(options, dtype, activation)
            native_results = case.run_natively()
            for name in backends:
                with backend(name):  # type: ignore[arg-type]
                    results = case.run()
                right = case.is_right(results)
                print(
                    f"{name:<10} {name_of(dtype):<9} {activation or 'none':<11}"
                    f"{case.figures(results, native_results)}{'' if right else '  WRONG'}"
                )
                all_right &= right
    report = check_gradients(*_small_network(options.seed), loss="half_sse")
    print(f"\n{report}")
    return 0 if all_right and report.ok else 1


def _small_network(seed: int) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
    """x, target, weights and biases of a network whose gradients fit on a screen."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    x, target = randn(8, 3), randn(8, 2)
    return x, target, [randn(3, 3), randn(2, 3)], [randn(3).abs(), randn(2)]


@dataclass
class Case:
    """A network in one dtype. `expected` has y and all gradients, with error bounds."""

    x: Tensor
    target: Tensor
    weights: list[Tensor]
    biases: list[Tensor]
    activation: OutputActivation | None
    expected: list[Bounded]

    @classmethod
    def random(
        cls, options: argparse.Namespace, dtype: torch.dtype, activation: OutputActivation | None
    ) -> Case:
        """A random network. It keeps only rows in which no rounding can switch a ReLU, because the
        bounds hold for these."""
        generator = torch.Generator().manual_seed(options.seed)

        def randn(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        widths, name = options.network, ACTIVATION_NAMES[activation]
        x, target = randn(options.rows, widths[0]).to(dtype), randn(options.rows, widths[-1])
        weights = [
            (randn(n_out, n_in) / n_in**0.5).to(dtype) for n_in, n_out in itertools.pairwise(widths)
        ]
        biases = [randn(n_out).to(dtype) for n_out in widths[1:]]
        arithmetic = Arithmetic.of(dtype)
        clear = rounding.forward(x, weights, biases, name, arithmetic)[1]
        if not clear.any():
            raise Problem(
                f"in all {options.rows} rows a ReLU is too near its kink for {name_of(dtype)}; "
                "take more --rows or a smaller --network"
            )
        x, target = x[clear], target.to(dtype)[clear]
        activations, _ = rounding.forward(x, weights, biases, name, arithmetic)
        grads = rounding.gradients(activations, target, weights, name, arithmetic)
        return cls(x, target, weights, biases, activation, [activations[-1], *grads])

    def run(self) -> list[Tensor]:
        """y and the gradients by this package."""
        arguments = self.weights, self.biases
        grads = loss_and_grads(self.x, self.target, *arguments, output_activation=self.activation)
        y = relu_mlp(self.x, *arguments, output_activation=self.activation)
        return [y, *grads.weights, *(bias for bias in grads.biases or () if bias is not None)]

    def run_natively(self) -> list[Tensor]:
        """y and the gradients by PyTorch's layers and autograd."""
        parameters = [each.clone().requires_grad_() for each in [*self.weights, *self.biases]]
        layers = len(self.weights)
        name = ACTIVATION_NAMES[self.activation]
        with torch.enable_grad():
            y = native(self.x, parameters[:layers], parameters[layers:], name)
            loss = (y - self.target).square().sum()
            return [y.detach(), *torch.autograd.grad(loss, parameters)]

    def is_right(self, results: Sequence[Tensor]) -> bool:
        # The expected values were computed in float64, and have rounding errors too.
        exact = 2 if self.x.dtype is torch.float64 else 1
        return all(
            bool(((result.double() - expected.value).abs() <= exact * expected.bound).all())
            for result, expected in zip(results, self.expected, strict=True)
        )

    def figures(self, results: Sequence[Tensor], native_results: Sequence[Tensor]) -> str:
        """Error, limit and PyTorch's error: of the outputs, then of the gradients."""
        errors, limits, natives = [], [], []
        for result, other, expected in zip(results, native_results, self.expected, strict=True):
            unit = ulp(expected.value.abs().max(), self.x.dtype)
            errors.append(((result.double() - expected.value).abs().max() / unit).item())
            natives.append(((other.double() - expected.value).abs().max() / unit).item())
            limits.append((expected.bound.max() / unit).item())
        return "".join(
            f" {max(errors[part]):>8.2g} {max(limits[part]):>8.2g} {max(natives[part]):>8.2g} "
            for part in (slice(0, 1), slice(1, None))
        )
