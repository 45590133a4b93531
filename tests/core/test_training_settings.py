"""`TrainingStep` under modes, transforms and threads, and when it is interrupted."""

import copy
import os
import subprocess
import sys
import textwrap
import threading

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import nn
from torch.func import grad, vmap
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import relu_mlp
import support
from relu_mlp import TrainingStep, ops
from support.training import LOSSES, copy_training, everything, plain_step, served

# PyTorch says this about its own code: forward mode compiles with TorchScript.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated:DeprecationWarning")

needs_library = pytest.mark.skipif(ops.LIBRARY_PATH is None, reason="needs the extension")


def make(seed=0, dtype=torch.float64, kind=torch.optim.Adam):
    """A step that the operator serves, a (net, optimizer) with the same numbers, x and a target."""
    torch.manual_seed(seed)
    net = support.twins(3, [8, 5], 2, dtype=dtype, seed=seed)[1]
    twin = copy.deepcopy(net)
    step = TrainingStep(net, "mse", kind(net.parameters(), lr=0.05))
    others = twin, kind(twin.parameters(), lr=0.05)
    x, target = torch.randn(6, 3, dtype=dtype), torch.randn(6, 2, dtype=dtype)
    for _ in range(2):
        step(x, target), plain_step(others[0], "mse", others[1], x, target)
    return step, others, x, target


def assert_close_to(step, others):
    """Equal up to the rounding of a few steps in float64, for numbers of a size of about 1."""
    torch.testing.assert_close(
        everything(step.net, step.optimizer), everything(*others), rtol=1e-9, atol=1e-9
    )


def both(step, others, x, target):
    """The losses of a step and of the plain loop."""
    return step(x, target), plain_step(others[0], "mse", others[1], x, target)


# -- Modes ---------------------------------------------------------------------------------------


def test_without_gradients(backend):
    """The step records its own graph where it needs one."""
    step, others, x, target = make()
    for hook in (None, lambda *_: None):
        handle = step.net.register_forward_hook(hook) if hook else None
        for _ in range(2):
            with torch.no_grad():
                found = step(x, target)
            torch.testing.assert_close(found, plain_step(others[0], "mse", others[1], x, target))
        if handle:
            handle.remove()
    assert_close_to(step, others)


def test_autocast(backend):
    """The layers compute in bfloat16, as in the plain loop."""
    step, others, x, target = make(dtype=torch.float32)
    copy_training((step.net, step.optimizer), others)
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = both(step, others, x, target)
    assert "autocast" in step.reason and found.dtype == expected.dtype
    assert found == expected
    support.assert_same(everything(step.net, step.optimizer), everything(*others))


def test_an_input_that_requires_a_gradient(backend):
    step, others, x, target = make()
    leaves = [t.clone().requires_grad_() for t in (x, target, x, target)]
    for _ in range(2):
        step(*leaves[:2]), plain_step(others[0], "mse", others[1], *leaves[2:])
    assert "requires a gradient" in step.reason
    for mine, other in zip(leaves[:2], leaves[2:]):
        torch.testing.assert_close(mine.grad, other.grad)
    assert_close_to(step, others)


def test_a_mode_that_sees_every_operation(backend):
    """It sees what the plain loop calls."""
    step, others, x, target = make()

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    for call in (
        lambda: step(x, target),
        lambda: plain_step(others[0], "mse", others[1], x, target),
    ):
        seen = []
        with Names():
            call()
        assert torch.ops.aten.addmm.default in seen
    assert_close_to(step, others)


def test_a_mode_that_knows_the_operators(backend):
    """It sees those that compute something without changing anything."""
    step, others, x, target = make()
    with support.count_calls() as calls:
        step(x, target)
    assert calls == {"forward": 0, "backward": 0, "loss_and_grads": 1, "native": 0}
    plain_step(others[0], "mse", others[1], x, target)
    assert_close_to(step, others)


def test_flops(backend):
    """Those of the forward pass, and of the backward pass for all parameters."""
    step, others, x, target = make()
    with FlopCounterMode(display=False) as counter:
        step(x, target)
    weights = [p.numel() for p in step.net.parameters() if p.dim() == 2]
    assert counter.get_total_flops() == 2 * len(x) * (3 * sum(weights) - weights[0])
    plain_step(others[0], "mse", others[1], x, target)
    assert_close_to(step, others)


def test_anomaly_detection(backend):
    """It raises where the backward pass makes a NaN, before the parameters change."""
    step, _, x, target = make()
    with torch.autograd.set_detect_anomaly(True), pytest.warns(UserWarning, match="Error detected"):
        unchanged(step, lambda: step(x, target * float("nan")))


def test_a_default_device(backend):
    step, others, x, target = make()
    with torch.device("cpu"):
        both(step, others, x, target)
        step.epoch(x, target, 6, shuffle=False)
    plain_step(others[0], "mse", others[1], x, target)
    assert_close_to(step, others)
    assert (step.reason is None) == (backend == "extension")


# -- Transforms ----------------------------------------------------------------------------------


def unchanged(step, call):
    """The call raises RuntimeError, and changes neither parameters nor state."""
    before = everything(step.net, step.optimizer)
    with pytest.raises(RuntimeError):
        call()
    support.assert_same(everything(step.net, step.optimizer), before)


def test_transforms_raise(backend):
    step, _, x, target = make()
    xs, targets = x.expand(2, 6, 3), target.expand(2, 6, 2)
    unchanged(step, lambda: vmap(step)(xs, targets))
    unchanged(step, lambda: vmap(step, (None, 0))(x, targets))
    unchanged(step, lambda: vmap(lambda x, t: step.repeat(x, t, 3))(xs, targets))
    unchanged(step, lambda: grad(step)(x, target))
    unchanged(step, lambda: torch.func.jvp(lambda x: step(x, target), (x,), (x,)))


def test_forward_mode(backend):
    """Natively the parameters get no tangent, because an in-place change of a leaf has none."""
    step, others, x, target = make()
    with forward_ad.dual_level():
        both(step, others, x, target)
    assert_close_to(step, others)
    outcomes = []
    for call in (step, lambda *a: plain_step(others[0], "mse", others[1], *a)):
        with forward_ad.dual_level():
            try:
                call(forward_ad.make_dual(x, x), target)
                outcomes.append("done")
            except RuntimeError:
                outcomes.append("raised")
    assert outcomes[0] == outcomes[1]


# -- Backends, threads and signals ---------------------------------------------------------------


def test_backends_agree():
    found = {}
    for name in support.BACKENDS:
        step, _, x, target = make()
        with relu_mlp.backend(name):
            losses = step.repeat(x, target, 5)
            assert (step.reason is None) == (name == "extension")
        found[name] = {"losses": losses, **everything(step.net, step.optimizer)}
    for result in found.values():
        torch.testing.assert_close(result, found["reference"], rtol=1e-9, atol=1e-9)


def run(code, **variables):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env=environment | variables,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.slow
def test_backend_of_the_environment():
    code = """
        import torch
        from relu_mlp import ReluMLP, TrainingStep
        torch.manual_seed(0)
        net = ReluMLP(3, 8, 2, dtype=torch.float64)
        step = TrainingStep(net, "mse", torch.optim.AdamW(net.parameters()))
        x, target = torch.randn(7, 3).double(), torch.randn(7, 2).double()
        losses = step.epoch(x, target, 2)
        print(*losses.tolist(), step.reason)
    """
    plain = run(code, RELU_MLP_BACKEND="reference")
    assert " ".join(plain[4:]) == "the extension is not used"
    for own, reference in zip(run(code)[:4], plain):
        assert float(own) == pytest.approx(float(reference), rel=1e-9)


@needs_library
def test_two_threads_with_networks_of_their_own():
    expected = []
    for seed in range(4):
        step, _, x, target = make(seed)
        step.repeat(x, target, 300)
        expected.append(everything(step.net, step.optimizer))
    steps = [make(seed) for seed in range(4)]

    def train(step, x, target):
        for _ in range(30):
            step.repeat(x, target, 10)

    threads = [
        threading.Thread(target=train, args=(step, x, target)) for step, _, x, target in steps
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for (step, *_), numbers in zip(steps, expected):
        assert step.reason is None
        support.assert_same(everything(step.net, step.optimizer), numbers)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="sends itself SIGINT")
def test_interrupt():
    """Ctrl-C ends an epoch between two batches: as many are done as the optimizer has counted."""
    code = """
        import copy, os, signal, threading, torch
        from relu_mlp import ReluMLP, TrainingStep
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have ignored it
        torch.manual_seed(0)
        torch.set_num_threads(1)
        net = ReluMLP(3, 16, 2, dtype=torch.float64)
        twin = copy.deepcopy(net)
        optimizers = [torch.optim.Adam(n.parameters()) for n in (net, twin)]
        steps = [TrainingStep(n, "mse", o) for n, o in zip((net, twin), optimizers)]
        x, target = torch.randn(1_000_000, 3).double(), torch.randn(1_000_000, 2).double()
        seen = []

        def progress(count, total):
            seen.append(count)
            if count > 100 and not timer.is_alive() and not timer.finished.is_set():
                timer.start()

        timer = threading.Timer(0.07, os.kill, (os.getpid(), signal.SIGINT))
        try:
            steps[0].epoch(x, target, 1, shuffle=False, progress=progress)
        except KeyboardInterrupt:
            print(steps[0].reason)
        (count,) = {int(state["step"]) for state in optimizers[0].state.values()}
        # The signal may have come after a call of the operator, and before progress was told.
        print(seen[-1] <= count < len(x))
        steps[1].epoch(x[:count], target[:count], 1, shuffle=False)
        for p, q in zip(net.parameters(), twin.parameters()):
            assert torch.equal(p, q) and p.grad is None
            for key, value in optimizers[0].state[p].items():
                assert torch.equal(value, optimizers[1].state[q][key]), key
        print("equal")
    """
    assert run(code) == ["None", "True", "equal"]


@needs_library
def test_losses_are_like_those_of_the_module():
    """Each before its step, in the dtype of x, without a graph."""
    for loss, function in LOSSES.items():
        net = support.twins(3, 8, 2)[1]
        step = TrainingStep(net, loss, torch.optim.SGD(net.parameters(), lr=1e-3))
        x, target = torch.randn(5, 3), torch.randn(5, 2)
        for _ in range(3):
            expected = function(nn.Sequential(*net)(x), target)
            found = served(step, x, target)
            assert found.dtype is x.dtype and found.grad_fn is None
            torch.testing.assert_close(found, expected.detach())
