"""Cases of the public functions, compared with the native layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

import relu_mlp
import support
from relu_mlp import functional, ops, reference

from .breaking import broken
from .case import Case
from .network import PRECISION, Network
from .operators import OPERATORS, to_float64
from .verdict import (
    Refused,
    Subclass,
    Wrong,
    check_message,
    compare,
    describe,
    ending_without_answer,
    has_elements,
    lacks_memory,
    outcome,
    unchanged,
)

LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "sse": lambda y, target: (y - target).square().sum(),
    "half_sse": lambda y, target: (y - target).square().sum() / 2,
    "mse": F.mse_loss,
    "l1": F.l1_loss,
    "huber": F.huber_loss,
    "bce_with_logits": F.binary_cross_entropy_with_logits,
    "cross_entropy": F.cross_entropy,
}


def native(x, weights, biases=None, *, output_activation=None, recompute=False):
    """`relu_mlp.relu_mlp` with the native layers."""
    functional.activation_name(output_activation)  # raises for an unknown one
    return support.native_mlp(x, weights, biases, output_activation)


def operator(x, weights, biases=None, *, output_activation=None, recompute=False):
    """`relu_mlp.relu_mlp` with the operator itself."""
    biases = [ops.NO_TENSOR if bias is None else bias for bias in biases or []]
    return OPERATORS.relu_mlp(x, weights, biases, functional.activation_name(output_activation))


def own_leaves(case: Case, arguments: Any) -> Callable[[], Any]:
    """A function that returns the tensors once more, in the same memory.

    Some of them, always the same, are leaves that require gradients.
    """
    needing = [
        isinstance(t, Tensor) and t.is_floating_point() and case.chance(0.6)
        for t in tree_leaves(arguments)
    ]

    def make() -> Any:
        needs = iter(needing)

        def leaf(t: Any) -> Any:
            need = next(needs)
            return t.detach().requires_grad_(need) if isinstance(t, Tensor) else t

        return tree_map(leaf, arguments)

    return make


def with_gradients(
    call: Callable[..., Any], arguments: Any, grad: Callable[[Tensor], Tensor]
) -> Any:
    """y, and the gradients of all leaves that require one."""
    y = call(*arguments)
    leaves = [t for t in tree_leaves(arguments) if isinstance(t, Tensor) and t.requires_grad]
    if not leaves or not y.requires_grad:
        return y, []
    return y, list(torch.autograd.grad(y, leaves, grad(y), allow_unused=True))


def check_bounds(case: Case, net: Network, found: Any, arguments: Any) -> None:
    """Checks that y and the gradients, of real numbers, are within the bounds of rounding."""
    y, grads = found
    x, grad = (reference.as_matrix(t) for t in (net.x, net.grad))
    if not 0 < x.shape[0] <= 2100 or any(w.numel() == 0 for w in net.weights):
        return
    implementation = functional.implementation_for(net.x)
    again, hidden = support.hidden_of(implementation, x, net.weights, net.biases, net.activation)
    exact = support.Exact(x, net.weights, net.biases, net.activation, hidden, again)
    named = exact.backward(grad)
    names = ["x", *(f"weights[{n}]" for n in range(len(net.weights)))]
    names += [f"biases[{n}]" for n, b in enumerate(net.biases or []) if b is not None]
    leaves = [t for t in tree_leaves(arguments) if isinstance(t, Tensor)]
    wanted = [n for n, t in zip(names, leaves, strict=True) if t.requires_grad] if grads else []
    try:
        exact.y.check(y.detach().reshape(exact.y.value.shape), "y")
        for name, g in zip(wanted, grads, strict=True):
            named[name].check(g.reshape(named[name].value.shape), f"the gradient of {name}")
    except AssertionError as error:
        raise Wrong(str(error)) from None


def public_relu_mlp(case: Case) -> str:
    net = Network(case)
    arguments = [net.x, net.weights, net.biases, net.activation]
    valid = case.chance(0.65)
    if not valid:
        arguments = broken(case, arguments)
    make = own_leaves(case, arguments)
    recompute = case.note("recompute", case.chance(0.3))
    mode = case.mode()
    grad = net.grad
    if not valid or "autocast" in case.mode_name:
        values = case.integers(net.grad.shape)

        def grad_of(y: Tensor) -> Tensor:
            return (values if values.shape == y.shape else torch.ones(y.shape)).to(y)

    else:

        def grad_of(y: Tensor) -> Tensor:
            return grad

    def run(function: Callable[..., Tensor]) -> Any:
        leaves = make()
        with mode():
            return leaves, outcome(
                lambda: with_gradients(
                    lambda x, w, b, a: function(x, w, b, output_activation=a, recompute=recompute),
                    leaves,
                    grad_of,
                )
            )

    is_native = any(type(t) is Subclass for t in tree_leaves(arguments))
    if lacks_memory(arguments) and (is_native or "autocast" in case.mode_name):
        return "left out"  # PyTorch's layers and casts would read beyond the memory
    function = relu_mlp.relu_mlp
    if valid and "autocast" not in case.mode_name and case.chance(0.25):
        function = case.note("as", operator)
    with unchanged(arguments):
        leaves, found = run(function)
    if isinstance(found, Refused) and not valid:
        check_message(found)
    if lacks_memory(arguments):
        if has_elements(arguments) and not isinstance(found, Refused):
            raise Wrong("a tensor has no memory, and the call was answered")
        return "refused" if isinstance(found, Refused) else "without elements"
    _, expected = run(native)
    if isinstance(found, Refused):
        if not isinstance(expected, Refused):
            if valid:
                raise Wrong(f"the native layers serve what was refused: {found!r}")
        elif valid and not issubclass(type(found.error), type(expected.error)):
            raise Wrong(f"{found!r}, natively {expected!r}")
        return "refused"
    if isinstance(expected, Refused):
        raise Wrong(f"answered with {describe(found)}, natively {expected!r}")
    dtype = found[0].dtype if isinstance(found[0], Tensor) else net.dtype
    lowest = min((dtype, net.dtype), key=lambda t: PRECISION.get(t, 0))
    known = valid and (net.unit == 1 or "autocast" not in case.mode_name)
    exact = known and net.is_exact(lowest)
    compare("relu_mlp", found, expected, values=exact)
    if known and net.values == "real" and "autocast" not in case.mode_name:
        check_bounds(case, net, found, leaves)
    return "right"


def public_loss_and_grads(case: Case) -> str:
    """In float64, where rounding hides nothing. `op_loss_and_grads` has the other dtypes."""
    net = Network(case, [torch.float64])
    loss = case.r.choice(list(LOSSES))
    target = net.grad
    if loss == "cross_entropy" and net.x.dim() > 2:
        loss = "l1"
    elif loss == "cross_entropy" and net.grad.shape[-1] > 0 and case.chance(0.7):
        target = torch.randint(net.grad.shape[-1], net.grad.shape[:-1])
        target = torch.where(torch.rand(target.shape) < 0.2, -100, target)
    arguments: list[Any] = [net.x, target, net.weights, net.biases, loss, net.activation]
    valid = case.chance(0.6)
    if not valid:
        arguments = broken(case, arguments)

    def call(x, target, weights, biases, loss, activation):
        return relu_mlp.loss_and_grads(
            x, target, weights, biases, loss=loss, output_activation=activation
        )

    mode = case.mode()
    with unchanged(arguments), mode():
        found = outcome(lambda: call(*arguments))
    if ending := ending_without_answer(found, arguments, valid):
        return ending
    x, target, weights, biases, loss, activation = tree_map(to_float64, arguments)
    if not valid:
        return "answered"
    parameters = [t.requires_grad_() for t in [*weights, *(biases or [])] if t is not None]
    value = LOSSES[loss](native(x, weights, biases, output_activation=activation), target)
    grads = iter(torch.autograd.grad(value, parameters, materialize_grads=True))
    of_weights = tuple(next(grads) for _ in weights)
    of_biases = biases and tuple(None if b is None else next(grads) for b in biases)
    finite = net.values in ("integers", "real")
    compare("loss", found.loss, value.detach(), finite, 1e-9)
    compare("gradients", found[1:], (of_weights, of_biases), finite, 1e-9)
    return "right"


def jacobian_and_linearize(case: Case) -> str:
    net = Network(case, [torch.float64], scale=0)
    arguments = [net.x, net.weights, net.biases]
    valid = case.chance(0.6)
    if not valid:
        arguments = broken(case, arguments)
    mode = case.mode()
    is_jacobian = case.note("jacobian", case.chance(0.5))
    function = relu_mlp.jacobian if is_jacobian else relu_mlp.linearize
    with unchanged(arguments), mode():
        found = outcome(lambda: function(*arguments, output_activation=net.activation))
    must_answer = valid and not (is_jacobian and net.x.dim() != 2)
    if ending := ending_without_answer(found, arguments, must_answer):
        return ending
    if not valid or net.values not in ("integers", "real"):
        return "answered"
    x, weights, biases = tree_map(to_float64, arguments)
    present = [n for n, b in enumerate(biases or []) if b is not None]

    def y(*parameters: Tensor) -> Tensor:
        of_biases = [None] * len(weights)
        for n, bias in zip(present, parameters[len(weights) :], strict=True):
            of_biases[n] = bias
        return native(x, parameters[: len(weights)], of_biases, output_activation=net.activation)

    parameters = (*weights, *(biases[n] for n in present))
    if is_jacobian:
        expected = torch.func.jacrev(y, tuple(range(len(parameters))))(*parameters)
        flat = [t for t in tree_leaves(found) if t is not None]
        compare("jacobian", flat, list(expected), rtol=1e-9)
        return "right"
    grad = to_float64(net.grad)
    compare("y", found.y, y(*parameters).detach(), rtol=1e-9)
    flat = [t for t in tree_leaves(found.vjp(grad)) if t is not None]
    compare("vjp", flat, list(torch.autograd.functional.vjp(y, parameters, grad)[1]), rtol=1e-9)
    change = tuple(case.integers(p.shape) for p in parameters)
    tangent = (
        change[: len(weights)],
        None if biases is None else [None] * len(weights),
    )
    for n, bias in zip(present, change[len(weights) :], strict=True):
        tangent[1][n] = bias
    expected = torch.autograd.functional.jvp(y, parameters, change)[1]
    compare("jvp", found.jvp(tangent), expected, rtol=1e-9)
    return "right"


def check_gradients(case: Case) -> str:
    net = Network(case, scale=0)
    arguments = [net.x, net.grad, net.weights, net.biases]
    valid = case.chance(0.6)
    if not valid:
        arguments = broken(case, arguments)
    loss = case.r.choice(["sse", "half_sse", "mse"])
    mode = case.mode()
    with unchanged(arguments), mode():
        found = outcome(
            lambda: relu_mlp.check_gradients(
                *arguments, loss=loss, output_activation=net.activation
            )
        )
    if isinstance(found, Refused):
        if valid and net.values in ("integers", "real"):
            raise Wrong(f"a valid call was refused: {found!r}")
        check_message(found)
        return "refused"
    if isinstance(outcome(lambda: str(found)), Refused):
        if valid:
            raise Wrong("the report cannot be printed")
        return "refused"
    # With integers, many elements are at a kink.
    if valid and net.values == "real" and not found.ok:
        raise Wrong(f"right gradients are not ok:\n{found}")
    return "right"
