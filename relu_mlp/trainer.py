"""The training of a network by the operators, and when they can serve it."""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from . import functional, interception
from ._torch_private import (
    FORWARD_AD,
    LEVEL,
    are_functorch_transforms_active,
    below_autograd,
    call_of,
    children_of,
    count_step,
    get_parameter_hooks,
    is_any_autocast_enabled,
)
from .functional import is_plain, is_served
from .fusion.sequential import FusedSequential
from .interception import are_layers_replaced
from .modules import ReluMLP
from .ops import NO_TENSOR, extension, implementation_for, node
from .ops.backend import raising_index_error
from .optimizers import Unknown, Update
from .run import find_run, is_patched

_new_trainer = torch.ops.relu_mlp._new_trainer.default
_delete_trainer = torch.ops.relu_mlp._delete_trainer.default
_train = raising_index_error(call_of(torch.ops.relu_mlp._train.default))
train_step: Any = None if node is None else raising_index_error(node.train_step)


class Network(NamedTuple):
    """The network of a module, as the operators take it."""

    weights: list[Tensor]
    biases: list[Tensor]  #: one for each weight; NO_TENSOR where one is missing
    activation: str

    @property
    def parameters(self) -> list[Tensor]:
        """All weights, then all biases."""
        return self.weights + self.biases

    @property
    def present(self) -> list[Tensor]:
        """The same without those that are missing."""
        return [parameter for parameter in self.parameters if parameter is not NO_TENSOR]


def network_of(net: nn.Module) -> Network | None:
    """The network that a module is, if it is one and nothing of it was changed."""
    kind: Any = type(net)
    if kind not in (ReluMLP, FusedSequential, nn.Sequential) or is_patched(vars(net)):
        return None
    if kind.__iter__ is not interception.iterate or are_layers_replaced():
        return None
    children = children_of(net)
    run = find_run(children.values())
    if run is None or len(run.children) < len(children):
        return None
    functional.check_empty_biases(run.weights, run.biases)
    biases = run.biases or [NO_TENSOR] * len(run.weights)
    return Network(run.weights, biases, run.activation)


def network_for(net: nn.Module, x: Tensor, target: Tensor) -> Network | str:
    """The network of a module if `loss_and_grads` gives its gradients, or why it does not."""
    network = network_of(net)
    if network is None:
        return "net is not an unchanged network of Linear and ReLU"
    if is_any_autocast_enabled() or not is_served(x) or not is_plain(target):
        return "autocast or a mode is active, or x or target is not an ordinary tensor"
    if are_functorch_transforms_active() or FORWARD_AD[LEVEL] >= 0:
        return "a transform of torch.func or forward-mode AD is active"
    if torch.is_anomaly_enabled():
        return "autograd detects anomalies"
    if x.requires_grad or target.requires_grad:
        return "x or target requires a gradient"
    present = network.present
    if not any(p.requires_grad for p in present):
        return "no parameter requires a gradient"
    if len(set(map(id, present))) < len(present):
        return "two layers share a parameter"
    # The order of their updates would matter.
    addresses = [address for p in present if (address := p.data_ptr())]
    if len(set(addresses)) < len(addresses):
        return "two parameters share their memory"
    if any(any(get_parameter_hooks(p)) for p in present):  # a copy has empty dicts of hooks
        return "a parameter has a hook"
    return network


class Trainer:
    """A network and an optimizer, which the operators know by a number.

    Raises:
        Unknown: if the operators can't do this optimizer's step.
    """

    def __init__(self, network: Network, loss: str, optimizer: Optimizer) -> None:
        self.network = network
        self.parameters = network.parameters
        self.present = network.present
        self.update = Update(optimizer, self.parameters)
        # Read once: `is_for` looks whether the tensors are the same.
        self.addresses_of_state = {tensor.data_ptr() for tensor in self.update.state} - {0}
        self.number: int = _new_trainer(
            network.weights,
            network.biases,
            self.update.state,
            loss,
            network.activation,
            self.update.kind.name,
            self.update.groups,
            len(optimizer.param_groups),
        )
        weakref.finalize(self, _delete_trainer, self.number).atexit = False

    def is_for(self, network: Network) -> bool:
        """Whether this is the network, and the optimizer's state is still the same tensors."""
        now = network.parameters
        return (
            len(now) == len(self.parameters)
            and all(map(is_, now, self.parameters))
            and network.activation == self.network.activation
            and self.update.is_current()
        )

    def for_node(self, net: nn.Module) -> Any:
        """What `node.train_step` takes for steps of this trainer; None without the node."""
        if node is None or type(net) is not ReluMLP:
            return None
        of_network = {
            "module": net,
            "type": ReluMLP,
            "activation": self.network.activation,
            "number": self.number,
            "parameters": self.parameters,
        }
        return node.new_step({**of_network, **self.update.for_node()})

    def finish(self) -> None:
        """Leaves everything as the optimizer's own step would."""
        self.update.finish()
        count_step(self.update.optimizer)
        for parameter in self.present:
            if parameter.grad is not None:
                parameter.grad = None


def check_served(x: Tensor, network: Network) -> None:
    """Raises Unknown where the operators can't train the network with x."""
    if x.dtype not in (torch.float32, torch.float64) or not x.is_cpu:
        raise Unknown(f"x is {x.dtype} on {x.device}, and not float32 or float64 on the CPU")
    if implementation_for(x) is not extension:
        raise Unknown("the extension is not used")
    if interception.dispatch_modes():  # it would see one operator and not the parts of a step
        raise Unknown("a mode is active")
    for parameter in network.present:
        if not parameter.is_contiguous() or not parameter.is_cpu or parameter.is_neg():
            raise Unknown("a parameter is not contiguous in the CPU's memory")


def share_memory(trainers: Sequence[Trainer]) -> bool:
    """Whether what one network trains is another's too. Threads would disturb each other.

    PyTorch's `load_state_dict` does not copy: optimizers that load one state share it.
    """
    if len(trainers) == 1:
        return False
    of_networks = [
        {p.data_ptr() for p in trainer.present} - {0} | trainer.addresses_of_state
        for trainer in trainers
    ]
    return len(set().union(*of_networks)) < sum(map(len, of_networks))


def train(
    trainers: Sequence[Trainer],
    x: Tensor,
    target: Tensor,
    losses: Tensor,
    first: int = 0,
    batch_size: int | None = None,
    order: Tensor | None = None,
    max_norm: float | None = None,
) -> int:
    """Does the steps from the number `first` on, one for each column of `losses`.

    Args:
        trainers: one for each network.
        x, target: contiguous matrices, or a vector of classes as the target, for all networks; or
            with a dimension for the networks in front.
        losses: (networks, steps), for the losses. No steps are a check of the arguments.
        first: the number of steps before, which says with which batch to go on.
        batch_size: the rows of a step; None for all.
        order: the rows in the order of the steps, (n,) or (networks, n); None for all in place.
        max_norm: the norm to which the gradients of a network are clipped; None for no clipping.

    Returns:
        The first step whose gradients are not finite, or -1.

    Raises:
        Unknown: if the operators can't do an optimizer's step.
    """
    hyperparameters: list[float] = []
    for trainer in trainers:
        hyperparameters += trainer.update.hyperparameters()
    with below_autograd():
        bad: int = _train(
            [trainer.number for trainer in trainers],
            x,
            target,
            losses,
            NO_TENSOR if order is None else order,
            hyperparameters,
            math.inf if max_norm is None else max_norm,
            batch_size or max(1, x.shape[-2]),
            first,
            first + losses.shape[1],
        )
    if losses.shape[1]:
        for trainer in trainers:
            trainer.finish()
    return bad
