"""The checkpoint that `relu-mlp train` writes and resumes, and that `relu-mlp predict` reads."""

from __future__ import annotations

import hashlib
import io
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._version import __version__
from ..modules import ReluMLP
from . import Problem
from .checkpoint_fields import CheckpointFields, has_settings, wrong_field
from .encoding import Encoding
from .files import read_bytes, write
from .seal import Damaged, check_seal, sealed
from .task import Standardization, Task

#: The version of the format. It increases when a field changes its meaning.
FORMAT = 2


class Checkpoint(CheckpointFields):
    """The state of a training after an epoch."""

    @property
    def feature_standardization(self) -> Standardization:
        return Standardization(self.feature_mean, self.feature_scale)

    @property
    def target_standardization(self) -> Standardization | None:
        if self.target_mean is None or self.target_scale is None:
            return None
        return Standardization(self.target_mean, self.target_scale)

    def save(self, path: Path) -> None:
        buffer = io.BytesIO()
        torch.save({"format": FORMAT, "relu_mlp": __version__, **vars(self)}, buffer)
        write(path, sealed(buffer.getvalue()))

    @classmethod
    def load(cls, path: Path) -> Checkpoint:
        """Reads what `save` wrote. Raises a `Problem` for any other file."""
        expected = f"{path}: expected a checkpoint of relu-mlp train, got"
        data = read_bytes(path)
        try:
            check_seal(data)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                saved = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        except Damaged as damage:
            raise Problem(f"{expected} a damaged one: {damage}") from None
        except Exception:  # torch.load raises many errors for other bytes
            saved = None
        if not isinstance(saved, dict):
            raise Problem(f"{expected} another kind of file")
        if saved and all(isinstance(value, Tensor) for value in saved.values()):
            raise Problem(f"{expected} a bare state_dict, without names of columns and scales")
        version = saved.pop("format", None)
        if version not in (1, FORMAT):
            raise Problem(
                f"{expected} one of another format; relu-mlp {__version__} reads 1 and {FORMAT}"
            )
        saved.pop("relu_mlp", None)
        if version == 1:
            saved = from_format_1(saved)
        if saved.keys() != cls.__dataclass_fields__.keys() or not has_settings(saved["settings"]):
            raise Problem(f"{expected} one with other fields")
        checkpoint = cls(**saved)
        wrong = wrong_field(checkpoint)
        if wrong == "model":
            raise Problem(
                f"{path}: expected parameters of the network that it describes, got another's"
            )
        if wrong is not None:
            raise Problem(f"{expected} one whose {wrong!r} can't be used")
        return checkpoint

    def network(self) -> ReluMLP:
        net = make_network(self.encoding, self.task, self.settings)
        net.load_state_dict(self.model)
        return net


def from_format_1(saved: dict[str, Any]) -> dict[str, Any]:
    """The same with the fields of today. Features were numbers, and the last epoch was kept."""
    settings = saved.get("settings")
    if isinstance(settings, dict):
        settings = {**settings, "last": True, "patience": 0}
    model, epoch = saved.get("model"), saved.get("epoch")
    return {
        **saved,
        "settings": settings,
        "categories": {},
        "indicators": [],
        "last_model": model,
        "best_epoch": epoch,
    }


def make_network(encoding: Encoding, task: Task, settings: dict[str, Any]) -> ReluMLP:
    """A network whose initial values follow from the seed."""
    torch.manual_seed(settings["seed"])
    dtype = getattr(torch, settings["dtype"])
    return ReluMLP(encoding.inputs, settings["hidden"], task.outputs, dtype=dtype)


def fingerprint(features: Tensor, targets: Tensor) -> str:
    """A hash of the columns that the network learns from."""
    digest = hashlib.sha256()
    for tensor in (features, targets):
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()
