"""What the operator `_train` has to know of an optimizer: its hyperparameters and its state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer

from ._torch_private import has_optimizer_hooks, is_step_replaced
from .ops import NO_TENSOR

#: The operator's name of an update. A subclass may do anything.
KINDS: dict[type[Optimizer], str] = {SGD: "sgd", Adam: "adam", AdamW: "adam"}


class Update(NamedTuple):
    """The arguments of the operator that say how parameters are updated."""

    kind: str  #: "sgd" or "adam"
    hyperparameters: list[float]  #: eight numbers for each parameter group
    groups: list[int]  #: the group of every parameter; -1 if it is not trained
    state: list[Tensor]  #: of the trained parameters, in their order


def _sgd_numbers(group: Mapping[str, Any]) -> list[float]:
    return [
        float(group["lr"]),
        float(group["momentum"]),
        float(group["dampening"]),
        float(group["weight_decay"]),
        float(group["nesterov"]),
        float(group["maximize"]),
        0.0,
        0.0,
    ]


def _adam_numbers(group: Mapping[str, Any]) -> list[float]:
    beta1, beta2 = group["betas"]
    return [
        float(group["lr"]),
        float(beta1),
        float(beta2),
        float(group["eps"]),
        float(group["weight_decay"]),
        float(group["decoupled_weight_decay"]),
        float(group["amsgrad"]),
        float(group["maximize"]),
    ]


#: The dtypes of Adam's count of steps.
STEP_DTYPES = (torch.float32, torch.float64)

NUMBERS = {"sgd": _sgd_numbers, "adam": _adam_numbers}


def _names_of_state(kind: str, group: Mapping[str, Any]) -> tuple[str, ...]:
    """The names under which the optimizer keeps its state of a parameter, as the operator wants."""
    if kind == "sgd":
        return ("momentum_buffer",) if group["momentum"] != 0 else ()
    if group["amsgrad"]:
        return "exp_avg", "exp_avg_sq", "step", "max_exp_avg_sq"
    return "exp_avg", "exp_avg_sq", "step"


def why_not(optimizer: Optimizer, dtype: torch.dtype) -> str | None:
    """Why the operator can't do this optimizer's steps, whatever its state is; or None.

    `dtype` is that of the parameters.
    """
    kind = type(optimizer)
    if kind not in KINDS:
        return f"the optimizer is a {kind.__name__}, and not SGD, Adam or AdamW"
    if has_optimizer_hooks(optimizer):
        return "the optimizer has hooks"
    if is_step_replaced(optimizer):
        return "the optimizer's step was replaced"
    for group in optimizer.param_groups:
        if group["differentiable"] or group.get("capturable"):
            return "the optimizer is differentiable or capturable"
        for value in group.values():
            # The optimizer computes with a tensor in its own dtype.
            if isinstance(value, Tensor) and (
                value.requires_grad or value.dtype not in (torch.float64, dtype)
            ):
                return "a hyperparameter is a tensor that requires a gradient or has another dtype"
        if any(isinstance(beta, Tensor) for beta in group.get("betas", ())):
            return "the betas are tensors"
    return None


def read_update(optimizer: Optimizer, parameters: Sequence[Tensor]) -> Update | str:
    """How the optimizer would update these parameters of a network, or why that can't be said.

    A parameter that is missing in the network is NO_TENSOR.
    """
    reason = why_not(optimizer, parameters[0].dtype)
    if reason is not None:
        return reason
    kind = KINDS[type(optimizer)]
    group_of = {
        id(parameter): n
        for n, group in enumerate(optimizer.param_groups)
        for parameter in group["params"]
    }
    hyperparameters: list[float] = []
    names = []
    for group in optimizer.param_groups:
        hyperparameters += NUMBERS[kind](group)
        names.append(_names_of_state(kind, group))
    groups: list[int] = []
    state: list[Tensor] = []
    for parameter in parameters:
        if parameter is NO_TENSOR or not parameter.requires_grad:
            groups.append(-1)
            continue
        group_number = group_of.pop(id(parameter), None)
        if group_number is None:
            return "a parameter of net is not the optimizer's"
        groups.append(group_number)
        of_parameter = optimizer.state.get(parameter, {}) if names[group_number] else {}
        for name in names[group_number]:
            found = of_parameter.get(name)
            if type(found) is not Tensor:
                return "the optimizer has no state yet"
            if name == "step" and (found.dtype not in STEP_DTYPES or found.numel() != 1):
                return "the optimizer's count of steps is not one number"
            if name != "step" and (
                found.shape != parameter.shape
                or found.dtype is not parameter.dtype
                or not found.is_contiguous()
            ):
                return "the optimizer's state is not like its parameters"
            if found.is_cpu is not True:
                return "the optimizer's state is not on the CPU"
            state.append(found)
    left = {id(p) for p in parameters}
    if any(
        p.requires_grad and id(p) not in left
        for group in optimizer.param_groups
        for p in group["params"]
    ):
        return "the optimizer has parameters that are not net's"
    return Update(kind, hyperparameters, groups, state)


def increment_versions(update: Update, parameters: Sequence[Tensor]) -> None:
    """Increments the version counters of everything that the operator has changed."""
    changed = [p for p, group in zip(parameters, update.groups, strict=True) if group >= 0]
    torch.autograd.graph.increment_version(changed + update.state)
