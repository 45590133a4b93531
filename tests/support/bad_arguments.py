"""Calls with wrong arguments, and the words that the message must contain."""

import re
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from torch import nn

from .backends import WITH_NODE, backend
from .networks import native_mlp

W0, W1 = torch.ones(4, 3), torch.ones(2, 4)

B0, B1 = torch.ones(4), torch.ones(2)

X, T = torch.ones(5, 3), torch.ones(5, 2)


@dataclass
class Bad:
    """A call with a wrong argument, the words of its message and the class of its error.

    `error` is None if the native path raises too. Then the class is the native one.
    """

    words: list[str]
    x: object = field(default_factory=lambda: X)
    weights: object = field(default_factory=lambda: [W0, W1])
    biases: object = field(default_factory=lambda: [B0, B1])
    error: type[Exception] | None = None

    def expected_error(self) -> type[Exception]:
        if self.error is not None:
            return self.error
        with pytest.raises(Exception) as caught:
            native_mlp(self.x, self.weights, self.biases)
        return caught.type


NETWORKS = {
    # shapes
    "x of rank 0": Bad(["x", "at least one dimension", "()"], x=torch.tensor(1.0)),
    "x too wide": Bad(["weights[0]", "(out_features, 4)", "x", "(4, 3)"], x=torch.ones(5, 4)),
    "x too wide, rank 3": Bad(["weights[0]", "(out_features, 4)"], x=torch.ones(2, 5, 4)),
    "x too wide, rank 1": Bad(["weights[0]", "(out_features, 4)"], x=torch.ones(4)),
    "x too wide, no rows": Bad(["weights[0]", "(out_features, 4)"], x=torch.ones(0, 4)),
    "no chain": Bad(
        ["weights[1]", "(out_features, 4)", "weights[0]", "(2, 5)"],
        weights=[W0, torch.ones(2, 5)],
    ),
    "weight of rank 0": Bad(["weights[0]", "()"], weights=[torch.tensor(1.0), W1]),
    "weight of rank 1": Bad(["weights[0]", "(3,)"], weights=[torch.ones(3), W1]),
    "last weight of rank 1": Bad(
        ["weights[1]", "(4,)"], weights=[W0, torch.ones(4)], biases=None, error=RuntimeError
    ),
    "weight of rank 3": Bad(["weights[1]", "(1, 2, 4)"], weights=[W0, torch.ones(1, 2, 4)]),
    "bias too long": Bad(["biases[0]", "(4,)", "(5,)"], biases=[torch.ones(5), B1]),
    "bias without elements": Bad(["biases[0]", "(4,)", "(0,)"], biases=[torch.ones(0), B1]),
    # PyTorch broadcasts these, but relu_mlp accepts only (out_features,)
    "bias of one element": Bad(
        ["biases[0]", "(4,)", "(1,)"], biases=[torch.ones(1), B1], error=RuntimeError
    ),
    "bias of rank 0": Bad(
        ["biases[1]", "(2,)", "()"], biases=[B0, torch.tensor(1.0)], error=RuntimeError
    ),
    "bias of rank 2": Bad(
        ["biases[0]", "(4,)", "(1, 4)"], biases=[torch.ones(1, 4), B1], error=RuntimeError
    ),
    # dtypes
    "x float64": Bad(["weights[0]", "float64", "x", "float32"], x=X.double()),
    "x integer": Bad(["x", "int64"], x=X.long()),
    "x bool": Bad(["x", "bool"], x=X.bool()),
    "x complex": Bad(["x", "complex64"], x=X.cfloat()),
    "x float8": Bad(["x", "float8_e4m3fn"], x=X.to(torch.float8_e4m3fn)),
    "weight float64": Bad(["weights[1]", "float32", "x", "float64"], weights=[W0, W1.double()]),
    "weight integer": Bad(["weights[0]", "float32", "int64"], weights=[W0.long(), W1]),
    "bias float16": Bad(["biases[1]", "float32", "x", "float16"], biases=[B0, B1.half()]),
    # devices; natively, a meta tensor is accepted beside tensors of another device
    "weight elsewhere": Bad(
        ["weights[1]", "cpu", "x", "meta"], weights=[W0, W1.to("meta")], error=RuntimeError
    ),
    "bias elsewhere": Bad(["biases[0]", "cpu", "x", "meta"], biases=[B0.to("meta"), B1]),
    # not tensors
    "x a list": Bad(["x", "Tensor", "list"], x=[[1.0, 2.0, 3.0]]),
    "x None": Bad(["x", "Tensor", "NoneType"], x=None),
    "x an array": Bad(["x", "Tensor", "ndarray"], x=np.ones((5, 3), np.float32)),
    "weight a list": Bad(["weights[1]", "Tensor", "list"], weights=[W0, [1.0]]),
    "weight None": Bad(["weights[0]", "Tensor", "NoneType"], weights=[None, W1]),
    "weight an array": Bad(["weights[0]", "Tensor", "ndarray"], weights=[W0.numpy(), W1]),
    "bias a list": Bad(["biases[0]", "Tensor", "list"], biases=[[1.0], B1]),
    "bias an array": Bad(["biases[1]", "Tensor", "ndarray"], biases=[B0, B1.numpy()]),
    "bias a number": Bad(["biases[1]", "Tensor", "float"], biases=[B0, 1.0]),
    # sequences, for which PyTorch has no counterpart
    "weights a Tensor": Bad(["weights", "sequence", "Tensor"], weights=W0, error=TypeError),
    "weights a number": Bad(["weights", "sequence", "int"], weights=3, error=TypeError),
    "weights None": Bad(["weights", "sequence", "NoneType"], weights=None, error=TypeError),
    "biases a Tensor": Bad(["biases", "sequence", "Tensor"], biases=B0, error=TypeError),
    "biases a number": Bad(["biases", "sequence", "int"], biases=7, error=TypeError),
    "no weights": Bad(["weights", "at least one", "none"], weights=[], error=ValueError),
    "no weights, no biases": Bad(
        ["weights", "at least one", "none"], weights=[], biases=None, error=ValueError
    ),
    "too few biases": Bad(["biases", "2 weights", "got 1"], biases=[B0], error=ValueError),
    "too many biases": Bad(
        ["biases", "2 weights", "got 3"], biases=[B0, B1, None], error=ValueError
    ),
    "an empty list of biases": Bad(["biases", "2 weights", "got 0"], biases=[], error=ValueError),
}

TARGETS = {
    "target too wide": (torch.ones(5, 3), RuntimeError, ["target", "(5, 2)", "(5, 3)"]),
    "target too short": (torch.ones(4, 2), RuntimeError, ["target", "(5, 2)", "(4, 2)"]),
    "target to broadcast": (torch.ones(5, 1), RuntimeError, ["target", "(5, 2)", "(5, 1)"]),
    "target of rank 0": (torch.tensor(1.0), RuntimeError, ["target", "(5, 2)", "()"]),
    "target of rank 3": (torch.ones(1, 5, 2), RuntimeError, ["target", "(5, 2)", "(1, 5, 2)"]),
    "class indices": (torch.ones(5).long(), RuntimeError, ["target", "(5, 2)", "(5,)"]),
    "target float64": (T.double(), RuntimeError, ["target", "float32", "x", "float64"]),
    "target complex": (T.cfloat(), RuntimeError, ["target", "float32", "x", "complex64"]),
    "target elsewhere": (T.to("meta"), RuntimeError, ["target", "cpu", "x", "meta"]),
    "target a list": ([1.0], TypeError, ["target", "Tensor", "list"]),
    "target None": (None, TypeError, ["target", "Tensor", "NoneType"]),
    "target an array": (T.numpy(), TypeError, ["target", "Tensor", "ndarray"]),
}

NO_ACTIVATIONS = ["gelu", "ReLU", "none", "", 3, True, nn.ReLU, b"relu", [], {}]

#: Targets of cross entropy for x (5, 3) and 2 classes.
CLASSES = {
    "class too large": (
        torch.tensor([0, 1, 7, 0, 1]),
        IndexError,
        ["target", "out of bounds", "2", "-100", "7", "row 2"],
    ),
    "class below 0": (torch.tensor([0, 1, -1, 0, 1]), IndexError, ["target", "2", "-1"]),
    "classes too few": (torch.ones(4).long(), RuntimeError, ["target", "(5,)", "(4,)"]),
    "classes of rank 2": (torch.ones(5, 2).long(), RuntimeError, ["target", "(5,)", "(5, 2)"]),
    "classes int32": (torch.ones(5).int(), RuntimeError, ["target", "int64", "float32", "int32"]),
    "classes bool": (torch.ones(5).bool(), RuntimeError, ["target", "int64", "float32", "bool"]),
    "classes float32": (torch.ones(5), RuntimeError, ["target", "(5, 2)", "(5,)"]),
    "classes elsewhere": (
        torch.ones(5, device="meta").long(),
        RuntimeError,
        ["target", "cpu", "x", "meta"],
    ),
    "probabilities too wide": (torch.ones(5, 3), RuntimeError, ["target", "(5, 2)", "(5, 3)"]),
    "probabilities float64": (
        T.double(),
        RuntimeError,
        ["target", "int64", "float32", "x", "float64"],
    ),
    "probabilities elsewhere": (T.to("meta"), RuntimeError, ["target", "cpu", "x", "meta"]),
    "classes a list": ([1, 0], TypeError, ["target", "Tensor", "list"]),
}

NO_LOSSES = ["l2", "SSE", "", None, 3, True, b"mse", [], {}, nn.MSELoss()]


def raised(function, error, words):
    """Checks that a call raises exactly `error`, with all the words, and returns the message."""
    with pytest.raises(error) as caught:
        function()
    assert caught.type is error
    message = str(caught.value)
    missing = [w for w in words if not re.search(rf"(?<!\w){re.escape(w)}(?!\w)", message)]
    assert missing == [], message
    return message


def under_every_backend(function, error, words):
    """Checks that every backend raises with the same message."""
    messages = set()
    for name in WITH_NODE:
        with backend(name):
            messages.add(raised(function, error, words))
    assert len(messages) == 1


def snapshot(tensors):
    return [(t, t.detach().clone(), t._version, t.grad, t.grad.clone()) for t in tensors]


def assert_unchanged(before):
    for tensor, value, version, grad, grad_value in before:
        assert torch.equal(tensor, value)
        assert tensor._version == version
        assert tensor.grad is grad
        assert torch.equal(grad, grad_value)
