"""The settings of `relu-mlp train`, by the names of its flags: defaults and allowed values."""

from __future__ import annotations

from typing import Any

import torch

DTYPES = ("float32", "float64", "bfloat16", "float16")

#: The class of each optimizer, its defaults, and its state for each parameter.
OPTIMIZERS: dict[str, tuple[Any, dict[str, float], tuple[str, ...]]] = {
    "adam": (torch.optim.Adam, {"lr": 1e-3, "weight_decay": 0}, ("exp_avg", "exp_avg_sq")),
    "adamw": (torch.optim.AdamW, {"lr": 1e-3, "weight_decay": 1e-2}, ("exp_avg", "exp_avg_sq")),
    "sgd": (
        torch.optim.SGD,
        {"lr": 1e-2, "weight_decay": 0, "momentum": 0.9},
        ("momentum_buffer",),
    ),
}

#: None stands for the default of the optimizer.
DEFAULTS: dict[str, Any] = {
    "hidden": [64, 64],
    "dtype": "float32",
    "optimizer": "adam",
    "seed": 0,
    "validation": 0.2,
    "epochs": 100,
    "patience": 20,
    "last": False,
    "batch_size": 32,
    "lr": None,
    "weight_decay": None,
}

#: Settings that a resumed training can't change: its parameters and its rows depend on them.
FIXED = ("hidden", "dtype", "optimizer", "seed", "validation")

#: The smallest and largest values of the numbers.
WHOLE = {
    "seed": (0, 2**63 - 1),
    "epochs": (1, 2**31 - 1),
    "patience": (0, 2**31 - 1),
    "batch_size": (1, 2**31 - 1),
}
REAL = {"validation": (0.001, 0.999), "lr": (1e-30, 1e6), "weight_decay": (0.0, 1e6)}


def is_setting(name: str, value: Any) -> bool:
    """Whether a setting may have a value, which may be any object that a file holds."""
    if name == "hidden":
        return isinstance(value, list) and all(is_whole(width, 1, 2**31 - 1) for width in value)
    if name == "dtype":
        return value in DTYPES
    if name == "optimizer":
        return value in tuple(OPTIMIZERS)
    if name == "last":
        return isinstance(value, bool)
    if name in WHOLE:
        return is_whole(value, *WHOLE[name])
    least, most = REAL[name]
    return (value is None and DEFAULTS[name] is None) or (
        type(value) in (int, float) and least <= value <= most
    )


def is_whole(value: Any, least: int, most: int) -> bool:
    return type(value) is int and least <= value <= most
