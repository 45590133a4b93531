"""The torch.autograd.Functions: which tensors are saved, and how each derivative is computed.

`MLP` is the network, with its backward pass and its forward-mode derivative. `Gradient`
is the backward pass as a differentiable function. Both are also the derivatives of the
operators, registered at the end of this file: functorch transforms, forward-mode levels
and compiled graphs reach them through PyTorch's dispatcher.

Where the native node is built (csrc/autograd), it takes the place of both in eager calls, and
calls what is here for tangents, on the reference and for third derivatives.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn

from . import batching, interception, ops, reference, second_order
from ._torch_private import (
    BACKWARD_HOOKS,
    BACKWARD_PRE_HOOKS,
    CALL_IMPL,
    COMPILED_CALL_IMPL,
    FORWARD_AD,
    FORWARD_HOOKS,
    FORWARD_PRE_HOOKS,
    HAS_LEVELS,
    HAS_VMAP_TOOLS,
    LEVEL,
    MODULES,
    PARAMETERS,
    SingleLevelFunction,
    below_autograd,
    disable_autocast,
    enable_single_level_autograd_function,
    is_any_autocast_enabled,
    is_fwd_grad_enabled,
    leads_to,
    peek_interpreter_stack,
    set_fwd_grad_enabled,
)
from .ops import Implementation, implementation_for
from .reference import as_matrix

# Bound here, because looking them up in `torch` in every call takes a while.
_is_grad_enabled = torch.is_grad_enabled
_is_compiling = torch.compiler.is_compiling


class CallerModes(NamedTuple):
    """An implementation that runs with the gradient and tangent modes of the Function's caller.

    PyTorch disables gradients and tangents in a Function's forward method. That is right for
    the Function's own level, but the levels below have to record what runs there.
    """

    implementation: Implementation
    grad_enabled: bool
    fwd_grad_enabled: bool

    def forward(self, *arguments: Any) -> tuple[Tensor, list[Tensor]]:
        with (
            torch.set_grad_enabled(self.grad_enabled),
            set_fwd_grad_enabled(self.fwd_grad_enabled),
        ):
            return self.implementation.forward(*arguments)

    def backward(self, *arguments: Any) -> list[Tensor]:
        with (
            torch.set_grad_enabled(self.grad_enabled),
            set_fwd_grad_enabled(self.fwd_grad_enabled),
        ):
            return self.implementation.backward(*arguments)


def in_caller_modes(x: Tensor) -> CallerModes:
    return CallerModes(implementation_for(x), torch.is_grad_enabled(), is_fwd_grad_enabled())


#: The arguments of `MLP` that are not tensors: the implementation, the output
#: activation, whether to recompute, and the number of layers.
Call = tuple[Implementation | CallerModes, str, bool, int]


class MLP(SingleLevelFunction):
    """One autograd node for the whole network.

    It returns y and the hidden activations. The second derivative needs the latter
    as outputs: a saved output keeps its place in the graph, so a backward pass that is
    itself differentiated sends gradients to a_1, ..., a_{L-1}. They arrive here as
    `grad_hidden`.
    """

    @staticmethod
    def forward(ctx: Any, call: Call, x: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        """`parameters` are the weights, then either no biases or one for each weight.

        A missing bias is a tensor without elements.
        """
        implementation, output_activation, recompute, layers = call
        weights, biases = parameters[:layers], parameters[layers:]
        needs_x, *needs_parameters = ctx.needs_input_grad[1:]
        needs = reference.needs_of(needs_x, needs_parameters[:layers], needs_parameters[layers:])
        dispatched = type(implementation) is CallerModes
        save_hidden = ("1" in needs and not recompute) or dispatched
        guard = below_autograd()  # no `with`, as in `functional.call_operators`
        try:
            y, hidden = implementation.forward(x, weights, biases, output_activation, save_hidden)
        finally:
            del guard
        ctx.remembered = call, needs, y.shape
        ctx.set_materialize_grads(False)
        if dispatched:
            ctx.save_for_forward(x, y, *weights, *hidden)
        elif "1" not in needs:
            return (y,)
        if recompute:
            ctx.save_for_backward(x, *parameters)
        else:
            # Exactly the tensors that the native path saves, so that an in-place change
            # raises exactly where it does natively.
            ctx.save_for_backward(*reference.pack(x, y, weights, hidden, output_activation, needs))
        return (y, *hidden)

    @staticmethod
    def backward(
        ctx: Any, grad_output: Tensor | None, *grad_hidden: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        if is_any_autocast_enabled():  # the backward pass has the dtype of the forward pass
            with disable_autocast():
                return MLP.backward(ctx, grad_output, *grad_hidden)
        call, needs, y_shape = ctx.remembered
        implementation, output_activation, recompute, layers = call
        saved = ctx.saved_tensors
        reached = [grad for grad in grad_hidden if grad is not None]
        if grad_output is None:
            if not reached:
                return (None,) * len(ctx.needs_input_grad)
            grad_output = reached[0].new_zeros(y_shape)
        dispatched, is_compiling = type(implementation) is CallerModes, _is_compiling()
        if (
            reached
            and not (dispatched or is_compiling)
            and all(map(second_order.is_symbolic_zero, reached))
        ):
            # Masks send symbolic zeros. Without them the operator can serve this pass.
            reached, grad_hidden = [], ()
        if dispatched or reached or _is_grad_enabled() or FORWARD_AD[LEVEL] >= 0:
            # This pass is part of a second derivative, or will be differentiated itself.
            if recompute:
                x, y, weights, hidden = _forward_again(call, *saved)
                saved = reference.pack(x, y, weights, hidden, output_activation, needs)
            # Under torch.func every input that requires a gradient was requested, and the engine
            # raises (which is slow) when it is asked about a leaf. So it is not asked.
            if not is_compiling and peek_interpreter_stack() is None:
                needs, saved = _requested(ctx, needs, saved, output_activation)
            grads = _differentiable_backward(
                implementation, grad_output, saved, output_activation, needs, grad_hidden
            )
        elif recompute or is_compiling:
            name, operands = "backward", [saved]
            if recompute:
                name = "recompute_backward"
                operands = [saved[0], saved[1 : 1 + layers], saved[1 + layers :]]
            grads = _run_backward(
                implementation, name, grad_output, *operands, output_activation, needs
            )
        else:
            guard = below_autograd()
            try:
                grads = implementation.backward(grad_output, saved, output_activation, needs)
            finally:
                del guard
        remaining = iter(grads)
        returned = [next(remaining) if need == "1" else None for need in needs]
        return None, *returned[: len(ctx.needs_input_grad) - 1]

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: Tensor | None) -> tuple[Tensor, ...]:
        call, _, y_shape = ctx.remembered
        output_activation, layers = call[1], call[3]
        with set_fwd_grad_enabled(True):
            x, y, *rest = _primals(ctx.saved_tensors)
            weights, hidden = rest[:layers], rest[layers:]
            # The stand-in for a missing bias may carry a tangent without elements.
            bias_tangents = [
                None if tangent is None or tangent.shape != weight.shape[:1] else tangent
                for weight, tangent in zip(
                    weights, tangents[1 + layers :] or [None] * layers, strict=True
                )
            ]
            y_tangent, hidden_tangents = reference.jvp(
                as_matrix(x),
                as_matrix(y),
                weights,
                hidden,
                output_activation,
                None if tangents[0] is None else as_matrix(tangents[0]),
                tangents[1 : 1 + layers],
                bias_tangents,
            )
            return (y_tangent.reshape(y_shape), *hidden_tangents)


apply = MLP.apply


def _primals(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors without their tangents at this level.

    PyTorch disables tangents while it calls the jvp method of a Function. That is meant for
    the Function's own level, but it also loses the tangents of the levels below: jvp of jvp
    would be 0. So the method enables tangents and takes off those of its own level.
    """
    # Level 0 is the only one. A graph that is being compiled enters it unknown to `forward_ad`.
    return [forward_ad.unpack_dual(tensor, level=0).primal for tensor in tensors]


def _requested(
    ctx: Any, needs: str, saved: Sequence[Tensor], output_activation: str
) -> tuple[str, Sequence[Tensor]]:
    """The needs of this backward pass, and the saved tensors that they depend on.

    `torch.autograd.grad(y, x)` requests the gradient of x alone. `needs_input_grad` does not show
    this, because the parameters require gradients too.
    """
    asked = "".join("01"[node is not None and leads_to(node)] for node, _ in ctx.next_functions)
    asked = asked.ljust(len(needs), "0")
    if asked == needs:
        return needs, saved
    y, weights, (x, *hidden) = reference.unpack(saved, output_activation, needs)
    return asked, reference.pack(x, y, weights, hidden, output_activation, asked)


def _forward_again(call: Call, x: Tensor, *parameters: Tensor) -> tuple[Any, Any, Any, Any]:
    """x, y, weights and hidden, with a graph of their own if gradients are enabled."""
    implementation, output_activation, _, layers = call
    weights, biases = parameters[:layers], parameters[layers:]
    if not _is_compiling() and peek_interpreter_stack() is not None:
        # `torch.autograd.grad` of a finished y inside a transform: level by level.
        assert not isinstance(implementation, CallerModes)  # it never recomputes
        with ops.using(implementation):
            y, hidden = torch.ops.relu_mlp.forward.default(
                x, weights, biases, output_activation, True
            )
    elif _is_grad_enabled():
        again: Call = (implementation, output_activation, False, layers)
        y, *hidden = apply(again, x, *parameters)
    else:
        with below_autograd():
            y, hidden = implementation.forward(x, weights, biases, output_activation, True)
    return x, y, weights, hidden


def _run_backward(implementation: Implementation, name: str, *operands: Any) -> list[Tensor]:
    """The backward pass, without a graph."""
    if _is_compiling() and implementation is ops.extension:
        # Compiled autograd traces this and has to find an operator.
        return getattr(torch.ops.relu_mlp, name).default(*operands)
    if _is_compiling():
        return getattr(reference, name)(*operands)
    with below_autograd():
        return getattr(implementation, name)(*operands)


def _differentiable_backward(
    implementation: Implementation,
    grad_output: Tensor,
    saved: Sequence[Tensor],
    output_activation: str,
    needs: str,
    grad_hidden: Sequence[Tensor | None],
) -> Sequence[Tensor]:
    """The backward pass, recorded so that it can be differentiated."""
    if any(grad is not None for grad in grad_hidden):
        return reference.backward(grad_output, saved, output_activation, needs, grad_hidden)
    if isinstance(implementation, CallerModes):
        implementation = implementation.implementation
    with ops.using(implementation):
        return torch.ops.relu_mlp.backward.default(grad_output, saved, output_activation, needs)


class Gradient(SingleLevelFunction):
    """The backward pass as a function of its own, with derivatives by hand."""

    @staticmethod
    def forward(
        ctx: Any, call: GradientCall, grad_output: Tensor, *saved: Tensor
    ) -> tuple[Tensor, ...]:
        implementation, output_activation, needs = call
        ctx.remembered = implementation.implementation, output_activation, needs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(grad_output, *saved)
        ctx.save_for_forward(grad_output, *saved)
        with below_autograd():
            return tuple(implementation.backward(grad_output, saved, output_activation, needs))

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        implementation, output_activation, needs = ctx.remembered
        grad_output, *saved = ctx.saved_tensors
        call = grad_output, saved, output_activation, needs, cotangents
        if implementation is ops.extension:
            return None, *_backward_vjp(*call, ctx.needs_input_grad[1:])
        return None, *second_order.backward_vjp(*call)

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: Tensor | None) -> tuple[Tensor, ...]:
        _, output_activation, needs = ctx.remembered
        with set_fwd_grad_enabled(True):
            grad_output, *saved = _primals(ctx.saved_tensors)
            return tuple(
                second_order.backward_jvp(
                    grad_output, saved, output_activation, needs, tangents[0], tangents[1:]
                )
            )


def _is_recorded(*tensors: Tensor | None) -> bool:
    """Whether a derivative or a graph of this computation may be taken."""
    return (
        _is_grad_enabled()
        or FORWARD_AD[LEVEL] >= 0
        or _is_compiling()
        or peek_interpreter_stack() is not None
        or not all(tensor is None or type(tensor) in ops.PLAIN for tensor in tensors)
    )


def _backward_vjp(
    grad_output: Tensor,
    saved: Sequence[Tensor],
    output_activation: str,
    needs: str,
    cotangents: Sequence[Tensor | None],
    needs_gradient: Sequence[bool],
) -> list[Tensor | None]:
    """`second_order.backward_vjp`; on the CPU by the operator, unless it is recorded itself."""
    if not grad_output.is_cpu or _is_recorded(grad_output, *saved, *cotangents):
        return second_order.backward_vjp(grad_output, saved, output_activation, needs, cotangents)
    present = [cotangent for cotangent in cotangents if cotangent is not None]
    given = "".join("01"[cotangent is not None] for cotangent in cotangents)
    reached = [
        reach if is_needed else second_order.Reach.NOTHING
        for reach, is_needed in zip(
            second_order.reach_of(output_activation, needs, given), needs_gradient, strict=True
        )
    ]
    wanted = "".join("01"[reach is second_order.Reach.NUMBERS] for reach in reached)
    with below_autograd():
        grads = iter(
            ops.extension.backward_vjp(
                grad_output, saved, output_activation, needs, present, given, wanted
            )
        )
    return [
        next(grads)
        if reach is second_order.Reach.NUMBERS
        else second_order.symbolic_zeros_like(tensor)
        if reach is second_order.Reach.ZEROS
        else None
        for reach, tensor in zip(reached, [grad_output, *saved], strict=True)
    ]


#: The arguments of `Gradient` that are not tensors.
GradientCall = tuple[CallerModes, str, str]

_apply_gradient = Gradient.apply


# -- The derivatives of the operators ------------------------------------------
#
# The kernels on the Autograd key. The dispatcher calls them once for each level of a functorch
# transform, or once where there is none. Their own calls below autograd go to the next level.


def _forward_derivative(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    output_activation: str,
) -> tuple[Tensor, ...]:
    call: Call = (in_caller_modes(x), output_activation, False, len(weights))
    # The stand-in for a missing bias has no gradient.
    present = [
        bias if bias.numel() or bias.shape == weight.shape[:1] else bias.detach()
        for weight, bias in zip(weights, biases, strict=False)
    ]
    with enable_single_level_autograd_function():
        return apply(call, x, *weights, *present, *biases[len(present) :])


def _relu_mlp_kernel(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    output_activation: str = "none",
) -> Tensor:
    if weights and ops.is_differentiated(x, weights, biases):
        if not HAS_LEVELS:
            return reference.relu_mlp(x, weights, biases, output_activation)
        return _forward_derivative(x, weights, biases, output_activation)[0]
    with below_autograd():
        return implementation_for(x).relu_mlp(x, weights, biases, output_activation)


def _forward_kernel(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    output_activation: str,
    save_hidden: bool,
) -> tuple[Tensor, list[Tensor]]:
    if weights and ops.is_differentiated(x, weights, biases):
        if not HAS_LEVELS:
            return reference.forward(x, weights, biases, output_activation, save_hidden)
        y, *hidden = _forward_derivative(x, weights, biases, output_activation)
        return y, hidden if save_hidden else []
    with below_autograd():
        return implementation_for(x).forward(x, weights, biases, output_activation, save_hidden)


def _backward_kernel(
    grad_output: Tensor, saved: Sequence[Tensor], output_activation: str, needs: str
) -> Sequence[Tensor]:
    implementation = implementation_for(grad_output)
    if "1" in needs and ops.is_differentiated(grad_output, saved):
        if not HAS_LEVELS:
            return reference.backward(grad_output, saved, output_activation, needs)
        call: GradientCall = (in_caller_modes(grad_output), output_activation, needs)
        with enable_single_level_autograd_function():
            return list(_apply_gradient(call, grad_output, *saved))
    with below_autograd():
        return implementation.backward(grad_output, saved, output_activation, needs)


_library = ops.kernels_of(__name__)

_KERNELS: dict[str, Callable[..., Any]] = {
    "relu_mlp": _relu_mlp_kernel,
    "forward": _forward_kernel,
    "backward": _backward_kernel,
}
#: The batching rules that the node replaces, and calls for what it can't serve.
_BATCHING_KERNELS = {
    f"batched_{_name}": batching.kernel_of(_name, getattr(batching, _name))
    for _name in (ops.DIFFERENTIABLE if ops.node is not None and HAS_VMAP_TOOLS else ())
}
if ops.node is None:
    for _name in ops.DIFFERENTIABLE:
        _library.impl(_name, _KERNELS[_name], "Autograd")
else:
    # Its kernels call these where they can't serve a call themselves.
    ops.node.serve(
        {
            **interception.originals(),
            "linear": nn.Linear,
            "relu": nn.ReLU,
            "modules": MODULES,
            "parameters": PARAMETERS,
            "weight": "weight",
            "bias": "bias",
            "recompute": "recompute",
            "p": "p",
            "training": "training",
            "hooks": (FORWARD_HOOKS, FORWARD_PRE_HOOKS, BACKWARD_HOOKS, BACKWARD_PRE_HOOKS),
            "overrides": ("forward", CALL_IMPL, COMPILED_CALL_IMPL, "weight", "bias"),
            "thread": ops.this_thread,
            "backend": "backend",
            "automatic": "auto",
            "extension": "extension",
            "has_cuda": ops.HAS_CUDA,
        },
        {
            **_KERNELS,
            **_BATCHING_KERNELS,
            "is_extension_in_force": lambda x: implementation_for(x) is ops.extension,
            "set_backend": ops.set_backend,
            "reference_backward": reference.backward,
            "backward_vjp": _backward_vjp,
        },
    )
for _name in ("relu_mlp", "forward", "backward", "recompute_backward"):
    if f"batched_{_name}" not in _BATCHING_KERNELS:
        batching.register_rule(_library, _name, getattr(batching, _name))
