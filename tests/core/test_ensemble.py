"""`ReluMLPEnsemble`, and its `TrainingStep`: every network is trained as if it were alone.

"Alone" is a `TrainingStep` of a `ReluMLP` with an optimizer of its own. The bits must agree, with
the operator and without it.
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
from relu_mlp import ReluMLP, ReluMLPEnsemble, TrainingStep
from relu_mlp.training import LOSSES

SETS = relu_mlp.build_info().supported_instruction_sets
T = torch.ops.relu_mlp_testing

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


def data(rows, sizes=(3, 5, 2), stacked=(), dtype=torch.float32):
    torch.manual_seed(1)
    return [
        torch.randn(*stacked, rows, size, dtype=torch.float64).to(dtype)
        for size in (sizes[0], sizes[-1])
    ]


def of(tensor, e, dim):
    """The part of network e; all networks share a tensor of `dim` dimensions."""
    return tensor if tensor is None or tensor.dim() == dim else tensor[e]


def assert_same_networks(ensemble, nets):
    for e, net in enumerate(nets):
        for (name, found), expected in zip(
            ensemble.network(e).named_parameters(), net.parameters(), strict=True
        ):
            support.assert_same(found.detach(), expected.detach(), f"network {e}, {name}")
            assert found.requires_grad == expected.requires_grad


def assert_same_state(ensemble, optimizer, nets, optimizers):
    """The states are stacked; a count that is the same in all networks is one number."""
    for parameter, *each in zip(
        ensemble.parameters(), *(net.parameters() for net in nets), strict=True
    ):
        state = optimizer.state.get(parameter, {})
        singles = [single.state.get(p, {}) for single, p in zip(optimizers, each, strict=True)]
        assert all(list(single) == list(state) for single in singles)
        for name, value in state.items():
            for e, single in enumerate(singles):
                if isinstance(value, torch.Tensor):
                    own = value[e] if value.dim() else value
                    support.assert_same(own, single[name], f"{name} of network {e}")
                else:
                    assert value == single[name]
        assert parameter.grad is None


# -- The same as alone -------------------------------------------------------------------


class Case:
    """A random ensemble, its optimizer and its data."""

    def __init__(self, seed, dtype, names=SERVED):
        draw = random.Random(seed)
        self.count = draw.choice([1, 2, 3, 5])
        self.sizes = [draw.choice([1, 2, 3, 8, 17, 33]) for _ in range(draw.choice([2, 3, 4]))]
        self.rows = draw.choice([1, 7, 20, 130])
        self.loss = draw.choice(list(LOSSES))
        self.make = OPTIMIZERS[draw.choice(names)]
        self.max_norm = draw.choice([None, 0.1, 1.0])
        self.lrs = draw.choice([None, [draw.uniform(0, 0.05) for _ in range(self.count)]])
        self.batch = draw.choice([1, 3, 8, 64, 200])
        activation = draw.choice([None, "relu", "sigmoid", "tanh"])
        self.nets = networks(
            self.count, self.sizes, dtype, draw.random() < 0.8, activation, seed=seed
        )
        if draw.random() < 0.2 and len(self.sizes) > 2:
            for net in self.nets:
                net[0].requires_grad_(False)
        own = (self.count,)
        self.x = data(self.rows, self.sizes, draw.choice([(), own]), dtype)[0]
        self.target = data(self.rows, self.sizes, draw.choice([(), own]), dtype)[1]
        self.target_dim = 2
        if self.loss == "cross_entropy" and draw.random() < 0.5:
            self.target, self.target_dim = self.target.argmax(-1), 1
        self.orders = []
        for _ in range(3):
            n = draw.choice([self.rows, max(1, self.rows // 2)])
            rows = [torch.randint(self.rows, (n,)) for _ in range(self.count)]
            self.orders.append(draw.choice([None, rows[0], torch.stack(rows)]))

    def steps(self, step, x, target, orders):
        """Losses of epochs, of single steps and of repeated ones."""
        yield from (step.epoch(x, target, self.batch, shuffle=False, order=o) for o in orders)
        yield step(x, target)[None]
        yield step.repeat(x, target, 3)

    def check(self):
        ensemble = ReluMLPEnsemble.from_networks(self.nets)
        optimizer = self.make(ensemble.parameters())
        step = TrainingStep(ensemble, self.loss, optimizer, lr=self.lrs, max_norm=self.max_norm)
        losses = torch.cat(list(self.steps(step, self.x, self.target, self.orders)))
        optimizers = []
        for e, net in enumerate(self.nets):
            own = self.make(net.parameters())
            if self.lrs is not None:
                for group in own.param_groups:
                    group["lr"] = self.lrs[e]
            alone = TrainingStep(net, self.loss, own, max_norm=self.max_norm)
            orders = [of(order, e, 1) for order in self.orders]
            parts = self.steps(alone, of(self.x, e, 2), of(self.target, e, self.target_dim), orders)
            support.assert_same(losses[:, e], torch.cat(list(parts)), f"losses of network {e}")
            optimizers.append(own)
        assert_same_networks(ensemble, self.nets)
        assert_same_state(ensemble, optimizer, self.nets, optimizers)
        assert step.reason == alone.reason
        return step.reason


@pytest.mark.filterwarnings("ignore:the gradients are not finite")
@pytest.mark.covering(strength=2)
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("seed", range(20))
def test_each_as_if_alone(backend, threads, seed, dtype, count):
    threads(count)
    reason = Case(seed, dtype).check()
    assert reason == (None if backend == "extension" else "the extension is not used")


@pytest.mark.filterwarnings("ignore:the gradients are not finite")
@pytest.mark.skipif(not SETS, reason="needs the extension")
@pytest.mark.covering(strength=2)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("seed", range(100, 106))
def test_each_as_if_alone_on_every_instruction_set(instruction_set, threads, seed, dtype):
    threads(1 + seed % 2)
    assert Case(seed, dtype).check() is None


@pytest.mark.parametrize("name", sorted(set(OPTIMIZERS) - set(SERVED)))
def test_optimizers_that_the_operator_does_not_know(backend, name):
    """Also those whose steps depend on norms of a whole parameter, or keep other state."""
    for seed in range(2):
        assert "SGD, Adam or AdamW" in Case(seed, torch.float32, [name]).check() or (
            backend == "reference"
        )


@pytest.mark.skipif(not SETS, reason="needs the extension")
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_where_pytorch_computes_the_products(threads, dtype, count):
    """Inside of a parallel loop its products have other bits than on several threads."""
    threads(count)
    sizes, rows = [1001, 1023, 7], 257
    nets = networks(3, sizes, dtype)
    x, target = data(rows, sizes, (), dtype)
    ensemble = ReluMLPEnsemble.from_networks(nets)
    step = TrainingStep(ensemble, "mse", torch.optim.SGD(ensemble.parameters(), lr=0.01))
    losses = step.repeat(x, target, 2)
    for e, net in enumerate(nets):
        alone = TrainingStep(net, "mse", torch.optim.SGD(net.parameters(), lr=0.01))
        support.assert_same(losses[:, e], alone.repeat(x, target, 2), f"network {e}")
    assert_same_networks(ensemble, nets)


def test_the_first_step_creates_stacked_state_and_the_operator_goes_on(backend):
    ensemble = ReluMLPEnsemble.from_networks(networks())
    optimizer = torch.optim.Adam(ensemble.parameters())
    step = TrainingStep(ensemble, "sse", optimizer)
    x, target = data(9)
    step(x, target)
    if backend == "extension":
        assert step.reason == "the optimizer has no state yet"
    for parameter in ensemble.parameters():
        assert optimizer.state[parameter]["exp_avg"].shape == parameter.shape
        assert optimizer.state[parameter]["step"].shape == ()
    step(x, target)
    assert step.reason == (None if backend == "extension" else "the extension is not used")


def test_the_optimizer_can_go_on_by_itself(backend):
    """Steps of elementwise optimizers act on stacked parameters as on each network's."""
    x, target = data(9)
    ensembles = []
    for by_itself in (False, True):
        ensemble = ReluMLPEnsemble.from_networks(networks(dtype=torch.float64))
        optimizer = torch.optim.Adam(ensemble.parameters(), lr=0.01)
        step = TrainingStep(ensemble, "sse", optimizer)
        step.repeat(x.double(), target.double(), 3)
        if by_itself:
            optimizer.zero_grad()
            (ensemble(x.double()) - target.double()).square().sum().backward()
            optimizer.step()
        else:
            step(x.double(), target.double())
        ensembles.append(ensemble)
    for one, other in zip(*(e.parameters() for e in ensembles), strict=True):
        # The two sum in other orders. Adam divides by |gradient|, which here is not small.
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_a_saved_training_goes_on(backend):
    x, target = data(9)

    def start():
        ensemble = ReluMLPEnsemble.from_networks(networks())
        optimizer = torch.optim.Adam(ensemble.parameters(), lr=0.01)
        return ensemble, optimizer, TrainingStep(ensemble, "mse", optimizer, lr=[0.1, 0.2, 0.3])

    ensemble, optimizer, step = start()
    step.repeat(x, target, 2)
    saved = copy.deepcopy((ensemble.state_dict(), optimizer.state_dict()))
    losses = step.repeat(x, target, 3)
    other, optimizer, step = start()
    other.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    support.assert_same(step.repeat(x, target, 3), losses, "losses")
    assert_same_networks(other, [ensemble.network(e) for e in range(3)])


def test_learning_rates_may_change(backend):
    x, target = data(9)
    nets = networks()
    ensemble = ReluMLPEnsemble.from_networks(nets)
    optimizer = torch.optim.SGD(ensemble.parameters(), lr=9)
    step = TrainingStep(ensemble, "mse", optimizer, lr=torch.tensor([0.5, 0.25, 0.0]))
    assert step.lr == (0.5, 0.25, 0.0)
    step(x, target)
    step.lr = [0.125, 0.0, 0.75]
    step(x, target)
    step.lr = None
    optimizer.param_groups[0]["lr"] = 0.1
    step(x, target)
    for net, lrs in zip(nets, [(0.5, 0.125), (0.25, 0.0), (0.0, 0.75)], strict=True):
        own = torch.optim.SGD(net.parameters())
        alone = TrainingStep(net, "mse", own)
        for lr in (*lrs, 0.1):
            own.param_groups[0]["lr"] = lr
            alone(x, target)
    assert_same_networks(ensemble, nets)


def test_a_scheduler(backend):
    x, target = data(9)
    nets = networks()
    ensemble = ReluMLPEnsemble.from_networks(nets)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a scheduler warns if it sees no step
        for net, rows in [(ensemble, 3), *((net, 1) for net in nets)]:
            optimizer = torch.optim.Adam(net.parameters(), lr=0.1)
            scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
            step = TrainingStep(net, "mse", optimizer)
            for _ in range(4):
                assert step(x, target).numel() == rows
                scheduler.step()
    assert_same_networks(ensemble, nets)


def test_hooks_of_the_optimizer_run_for_each_network(backend):
    ensemble = ReluMLPEnsemble.from_networks(networks())
    optimizer = torch.optim.SGD(ensemble.parameters(), lr=0.1)
    seen = []
    optimizer.register_step_post_hook(lambda *a: seen.append(a[0]))
    step = TrainingStep(ensemble, "mse", optimizer)
    step(*data(9))
    assert "hooks" in step.reason or backend == "reference"
    assert len(seen) == 3


def test_parameter_groups_and_missing_biases(backend):
    nets = [
        nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2, bias=False), nn.Tanh())
        for _ in range(3)
    ]
    ensemble = ReluMLPEnsemble.from_networks(nets)
    assert list(ensemble.state_dict()) == ["0.weight", "0.bias", "2.weight"]
    x, target = data(9)

    def groups(net):
        first, second, third = net.parameters()
        return [{"params": [third, second], "lr": 0.2}, {"params": [first], "weight_decay": 0.5}]

    step = TrainingStep(ensemble, "mse", torch.optim.AdamW(groups(ensemble), lr=0.1))
    step.repeat(x, target, 4)
    for net in nets:
        TrainingStep(net, "mse", torch.optim.AdamW(groups(net), lr=0.1)).repeat(x, target, 4)
    assert_same_networks(ensemble, nets)


@pytest.mark.parametrize("stacked", [(), (3,)], ids=["one target", "one for each"])
def test_classes(backend, stacked):
    """A target of class indices is (rows,), or (networks, rows)."""
    x, target = data(9, stacked=stacked)
    target = target.argmax(-1)
    nets = networks()
    ensemble = ReluMLPEnsemble.from_networks(nets)
    step = TrainingStep(ensemble, "cross_entropy", torch.optim.SGD(ensemble.parameters(), lr=0.1))
    losses = torch.cat([step.epoch(x, target, 4, shuffle=False), step(x, target)[None]])
    for e, net in enumerate(nets):
        alone = TrainingStep(net, "cross_entropy", torch.optim.SGD(net.parameters(), lr=0.1))
        own = of(x, e, 2), of(target, e, 1)
        expected = [*alone.epoch(*own, 4, shuffle=False), alone(*own)]
        support.assert_same(losses[:, e], torch.stack(expected), f"network {e}")
    assert_same_networks(ensemble, nets)
    before = ReluMLPEnsemble.from_networks(nets)
    with pytest.raises(RuntimeError, match=r"target must have shape \(rows\) or \(3, rows\)"):
        step(x, target[..., None, None])
    target[..., 3] = 2
    with pytest.raises(IndexError, match="2"):
        step(x, target)
    assert_same_networks(before, nets)


# -- Orders of rows ----------------------------------------------------------------------


def test_generators(backend):
    """One generator is one order for all; several are one for each."""
    x, target = data(20)
    for seeds in ([3], [3, 4, 5]):
        nets = networks()
        ensemble = ReluMLPEnsemble.from_networks(nets)
        step = TrainingStep(ensemble, "mse", torch.optim.SGD(ensemble.parameters(), lr=0.1))
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        given = generators if len(seeds) > 1 else generators[0]
        losses = [step.epoch(x, target, 6, generator=given) for _ in range(2)]
        assert losses[0].shape == (4, 3)
        for e, net in enumerate(nets):
            generator = torch.Generator().manual_seed(seeds[e % len(seeds)])
            alone = TrainingStep(net, "mse", torch.optim.SGD(net.parameters(), lr=0.1))
            for found in losses:
                support.assert_same(
                    found[:, e], alone.epoch(x, target, 6, generator=generator), f"network {e}"
                )
        assert_same_networks(ensemble, nets)


def test_the_default_generator(backend):
    x, target = data(20)
    nets = networks(1)
    ensemble = ReluMLPEnsemble.from_networks(nets)
    for net in (ensemble, *nets):
        torch.manual_seed(5)
        TrainingStep(net, "mse", torch.optim.SGD(net.parameters(), lr=0.1)).epoch(x, target, 6)
    assert_same_networks(ensemble, nets)


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
    assert_same_networks(ReluMLPEnsemble.from_networks([one]), [other])


def test_no_rows(backend):
    ensemble = ReluMLPEnsemble.from_networks(networks())
    step = TrainingStep(ensemble, "sse", torch.optim.SGD(ensemble.parameters(), lr=0.1))
    assert step.epoch(*data(0), 4).shape == (0, 3)
    assert step.epoch(*data(5), 4, order=torch.empty(3, 0, dtype=torch.int64)).shape == (0, 3)
    assert step.repeat(*data(5), 0).shape == (0, 3)
    assert step(*data(0)).tolist() == [0, 0, 0]
    assert_same_networks(ensemble, networks())


def test_what_is_not_finite_warns_and_names_the_step(backend):
    ensemble = ReluMLPEnsemble.from_networks(networks())
    step = TrainingStep(ensemble, "mse", torch.optim.SGD(ensemble.parameters(), lr=0.1))
    x, target = data(8, stacked=(3,))
    x[1, 5] = torch.inf
    with pytest.warns(RuntimeWarning, match="in step 2 of 4"):
        losses = step.epoch(x, target, 2, shuffle=False)
    assert losses.isfinite().all(0).tolist() == [True, False, True]


# -- The module --------------------------------------------------------------------------


def test_gradients_that_overflow_warn_too(backend):
    """The loss of the step is finite."""
    ensemble = ReluMLPEnsemble.from_networks(networks())
    step = TrainingStep(ensemble, "sse", torch.optim.SGD(ensemble.parameters(), lr=0.1))
    x, target = data(4, stacked=(3,))
    x[2], target[2] = 1e29, 0
    ensemble.get_parameter("0.weight").data[2] = 1e-7
    ensemble.get_parameter("2.weight").data[2] = 1e-5
    with pytest.warns(RuntimeWarning, match="in step 0 of 1"):
        losses = step.repeat(x, target, 1)
    assert losses.isfinite().all()


def test_a_copy_is_trained(backend):
    """A copied parameter has empty dicts of hooks."""
    nets = networks()
    ensemble = copy.deepcopy(ReluMLPEnsemble.from_networks(nets))
    step = TrainingStep(ensemble, "sse", torch.optim.SGD(ensemble.parameters(), lr=0.1))
    step(*data(8))
    for net in nets:
        TrainingStep(net, "sse", torch.optim.SGD(net.parameters(), lr=0.1))(*data(8))
    assert_same_networks(ensemble, nets)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("hidden", [4, [], [5, 4]], ids=str)
def test_initial_values_are_those_of_networks_one_after_another(hidden, bias):
    torch.manual_seed(7)
    nets = [ReluMLP(3, hidden, 2, bias, "tanh", dtype=torch.float64) for _ in range(4)]
    torch.manual_seed(7)
    hidden = iter(hidden) if isinstance(hidden, list) else hidden  # an iterator serves too
    ensemble = ReluMLPEnsemble(4, 3, hidden, 2, bias, "tanh", dtype=torch.float64)
    assert len(ensemble) == 4
    assert list(ensemble.state_dict()) == list(nets[0].state_dict())
    assert_same_networks(ensemble, nets)
    stacked, _ = torch.func.stack_module_state(nets)
    for name, parameter in ensemble.named_parameters():
        support.assert_same(parameter.detach(), stacked[name].detach(), name)


def test_a_network_is_a_copy():
    ensemble = ReluMLPEnsemble(3, 3, [4], 2, output_activation="sigmoid").eval()
    ensemble.get_parameter("2.bias").requires_grad_(False)
    state = torch.get_rng_state()
    net = ensemble.network(-1)
    assert torch.equal(torch.get_rng_state(), state)
    assert type(net) is ReluMLP
    assert not net.training
    assert [p.requires_grad for p in net.parameters()] == [True, True, True, False]
    assert type(net[-1]) is nn.Sigmoid
    before = ensemble.get_parameter("0.weight").clone()
    with torch.no_grad():
        net[0].weight.zero_()
    assert torch.equal(ensemble.get_parameter("0.weight"), before)
    assert torch.equal(ensemble.network(torch.tensor(2))[0].weight, before[2])


def test_from_networks_copies():
    nets = networks()
    nets[0][0].requires_grad_(False)
    for net in nets[1:]:
        net[0].requires_grad_(False)
    ensemble = ReluMLPEnsemble.from_networks(nets)
    assert [p.requires_grad for p in ensemble.parameters()] == [False, False, True, True]
    assert_same_networks(ensemble, nets)
    with torch.no_grad():
        nets[0][0].weight.zero_()
    assert ensemble.network(0)[0].weight.abs().sum() > 0


def test_copies_and_meta():
    ensemble = ReluMLPEnsemble(2, 3, [4], 1)
    for other in (copy.deepcopy(ensemble), pickle.loads(pickle.dumps(ensemble))):
        assert_same_networks(other, [ensemble.network(e) for e in range(2)])
    meta = ReluMLPEnsemble(2, 3, [4], 1, device="meta")
    assert meta(torch.empty(5, 3, device="meta")).shape == (2, 5, 1)
    assert "networks=2" in repr(ensemble)
    assert "output_activation='tanh'" in repr(ReluMLPEnsemble(2, 3, 4, 1, output_activation="tanh"))


@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("stacked", [(), (3,)], ids=["one x", "an x for each"])
def test_forward_and_gradients(backend, stacked, activation):
    """Integers, so that all sums are exact."""
    nets = [support.integers_(net) for net in networks(activation=activation)]
    ensemble = ReluMLPEnsemble.from_networks(nets)
    x = support.integers(*stacked, 6, 3, dtype=torch.float32).requires_grad_()
    y = ensemble(x)
    assert y.shape == (3, 6, 2)
    grad_output = support.integers(3, 6, 2, dtype=torch.float32)
    y.backward(grad_output)
    other = x.detach().clone().requires_grad_()
    for e, net in enumerate(nets):
        expected = net(of(other, e, 2))
        support.assert_same(y[e].detach(), expected.detach(), f"network {e}")
        expected.backward(grad_output[e])
        for (name, found), parameter in zip(
            ensemble.named_parameters(), net.parameters(), strict=True
        ):
            support.assert_same(found.grad[e], parameter.grad, f"network {e}, {name}")
    support.assert_same(x.grad, other.grad, "x")


# -- Mistakes ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((0, 3, 4, 2), ValueError, "networks must be at least 1, got 0"),
        ((2.0, 3, 4, 2), TypeError, "networks must be an int, got float"),
        ((2, 3, 0, 2), ValueError, "hidden_features must be at least 1, got 0"),
        ((2, -3, 4, 2), RuntimeError, "in_features must not be negative"),
        ((2, 3, 4, 2, True, "gelu"), ValueError, "output_activation must be"),
    ],
)
def test_wrong_constructors(arguments, error, message):
    with pytest.raises(error, match=message):
        ReluMLPEnsemble(*arguments)


def hooked():
    net = ReluMLP(3, [5], 2)
    net[0].register_forward_hook(lambda *_: None)
    return net


@pytest.mark.parametrize(
    ("second", "error", "message"),
    [
        (lambda: ReluMLP(3, [6], 2), ValueError, r"networks\[1\] .* weight 0 \(5, 3\)"),
        (lambda: ReluMLP(3, [5, 5], 2), ValueError, "weight"),
        (lambda: ReluMLP(3, [5], 2, bias=False), ValueError, "bias 0"),
        (lambda: ReluMLP(3, [5], 2, dtype=torch.float64), ValueError, "float64"),
        (lambda: ReluMLP(3, [5], 2, device="meta"), ValueError, "meta"),
        (lambda: ReluMLP(3, [5], 2).requires_grad_(False), ValueError, "without gradients"),
        (lambda: ReluMLP(3, [5], 2, output_activation="tanh"), ValueError, "output activation"),
        (hooked, ValueError, r"networks\[1\] .* without hooks"),
        (lambda: nn.Sequential(nn.ReLU()), ValueError, r"networks\[1\] must have the children"),
        (lambda: nn.Linear(3, 2), TypeError, r"networks\[1\] .* Linear"),
    ],
)
def test_networks_of_different_kinds(second, error, message):
    with pytest.raises(error, match=message):
        ReluMLPEnsemble.from_networks([ReluMLP(3, [5], 2), second()])


def test_no_networks():
    with pytest.raises(ValueError, match="networks must have at least one entry"):
        ReluMLPEnsemble.from_networks([])


def test_no_such_network():
    ensemble = ReluMLPEnsemble(2, 3, [4], 1)
    for number in (2, -3):
        with pytest.raises(IndexError, match=rf"number must be in \[0, 2\), got {number}"):
            ensemble.network(number)
    with pytest.raises(TypeError, match="number must be an int, got float"):
        ensemble.network(0.0)


WRONG_SHAPES = [(3,), (2, 5, 3), (1, 3, 5, 3), ()]


@pytest.mark.parametrize("shape", WRONG_SHAPES, ids=str)
def test_wrong_shapes_of_x(backend, shape):
    ensemble = ReluMLPEnsemble(3, 3, [4], 1)
    step = TrainingStep(ensemble, "mse", torch.optim.SGD(ensemble.parameters(), lr=0.1))
    x = torch.ones(shape)
    calls = [
        lambda: ensemble(x),
        lambda: step(x, torch.ones(5, 1)),
        lambda: step.repeat(x, torch.ones(5, 1), 2),
        lambda: step.epoch(x, torch.ones(5, 1), 2),
    ]
    for call in calls:
        with pytest.raises(RuntimeError, match=r"x must have shape \(rows, features\) or \(3,"):
            call()
    with pytest.raises(RuntimeError, match="target must have shape"):
        step(torch.ones(5, 3), x)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize(
    ("x", "target"),
    [
        (torch.ones(5, 4), torch.ones(5, 1)),
        (torch.ones(5, 3), torch.ones(5, 2)),
        (torch.ones(5, 3), torch.ones(4, 1)),
        (torch.ones(3, 5, 3), torch.ones(3, 4, 1)),
        (torch.ones(5, 3).double(), torch.ones(5, 1).double()),
        (torch.ones(5, 3), torch.ones(5, 1).double()),
    ],
    ids=str,
)
def test_a_refused_step_changes_nothing(backend, x, target, optimizer):
    ensemble = ReluMLPEnsemble.from_networks(networks(3, (3, 4, 1)))
    own = OPTIMIZERS[optimizer](ensemble.parameters())
    step = TrainingStep(ensemble, "mse", own)
    for _ in range(2):
        before = copy.deepcopy((ensemble.state_dict(), own.state_dict()))
        with pytest.raises(RuntimeError):
            step(x, target)
        for found, expected in zip((ensemble.state_dict(), own.state_dict()), before, strict=True):
            assert str(found) == str(expected)
        step(*data(5, (3, 4, 1)))  # now there is state


def make_step(**options):
    ensemble = ReluMLPEnsemble(3, 3, [4], 2)
    return TrainingStep(ensemble, "mse", torch.optim.SGD(ensemble.parameters(), lr=0.1), **options)


@pytest.mark.parametrize(
    ("lr", "error", "message"),
    [
        ([0.1, 0.2], ValueError, "lr must have 3 learning rates, got 2"),
        (torch.ones(4), ValueError, "lr must have 3 learning rates, got 4"),
        ([0.1, -1, 0.1], ValueError, "lr must not have negative"),
        ([0.1, float("nan"), 0.1], ValueError, "lr must not have negative"),
        (0.1, TypeError, "lr must be a sequence .* got float"),
        (torch.tensor(0.1), TypeError, "lr must be a sequence"),
    ],
)
def test_wrong_learning_rates(lr, error, message):
    with pytest.raises(error, match=message):
        make_step(lr=lr)
    step = make_step(lr=[1, 2, 3])
    with pytest.raises(error, match=message):
        step.lr = lr
    assert step.lr == (1.0, 2.0, 3.0)


def test_learning_rates_of_a_single_network():
    net = ReluMLP(3, [4], 2)
    with pytest.raises(TypeError, match="lr must be None unless net is a ReluMLPEnsemble"):
        TrainingStep(net, "mse", torch.optim.SGD(net.parameters()), lr=[0.1])


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
    with pytest.raises(ValueError, match="generator must have 3 generators, got 2"):
        make_step().epoch(*data(8), 4, generator=[torch.Generator()] * 2)
    with pytest.raises(ValueError, match="generator must be None if there is an order"):
        make_step().epoch(*data(8), 4, generator=torch.Generator(), order=torch.arange(8))


def change_forward(step):
    step.net.forward = lambda x: x


def change_layer(step):
    setattr(step.net, "0", nn.Linear(3, 4))


def share(step):
    getattr(step.net, "2").bias = getattr(step.net, "0").bias


def share_memory(step):
    bias = next(p for name, p in step.net.named_parameters() if name == "0.bias")
    getattr(step.net, "2").bias = nn.Parameter(bias.detach()[:, :2])


CHANGES = {
    "forward": (change_forward, "unchanged ReluMLPEnsemble"),
    "a hook": (lambda s: s.net.register_forward_hook(print), "unchanged ReluMLPEnsemble"),
    "a layer": (change_layer, "replaced or patched layer 0"),
    "a hook of a parameter": (
        lambda s: next(s.net.parameters()).register_hook(print),
        "without hooks",
    ),
    "a shared parameter": (share, "must not share parameters"),
    "shared memory": (share_memory, "must not share parameters"),
    "step": (lambda s: setattr(s.optimizer, "step", print), "optimizer must have its own step"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_changes_that_single_networks_would_lack_are_refused(backend, name):
    change, message = CHANGES[name]
    step = make_step()
    change(step)
    with pytest.raises(RuntimeError, match=message):
        step(*data(8))


class Wider(ReluMLPEnsemble):
    def forward(self, x):
        return 2 * super().forward(x)


def test_a_subclass_with_another_forward_is_refused():
    ensemble = Wider(3, 3, [4], 2)
    step = TrainingStep(ensemble, "mse", torch.optim.SGD(ensemble.parameters(), lr=0.1))
    with pytest.raises(RuntimeError, match="unchanged ReluMLPEnsemble"):
        step(*data(8))


def test_progress(backend):
    seen = []
    step = make_step()
    step.repeat(*data(8), 20, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (20, 20)
    assert all(a < b for a, b in itertools.pairwise(done for done, _ in seen))
