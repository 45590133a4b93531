"""The task: the columns to predict, those to predict them from, and the scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import Problem
from .reading import pandas
from .table import Table

#: A target of integers with more different values than this is a regression.
MOST_CLASSES = 20

#: The rows of one forward pass, if there is no backward pass.
ROWS_AT_ONCE = 65536


def is_constant(columns: Tensor) -> Tensor:
    """(rows, columns) -> (columns,): whether all rows are equal."""
    return columns.amax(0) == columns.amin(0)


@dataclass(frozen=True)
class Standardization:
    """z = (x - mean) / scale, column by column, in float64. NaN counts as the mean."""

    mean: Tensor  #: (columns,)
    scale: Tensor  #: (columns,)

    @classmethod
    def of(cls, x: Tensor, chosen: Tensor | None = None) -> Standardization:
        """Mean and standard deviation of (rows, columns); the scale of a constant column is 1.

        Args:
            chosen: (columns,), of bool: the columns to standardize; by default all.
        """
        mean = x.nanmean(0).nan_to_num(0)
        x = torch.where(x.isnan(), mean, x)
        scale = x.std(0, correction=0)
        # Compared, because the standard deviation of a constant may round to something else than 0.
        scale = scale.masked_fill(is_constant(x) | (scale == 0), 1)
        if chosen is None:
            return cls(mean, scale)
        return cls(mean.masked_fill(~chosen, 0), scale.masked_fill(~chosen, 1))

    def apply(self, x: Tensor) -> Tensor:
        return (torch.where(x.isnan(), self.mean, x) - self.mean) / self.scale

    def undo(self, z: Tensor) -> Tensor:
        return z * self.scale + self.mean


@dataclass(frozen=True)
class Task:
    """Features, targets, and the classes of a classification."""

    features: list[str]
    targets: list[str]
    classes: list[Any] | None  #: all str, bool, int or float, sorted; None for a regression

    @property
    def kind(self) -> str:
        return "regression" if self.classes is None else "classification"

    @property
    def outputs(self) -> int:
        """The width of the network's last layer."""
        return len(self.targets if self.classes is None else self.classes)

    def read_targets(self, table: Table) -> Tensor:
        """(rows, targets) in float64; for a classification (rows,) in int64."""
        if self.classes is None:
            return torch.stack(table.numbers(self.targets), 1)
        (target,) = self.targets
        numbers = {str(label): n for n, label in enumerate(self.classes)}
        labels = [numbers.get(str(label)) for label in table.labels(target)]
        if None in labels:
            row = labels.index(None)
            raise Problem(
                f"{table.at(row, target)}: expected one of the classes {', '.join(numbers)}, "
                f"got {table.labels(target)[row]}"
            )
        return torch.tensor(labels)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Cross entropy, or the mean squared error of standardized targets; at least in float32."""
        outputs = outputs.to(torch.promote_types(outputs.dtype, torch.float32))
        if self.classes is not None:
            return F.cross_entropy(outputs, targets)
        return F.mse_loss(outputs, targets.to(outputs.dtype))

    def scores(
        self, outputs: Tensor, targets: Tensor, standardization: Standardization | None
    ) -> dict[str, float]:
        """The loss, and accuracies, or R² and root mean squared errors.

        Args:
            outputs: (rows, outputs) in float64.
            targets: as `read_targets` returns them, for a regression standardized.
            standardization: that of the targets; it gives the RMSE its units.

        Returns:
            "loss", "accuracy" and "balanced_accuracy", the mean over the classes that occur
            of the fraction of their rows that is right; or "loss", "r2" (the mean over the
            targets, NaN if one is constant) and "rmse", or "rmse_NAME" for each of several targets.
        """
        scores = {"loss": self.loss(outputs, targets).item()}
        if self.classes is not None:
            right = outputs.argmax(1) == targets
            rows = targets.bincount(minlength=len(self.classes))
            found = targets[right].bincount(minlength=len(self.classes))
            recall = (found.double() / rows)[rows > 0]
            accuracy, balanced = right.double().mean().item(), recall.mean().item()
            return {**scores, "accuracy": accuracy, "balanced_accuracy": balanced}
        assert standardization is not None
        squares = (outputs - targets).square()
        total = (targets - targets.mean(0)).square().sum(0)
        r2 = (1 - squares.sum(0) / total).masked_fill(is_constant(targets), torch.nan)
        rmse = (squares.mean(0).sqrt() * standardization.scale).tolist()
        names = ["rmse"] if len(rmse) == 1 else [f"rmse_{name}" for name in self.targets]
        return {**scores, "r2": r2.mean().item(), **dict(zip(names, rmse, strict=True))}


def confusion(classes: list[Any], outputs: Tensor, targets: Tensor) -> str:
    """How often each class (rows) was predicted as each (columns), as text."""
    names = list(map(str, classes))
    actual, predicted = (
        pandas().Categorical.from_codes(numbers.tolist(), names)
        for numbers in (targets, outputs.argmax(1))
    )
    axes = {"rownames": ["actual"], "colnames": ["predicted"]}
    return pandas().crosstab(actual, predicted, dropna=False, **axes).to_string()


def choose_classes(
    table: Table, targets: Sequence[str], kind: str | None
) -> tuple[list[Any] | None, str]:
    """The classes, or None for a regression; and the reason.

    Text and booleans are classes. Integers are classes if there are at most
    `MOST_CLASSES` different ones. `kind` overrides this.
    """
    if kind == "regression":
        return None, "--task says so"
    if len(targets) > 1:
        if kind == "classification":
            raise Problem(f"--target: expected one column for classification, got {len(targets)}")
        return None, "there are several targets"
    labels = table.labels(targets[0])
    classes = sorted(set(labels))
    if kind == "classification":
        return classes, "--task says so"
    if isinstance(labels[0], (str, bool)):
        holds = "text" if isinstance(labels[0], str) else "true and false"
        return classes, f"{targets[0]!r} holds {holds}"
    if isinstance(labels[0], float):
        return None, f"{targets[0]!r} holds numbers that are not all whole"
    holds = f"holds {len(classes)} different whole numbers"
    return classes if len(classes) <= MOST_CLASSES else None, f"{targets[0]!r} {holds}"


def outputs_of(net: nn.Module, x: Tensor) -> Tensor:
    """(rows, features) on any device -> (rows, outputs) in float64 on the CPU."""
    with torch.no_grad():
        return torch.cat([net(rows).cpu().double() for rows in x.split(ROWS_AT_ONCE)])
