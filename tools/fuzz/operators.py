"""Cases of the raw operators, each compared with the reference in float64."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

import relu_mlp
import support
from relu_mlp import reference

from .breaking import broken
from .case import PLAIN_MODES, Case
from .network import Network
from .verdict import Refused, Wrong, compare, describe, ending_without_answer, outcome, unchanged

OPERATORS = torch.ops.relu_mlp


def to_float64(value: Any) -> Any:
    """A tensor in float64 (complex128 if it is complex); other values as they are."""
    if isinstance(value, bytes):
        return value.decode()  # the operators take bytes for a str
    if not isinstance(value, Tensor):
        return value
    value = value.detach().to_dense() if value.layout is not torch.strided else value.detach()
    return value.as_subclass(Tensor).to(torch.complex128 if value.is_complex() else torch.float64)


def judge(case: Case, operator: str, arguments: list[Any], valid: bool, exact: bool) -> str:
    """Calls a raw operator, and compares the answer with that of the reference in float64."""
    case.note("operator", operator)
    mode = case.mode(PLAIN_MODES)
    with unchanged(arguments), mode():
        found = outcome(lambda: getattr(OPERATORS, operator)(*arguments))
    answered = any(isinstance(t, Tensor) and t.numel() for t in tree_leaves(found))
    if ending := ending_without_answer(found, arguments, valid, answered):
        return ending
    if any(isinstance(t, Tensor) and t.is_quantized for t in tree_leaves(arguments)):
        raise Wrong("a call with quantized numbers was answered")
    expected = outcome(lambda: getattr(reference, operator)(*tree_map(to_float64, arguments)))
    if isinstance(expected, Refused):
        raise Wrong(f"answered with {describe(found)}, but {expected!r}")
    dtype = next(t.dtype for t in tree_leaves(arguments) if isinstance(t, Tensor))
    expected = tree_map(
        lambda t: t.to(dtype) if isinstance(t, Tensor) and not t.is_meta else t, expected
    )
    if any(isinstance(t, Tensor) and t.is_meta for t in tree_leaves([arguments, found])):
        shapes = [[t.shape for t in tree_leaves(answer)] for answer in (found, expected)]
        if shapes[0] != shapes[1]:
            raise Wrong(f"shapes {shapes[0]} should be {shapes[1]}")
        return "right"
    compare(operator, found, expected, values=exact)
    return "right"


def judged(
    case: Case, net: Network, operator: str, arguments: list[Any], exact: bool = True
) -> str:
    """Judges a valid call, or that call with something wrong in it."""
    valid = case.chance(0.5)
    if not valid:
        arguments = broken(case, arguments)
    elif case.chance(0.06):
        case.note("all on", "meta")
        arguments = tree_map(lambda t: t.to("meta") if isinstance(t, Tensor) else t, arguments)
        valid = case.backend != "extension"  # which has no kernels for meta tensors
    # With other numbers, sums that were exact may round.
    exact = exact and valid and net.is_exact(net.dtype)
    return judge(case, operator, arguments, valid, exact)


def op_forward(case: Case) -> str:
    net = Network(case)
    operands = net.operands()
    if net.biases and case.chance(0.2):  # any empty tensor stands for a missing bias
        missing = torch.empty(0, dtype=case.r.choice([*support.DTYPES, torch.int64]))
        missing = missing.to("meta") if case.chance(0.2) else missing
        operands[2] = [missing if b is None else b for b in net.biases]
        case.note("placeholder", missing)
        if missing.is_meta:
            return judge(case, "relu_mlp", [*operands, net.name], False, net.is_exact(net.dtype))
    if case.chance(0.5):
        return judged(case, net, "relu_mlp", [*operands, net.name])
    return judged(case, net, "forward", [*operands, net.name, case.chance(0.7)])


def random_needs(case: Case, net: Network) -> str:
    return "".join(case.r.choice("011") for _ in range(1 + 2 * len(net.weights)))


def backward_arguments(case: Case) -> tuple[Network, list[Any], bool]:
    """A network, the arguments of its backward pass, and whether all sums in it are exact."""
    net = Network(case)
    with torch.no_grad():
        y, hidden = OPERATORS.forward(*net.operands(), net.name, True)
    needs = random_needs(case, net)
    kept = reference.is_kept(net.name, needs)
    everything = [net.x, y, *net.weights, *hidden]
    saved = [case.placed(t) for t, keep in zip(everything, kept, strict=True) if keep]
    case.note("saved, needs", (saved, needs))
    # After rounding, or in another layout, they may not be small integers.
    exact = all(
        float(t.double().abs().nan_to_num(0, 0, 0).max()) / net.unit < 64
        for t in hidden
        if t.numel()
    )
    return net, [net.grad, saved, net.name, needs], exact


def op_backward(case: Case) -> str:
    net, arguments, exact = backward_arguments(case)
    return judged(case, net, "backward", arguments, exact)


def op_backward_vjp(case: Case) -> str:
    net, arguments, exact = backward_arguments(case)
    with torch.no_grad():
        results = OPERATORS.backward(*arguments)
    given = "".join(case.r.choice("011") for _ in results)
    wanted = "".join(case.r.choice("011") for _ in range(1 + len(arguments[1])))
    cotangents = [
        case.placed(t.clone().clamp_(-1, 1))
        for t, flag in zip(results, given, strict=True)
        if flag == "1"
    ]
    case.note("cotangents, given, wanted", (cotangents, given, wanted))
    # The products have more factors than in the backward pass. float64 holds their sums.
    exact = exact and net.values == "integers" and net.dtype == torch.float64
    return judged(case, net, "backward_vjp", [*arguments, cotangents, given, wanted], exact)


def op_recompute_backward(case: Case) -> str:
    net = Network(case)
    arguments = [net.grad, *net.operands(), net.name, random_needs(case, net)]
    return judged(case, net, "recompute_backward", arguments)


def op_loss_and_grads(case: Case) -> str:
    net = Network(case)
    loss = case.r.choice(["sse", "half_sse", "mse"])
    target = net.grad
    if net.is_exact(net.dtype):
        with torch.no_grad(), relu_mlp.backend("reference"):
            target = case.placed(OPERATORS.relu_mlp(*net.operands(), net.name) - net.grad)
    case.note("target, loss", (target, loss))
    small = target.numel() == 0 or float(to_float64(target).nan_to_num(0, 0, 0).abs().max()) < 64
    exact = small and net.unit == 1 and loss != "mse" and target.numel() < 64
    return judged(
        case, net, "loss_and_grads", [net.x, target, *net.operands()[1:], loss, net.name], exact
    )
