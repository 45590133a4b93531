"""Optimizers that the operators of `TrainingStep` know: their hyperparameters and their state."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from operator import is_, itemgetter
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer

from ._torch_private import (
    GLOBAL_OPTIMIZER_HOOKS,
    OPTIMIZER_HOOKS,
    has_optimizer_hooks,
    is_step_replaced,
)
from .ops import NO_TENSOR


class Kind:
    """A kind of optimizer: what the operators take from its groups and from its state."""

    def __init__(
        self,
        name: str,
        hyperparameters: tuple[str, ...],
        state: tuple[str, ...],
        flag: str,
        state_if: str,
    ) -> None:
        self.name = name  #: the operators' name
        self.hyperparameters = hyperparameters  #: keys of a group, in the operators' order
        self.read = itemgetter(*hyperparameters)
        #: The names of a parameter's state, in the operators' order, without and with a flag.
        self.states = {False: state, True: (*state, state_if)}
        self.flag = flag  #: the key of a group that says whether there is one more

    def is_set(self, group: Mapping[str, Any]) -> bool:
        return group[self.flag] != 0

    def new_state(self, group: Mapping[str, Any], parameter: Tensor) -> dict[str, Tensor]:
        """A parameter's state before its first step, as PyTorch creates it."""
        if self.name == "sgd":
            if group["dampening"] != 0:  # which PyTorch leaves out in the first step
                raise Unknown("the optimizer has no state yet, and dampening")
            # PyTorch begins with the gradient itself: -0 + g is g, also if g is -0.
            return {"momentum_buffer": torch.full_like(parameter, -0.0, requires_grad=False)}
        is_double = torch.get_default_dtype() is torch.float64 and not group["fused"]
        names = [name for name in self.states[self.is_set(group)] if name != "step"]
        return {
            "step": torch.zeros((), dtype=torch.float64 if is_double else torch.float32),
            **{name: torch.zeros_like(parameter, requires_grad=False) for name in names},
        }

    @staticmethod
    def numbers(values: Sequence[Any]) -> list[float]:
        """The eight numbers of a group that the operators take."""
        flat: list[float] = []
        for value in values:
            flat += map(float, value) if isinstance(value, tuple | list) else (float(value),)
        return flat + [0.0] * (8 - len(flat))


_ADAM = Kind(
    "adam",
    ("lr", "betas", "eps", "weight_decay", "decoupled_weight_decay", "amsgrad", "maximize"),
    ("exp_avg", "exp_avg_sq", "step"),
    flag="amsgrad",
    state_if="max_exp_avg_sq",
)

#: By exact class, because a subclass may do anything.
KINDS: dict[type[Optimizer], Kind] = {
    SGD: Kind(
        "sgd",
        ("lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize"),
        (),
        flag="momentum",
        state_if="momentum_buffer",
    ),
    Adam: _ADAM,
    AdamW: _ADAM,
}


#: The methods of an optimizer that a step calls.
METHODS = ("step", "zero_grad")

#: The dtypes of Adam's count of steps.
STEP_DTYPES = (torch.float32, torch.float64)

#: Keys of a group, for what the operators can't do.
OFF = ("differentiable", "capturable")


class Unknown(Exception):
    """The reason why the operators can't do an optimizer's step."""


class Update:
    """How an optimizer updates the parameters of a network, as the operators take it.

    Args:
        optimizer: an optimizer.
        parameters: those of a network; NO_TENSOR where one is missing.

    Raises:
        Unknown: if the operators can't do this optimizer's step.
    """

    def __init__(self, optimizer: Optimizer, parameters: Sequence[Tensor]) -> None:
        if type(optimizer) not in KINDS:
            name = type(optimizer).__name__
            raise Unknown(f"the optimizer is a {name}, and not SGD, Adam or AdamW")
        self.optimizer = optimizer
        self.kind = KINDS[type(optimizer)]
        self.parameters = parameters
        self._dtype = parameters[0].dtype
        #: The group of every parameter; -1 if it is not trained.
        self.groups = [-1] * len(parameters)
        #: The tensors of every trained parameter, in order.
        self.state: list[Tensor] = []
        #: For every trained parameter, its state, and the names and tensors taken from it.
        self._taken: list[tuple[Tensor, Mapping[str, Any], tuple[str, ...], list[Tensor]]] = []
        #: The first state of parameters, which the optimizer gets with the first step.
        self._new: list[tuple[Tensor, dict[str, Any], dict[str, Tensor]]] = []
        self._requires_grad = [p.requires_grad for p in parameters]
        self._members = [list(group["params"]) for group in optimizer.param_groups]
        self._flags = [self.kind.is_set(group) for group in optimizer.param_groups]
        self._last_values: list[Any] = []
        self._hyperparameters: list[float] = []
        self._check_members()
        for n, parameter in enumerate(parameters):
            if parameter is not NO_TENSOR and parameter.requires_grad:
                self._take(n, parameter)
        #: What a step changes.
        self.changed = [p for p, n in zip(parameters, self.groups, strict=True) if n >= 0]
        self.changed += self.state

    def _check_members(self) -> None:
        """Finds the group of each parameter; raises Unknown if there are others."""
        numbers = {id(p): n for n, p in enumerate(self.parameters)}
        for group, members in enumerate(self._members):
            for parameter in members:
                n = numbers.get(id(parameter))
                if n is not None:
                    self.groups[n] = group if parameter.requires_grad else -1
                elif parameter.requires_grad:
                    raise Unknown("the optimizer has parameters that are not net's")

    def _take(self, n: int, parameter: Tensor) -> None:
        if self.groups[n] < 0:
            raise Unknown("a parameter of net is not the optimizer's")
        names = self.kind.states[self._flags[self.groups[n]]]
        if not names:
            return
        state = self.optimizer.state.get(parameter, {})
        new: dict[str, Tensor] = {}
        if all(value is None for value in state.values()):
            new = self.kind.new_state(self.optimizer.param_groups[self.groups[n]], parameter)
            self._new.append((parameter, state, new))
        tensors: list[Tensor] = []
        for name in names:
            tensor = new.get(name, state.get(name))
            if type(tensor) is not Tensor:
                raise Unknown("the optimizer's state has another form")
            if name == "step" and (tensor.dtype not in STEP_DTYPES or tensor.numel() != 1):
                raise Unknown("the optimizer's count of steps is not one number")
            if name != "step" and not is_like(tensor, parameter):
                raise Unknown("the optimizer's state is not like its parameters")
            if not tensor.is_cpu:
                raise Unknown("the optimizer's state is not on the CPU")
            tensors.append(tensor)
        self._taken.append((parameter, state, names, tensors))
        self.state += tensors

    def is_current(self) -> bool:
        """Whether all that was read of parameters, groups and state is still so."""
        groups, state = self.optimizer.param_groups, self.optimizer.state
        if len(groups) != len(self._members):
            return False
        for n, group in enumerate(groups):
            members, now = self._members[n], group["params"]
            if len(now) != len(members) or not all(map(is_, now, members)):
                return False
            if self.kind.is_set(group) is not self._flags[n]:
                return False
        if [parameter.requires_grad for parameter in self.parameters] != self._requires_grad:
            return False
        for parameter, of_parameter, names, tensors in self._taken:
            if state.get(parameter) is not of_parameter:
                return False
            if not all(map(is_, map(of_parameter.get, names), tensors)):
                return False
        return True

    def hyperparameters(self) -> list[float]:
        """Eight numbers for each group, read from the optimizer.

        Raises:
            Unknown: as the constructor.
        """
        if has_optimizer_hooks(self.optimizer):
            raise Unknown("the optimizer has hooks")
        if is_step_replaced(self.optimizer):
            raise Unknown("the optimizer's step was replaced")
        groups = self.optimizer.param_groups
        for group in groups:
            if any(map(group.get, OFF)):
                raise Unknown("the optimizer is differentiable or capturable")
        values = [self.kind.read(group) for group in groups]
        if values != self._last_values:
            tensors = [v for of_group in values for v in of_group if isinstance(v, Tensor)]
            for tensor in tensors:
                # The optimizer computes with a tensor in its own dtype.
                if tensor.requires_grad or tensor.dtype not in (torch.float64, self._dtype):
                    raise Unknown(
                        "a hyperparameter is a tensor that requires a gradient or has another dtype"
                    )
            if any(isinstance(beta, Tensor) for g in groups for beta in g.get("betas", ())):
                raise Unknown("the betas are tensors")
            numbers: list[float] = []
            for of_group in values:
                numbers += self.kind.numbers(of_group)
            # A tensor may change in place, so its number is read again in every call.
            self._last_values = [] if tensors else values
            self._hyperparameters = numbers
        return self._hyperparameters

    def for_node(self) -> dict[str, Any]:
        """What `is_current` and `hyperparameters` look at, for csrc/autograd/training.cpp."""
        return {
            "optimizer_dict": vars(self.optimizer),
            "groups": self.optimizer.param_groups,
            "states": self.optimizer.state,
            "requires_grad": self._requires_grad,
            "members": self._members,
            "flags": self._flags,
            "flag": self.kind.flag,
            "hyperparameters": self.kind.hyperparameters,
            "off": OFF,
            "hooks": OPTIMIZER_HOOKS,
            "global_hooks": GLOBAL_OPTIMIZER_HOOKS,
            "names": ("params", "param_groups", "state"),
            "absent": METHODS,
            "methods": [
                (kind, name, getattr(kind, name))
                for kind in [type(self.optimizer)]
                for name in METHODS
            ],
            "taken": self._taken,
            "changed": self.changed,
        }

    def finish(self) -> None:
        """Increments the version counters of all that a step has changed.

        The first step also gives the optimizer its state.
        """
        if self._new:
            found = {id(parameter): (state, new) for parameter, state, new in self._new}
            # In the optimizer's order, which is that of the keys of its state_dict.
            for parameter in itertools.chain(*self._members):
                if id(parameter) in found:
                    state, new = found[id(parameter)]
                    state.update(new)
                    self.optimizer.state[parameter] = state
            self._new.clear()
        torch.autograd.graph.increment_version(self.changed)


def is_like(tensor: Tensor, parameter: Tensor) -> bool:
    return (
        tensor.shape == parameter.shape
        and tensor.dtype is parameter.dtype
        and tensor.is_contiguous()
    )
