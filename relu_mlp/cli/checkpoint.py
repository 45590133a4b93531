"""What `relu-mlp train` saves and resumes from, and `relu-mlp predict` reads."""

from __future__ import annotations

import hashlib
import io
import itertools
import math
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._version import __version__
from ..modules import ReluMLP
from . import Problem
from .files import read_bytes, write
from .settings import DEFAULTS, OPTIMIZERS, is_setting, is_whole
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
        buffer = io.BytesIO()
        torch.save({"format": FORMAT, "relu_mlp": __version__, **vars(self)}, buffer)
        write(path, sealed(buffer.getvalue()))

    @classmethod
    def load(cls, path: Path) -> Checkpoint:
        """Reads what `save` wrote; a `Problem` for anything else."""
        expected = f"{path}: expected a checkpoint of relu-mlp train, got"
        data = read_bytes(path)
        try:
            check_seal(data)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                saved = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        except Damaged as damage:
            raise Problem(f"{expected} a damaged one: {damage}") from None
        except Exception:  # there is no end to what other bytes make torch.load raise
            saved = None
        if not isinstance(saved, dict):
            raise Problem(f"{expected} another kind of file")
        if saved and all(isinstance(value, Tensor) for value in saved.values()):
            raise Problem(f"{expected} a bare state_dict, without names of columns and scales")
        if saved.pop("format", None) != FORMAT:
            raise Problem(
                f"{expected} one of another format; relu-mlp {__version__} reads {FORMAT}"
            )
        saved.pop("relu_mlp", None)
        if saved.keys() != cls.__dataclass_fields__.keys() or not has_settings(saved["settings"]):
            raise Problem(f"{expected} one whose fields are others")
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


# -- What may be wrong with a file -----------------------------------------------

Shapes = list[tuple[int, ...]]


class Damaged(Exception):
    """The bytes are not those that were saved."""


SEAL = b"relu-mlp sha256 "
SEAL_SIZE = len(SEAL) + 64

#: The record that ends a zip file begins with this, and ends with the length of its comment.
END, END_SIZE, NO_COMMENT = b"PK\5\6", 22, b"\0\0"


def sealed(data: bytes) -> bytes:
    """A zip file, with the SHA-256 of its bytes as its comment, which `torch.load` ignores."""
    data = data[:-2] + SEAL_SIZE.to_bytes(2, "little")
    return data + SEAL + hashlib.sha256(data).hexdigest().encode()


def check_seal(data: bytes) -> None:
    """Raises `Damaged` if the bytes are not those that were saved.

    What a person or an earlier relu-mlp saved by `torch.save` has no seal. Its records
    have checksums, which `torch.load` does not look at.
    """
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        if not (data[-END_SIZE:].startswith(END) and data.endswith(NO_COMMENT)):
            body, seal = data[:-SEAL_SIZE], data[-SEAL_SIZE:]
            if seal != SEAL + hashlib.sha256(body).hexdigest().encode():
                raise Damaged("its checksum is another than that of its bytes")
            return
        records = archive.infolist()
        # torch.save compresses nothing: what does may be far larger than its file.
        if any(r.compress_type for r in records) or sum(r.file_size for r in records) > len(data):
            raise Damaged("its records are larger than the file")
        try:
            damaged = archive.testzip()
        except (zipfile.BadZipFile, zlib.error, EOFError, OSError):
            damaged = "a record"
        if damaged is not None:
            raise Damaged("its checksums are others than those of its bytes")


def has_settings(settings: Any) -> bool:
    """Whether they say what the network is."""
    return isinstance(settings, dict) and settings.keys() >= {"hidden", "dtype", "seed"}


def wrong_field(checkpoint: Checkpoint) -> str | None:
    """The first field with a value that `save` never writes; None if there is none."""
    for name, is_right in checks(checkpoint):
        if not is_right:
            return name
    return None


def checks(saved: Checkpoint) -> Iterator[tuple[str, bool]]:
    """Field by field, whether it is right if those before it are."""
    yield "features", is_names(saved.features)
    yield "targets", is_names(saved.targets)
    yield "classes", saved.classes is None or (len(saved.targets) == 1 and is_classes(saved))
    known = {name: value for name, value in saved.settings.items() if name in DEFAULTS}
    yield "settings", all(is_setting(name, value) for name, value in known.items())

    settings = {**DEFAULTS, **known}
    dtype = getattr(torch, settings["dtype"])
    widths = [len(saved.features), *settings["hidden"], saved.task.outputs]
    shapes: Shapes = [
        shape for n_in, n_out in itertools.pairwise(widths) for shape in ((n_out, n_in), (n_out,))
    ]
    names = [f"{2 * n}.{part}" for n in range(len(widths) - 1) for part in ("weight", "bias")]
    model = saved.model
    yield (
        "model",
        isinstance(model, dict)
        and model.keys() == set(names)
        and is_tensors([model[name] for name in names], shapes, dtype),
    )

    master_weights = saved.master_weights
    if settings["dtype"] in ("bfloat16", "float16"):
        yield "master_weights", is_tensors(master_weights, shapes, torch.float32)
    else:  # nobody reads them
        yield "master_weights", isinstance(master_weights, list)
    of_features = [saved.feature_mean, saved.feature_scale]
    yield "feature_mean", is_tensor(of_features[0], (len(saved.features),), torch.float64)
    yield "feature_scale", is_scale(of_features[1], len(saved.features))
    if saved.classes is None:
        shape = (len(saved.targets),)
        yield "target_mean", is_tensor(saved.target_mean, shape, torch.float64)
        yield "target_scale", is_scale(saved.target_scale, len(saved.targets))
    else:
        yield "target_mean", saved.target_mean is None
        yield "target_scale", saved.target_scale is None

    yield "rows", is_whole(saved.rows, 2, 2**63)
    yield "table", isinstance(saved.table, str)
    yield "epoch", is_whole(saved.epoch, 1, 2**63)
    yield "history", is_history(saved)
    yield "optimizer", is_optimizer(saved.optimizer, shapes, OPTIMIZERS[settings["optimizer"]][2])
    yield "generator", is_state_of_generator(saved.generator)


def is_names(value: Any) -> bool:
    return is_list(value, str) and 0 < len(value) == len(set(value))


def is_list(value: Any, *kinds: type) -> bool:
    return isinstance(value, list) and all(type(entry) in kinds for entry in value)


def is_classes(saved: Checkpoint) -> bool:
    classes = saved.classes
    return any(is_list(classes, kind) for kind in (str, bool, int, float)) and (
        0 < len(classes or ()) == len(set(classes or ()))
    )


def is_tensor(value: Any, shape: tuple[int, ...], dtype: torch.dtype) -> bool:
    """Whether it is a dense tensor on the CPU, of finite numbers.

    A few bytes may be expanded to a tensor of any size: those are not contiguous.
    """
    return (
        isinstance(value, Tensor)
        and not value.is_nested
        and value.layout is torch.strided
        and value.device.type == "cpu"
        and (value.dtype, value.shape) == (dtype, shape)
        and value.is_contiguous()
        and bool(value.isfinite().all())
    )


def is_tensors(value: Any, shapes: Shapes, dtype: torch.dtype) -> bool:
    return (
        isinstance(value, list)
        and len(value) == len(shapes)
        and all(map(is_tensor, value, shapes, itertools.repeat(dtype)))
    )


def is_scale(value: Any, columns: int) -> bool:
    return is_tensor(value, (columns,), torch.float64) and bool((value > 0).all())


def is_history(saved: Checkpoint) -> bool:
    """Whether there is a line for each epoch, each with all scores."""
    history = saved.history
    if not is_list(history, dict) or len(history) != saved.epoch:
        return False
    score = "r2" if saved.classes is None else "accuracy"
    needed = [f"{part}_{name}" for part in ("train", "validation") for name in ("loss", score)]
    return all(
        list(line) == list(history[0])
        and {"epoch", *needed} <= line.keys()
        and all(isinstance(name, str) for name in line)
        and all(type(value) in (int, float) for value in line.values())
        and line["epoch"] == n + 1
        and all(math.isfinite(line[name]) for name in ("train_loss", "validation_loss"))
        for n, line in enumerate(history)
    )


def is_optimizer(value: Any, shapes: Shapes, kept: tuple[str, ...]) -> bool:
    """Whether its state has what is kept, and a count of steps, for each parameter.

    The settings in it do not matter: a training takes them from its own.
    """
    if not isinstance(value, dict) or not isinstance(value.get("state"), dict):
        return False
    state = value["state"]
    return list(state) == list(range(len(shapes))) and all(
        isinstance(entry, dict)
        and set(kept) <= entry.keys() <= {*kept, "step"}
        and all(is_state(entry[name], shape) for name in kept)
        and (len(kept) == 1 or is_state(entry.get("step"), ()))
        for entry, shape in zip(state.values(), shapes, strict=True)
    )


def is_state(value: Any, shape: tuple[int, ...]) -> bool:
    return (
        isinstance(value, Tensor)
        and value.is_floating_point()
        and is_tensor(value, shape, value.dtype)
    )


def is_state_of_generator(value: Any) -> bool:
    try:
        torch.Generator().set_state(value)
    except (TypeError, RuntimeError):
        return False
    return True
