"""Compares the raw operators with the reference, pass by pass."""

import itertools

import torch

from relu_mlp import ops, reference

from . import networks
from .comparison import assert_same
from .networks import integers


def integer_network(sizes, dtype, rows, bias="all"):
    """x, weights, biases (without elements where missing) and grad_output, all small."""
    torch.manual_seed(sum(sizes) + rows)
    weights, biases = networks.integer_network(
        sizes, bias, dtype=dtype, requires_grad=False, largest=1
    )
    biases = [ops.NO_TENSOR.to(dtype) if b is None else b for b in biases or []]
    x = integers(rows, sizes[0], dtype=dtype, largest=1)
    return x, weights, biases, integers(rows, sizes[-1], dtype=dtype, largest=1)


def to(device, network):
    """The network's tensors on a device."""
    x, weights, biases, grad_output = network
    weights, biases = ([t.to(device) for t in tensors] for tensors in (weights, biases))
    return x.to(device), weights, biases, grad_output.to(device)


def kept_of(x, y, weights, hidden, activation, needs):
    kept = reference.is_kept(activation, needs)
    return list(itertools.compress([x, y, *weights, *hidden], kept))


def needs_for(weights, biases):
    """Patterns of `needs`, for present biases only: everything, all but x, and each need alone."""
    present = "".join("01"[b.numel() > 0] for b in biases) or "0" * len(weights)
    everything = "1" * (1 + len(weights)) + present
    single = ["0" * n + c + "0" * (len(everything) - n - 1) for n, c in enumerate(everything)]
    return [everything, "0" + everything[1:], *[s for s in single if "1" in s]]


def compare(operators, network, activation, losses=tuple(reference.LOSSES)):
    """Compares all passes with the reference, bit by bit. Sums of small integers are exact."""
    x, weights, biases, grad_output = network
    layers = x, weights, biases
    y, hidden = reference.forward(*layers, activation, True)
    found, found_hidden = operators.forward(*layers, activation, True)
    same = assert_same
    same(dict(enumerate([found, *found_hidden])), dict(enumerate([y, *hidden])), "forward")
    found, found_hidden = operators.forward(*layers, activation, False)
    same(found, y, "forward without hidden")
    assert found_hidden == []
    same(operators.relu_mlp(*layers, activation), y, "relu_mlp")
    for needs in needs_for(weights, biases):
        saved = kept_of(x, y, weights, hidden, activation, needs)
        expected = reference.backward(grad_output, saved, activation, needs)
        for name, found in {
            "backward": operators.backward(grad_output, saved, activation, needs),
            "recompute": operators.recompute_backward(grad_output, *layers, activation, needs),
        }.items():
            assert len(found) == len(expected)
            for n, pair in enumerate(zip(found, expected)):
                same(*pair, f"{name}, needs {needs}, {n}")
    for loss in losses:
        arguments = x, y + grad_output, weights, biases, loss, activation
        expected = reference.loss_and_grads(*arguments)
        found = operators.loss_and_grads(*arguments)
        if loss in ("bce_with_logits", "cross_entropy"):
            continue  # not exact for integers
        if loss in ("mse", "l1", "huber"):  # the division by n is a rounding or two
            rtol = 2 * torch.finfo(x.dtype).eps
            torch.testing.assert_close(found[0], expected[0], rtol=rtol, atol=0, equal_nan=True)
        else:
            pairs = zip([found[0], *found[1]], [expected[0], *expected[1]], strict=True)
            for n, pair in enumerate(pairs):
                same(*pair, f"{loss}, {n}")
