"""The derivative of the outputs with respect to the parameters: the Jacobian, and its products.

Let w be all weights and biases, and J = dy/dw. A small change dw of the parameters changes the
outputs by J dw, and a loss of the outputs has the gradient J^T dl/dy. `jacobian` returns J.
`linearize` returns an object that multiplies by J without forming it: it holds the activations of
one forward pass.

The formulas are in reference.py, in plain PyTorch for every backend. Forward passes and J^T u run
on the backend in force.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import checks, reference, second_order
from ._torch_private import below_autograd, disable_autocast, version_of
from .activations import OutputActivation
from .functional import (
    activation_name,
    checked_parameters,
    list_of_tensors,
    refuse_transforms,
    split_by_kind,
)
from .ops import NO_TENSOR, backend, implementation_for, stand_ins


class Parameters(NamedTuple):
    """One tensor for each parameter of a network: tangents, gradients or Jacobians.

    The function that takes or returns it gives the shapes. The dtype is that of the network.
    """

    weights: tuple[Tensor, ...]  #: an entry for each weight
    #: an entry for each bias, None for a missing bias; None if the network has no biases
    biases: tuple[Tensor | None, ...] | None


def jacobian(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None] | None = None,
    *,
    output_activation: OutputActivation | None = None,
) -> Parameters:
    """The derivative of every output with respect to every parameter.

    With y = `relu_mlp(x, weights, biases)`, the entry of a parameter p holds d y[n, o] / d p at
    [n, o]. One batched backward pass computes all entries:

        d y[n, o] / d W_l[i, j] = delta_l[n, o, i] a_{l-1}[n, j]
        d y[n, o] / d b_l[i]    = delta_l[n, o, i]

    with delta as in `reference.jacobian`. The result has rows * out_features times as many numbers
    as the network has parameters. `linearize` multiplies by the Jacobian without forming it.

    Args:
        x: (rows, in_features), of dtype float64, float32, bfloat16 or float16.
        weights, biases, output_activation: as in `relu_mlp`.

    Returns:
        `Parameters(weights, biases)`: each entry is (rows, out_features, *parameter.shape), in the
        dtype of x. No result requires a gradient. Autocast does not apply.

    Raises:
        TypeError, ValueError: as in `relu_mlp`.
        RuntimeError: as in `relu_mlp`; if x is not a matrix; or under `torch.func` and
            forward-mode differentiation.
    """
    if isinstance(x, Tensor) and x.dim() != 2:
        raise RuntimeError(f"x must have shape (rows, in_features), got {tuple(x.shape)}")
    return _linearize("jacobian", x, weights, biases, output_activation).jacobian()


def linearize(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None] | None = None,
    *,
    output_activation: OutputActivation | None = None,
) -> Linearization:
    """A network near its parameters, y + J dw with J = dy/dw, without forming J.

    This runs one forward pass. After that, each product with J or its transpose costs about as
    much as a forward or a backward pass.

    Args:
        x: (*, in_features), of dtype float64, float32, bfloat16 or float16.
        weights, biases, output_activation: as in `relu_mlp`.

    Returns:
        A `Linearization`, with y as its attribute and the products as its methods. Autocast does
        not apply.

    Raises:
        TypeError, ValueError: as in `relu_mlp`.
        RuntimeError: as in `relu_mlp`, or under `torch.func` and forward-mode differentiation.
    """
    return _linearize("linearize", x, weights, biases, output_activation)


def _linearize(
    function: str,
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None] | None,
    output_activation: OutputActivation | None,
) -> Linearization:
    activation = activation_name(output_activation)
    weight_list, present = checked_parameters(x, weights, biases)
    with _by_hand(function, x, weight_list, present):
        return Linearization(x, weight_list, present, activation)


@contextmanager
def _by_hand(function: str, *arguments: Any) -> Iterator[None]:
    """Records no graph, ignores autocast, and raises RuntimeError under a transform."""
    refuse_transforms(function, *arguments)
    with disable_autocast(), below_autograd():
        yield


class Linearization:
    """The result of `linearize`: y, and products with the Jacobian J = dy/dw.

    No result requires a gradient. The object refers to x and the parameters. Its methods raise a
    RuntimeError once one of these, or y, has been changed in place, and under `torch.func` and
    forward-mode differentiation. A copy or an unpickled object has its own x and parameters.

    Attributes:
        y: (*, out_features), the outputs, in the dtype of x.
    """

    def __init__(
        self, x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], activation: str
    ) -> None:
        self._implementation = implementation_for(x)
        self._x, self._weights, self._biases = (
            x.detach(),
            [weight.detach() for weight in weights],
            [bias if bias is NO_TENSOR else bias.detach() for bias in biases],
        )
        self._activation = activation
        self.y, self._hidden = self._implementation.forward(
            self._x, self._weights, stand_ins(self._biases), activation, True
        )
        self._versions = [version_of(tensor) for tensor in self._counted()]

    def __getstate__(self) -> dict[str, Any]:
        """For `copy` and `pickle`. Raises a RuntimeError after an in-place change.

        The tensors are cloned. Copied together with the network, they would share memory with the
        network's copy, but not its version counters.
        """
        self._check_versions()
        return {
            **self.__dict__,
            "_x": self._x.clone(),
            "y": self.y.clone(),
            "_weights": [weight.clone() for weight in self._weights],
            "_biases": [None if bias is NO_TENSOR else bias.clone() for bias in self._biases],
            "_implementation": "reference" if self._implementation is reference else "auto",
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._biases = [NO_TENSOR if bias is None else bias for bias in state["_biases"]]
        with backend(state["_implementation"]):
            self._implementation = implementation_for(self._x)
        self._versions = [version_of(tensor) for tensor in self._counted()]

    def jvp(self, tangent: Parameters) -> Tensor:
        """J v: the change of y when the parameters change by v (forward-mode differentiation).

        `reference.jvp` has the formulas.

        Args:
            tangent: v, as `Parameters` or another pair (weights, biases), with an entry of the
                shape and dtype of each parameter. None for a bias, or for all biases, means 0.

        Returns:
            (*, out_features), with the shape and dtype of y.

        Raises:
            TypeError: if `tangent` is not a pair of sequences of tensors.
            ValueError: if it has the wrong number of entries, or an entry for a missing bias.
            RuntimeError: if an entry has another shape, dtype or device than its parameter.
        """
        weight_tangents, bias_tangents = self._checked(tangent)
        self._check_versions()
        with _by_hand("jvp", weight_tangents, bias_tangents):
            change, _ = reference.jvp(
                *self._pass(), self._activation, None, weight_tangents, bias_tangents
            )
        return change.reshape(self.y.shape)

    def vjp(self, grad_output: Tensor) -> Parameters:
        """J^T u: the parameters' gradients of a loss whose gradient with respect to y is u.

        This is the backward pass of `reference.backward`.

        Args:
            grad_output: u, with the shape, dtype and device of y.

        Returns:
            `Parameters(weights, biases)`: each entry has the shape and dtype of its parameter.

        Raises:
            TypeError: if u is not a tensor.
            RuntimeError: if u has another shape, dtype or device than y.
        """
        self._check_grad_output(grad_output)
        needs = reference.needs_of(False, [True] * len(self._weights), self._has_bias())
        saved = reference.pack(
            self._x, self.y, self._weights, self._hidden, self._activation, needs
        )
        with _by_hand("vjp", grad_output):
            grads = iter(
                self._implementation.backward(grad_output.detach(), saved, self._activation, needs)
            )
        of_weights = [next(grads) for _ in self._weights]
        of_biases = [NO_TENSOR if bias is NO_TENSOR else next(grads) for bias in self._biases]
        return Parameters(*split_by_kind([*of_weights, *of_biases], self._biases))

    def row_norms(self, grad_output: Tensor) -> Tensor:
        """The norm of each row's gradient, over all parameters together.

        The rows' gradients are the terms of J^T u. Row n adds the outer product
        delta_l[n]^T a_{l-1}[n] to the gradient of W_l and delta_l[n] to that of b_l, so

            norm[n]^2 = sum over l of |delta_l[n]|^2 (|a_{l-1}[n]|^2 + 1)

        without the 1 where there is no bias. So no row's gradient is ever stored. With factors
        min(1, C / norm[n]), ``vjp(factors[:, None] * grad_output)`` is the sum of the clipped
        gradients, as differentially private training needs it.

        Args:
            grad_output: u, with the shape, dtype and device of y.

        Returns:
            y.shape[:-1], one norm for each row, in the dtype of x, or in float32 if that dtype has
            16 bits.

        Raises:
            TypeError, RuntimeError: as in `vjp`.
        """
        dtype = torch.promote_types(self._x.dtype, torch.float32)
        with self._deltas("row_norms", grad_output) as (deltas, inputs):
            of_layers = []
            for delta, a, has_bias in zip(deltas, inputs, self._has_bias(), strict=True):
                size = torch.linalg.vector_norm(a, dim=1, dtype=dtype)
                if has_bias:
                    size = torch.hypot(size, torch.ones_like(size))
                of_layers.append(size * torch.linalg.vector_norm(delta, dim=1, dtype=dtype))
            norms = torch.linalg.vector_norm(torch.stack(of_layers), dim=0)
        return norms.reshape(self.y.shape[:-1])

    def row_gradients(self, grad_output: Tensor) -> Parameters:
        """Each row's gradient, by the formulas of `row_norms`. `vjp` returns their sum.

        The result is that of `torch.func.vmap` of `torch.func.grad`, without their overhead.

        Args:
            grad_output: u, with the shape, dtype and device of y.

        Returns:
            `Parameters(weights, biases)`: each entry is (rows, *parameter.shape), in the dtype of
            x. All leading dimensions of x together count as rows.

        Raises:
            TypeError, RuntimeError: as in `vjp`.
        """
        with self._deltas("row_gradients", grad_output) as (deltas, inputs):
            of_weights = [
                delta[:, :, None] * a[:, None, :] for delta, a in zip(deltas, inputs, strict=True)
            ]
            deltas[-1] = deltas[-1].clone()  # it may be grad_output itself
        return Parameters(*split_by_kind([*of_weights, *deltas[: len(self._biases)]], self._biases))

    @contextmanager
    def _deltas(
        self, function: str, grad_output: Tensor
    ) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
        """delta_1, ..., delta_L and x, a_1, ..., a_{L-1}, as matrices."""
        self._check_grad_output(grad_output)
        x, y, weights, hidden = self._pass()
        inputs = [x, *hidden]
        with _by_hand(function, grad_output):
            u = reference.as_matrix(grad_output.detach())
            needs = "0" + "1" * (2 * len(weights))
            yield (
                second_order.propagate_deltas(u, y, weights, inputs, self._activation, needs),
                inputs,
            )

    def gauss_newton(self, tangent: Parameters) -> Parameters:
        """J^T J v: the Gauss-Newton product of the loss ½ sum (y - t)².

        J^T J is the Hessian of that loss without the second derivative of the network.

        Args:
            tangent: v, as in `jvp`.

        Returns:
            `Parameters(weights, biases)`, as from `vjp`.

        Raises:
            TypeError, ValueError, RuntimeError: as in `jvp`.
        """
        return self.vjp(self.jvp(tangent))

    def jacobian(self) -> Parameters:
        """J itself, by the formulas of `relu_mlp.jacobian`.

        Returns:
            `Parameters(weights, biases)`: each entry is (rows, out_features, *parameter.shape), in
            the dtype of x. All leading dimensions of x together count as rows.
        """
        self._check_versions()
        with _by_hand("jacobian"):
            of_weights, of_biases = reference.jacobian(*self._pass(), self._activation)
        return Parameters(
            *split_by_kind([*of_weights, *of_biases[: len(self._biases)]], self._biases)
        )

    def _has_bias(self) -> list[bool]:
        return [bias is not NO_TENSOR for bias in self._biases] or [False] * len(self._weights)

    def _check_grad_output(self, grad_output: Tensor) -> None:
        if not isinstance(grad_output, Tensor):
            raise TypeError(f"grad_output must be a Tensor, got {type(grad_output).__name__}")
        checks.check_like_output("grad_output", grad_output, self._x, self.y.shape)
        self._check_versions()

    def _pass(self) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
        """x and y as matrices, the weights and the hidden activations."""
        as_matrix = reference.as_matrix
        return as_matrix(self._x), as_matrix(self.y), self._weights, self._hidden

    def _counted(self) -> Iterator[Tensor]:
        """The tensors that must not change, without inference tensors, which have no versions."""
        for tensor in (self._x, self.y, *self._weights, *self._biases):
            if not tensor.is_inference():
                yield tensor

    def _check_versions(self) -> None:
        if self._versions != [version_of(tensor) for tensor in self._counted()]:
            raise RuntimeError(
                "x, y or a parameter has been changed in place since linearize(...), so products "
                "would be wrong now. Call linearize(...) again."
            )

    def _checked(self, tangent: Parameters) -> tuple[list[Tensor], list[Tensor | None]]:
        if not isinstance(tangent, tuple) or len(tangent) != 2:
            raise TypeError(
                f"tangent must be a pair (weights, biases), got {type(tangent).__name__}"
            )
        layers = len(self._weights)
        weight_tangents: list[Tensor] = list_of_tensors("tangent.weights", tangent[0])
        bias_tangents: list[Tensor | None] = [None] * layers
        if tangent[1] is not None:
            bias_tangents = list_of_tensors("tangent.biases", tangent[1], or_none=True)
        for kind, length in (("weights", len(weight_tangents)), ("biases", len(bias_tangents))):
            if length != layers:
                raise ValueError(
                    f"tangent.{kind} must have one entry for each of the {layers} layers, "
                    f"got {length}"
                )
        biases = self._biases or [NO_TENSOR] * layers
        for layer, weight in enumerate(self._weights):
            self._check_entry(f"tangent.weights[{layer}]", weight_tangents[layer], weight)
            bias_tangent = bias_tangents[layer]
            if bias_tangent is not None:
                self._check_entry(f"tangent.biases[{layer}]", bias_tangent, biases[layer])
        return weight_tangents, bias_tangents

    def _check_entry(self, name: str, entry: Tensor, parameter: Tensor) -> None:
        if parameter is NO_TENSOR:
            raise ValueError(f"{name} must be None, as that layer has no bias")
        if entry.shape != parameter.shape:
            raise RuntimeError(
                f"{name} must have shape {tuple(parameter.shape)}, got {tuple(entry.shape)}"
            )
        checks.check_like_x(name, entry, self._x)
