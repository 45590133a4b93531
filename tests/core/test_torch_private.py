"""The package works in a PyTorch that lacks one of the private names it uses."""

import ast
import functools
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

import relu_mlp
from relu_mlp import _torch_private

PACKAGE = Path(relu_mlp.__file__).parent
#: `_source`, in an installed package, holds what builds the native node, and is no part of it.
FILES = [
    path
    for path in sorted(PACKAGE.rglob("*.py"))
    if path.name != "_torch_private.py" and "_source" not in path.parts
]

#: Private names of objects that the package gets from PyTorch.
OF_OBJECTS = {
    name
    for thing in (torch.nn.Module(), torch.nn.Linear(1, 1), torch.ones(1), torch.ops.aten.relu)
    for name in [*vars(thing), *dir(type(thing)), *dir(torch.ops.aten.relu.default)]
    if name.startswith("_") and not name.startswith("__")
}

#: A path to a private name of PyTorch, in a message for example.
PATH = re.compile(r"\btorch(?:\.\w+)*?\.(_[a-zA-Z]\w*)")


# -- No private name elsewhere --------------------------------------------------------------


def is_private(name):
    return name.startswith("_") and not name.startswith("__")


@functools.cache
def own_names():
    """Private names that the package defines itself."""
    names = set()
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                names.add(node.name)
            elif isinstance(node, (ast.Name, ast.Attribute)) and isinstance(node.ctx, ast.Store):
                names.add(node.id if isinstance(node, ast.Name) else node.attr)
    return names | {"_build_info", "_supported_instruction_sets", "_instruction_set"}


def strays(source, own=frozenset()):
    tree = ast.parse(source)
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch"):
            names = [*node.module.split("."), *(alias.name for alias in node.names)]
        elif isinstance(node, ast.Import):
            names = [
                n for alias in node.names for n in alias.name.split(".") if "torch" in alias.name
            ]
        elif isinstance(node, ast.Attribute):
            names = [] if node.attr in own - OF_OBJECTS else [node.attr]
        elif isinstance(node, ast.Constant) and id(node) not in docstrings:
            names = [node.value] if node.value in OF_OBJECTS else PATH.findall(str(node.value))
        else:
            continue
        for name in filter(is_private, names):
            yield f"line {node.lineno}: {name}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_other_file_names_anything_private(path):
    assert list(strays(path.read_text(), own_names())) == []


@pytest.mark.parametrize(
    "line",
    [
        "from torch._C._functorch import peek_interpreter_stack",
        "from torch.nn.modules.module import _global_forward_hooks",
        "import torch._dynamo",
        "torch._C._is_any_autocast_enabled()",
        "forward_ad._current_level",
        "tensor._version",
        "self._modules",
        'state["_forward_hooks"]',
        'getattr(operator, "_schema")',
        'print("PyTorch has no torch._C._AutoDispatchBelowAutograd")',
    ],
)
def test_a_stray_is_found(line):
    assert list(strays(line))


def test_this_pytorch_has_them_all():
    assert _torch_private.MISSING == []
    assert relu_mlp.build_info().missing_in_torch == ()


def test_every_entry_says_why_and_what_happens_without():
    paths = [name.path for name in _torch_private.NAMES]
    assert len(set(paths)) == len(paths)
    for name in _torch_private.NAMES:
        assert name.why and name.public and name.without, name.path


# -- Without one of them ------------------------------------------------------------------------

#: Parts of the names that matter to torch.compile and torch.export, which are slow.
COMPILED = (
    "BelowAutograd",
    "_op",
    "_current_level",
    "Module()._modules",
    "_global_forward_hooks",
    "_len_torch_function_stack",
    "tracing",
    "constant",
    "FakeTensor",
)

#: A process that imports PyTorch once and forks for every name. In a child, the name is hidden
#: from the package, which is imported there.
PROGRAM = """
    import copy, importlib.util, os, sys, traceback, warnings
    import torch, torch._dynamo, torch.export
    from torch import nn
    from torch.func import functional_call, grad, hessian, jvp, vmap
    from torch.optim.optimizer import (
        register_optimizer_step_post_hook, register_optimizer_step_pre_hook
    )

    torch.set_num_threads(1)

    def hide(paths):
        spec = importlib.util.spec_from_file_location("relu_mlp._torch_private", FILE)
        module = importlib.util.module_from_spec(spec)
        module.HIDDEN = frozenset(paths)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        assert [name.path for name in module.MISSING] == paths, module.MISSING
        return module.MISSING

    def same(actual, expected):
        torch.testing.assert_close(actual, expected, check_stride=False)

    class PlainStep:
        def __init__(self, net, loss, optimizer):
            self.net, self.optimizer = net, optimizer

        def __call__(self, x, target):
            self.optimizer.zero_grad()
            torch.nn.functional.mse_loss(self.net(x), target).backward()
            self.optimizer.step()

    def trained(net, kind):
        net, seen, handles = copy.deepcopy(net), [], []
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        step = kind(net, "mse", optimizer)
        hook = lambda *_: seen.append(1)
        for register in (
            lambda: None,
            lambda: optimizer.register_step_pre_hook(hook),
            lambda: optimizer.register_step_post_hook(hook),
            lambda: register_optimizer_step_pre_hook(hook),
            lambda: register_optimizer_step_post_hook(hook),
            lambda: net[0].weight.register_hook(lambda grad: 2 * grad),
            lambda: net[2].bias.register_post_accumulate_grad_hook(hook),
        ):
            handle = register()
            for _ in range(2):
                step(torch.ones(5, 3, dtype=torch.float64), torch.ones(5, 2, dtype=torch.float64))
                with warnings.catch_warnings():
                    warnings.simplefilter("error")
                    scheduler.step()
            if handle is not None:
                handle.remove()
        return [*net.parameters(), torch.tensor(len(seen))]

    def check(paths):
        missing = hide(paths)
        import relu_mlp
        info = relu_mlp.build_info()
        assert info.missing_in_torch == tuple(paths)
        for name in missing:
            assert any(name.path in line and name.without in line for line in info.advice())

        torch.manual_seed(0)
        net = relu_mlp.ReluMLP(3, [4, 4], 2, output_activation="tanh", dtype=torch.float64)
        native = nn.Sequential(*net.children())
        x = torch.randn(2, 5, 3, dtype=torch.float64)
        parameters = list(net.parameters())

        def loss(f):
            return lambda x: f(x).square().sum()

        def operator(x):
            return torch.ops.relu_mlp.relu_mlp(x, parameters[::2], parameters[1::2], "tanh")

        def function(x):
            return relu_mlp.relu_mlp(x, parameters[::2], parameters[1::2], output_activation="tanh")

        for f in (net, function, operator):
            with torch.no_grad():
                same(f(x), native(x))
            for g in (loss(f),):
                same(
                    torch.autograd.grad(g(x), parameters),
                    torch.autograd.grad(loss(native)(x), parameters),
                )
            leaf = x.clone().requires_grad_()
            twice = []
            for g in (f, native):
                (first,) = torch.autograd.grad(loss(g)(leaf), leaf, create_graph=True)
                twice.append((first, *torch.autograd.grad(loss(torch.sin)(first), parameters)))
            same(*twice)
            for transform in (
                lambda f: vmap(f),
                lambda f: vmap(grad(loss(f))),
                lambda f: lambda x: jvp(f, (x,), (x.sin(),)),
                lambda f: lambda x: jvp(lambda x: jvp(f, (x,), (x,))[1], (x,), (x.sin(),))[1],
                lambda f: lambda x: hessian(loss(f))(x[0]),
                lambda f: lambda x: jvp(grad(loss(f)), (x,), (x.cos(),))[1],
            ):
                same(transform(f)(x), transform(native)(x))
            if "dispatch key Batched" not in paths:
                vectors = torch.randn(3, *x.shape[:-1], 2, dtype=torch.float64)
                same(
                    *(
                        torch.autograd.grad(g(leaf), leaf, vectors, is_grads_batched=True)
                        for g in (f, native)
                    )
                )

        def per_sample(net):
            def one(parameters, x):
                return functional_call(net, parameters, (x,)).square().sum()
            return vmap(grad(one), (None, 0))(dict(net.named_parameters()), x)
        same(per_sample(net), per_sample(copy.deepcopy(native)))

        with torch.autocast("cpu", torch.bfloat16):
            single = copy.deepcopy(net).float()
            sequential = nn.Sequential(*single.children())
            a, b = single(x.float()), sequential(x.float())
            assert a.dtype == b.dtype
            torch.testing.assert_close(a, b, atol=0.1, rtol=0.1)
            a.float().square().sum().backward()

        weights, biases = parameters[::2], parameters[1::2]
        by_hand = relu_mlp.loss_and_grads(
            x, torch.zeros(2, 5, 2, dtype=x.dtype), weights, biases, output_activation="tanh"
        )
        same(by_hand.weights, torch.autograd.grad(loss(native)(x), weights))
        relu_mlp.linearize(x, weights, biases).row_norms(torch.ones(2, 5, 2, dtype=x.dtype))
        assert relu_mlp.check_gradients(x, net(x).detach() + 1, weights, biases).ok

        seen = []
        handle = nn.modules.module.register_module_forward_hook(lambda m, *_: seen.append(m))
        net(x)
        handle.remove()
        assert len(seen) == 7
        with net[1].register_forward_hook(lambda m, args, y: y + 1):
            same(net(x), native(x))
        same(net(x), native(x))
        same(net[:2](x), native[:2](x))
        other = relu_mlp.fuse(nn.Sequential(copy.deepcopy(native), nn.Identity(), nn.Flatten()))
        same(other(x), native(x).flatten(1))

        same(trained(native, relu_mlp.TrainingStep), trained(native, PlainStep))

        if len(paths) > 1 or any(part in paths[0] for part in COMPILED):
            same(torch.compile(net, backend="eager")(x), native(x))
            same(torch.export.export(net, (x,)).module()(x), native(x))

    for paths in [*([path] for path in PATHS), PATHS]:
        sys.stdout.flush()
        child = os.fork()
        if not child:
            try:
                warnings.filterwarnings("ignore", "relu_mlp runs in Python")
                check(paths)
            except BaseException:
                print("WITHOUT", *paths)
                traceback.print_exc(file=sys.stdout)
            finally:
                sys.stdout.flush()
                os._exit(0)
        os.waitpid(child, 0)
    print("done")
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_the_package_works_without_any_one_of_them_and_without_all():
    code = (
        f"FILE = {str(PACKAGE / '_torch_private.py')!r}\n"
        f"PATHS = {[name.path for name in _torch_private.NAMES]}\n"
        f"COMPILED = {COMPILED}\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code + textwrap.dedent(PROGRAM)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(PACKAGE.parent)},
    )
    assert done.stdout.splitlines()[-1:] == ["done"] and "WITHOUT" not in done.stdout, (
        done.stdout[-6000:] + done.stderr[-3000:]
    )
