"""The operators of `TrainingStep` and their kernels: sizes, wrong arguments, memory."""

import math
import random
import subprocess
import sys
import textwrap

import pytest
import torch
from torch import nn

import relu_mlp
import support
from relu_mlp import TrainingStep, ops
from support import training

SETS = relu_mlp.build_info().supported_instruction_sets
FLOATS = [torch.float32, torch.float64]

# Without the library there is nothing to test here.
__test__ = bool(SETS)

every_float = pytest.mark.parametrize("dtype", FLOATS, ids=str)


@pytest.fixture(params=SETS)
def instruction_set(request):
    """Every instruction set in turn. The test runs on it."""
    before = relu_mlp.build_info().instruction_set
    torch.ops.relu_mlp_testing.choose_instruction_set(request.param)
    yield request.param
    torch.ops.relu_mlp_testing.choose_instruction_set(before)


# -- Kernels -------------------------------------------------------------------------------------

#: On both sides of multiples of every vector's length, and more than one thread's share.
COUNTS = [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 47, 48, 49, 63, 64, 65, 200, 70_001]


class Vector(nn.Sequential):
    """A network of one weight with `count` elements between numbers that must not change."""

    def __init__(self, count, dtype):
        super().__init__(nn.Linear(1, 1, bias=False, dtype=dtype))
        self.around = torch.full((count + 256,), 7.0, dtype=dtype)
        inner = self.around[128:-128].view(count, 1)
        self[0].weight = nn.Parameter(inner.copy_(torch.randn(count, 1)))

    @property
    def edges(self):
        return torch.cat([self.around[:128], self.around[-128:]])


def make_vector(count, dtype):
    # A Sequential itself: `TrainingStep` does not serve subclasses.
    vector = Vector(count, dtype)
    return nn.Sequential(vector[0]), vector


def random_optimizer(r, kind):
    setting = training.random_setting(r, kind)
    setting.arguments.pop("fused", None)
    return setting._replace(groups=[])


def spread(p, r):
    """A target whose distances from p have all sizes: gradients from 1e-6 to 100."""
    return p.detach() - torch.randn_like(p) * 10 ** torch.empty_like(p).uniform_(-6, 2)


def updates(kind, dtype, seeds):
    """Vectors of every count before a step, and the same after the optimizer's own step."""
    for seed in range(seeds):
        for count in COUNTS[: -1 if seed else None]:
            r = random.Random(f"{kind.__name__} {seed} {count}")
            torch.manual_seed(seed)
            net, vector = make_vector(count, dtype)
            twin = nn.Sequential(nn.Linear(1, 1, bias=False, dtype=dtype))
            twin[0].weight = nn.Parameter(net[0].weight.detach().clone())
            setting = random_optimizer(r, kind)
            step = TrainingStep(net, "half_sse", setting.make(net))
            optimizer = setting.make(twin)
            x = torch.ones(1, 1, dtype=dtype)
            step(x, spread(net[0].weight, r).T)  # makes the state
            training.copy_training((net, step.optimizer), (twin, optimizer))
            for _ in range(2):
                target = spread(net[0].weight, r).T
                (grad,) = training.own_gradients(twin, "half_sse", x, target)[1].values()
                bound = training.bound_of_step(optimizer, twin[0].weight, grad, 0.0)
                bounds = {"0.weight": bound.parameter} | {
                    f"{key} of 0.weight": b for key, b in bound.state.items()
                }
                training.step_by_gradients(twin, "half_sse", optimizer, x, target)
                training.served(step, x, target)
                found = training.everything(net, step.optimizer)
                yield found, training.everything(twin, optimizer), bounds
                training.copy_training((net, step.optimizer), (twin, optimizer))
            assert (vector.edges == 7).all(), count


@every_float
def test_sgd(instruction_set, dtype):
    """The bits of PyTorch's kernels where both have the fused multiply-add."""
    has_same_bits = training.contracts_like_pytorch()
    for found, expected, bounds in updates(torch.optim.SGD, dtype, 6):
        support.assert_within(found, expected, bounds)
        if has_same_bits:
            support.assert_same(found, expected)


@every_float
@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW], ids=lambda k: k.__name__)
def test_adam(instruction_set, kind, dtype):
    for found, expected, bounds in updates(kind, dtype, 6):
        support.assert_within(found, expected, bounds)


@every_float
@pytest.mark.parametrize("kind", ["SGD", "Adam"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf], ids=str)
def test_one_gradient_that_is_not_finite(instruction_set, kind, dtype, bad):
    """It is found wherever it is, and spoils no other element."""
    for count in COUNTS[:-2]:
        for place in {0, count // 2, count - 1}:
            net, _ = make_vector(count, dtype)
            step = TrainingStep(net, "sse", getattr(torch.optim, kind)(net.parameters(), lr=0.1))
            x, target = torch.ones(1, 1, dtype=dtype), torch.zeros(1, count, dtype=dtype)
            step.repeat(x, target, 2)  # without a warning
            target[0, place] = bad
            with pytest.warns(RuntimeWarning, match="not finite in step 0 of 2"):
                step.repeat(x, target, 2)
            is_finite = net[0].weight.isfinite().flatten()
            assert not is_finite[place] and is_finite.sum() == count - 1


# -- Wrong arguments -----------------------------------------------------------------------------


def arguments_of(optimizer="adam", dtype=torch.float32, networks=1):
    """Arguments of a call that works, by name: a network 3, 4, 2 and two batches.

    Of several networks, all but the first are trained as the first is.
    """

    def numbers(*shape):
        return torch.rand(*shape, dtype=dtype)

    weights, biases = [numbers(4, 3), numbers(2, 4)], [numbers(4), numbers(2)]
    state = []
    for p in [*weights, *biases]:
        state += [torch.zeros_like(p)]
        if optimizer == "adam":
            state += [torch.zeros_like(p), torch.zeros(())]
    return {
        "x": torch.rand(6, 3, dtype=dtype),
        "target": torch.rand(6, 2, dtype=dtype),
        "weights": weights,
        "biases": biases,
        "state": state,
        "losses": torch.zeros(networks, 2, dtype=dtype),
        "order": torch.tensor([5, 0, 3, 2, 1, 4]),
        "loss": "mse",
        "output_activation": "none",
        "optimizer": optimizer,
        "hyperparameters": (
            [0.1, 0.9, 0.99, 1e-8, 0.0, 0.0, 0.0, 0.0]
            if optimizer == "adam"
            else [0.1, 0.9, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]
        )
        * networks,
        "groups": [0, 0, 0, 0],
        "group_count": 1,
        "max_norm": math.inf,
        "batch": 3,
        "first": 0,
        "last": 2,
    }


#: What a trainer keeps. The others are arguments of every call.
OF_TRAINER = (
    "weights",
    "biases",
    "state",
    "loss",
    "output_activation",
    "optimizer",
    "groups",
    "group_count",
)


def call(arguments, networks=1):
    """A call for a network, after copies of one that works."""
    operators = torch.ops.relu_mlp
    good = arguments_of(arguments["optimizer"], torch.float32)
    x = arguments["x"]
    if x.dtype is torch.float64:
        good = arguments_of(arguments["optimizer"], x.dtype)
    each = [good] * (networks - 1) + [arguments]
    trainers = []
    try:
        for one in each:
            one = {name: copied(one[name]) if one is good else one[name] for name in OF_TRAINER}
            trainers.append(operators._new_trainer(*one.values()))
        names = [name for name in arguments if name not in OF_TRAINER]
        return operators._train(trainers, *[arguments[name] for name in names])
    finally:
        for trainer in trainers:
            operators._delete_trainer(trainer)


def copied(value):
    is_tensors = isinstance(value, list) and value and isinstance(value[0], torch.Tensor)
    return [tensor.clone() for tensor in value] if is_tensors else value


def tensors_of(arguments):
    for name, value in arguments.items():
        if isinstance(value, torch.Tensor):
            yield name, None
        elif isinstance(value, list) and value and isinstance(value[0], torch.Tensor):
            yield from ((name, n) for n in range(len(value)))


def changed(arguments, place, change):
    name, n = place
    arguments = {k: list(v) if isinstance(v, list) else v for k, v in arguments.items()}
    if n is None:
        arguments[name] = change(arguments[name])
    else:
        arguments[name][n] = change(arguments[name][n])
    return arguments


def refuses(arguments, networks=1):
    """The call raises RuntimeError and changes nothing."""
    kept = {
        place: value.clone()
        for place in tensors_of(arguments)
        if (value := value_at(arguments, place)).is_cpu
        and value.layout is torch.strided
        and value.untyped_storage().nbytes() >= value.numel() * value.element_size()
    }
    with pytest.raises(RuntimeError) as error:
        call(arguments, networks)
    for place, value in kept.items():
        support.assert_same(value_at(arguments, place), value, str(place))
    return str(error.value)


def value_at(arguments, place):
    value = arguments[place[0]]
    return value if place[1] is None else value[place[1]]


every_case = pytest.mark.parametrize(
    ("optimizer", "networks"),
    [("sgd", 1), ("adam", 1), ("sgd", 2), ("adam", 2)],
    ids=["sgd", "adam", "sgd of 2", "adam of 2"],
)


@every_case
@every_float
def test_the_arguments_work(optimizer, networks, dtype):
    arguments = arguments_of(optimizer, dtype, networks)
    before = [w.clone() for w in arguments["weights"]]
    assert call(arguments, networks) == -1
    assert all((w != b).any() for w, b in zip(arguments["weights"], before))
    assert (arguments["losses"] > 0).all()


def shrunk(tensor):
    tensor = tensor.clone()
    storage = tensor.untyped_storage()
    storage.resize_(storage.nbytes() - 1)
    return tensor


def freed(tensor):
    tensor = tensor.clone()
    tensor.untyped_storage().resize_(0)
    return tensor


SPOILS = {
    "freed": freed,
    "shrunk": shrunk,
    "meta": lambda t: t.to("meta"),
    "without elements on meta": lambda t: torch.empty(0, device="meta"),
    "bfloat16": lambda t: t.to(torch.bfloat16),
    "int32": lambda t: t.to(torch.int32),
    "complex": lambda t: t.to(torch.complex64),
    "more dimensions": lambda t: t[None, None].repeat(2, 2, *[1] * t.dim()),
    "larger": lambda t: torch.cat([t.reshape(-1)] * 2),
    "sparse": lambda t: t.to_sparse(),
}


@every_case
@pytest.mark.parametrize("spoil", SPOILS)
def test_one_wrong_tensor(optimizer, networks, spoil):
    """Every tensor in turn."""
    arguments = arguments_of(optimizer, networks=networks)
    for place in tensors_of(arguments):
        if spoil == "larger" and place[0] == "order":
            continue  # it may have any length
        bad = changed(arguments, place, SPOILS[spoil])
        refuses(bad, networks)


def doubled(value):
    return value + value


WRONG = {
    "no weights": {"weights": [], "biases": [], "groups": []},
    "one weight": {"weights": lambda v: v[:1]},
    "one bias": {"biases": lambda v: v[:1]},
    "state too short": {"state": lambda v: v[:-1]},
    "state too long": {"state": lambda v: [*v, v[0]]},
    "no state": {"state": []},
    "loss": {"loss": "l3"},
    "activation": {"output_activation": "gelu"},
    "optimizer": {"optimizer": "lbfgs"},
    "hyperparameters too few": {"hyperparameters": lambda v: v[:-1]},
    "no hyperparameters": {"hyperparameters": []},
    "groups too few": {"groups": lambda v: v[:-1]},
    "groups too many": {"groups": doubled},
    "group out of range": {"groups": [0, 1, 0, 0]},
    "group far out of range": {"groups": [0, 0, 0, 2**62]},
    "group count too large": {"group_count": 2},
    "group count far too large": {"group_count": 2**62},
    "group count below 0": {"group_count": -1},
    "batch of 0": {"batch": 0},
    "batch of -1": {"batch": -1},
    "first of -1": {"first": -1},
    "last before first": {"first": 2, "last": 1},
    "more batches than losses": {"last": 3},
    "fewer batches than losses": {"last": 1},
    "a product that overflows": {"last": 2**62, "losses": torch.zeros(0)},
    "a difference that overflows": {"first": -(2**63), "last": 2**63 - 1},
    "rows out of range": {"order": torch.tensor([0, 6])},
    "rows below 0": {"order": torch.tensor([0, -1])},
    "rows far out of range": {"order": torch.tensor([2**62])},
    "order of another number of networks": {"order": torch.zeros(5, 3, dtype=torch.int64)},
    "order of no dimension": {"order": torch.tensor(0)},
    "order apart": {"order": torch.zeros(6, dtype=torch.int64)[::2]},
    "x of no dimension": {"x": torch.tensor(1.0)},
    "x of 1 dimension": {"x": torch.ones(3)},
    "x of 4 dimensions": {"x": torch.ones(1, 1, 6, 3)},
    "x of 3 networks": {"x": torch.ones(3, 6, 3)},
    "target of 1 dimension": {"target": torch.ones(2)},
    "target of no dimension": {"target": torch.tensor(1.0)},
    "target of 3 networks": {"target": torch.ones(3, 6, 2)},
    "rows of x apart": {"x": torch.ones(6, 6)[:, ::2]},
    "rows of x in stacks apart": {"x": torch.ones(2, 3, 6).mT},
    "rows of the target apart": {"target": torch.ones(6, 4)[:, ::2]},
    "fewer rows of the target": {"target": torch.ones(5, 2)},
    "weights of 1 dimension": {"weights": [torch.ones(3), torch.ones(2)]},
    "weights of no dimension": {"weights": [torch.tensor(1.0), torch.tensor(1.0)]},
    "weights of 4 dimensions": {"weights": [torch.ones(1, 1, 4, 3), torch.ones(1, 1, 2, 4)]},
    "weights of no network": {"weights": [torch.ones(0, 4, 3), torch.ones(0, 2, 4)]},
    "weights that do not chain": {"weights": [torch.ones(4, 3), torch.ones(2, 5)]},
    "the second weight of 3 networks": {"weights": lambda v: [v[0], torch.ones(3, 2, 4)]},
    "the second bias of 3 networks": {"biases": lambda v: [v[0], torch.ones(3, 2)]},
    "weights that are expanded": {"weights": lambda v: [torch.ones(1).expand_as(v[0]), v[1]]},
    "a missing bias with a state": {"biases": lambda v: [v[0], torch.empty(0)]},
}


@every_case
@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments(optimizer, networks, name):
    arguments = arguments_of(optimizer, networks=networks)
    for key, value in WRONG[name].items():
        arguments[key] = value(arguments[key]) if callable(value) else value
    refuses(arguments, networks)


@every_case
def test_messages_name_the_argument(optimizer, networks):
    for key, value, words in [
        ("x", torch.ones(6, 3).double(), "float64 like x"),
        ("x", torch.ones(3), "x must have 2 dimensions"),
        ("target", torch.ones(6, 1), "target must have the output's shape"),
        ("losses", torch.zeros(5), f"losses must have shape ({networks}, 2)"),
        ("order", torch.tensor([7]), r"numbers of rows in [0, 6), got 7"),
        ("batch", 0, "batch must be at least 1"),
        ("groups", [0], "groups must have 4 entries, got 1"),
        ("hyperparameters", [1.0], f"must have 8 entries for each of {networks} groups, got 1"),
        ("optimizer", "x", "optimizer must be 'sgd' or 'adam', got 'x'"),
    ]:
        arguments = {**arguments_of(optimizer, networks=networks), key: value}
        assert words in refuses(arguments, networks)


def test_a_trainer_that_is_not_there():
    arguments = arguments_of()
    numbers = [torch.ops.relu_mlp._new_trainer(*[arguments[n] for n in OF_TRAINER]) for _ in "ab"]
    torch.ops.relu_mlp._delete_trainer(numbers[0])
    torch.ops.relu_mlp._delete_trainer(numbers[0])  # it may be repeated
    rest = [arguments[name] for name in arguments if name not in OF_TRAINER]
    for number in (numbers[0], numbers[1] + 1000, -1, 0):
        with pytest.raises(RuntimeError, match=f"there is no trainer {number}"):
            torch.ops.relu_mlp._train([numbers[1], number], *rest)
    with pytest.raises(RuntimeError, match="trainers must have at least one entry"):
        torch.ops.relu_mlp._train([], *rest)
    assert torch.ops.relu_mlp._train([numbers[1]], *rest) == -1
    torch.ops.relu_mlp._delete_trainer(numbers[1])


def test_untrained_parameters_have_no_state():
    arguments = arguments_of("sgd")
    arguments["groups"], arguments["state"] = [-1, 0, -7, -1], arguments["state"][1:2]
    before = [t.clone() for t in arguments["weights"] + arguments["biases"]]
    assert call(arguments) == -1
    after = arguments["weights"] + arguments["biases"]
    assert [torch.equal(a, b) for a, b in zip(after, before)] == [True, False, True, True]


# -- Memory --------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_an_epoch_allocates_the_order_and_the_losses_and_no_more():
    """With less memory left than the rows take, after one epoch over few of them."""
    code = """
        import resource, torch
        from relu_mlp import ReluMLP, TrainingStep
        torch.set_num_threads(1)
        rows = 2**19
        net = ReluMLP(64, 8, 1)
        step = TrainingStep(net, "mse", torch.optim.Adam(net.parameters()))
        x, target = torch.randn(rows, 64), torch.randn(rows, 1)
        for shuffle in (True, False):
            step.epoch(x[:5000], target[:5000], 512, shuffle=shuffle)
        assert step.reason is None
        used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        # x has 128 MiB, the order 4 MiB.
        resource.setrlimit(resource.RLIMIT_AS, (used + 2**25, -1))
        for shuffle in (True, False):
            for batch_size in (512, 8192):
                step.epoch(x, target, batch_size, shuffle=shuffle)
        assert step.reason is None
        print("done")
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True
    )
    assert done.stdout == "done\n", done.stderr


def test_training_leaves_nothing_behind():
    """Memory of Python and of C++ does not grow with the number of steps."""
    from kernels.test_memory import left_behind, mallinfo

    if mallinfo is None:
        pytest.skip("needs mallinfo2 of glibc 2.33")
    net = support.twins(3, [8, 8], 2)[1]
    step = TrainingStep(net, "mse", torch.optim.Adam(net.parameters()), max_norm=1.0)
    x, target = torch.ones(8, 3), torch.ones(8, 2)
    step(x, target)
    for call_ in (lambda: step(x, target), lambda: step.epoch(x, target, 3)):
        heap, blocks = left_behind(call_, 200)
        assert heap <= 8 and blocks < 1
    assert ops.LIBRARY_PATH is None or step.reason is None
