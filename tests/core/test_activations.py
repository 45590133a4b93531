"""A new output activation is one row and one name in relu_mlp/activations.py."""

import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import get_args

import pytest

import relu_mlp
from relu_mlp.activations import OutputActivation

# Every test starts a process that imports PyTorch.
pytestmark = pytest.mark.slow

PACKAGE = Path(relu_mlp.__file__).parent

ROW = """
    Row(
        name="elu",
        phi=torch.nn.functional.elu,
        backward=lambda grad, y: torch.where(y > 0, grad, grad * (y + 1)),
        curvature=lambda y: (y <= 0).to(y.dtype),
        module=nn.ELU,
        function="nn.functional.elu",
        steepest=(1.0, 1.0),
    ),
)

if get_args"""

LAST = get_args(OutputActivation)[-1]


@pytest.fixture
def package(tmp_path):
    """A copy of the package without its library, whose table lacks the new activation."""
    ignored = shutil.ignore_patterns("__pycache__", "_C*")
    return shutil.copytree(PACKAGE, tmp_path / "relu_mlp", ignore=ignored)


def edit(package, *replacements):
    path = package / "activations.py"
    text = path.read_text()
    for old, new in replacements:
        assert text.count(old) == 1
        text = text.replace(old, new)
    path.write_text(text)


def run(package, script):
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        cwd=package.parent,
        env={
            **os.environ,
            "PYTHONPATH": str(package.parent),
            "RELU_MLP_BACKEND": "reference",
        },
        capture_output=True,
        text=True,
    )


ADD_ROW = ("\n)\n\nif get_args", ROW)
ADD_NAME = (f'"{LAST}"]', f'"{LAST}", "elu"]')


@pytest.mark.parametrize("change", [ADD_ROW, ADD_NAME], ids=["row", "name"])
def test_half_an_activation_stops_the_import(package, change):
    edit(package, change)
    assert "ImportError: OutputActivation and ROWS must" in run(package, "import relu_mlp").stderr


def test_elu(package):
    edit(package, ADD_ROW, ADD_NAME)
    done = run(
        package,
        """
        import torch
        from torch import nn
        from torch.func import jvp
        from relu_mlp import ReluMLP, relu_mlp
        from relu_mlp.cli import main

        net = ReluMLP(3, [4, 4], 2, output_activation="elu", dtype=torch.float64)
        native = nn.Sequential(*net.children())
        x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
        assert "MLP" in type(net(x).grad_fn).__name__

        def derivatives(f):
            (g,) = torch.autograd.grad(f(x).square().sum(), x, create_graph=True)
            (h,) = torch.autograd.grad(g.sin().sum(), x)
            return f(x), g, h, *jvp(f, (x.detach(),), (x.detach(),))

        for actual, expected in zip(derivatives(net), derivatives(native)):
            torch.testing.assert_close(actual, expected)
        net[-1].alpha = 2.0
        assert torch.equal(net(x), native(x))
        try:
            relu_mlp(x, [net[0].weight], output_activation="soft")
        except ValueError as error:
            assert " or 'elu'" in str(error)
        assert main(["check"]) == 0
        """,
    )
    assert done.returncode == 0, done.stderr
    assert "elu" in done.stdout
