import pytest
import torch
from squared_relu import OP, squared_relu
from torch.autograd import gradcheck, gradgradcheck

from relu_mlp import check_gradients

X = torch.tensor([[-2.0, -0.5, 0.25], [1.0, 3.0, 7.0]], dtype=torch.float64)


@pytest.mark.parametrize("x", [X, X.T, X[:, ::2], X[:0], X[0, 0], X / 0])
def test_operator(x):
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        y, right = squared_relu(x.to(dtype)), torch.relu(x.to(dtype)).square()
        torch.testing.assert_close(y, right, equal_nan=True)
    assert set(torch.library.opcheck(OP, [x.detach().requires_grad_()]).values()) == {"SUCCESS"}


def test_derivatives():
    report = check_gradients(lambda x: squared_relu(x).sum(), [X], lambda x: 2 * torch.relu(x))
    assert report.ok, report
    x = X.clone().requires_grad_()
    assert gradcheck(squared_relu, [x], check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(squared_relu, [x], check_fwd_over_rev=True)


def test_composition():
    x, value, slope = X.clone().requires_grad_(), torch.relu(X).square(), 2 * torch.relu(X)
    y = torch.compile(squared_relu, fullgraph=True)(x)
    torch.testing.assert_close([y, *torch.autograd.grad(y.sum(), x)], [value, slope])
    torch.testing.assert_close(torch.vmap(OP, 1, 1)(X), value)
    torch.testing.assert_close(torch.vmap(torch.func.grad(squared_relu))(X.ravel()), slope.ravel())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert squared_relu(X.bfloat16()).dtype == torch.float32
