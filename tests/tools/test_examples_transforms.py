"""The examples of derivatives of derivatives and of samples: the operators serve them, and a wrong
derivative ends them with a message.

test_examples.py runs them in full and checks their figures.
"""

import importlib
import re
import sys
from pathlib import Path

import pytest
import torch

import relu_mlp
import support
from relu_mlp import LossAndGrads, Parameters, second_order

EXAMPLES = Path(__file__).parents[2] / "examples"
SMALL = {
    "physics_informed": {"STEPS": 20, "ENOUGH": 1.0},
    "gradient_penalty": {"STEPS": 3, "ENOUGH": 100.0},
    "per_sample": {"STEPS": 2, "ROWS": 16},
}


@pytest.fixture
def load(monkeypatch):
    """Imports a program again, shortened to a moment. Nothing of it stays behind."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    threads = torch.get_num_threads()

    def function(name):
        for stale in ("agreement", name):
            monkeypatch.setitem(sys.modules, stale, None)  # to be put back afterwards
            del sys.modules[stale]
        module = importlib.import_module(name)
        for constant, value in SMALL[name].items():
            assert hasattr(module, constant)
            monkeypatch.setattr(module, constant, value)
        return module

    yield function
    torch.set_num_threads(threads)


def failure_of(module, capsys):
    """The message with which a program stops."""
    with pytest.raises(SystemExit) as stop:
        module.main()
    capsys.readouterr()
    message = stop.value.code  # a string: Python prints it and ends with status 1
    assert isinstance(message, str) and message.startswith("FAILED: ")
    assert len(message.splitlines()) == 1
    return message


def with_one_larger(tensors, by):
    """The same, but the largest element of the first tensor grows by a fraction of itself."""
    first, *others = tensors
    first = first.clone()
    first.view(-1)[first.abs().argmax()] *= 1 + by
    return (first, *others)


@pytest.mark.parametrize("name", SMALL)
def test_the_operators_run(load, backend, capsys, name):
    module = load(name)
    with support.count_calls() as counts:
        module.main()
    assert counts["forward"] > 0 and counts["backward"] > 0, counts
    assert capsys.readouterr().out


# -- The network that solves an equation -----------------------------------------


@pytest.mark.parametrize("factor", [1 + 1e-9, 0.5, float("nan")])
def test_a_wrong_second_derivative_of_tanh(load, backend, monkeypatch, capsys, factor):
    monkeypatch.setitem(second_order.CURVATURES, "tanh", lambda y: -2 * factor * y)
    message = failure_of(load("physics_informed"), capsys)
    # Under torch.func PyTorch differentiates the reference, and does not call it.
    assert re.search("the loss is .* by (torch.func|create_graph) and .* by hand", message), message


@pytest.mark.parametrize("way", ["by_func", "by_create_graph"])
def test_a_wrong_second_derivative_in_one_way(load, backend, monkeypatch, capsys, way):
    module = load("physics_informed")
    right = getattr(module, way)
    monkeypatch.setattr(module, way, lambda *arguments: (1 + 1e-12) * right(*arguments))
    # main makes the table of ways when it is called.
    by = {"by_func": "by torch.func", "by_create_graph": "by create_graph"}[way]
    assert f" {by} and " in failure_of(module, capsys)


@pytest.mark.parametrize("enough", [1e-3, float("nan")])
def test_a_solution_that_is_not_one(load, monkeypatch, capsys, enough):
    """After 20 iterations it is not yet within 1e-3, and NaN is not within any limit."""
    module = load("physics_informed")
    monkeypatch.setattr(module, "ENOUGH", enough)
    assert "from sin x, and should be within" in failure_of(module, capsys)


# -- The gradient penalty --------------------------------------------------------


def change_second_derivative(monkeypatch, how):
    right = second_order.backward_vjp

    def wrong(*arguments):
        of_grad_output, *of_saved = right(*arguments)
        return [of_grad_output, *how(of_saved)]

    monkeypatch.setattr(second_order, "backward_vjp", wrong)


def larger(of_saved):
    return [None if grad is None else (1 + 1e-6) * grad for grad in of_saved]


def lost(of_saved):
    """As from a fused layer without a second derivative."""
    return [None] * len(of_saved)


def one_forgotten(of_saved):
    """The gradient of one weight."""
    forgotten = next(n for n, grad in enumerate(of_saved) if grad is not None)
    return [None if n == forgotten else grad for n, grad in enumerate(of_saved)]


@pytest.mark.parametrize("how", [larger, lost, one_forgotten])
def test_a_wrong_gradient_of_the_penalty(load, monkeypatch, capsys, how):
    module = load("gradient_penalty")
    change_second_derivative(monkeypatch, how)
    with relu_mlp.backend("reference"):  # the extension has the formulas in C++
        message = failure_of(module, capsys)
    pattern = r"term\[[12], \d\] is .* by ReluMLP and .* by nn.Sequential"
    assert re.search(pattern, message), message


def test_a_critic_that_does_not_rise(load, backend, monkeypatch, capsys):
    module = load("gradient_penalty")
    monkeypatch.setattr(module, "ENOUGH", 0.05)
    assert re.search(r"D rises by -?0\.\d+ where it should by 2\.2", failure_of(module, capsys))


# -- Every sample's gradient -----------------------------------------------------


@pytest.mark.parametrize("kind", ["loss", "weights", "biases"])
def test_a_wrong_gradient_of_a_sample(load, backend, monkeypatch, capsys, kind):
    module = load("per_sample")
    right = module.every_gradient

    def wrong(*arguments):
        result = right(*arguments)
        if kind == "loss":
            return result._replace(loss=with_one_larger([result.loss], 1e-9)[0])
        entries = list(getattr(result, kind))
        entries[-1] = with_one_larger([entries[-1]], 1e-9)[0]
        return LossAndGrads(**{**result._asdict(), kind: tuple(entries)})

    monkeypatch.setattr(module, "every_gradient", wrong)
    name = "loss" if kind == "loss" else rf"{kind}\[2\]\[.*\]"
    message = failure_of(module, capsys)
    assert re.search(rf"sample \d+, {name} is .* by vmap and .* by autograd", message), message


def test_gradients_of_all_samples_added_up(load, backend, monkeypatch, capsys):
    """The result if `vmap` were missing."""
    module = load("per_sample")
    right = module.every_gradient

    def wrong(*arguments):
        loss, *grads = right(*arguments)
        added = [tuple(g.sum(0).expand_as(g) for g in kind) for kind in grads]
        return LossAndGrads(loss, *added)

    monkeypatch.setattr(module, "every_gradient", wrong)
    assert "sample 0, weights[" in failure_of(module, capsys)


def without_biases(right, net, grad_output):
    """The norms of the weights' gradients alone."""
    squares = [g.flatten(2).square().sum((1, 2)) for g in net.jacobian().weights]
    return (grad_output[:, 0] ** 2 * sum(squares)).sqrt()


def a_little_larger(right, net, grad_output):
    return (1 + 1e-9) * right(net, grad_output)


def of_the_whole(right, net, grad_output):
    return right(net, grad_output).norm().expand(len(grad_output))


@pytest.mark.parametrize("how", [without_biases, a_little_larger, of_the_whole])
def test_a_wrong_norm(load, backend, monkeypatch, capsys, how):
    module = load("per_sample")
    right = relu_mlp.Linearization.row_norms
    wrong = lambda net, grad_output: how(right, net, grad_output)  # noqa: E731
    monkeypatch.setattr(relu_mlp.Linearization, "row_norms", wrong)
    message = failure_of(module, capsys)
    assert re.search(r"step 0, norms\[\d+\] is .* by norms and .* by gradients", message), message


@pytest.mark.parametrize("kind", ["weights", "biases"])
def test_a_wrong_sum(load, backend, monkeypatch, capsys, kind):
    module = load("per_sample")
    right = relu_mlp.Linearization.vjp

    def wrong(net, grad_output):
        result = right(net, grad_output)
        return result._replace(**{kind: with_one_larger(getattr(result, kind), 1e-6)})

    monkeypatch.setattr(relu_mlp.Linearization, "vjp", wrong)
    message = failure_of(module, capsys)
    assert re.search(r"step 0, sum\[\d+\] is .* by norms and .* by gradients", message), message


def test_a_sum_that_is_not_clipped(load, backend, monkeypatch, capsys):
    """One of the two ways uses factors of 1."""
    module = load("per_sample")
    right = module.by_norms

    def wrong(x, target, w):
        with monkeypatch.context() as patch:
            patch.setattr(module, "CLIP", 1e9)
            return right(x, target, w)

    monkeypatch.setattr(module, "by_norms", wrong)
    assert re.search(r"step 0, sum\[\d+\] is", failure_of(module, capsys))


def test_the_norms_hold_no_gradient_of_a_sample(load, backend):
    """The program says how many numbers each way holds. Its largest tensor has that size."""
    module = load("per_sample")
    weights, biases = support.make_network([8, 64, 64, 1])
    w = Parameters(tuple(weights), tuple(biases))
    x, target = torch.randn(256, 8).double(), torch.randn(256, 1).double()
    with support.dispatched() as operations:
        module.by_gradients(x, target, w)
    assert max(held for _, held in operations) == 256 * 4801
    with support.dispatched() as operations:
        module.by_norms(x, target, w)
    assert max(held for _, held in operations) == 256 * 64
