"""`TrainingStep`: the loss, its gradients and the optimizer's step in one call."""

from __future__ import annotations

import inspect
import math
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from . import checks
from ._torch_private import count_step
from .batches import batch_of, checked_order, random_order
from .ensemble import ReluMLPEnsemble, checked_rates, is_one_for_each, merge, split
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

    Of a `ReluMLPEnsemble` it trains each network as if it were alone, bit for bit. The operator
    shares the networks out among threads. `x` and `target` then are (rows, features) for all
    networks, or (networks, rows, features), and losses have one more dimension, (networks,), at
    the end. State of the optimizer is stacked like the parameters.

    Args:
        net: a `ReluMLP`, an `nn.Sequential` of Linear, ReLU, ..., Linear, a `ReluMLPEnsemble`, or
            any other module.
        loss: the name of a loss of `loss_and_grads`.
        optimizer: an optimizer of the parameters of `net`.
        lr: a learning rate for each network of an ensemble, in place of those of the optimizer's
            groups. The attribute `lr` may be changed at any time.
        max_norm: the norm to which gradients are clipped, as by
            `torch.nn.utils.clip_grad_norm_(net.parameters(), max_norm)`; None for no clipping.
            Those of an ensemble are clipped network by network.

    Raises:
        TypeError: if `net` is not a module, if `optimizer` is not an optimizer, or one whose step
            needs a closure such as `torch.optim.LBFGS`, or if `lr` is given and `net` is not an
            ensemble.
        ValueError: if the loss is unknown, if `max_norm` is not positive, if `lr` has another
            length or negative entries, or if the optimizer has no parameter of `net`.

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
        lr: Sequence[float] | Tensor | None = None,
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
        self._net = net
        self._loss: Loss = loss
        self._optimizer = optimizer
        self._max_norm = max_norm
        self._networks = len(net) if isinstance(net, ReluMLPEnsemble) else None
        self.lr = lr
        self._trainer: Trainer | None = None
        self._step: Any = None  # the trainer as the native node knows it
        self._seconds_of_a_row = math.inf  # measured in the last call

    def __getstate__(self) -> dict[str, Any]:
        # A copy finds its own parameters.
        return {**self.__dict__, "_trainer": None, "_step": None}

    def __repr__(self) -> str:
        name = type(self._optimizer).__name__
        return f"TrainingStep({type(self._net).__name__}, {self._loss!r}, {name})"

    @property
    def net(self) -> nn.Module:
        """The module that is trained."""
        return self._net

    @property
    def loss(self) -> Loss:
        """The name of the loss."""
        return self._loss

    @property
    def optimizer(self) -> Optimizer:
        """The optimizer, with its hyperparameters and its state."""
        return self._optimizer

    @property
    def max_norm(self) -> float | None:
        """The norm to which gradients are clipped, or None."""
        return self._max_norm

    @property
    def lr(self) -> tuple[float, ...] | None:
        """The learning rate of each network of an ensemble; None for those of the groups."""
        return None if self._lr is None else tuple(self._lr)

    @lr.setter
    def lr(self, lr: Sequence[float] | Tensor | None) -> None:
        if lr is not None and self._networks is None:
            raise TypeError("lr must be None unless net is a ReluMLPEnsemble")
        self._lr = None if lr is None else checked_rates(lr, self._networks)

    @property
    def _loss_shape(self) -> tuple[int, ...]:
        return () if self._networks is None else (self._networks,)

    # -- One step ----------------------------------------------------------------------------

    def __call__(self, x: Tensor, target: Tensor) -> Tensor:
        """One step on the rows of `x`; returns their loss before it.

        Args:
            x: (*, in_features), as `net` takes it.
            target: as the loss takes it, for the output of `net`.

        Returns:
            The loss, of shape () or (networks,), in the dtype of x and without a graph.

        Raises:
            TypeError: if x or the target is not a tensor.
            RuntimeError: as `loss_and_grads`, before anything is changed.
        """
        if self._step is not None:
            loss = train_step(self._step, x, target, self._max_norm or math.inf)
            if loss is not NotImplemented:
                self.reason = None
                return loss
        check_tensors(x, target)
        try:
            trainer = self._trainer_for(x, target)
            loss = x.new_empty(self._loss_shape)
            operands = self._matrices(trainer.network, x, target)
            trainer.train(*operands, loss, 0, None, None, self._max_norm, self._lr)
        except Unknown as reason:
            self.reason = str(reason)
            return self._without_operator(x, target, None, None, 0, watch=False)[0]
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
            The losses before each step, of shape (times,) or (times, networks).

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
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        order: Tensor | None = None,
        progress: Progress | None = None,
    ) -> Tensor:
        """One step for each batch of rows, until all rows were used once.

        Equal to a step for each batch of ``order.split(batch_size)``, where `order` is
        ``torch.randperm(len(x), generator=generator)``, or the order of the rows themselves. The
        last batch may be smaller. It copies no more than the rows of one batch.

        Args:
            x: (rows, in_features), or (networks, rows, in_features) for an ensemble.
            target: (rows, out_features), or (networks, rows, out_features) for an ensemble.
            batch_size: the rows of a batch.
            shuffle: whether the rows come in a random order.
            generator: the generator of that order; None for PyTorch's default. An ensemble has one
                order for all networks, or with a sequence of generators one for each.
            order: the numbers of the rows to use, in their order, instead of `shuffle` and
                `generator`: int64 of shape (n,), or (networks, n) for an ensemble. It may leave out
                rows, as for folds of a cross-validation, and repeat some.
            progress: called with the number of batches done and their total, every 50 ms or so.

        Returns:
            The losses of the batches, of shape (batches,) or (batches, networks). There are
            ceil(rows / batch_size) batches, or ceil(n / batch_size).

        Raises:
            TypeError: if `order` is not a tensor, or if there are several generators for one
                network.
            ValueError: if `batch_size` is less than 1, if `x` and `target` differ in length, if
                there is not one generator or order for each network, or if both are given.
            IndexError: if `order` is not int64, or if a number in it is not that of a row.
            RuntimeError: as a call.

        Ctrl-C ends it between two batches. It warns of gradients that are not finite.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        rows = self._count_rows("x", x)
        if rows != self._count_rows("target", target):
            raise ValueError(
                f"target must have {rows} rows like x, got {self._count_rows('target', target)}"
            )
        if order is None:
            order = random_order(rows, self._networks, generator) if shuffle else None
        elif generator is not None:
            raise ValueError("generator must be None if there is an order, got both")
        else:
            order = checked_order(order, rows, self._networks)
        batches = -(-(rows if order is None else order.shape[-1]) // batch_size)
        return self._steps(x, target, order, batch_size, batches, progress)

    def _count_rows(self, name: str, tensor: Tensor) -> int:
        """The rows of x or target. Raises RuntimeError if they don't suit an ensemble."""
        if self._networks is None:
            return len(tensor) if tensor.dim() else 1
        dim = self._dim_of(name, tensor)
        return tensor.shape[is_one_for_each(name, tensor, self._networks, dim)]

    def _dim_of(self, name: str, tensor: Tensor) -> int:
        """The number of dimensions of x or target of one network of an ensemble."""
        is_class = name == "target" and self._loss == "cross_entropy"
        return 1 if is_class and not tensor.is_floating_point() else 2

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
        check_tensors(x, target)
        shape = (total, *self._loss_shape)
        losses: Tensor | None = x.new_empty(shape) if total == 0 else None
        matrices: tuple[Tensor, Tensor] | None = None
        done, first_bad = 0, -1
        finite: list[tuple[int, Tensor]] = []  # whether the gradients of a step are finite
        rows_of_step = batch_size or max(1, self._count_rows("x", x))
        while done < total:
            began = time.perf_counter()
            try:
                trainer = self._trainer_for(x, target)
                if batch_size is not None and self._networks is None and x.dim() != 2:
                    raise Unknown("x is not a matrix")
                losses = x.new_empty(shape) if losses is None else losses
                at_once = max(1, int(SECONDS_OF_A_CALL / (self._seconds_of_a_row * rows_of_step)))
                part = losses[done : done + at_once]
                if matrices is None:  # once, because it may copy all rows
                    matrices = self._matrices(trainer.network, x, target)
                bad = trainer.train(
                    *matrices,
                    part,
                    done,
                    batch_size,
                    order,
                    self._max_norm,
                    self._lr,
                )
                self.reason = None
            except Unknown as reason:
                self.reason = str(reason)
                loss, is_finite = self._without_operator(x, target, order, batch_size, done, True)
                losses = loss.new_empty(shape) if losses is None else losses
                part = losses[done : done + 1]
                part[0] = loss
                finite.append((done, is_finite))
                bad = -1
            took = time.perf_counter() - began
            self._seconds_of_a_row = max(took, 1e-6) / (len(part) * rows_of_step)
            first_bad = bad if first_bad < 0 else first_bad
            done += len(part)
            if progress is not None:
                progress(done, total)
        for step, is_finite in finite:  # read at the end, because a GPU would have to wait
            if first_bad < 0 and not is_finite:
                first_bad = step
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
        if self._networks is not None:
            self._count_rows("x", x)
            self._count_rows("target", target)
            return x.contiguous(), target.contiguous()
        has_classes = self._loss == "cross_entropy" and target.dtype is torch.int64
        out = network.weights[-1].shape[0]
        if not target.is_cpu:
            checks.check_device("target", target, x)
        expected = x.shape[:-1] if has_classes else (*x.shape[:-1], out)
        if target.shape != expected or (self._loss == "cross_entropy" and x.dim() > 2):
            checks.check_target(target, x, network.weights, has_classes, self._loss)
        return as_matrix(x), target.reshape(-1) if has_classes else as_matrix(target)

    # -- Without the operator ----------------------------------------------------------------

    def _without_operator(
        self,
        x: Tensor,
        target: Tensor,
        order: Tensor | None,
        batch_size: int | None,
        step: int,
        watch: bool,
    ) -> tuple[Tensor, Tensor]:
        """The step of a number, for the rows of its batch. Without a batch size, all rows.

        Returns the loss, and whether the gradients are finite, as far as they are watched.
        """
        if self._networks is not None:
            return self._each_alone(x, target, order, batch_size, step, watch)
        rows = batch_of(len(x), order, batch_size, step) if batch_size else ...
        return self._one_by_one(x[rows], target[rows], watch)

    def _each_alone(
        self,
        x: Tensor,
        target: Tensor,
        order: Tensor | None,
        batch_size: int | None,
        step: int,
        watch: bool,
    ) -> tuple[Tensor, Tensor]:
        """The same for an ensemble: a step of every network by itself."""
        assert isinstance(self._net, ReluMLPEnsemble)
        rows = self._count_rows("x", x)
        self._count_rows("target", target)
        singles = split(self._net, self._optimizer, self._lr)
        results = []
        for e, (net, optimizer) in enumerate(singles):
            x_e = x[e] if x.dim() == 3 else x
            target_e = target[e] if target.dim() > self._dim_of("target", target) else target
            order_e = order[e] if order is not None and order.dim() == 2 else order
            batch = batch_of(rows, order_e, batch_size, step) if batch_size else ...
            alone = TrainingStep(net, self._loss, optimizer, max_norm=self._max_norm)
            results.append(alone._one_by_one(x_e[batch], target_e[batch], watch))
        merge(self._net, self._optimizer, singles)
        count_step(self._optimizer)
        losses, is_finite = map(torch.stack, zip(*results, strict=True))
        return losses, is_finite.all()

    def _one_by_one(self, x: Tensor, target: Tensor, watch: bool) -> tuple[Tensor, Tensor]:
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
        is_finite = are_finite(self._net.parameters()) if watch else TRUE
        if self._max_norm is not None:
            nn.utils.clip_grad_norm_(self._net.parameters(), self._max_norm)
        self._optimizer.step()
        for parameter in self._net.parameters():
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
            loss=self._loss,
            output_activation=None if activation == "none" else activation,  # type: ignore[arg-type]
        )
        return [loss, *of_weights, *(grad for grad in of_biases or () if grad is not None)]


TRUE = torch.tensor(True)


def are_finite(parameters: Iterable[Tensor]) -> Tensor:
    """Whether the dense gradients of parameters are finite."""
    grads = [p.grad for p in parameters if p.grad is not None]
    found = [grad.isfinite().all() for grad in grads if grad.layout is torch.strided]
    return torch.stack(found).all() if found else TRUE


def check_tensors(x: object, target: object) -> None:
    for name, tensor in (("x", x), ("target", target)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a Tensor, got {type(tensor).__name__}")


def as_matrix(tensor: Tensor) -> Tensor:
    """(*, features) as (rows, features), contiguous."""
    if tensor.dim() == 2 and tensor.is_contiguous():
        return tensor
    return tensor.reshape(-1, tensor.shape[-1]).contiguous()
