"""`TrainingStep` of several networks: every one is trained as if it were alone, bit for bit.

"Alone" is a `TrainingStep` of a copy of the network, with an optimizer of the same kind. The bits
must agree whether the operator serves all networks, some of them or none.
"""

import copy
import itertools
import pickle
import random
import warnings

import pytest
import torch
from torch import nn

import relu_mlp
import support
from relu_mlp import ReluMLP, TrainingStep, ops
from relu_mlp.training import LOSSES

SETS = relu_mlp.build_info().supported_instruction_sets
T = torch.ops.relu_mlp_testing
needs_library = pytest.mark.skipif(ops.LIBRARY_PATH is None, reason="needs the extension")
may_diverge = pytest.mark.filterwarnings("ignore:the gradients are not finite")

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9, weight_decay=0.01),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.8, nesterov=True, maximize=True),
    "dampening": lambda p: torch.optim.SGD(p, lr=0.03, momentum=0.7, dampening=0.5),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.1),
    "amsgrad": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True, betas=(0.7, 0.95)),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.02, weight_decay=0.3),
    # the operator does not know these
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.5, centered=True),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.01),
    "asgd": lambda p: torch.optim.ASGD(p, lr=0.01, t0=2),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01),
}
SERVED = list(OPTIMIZERS)[:7]


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(params=SETS)
def instruction_set(request):
    before = relu_mlp.build_info().instruction_set
    T.choose_instruction_set(request.param)
    yield request.param
    T.choose_instruction_set(before)


def networks(count=3, sizes=(3, 5, 2), dtype=torch.float32, bias=True, activation=None, seed=0):
    torch.manual_seed(seed)
    return [
        ReluMLP(sizes[0], sizes[1:-1], sizes[-1], bias, activation, dtype=dtype)
        for _ in range(count)
    ]


def data(rows, sizes=(3, 5, 2), of_networks=(), dtype=torch.float32):
    torch.manual_seed(1)
    return [
        torch.randn(*of_networks, rows, size, dtype=torch.float64).to(dtype)
        for size in (sizes[0], sizes[-1])
    ]


def of(tensor, e, dim):
    """The part of network e; all networks share a tensor of `dim` dimensions."""
    return tensor if tensor is None or tensor.dim() == dim else tensor[e]


def sgd(nets, lr=0.1):
    return [torch.optim.SGD(net.parameters(), lr=lr) for net in nets]


def ensemble(nets, make, loss="mse", **options):
    """The step of copies of the networks, and one step for each of the networks alone.

    make(net) is an optimizer; or there is such a function for each network.
    """
    makes = make if isinstance(make, list) else [make] * len(nets)
    copies = copy.deepcopy(nets)
    optimizers = [own(net) for own, net in zip(makes, copies, strict=True)]
    alone = [
        TrainingStep(net, loss, own(net), **options) for own, net in zip(makes, nets, strict=True)
    ]
    return TrainingStep(copies, loss, optimizers, **options), alone


def assert_same_training(step, alone):
    """Parameters, the state of the optimizers, gradients that were left."""
    for e, single in enumerate(alone):
        assert_same_networks(step.net[e], single.net, f"network {e}")
        for found, expected in zip(step.net[e].parameters(), single.net.parameters(), strict=True):
            assert found.grad is None
            state = step.optimizer[e].state.get(found, {})
            of_single = single.optimizer.state.get(expected, {})
            assert list(state) == list(of_single)
            for name, value in state.items():
                if isinstance(value, torch.Tensor):
                    support.assert_same(value, of_single[name], f"{name} of network {e}")
                else:
                    assert value == of_single[name]


def assert_same_networks(net, other, name="the network"):
    for (key, found), expected in zip(net.named_parameters(), other.parameters(), strict=True):
        support.assert_same(found.detach(), expected.detach(), f"{key} of {name}")


def reason_of(alone):
    """The reason of an ensemble: that of the first network that the operator does not serve."""
    return next((single.reason for single in alone if single.reason), None)


# -- The same as alone -------------------------------------------------------------------


def random_optimizer(draw, names):
    """make(net): an optimizer of a random kind, for one to three groups of parameters."""
    kind, count = OPTIMIZERS[draw.choice(names)], draw.choice([1, 1, 2, 3])
    lrs = [draw.uniform(0, 0.05) for _ in range(count)]

    def make(net):
        parameters = list(net.parameters())
        groups = [{"params": parameters[n::count], "lr": lr} for n, lr in enumerate(lrs)]
        return kind([group for group in groups if group["params"]])

    return make


class Case:
    """Random networks, their optimizers and their data."""

    def __init__(self, seed, dtype, names=SERVED):
        draw = random.Random(seed)
        count = draw.choice([1, 2, 3, 5])
        sizes = [draw.choice([1, 2, 3, 8, 17, 33]) for _ in range(draw.choice([2, 3, 4]))]
        rows = draw.choice([1, 7, 20, 130])
        loss = draw.choice(list(LOSSES))
        self.batch = draw.choice([1, 3, 8, 64, 200])
        activation = draw.choice([None, "relu", "sigmoid", "tanh"])
        nets = networks(count, sizes, dtype, draw.random() < 0.8, activation, seed=seed)
        for net in nets:
            if draw.random() < 0.2 and len(sizes) > 2:
                net[0].requires_grad_(False)
        makes = [random_optimizer(draw, names) for _ in nets]
        self.step, self.alone = ensemble(nets, makes, loss, max_norm=draw.choice([None, 0.1, 1.0]))
        self.x = data(rows, sizes, draw.choice([(), (count,)]), dtype)[0]
        self.target = data(rows, sizes, draw.choice([(), (count,)]), dtype)[1]
        self.target_dim = 2
        if loss == "cross_entropy" and draw.random() < 0.5:
            self.target, self.target_dim = self.target.argmax(-1), 1
        self.orders = []
        for _ in range(3):
            n = draw.choice([rows, max(1, rows // 2)])
            each = [torch.randint(rows, (n,)) for _ in nets]
            self.orders.append(draw.choice([None, each[0], torch.stack(each)]))

    def losses(self, step, x, target, orders):
        """Those of epochs, of a single step and of repeated ones, in the last dimension."""
        parts = [step.epoch(x, target, self.batch, shuffle=False, order=o) for o in orders]
        parts += [step(x, target)[..., None], step.repeat(x, target, 3)]
        return torch.cat(parts, -1)

    def check(self):
        losses = self.losses(self.step, self.x, self.target, self.orders)
        for e, single in enumerate(self.alone):
            own = of(self.x, e, 2), of(self.target, e, self.target_dim)
            orders = [of(order, e, 1) for order in self.orders]
            expected = self.losses(single, *own, orders)
            support.assert_same(losses[e], expected, f"losses of network {e}")
        assert_same_training(self.step, self.alone)
        assert self.step.reason == reason_of(self.alone)
        return self.step.reason


@may_diverge
@pytest.mark.covering(strength=2)
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("seed", range(20))
def test_each_as_if_alone(backend, threads, seed, dtype, count):
    threads(count)
    reason = Case(seed, dtype).check()
    assert reason == (None if backend == "extension" else "the extension is not used")


@may_diverge
@pytest.mark.skipif(not SETS, reason="needs the extension")
@pytest.mark.covering(strength=2)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("seed", range(100, 106))
def test_each_as_if_alone_on_every_instruction_set(instruction_set, threads, seed, dtype):
    threads(1 + seed % 2)
    assert Case(seed, dtype).check() is None


@may_diverge
@pytest.mark.parametrize("seed", range(200, 210))
def test_optimizers_that_the_operator_does_not_know(backend, seed):
    """Next to others that it knows. Those have its bits, because alone they have."""
    Case(seed, torch.float32, list(OPTIMIZERS)).check()


@needs_library
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_where_pytorch_computes_the_products(threads, dtype, count):
    """Inside of a parallel loop its products have other bits than on several threads."""
    threads(count)
    sizes, rows = [1001, 1023, 7], 257
    step, alone = ensemble(
        networks(3, sizes, dtype), lambda net: torch.optim.SGD(net.parameters(), lr=0.01)
    )
    x, target = data(rows, sizes, (), dtype)
    losses = step.repeat(x, target, 2)
    for e, single in enumerate(alone):
        support.assert_same(losses[e], single.repeat(x, target, 2), f"network {e}")
    assert_same_training(step, alone)


@pytest.mark.parametrize("seed", range(3))
def test_single_steps(backend, seed):
    """Served by the native node, where it was built, from the second on."""
    step, alone = ensemble(networks(), [random_optimizer(random.Random(seed), SERVED)] * 3)
    for rows, own in itertools.product([9, 1, 4], [(), (3,)]):
        x, target = data(rows, of_networks=own)
        losses = step(x, target)
        assert losses.shape == (3,)
        assert not losses.requires_grad
        for e, single in enumerate(alone):
            support.assert_same(losses[e], single(of(x, e, 2), of(target, e, 2)), f"network {e}")
    assert_same_training(step, alone)
    assert step.reason == (None if backend == "extension" else "the extension is not used")


@pytest.mark.parametrize("own", [(), (3,)], ids=["one target", "one for each"])
def test_classes(backend, own):
    """A target of class indices is (rows,), or (networks, rows)."""
    x, target = data(9, of_networks=own)
    target = target.argmax(-1)
    step, alone = ensemble(
        networks(), lambda net: torch.optim.SGD(net.parameters(), lr=0.1), "cross_entropy"
    )
    losses = torch.cat([step.epoch(x, target, 4, shuffle=False), step(x, target)[:, None]], 1)
    for e, single in enumerate(alone):
        arguments = of(x, e, 2), of(target, e, 1)
        expected = [*single.epoch(*arguments, 4, shuffle=False), single(*arguments)]
        support.assert_same(losses[e], torch.stack(expected), f"network {e}")
    assert_same_training(step, alone)


def test_layouts_of_the_data(backend):
    """Rows apart in memory, and classes by column."""
    x, target = data(9, of_networks=(3,))
    step, alone = ensemble(
        networks(), lambda net: torch.optim.SGD(net.parameters(), lr=0.1), "cross_entropy"
    )
    x, target = x.repeat_interleave(2, 1)[:, ::2], target.argmax(-1)
    target = target.T.contiguous().T
    assert not x.is_contiguous() and not target.is_contiguous()
    losses = torch.cat([step.epoch(x, target, 4, False), step(x, target)[:, None]], 1)
    for e, single in enumerate(alone):
        expected = [*single.epoch(x[e], target[e], 4, False), single(x[e], target[e])]
        support.assert_same(losses[e], torch.stack(expected), f"network {e}")
    assert_same_training(step, alone)


def test_missing_biases_and_sequential(backend):
    nets = [
        nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2, bias=False), nn.Tanh())
        for _ in range(3)
    ]
    x, target = data(9)
    step, alone = ensemble(nets, lambda net: torch.optim.AdamW(net.parameters(), lr=0.1))
    step.repeat(x, target, 4)
    for single in alone:
        single.repeat(x, target, 4)
    assert_same_training(step, alone)


def test_a_list_of_one_network(backend):
    step, (alone,) = ensemble(networks(1), lambda net: torch.optim.Adam(net.parameters()))
    x, target = data(9)
    assert step(x, target).shape == (1,)
    assert step.repeat(x[None], target, 2).shape == (1, 2)
    assert step.epoch(x, target[None], 4, False).shape == (1, 3)
    alone(x, target)
    alone.repeat(x, target, 2)
    alone.epoch(x, target, 4, False)
    assert_same_training(step, [alone])


def test_tuples_and_what_a_step_shows():
    nets = tuple(networks(2))
    optimizers = (torch.optim.SGD(nets[0].parameters()), torch.optim.Adam(nets[1].parameters()))
    step = TrainingStep(nets, "mse", optimizers, max_norm=2)
    assert list(step.net) == list(nets)
    assert list(step.optimizer) == list(optimizers)
    assert (step.loss, step.max_norm) == ("mse", 2)
    assert repr(step) == "TrainingStep(2 networks, 'mse', SGD and Adam)"


def test_a_list_that_changes_later():
    nets = networks(2)
    optimizers = sgd(nets)
    step = TrainingStep(nets, "mse", optimizers)
    nets.pop()
    optimizers.clear()
    assert (len(step.net), len(step.optimizer)) == (2, 2)
    assert step(*data(4)).shape == (2,)


# -- Optimizers --------------------------------------------------------------------------


def test_the_first_step_creates_the_state(backend):
    nets = networks()
    step = TrainingStep(nets, "sse", [torch.optim.Adam(net.parameters()) for net in nets])
    x, target = data(9)
    step(x, target)
    for net, optimizer in zip(nets, step.optimizer, strict=True):
        assert set(optimizer.state) == set(net.parameters())
    step(x, target)
    assert step.reason == (None if backend == "extension" else "the extension is not used")


def test_a_network_that_has_a_state_already(backend):
    """Its own step is the operator's, as it is alone; the others create their states."""
    step, alone = ensemble(
        networks(), lambda net: torch.optim.Adam(net.parameters(), lr=0.01, eps=1e-9)
    )
    x, target = data(9)
    TrainingStep(step.net[1], "mse", step.optimizer[1]).repeat(x, target, 2)
    alone[1].repeat(x, target, 2)
    losses = step.repeat(x, target, 1)
    for e, single in enumerate(alone):
        support.assert_same(losses[e], single.repeat(x, target, 1), f"network {e}")
    assert_same_training(step, alone)


def test_a_saved_training_goes_on(backend):
    x, target = data(9)

    def start():
        nets = networks()
        lrs = [0.1, 0.2, 0.3]
        optimizers = [
            torch.optim.Adam(net.parameters(), lr=lr) for net, lr in zip(nets, lrs, strict=True)
        ]
        return TrainingStep(nets, "mse", optimizers)

    step = start()
    step.repeat(x, target, 2)
    saved = copy.deepcopy([part.state_dict() for part in (*step.net, *step.optimizer)])
    losses = step.repeat(x, target, 3)
    other = start()
    for part, state in zip((*other.net, *other.optimizer), saved, strict=True):
        part.load_state_dict(state)
    support.assert_same(other.repeat(x, target, 3), losses, "losses")
    for net, expected in zip(other.net, step.net, strict=True):
        assert_same_networks(net, expected)


@pytest.mark.parametrize("by_call", [True, False])
def test_optimizers_that_share_a_state(backend, by_call):
    """PyTorch's load_state_dict does not copy. Networks then take turns, as in a loop of steps."""
    x, target = data(9)
    nets = networks(2)
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9) for net in nets]
    TrainingStep(nets[0], "mse", optimizers[0])(x, target)
    optimizers[1].load_state_dict(optimizers[0].state_dict())
    states = [optimizer.state[net[0].weight] for net, optimizer in zip(nets, optimizers)]
    assert states[0]["momentum_buffer"] is states[1]["momentum_buffer"]
    others, own = copy.deepcopy((nets, optimizers))
    step = TrainingStep(nets, "mse", optimizers)
    alone = [TrainingStep(*each) for each in zip(others, ["mse", "mse"], own, strict=True)]
    for _ in range(3):
        losses = step(x, target) if by_call else step.repeat(x, target, 1)[:, 0]
        for e, single in enumerate(alone):
            support.assert_same(losses[e], single(x, target), f"network {e}")
    assert_same_training(step, alone)
    if backend == "extension":
        assert step.reason == "two networks share their memory"


def test_parameters_that_come_to_share_memory(backend):
    nets = networks(2)
    step = TrainingStep(nets, "sse", sgd(nets))
    x, target = data(9)
    step(x, target)
    assert step.reason != "two networks share their memory"
    step.net[1][0].weight.data = step.net[0][0].weight.data
    step(x, target)
    if backend == "extension":
        assert step.reason == "two networks share their memory"


def test_learning_rates_may_change(backend):
    x, target = data(9)
    step, alone = ensemble(networks(), lambda net: torch.optim.SGD(net.parameters(), lr=9), "mse")
    for lrs in ([0.5, 0.25, 0.0], [0.125, 0.0, 0.75]):
        for e, lr in enumerate(lrs):
            step.optimizer[e].param_groups[0]["lr"] = lr
            alone[e].optimizer.param_groups[0]["lr"] = lr
        losses = step(x, target)
        for e, single in enumerate(alone):
            support.assert_same(losses[e], single(x, target), f"network {e}")
    assert_same_training(step, alone)


def test_schedulers(backend):
    x, target = data(9)
    step, alone = ensemble(networks(), lambda net: torch.optim.Adam(net.parameters(), lr=0.1))

    def scheduler(optimizer, e):
        return torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5 + 0.1 * e)

    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a scheduler warns if it sees no step
        schedulers = [scheduler(optimizer, e) for e, optimizer in enumerate(step.optimizer)]
        for _ in range(4):
            step(x, target)
            for own in schedulers:
                own.step()
        for e, single in enumerate(alone):
            own = scheduler(single.optimizer, e)
            for _ in range(4):
                single(x, target)
                own.step()
    assert_same_training(step, alone)


def test_hooks_of_an_optimizer(backend):
    """The networks without hooks are served nevertheless."""
    step, alone = ensemble(networks(), lambda net: torch.optim.SGD(net.parameters(), lr=0.1))
    seen = []
    step.optimizer[1].register_step_post_hook(lambda *a: seen.append(a[0]))
    alone[1].optimizer.register_step_post_hook(lambda *a: None)
    x, target = data(9)
    losses = step.repeat(x, target, 2)
    assert seen == [step.optimizer[1]] * 2
    for e, single in enumerate(alone):
        support.assert_same(losses[e], single.repeat(x, target, 2), f"network {e}")
    assert_same_training(step, alone)
    assert step.reason == reason_of(alone)
    assert "hooks" in step.reason or backend == "reference"


def test_an_optimizer_with_parameters_of_two_networks(backend):
    """Its step for one network leaves the other alone, whose gradients are not there."""
    nets = networks(2)
    both = [*nets[0].parameters(), *nets[1].parameters()]
    optimizers = [torch.optim.SGD(both, lr=0.1), torch.optim.SGD(nets[1].parameters(), lr=0.2)]
    others, own = copy.deepcopy((nets, optimizers))
    step = TrainingStep(nets, "mse", optimizers)
    alone = [TrainingStep(*each) for each in zip(others, ["mse", "mse"], own, strict=True)]
    losses = step(*data(9))
    for e, single in enumerate(alone):
        support.assert_same(losses[e], single(*data(9)), f"network {e}")
    for net, expected in zip(nets, others, strict=True):
        assert_same_networks(net, expected)
    assert "not net's" in step.reason or backend == "reference"


# -- Networks that the operator does not serve -------------------------------------------


def add_hook(net):
    net[0].register_forward_hook(lambda *_: None)


def add_hook_of_parameter(net):
    net[0].weight.register_hook(lambda grad: 2 * grad)


def replace_layer(net):
    net[1] = nn.GELU()


def freeze(net):
    net.requires_grad_(False)
    net[2].bias.requires_grad_(True)


@pytest.mark.parametrize("change", [add_hook, add_hook_of_parameter, replace_layer, freeze])
@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_one_network_that_differs(backend, name, change):
    step, alone = ensemble(networks(), lambda net: OPTIMIZERS[name](net.parameters()))
    x, target = data(9)
    for part in (step, *alone):
        part(x, target)  # now they have states
    change(step.net[1])
    change(alone[1].net)
    losses = torch.cat([step(x, target)[:, None], step.epoch(x, target, 4, False)], 1)
    for e, single in enumerate(alone):
        expected = [single(x, target), *single.epoch(x, target, 4, False)]
        support.assert_same(losses[e], torch.stack(expected), f"network {e}")
    assert_same_training(step, alone)
    assert step.reason == reason_of(alone)
    if backend == "extension":
        assert (step.reason is None) == (change is freeze)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sixteen_bits(backend, dtype):
    step, alone = ensemble(
        networks(dtype=dtype), lambda net: torch.optim.SGD(net.parameters(), lr=0.1)
    )
    x, target = data(9, of_networks=(3,), dtype=dtype)
    losses = step.epoch(x, target, 4, False)
    assert losses.dtype is dtype
    for e, single in enumerate(alone):
        support.assert_same(losses[e], single.epoch(x[e], target[e], 4, False), f"network {e}")
    assert_same_training(step, alone)
    assert "not float32 or float64" in step.reason


def test_autocast(backend):
    step, alone = ensemble(networks(), lambda net: torch.optim.SGD(net.parameters(), lr=0.1))
    x, target = data(9)
    with torch.autocast("cpu", torch.bfloat16):
        losses = step(x, target.bfloat16())
        for e, single in enumerate(alone):
            support.assert_same(losses[e], single(x, target.bfloat16()), f"network {e}")
    assert_same_training(step, alone)
    assert "autocast" in step.reason


# -- Orders of rows ----------------------------------------------------------------------


@pytest.mark.parametrize("seeds", [[3], [3, 4, 5]], ids=["one", "one for each"])
def test_generators(backend, seeds):
    """One generator is one order for all; several are one for each."""
    x, target = data(20)
    step, alone = ensemble(networks(), lambda net: torch.optim.SGD(net.parameters(), lr=0.1))
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    given = tuple(generators) if len(seeds) > 1 else generators[0]
    losses = [step.epoch(x, target, 6, generator=given) for _ in range(2)]
    assert losses[0].shape == (3, 4)
    for e, single in enumerate(alone):
        generator = torch.Generator().manual_seed(seeds[e % len(seeds)])
        for found in losses:
            expected = single.epoch(x, target, 6, generator=generator)
            support.assert_same(found[e], expected, f"network {e}")
    assert_same_training(step, alone)


def test_the_default_generator(backend):
    x, target = data(20)
    step, alone = ensemble(networks(), lambda net: torch.optim.SGD(net.parameters(), lr=0.1))
    for part in (step, *alone):
        torch.manual_seed(5)
        part.epoch(x, target, 6)
    assert_same_training(step, alone)


def test_an_order_of_one_network(backend):
    """Rows may be left out, and repeated."""
    x, target = data(20)
    one, other = networks(1)[0], networks(1)[0]
    order = torch.tensor([4, 19, 0, 4, 7, 8, 2])
    step = TrainingStep(one, "mse", torch.optim.SGD(one.parameters(), lr=0.1))
    losses = step.epoch(x, target, 3, order=order)
    alone = TrainingStep(other, "mse", torch.optim.SGD(other.parameters(), lr=0.1))
    expected = [alone(x[rows], target[rows]) for rows in order.split(3)]
    support.assert_same(losses, torch.stack(expected), "losses")
    # Twice as many rows as x has
    order = torch.arange(40) % 20
    losses = step.epoch(x, target, 3, order=order)
    expected = [alone(x[rows], target[rows]) for rows in order.split(3)]
    support.assert_same(losses, torch.stack(expected), "losses of 40 rows")
    # Every other number of a larger tensor
    step.epoch(x, target, 3, order=torch.arange(20)[::2])
    alone.epoch(x[::2], target[::2], 3, shuffle=False)
    assert_same_networks(one, other)


def make_step(loss="mse", sizes=(3, 4, 2)):
    nets = networks(3, sizes)
    return TrainingStep(nets, loss, sgd(nets))


def test_no_rows(backend):
    step = make_step("sse")
    before = copy.deepcopy(step.net)
    assert step.epoch(*data(0), 4).shape == (3, 0)
    assert step.epoch(*data(5), 4, order=torch.empty(3, 0, dtype=torch.int64)).shape == (3, 0)
    assert step.repeat(*data(5), 0).shape == (3, 0)
    assert step(*data(0)).tolist() == [0, 0, 0]
    for net, expected in zip(step.net, before, strict=True):
        assert_same_networks(net, expected)


def test_progress(backend):
    seen = []
    make_step().repeat(*data(8), 20, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (20, 20)
    assert all(a < b for a, b in itertools.pairwise(done for done, _ in seen))


def test_what_is_not_finite_warns_and_names_the_step(backend):
    step = make_step()
    x, target = data(8, of_networks=(3,))
    x[1, 5] = torch.inf
    with pytest.warns(RuntimeWarning, match="in step 2 of 4"):
        losses = step.epoch(x, target, 2, shuffle=False)
    assert losses.isfinite().all(1).tolist() == [True, False, True]


@pytest.mark.parametrize("unserved", [1, 2])
def test_what_is_not_finite_in_one_of_several_by_themselves(backend, unserved):
    """Also in a network that the operator serves although it does not serve another."""
    step = make_step()
    add_hook(step.net[unserved])
    x, target = data(8, of_networks=(3,))
    x[1, 5] = torch.inf
    with pytest.warns(RuntimeWarning, match="in step 2 of 4"):
        step.epoch(x, target, 2, shuffle=False)


def test_gradients_that_overflow_warn_too(backend):
    """The loss of the step is finite."""
    step = make_step("sse")
    x, target = data(4, of_networks=(3,))
    x[2], target[2] = 1e29, 0
    step.net[2][0].weight.data.fill_(1e-7)
    step.net[2][2].weight.data.fill_(1e-5)
    with pytest.warns(RuntimeWarning, match="in step 0 of 1"):
        losses = step.repeat(x, target, 1)
    assert losses.isfinite().all()


# -- Copies ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda step: pickle.loads(pickle.dumps(step))],
    ids=["copy", "pickle"],
)
def test_a_copy_has_networks_of_its_own(backend, duplicate):
    nets = networks()
    step = TrainingStep(nets, "mse", [torch.optim.Adam(net.parameters()) for net in nets])
    x, target = data(9)
    step.repeat(x, target, 2)
    other = duplicate(step)
    before = copy.deepcopy(nets)
    losses = other.repeat(x, target, 3)
    for net, expected in zip(nets, before, strict=True):
        assert_same_networks(net, expected)
    support.assert_same(step.repeat(x, target, 3), losses, "losses")
    for net, expected in zip(other.net, step.net, strict=True):
        assert_same_networks(net, expected)


# -- Mistakes ----------------------------------------------------------------------------


def shared_layer():
    nets = networks(2)
    nets[1][2] = nets[0][2]
    return nets, sgd(nets)


def one_network_twice():
    net = networks(1)[0]
    return [net, net], sgd([net, net])


def one_optimizer_twice():
    nets = networks(2)
    both = torch.optim.SGD([*nets[0].parameters(), *nets[1].parameters()])
    return nets, [both, both]


def with_nets(change):
    """Two networks after a change of their list, and the optimizers that they had before."""

    def make():
        nets = networks(2)
        optimizers = sgd(nets)
        return change(nets), optimizers

    return make


def with_optimizers(change):
    def make():
        nets = networks(2)
        return nets, change(nets, sgd(nets))

    return make


CONSTRUCTORS = {
    "no networks": (lambda: ([], []), ValueError, "net must have at least one network, got none"),
    "no optimizers": (
        with_optimizers(lambda nets, own: []),
        ValueError,
        "one for each of the 2 networks, got 0",
    ),
    "too many optimizers": (
        with_nets(lambda nets: nets[:1]),
        ValueError,
        "one for each of the 1 networks, got 2",
    ),
    "one optimizer": (
        with_optimizers(lambda nets, own: own[0]),
        TypeError,
        "optimizer must be a list with one for each network, got SGD",
    ),
    "a list of optimizers for one network": (
        with_nets(lambda nets: nets[0]),
        TypeError,
        "optimizer must be an Optimizer, got list",
    ),
    "a number": (
        with_nets(lambda nets: [nets[0], 3]),
        TypeError,
        r"net\[1\] must be an nn.Module, got int",
    ),
    "a string": (with_nets(lambda nets: "ab"), TypeError, "net must be an nn.Module, got str"),
    "a generator": (
        with_nets(iter),
        TypeError,
        "net must be an nn.Module, got list_iterator",
    ),
    "a number as an optimizer": (
        with_optimizers(lambda nets, own: [own[0], 3]),
        TypeError,
        r"optimizer\[1\] must be an Optimizer, got int",
    ),
    "a closure": (
        with_optimizers(lambda nets, own: [own[0], torch.optim.LBFGS(nets[1].parameters())]),
        TypeError,
        r"optimizer\[1\] must step without a closure, got LBFGS",
    ),
    "optimizers of each other": (
        with_optimizers(lambda nets, own: own[::-1]),
        ValueError,
        r"optimizer\[0\] must have parameters of net\[0\], got none",
    ),
    "the same optimizer twice": (
        one_optimizer_twice,
        ValueError,
        "optimizer must have another one for each network, got one twice",
    ),
    "the same network twice": (
        one_network_twice,
        ValueError,
        r"net\[1\] must have parameters of its own, got one of net\[0\]",
    ),
    "a shared layer": (
        shared_layer,
        ValueError,
        r"net\[1\] must have parameters of its own, got one of net\[0\]",
    ),
}


@pytest.mark.parametrize("name", CONSTRUCTORS)
def test_wrong_constructors(name):
    make, error, message = CONSTRUCTORS[name]
    nets, optimizers = make()
    with pytest.raises(error, match=message):
        TrainingStep(nets, "mse", optimizers)


@pytest.mark.parametrize(
    "second",
    [
        lambda: ReluMLP(3, [6], 2),
        lambda: ReluMLP(3, [5, 5], 2),
        lambda: ReluMLP(3, [5], 2, bias=False),
        lambda: nn.Linear(3, 2),
    ],
)
def test_networks_of_different_shapes(second):
    nets = [ReluMLP(3, [5], 2), second()]
    message = r"net\[1\] must have parameters of the shapes \[\(5, 3\), .* like net\[0\], got"
    with pytest.raises(ValueError, match=message):
        TrainingStep(nets, "mse", sgd(nets))


def calls_of(step, x, target):
    return [
        lambda: step(x, target),
        lambda: step.repeat(x, target, 2),
        lambda: step.epoch(x, target, 20),
    ]


@pytest.mark.parametrize("shape", [(3,), (2, 5, 3), (1, 3, 5, 3), ()], ids=str)
def test_wrong_dimensions(backend, shape):
    step = make_step()
    step(*data(4))  # the node knows it now
    expected = "must have 2 dimensions, or 3 networks in front of them, got shape"
    for call in calls_of(step, torch.ones(shape), torch.ones(5, 2)):
        with pytest.raises(RuntimeError, match=f"x {expected}"):
            call()
    for call in calls_of(step, torch.ones(5, 3), torch.ones(shape)):
        with pytest.raises(RuntimeError, match=f"target {expected}"):
            call()


@pytest.mark.parametrize("shape", [(), (5, 1), (2, 5), (3, 5, 1)], ids=str)
def test_wrong_dimensions_of_classes(backend, shape):
    step = make_step("cross_entropy")
    target = torch.zeros(shape, dtype=torch.int64)
    for call in calls_of(step, torch.ones(5, 3), target):
        with pytest.raises(RuntimeError, match="target must have 1 dimensions, or 3 networks"):
            call()


def frozen(step):
    return copy.deepcopy([part.state_dict() for part in (*step.net, *step.optimizer)])


def assert_unchanged(step, before):
    assert str(frozen(step)) == str(before)
    assert all(p.grad is None for net in step.net for p in net.parameters())


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize(
    ("x", "target"),
    [
        (torch.ones(5, 4), torch.ones(5, 1)),
        (torch.ones(5, 3), torch.ones(5, 2)),
        (torch.ones(5, 3), torch.ones(4, 1)),
        (torch.ones(3, 5, 3), torch.ones(3, 4, 1)),
        (torch.ones(3, 5, 3), torch.ones(4, 1)),
        (torch.ones(5, 3).double(), torch.ones(5, 1).double()),
        (torch.ones(5, 3), torch.ones(5, 1).double()),
    ],
    ids=str,
)
def test_a_refused_step_changes_nothing(backend, x, target, optimizer):
    nets = networks(3, (3, 4, 1))
    step = TrainingStep(nets, "mse", [OPTIMIZERS[optimizer](net.parameters()) for net in nets])
    for _ in range(2):
        before = frozen(step)
        with pytest.raises(RuntimeError):
            step(x, target)
        assert_unchanged(step, before)
        step(*data(5, (3, 4, 1)))  # now there is state


@pytest.mark.parametrize("unserved", [(), (0,), (2,), (0, 1, 2)], ids=str)
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_a_class_out_of_range_in_one_network_changes_none(backend, optimizer, unserved):
    """Wherever that network is, and whether the operator serves it."""
    nets = networks()
    step = TrainingStep(
        nets, "cross_entropy", [OPTIMIZERS[optimizer](net.parameters()) for net in nets]
    )
    x, target = data(9, of_networks=(3,))
    target = target.argmax(-1)
    for e in unserved:
        add_hook(nets[e])
    for wrong in range(3):
        bad = target.clone()
        bad[wrong, 4] = 2
        before = frozen(step)
        for call in calls_of(step, x, bad):
            with pytest.raises(IndexError, match="2"):
                call()
            assert_unchanged(step, before)
        step(x, target)


@pytest.mark.parametrize("wrong", [1, 2])
@pytest.mark.parametrize("hooked", [None, 0])
def test_a_dtype_of_one_network_changes_none(backend, wrong, hooked):
    nets = networks()
    nets[wrong].double()
    step = TrainingStep(nets, "mse", sgd(nets))
    if hooked is not None:
        add_hook(nets[hooked])
    before = frozen(step)
    for call in calls_of(step, *data(9)):
        with pytest.raises(RuntimeError):
            call()
        assert_unchanged(step, before)


def test_what_is_not_a_tensor(backend):
    step = make_step()
    for call in calls_of(step, [[1.0]], torch.ones(1, 2)):
        with pytest.raises(TypeError, match="x must be a Tensor, got list"):
            call()
    for call in calls_of(step, torch.ones(1, 3), None):
        with pytest.raises(TypeError, match="target must be a Tensor, got NoneType"):
            call()


def test_rows_that_differ(backend):
    step = make_step()
    with pytest.raises(ValueError, match="target must have 5 rows like x, got 4"):
        step.epoch(torch.ones(3, 5, 3), torch.ones(4, 2), 2)


ORDERS = [
    (torch.zeros(2, 5, dtype=torch.int64), ValueError, r"\(n,\) or \(3, n\), got \(2, 5\)"),
    (torch.zeros(3, 1, 5, dtype=torch.int64), ValueError, r"got \(3, 1, 5\)"),
    (torch.tensor(0), ValueError, r"got \(\)"),
    (torch.zeros(5), IndexError, "order must be int64, got float32"),
    (torch.zeros(5, dtype=torch.int32), IndexError, "order must be int64, got int32"),
    (torch.tensor([0, 8]), IndexError, r"order must have numbers of rows in \[0, 8\), got 8"),
    (torch.tensor([[0], [-1], [0]]), IndexError, r"in \[0, 8\), got -1"),
    ([0, 1], TypeError, "order must be a Tensor, got list"),
]


@pytest.mark.parametrize(("order", "error", "message"), ORDERS)
def test_wrong_orders(backend, order, error, message):
    with pytest.raises(error, match=message):
        make_step().epoch(*data(8), 4, order=order)


def test_an_order_for_each_of_one_network(backend):
    net = ReluMLP(3, [4], 2)
    step = TrainingStep(net, "mse", torch.optim.SGD(net.parameters()))
    with pytest.raises(ValueError, match=r"order must have shape \(n,\), got \(1, 8\)"):
        step.epoch(*data(8), 4, order=torch.arange(8)[None])
    with pytest.raises(TypeError, match=r"generator must be a torch.Generator, got list"):
        step.epoch(*data(8), 4, generator=[torch.Generator()])


def test_wrong_generators():
    def epoch(generator, **options):
        make_step().epoch(*data(8), 4, generator=generator, **options)

    with pytest.raises(ValueError, match="generator must have 3 generators, got 2"):
        epoch([torch.Generator()] * 2)
    with pytest.raises(TypeError, match=r"torch\.Generator or a sequence of them, got int"):
        epoch(3)
    with pytest.raises(ValueError, match="generator must be None if there is an order"):
        epoch(torch.Generator(), order=torch.arange(8))
