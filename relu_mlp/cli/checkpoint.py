"""What `relu-mlp train` saves and resumes from, and `relu-mlp predict` reads."""

from __future__ import annotations

import hashlib
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._version import __version__
from ..modules import ReluMLP
from . import Problem
from .files import read_bytes, replacing
from .task import Standardization, Task

#: Raised when a field changes its meaning.
FORMAT = 1


@dataclass(frozen=True)
class Checkpoint:
    """A dict of these fields is the file, which `torch.load(weights_only=True)` reads.

    All tensors are on the CPU and belong to the checkpoint alone.
    """

    model: dict[str, Tensor]  #: the state_dict
    features: list[str]
    targets: list[str]
    classes: list[Any] | None
    feature_mean: Tensor
    feature_scale: Tensor
    target_mean: Tensor | None  #: None for a classification, as is target_scale
    target_scale: Tensor | None
    settings: dict[str, Any]  #: of `relu-mlp train`, by the names of its flags
    rows: int  #: of the table
    table: str  #: `fingerprint` of the table
    epoch: int  #: how many are done
    history: list[dict[str, float]]  #: the lines of curves.csv
    optimizer: dict[str, Any]  #: its state_dict
    master_weights: list[Tensor]  #: float32 parameters, of a network in 16 bits
    generator: Tensor  #: state of the generator that orders the rows

    @property
    def task(self) -> Task:
        return Task(self.features, self.targets, self.classes)

    @property
    def feature_standardization(self) -> Standardization:
        return Standardization(self.feature_mean, self.feature_scale)

    @property
    def target_standardization(self) -> Standardization | None:
        if self.target_mean is None or self.target_scale is None:
            return None
        return Standardization(self.target_mean, self.target_scale)

    def save(self, path: Path) -> None:
        with replacing(path) as temporary:
            torch.save({"format": FORMAT, "relu_mlp": __version__, **vars(self)}, temporary)

    @classmethod
    def load(cls, path: Path) -> Checkpoint:
        """Reads what `save` wrote; a `Problem` for anything else."""
        data = read_bytes(path)
        try:
            saved = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        except Exception:  # there is no end to what other bytes make torch.load raise
            saved = None
        expected = f"{path}: expected a checkpoint of relu-mlp train, got"
        if not isinstance(saved, dict):
            raise Problem(f"{expected} another kind of file")
        if saved and all(isinstance(value, Tensor) for value in saved.values()):
            raise Problem(f"{expected} a bare state_dict, without names of columns and scales")
        if saved.pop("format", None) != FORMAT:
            raise Problem(
                f"{expected} one of another format; relu-mlp {__version__} reads {FORMAT}"
            )
        saved.pop("relu_mlp", None)
        try:
            checkpoint = cls(**saved)
            checkpoint.network()
        except (TypeError, KeyError):
            raise Problem(f"{expected} one whose fields are others") from None
        except RuntimeError:
            raise Problem(
                f"{path}: expected parameters of the network that it describes, got another's"
            ) from None
        return checkpoint

    def network(self) -> ReluMLP:
        net = make_network(self.task, self.settings)
        net.load_state_dict(self.model)
        return net


def make_network(task: Task, settings: dict[str, Any]) -> ReluMLP:
    """A network with the initial values that follow from the seed."""
    torch.manual_seed(settings["seed"])
    dtype = getattr(torch, settings["dtype"])
    return ReluMLP(len(task.features), settings["hidden"], task.outputs, dtype=dtype)


def fingerprint(features: Tensor, targets: Tensor) -> str:
    """Tells one table from another by what is learnt from it."""
    digest = hashlib.sha256()
    for tensor in (features, targets):
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()
