"""The fields of a checkpoint, and checks of the values that a file has for them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .encoding import Encoding
from .settings import DEFAULTS, OPTIMIZERS, is_setting, is_whole
from .task import Task


@dataclass(frozen=True)
class CheckpointFields:
    """The file is a dict of these fields, which `torch.load(weights_only=True)` reads.

    All tensors are on the CPU, and none is changed later.
    """

    model: dict[str, Tensor]  #: the state_dict of `best_epoch`; with --last that of `epoch`
    features: list[str]
    categories: dict[str, list[str]]  #: those of `Encoding`; `indicators` too
    indicators: list[str]
    targets: list[str]
    classes: list[Any] | None
    feature_mean: Tensor
    feature_scale: Tensor
    target_mean: Tensor | None  #: None for a classification; target_scale too
    target_scale: Tensor | None
    settings: dict[str, Any]  #: those of `relu-mlp train`, by the names of its flags
    rows: int  #: the number of rows of the table
    table: str  #: `fingerprint` of the table
    epoch: int  #: the number of epochs that are done
    best_epoch: int  #: the first one with the lowest validation loss
    last_model: dict[str, Tensor]  #: the state_dict of `epoch`
    history: list[dict[str, float]]  #: the lines of curves.csv
    optimizer: dict[str, Any]  #: its state_dict
    master_weights: list[Tensor]  #: the float32 parameters of a 16-bit network
    generator: Tensor  #: the state of the generator that orders the rows

    @property
    def task(self) -> Task:
        return Task(self.features, self.targets, self.classes)

    @property
    def encoding(self) -> Encoding:
        return Encoding(self.features, self.categories, self.indicators)

    @property
    def texts(self) -> set[str]:
        """The columns that are text, whatever their cells look like in another table."""
        text_classes = self.classes is not None and isinstance(self.classes[0], str)
        return {*self.categories, *(self.targets if text_classes else ())}


# -- Whether the fields have values that `relu-mlp train` can have written --------------------

Shapes = list[tuple[int, ...]]


def has_settings(settings: Any) -> bool:
    """Whether the settings describe a network."""
    return isinstance(settings, dict) and settings.keys() >= {"hidden", "dtype", "seed"}


def wrong_field(checkpoint: CheckpointFields) -> str | None:
    """The first field with a value that `Checkpoint.save` never writes, or None."""
    for name, is_right in checks(checkpoint):
        if not is_right:
            return name
    return None


def checks(saved: CheckpointFields) -> Iterator[tuple[str, bool]]:
    """The fields in turn, and whether each is right, given that those before it are."""
    yield "features", is_names(saved.features)
    yield "categories", is_categories(saved)
    yield "indicators", is_some_of(saved.indicators, saved.features)
    yield "targets", is_names(saved.targets)
    yield "classes", saved.classes is None or (len(saved.targets) == 1 and is_classes(saved))
    known = {name: value for name, value in saved.settings.items() if name in DEFAULTS}
    yield "settings", all(is_setting(name, value) for name, value in known.items())

    settings = {**DEFAULTS, **known}
    dtype = getattr(torch, settings["dtype"])
    inputs = saved.encoding.inputs
    widths = [inputs, *settings["hidden"], saved.task.outputs]
    shapes: Shapes = [
        shape for n_in, n_out in itertools.pairwise(widths) for shape in ((n_out, n_in), (n_out,))
    ]
    yield "model", is_model(saved.model, shapes, dtype)
    yield "last_model", is_model(saved.last_model, shapes, dtype)

    master_weights = saved.master_weights
    if settings["dtype"] in ("bfloat16", "float16"):
        yield "master_weights", is_tensors(master_weights, shapes, torch.float32)
    else:  # they are not used
        yield "master_weights", isinstance(master_weights, list)
    of_features = [saved.feature_mean, saved.feature_scale]
    yield "feature_mean", is_tensor(of_features[0], (inputs,), torch.float64)
    yield "feature_scale", is_scale(of_features[1], inputs)
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
    yield "best_epoch", is_whole(saved.best_epoch, 1, saved.epoch)
    yield "history", is_history(saved)
    yield "optimizer", is_optimizer(saved.optimizer, shapes, OPTIMIZERS[settings["optimizer"]][2])
    yield "generator", is_state_of_generator(saved.generator)


def is_names(value: Any) -> bool:
    return is_list(value, str) and 0 < len(value) == len(set(value))


def is_some_of(value: Any, names: list[str]) -> bool:
    return is_list(value, str) and len(value) == len(set(value)) and set(value) <= set(names)


def is_categories(saved: CheckpointFields) -> bool:
    categories = saved.categories
    return (
        isinstance(categories, dict)
        and is_some_of(list(categories), saved.features)
        and all(is_list(of, str) and len(of) == len(set(of)) for of in categories.values())
    )


def is_list(value: Any, *kinds: type) -> bool:
    return isinstance(value, list) and all(type(entry) in kinds for entry in value)


def is_classes(saved: CheckpointFields) -> bool:
    classes = saved.classes
    return any(is_list(classes, kind) for kind in (str, bool, int, float)) and (
        0 < len(classes or ()) == len(set(classes or ()))
    )


def is_tensor(value: Any, shape: tuple[int, ...], dtype: torch.dtype) -> bool:
    """Whether a value is a dense tensor of finite numbers on the CPU.

    It must be contiguous: a few bytes could be expanded to a tensor of any size.
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


def is_model(value: Any, shapes: Shapes, dtype: torch.dtype) -> bool:
    """Whether a value is a state_dict of linear layers, with weights and biases of these shapes."""
    names = [f"{n - n % 2}.{('weight', 'bias')[n % 2]}" for n in range(len(shapes))]
    return (
        isinstance(value, dict)
        and value.keys() == set(names)
        and is_tensors([value[name] for name in names], shapes, dtype)
    )


def is_scale(value: Any, columns: int) -> bool:
    return is_tensor(value, (columns,), torch.float64) and bool((value > 0).all())


def is_history(saved: CheckpointFields) -> bool:
    """Whether the history has an entry for each epoch, with all scores."""
    history = saved.history
    if not is_list(history, dict) or len(history) != saved.epoch:
        return False
    score = "r2" if saved.classes is None else "accuracy"
    needed = [f"{part}_{name}" for part in ("train", "validation") for name in ("loss", score)]
    return all(
        {"epoch", *needed} <= line.keys()
        and all(isinstance(name, str) for name in line)
        and all(type(value) in (int, float) for value in line.values())
        and line["epoch"] == n + 1
        and all(math.isfinite(line[name]) for name in ("train_loss", "validation_loss"))
        for n, line in enumerate(history)
    )


def is_optimizer(value: Any, shapes: Shapes, kept: tuple[str, ...]) -> bool:
    """Whether the optimizer's state has what it keeps, and a count of steps, for each parameter.

    Its settings are ignored: a training uses its own.
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
