"""`check_gradients` of what brings its derivative along: a Function, an operator, a module; of
second derivatives, forward mode and vmap; and of functions that are written in NumPy."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import relu_mlp
from relu_mlp import check_gradients


def draw(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def said(report):
    return " ".join(report.findings())


class Square(torch.autograd.Function):
    """relu(x)² times a number, with a derivative that a test can spoil."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, factor=1.0):
        return torch.relu(x) ** 2 * factor

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, ctx.factor = (*inputs, 1.0)[:2]
        ctx.save_for_backward(x)
        ctx.save_for_forward(x)

    @classmethod
    def slope(cls, x):
        return 2 * torch.relu(x)

    @staticmethod
    def backward(ctx, grad):
        return grad * Square.slope(*ctx.saved_tensors) * ctx.factor, None

    @staticmethod
    def jvp(ctx, tangent, _=None):
        return tangent * Square.slope(*ctx.saved_tensors) * ctx.factor


class OldStyle(torch.autograd.Function):
    """A sigmoid, whose author took z for y in y (1 - y)."""

    @staticmethod
    def forward(ctx, z):
        ctx.save_for_backward(z)
        return torch.sigmoid(z)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        (z,) = ctx.saved_tensors
        return grad * z * (1 - z)


ALL = {"second_derivative": True, "forward_mode": True, "vmap": True}


@pytest.mark.parametrize("handed_over", [Square, Square.apply, lambda x: Square.apply(x)])
def test_a_function_of_autograd(handed_over):
    report = check_gradients(handed_over, [torch.randn(3, 2)], **ALL)
    assert report.ok and report and not said(report), str(report)
    assert [parameter.name for parameter in report.parameters] == ["x"]
    assert [parameter.name for parameter in report.second.parameters] == ["x", "grad_output"]


def test_arguments_that_are_no_tensors():
    assert check_gradients(Square, [draw(3), 3.0]).ok
    assert check_gradients(torch.nn.functional.leaky_relu, {"input": draw(3), "inplace": False}).ok


def test_a_wrong_function_is_told_what_is_wrong_with_it():
    report = check_gradients(OldStyle, [draw(4, 3)], second_derivative=True)
    assert not report.ok and not report
    assert "the derivative of sigmoid" in said(report) and "z (1 - z)" in said(report)
    assert "second derivative" in said(report)
    # it says what gradcheck says, and more
    with pytest.raises(RuntimeError, match="Jacobian mismatch"):
        torch.autograd.gradcheck(OldStyle.apply, [draw(4, 3).requires_grad_()])


def test_wrong_in_one_mode_alone(monkeypatch):
    right = Square.slope
    monkeypatch.setattr(
        Square, "jvp", staticmethod(lambda ctx, t, _=None: 3 * t * torch.relu(*ctx.saved_tensors))
    )
    report = check_gradients(Square, [draw(3, 2)], **ALL)
    assert list(report.findings()) == [
        "forward mode is wrong for x: it is 1.5 times what it should be"
    ]
    assert "NOT OK" in str(report) and "forward mode is wrong for x" in str(report)
    monkeypatch.undo()
    monkeypatch.setattr(Square, "slope", classmethod(lambda cls, x: right(x).detach()))
    report = check_gradients(Square, [draw(3, 2)], second_derivative=True)
    assert all(p.ok for p in report.parameters) and not report.second.ok
    assert "second derivative by x: the difference quotient contradicts autograd" in said(report)


def test_a_mode_that_there_is_not():
    report = check_gradients(OldStyle, [draw(3)], forward_mode=True, vmap=True)
    assert "forward mode can't be computed" in said(report)
    assert "under vmap the outputs are not to be had" in said(report)


def test_a_linear_function_has_a_second_derivative():
    assert check_gradients(torch.t, [draw(2, 3)], **ALL).ok


@pytest.fixture
def cube():
    library = torch.library.Library("check_gradients_test", "FRAGMENT")
    library.define("cube(Tensor x, float scale) -> Tensor")
    library.impl("cube", lambda x, scale: scale * x**3, "CompositeExplicitAutograd")
    yield library
    library._destroy()


@pytest.mark.parametrize("factor", [3, 2])
def test_an_operator_with_a_registered_derivative(cube, factor):
    """Its forward pass is one operation, so the differences decide."""

    def setup(ctx, inputs, output):
        ctx.x, ctx.scale = inputs

    def backward(ctx, grad):
        return grad * factor * ctx.scale * ctx.x**2, None

    torch.library.register_autograd(
        "check_gradients_test::cube", backward, setup_context=setup, lib=cube
    )
    operators = torch.ops.check_gradients_test.cube, torch.ops.check_gradients_test.cube.default
    for operator in operators:
        report = check_gradients(operator, [draw(4), 2.0])
        assert report.ok == (factor == 3)
        assert "is one operation" in str(report)
        assert [parameter.name for parameter in report.parameters] == ["x"]
        if factor == 2:
            assert "in 4 of 4 elements; autograd's is 2/3 of the numerical" in said(report)


def test_modules():
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.BatchNorm1d(4), nn.Linear(4, 2))
    before = {name: value.clone() for name, value in net.state_dict().items()}
    report = check_gradients(net, [torch.randn(5, 3)], second_derivative=True, forward_mode=True)
    assert report.ok, str(report)
    names = [parameter.name for parameter in report.parameters]
    assert names == ["input", *dict(net.named_parameters())]
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name])  # nor the running mean

    class Wrong(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(2, 3))

        def forward(self, x):
            return OldStyle.apply(x @ self.weight.T)

    report = check_gradients(Wrong(), {"x": draw(5, 3)})
    assert [p.name for p in report.parameters if not p.ok] == ["x", "weight"]
    assert "sigmoid(x @ weight.T)" in said(report)


def test_a_module_of_this_package(backend):
    net = relu_mlp.ReluMLP(3, [4], 2, output_activation="tanh")
    report = check_gradients(net, [torch.randn(5, 3)], **ALL)
    assert report.ok, str(report)


def test_several_outputs():
    report = check_gradients(lambda x: {"a": x.exp(), "b": [x.sum(), x > 0]}, [draw(3)], **ALL)
    assert report.ok, str(report)


def test_no_mode_for_a_function_with_a_backward_pass():
    for mode in ALL:
        with pytest.raises(TypeError, match=f"{mode} is for a function without a backward pass"):
            check_gradients(torch.sum, [draw(3)], torch.ones_like, **{mode: True})


def test_a_function_that_returns_no_tensor():
    with pytest.raises(TypeError, match="must return a Tensor"):
        check_gradients(lambda x: 3, [draw(3)])


# -- A derivation of this package's network --------------------------------------


def test_a_derivation_of_the_network():
    x, target = draw(8, 3), draw(8, 2)
    weights, biases = [draw(4, 3), draw(2, 4)], [draw(4), draw(2)]

    def mine(x, target, weights, biases, before_the_bias=False):
        z = x @ weights[0].T
        a = torch.relu(z + biases[0])
        delta2 = 2 * (a @ weights[1].T + biases[1] - target)
        delta1 = (delta2 @ weights[1]) * ((z if before_the_bias else a) > 0)
        return [delta1.T @ x, delta2.T @ a], [delta1.sum(0), delta2.sum(0)]

    assert check_gradients(x, target, weights, biases, backward=mine).ok
    report = check_gradients(
        x, target, weights, biases, backward=lambda *given: mine(*given, before_the_bias=True)
    )
    assert [p.name for p in report.parameters if not p.ok] == ["weights[0]", "biases[0]"]
    assert "x @ weights[0].T: biases[0] is forgotten" in said(report)
    assert "Everything above layer 1 is right (weights[1] and biases[1])" in said(report)
    with pytest.raises(ValueError, match="return forgotten"):
        check_gradients(x, target, weights, biases, backward=lambda *given: None)


# -- NumPy -----------------------------------------------------------------------

X, T = np.random.default_rng(0).normal(size=(10, 3)), np.random.default_rng(1).normal(size=(10, 2))


def loss_of_arrays(w, b):
    hidden = np.maximum(X @ w.T + b, 0)
    return np.sum((hidden - T) ** 2)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("right", [True, False])
def test_numpy_arrays_are_taken_and_given(dtype, right):
    seen = set()

    def backward(w, b):
        seen.update(map(type, (w, b)))
        z = X @ w.T + b
        delta = 2 * (np.maximum(z, 0) - T)
        if right:
            delta = delta * (z > 0)
        return delta.T @ X, delta.sum(axis=0)

    w, b = (np.random.default_rng(2).normal(size=s).astype(dtype) for s in ((2, 3), (2,)))
    report = check_gradients(loss_of_arrays, {"w": w, "b": b}, backward)
    assert report.ok == right and seen == {np.ndarray}
    assert right or "relu" in said(report) or "maximum" in said(report), said(report)


def test_arrays_for_functions_of_tensors():
    x, t = torch.from_numpy(X), torch.from_numpy(T)

    def backward(w):
        return 2 * (x @ w.T - t).T @ x

    w = np.random.default_rng(2).normal(size=(2, 3))
    assert check_gradients(lambda w: (x @ w.T - t).square().sum(), [w], backward).ok


def test_an_index_and_a_sum_by_numpy():
    classes = np.arange(10) % 2

    def loss(w):
        y = X @ w.T
        p = np.exp(y) / np.exp(y).sum(axis=1, keepdims=True)
        return -np.log(p[np.arange(10), classes]).mean()

    def backward(w, target=True):
        y = X @ w.T
        p = np.exp(y) / np.exp(y).sum(axis=1, keepdims=True)
        if target:
            p[np.arange(10), classes] -= 1
        return p.T @ X / 10

    w = np.random.default_rng(2).normal(size=(2, 3))
    assert check_gradients(loss, [w], backward).ok
    assert "one-hot target is missing" in said(
        check_gradients(loss, [w], lambda w: backward(w, target=False))
    )


# -- In a test of one line -------------------------------------------------------


@pytest.mark.slow
def test_a_failure_in_pytest_prints_the_finding(tmp_path):
    (tmp_path / "test_mine.py").write_text(
        textwrap.dedent("""
            import torch
            from relu_mlp import check_gradients

            def test_mine():
                x = torch.randn(3)
                assert check_gradients(lambda x: x.square().sum(), [x], lambda x: x).ok
        """)
    )
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_mine.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(relu_mlp.__file__).parents[1])},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 1
    assert "it is 1/2 of autograd's: the derivative of a square" in run.stdout, run.stdout


def test_the_repr_is_short_enough_for_pytest():
    names = [f"parameter_{n}" for n in range(9)]
    inputs = {name: draw(3) for name in names}
    report = check_gradients(
        lambda **given: sum(p.exp().sum() for p in given.values()),
        inputs,
        lambda **given: {name: p.sinh() for name, p in given.items()},
    )
    assert len(repr(report)) <= 240 and repr(report).startswith(
        "<GradientReport NOT OK: parameter_0"
    )
    assert repr(check_gradients(torch.sum, [draw(3)])) == "<GradientReport OK: sum(inputs[0])>"
