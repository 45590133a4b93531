"""`TrainingStep` against the loop in its docstring: values, epochs, errors."""

import copy
import itertools
import random

import pytest
import torch
from torch import nn

import relu_mlp
import support
from relu_mlp import TrainingStep, ops
from support import training
from support.training import everything, plain_step, served, step_by_gradients

needs_library = pytest.mark.skipif(ops.LIBRARY_PATH is None, reason="needs the extension")
KINDS = [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW]
FLOATS = [torch.float64, torch.float32]

every_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
every_float = pytest.mark.parametrize("dtype", FLOATS, ids=str)


def random_problem(r, dtype):
    """A network, x and a target."""
    sizes = [r.choice([1, 2, 3, 5, 8, 17, 33]) for _ in range(r.randint(2, 4))]
    options = {"bias": r.random() < 0.8, "dtype": dtype}
    children = []
    for n_in, n_out in itertools.pairwise(sizes):
        children += [nn.Linear(n_in, n_out, **options), nn.ReLU()]
    children.pop()
    children += support.module_of(r.choice([None, None, "relu", "sigmoid", "tanh"]))
    x = torch.randn(r.choice([1, 2, 7, 32, 100]), sizes[0], dtype=dtype)
    return nn.Sequential(*children), x, torch.randn(len(x), sizes[-1], dtype=dtype)


def random_max_norm(r):
    return r.choice([None, None, 0.1, 1.0, 1e6])


def plain_gradients(net, loss, x, target):
    """The gradients in float64 by parameter, and bounds on their errors in the dtype of x.

    None if a hidden unit is so close to its kink that rounding decides whether it is on.
    """
    exact = copy.deepcopy(net).double()
    x, target, dtype = x.double(), target.double(), x.dtype
    weights, biases, activation = training.network_of(exact)
    absolutes = [support.absolutes(tensors) for tensors in ([x], weights, biases)]
    (x_size,), sizes = absolutes[0], absolutes[1:]
    longest = max(len(x), *(max(w.shape) for w in weights))
    error = support.gamma(3 * len(weights), longest, dtype)
    hidden = zip(
        support.hidden_pre_activations(x, weights, biases),
        support.hidden_pre_activations(x_size, *sizes),
        strict=True,
    )
    if any((z.abs() <= error * size).any() for z, size in hidden):
        return None
    value = training.LOSSES[loss](exact(x), target)
    grads = torch.autograd.grad(value, list(exact.parameters()))
    y_size = support.majorant(x_size, *sizes, output_activation=activation).detach()
    scale = {"sse": 2, "half_sse": 1, "mse": 2 / target.numel()}[loss]
    magnitudes = support.first_order_bounds(
        x, weights, biases, activation, scale * (y_size + target.abs())
    )
    named = support.leaves(x, weights, biases)
    by_exact = {id(p): magnitudes[name] for name, p in named.items() if name in magnitudes}
    # They are for float64, and for two products in every layer where here are three.
    factor = 2 * torch.finfo(dtype).eps / torch.finfo(torch.float64).eps
    bounds = [factor * by_exact[id(p)] for p in exact.parameters()]
    return dict(zip(net.parameters(), grads)), dict(zip(net.parameters(), bounds))


def after_clipping(grads, errors, max_norm, u):
    """The gradients after clipping, and bounds on their errors.

    The norm has a relative error of one rounding for each element, and is off by no more than the
    norm of the errors.
    """
    if max_norm is None:
        return grads, errors
    norm = torch.stack([g.double().norm() for g in grads.values()]).norm() + 1e-6
    factor = (max_norm / norm).clamp(max=1)
    off = torch.stack([e.norm() for e in errors.values()]).norm() / norm
    relative = off + (sum(g.numel() for g in grads.values()) + 16) * u
    return (
        {p: factor * g.double() for p, g in grads.items()},
        {p: factor * (errors[p] + relative * g.double().abs()) for p, g in grads.items()},
    )


def check_one_step(step, twin, x, target, call, grads, errors):
    """A step against `call` on the twin, a (net, optimizer) with the same numbers."""
    net, optimizer = twin
    u = torch.finfo(x.dtype).eps / 2
    grads, errors = after_clipping(grads, errors, step.max_norm, u)
    bounds = {}
    for name, p in net.named_parameters():
        bound = training.bound_of_step(optimizer, p, grads[p], errors[p])
        bounds[name] = bound.parameter
        bounds |= {f"{key} of {name}": b for key, b in bound.state.items()}
    call(net, step.loss, optimizer, x, target, step.max_norm)
    served(step, x, target)
    support.assert_within(everything(step.net, step.optimizer), everything(*twin), bounds)


def random_steps(kind, dtype, seed):
    """A `TrainingStep` that has done one step, the same in the form of a twin, x and a target."""
    r = random.Random(f"{kind.__name__} {seed}")
    torch.manual_seed(seed)
    net, x, target = random_problem(r, dtype)
    setting = training.random_setting(r, kind)
    step = TrainingStep(
        net, r.choice([*training.LOSSES]), setting.make(net), max_norm=random_max_norm(r)
    )
    step(x, target)
    twin = copy.deepcopy(net)
    return step, (twin, setting.make(twin)), x, target


def has_diverged(net):
    """As of a rate of learning that is too large, or of a loss that is maximized."""
    return not all((p.abs() < 1e6).all() for p in net.parameters())


# -- Values --------------------------------------------------------------------------------------


@needs_library
@every_float
@every_kind
def test_steps_with_the_same_gradients(kind, dtype):
    """20 steps, each from equal numbers, against the optimizer's own step."""
    for seed in range(25):
        step, twin, x, target = random_steps(kind, dtype, seed)
        for _ in range(20):
            if has_diverged(step.net):
                break
            training.copy_training((step.net, step.optimizer), twin)
            _, grads = training.own_gradients(twin[0], step.loss, x, target)
            errors = {p: torch.zeros_like(p, dtype=torch.float64) for p in grads}
            check_one_step(step, twin, x, target, step_by_gradients, grads, errors)


@needs_library
@every_float
@every_kind
def test_steps_of_the_plain_loop(kind, dtype):
    """The same against autograd, whose gradients are rounded otherwise."""
    compared = 0
    for seed in range(25, 50):
        step, twin, x, target = random_steps(kind, dtype, seed)
        for _ in range(20):
            if has_diverged(step.net):
                break
            training.copy_training((step.net, step.optimizer), twin)
            found = plain_gradients(twin[0], step.loss, x, target)
            if found is None:
                step(x, target)
                continue
            check_one_step(step, twin, x, target, plain_step, *found)
            compared += 1
    assert compared > 250


@needs_library
@every_float
def test_sgd_has_the_bits_of_the_optimizer(dtype):
    """Over 20 steps without a correction in between, where neither clips nor has fused kernels.

    Both have the fused multiply-add, or neither has.
    """
    if not training.contracts_like_pytorch():
        pytest.skip("one of the two has no fused multiply-add")
    for seed in range(60):
        r = random.Random(seed)
        torch.manual_seed(seed)
        net, x, target = random_problem(r, dtype)
        twin, setting = copy.deepcopy(net), training.random_setting(r, torch.optim.SGD)
        setting.arguments.pop("fused", None)
        loss = r.choice([*training.LOSSES])
        step = TrainingStep(net, loss, setting.make(net), max_norm=r.choice([None, 1e30]))
        optimizer = setting.make(twin)
        for n in range(20):
            found = step(x, target)
            expected = step_by_gradients(twin, loss, optimizer, x, target)
            assert n == 0 or step.reason is None
            support.assert_same(found, expected)
            support.assert_same(everything(net, step.optimizer), everything(twin, optimizer))


@needs_library
def test_losses_and_parameters_of_one_step_by_hand():
    """y = w x with w = 3 and x = 2, whose target is 5: the gradient of (y - 5)^2 is 4."""
    net = nn.Sequential(nn.Linear(1, 1, bias=False, dtype=torch.float64))
    nn.init.constant_(net[0].weight, 3)
    step = TrainingStep(net, "sse", torch.optim.SGD(net.parameters(), lr=0.5))
    x, target = torch.full((2, 1, 1), 2.0, dtype=torch.float64)[0], torch.full((1, 1), 5.0).double()
    assert served(step, x, target) == 1 and net[0].weight == 3 - 0.5 * 4
    assert served(step, x, target) == 9 and net[0].weight == 1 + 0.5 * 12
    assert net[0].weight.grad is None


def small_step(kind=torch.optim.SGD, loss="mse", dtype=torch.float64, **options):
    """A `TrainingStep` of a network 3, 8, 2, and the same as (net, optimizer)."""
    max_norm = options.pop("max_norm", None)
    options = {"lr": 0.05} | options
    torch.manual_seed(0)
    net = support.twins(3, 8, 2, dtype=dtype)[1]
    twin = copy.deepcopy(net)
    step = TrainingStep(net, loss, kind(net.parameters(), **options), max_norm=max_norm)
    return step, (twin, kind(twin.parameters(), **options))


def rows(count, dtype=torch.float64):
    return torch.randn(count, 3, dtype=dtype), torch.randn(count, 2, dtype=dtype)


def assert_close_to(step, twin):
    """Equal up to the rounding of a few steps in float64, for numbers of a size of about 1."""
    torch.testing.assert_close(
        everything(step.net, step.optimizer), everything(*twin), rtol=1e-10, atol=1e-10
    )


@every_kind
@pytest.mark.parametrize("leading", [(), (1,), (2, 5), (2, 1, 3), (0,), (0, 4)], ids=str)
def test_leading_dimensions(kind, leading, backend):
    step, twin = small_step(kind)
    x = torch.randn(*leading, 3, dtype=torch.float64)
    target = torch.randn(*leading, 2, dtype=torch.float64)
    for _ in range(3):
        found, expected = step(x, target), plain_step(*twin[:1], "mse", twin[1], x, target)
        assert found.shape == () and not found.requires_grad
        torch.testing.assert_close(found, expected, equal_nan=True)
        torch.testing.assert_close(
            everything(step.net, step.optimizer),
            everything(*twin),
            rtol=1e-10,
            atol=1e-10,
            equal_nan=True,
        )
    losses = step.repeat(x, target, 4)
    expected = [plain_step(twin[0], "mse", twin[1], x, target) for _ in range(4)]
    torch.testing.assert_close(losses, torch.stack(expected), equal_nan=True)
    assert (step.reason is None) == (backend == "extension")


@pytest.mark.parametrize(
    "make",
    [
        lambda t: t.repeat_interleave(2, 0)[::2],
        lambda t: t.T.contiguous().T,
        lambda t: torch.cat([t, t], 1)[:, : t.shape[1]],
        lambda t: t[:1].expand(6, -1),
        support.negated,
        lambda t: t.round().to(torch.int64),
        lambda t: t > 0,
    ],
    ids=["rows apart", "transposed", "columns apart", "expanded", "negated", "int64", "bool"],
)
@every_kind
def test_layouts_and_dtypes_of_the_target_and_layouts_of_x(kind, make):
    step, twin = small_step(kind)
    x, target = rows(6)
    made = make(x).to(x.dtype) if make(x).dtype != x.dtype else make(x)
    for _ in range(3):
        found = step(made, make(target))
        expected = plain_step(
            twin[0], "mse", twin[1], made.clone(), make(target).to(x.dtype).clone()
        )
        torch.testing.assert_close(found, expected)
        assert_close_to(step, twin)
    losses = step.epoch(made, make(target), 4, shuffle=False)
    assert losses.shape == (2,)


# -- Epochs --------------------------------------------------------------------------------------


@every_kind
@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize(("count", "batch_size"), [(1, 1), (7, 3), (8, 4), (5, 64), (6, 1), (5, 5)])
def test_epoch(kind, shuffle, count, batch_size, backend):
    """The batches of `torch.randperm`, the last one smaller, and the generator's state."""
    step, twin = small_step(kind)
    x, target = rows(count)
    for seed in range(3):
        mine, other = (torch.Generator().manual_seed(seed) for _ in range(2))
        losses = step.epoch(x, target, batch_size, shuffle=shuffle, generator=mine)
        order = torch.randperm(count, generator=other) if shuffle else torch.arange(count)
        expected = [
            plain_step(twin[0], "mse", twin[1], x[part], target[part])
            for part in order.split(batch_size)
        ]
        torch.testing.assert_close(losses, torch.stack(expected))
        assert_close_to(step, twin)
        assert torch.equal(mine.get_state(), other.get_state()) or not shuffle


def test_epoch_takes_the_default_generator():
    step, twin = small_step()
    x, target = rows(9)
    torch.manual_seed(5)
    step.epoch(x, target, 2)
    after = torch.get_rng_state()
    torch.manual_seed(5)
    for part in torch.randperm(9).split(2):
        plain_step(twin[0], "mse", twin[1], x[part], target[part])
    assert torch.equal(torch.get_rng_state(), after)
    assert_close_to(step, twin)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam], ids=lambda k: k.__name__)
def test_epoch_of_rows_that_are_not_vectors(kind):
    """The first dimension counts the rows, as in a loop over batches."""
    step, twin = small_step(kind)
    x = torch.randn(7, 5, 3, dtype=torch.float64)
    target = torch.randn(7, 5, 2, dtype=torch.float64)
    losses = step.epoch(x, target, 3, shuffle=False)
    expected = [
        plain_step(twin[0], "mse", twin[1], *part) for part in zip(x.split(3), target.split(3))
    ]
    torch.testing.assert_close(losses, torch.stack(expected))
    assert_close_to(step, twin)


def test_epoch_of_another_module(backend):
    """Images, and a module that is no network of Linear and ReLU."""
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 2)).double()
    twin = copy.deepcopy(net)
    x, target = torch.randn(5, 1, 4, 4).double(), torch.randn(5, 2).double()
    step = TrainingStep(net, "half_sse", torch.optim.Adam(net.parameters()))
    optimizer = torch.optim.Adam(twin.parameters())
    losses = step.epoch(x, target, 2, shuffle=False)
    expected = [
        plain_step(twin, "half_sse", optimizer, *part) for part in zip(x.split(2), target.split(2))
    ]
    support.assert_same(losses, torch.stack(expected))
    support.assert_same(everything(net, step.optimizer), everything(twin, optimizer))
    assert "not an unchanged network" in step.reason


@every_kind
def test_nothing_to_do(kind, backend):
    step, _ = small_step(kind)
    x, target = rows(0)
    before = everything(step.net, step.optimizer)
    assert step.epoch(x, target, 4).shape == (0,)
    assert step.repeat(*rows(3), 0).shape == (0,)
    support.assert_same(everything(step.net, step.optimizer), before)


def test_a_batch_may_be_larger_than_anything():
    """It takes no more memory than the rows."""
    step, twin = small_step()
    x, target = rows(5)
    for batch_size in (10**6, 2**40, 2**63 - 1):
        step.epoch(x, target, batch_size, shuffle=True)
        plain_step(twin[0], "mse", twin[1], x, target)
    assert step.reason in (None, "the extension is not used")
    assert_close_to(step, twin)


@every_kind
def test_progress(kind, backend):
    step, _ = small_step(kind)
    x, target = rows(40)
    for call in (
        lambda progress: step.epoch(x, target, 2, progress=progress),
        lambda progress: step.repeat(x, target, 20, progress=progress),
    ):
        seen = []
        call(lambda done, total, seen=seen: seen.append((done, total)))
        assert seen[-1] == (20, 20) and seen == sorted(set(seen))
        assert all(total == 20 for _, total in seen)


def test_progress_is_told_now_and_then(monkeypatch):
    """At the end, and at most as often as promised, also where every step is a call of its own."""
    clock = iter(range(1000))  # two hundredths of a second pass between two looks at the clock
    monkeypatch.setattr(relu_mlp.training.time, "perf_counter", lambda: next(clock) * 0.02)
    net = nn.Sequential(nn.Linear(8, 2), nn.Tanhshrink())
    step = TrainingStep(net, "mse", torch.optim.SGD(net.parameters()))
    told = []
    step.repeat(torch.ones(4, 8), torch.ones(4, 2), 20, progress=lambda *a: told.append(a[0]))
    assert 3 <= len(told) <= 15 and told[-1] == 20


@every_kind
def test_exception_in_the_progress(kind, backend):
    """It comes through, between two batches: the same call with fewer batches does the same."""
    step, twin = small_step(kind)
    x, target = rows(40)
    seen = []

    def stop(done, total):
        seen.append(done)
        if done >= 7:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        step.epoch(x, target, 2, shuffle=False, progress=stop)
    for n in range(seen[-1]):
        part = slice(2 * n, 2 * n + 2)
        plain_step(twin[0], "mse", twin[1], x[part], target[part])
    assert_close_to(step, twin)


def test_progress_may_change_hyperparameters(monkeypatch):
    """They are read again after each call."""
    monkeypatch.setattr(relu_mlp.training, "SECONDS_OF_SILENCE", 0)
    step, twin = small_step()
    x, target = rows(8)

    def change(done, total):
        step.optimizer.param_groups[0]["lr"] = 0

    step.repeat(x, target, 30, progress=change)
    plain_step(twin[0], "mse", twin[1], x, target)
    if ops.LIBRARY_PATH is not None:
        assert step.reason is None
    assert_close_to(step, twin)


# -- Numbers that are not finite -----------------------------------------------------------------


@every_kind
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
@pytest.mark.parametrize("where", ["x", "target"])
@pytest.mark.parametrize("max_norm", [None, 1.0])
def test_not_finite_like_the_plain_loop(kind, value, where, max_norm):
    step, twin = small_step(kind, max_norm=max_norm, loss="sse")
    x, target = rows(4)
    step(x, target), plain_step(twin[0], "sse", twin[1], x, target, max_norm)
    (x if where == "x" else target)[1, 0] = value
    for _ in range(2):
        step(x, target), plain_step(twin[0], "sse", twin[1], x, target, max_norm)
    torch.testing.assert_close(
        everything(step.net, step.optimizer), everything(*twin), equal_nan=True
    )


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize(("count", "batch_size"), [(12, 3), (3, 3)])
def test_epoch_warns_of_gradients_that_are_not_finite(shuffle, count, batch_size, backend):
    step, _ = small_step()
    x, target = rows(count)
    generator = torch.Generator().manual_seed(3)
    order = torch.randperm(count, generator=generator) if shuffle else torch.arange(count)
    first = 2 if count > 3 else 0
    target[order[3 * first]] = float("nan")
    total = count // batch_size
    with pytest.warns(RuntimeWarning, match=f"not finite in step {first} of {total}") as caught:
        step.epoch(x, target, batch_size, shuffle=shuffle, generator=generator.manual_seed(3))
    assert len(caught) == 1 and caught[0].filename == __file__
    with pytest.warns(RuntimeWarning, match="not finite in step 0 of 2"):
        step.repeat(x, target, 2)


# -- Errors --------------------------------------------------------------------------------------


def snapshot(step):
    optimizer = step.optimizer
    return {
        **everything(step.net, optimizer),
        "keys": [list(optimizer.state.get(p, {})) for p in step.net.parameters()],
        "grads": [p.grad is None for p in step.net.parameters()],
    }


def assert_unchanged(step, before):
    after = snapshot(step)
    assert after.pop("keys") == before.pop("keys")
    assert after.pop("grads") == before.pop("grads")
    support.assert_same(after, before)


BAD_TARGETS = {
    "fewer rows": lambda t: t[:-1],
    "more columns": lambda t: torch.cat([t, t], 1),
    "one column": lambda t: t[:, :1],
    "one more dimension": lambda t: t[None],
    "no dimension": lambda t: t[0, 0],
    "float32": lambda t: t.float(),
    "bfloat16": lambda t: t.bfloat16(),
    "complex": lambda t: t.to(torch.complex128),
    "meta": lambda t: t.to("meta"),
    "freed": lambda t: (t.untyped_storage().resize_(0), t)[1],
}


@every_kind
@pytest.mark.parametrize("first", [True, False], ids=["first step", "later step"])
@pytest.mark.parametrize("bad", BAD_TARGETS)
def test_bad_target(kind, bad, first, backend):
    """RuntimeError that names the target, before anything is changed."""
    step, _ = small_step(kind, momentum=0.9) if kind is torch.optim.SGD else small_step(kind)
    x, target = rows(4)
    if not first:
        step(x, target)
    for p in step.net.parameters():
        p.grad = torch.ones_like(p)
    before = snapshot(step)
    target = BAD_TARGETS[bad](target)
    for call in (lambda: step(x, target), lambda: step.repeat(x, target, 3)):
        with pytest.raises(RuntimeError, match="target"):
            call()
        assert_unchanged(step, dict(before))


BAD_INPUTS = {
    "fewer columns": lambda x: x[:, :-1],
    "no dimension": lambda x: x[0, 0],
    "float32": lambda x: x.float(),
    "bfloat16": lambda x: x.bfloat16(),
    "int64": lambda x: x.long(),
    "complex": lambda x: x.to(torch.complex128),
    "freed": lambda x: (x.untyped_storage().resize_(0), x)[1],
}


@every_kind
@pytest.mark.parametrize("bad", BAD_INPUTS)
def test_bad_input(kind, bad, backend):
    step, _ = small_step(kind)
    x, target = rows(4)
    step(x, target)
    for p in step.net.parameters():
        p.grad = torch.ones_like(p)
    before = snapshot(step)
    x = BAD_INPUTS[bad](x)
    for call in (lambda: step(x, target), lambda: step.repeat(x, target, 3)):
        with pytest.raises(RuntimeError):
            call()
        assert_unchanged(step, dict(before))


@pytest.mark.parametrize("bad", [None, 1.0, [[1.0]], "x"], ids=repr)
def test_what_is_no_tensor(bad, backend):
    step, _ = small_step()
    x, target = rows(4)
    for name, arguments in {"x": (bad, target), "target": (x, bad)}.items():
        for call in (step, lambda *a: step.repeat(*a, 2), lambda *a: step.repeat(*a, 0)):
            with pytest.raises(TypeError, match=f"{name} must be a Tensor, got "):
                call(*arguments)


def test_bad_arguments_of_the_constructor():
    net = support.twins(3, 8, 2)[1]
    sgd = torch.optim.SGD(net.parameters())
    for net_, optimizer, words in [
        (lambda x: x, sgd, "net must be an nn.Module, got function"),
        (net, net, "optimizer must be an Optimizer, got Sequential"),
        (net, torch.optim.LBFGS(net.parameters()), "must step without a closure, got LBFGS"),
    ]:
        with pytest.raises(TypeError, match=words):
            TrainingStep(net_, "mse", optimizer)
    for loss in ("l3", None, ["mse"], nn.MSELoss()):
        with pytest.raises(ValueError, match=r"loss must be 'sse', .* or 'cross_entropy', got"):
            TrainingStep(net, loss, sgd)
    for max_norm in (0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="max_norm must be positive"):
            TrainingStep(net, "mse", sgd, max_norm=max_norm)
    with pytest.raises(ValueError, match="optimizer must have parameters of net, got none"):
        TrainingStep(support.twins(3, 8, 2)[1], "mse", sgd)


def test_bad_counts():
    step, _ = small_step()
    x, target = rows(4)
    with pytest.raises(ValueError, match="times must not be negative, got -1"):
        step.repeat(x, target, -1)
    for size in (0, -3):
        with pytest.raises(ValueError, match=f"batch_size must be at least 1, got {size}"):
            step.epoch(x, target, size)
    with pytest.raises(ValueError, match="target must have 4 rows like x, got 3"):
        step.epoch(x, target[:3], 2)
