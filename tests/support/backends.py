"""Runs a test under each backend: on the extension with the native autograd node and without it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

import relu_mlp
from relu_mlp import ops

#: The names that `relu_mlp.backend` takes, without those of what was not built.
BACKENDS = ["reference"] if ops.LIBRARY_PATH is None else ["extension", "reference"]

#: The same, with "node" for the extension where the native autograd node records the graphs. In
#: "extension" Python records them.
WITH_NODE = BACKENDS if ops.node is None else ["node", *BACKENDS]


@contextmanager
def node_enabled(flag: bool) -> Iterator[None]:
    """Whether the native node, where it was built, serves the calls of all threads."""
    before = ops.node is not None and ops.node.enable(flag)
    try:
        yield
    finally:
        if ops.node is not None:
            ops.node.enable(before)


@contextmanager
def backend(name: str) -> Iterator[str]:
    """Uses a backend by its name in WITH_NODE, and gives its name in BACKENDS."""
    chosen = "extension" if name == "node" else name
    with node_enabled(name != "extension"), relu_mlp.backend(chosen):
        yield chosen


def backend_fixture(names: list[str]) -> Any:
    """A fixture that runs a test under each backend, and is its name in BACKENDS.

    conftest.py has one for all files. Files about what no graph is recorded for have one of their
    own, without the node.
    """

    @pytest.fixture(params=names)
    def fixture(request):
        with backend(request.param) as chosen:
            yield chosen

    return fixture
