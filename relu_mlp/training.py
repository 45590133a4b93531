"""`TrainingStep`: the loss, its gradients and the optimizer's step in one call."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from . import checks
from .batches import batch_of, checked_order, random_order
from .functional import Loss, converted_target
from .optimizers import Unknown
from .single_step import LOSSES, Result, SingleStep
from .trainer import share_memory, train, train_step

#: A call of the operator lasts about this many seconds. Between two calls Python handles
#: signals, such as that of Ctrl-C.
SECONDS_OF_A_CALL = 0.05

#: The caller's function is told how far it is at most this often, and at the end.
SECONDS_OF_SILENCE = 0.1

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
    `optimizer.step()` where only the optimizer stands in the way; `reason` says why.

    An ensemble is a sequence of networks of equal shapes, each with an optimizer of its own. Each
    network is trained as if it were alone, bit for bit. The operator shares them out among threads.
    `x` and `target` are for all networks, or have a dimension (networks,) in front, as losses do.

    Args:
        net: a `ReluMLP`, an `nn.Sequential` of Linear, ReLU, ..., Linear, or any other module; or a
            sequence of them.
        loss: the name of a loss of `loss_and_grads`.
        optimizer: an optimizer of the parameters of `net`; or one for each network.
        max_norm: the norm to which the gradients of a network are clipped, as by
            `torch.nn.utils.clip_grad_norm_(net.parameters(), max_norm)`; None for no clipping.

    Raises:
        TypeError: if `net` is not a module, or if `optimizer` is not an optimizer, or one whose
            step needs a closure such as `torch.optim.LBFGS`.
        ValueError: if the loss is unknown, if `max_norm` is not positive, if an optimizer has no
            parameter of its network, if networks and optimizers differ in number, or if the
            networks differ in shape or share a parameter.

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
        net: nn.Module | Sequence[nn.Module],
        loss: Loss,
        optimizer: Optimizer | Sequence[Optimizer],
        *,
        max_norm: float | None = None,
    ) -> None:
        if not isinstance(loss, str) or loss not in LOSSES:
            raise ValueError(f"loss must be {checks.listed(LOSSES)}, got {loss!r}")
        if max_norm is not None and not max_norm > 0:
            raise ValueError(f"max_norm must be positive, got {max_norm}")
        self._net, self._optimizer = net, optimizer
        self._loss: Loss = loss
        self._max_norm = max_norm
        #: The number of networks; None for one that is not in a sequence.
        self._networks: int | None = None
        if isinstance(net, (list, tuple)):
            self._members = members_of(net, loss, optimizer, max_norm)
            self._networks = len(net)
            # The caller may change the lists later.
            self._net = [member.net for member in self._members]
            self._optimizer = [member.optimizer for member in self._members]
        else:
            self._members = [SingleStep(net, loss, optimizer, max_norm)]  # type: ignore[arg-type]
        self._seconds_of_a_row = math.inf  # measured in the last call

    def __repr__(self) -> str:
        names = [type(member.net).__name__ for member in self._members]
        kinds = dict.fromkeys(type(member.optimizer).__name__ for member in self._members)
        nets = names[0] if self._networks is None else f"{self._networks} networks"
        return f"TrainingStep({nets}, {self._loss!r}, {' and '.join(kinds)})"

    @property
    def net(self) -> nn.Module | Sequence[nn.Module]:
        """The module that is trained, or the sequence of them."""
        return self._net

    @property
    def loss(self) -> Loss:
        """The name of the loss."""
        return self._loss

    @property
    def optimizer(self) -> Optimizer | Sequence[Optimizer]:
        """The optimizer, with its hyperparameters and its state; or the sequence of them."""
        return self._optimizer

    @property
    def max_norm(self) -> float | None:
        """The norm to which gradients are clipped, or None."""
        return self._max_norm

    # -- One step ----------------------------------------------------------------------------

    def __call__(self, x: Tensor, target: Tensor) -> Tensor:
        """One step on the rows of `x`; returns their loss before it.

        Args:
            x: (*, in_features), as `net` takes it. For an ensemble (rows, in_features) or
                (networks, rows, in_features).
            target: as the loss takes it, for the output of `net`. For an ensemble it may have a
                dimension (networks,) in front.

        Returns:
            The loss, of shape () or (networks,), in the dtype of x and without a graph.

        Raises:
            TypeError: if x or the target is not a tensor.
            RuntimeError: as `loss_and_grads`, before anything is changed.
        """
        of_node = [member.of_node for member in self._members]
        if None not in of_node:
            max_norm = self._max_norm or math.inf
            loss = train_step(of_node, x, target, max_norm, self._networks is None)
            if loss is not NotImplemented:
                self.reason = None
                return loss
        losses = self._steps(x, target, None, None, 1, None, watch=False)
        return losses[..., 0]

    # -- Many steps --------------------------------------------------------------------------

    def repeat(
        self, x: Tensor, target: Tensor, times: int, *, progress: Progress | None = None
    ) -> Tensor:
        """The same step `times` times, as in gradient descent with all rows.

        Args:
            x, target: as in a call.
            times: how many steps.
            progress: called with the number of steps done and `times`, at most every 100 ms and at
                the end.

        Returns:
            The losses before each step, of shape (times,) or (networks, times).

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
        shuffle: bool = True,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        *,
        order: Tensor | None = None,
        progress: Progress | None = None,
    ) -> Tensor:
        """One step for each batch of rows, until all rows were used once.

        Equal to a step for each batch of ``order.split(batch_size)``, where `order` is
        ``torch.randperm(len(x), generator=generator)``, or the order of the rows themselves. The
        last batch may be smaller. It copies no more than the rows of one batch.

        Args:
            x: (rows, in_features), or (networks, rows, in_features) for an ensemble.
            target: as the loss takes it for these rows.
            batch_size: the rows of a batch.
            shuffle: whether the rows come in a random order.
            generator: the generator of that order; None for PyTorch's default. An ensemble has one
                order for all networks, or with a sequence of generators one for each.
            order: the numbers of the rows to use, in their order, instead of `shuffle` and
                `generator`: int64 of shape (n,), or (networks, n) for an ensemble. It may leave out
                rows, as for folds of a cross-validation, and repeat some.
            progress: called with the number of batches done and their total, at most every 100 ms
                and at the end.

        Returns:
            The losses of the batches, of shape (batches,) or (networks, batches). There are
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
        check_tensors(x, target)
        rows, of_target = self._rows_of("x", x), self._rows_of("target", target)
        if rows != of_target:
            raise ValueError(f"target must have {rows} rows like x, got {of_target}")
        if order is None:
            order = random_order(rows, self._networks, generator) if shuffle else None
        elif generator is not None:
            raise ValueError("generator must be None if there is an order, got both")
        else:
            order = checked_order(order, rows, self._networks)
        batches = -(-(rows if order is None else order.shape[-1]) // batch_size)
        return self._steps(x, target, order, batch_size, batches, progress)

    def _steps(
        self,
        x: Tensor,
        target: Tensor,
        order: Tensor | None,
        batch_size: int | None,
        total: int,
        progress: Progress | None,
        watch: bool = True,
    ) -> Tensor:
        """The losses of `total` steps. Without a batch size, each takes all rows of x.

        `watch` says whether to warn of gradients that are not finite.
        """
        check_tensors(x, target)
        rows_of_step = batch_size or max(1, self._rows_of("x", x))
        self._rows_of("target", target)
        losses: Tensor | None = None
        operands: tuple[Tensor, Tensor] | None = None
        finite: list[tuple[int, Tensor]] = []  # whether the gradients of a step are finite
        done, first_bad, told = 0, -1, time.perf_counter()
        while done < total:
            began = time.perf_counter()
            try:
                trainers = [member.trainer(x, target) for member in self._members]
                if share_memory(trainers):
                    raise Unknown("two networks share their memory")
                if operands is None:  # once, because it may copy all rows
                    operands = self._operands(x, target, batch_size, trainers[0].network.weights)
                losses = x.new_empty(len(trainers), total) if losses is None else losses
                at_once = max(1, int(SECONDS_OF_A_CALL / (self._seconds_of_a_row * rows_of_step)))
                part = losses[:, done : done + at_once]
                bad = train(trainers, *operands, part, done, batch_size, order, self._max_norm)
                self.reason = None
            except Unknown as reason:
                self.reason = str(reason)
                results = self._one_by_one(x, target, order, batch_size, done, watch)
                now, are_finite = map(torch.stack, zip(*results, strict=True))
                losses = now.new_empty(len(results), total) if losses is None else losses
                part = losses[:, done : done + 1]
                part[:, 0] = now
                finite.append((done, are_finite.all()))
                bad = -1
            took = time.perf_counter() - began
            self._seconds_of_a_row = max(took, 1e-6) / (part.shape[1] * rows_of_step)
            first_bad = bad if first_bad < 0 else first_bad
            done += part.shape[1]
            if progress is not None and (
                done == total or time.perf_counter() - told >= SECONDS_OF_SILENCE
            ):
                progress(done, total)
                told = time.perf_counter()
        for step, is_finite in finite:  # read at the end, because a GPU would have to wait
            if first_bad < 0 and not is_finite:
                first_bad = step
        if first_bad >= 0 and watch:
            warnings.warn(
                f"the gradients are not finite in step {first_bad} of {total}, counted from 0",
                RuntimeWarning,
                stacklevel=3,
            )
        if losses is None:
            losses = x.new_empty(len(self._members), 0)
        return losses[0] if self._networks is None else losses

    def _one_by_one(
        self,
        x: Tensor,
        target: Tensor,
        order: Tensor | None,
        batch_size: int | None,
        step: int,
        watch: bool,
    ) -> list[Result]:
        """One step of each network by itself, because the operator can't serve all at once.

        Nothing is changed before the arguments of all networks were found to be right.
        """
        updates: list[Callable[[], Result]] = []
        for n, member in enumerate(self._members):
            batch = self._batch(n, x, target, order, batch_size, step)
            # Alone, this network may be served, and then it has the operator's bits.
            by_operator = None if self._networks is None else self._by_operator(member, *batch)
            updates.append(by_operator or member.by_optimizer(*batch, watch))
        return [update() for update in updates]

    def _by_operator(
        self, member: SingleStep, x: Tensor, target: Tensor
    ) -> Callable[[], Result] | None:
        """A step of one network of an ensemble by the operator, if it serves. Checks arguments."""
        try:
            trainer = member.trainer(x, target)
            operands = self._operands(x, target, None, trainer.network.weights)
            run = partial(train, [trainer], *operands, max_norm=self._max_norm)
            loss = x.new_empty(1, 1)
            run(loss[:, :0])  # no step, only the checks
        except Unknown:
            return None

        def update() -> Result:
            bad = run(loss)
            return Result(loss[0, 0], torch.tensor(bad < 0))

        return update

    # -- Arguments ---------------------------------------------------------------------------

    def _dim_of_target(self, target: Tensor) -> int:
        """The number of dimensions of a target for one network of an ensemble."""
        return 1 if self._loss == "cross_entropy" and not target.is_floating_point() else 2

    def _rows_of(self, name: str, tensor: Tensor) -> int:
        """The number of rows of x or of the target. Checks the dimensions of an ensemble's."""
        if self._networks is None:
            return len(tensor) if tensor.dim() else 1
        dim = 2 if name == "x" else self._dim_of_target(tensor)
        is_one_for_each = tensor.dim() == dim + 1 and len(tensor) == self._networks
        if tensor.dim() != dim and not is_one_for_each:
            raise RuntimeError(
                f"{name} must have {dim} dimensions, or {self._networks} networks in front of "
                f"them, got shape {tuple(tensor.shape)}"
            )
        return tensor.shape[1] if is_one_for_each else len(tensor)

    def _operands(
        self, x: Tensor, target: Tensor, batch_size: int | None, weights: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """x and the target as the operator takes them."""
        target = converted_target(self._loss, target, x)
        if not target.is_cpu:
            checks.check_device("target", target, x)
        if self._networks is not None:
            return x.contiguous(), target.contiguous()
        if batch_size is not None and x.dim() != 2:
            raise Unknown("x is not a matrix")
        has_classes = self._loss == "cross_entropy" and target.dtype is torch.int64
        expected = x.shape[:-1] if has_classes else (*x.shape[:-1], weights[-1].shape[0])
        if target.shape != expected or (self._loss == "cross_entropy" and x.dim() > 2):
            checks.check_target(target, x, weights, has_classes, self._loss)
        if has_classes:
            return as_matrix(x), target.reshape(-1).contiguous()
        return as_matrix(x), as_matrix(target)

    def _batch(
        self,
        n: int,
        x: Tensor,
        target: Tensor,
        order: Tensor | None,
        batch_size: int | None,
        step: int,
    ) -> tuple[Tensor, Tensor]:
        """x and the target of one network in one step."""
        if self._networks is not None:
            x = x[n] if x.dim() == 3 else x
            target = target[n] if target.dim() > self._dim_of_target(target) else target
            order = order[n] if order is not None and order.dim() == 2 else order
        if batch_size is None:
            return x, target
        rows = batch_of(len(x), order, batch_size, step)
        return x[rows], target[rows]


def members_of(
    nets: Sequence[nn.Module], loss: Loss, optimizers: Any, max_norm: float | None
) -> list[SingleStep]:
    """The networks of an ensemble, after a check that they are of one shape and apart."""
    if not isinstance(optimizers, (list, tuple)):
        raise TypeError(
            f"optimizer must be a list with one for each network, got {type(optimizers).__name__}"
        )
    if not nets:
        raise ValueError("net must have at least one network, got none")
    if len(optimizers) != len(nets):
        raise ValueError(
            f"optimizer must have one for each of the {len(nets)} networks, got {len(optimizers)}"
        )
    members = [
        SingleStep(net, loss, optimizer, max_norm, f"[{n}]")
        for n, (net, optimizer) in enumerate(zip(nets, optimizers, strict=True))
    ]
    seen: dict[int, int] = {}
    shapes = [tuple(p.shape) for p in nets[0].parameters()]
    for n, net in enumerate(nets):
        found = [tuple(p.shape) for p in net.parameters()]
        if found != shapes:
            raise ValueError(
                f"net[{n}] must have parameters of the shapes {shapes} like net[0], got {found}"
            )
        for parameter in net.parameters():
            if seen.setdefault(id(parameter), n) != n:
                raise ValueError(
                    f"net[{n}] must have parameters of its own, got one of "
                    f"net[{seen[id(parameter)]}]"
                )
    if len(set(map(id, optimizers))) < len(optimizers):
        raise ValueError("optimizer must have another one for each network, got one twice")
    return members


def check_tensors(x: object, target: object) -> None:
    for name, tensor in (("x", x), ("target", target)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a Tensor, got {type(tensor).__name__}")


def as_matrix(tensor: Tensor) -> Tensor:
    """(*, features) as (rows, features), contiguous."""
    if tensor.dim() == 2 and tensor.is_contiguous():
        return tensor
    return tensor.reshape(math.prod(tensor.shape[:-1]), tensor.shape[-1]).contiguous()
