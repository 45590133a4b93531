"""The training of `relu-mlp train`, epoch by epoch, from scratch or from a checkpoint."""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..functional import Loss
from ..training import TrainingStep
from . import Problem
from .checkpoint import Checkpoint, fingerprint, make_network
from .encoding import Encoding
from .settings import OPTIMIZERS
from .table import Table
from .task import Standardization, Task, is_constant, outputs_of


def check_device(device: str, dtype: str) -> None:
    try:
        torch.zeros(1, device=device, dtype=getattr(torch, dtype)).item()
    except (RuntimeError, AssertionError, TypeError) as error:  # the class depends on the device
        reason = str(error).splitlines()[0]
        raise Problem(f"--device {device} can't be used with {dtype}: {reason}") from None


class Part(NamedTuple):
    """Rows to train or to validate on."""

    x: Tensor  #: (rows, features), standardized
    targets: Tensor  #: as `Task.read_targets` returns them, for a regression standardized


class Training:
    """A network in training, with everything that the next epochs depend on."""

    def __init__(
        self,
        table: Table,
        task: Task,
        settings: dict[str, Any],
        device: str,
        resumed: Checkpoint | None,
    ) -> None:
        self.table, self.task, self.settings, self.device = table, task, settings, device
        self.generator = torch.Generator().manual_seed(settings["seed"])
        self.read(resumed)
        self.net = make_network(self.encoding, task, settings).to(device)
        parameters = list(self.net.parameters())
        #: Float32 copies of 16-bit parameters, which are too coarse for most updates.
        self.master_weights = (
            [parameter.detach().float() for parameter in parameters]
            if settings["dtype"] in ("bfloat16", "float16")
            else []
        )
        kind, options, _ = OPTIMIZERS[settings["optimizer"]]
        chosen = {name: settings[name] for name in ("lr", "weight_decay")}
        options = options | {name: value for name, value in chosen.items() if value is not None}
        self.optimizer = kind(self.master_weights or parameters, **options)
        loss: Loss = "mse" if task.classes is None else "cross_entropy"
        #: Trains the parameters themselves.
        self.training_step = (
            None if self.master_weights else TrainingStep(self.net, loss, self.optimizer)
        )
        self.history: list[dict[str, float]] = []
        self.best_epoch = 0  #: that with the lowest validation loss
        self.best_model: dict[str, Tensor] = {}  #: its state_dict
        self.last = resumed  #: the state after the last epoch
        if resumed:
            self.restore(resumed)

    def read(self, resumed: Checkpoint | None) -> None:
        """Reads and standardizes the rows of the table, and splits them into two parts."""
        path, task = self.table.path, self.task
        targets = task.read_targets(self.table)
        held_out = round(len(targets) * self.settings["validation"])
        held_out = min(max(held_out, 1), len(targets) - 1)
        order = torch.randperm(len(targets), generator=self.generator)
        train, validation = order[held_out:], order[:held_out]
        self.encoding = (
            resumed.encoding if resumed else Encoding.of(self.table, task.features, train)
        )
        features = self.encoding.apply(self.table)
        self.fingerprint = fingerprint(features, targets)
        if resumed and self.fingerprint != resumed.table:
            raise Problem(
                f"{path}: expected the {resumed.rows} rows that the checkpoint was trained on, "
                f"got {len(targets)} rows of another table"
            )
        if len(targets) < 2:
            raise Problem(f"{path}: expected a row to train and one to validate on, got one row")
        if is_constant(targets).all():
            names = ", ".join(map(repr, task.targets))
            raise Problem(
                f"{path}: expected a target that varies, got one value for all of {names}"
            )
        self.of_features = Standardization.of(features[train], self.encoding.is_number())
        self.of_targets = None
        if task.classes is None:
            self.of_targets = Standardization.of(targets[train])
            targets = self.of_targets.apply(targets)
        x = self.of_features.apply(features).to(self.device, getattr(torch, self.settings["dtype"]))
        self.train = Part(x[train], targets[train].to(self.device))
        self.validation = Part(x[validation], targets[validation].to(self.device))

    def restore(self, checkpoint: Checkpoint) -> None:
        self.net.load_state_dict(checkpoint.last_model)
        for weight, saved in zip(self.master_weights, checkpoint.master_weights, strict=True):
            weight.copy_(saved)
        # The optimizer's state. Its settings are those of this training.
        state = {**self.optimizer.state_dict(), "state": copied(checkpoint.optimizer["state"])}
        self.optimizer.load_state_dict(state)
        self.generator.set_state(checkpoint.generator)
        self.history = list(checkpoint.history)
        self.best_epoch, self.best_model = checkpoint.best_epoch, checkpoint.model

    @property
    def epoch(self) -> int:
        return len(self.history)

    @property
    def has_waited_enough(self) -> bool:
        """Whether the validation loss has not fallen for as many epochs as --patience says."""
        return 0 < self.settings["patience"] <= self.epoch - self.best_epoch

    def train_one_epoch(self) -> None:
        if self.training_step is not None:
            x, targets = self.train
            if self.task.classes is None:
                targets = targets.to(x.dtype)
            with warnings.catch_warnings():  # the loss after the epoch shows a divergence
                warnings.simplefilter("ignore", RuntimeWarning)
                self.training_step.epoch(
                    x, targets, self.settings["batch_size"], generator=self.generator
                )
            return
        order = torch.randperm(len(self.train.x), generator=self.generator)
        for rows in order.to(self.device).split(self.settings["batch_size"]):
            self.net.zero_grad()
            self.task.loss(self.net(self.train.x[rows]), self.train.targets[rows]).backward()
            self.step()

    @torch.no_grad()
    def step(self) -> None:
        """A step of the optimizer on the float32 copies of a 16-bit network."""
        for master, parameter in zip(self.master_weights, self.net.parameters(), strict=False):
            assert parameter.grad is not None
            master.grad = parameter.grad.float()
        self.optimizer.step()
        for master, parameter in zip(self.master_weights, self.net.parameters(), strict=False):
            parameter.copy_(master)

    def evaluate(self) -> dict[str, float]:
        """The scores of both parts, under the names of the columns of curves.csv."""
        found = {}
        for name, part in (("train", self.train), ("validation", self.validation)):
            outputs = outputs_of(self.net, part.x)
            scores = self.task.scores(outputs, part.targets.cpu(), self.of_targets)
            found.update({f"{name}_{score}": value for score, value in scores.items()})
        return found

    def record(self, scores: dict[str, float]) -> Checkpoint:
        """Adds the scores of an epoch to the history. Keeps and returns the state after it."""
        self.history.append({"epoch": self.epoch + 1, **scores})
        losses = [line["validation_loss"] for line in self.history]
        if self.best_epoch == 0 or losses[-1] < losses[self.best_epoch - 1]:
            self.best_epoch = self.epoch
            self.best_model = copied(dict(self.net.state_dict()))
        self.last = self.checkpoint()
        return self.last

    def checkpoint(self) -> Checkpoint:
        targets, last_model = self.of_targets, copied(dict(self.net.state_dict()))
        return Checkpoint(
            model=last_model if self.settings["last"] else self.best_model,
            features=self.task.features,
            categories=self.encoding.categories,
            indicators=self.encoding.indicators,
            targets=self.task.targets,
            classes=self.task.classes,
            feature_mean=self.of_features.mean,
            feature_scale=self.of_features.scale,
            target_mean=targets.mean if targets else None,
            target_scale=targets.scale if targets else None,
            settings=self.settings,
            rows=len(self.table),
            table=self.fingerprint,
            epoch=self.epoch,
            best_epoch=self.best_epoch,
            last_model=last_model,
            history=list(self.history),
            optimizer=copied(self.optimizer.state_dict()),
            master_weights=copied(self.master_weights),
            generator=self.generator.get_state(),
        )


def copied(value: Any) -> Any:
    """A copy of a state_dict, or of a part of one, on the CPU."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: copied(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(copied(entry) for entry in value)
    return value
