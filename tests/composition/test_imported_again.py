"""The package imported more than once, and more than one copy of its library.

The operators belong to the process. A later import must work, and must leave the first one working.
"""

import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import relu_mlp
from relu_mlp import ops
from relu_mlp.ops import node_build

pytestmark = [pytest.mark.slow, pytest.mark.installation]

PACKAGE = Path(relu_mlp.__file__).parent

#: Checks whether derivatives, vmap and the choice of the backend are right in a package.
CHECK = """
    import gc, sys, warnings
    warnings.simplefilter("error")
    import torch
    from torch import nn
    from torch.func import grad, hessian, jvp, vmap
    from torch.utils._python_dispatch import TorchDispatchMode
    warnings.filterwarnings("ignore", ".*torch.jit", DeprecationWarning)
    torch.set_warn_always(True)

    class Calls(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.names = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.names.append(func._schema.name)
            return func(*args, **(kwargs or {}))

    def make(package):
        torch.manual_seed(0)
        return package.ReluMLP(3, [4], 2, output_activation="tanh", dtype=torch.float64)

    def check(package, net):
        assert (package.ops.node is not None) == HAS_NODE
        native = nn.Sequential(*net.children())
        x = torch.randn(5, 3, dtype=torch.float64)
        transforms = [
            grad,
            hessian,
            lambda f: vmap(grad(f)),
            lambda f: lambda x: jvp(grad(f), (x,), (x,))[1],
        ]
        for transform in transforms:
            actual, expected = (transform(lambda x: f(x).square().sum())(x) for f in (net, native))
            torch.testing.assert_close(actual, expected)
        leaf = x.clone().requires_grad_()
        twice = []
        for f in (net, native):
            (first,) = torch.autograd.grad(f(leaf).square().sum(), leaf, create_graph=True)
            twice.append(torch.autograd.grad(first.square().sum(), leaf))
        torch.testing.assert_close(*twice)

        weights, biases = [net[0].weight, net[2].weight], [net[0].bias, net[2].bias]
        for name in ("extension", "reference"):
            if name == "extension" and not HAS_LIBRARY:
                continue
            with package.backend(name), Calls() as calls:
                y = torch.ops.relu_mlp.relu_mlp(x, weights, biases, "tanh")
            torch.testing.assert_close(y, native(x))
            assert any("relu_mlp" in call for call in calls.names) == (name == "extension")
"""


def run(script, folder, package=PACKAGE):
    """Runs a script in an empty folder: Python looks for packages in the current one first."""
    (folder / "empty").mkdir()
    has_library = bool(list(package.glob("_C*.so")) + list(package.glob("_C*.pyd")))
    is_copy = package != PACKAGE
    has_node = (package / "_source").exists() if is_copy else ops.node is not None
    known = f"HAS_LIBRARY, HAS_NODE = {has_library}, {has_node}\n"
    code = known + textwrap.dedent(CHECK) + textwrap.dedent(script)
    environment = {**os.environ, "PYTHONPATH": str(package.parent), "RELU_MLP_BACKEND": "auto"}
    if not has_library:
        environment["RELU_MLP_BACKEND"] = "reference"  # or it says that there is none
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder / "empty",
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done


#: What was built, as the arguments of `copy_of_package`.
BUILT = {"nothing": (False, False)}
if ops.LIBRARY_PATH is not None:
    BUILT["library"] = (True, False)
if ops.node is not None:
    BUILT["library and node"] = (True, True)


def copy_of_package(folder, library, node, name="relu_mlp"):
    left_out = ["__pycache__", "_node-*", "_source"] + ([] if library else ["_C*.so", "_C*.pyd"])
    package = folder / name
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns(*left_out))
    if node:
        shutil.copy(ops.node.__file__, package)
        node_build.copy_sources(package / "_source")  # it serves only a package with its sources
    return package


@pytest.mark.parametrize("built", BUILT)
def test_after_it_left_sys_modules(tmp_path, built):
    """Also after its library was loaded from elsewhere, which then serves nothing."""
    package = copy_of_package(tmp_path, *BUILT[built])
    load = f"torch.ops.load_library({str(ops.LIBRARY_PATH)!r})" if ops.LIBRARY_PATH else ""
    script = f"""
        import relu_mlp
        {load}
        first, old = relu_mlp, make(relu_mlp)
        check(first, old)
        y = old(torch.ones(5, 3, dtype=torch.float64)).sum()

        for name in [name for name in sys.modules if name.split(".")[0] == "relu_mlp"]:
            del sys.modules[name]
        import relu_mlp
        assert relu_mlp is not first
        y.backward()
        assert old[0].weight.grad is not None
        new = make(relu_mlp)
        check(relu_mlp, new)
        check(first, old)

        del first, old, y
        gc.collect()
        check(relu_mlp, new)
        from torch.utils.flop_counter import FlopCounterMode
        with FlopCounterMode(display=False) as counter:
            new(torch.ones(5, 3, dtype=torch.float64))
        assert counter.get_total_flops() == 2 * 5 * (3 * 4 + 4 * 2)

        import importlib
        for name in ("library", "native_node", "fake", "fallback", "guards", "cpp_graphs"):
            importlib.reload(sys.modules["relu_mlp.ops." + name])
        check(relu_mlp, new)
    """
    assert run(script, tmp_path, package).stderr == ""


@pytest.mark.parametrize("built", BUILT)
def test_another_copy_of_the_package(tmp_path, built):
    """As with two installations, or with one that was copied and renamed."""
    package = copy_of_package(tmp_path, *BUILT[built])
    copy_of_package(tmp_path, *BUILT[built], name="another")
    script = """
        import another, relu_mlp
        nets = make(another), make(relu_mlp)
        check(another, nets[0])
        check(relu_mlp, nets[1])
    """
    run(script, tmp_path, package)


@pytest.mark.skipif(ops.LIBRARY_PATH is None, reason="is about the library")
def test_another_copy_of_the_library_comes_first(tmp_path):
    """Another copy is loaded afterwards, as by a C++ program, which does not look for the first."""
    copies = [str(shutil.copy(ops.LIBRARY_PATH, tmp_path / f"{n}.so")) for n in (1, 2)]
    script = f"""
        import ctypes
        torch.ops.load_library({copies[0]!r})
        import relu_mlp
        ctypes.CDLL({copies[1]!r})
        check(relu_mlp, make(relu_mlp))
    """
    run(script, tmp_path)


def test_operators_of_another_version(tmp_path):
    script = """
        other = torch.library.Library("relu_mlp", "DEF")
        other.define("forward(Tensor x) -> Tensor")
        other.impl("forward", lambda x: x, "CompositeExplicitAutograd")
        try:
            import relu_mlp
        except ImportError as error:
            assert "needs the operator relu_mlp::" in str(error), error
            assert "another version of relu_mlp" in str(error), error
        else:
            raise AssertionError("it was imported")
    """
    run(script, tmp_path)
