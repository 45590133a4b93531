"""Which rows the steps of an epoch take, and in which order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import checks


def batch_of(rows: int, order: Tensor | None, batch_size: int, step: int) -> Any:
    """The index of the rows of a step."""
    batches = max(1, -(-(rows if order is None else len(order)) // batch_size))
    begin = step % batches * batch_size
    part = slice(begin, begin + batch_size)
    return part if order is None else order[part]


def random_order(
    rows: int, networks: int | None, generator: torch.Generator | Sequence[torch.Generator] | None
) -> Tensor:
    """A random order of rows, (rows,), or with a sequence of generators (networks, rows)."""
    if generator is None or isinstance(generator, torch.Generator):
        return torch.randperm(rows, generator=generator)
    if networks is None or not isinstance(generator, Sequence):
        several = "" if networks is None else " or a sequence of them"
        raise TypeError(
            f"generator must be a torch.Generator{several}, got {type(generator).__name__}"
        )
    if len(generator) != networks:
        raise ValueError(f"generator must have {networks} generators, got {len(generator)}")
    return torch.stack([torch.randperm(rows, generator=each) for each in generator])


def checked_order(order: Tensor, rows: int, networks: int | None) -> Tensor:
    """An order that a caller gave, contiguous."""
    if not isinstance(order, Tensor):
        raise TypeError(f"order must be a Tensor, got {type(order).__name__}")
    if order.dim() != 1 and (networks is None or order.dim() != 2 or len(order) != networks):
        expected = "(n,)" if networks is None else f"(n,) or ({networks}, n)"
        raise ValueError(f"order must have shape {expected}, got {tuple(order.shape)}")
    if order.dtype is not torch.int64:
        raise IndexError(f"order must be int64, got {checks.name_of(order.dtype)}")
    if order.numel() and not (order.min() >= 0 and order.max() < rows):
        wrong = order[(order < 0) | (order >= rows)][0]
        raise IndexError(f"order must have numbers of rows in [0, {rows}), got {wrong.item()}")
    return order.contiguous()
