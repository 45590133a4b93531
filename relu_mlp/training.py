"""`TrainingStep`: the loss, its gradients and the optimizer's step in one call."""

from __future__ import annotations

import inspect
import math
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from . import checks, functional, interception
from ._torch_private import (
    FORWARD_AD,
    LEVEL,
    are_functorch_transforms_active,
    below_autograd,
    children_of,
    count_step,
    get_parameter_hooks,
    is_any_autocast_enabled,
)
from .functional import Loss, is_plain, is_served, loss_and_grads
from .fusion.sequential import FusedSequential
from .interception import are_layers_replaced, dispatch_modes
from .modules import ReluMLP
from .ops import NO_TENSOR, extension, implementation_for
from .optimizers import Update, increment_versions, read_update
from .run import find_run, is_patched

#: What a loss is in a loop of one's own.
LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "sse": lambda y, target: (y - target).square().sum(),
    "half_sse": lambda y, target: (y - target).square().sum() / 2,
    "mse": F.mse_loss,
}

#: A call of the operator lasts about this many seconds. Between two calls Python handles
#: signals, such as that of Ctrl-C.
SECONDS_OF_A_CALL = 0.05

Progress = Callable[[int, int], object]


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


class TrainingStep:
    """The training step of a network in one call, and whole epochs of them in one call.

    `step = TrainingStep(net, "mse", optimizer)` makes `step(x, target)` equal to::

        optimizer.zero_grad()
        loss = F.mse_loss(net(x), target)
        loss.backward()
        optimizer.step()

    except that it returns the loss without a graph and leaves no gradients in the parameters.
    Hyperparameters are read from `optimizer.param_groups` in every call, so schedulers work. The
    optimizer's state stays its own: it can be saved, loaded, and continued by the loop above.

    The operator serves networks on the CPU in float32 and float64 with `torch.optim.SGD`, `Adam`
    and `AdamW`. In all other cases the loop above runs, or `loss_and_grads` and then
    `optimizer.step()` where only the optimizer stands in the way; `reason` says why. The first
    step is one of these, because it is the optimizer that creates its state.

    Args:
        net: a `ReluMLP`, an `nn.Sequential` of Linear, ReLU, ..., Linear, or any other module.
        loss: ``"sse"``, ``"half_sse"`` or ``"mse"``, as in `loss_and_grads`.
        optimizer: an optimizer of the parameters of `net`.
        max_norm: the norm to which gradients are clipped, as by
            `torch.nn.utils.clip_grad_norm_(net.parameters(), max_norm)`; None for no clipping.

    Raises:
        TypeError: if `net` is not a module, or `optimizer` not an optimizer or one whose step
            needs a closure, such as `torch.optim.LBFGS`.
        ValueError: if the loss is unknown, if `max_norm` is not positive, or if the optimizer has
            no parameter of `net`.

    Example::

        net = ReluMLP(3, [64, 64], 1)
        step = TrainingStep(net, "mse", torch.optim.Adam(net.parameters()))
        for epoch in range(10):
            losses = step.epoch(x, y, batch_size=64)
    """

    #: Why the operator did not serve the last step; None if it did.
    reason: str | None = None

    def __init__(
        self,
        net: nn.Module,
        loss: Loss,
        optimizer: Optimizer,
        *,
        max_norm: float | None = None,
    ) -> None:
        if not isinstance(net, nn.Module):
            raise TypeError(f"net must be an nn.Module, got {type(net).__name__}")
        if not isinstance(loss, str) or loss not in LOSSES:
            raise ValueError(f"loss must be {checks.listed(LOSSES)}, got {loss!r}")
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"optimizer must be an Optimizer, got {type(optimizer).__name__}")
        closure = inspect.signature(optimizer.step).parameters.get("closure")
        if closure is not None and closure.default is inspect.Parameter.empty:
            raise TypeError(
                f"optimizer must step without a closure, got {type(optimizer).__name__}"
            )
        if max_norm is not None and not max_norm > 0:
            raise ValueError(f"max_norm must be positive, got {max_norm}")
        own = {id(p) for p in net.parameters()}
        if not any(id(p) in own for group in optimizer.param_groups for p in group["params"]):
            raise ValueError("optimizer must have parameters of net, got none of them")
        self.net = net
        self.loss: Loss = loss
        self.optimizer = optimizer
        self.max_norm = max_norm

    # -- One step ----------------------------------------------------------------------------

    def __call__(self, x: Tensor, target: Tensor) -> Tensor:
        """One step on the rows of `x`; returns their loss before it.

        Args:
            x: (*, in_features), as `net` takes it.
            target: as the loss takes it, for the output of `net`.

        Returns:
            The loss, of shape (), in the dtype of x and without a graph.

        Raises:
            TypeError: if x or the target is not a tensor.
            RuntimeError: as `loss_and_grads`, before anything is changed.
        """
        return self._steps(x, target, None, None, 1, None)[0]

    def repeat(
        self, x: Tensor, target: Tensor, times: int, *, progress: Progress | None = None
    ) -> Tensor:
        """The same step `times` times, as in gradient descent with all rows.

        Args:
            x, target: as in a call.
            times: how many steps.
            progress: called with the number of steps done and `times`, every 50 ms or so.

        Returns:
            The losses before each step, of shape (times,).

        Raises:
            ValueError: if `times` is negative.
            RuntimeError: as a call.
        """
        if times < 0:
            raise ValueError(f"times must not be negative, got {times}")
        return self._steps(x, target, None, None, times, progress)

    def epoch(
        self,
        x: Tensor,
        target: Tensor,
        batch_size: int,
        *,
        shuffle: bool = True,
        generator: torch.Generator | None = None,
        progress: Progress | None = None,
    ) -> Tensor:
        """One step for each batch of rows, until all rows were used once.

        Equal to a step for each batch of ``order.split(batch_size)``, where `order` is
        ``torch.randperm(len(x), generator=generator)``, or the order of the rows themselves. The
        last batch may be smaller. It copies no more than the rows of one batch.

        Args:
            x: (rows, in_features).
            target: (rows, out_features).
            batch_size: the rows of a batch.
            shuffle: whether the rows come in a random order.
            generator: the generator of that order; None for PyTorch's default.
            progress: called with the number of batches done and their total, every 50 ms or so.

        Returns:
            The losses of the batches, of shape (ceil(rows / batch_size),).

        Raises:
            ValueError: if `batch_size` is less than 1, or if `x` and `target` differ in length.
            RuntimeError: as a call.

        Ctrl-C ends it between two batches. It warns of gradients that are not finite.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if len(x) != len(target):
            raise ValueError(f"target must have {len(x)} rows like x, got {len(target)}")
        order = torch.randperm(len(x), generator=generator) if shuffle else None
        batches = -(-len(x) // batch_size)
        return self._steps(x, target, order, batch_size, batches, progress)

    # -- Many steps --------------------------------------------------------------------------

    def _steps(
        self,
        x: Tensor,
        target: Tensor,
        order: Tensor | None,
        batch_size: int | None,
        total: int,
        progress: Progress | None,
    ) -> Tensor:
        """The losses of `total` steps. Without a batch size, each takes all rows of x."""
        for name, tensor in (("x", x), ("target", target)):
            if not isinstance(tensor, Tensor):
                raise TypeError(f"{name} must be a Tensor, got {type(tensor).__name__}")
        warns = total > 1 or batch_size is not None
        losses: Tensor | None = x.new_empty(0) if total == 0 else None
        done, at_once, first_bad = 0, 1, -1
        while done < total:
            began = time.perf_counter()
            network = self._network(x, target)
            update = network if isinstance(network, str) else self._update(x, network)
            if isinstance(update, Update) and batch_size is not None and x.dim() != 2:
                update = "x has other than 2 dimensions"  # the operator's rows are of all but one
            if isinstance(network, Network) and isinstance(update, Update):
                losses = x.new_empty(total) if losses is None else losses
                part = losses[done : done + at_once]
                bad = self._train(network, update, x, target, part, order, batch_size, done)
                self.reason = None
            else:
                assert isinstance(update, str)
                self.reason = update
                rows = batch_of(len(x), order, batch_size, done) if batch_size else ...
                loss, is_finite = self._one_by_one(network, x[rows], target[rows], warns)
                losses = loss.new_empty(total) if losses is None else losses
                part = losses[done : done + 1]
                part[0] = loss
                bad = -1 if is_finite else done
            took = max(time.perf_counter() - began, 1e-6)
            first_bad = bad if first_bad < 0 else first_bad
            done += len(part)
            at_once = max(1, min(16 * at_once, int(len(part) * SECONDS_OF_A_CALL / took)))
            if progress is not None:
                progress(done, total)
        if first_bad >= 0 and warns:
            warnings.warn(
                f"the gradients are not finite in step {first_bad} of {total}, counted from 0",
                RuntimeWarning,
                stacklevel=3,
            )
        assert losses is not None
        return losses

    def _network(self, x: Tensor, target: Tensor) -> Network | str:
        """The network, or why its gradients have to come from the loop of the docstring."""
        network = network_of(self.net)
        if network is None:
            return "net is not an unchanged network of Linear and ReLU"
        if is_any_autocast_enabled() or not is_served(x) or not is_plain(target):
            return "autocast or a mode is active, or x or target is not an ordinary tensor"
        if are_functorch_transforms_active() or FORWARD_AD[LEVEL] >= 0:
            return "a transform of torch.func or forward-mode AD is active"
        if x.requires_grad or target.requires_grad:
            return "x or target requires a gradient"
        if torch.is_anomaly_enabled():
            return "autograd detects anomalies"
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

    def _update(self, x: Tensor, network: Network) -> Update | str:
        """How the operator would update the network, or why it can't."""
        if x.dtype not in (torch.float32, torch.float64) or not x.is_cpu:
            return f"x is {x.dtype} on {x.device}, and not float32 or float64 on the CPU"
        if implementation_for(x) is not extension:
            return "the extension is not used"
        if dispatch_modes():
            return "a mode is active"
        if not all(p.is_contiguous() and not p.is_neg() for p in network.present):
            return "a parameter is not contiguous"
        return read_update(self.optimizer, network.parameters)

    # -- By the operator ---------------------------------------------------------------------

    def _train(
        self,
        network: Network,
        update: Update,
        x: Tensor,
        target: Tensor,
        losses: Tensor,
        order: Tensor | None,
        batch_size: int | None,
        first: int,
    ) -> int:
        """The steps from the number `first` on, one for each of `losses`.

        Returns the first step whose gradients are not finite, or -1.
        """
        weights, biases, activation = network
        if target.dtype is not x.dtype and not (target.is_floating_point() or target.is_complex()):
            target = target.to(x.dtype)
        check_shape(target, (*x.shape[:-1], weights[-1].shape[0]))
        if not target.is_cpu:
            raise RuntimeError(f"target must be on {x.device} like x, got {target.device}")
        x, target = as_matrix(x), as_matrix(target)
        with below_autograd():
            bad = _train(
                x,
                target,
                weights,
                biases,
                update.state,
                losses,
                NO_TENSOR if order is None else order,
                self.loss,
                activation,
                update.kind,
                update.hyperparameters,
                update.groups,
                [],
                math.inf if self.max_norm is None else self.max_norm,
                batch_size or max(1, len(x)),
                first,
                first + len(losses),
            )
        increment_versions(update, network.parameters)
        count_step(self.optimizer)
        for parameter in network.present:
            parameter.grad = None
        return int(bad)

    # -- Without the operator ----------------------------------------------------------------

    def _one_by_one(
        self, network: Network | str, x: Tensor, target: Tensor, checks_gradients: bool
    ) -> tuple[Tensor, bool]:
        """A step with the optimizer's own `step`. Without a network, autograd differentiates.

        Returns the loss, and whether the gradients are finite as far as they were checked.
        """
        if isinstance(network, str):
            with torch.enable_grad():
                y = self.net(x)
                check_shape(target, y.shape)
                loss = LOSSES[self.loss](y, target)
            self.optimizer.zero_grad()
            loss.backward()
        else:
            loss, *grads = self._gradients(network, x, target)
            self.optimizer.zero_grad()
            for parameter, grad in zip(network.present, grads, strict=True):
                parameter.grad = grad if parameter.requires_grad else None
        is_finite = not checks_gradients or are_finite(self.net.parameters())
        if self.max_norm is not None:
            nn.utils.clip_grad_norm_(self.net.parameters(), self.max_norm)
        self.optimizer.step()
        for parameter in self.net.parameters():
            parameter.grad = None
        return loss.detach(), is_finite

    def _gradients(self, network: Network, x: Tensor, target: Tensor) -> list[Tensor]:
        """The loss, and the gradients of the parameters that are present."""
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
        return [loss, *of_weights, *(grad for grad in of_biases or () if grad is not None)]


_train = torch.ops.relu_mlp._train.default


def as_matrix(tensor: Tensor) -> Tensor:
    """(*, features) as (rows, features), contiguous."""
    return tensor.reshape(-1, tensor.shape[-1]).contiguous()


def batch_of(rows: int, order: Tensor | None, batch_size: int, step: int) -> Any:
    """The index of the rows of a step."""
    batches = max(1, -(-rows // batch_size))
    begin = step % batches * batch_size
    part = slice(begin, begin + batch_size)
    return part if order is None else order[part]


def are_finite(parameters: Iterable[Tensor]) -> bool:
    """Whether the dense gradients of parameters are finite."""
    grads = [p.grad for p in parameters if p.grad is not None]
    return all(bool(g.isfinite().all()) for g in grads if g.layout is torch.strided)


def check_shape(target: Tensor, shape: Sequence[int]) -> None:
    if target.shape != shape:
        raise RuntimeError(
            f"target must have the output's shape {tuple(shape)}, got {tuple(target.shape)}"
        )


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
