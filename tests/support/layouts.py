"""The same values in other memory layouts."""

from __future__ import annotations

import torch


def rows_apart(tensor):
    """With other numbers between the elements of a row."""
    return torch.stack([tensor, torch.full_like(tensor, 7)], -1)[..., 0]


def transposed(tensor):
    """Column by column; a vector with other numbers between its elements."""
    return tensor.mT.contiguous().mT if tensor.dim() > 1 else rows_apart(tensor)


def negated(tensor):
    """Stored with the other sign, and the negative bit set."""
    return torch._neg_view(-tensor)


LAYOUTS = [rows_apart, transposed, negated]
