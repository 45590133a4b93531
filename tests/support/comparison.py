"""Comparisons with the native path that need no tolerance.

Sums of products of small integers are exact in every order, so both paths must give the same bits.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from relu_mlp import functional


def assert_same(actual, expected, name="value"):
    """The same structure with the same bits; NaN equals NaN, and 0 equals -0."""
    if isinstance(expected, dict):
        assert isinstance(actual, dict) and actual.keys() == expected.keys(), name
        for key in expected:
            assert_same(actual[key], expected[key], f"{name}, {key}")
    elif isinstance(expected, Tensor):
        assert isinstance(actual, Tensor), f"{name}: {actual!r} instead of a tensor"
        torch.testing.assert_close(
            actual, expected, rtol=0, atol=0, equal_nan=True, msg=lambda m: f"{name}: {m}"
        )
    else:
        assert actual is expected, f"{name}: {actual!r} should be {expected!r}"


def outcome(function, *args, match=""):
    """The result of a function, or RuntimeError if it raises one whose message has `match`."""
    try:
        return function(*args)
    except RuntimeError as error:
        if match not in str(error):
            raise
        return RuntimeError


def patterns(count):
    """All tuples of `count` bools."""
    return itertools.product([False, True], repeat=count)


def implementation_of(backend):
    """The object whose `forward` and `backward` serve a backend."""
    assert backend in ("extension", "reference")
    return functional.implementation_for(torch.empty(0))
