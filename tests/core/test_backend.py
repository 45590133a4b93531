"""Which implementation runs: `backend`, RELU_MLP_BACKEND, and the package without its library."""

import os
import shutil
import site
import subprocess
import sys
import textwrap
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import relu_mlp
import support
from relu_mlp import ReluMLP, build_info, loss_and_grads, ops, reference

PACKAGE = Path(relu_mlp.__file__).parent
HAS_LIBRARY = ops.LIBRARY_PATH is not None
#: What "auto" chooses for a CPU tensor.
AUTO = support.BACKENDS[0]
#: A cycle through the backends, in which each of them follows each other one.
TURNS = [(a, b) for a in support.BACKENDS for b in support.BACKENDS]


@pytest.fixture(autouse=True)
def auto():
    """Starts from the default backend, whatever the environment says."""
    with relu_mlp.backend("auto"):
        yield


@contextmanager
def references():
    """A list of the calls of the reference: ("reference", operator)."""
    seen = []
    originals = {
        name: getattr(reference, name) for name in ("forward", "backward", "loss_and_grads")
    }

    def spy(name):
        def function(*args, **kwargs):
            seen.append(("reference", name))
            return originals[name](*args, **kwargs)

        return function

    for name in originals:
        setattr(reference, name, spy(name))
    try:
        yield seen
    finally:
        for name, function in originals.items():
            setattr(reference, name, function)


@contextmanager
def watched():
    """A list of this thread's calls: ("extension" or "reference", operator)."""

    class Mode(TorchDispatchMode):
        understands_relu_mlp = True

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            namespace, name = func._schema.name.split("::")
            if namespace == "relu_mlp":
                seen.append(("extension", name))
            return func(*args, **(kwargs or {}))

    with references() as seen, Mode():
        yield seen


def integer_case(seed=0):
    """A network, an input and the native gradients. Values are integers, so sums are exact."""
    generator = torch.Generator().manual_seed(seed)
    net, sequential = support.twins(3, (6, 5), 4)
    with torch.no_grad():
        for ours, native in zip(net.parameters(), sequential.parameters(), strict=True):
            ours.copy_(torch.randint(-2, 3, ours.shape, generator=generator))
            native.copy_(ours)
    x = torch.randint(-2, 3, (7, 3), generator=generator).float()
    y = sequential(x)
    y.sum().backward()
    return net, x, y.detach(), [p.grad for p in sequential.parameters()]


def implementation_now():
    """The implementation that serves a call in this thread."""
    net, x, *_ = integer_case()
    with watched() as seen, torch.no_grad():
        net(x)
    return seen[0][0]


# -- The context manager ---------------------------------------------------------------


@pytest.mark.parametrize("name", ["auto", *support.BACKENDS])
def test_every_entry_point_obeys(name):
    net, x, y, _ = integer_case()
    weights, biases = support.layers_of(net)
    with relu_mlp.backend(name), watched() as seen:
        net(x).sum().backward()
        with torch.no_grad():
            net(x)
            relu_mlp.relu_mlp(x, weights, biases)
        loss_and_grads(x, y, weights, biases)
    used = AUTO if name == "auto" else name
    # the operator that saves nothing; the reference implements it with its forward pass
    inference = "relu_mlp" if used == "extension" else "forward"
    # the reference implements loss_and_grads with its forward and backward passes
    assert [call for call in seen if call[1] != "backward"][:4] == [
        (used, "forward"),
        (used, inference),
        (used, inference),
        (used, "loss_and_grads"),
    ]
    assert (used, "backward") in seen
    assert {who for who, _ in seen} == {used}


@pytest.mark.parametrize(("first", "second"), TURNS)
def test_nesting(first, second):
    with relu_mlp.backend(first):
        assert implementation_now() == first
        with relu_mlp.backend(second):
            assert implementation_now() == second
            with relu_mlp.backend("auto"):
                assert implementation_now() == AUTO
            assert implementation_now() == second
        assert implementation_now() == first
    assert implementation_now() == AUTO


def test_an_exception_restores():
    with pytest.raises(KeyError), relu_mlp.backend("reference"):
        raise KeyError
    assert build_info().backend == "auto"
    assert implementation_now() == AUTO


def test_decorator():
    @relu_mlp.backend("reference")
    def f(depth=0):
        """The docstring."""
        if depth:
            raise KeyError
        return implementation_now()

    assert f() == "reference"
    assert f.__name__ == "f"
    assert f.__doc__ == "The docstring."
    assert implementation_now() == AUTO
    with pytest.raises(KeyError):
        f(1)
    assert build_info().backend == "auto"


def test_a_recursive_decorated_function():
    @relu_mlp.backend("reference")
    def f(depth):
        with relu_mlp.backend("auto"):
            if depth:
                f(depth - 1)
            assert build_info().backend == "auto"
        assert build_info().backend == "reference"

    f(3)
    assert build_info().backend == "auto"


def test_one_object_entered_twice():
    chosen = relu_mlp.backend("reference")
    with chosen:
        with relu_mlp.backend("auto"):
            with chosen:
                assert build_info().backend == "reference"
            assert build_info().backend == "auto"
        assert build_info().backend == "reference"
    assert build_info().backend == "auto"
    with chosen as entered:
        assert entered is chosen
        assert build_info().backend == "reference"


def test_making_one_changes_nothing():
    relu_mlp.backend("reference")
    assert build_info().backend == "auto"


@pytest.mark.parametrize("name", ["", "Auto", "cpp", "native", None, 1], ids=repr)
def test_unknown_name(name):
    with pytest.raises(ValueError, match="must be 'auto', 'extension' or 'reference', got"):
        relu_mlp.backend(name)


@pytest.mark.parametrize(("forward", "backward"), TURNS)
@pytest.mark.parametrize("recompute", [False, True])
def test_a_backward_uses_the_implementation_of_its_forward(forward, backward, recompute):
    net, x, y, grads = integer_case()
    net.recompute = recompute
    with watched() as seen:
        with relu_mlp.backend(forward):
            out = net(x)
        with relu_mlp.backend(backward):
            out.sum().backward()
    expected = ["forward", "backward"]
    if recompute:  # the reference recomputes with another forward pass
        again = ["forward", "backward"] if forward == "reference" else ["recompute_backward"]
        expected = ["forward", *again]
    assert seen == [(forward, name) for name in expected]
    assert torch.equal(out, y)
    assert all(torch.equal(p.grad, g) for p, g in zip(net.parameters(), grads, strict=True))


@pytest.mark.parametrize(("forward", "backward"), TURNS)
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("watch", [watched, references], ids=["under a mode", "by itself"])
def test_so_does_a_backward_that_is_differentiated(forward, backward, recompute, watch):
    net, x, *_ = integer_case()
    net.recompute = recompute
    x.requires_grad_()
    native = torch.nn.Sequential(*net)
    (expected,) = torch.autograd.grad(native(x).square().sum(), x)
    with relu_mlp.backend(forward):
        out = net(x)
    with watch() as seen, relu_mlp.backend(backward):
        (grad,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    assert torch.equal(grad, expected)
    names = ["forward", "backward"] if recompute else ["backward"]
    is_seen = forward == "reference" or watch is watched
    assert seen == [(forward, name) for name in names if is_seen]


def test_extension_raises_where_it_cannot_serve():
    net = ReluMLP(3, 6, 4, device="meta")
    x = torch.empty(7, 3, device="meta")
    with relu_mlp.backend("extension"):
        with pytest.raises(RuntimeError, match=r"(?s)extension.*setup\.py build_ext --inplace"):
            net(x)
        if HAS_LIBRARY:
            with pytest.raises(RuntimeError, match="device meta"):
                net(x)
    assert net(x).shape == (7, 4)  # "auto": the reference


def test_children_run_natively_on_any_backend():
    net, x, y, _ = integer_case()
    net[2].register_forward_hook(lambda *a: None)
    with relu_mlp.backend("extension"):
        assert torch.equal(net(x), y)


# -- Threads ------------------------------------------------------------------------------


def in_thread(function):
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result(timeout=60)


def test_another_thread_is_not_affected():
    default = in_thread(lambda: build_info().backend)
    with relu_mlp.backend("reference"):
        assert in_thread(lambda: build_info().backend) == default

    entered, leave = threading.Event(), threading.Event()

    def stay():
        with relu_mlp.backend("reference"):
            entered.set()
            leave.wait(60)
            return build_info().backend

    with ThreadPoolExecutor(1) as pool:
        staying = pool.submit(stay)
        entered.wait(60)
        assert build_info().backend == "auto"
        leave.set()
        assert staying.result(timeout=60) == "reference"


def test_torch_compile_finds_the_backend_of_the_thread():
    """The compiler of PyTorch 2.11 reads the attributes of a class before those of a thread."""
    assert not hasattr(type(ops.this_thread), "backend")


def test_one_object_in_two_threads():
    """Each thread returns to its own backend, in whatever order the threads leave."""
    shared = relu_mlp.backend("reference")
    first_is_in, second_is_in, first_is_out = (threading.Event() for _ in range(3))

    def first():
        with relu_mlp.backend("auto"):
            with shared:
                first_is_in.set()
                second_is_in.wait(60)
            after = build_info().backend
            first_is_out.set()
            return after

    def second():
        with relu_mlp.backend("reference"):
            first_is_in.wait(60)
            with shared:
                second_is_in.set()
                first_is_out.wait(60)
            return build_info().backend

    with ThreadPoolExecutor(2) as pool:
        results = [pool.submit(first), pool.submit(second)]
        assert [r.result(timeout=60) for r in results] == ["auto", "reference"]


def test_a_backward_in_another_thread():
    net, x, _, grads = integer_case()
    with relu_mlp.backend("reference"):
        out = net(x)
    in_thread(lambda: out.sum().backward())
    assert all(torch.equal(p.grad, g) for p, g in zip(net.parameters(), grads, strict=True))


@pytest.mark.parametrize("shared", [False, True])
def test_many_threads_at_once(shared):
    """Every thread gets its own gradients, with one network per thread or one for all threads."""
    cases = [integer_case(0 if shared else seed) for seed in range(6)]
    start = threading.Barrier(len(cases))

    def work(index):
        net, x, _y, _grads = cases[0 if shared else index]
        x = x + index if shared else x
        name = support.BACKENDS[index % len(support.BACKENDS)]
        start.wait(60)
        results = []
        with relu_mlp.backend(name):
            for _ in range(50):
                out = net(x)
                results.append(
                    (out.detach(), torch.autograd.grad(out.sum(), list(net.parameters())))
                )
            assert build_info().backend == name
        return results

    with ThreadPoolExecutor(len(cases)) as pool:
        found = list(pool.map(work, range(len(cases)), timeout=60))
    for index, results in enumerate(found):
        net, x, y, grads = cases[0 if shared else index]
        if shared:
            native = torch.nn.Sequential(*net)
            y = native(x + index)
            grads = torch.autograd.grad(y.sum(), list(net.parameters()))
        for out, found_grads in results:
            assert torch.equal(out, y)
            assert all(torch.equal(a, b) for a, b in zip(found_grads, grads, strict=True))


# -- The environment, and the package without its library -----------------------------------


def run_python(script, cwd, package=None, **environment):
    """Runs a script in a new Python process that must succeed; returns (stdout, stderr)."""
    variables = {k: v for k, v in os.environ.items() if k != "RELU_MLP_BACKEND"} | environment
    paths = [str(package or PACKAGE.parent), variables.get("PYTHONPATH", "")]
    variables["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        cwd=cwd,
        env=variables,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


@pytest.fixture
def without_library(tmp_path):
    """A folder with a copy of the package without the library."""
    shutil.copytree(
        PACKAGE, tmp_path / "relu_mlp", ignore=shutil.ignore_patterns("_C*", "__pycache__")
    )
    return tmp_path


@pytest.mark.slow
@pytest.mark.installation
def test_environment_variable(tmp_path):
    script = """
        import threading, relu_mlp
        print(relu_mlp.build_info().backend, relu_mlp.build_info().runs_on_cpu)
        thread = threading.Thread(target=lambda: print(relu_mlp.build_info().backend))
        thread.start(); thread.join()
        with relu_mlp.backend("auto"):
            print(relu_mlp.build_info().backend)
        print(relu_mlp.build_info().backend)
    """
    out, _ = run_python(script, tmp_path, RELU_MLP_BACKEND="reference")
    assert out.split() == ["reference", "reference", "reference", "auto", "reference"]


@pytest.mark.slow
@pytest.mark.installation
def test_wrong_environment_variable(tmp_path):
    script = """
        import torch, relu_mlp
        net, x = relu_mlp.ReluMLP(3, 6, 4), torch.ones(7, 3)
        weights = [net[0].weight, net[2].weight]
        for use in (
            lambda: net(x),
            lambda: relu_mlp.relu_mlp(x, weights),
            lambda: relu_mlp.loss_and_grads(x, torch.ones(7, 4), weights),
            relu_mlp.build_info,
        ):
            try:
                use()
            except ValueError as error:
                print(error)
        with relu_mlp.backend("reference"):
            print(tuple(net(x).shape))
    """
    out, _ = run_python(script, tmp_path, RELU_MLP_BACKEND="fast")
    message = "RELU_MLP_BACKEND must be 'auto', 'extension' or 'reference', got 'fast'"
    assert out.splitlines() == [message] * 4 + ["(7, 4)"]


@pytest.mark.slow
@pytest.mark.installation
def test_everything_works_without_the_library(without_library):
    script = """
        import warnings
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            import torch, relu_mlp
            from torch import nn
            assert relu_mlp.__file__.startswith(FOLDER)
            info = relu_mlp.build_info()
            assert info.library is None and info.runs_on_cpu == "reference", info
            assert REASON + " no _C.abi3.so in " + FOLDER in info.problem
            assert REMEDY in info.problem and "setup.py build_ext --inplace" in info.problem
            assert info.compiler is info.oldest_torch is info.instruction_set is None
            assert info.instruction_sets == info.cuda_architectures == ()
            for name in info.__dataclass_fields__:
                assert name in str(info)
            assert not caught, caught[0]  # importing and asking is not yet using

            net = relu_mlp.ReluMLP(3, [6, 5], 4)
            native = nn.Sequential(*net)
            with torch.no_grad():
                for p in net.parameters():
                    p.copy_(torch.randint(-2, 3, p.shape))
            x = torch.randint(-2, 3, (7, 3)).float()
            y = net(x)
            grads = torch.autograd.grad(y.sum(), list(net.parameters()))
            expected = torch.autograd.grad(native(x).sum(), list(net.parameters()))
            assert torch.equal(y, native(x)) and all(map(torch.equal, grads, expected))

            linears = [m for m in net if isinstance(m, nn.Linear)]
            weights, biases = [m.weight for m in linears], [m.bias for m in linears]
            assert torch.equal(relu_mlp.relu_mlp(x, weights, biases), y)
            loss, by_hand, _ = relu_mlp.loss_and_grads(x, y.detach() - 0.5, weights, biases)
            assert loss == 7 and torch.equal(by_hand[0], grads[0])
            again = relu_mlp.fuse(nn.Sequential(*net, nn.Identity()))
            assert torch.equal(again(x), y)

            y = torch.ops.relu_mlp.relu_mlp(x, weights, biases, "none")
            by_operator = torch.autograd.grad(y.sum(), list(net.parameters()))
            assert torch.equal(y, native(x)) and all(map(torch.equal, by_operator, expected))
            with torch.no_grad():
                y = torch.ops.relu_mlp.relu_mlp(x, weights, [], "relu")
            assert torch.equal(y, relu_mlp.relu_mlp(x, weights, output_activation="relu"))

            with relu_mlp.backend("extension"):
                assert relu_mlp.build_info().runs_on_cpu == "nothing"
                try:
                    net(x)
                except RuntimeError as error:
                    print(error)
        for warning in caught:
            print(warning.category.__name__, warning.message)
    """
    # Where the package is installed, the copy hides it.
    hides = HAS_LIBRARY and str(PACKAGE.parent) in site.getsitepackages()
    reason = "there is" if hides else "it was not built: there is"
    remedy = "Start Python in another folder" if hides else "pip install"
    script = textwrap.dedent(script).replace("FOLDER", repr(str(without_library / "relu_mlp")))
    script = script.replace("REASON", repr(reason)).replace("REMEDY", repr(remedy))
    out, _ = run_python(script, without_library, package=without_library)
    error, *warnings = out.splitlines()
    assert reason in error
    assert "setup.py build_ext --inplace" in error
    assert len(warnings) == 1
    assert warnings[0].startswith("UserWarning relu_mlp runs in Python")
    for part in (reason, remedy, "RELU_MLP_BACKEND"):
        assert part in warnings[0]


USE_IT = """
    import torch, relu_mlp
    net = relu_mlp.ReluMLP(3, 6, 4)
    for _ in range(2):
        net(torch.ones(7, 3)).sum().backward()
    print(relu_mlp.build_info().problem)
"""


@pytest.mark.slow
@pytest.mark.installation
def test_the_reference_by_choice_is_silent(without_library):
    _, err = run_python(USE_IT, without_library, without_library, RELU_MLP_BACKEND="reference")
    assert "relu_mlp" not in err
    with_warning = run_python(USE_IT, without_library, without_library)[1]
    assert with_warning.count("UserWarning") == 1


@pytest.mark.slow
@pytest.mark.installation
@pytest.mark.skipif(not HAS_LIBRARY, reason="needs a copy of the package that was built")
def test_a_checkout_that_hides_the_installed_package(without_library):
    """As after `pip install .`, in the folder of the checkout."""
    script = """
        import sys
        sys.path.append(PACKAGE)
        import relu_mlp
        print(relu_mlp.build_info().problem)
        print(relu_mlp.build_info().runs_on_cpu)
    """.replace("PACKAGE", repr(str(PACKAGE.parent)))
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        cwd=without_library,
        env={k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "RELU_MLP_BACKEND")},
        capture_output=True,
        text=True,
        check=True,
    )
    problem, runs = done.stdout.splitlines()
    assert f"no _C.abi3.so in {without_library / 'relu_mlp'}" in problem
    assert f"installed in {PACKAGE}" in problem and "not built" not in problem
    assert "Start Python in another folder" in problem and "pip install" not in problem
    assert runs == "reference"


@pytest.mark.slow
@pytest.mark.installation
def test_a_corrupt_library(without_library):
    (without_library / "relu_mlp" / "_C.abi3.so").write_bytes(bytes(range(256)) * 40)
    out, err = run_python(USE_IT, without_library, without_library)
    for text in (out, err):
        assert "_C.abi3.so could not be loaded: " in text
        assert "pip install" in text
    assert err.count("UserWarning") == 1


# -- build_info ----------------------------------------------------------------------------


def test_build_info():
    info = build_info()
    assert info.relu_mlp == relu_mlp.__version__
    assert info.torch == torch.__version__
    assert info.python == ".".join(map(str, sys.version_info[:3]))
    assert info.backend == "auto"
    assert info.runs_on_cpu == AUTO
    assert (info.problem is None) == (info.library is not None) == HAS_LIBRARY
    if HAS_LIBRARY:
        assert Path(info.library).parent == PACKAGE
        assert Path(info.library).exists()
        assert info.compiler
        assert info.oldest_torch == "2.11"
        assert info.instruction_set in info.instruction_sets
    lines = str(info).splitlines()
    assert [line.split()[0] for line in lines] == list(info.__dataclass_fields__)
    assert lines[0].split() == ["relu_mlp", relu_mlp.__version__]


@pytest.mark.parametrize("name", support.BACKENDS)
def test_build_info_follows_the_backend(name):
    with relu_mlp.backend(name):
        assert build_info().backend == name
        assert build_info().runs_on_cpu == name
    with relu_mlp.backend("extension"):
        assert build_info().runs_on_cuda == "nothing" or build_info().cuda_architectures
