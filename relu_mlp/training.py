"""`TrainingStep`: the loss, its gradients and the optimizer's step in one call."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from . import checks
from .functional import Loss, converted_target, loss_and_grads
from .ops import NO_TENSOR
from .optimizers import Unknown
from .trainer import Network, Trainer, network_for, train_step

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

#: A call of the operator lasts about this many seconds. Between two calls Python handles
#: signals, such as that of Ctrl-C.
SECONDS_OF_A_CALL = 0.05

Progress = Callable[[int, int], object]


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
        loss: the name of a loss of `loss_and_grads`.
        optimizer: an optimizer of the parameters of `net`.
        max_norm: the norm to which gradients are clipped, as by
            `torch.nn.utils.clip_grad_norm_(net.parameters(), max_norm)`; None for no clipping.

    Raises:
        TypeError: if `net` is not a module or `optimizer` not an optimizer.
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
        if max_norm is not None and not max_norm > 0:
            raise ValueError(f"max_norm must be positive, got {max_norm}")
        own = {id(p) for p in net.parameters()}
        if not any(id(p) in own for group in optimizer.param_groups for p in group["params"]):
            raise ValueError("optimizer must have parameters of net, got none of them")
        self._net = net
        self._loss: Loss = loss
        self._optimizer = optimizer
        self._max_norm = max_norm
        self._trainer: Trainer | None = None
        self._step: Any = None  # the trainer as the native node knows it
        self._seconds_of_a_row = math.inf  # measured in the last call

    def __getstate__(self) -> dict[str, Any]:
        # A copy finds its own parameters.
        return {**self.__dict__, "_trainer": None, "_step": None}

    def __repr__(self) -> str:
        name = type(self._optimizer).__name__
        return f"TrainingStep({type(self._net).__name__}, {self._loss!r}, {name})"

    # -- One step ----------------------------------------------------------------------------

    def __call__(self, x: Tensor, target: Tensor) -> Tensor:
        """One step on the rows of `x`; returns their loss before it.

        Args:
            x: (*, in_features), as `net` takes it.
            target: as the loss takes it, for the output of `net`.

        Returns:
            The loss, of shape (), in the dtype of x and without a graph.

        Raises:
            RuntimeError: as `loss_and_grads`, before anything is changed.
        """
        if self._step is not None:
            loss = train_step(self._step, x, target, self._max_norm or math.inf)
            if loss is not NotImplemented:
                self.reason = None
                return loss
        try:
            trainer = self._trainer_for(x, target)
            loss = x.new_empty(())
            trainer.train(
                *self._matrices(trainer.network, x, target), loss, 0, None, None, self._max_norm
            )
        except Unknown as reason:
            self.reason = str(reason)
            return self._one_by_one(x, target)
        self.reason = None
        return loss

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
        losses: Tensor | None = x.new_empty(0) if total == 0 else None
        done, first_bad = 0, -1
        rows_of_step = batch_size or max(1, len(x))
        while done < total:
            began = time.perf_counter()
            try:
                trainer = self._trainer_for(x, target)
                losses = x.new_empty(total) if losses is None else losses
                at_once = max(1, int(SECONDS_OF_A_CALL / (self._seconds_of_a_row * rows_of_step)))
                part = losses[done : done + at_once]
                bad = trainer.train(
                    *self._matrices(trainer.network, x, target),
                    part,
                    done,
                    batch_size,
                    order,
                    self._max_norm,
                )
                self.reason = None
            except Unknown as reason:
                self.reason = str(reason)
                rows = batch_of(len(x), order, batch_size, done) if batch_size else ...
                loss = self._one_by_one(x[rows], target[rows])
                losses = loss.new_empty(total) if losses is None else losses
                part = losses[done : done + 1]
                part[0] = loss
                bad = -1 if loss.isfinite() else done
            took = time.perf_counter() - began
            self._seconds_of_a_row = max(took, 1e-6) / (len(part) * rows_of_step)
            first_bad = bad if first_bad < 0 else first_bad
            done += len(part)
            if progress is not None:
                progress(done, total)
        if first_bad >= 0:
            warnings.warn(
                f"the gradients are not finite in step {first_bad} of {total}, counted from 0",
                RuntimeWarning,
                stacklevel=3,
            )
        assert losses is not None
        return losses

    def _trainer_for(self, x: Tensor, target: Tensor) -> Trainer:
        trainer = self._trainer
        network = network_for(self._net, x, target)
        if isinstance(network, str):
            raise Unknown(network)
        Trainer.check(x, network)
        if trainer is None or not trainer.is_for(network):
            trainer = self._trainer = Trainer(network, self._loss, self._optimizer)
            self._step = trainer.prepare_node(self._net)
        return trainer

    def _matrices(self, network: Network, x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """x and the target as the operator takes them."""
        target = converted_target(self._loss, target, x)
        has_classes = self._loss == "cross_entropy" and target.dtype is torch.int64
        out = network.weights[-1].shape[0]
        expected = x.shape[:-1] if has_classes else (*x.shape[:-1], out)
        if target.shape != expected or (self._loss == "cross_entropy" and x.dim() > 2):
            checks.check_target(target, x, network.weights, has_classes, self._loss)
        return as_matrix(x), target.reshape(-1) if has_classes else as_matrix(target)

    # -- Without the operator ----------------------------------------------------------------

    def _one_by_one(self, x: Tensor, target: Tensor) -> Tensor:
        """A step with the optimizer's own `step`. Without a network, autograd differentiates."""
        network = network_for(self._net, x, target)
        if isinstance(network, str):
            with torch.enable_grad():
                y = self._net(x)
                if self._loss != "cross_entropy" and target.shape != y.shape:
                    raise RuntimeError(
                        f"target must have the output's shape {tuple(y.shape)}, "
                        f"got {tuple(target.shape)}"
                    )
                loss = LOSSES[self._loss](y, target)
            self._optimizer.zero_grad()
            loss.backward()
        else:
            loss, *grads = self._gradients(network, x, target)
            self._optimizer.zero_grad()
            for parameter, grad in zip(network.present, grads, strict=True):
                parameter.grad = grad if parameter.requires_grad else None
        if self._max_norm is not None:
            nn.utils.clip_grad_norm_(self._net.parameters(), self._max_norm)
        self._optimizer.step()
        for parameter in self._net.parameters():
            parameter.grad = None
        return loss.detach()

    def _gradients(self, network: Network, x: Tensor, target: Tensor) -> list[Tensor]:
        """The loss, and the gradients of the parameters that are present."""
        weights, biases, activation = network
        given = [None if bias is NO_TENSOR else bias for bias in biases] or None
        loss, of_weights, of_biases = loss_and_grads(
            x,
            target,
            weights,
            given,
            loss=self._loss,
            output_activation=None if activation == "none" else activation,  # type: ignore[arg-type]
        )
        return [loss, *of_weights, *(grad for grad in of_biases or () if grad is not None)]


def as_matrix(tensor: Tensor) -> Tensor:
    """(*, features) as (rows, features), contiguous."""
    if tensor.dim() == 2 and tensor.is_contiguous():
        return tensor
    return tensor.reshape(-1, tensor.shape[-1]).contiguous()


def batch_of(rows: int, order: Tensor | None, batch_size: int, step: int) -> Any:
    """The index of the rows of a step."""
    batches = max(1, -(-rows // batch_size))
    begin = step % batches * batch_size
    part = slice(begin, begin + batch_size)
    return part if order is None else order[part]
