"""Cases of transforms and of fake tensors, compared with the native layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map

import relu_mlp

from .case import Case
from .functions import native, own_leaves, with_gradients
from .network import Network
from .operators import to_float64
from .verdict import Refused, Wrong, compare, describe, outcome


def transforms(case: Case) -> str:
    """A transform of a transform, in float64."""
    net = Network(case, [torch.float64], scale=0)
    if net.x.dim() < 2:
        net.x = net.x.new_ones(3, net.x.shape[-1])
    # Finite numbers only: native transforms multiply infinities by tangents of 0.
    x, weights, biases = tree_map(
        lambda t: to_float64(t).nan_to_num(0, 0, 0) if isinstance(t, Tensor) else t,
        [net.x, net.weights, net.biases],
    )
    chain = [case.r.choice(["vmap", "grad", "jvp", "jacrev", "jacfwd", "none"]) for _ in range(2)]
    recompute = case.chance(0.3)
    at_weight = case.chance(0.5)
    case.note("transforms, recompute, at a weight", (chain, recompute, at_weight))
    func = torch.func

    def apply(name: str, f: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        if name == "vmap":
            return func.vmap(f) if not at_weight else lambda p: func.vmap(f)(torch.stack([p, p]))
        if name == "grad":
            return func.grad(lambda p: f(p).square().sum())
        if name == "jvp":
            return lambda p: func.jvp(f, (p,), (torch.ones_like(p),))[1]
        if name == "jacrev":
            return func.jacrev(f)
        return func.jacfwd(f) if name == "jacfwd" else f

    def run(network: Callable[..., Tensor]) -> Any:
        def at(p: Tensor) -> Tensor:
            operands = (x, [p, *weights[1:]]) if at_weight else (p, weights)
            options = {"output_activation": net.activation, "recompute": recompute}
            return network(*operands, biases, **options)

        f: Callable[[Tensor], Tensor] = at
        for name in chain:
            f = apply(name, f)
        return outcome(lambda: f(weights[0] if at_weight else x))

    found, expected = run(relu_mlp.relu_mlp), run(native)
    if isinstance(found, Refused):
        if not isinstance(expected, Refused):
            raise Wrong(f"the native layers serve what was refused: {found!r}")
        return "refused"
    if isinstance(expected, Refused):
        raise Wrong(f"answered with {describe(found)}, natively {expected!r}")
    compare("the derivative", found, expected, rtol=1e-9)
    return "right"


def fake(case: Case) -> str:
    """Shapes and dtypes of y and of the gradients under FakeTensorMode."""
    net = Network(case)
    make = own_leaves(case, [net.x, net.weights, net.biases])
    recompute = case.note("recompute", case.chance(0.3))

    def run(function: Callable[..., Tensor]) -> Any:
        mode = FakeTensorMode()
        fakes = tree_map(lambda t: mode.from_tensor(t) if isinstance(t, Tensor) else t, make())
        with mode:
            return outcome(
                lambda: with_gradients(
                    lambda x, w, b: function(
                        x, w, b, output_activation=net.activation, recompute=recompute
                    ),
                    fakes,
                    torch.ones_like,
                )
            )

    found, expected = run(relu_mlp.relu_mlp), run(native)
    if isinstance(found, Refused) != isinstance(expected, Refused):
        raise Wrong(f"{describe(found)}, natively {describe(expected)}")
    if isinstance(found, Refused):
        return "refused"
    compare("shapes", found, expected, values=False)
    return "right"
