"""One network of a `TrainingStep`: its trainer, and its steps without the operators."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from .functional import Loss, loss_and_grads
from .ops import NO_TENSOR
from .optimizers import Unknown
from .trainer import Network, Trainer, check_served, network_for

#: What a loss is in a loop of one's own.
LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "sse": lambda y, target: (y - target).square().sum(),
    "half_sse": lambda y, target: (y - target).square().sum() / 2,
    "mse": F.mse_loss,
    "l1": F.l1_loss,
    "huber": F.huber_loss,
    "bce_with_logits": F.binary_cross_entropy_with_logits,
    "cross_entropy": F.cross_entropy,
}

_TRUE = torch.tensor(True)


class Result(NamedTuple):
    """What a step returns: two tensors of shape ()."""

    loss: Tensor
    is_finite: Tensor  #: whether the gradients are finite, as far as they are watched


class SingleStep:
    """The step of one network. `TrainingStep` describes the arguments.

    Args:
        place: what follows the names of arguments in messages, such as "[1]".
    """

    def __init__(
        self,
        net: nn.Module,
        loss: Loss,
        optimizer: Optimizer,
        max_norm: float | None,
        place: str = "",
    ) -> None:
        if not isinstance(net, nn.Module):
            raise TypeError(f"net{place} must be an nn.Module, got {type(net).__name__}")
        if not isinstance(optimizer, Optimizer):
            raise TypeError(
                f"optimizer{place} must be an Optimizer, got {type(optimizer).__name__}"
            )
        closure = inspect.signature(optimizer.step).parameters.get("closure")
        if closure is not None and closure.default is inspect.Parameter.empty:
            raise TypeError(
                f"optimizer{place} must step without a closure, got {type(optimizer).__name__}"
            )
        own = {id(p) for p in net.parameters()}
        if not any(id(p) in own for group in optimizer.param_groups for p in group["params"]):
            raise ValueError(
                f"optimizer{place} must have parameters of net{place}, got none of them"
            )
        self.net = net
        self.loss: Loss = loss
        self.optimizer = optimizer
        self.max_norm = max_norm
        self._trainer: Trainer | None = None
        self.of_node: Any = None  # the trainer as the native node knows it

    def __getstate__(self) -> dict[str, Any]:
        # A copy finds its own parameters.
        return {**self.__dict__, "_trainer": None, "of_node": None}

    def trainer(self, x: Tensor, target: Tensor) -> Trainer:
        """What the operators need; raises Unknown if they can't do this step."""
        network = network_for(self.net, x, target)
        if isinstance(network, str):
            raise Unknown(network)
        check_served(x, network)
        if self._trainer is None or not self._trainer.is_for(network):
            self._trainer = Trainer(network, self.loss, self.optimizer)
            self.of_node = self._trainer.for_node(self.net)
        return self._trainer

    def by_optimizer(self, x: Tensor, target: Tensor, watch: bool) -> Callable[[], Result]:
        """A step with the optimizer's own `step`, up to the gradients; a call does the rest."""
        network = network_for(self.net, x, target)
        if isinstance(network, str):
            loss = self._by_autograd(x, target)
        else:
            loss = self._by_loss_and_grads(network, x, target)
        # They leave the parameters, because other networks may fail or have the same optimizer's.
        grads = [(parameter, parameter.grad) for parameter in self.net.parameters()]
        self._set_gradients((parameter, None) for parameter, _ in grads)

        def update() -> Result:
            self._set_gradients(grads)
            is_finite = are_finite(self.net.parameters()) if watch else _TRUE
            if self.max_norm is not None:
                nn.utils.clip_grad_norm_(self.net.parameters(), self.max_norm)
            self.optimizer.step()
            self._set_gradients((parameter, None) for parameter, _ in grads)
            return Result(loss.detach(), is_finite)

        return update

    @staticmethod
    def _set_gradients(pairs: Iterable[tuple[Tensor, Tensor | None]]) -> None:
        for parameter, grad in pairs:
            parameter.grad = grad

    def _by_autograd(self, x: Tensor, target: Tensor) -> Tensor:
        with torch.enable_grad():
            y = self.net(x)
            if self.loss != "cross_entropy" and target.shape != y.shape:
                raise RuntimeError(
                    f"target must have the output's shape {tuple(y.shape)}, "
                    f"got {tuple(target.shape)}"
                )
            loss = LOSSES[self.loss](y, target)
        self.optimizer.zero_grad()
        loss.backward()
        return loss

    def _by_loss_and_grads(self, network: Network, x: Tensor, target: Tensor) -> Tensor:
        weights, biases, activation = network
        given = [None if bias is NO_TENSOR else bias for bias in biases] or None
        loss, of_weights, of_biases = loss_and_grads(
            x,
            target,
            weights,
            given,
            loss=self.loss,
            output_activation=None if activation == "none" else activation,  # type: ignore[arg-type]
        )
        self.optimizer.zero_grad()
        grads = [*of_weights, *(grad for grad in of_biases or () if grad is not None)]
        for parameter, grad in zip(network.present, grads, strict=True):
            parameter.grad = grad if parameter.requires_grad else None
        return loss


def are_finite(parameters: Iterable[Tensor]) -> Tensor:
    """Whether the dense gradients of parameters are finite."""
    grads = [p.grad for p in parameters if p.grad is not None]
    found = [grad.isfinite().all() for grad in grads if grad.layout is torch.strided]
    return torch.stack(found).all() if found else _TRUE
