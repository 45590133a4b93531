"""What `TrainingStep` reads from the optimizer in every call, and what it must not pass over."""

import copy
import functools
import io
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW, lr_scheduler
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

import support
from relu_mlp import ReluMLP, TrainingStep, ops
from support.training import LOSSES, everything, plain_step, served

needs_library = pytest.mark.skipif(ops.LIBRARY_PATH is None, reason="needs the extension")
pytestmark = needs_library

KINDS = {
    "SGD": lambda p, **o: SGD(p, **{"lr": 0.05} | o),
    "momentum": lambda p, **o: SGD(p, **{"lr": 0.05, "momentum": 0.9} | o),
    "Adam": lambda p, **o: Adam(p, **{"lr": 0.05} | o),
    "amsgrad": lambda p, **o: Adam(p, **{"lr": 0.05, "amsgrad": True} | o),
    "AdamW": lambda p, **o: AdamW(p, **{"lr": 0.05} | o),
}
every_kind = pytest.mark.parametrize("kind", KINDS)
with_state = pytest.mark.parametrize("kind", [name for name in KINDS if name != "SGD"])


class Twins:
    """A `TrainingStep` and the plain loop from the same numbers, in float64."""

    def __init__(self, kind, net=None, **options):
        torch.manual_seed(0)
        self.net = net or support.twins(3, [8, 5], 2, dtype=torch.float64)[1]
        self.twin = copy.deepcopy(self.net)
        make = KINDS[kind] if isinstance(kind, str) else kind
        self.step = TrainingStep(self.net, "mse", make(list(self.net.parameters()), **options))
        self.optimizer = make(list(self.twin.parameters()), **options)
        self.x = torch.randn(6, 3, dtype=torch.float64)
        self.target = torch.randn(6, 2, dtype=torch.float64)

    @property
    def both(self):
        """The two optimizers."""
        return self.step.optimizer, self.optimizer

    def plain(self):
        return plain_step(self.twin, "mse", self.optimizer, self.x, self.target)

    def run(self, times=1):
        """The same steps on both sides, and a comparison."""
        for _ in range(times):
            torch.testing.assert_close(self.step(self.x, self.target), self.plain())
        self.compare()

    def compare(self):
        """Equal up to the rounding of a few steps, for numbers of a size of about 1."""
        torch.testing.assert_close(
            everything(self.net, self.step.optimizer),
            everything(self.twin, self.optimizer),
            rtol=1e-9,
            atol=1e-9,
        )

    def check(self, reason=None, times=3):
        """Steps, the last of which the operator served, or did not for a reason."""
        self.run(times)
        if reason is None:
            assert self.step.reason is None
        else:
            assert self.step.reason is not None and reason in self.step.reason


# -- Hyperparameters -----------------------------------------------------------------------------

SCHEDULES = {
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2, 0.5),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda n: 1 / (n + 1)),
    "Cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 5),
    "CosineWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "Sequential": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1), lr_scheduler.ExponentialLR(o, 0.9)], [3]
    ),
    "Cyclic": lambda o: lr_scheduler.CyclicLR(
        o, 0.01, 0.1, 2, cycle_momentum="momentum" in o.defaults
    ),
    "OneCycle": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=20),
}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("kind", ["momentum", "Adam", "AdamW"])
def test_schedules(kind, schedule):
    """Without the warning that the scheduler comes before the optimizer. OneCycleLR changes the
    momentum and the betas too.
    """
    twins = Twins(kind)
    schedulers = [SCHEDULES[schedule](optimizer) for optimizer in twins.both]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for n in range(12):
            twins.run()
            assert n == 0 or twins.step.reason is None
            if schedule == "Sequential":
                warnings.simplefilter("ignore")  # PyTorch's own scheduler warns of itself
            for scheduler in schedulers:
                scheduler.step()
    groups = [o.param_groups[0] for o in twins.both]
    assert groups[0]["lr"] == groups[1]["lr"]


def test_reduce_on_plateau():
    twins = Twins("Adam")
    schedulers = [lr_scheduler.ReduceLROnPlateau(o, patience=0) for o in twins.both]
    for n in range(6):
        twins.run()
        for scheduler in schedulers:
            scheduler.step(1.0 + n)
    assert twins.step.reason is None and twins.step.optimizer.param_groups[0]["lr"] < 0.01


def test_a_first_step_by_the_operator_counts():
    """For a scheduler that is older than the step, and for one that is younger."""
    for is_older in (True, False):
        twins = Twins("SGD")
        scheduler = lr_scheduler.StepLR(twins.step.optimizer, 2) if is_older else None
        served(twins.step, twins.x, twins.target)
        scheduler = scheduler or lr_scheduler.StepLR(twins.step.optimizer, 2)
        served(twins.step, twins.x, twins.target)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            scheduler.step()


def test_scheduler_warns_without_a_step():
    twins = Twins("SGD")
    scheduler = lr_scheduler.StepLR(twins.step.optimizer, 2)
    with pytest.warns(UserWarning, match="lr_scheduler.step"):
        scheduler.step()


@pytest.mark.parametrize("kind", ["SGD", "momentum", "Adam", "AdamW"])
def test_rate_as_a_tensor(kind):
    twins = Twins(kind, lr=torch.tensor(0.03, dtype=torch.float64))
    twins.check()
    for optimizer in twins.both:
        optimizer.param_groups[0]["lr"].mul_(0.5)
    twins.check()
    for optimizer in twins.both:
        optimizer.param_groups[0]["lr"] = torch.tensor(0.01)
    twins.check("a tensor that requires a gradient or has another dtype")


def test_betas_as_tensors():
    Twins("Adam", betas=(torch.tensor(0.8), torch.tensor(0.95))).check("the betas are tensors")


@with_state
def test_every_hyperparameter_is_read_in_every_call(kind):
    changes = [{"lr": 0.01}, {"weight_decay": 0.1}, {"maximize": True}, {"maximize": False}]
    if kind == "momentum":
        changes += [{"momentum": 0.5}, {"dampening": 0.2}, {"momentum": 0}, {"momentum": 0.3}]
        changes += [{"dampening": 0}, {"nesterov": True}]
    else:
        changes += [{"betas": (0.5, 0.7)}, {"eps": 0.01}, {"weight_decay": 0}]
    twins = Twins(kind)
    twins.run(2)
    for change in changes:
        for optimizer in twins.both:
            optimizer.param_groups[0].update(change)
        twins.check()


@with_state
@pytest.mark.parametrize(
    "options", [{"foreach": True}, {"fused": True}, {"foreach": False}], ids=str
)
def test_implementations_of_the_optimizer(kind, options):
    Twins(kind, **options).check()


def test_a_rate_that_requires_a_gradient():
    rate = torch.tensor(0.03, requires_grad=True)
    Twins("SGD", lr=rate).check("a tensor that requires a gradient")


def test_a_differentiable_optimizer():
    """It steps within the graph of a leaf, which PyTorch refuses, before and after."""
    twins = Twins("SGD", differentiable=True)
    for call in (lambda: twins.step(twins.x, twins.target), twins.plain):
        with pytest.raises(RuntimeError, match="leaf"):
            call()


# -- State ---------------------------------------------------------------------------------------


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file)


@every_kind
@pytest.mark.parametrize("by_step", [1, 4])
@pytest.mark.parametrize("default", [torch.float32, torch.float64], ids=str)
def test_state_crosses_over(kind, by_step, default):
    """What one side has saved the other one continues, in both directions."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)  # also that of Adam's count of steps
    try:
        twins = Twins(kind)
        for _ in range(3):
            twins.run(by_step)
            mine, other = (through_a_file(o.state_dict()) for o in twins.both)
            parameters = [through_a_file(n.state_dict()) for n in (twins.net, twins.twin)]
            twins.step.optimizer.load_state_dict(other)
            twins.optimizer.load_state_dict(mine)
            twins.net.load_state_dict(parameters[1])
            twins.twin.load_state_dict(parameters[0])
            twins.check(times=1)
    finally:
        torch.set_default_dtype(before)


@with_state
def test_state_has_the_form_of_the_optimizer(kind):
    twins = Twins(kind)
    twins.check()
    for p, q in zip(twins.net.parameters(), twins.twin.parameters()):
        mine, other = (o.state[r] for o, r in zip(twins.both, (p, q)))
        assert list(mine) == list(other)
        for key, value in mine.items():
            assert (value.dtype, value.shape) == (other[key].dtype, other[key].shape)
            assert type(value) is torch.Tensor and not value.requires_grad


@with_state
def test_state_that_is_half_present(kind):
    """A parameter without one gets it."""
    twins = Twins(kind)
    twins.run(2)
    for optimizer, net in zip(twins.both, (twins.net, twins.twin)):
        del optimizer.state[net[2].weight]
    twins.check()


def test_state_of_another_form():
    twins = Twins("Adam")
    twins.run(2)
    for optimizer in twins.both:
        for state in optimizer.state.values():
            state["exp_avg"] = state["exp_avg"].repeat_interleave(2, 0)[::2]
    twins.check("state is not like its parameters")
    twins = Twins("Adam")
    twins.run(2)
    for optimizer in twins.both:
        for state in optimizer.state.values():
            state["step"] = state["step"].to(torch.int64)
    twins.check("count of steps")


@every_kind
def test_copies_of_the_optimizer_and_the_network(kind):
    """By deepcopy and by pickle, of both together."""
    twins = Twins(kind)
    twins.run(3)
    lr_scheduler.StepLR(twins.step.optimizer, 2)  # replaces the optimizer's method `step`
    twins.run(3)
    for copied in (copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))):
        net, optimizer = copied((twins.net, twins.step.optimizer))
        twin, plain = copied((twins.twin, twins.optimizer))
        step = TrainingStep(net, "mse", optimizer)
        for _ in range(3):
            served(step, twins.x, twins.target)
            plain_step(twin, "mse", plain, twins.x, twins.target)
        torch.testing.assert_close(everything(net, optimizer), everything(twin, plain))
    step = copy.deepcopy(twins.step)
    assert step.net is not twins.net
    before = everything(twins.net, twins.step.optimizer)
    served(step, twins.x, twins.target)
    support.assert_same(everything(twins.net, twins.step.optimizer), before)


@every_kind
def test_version_counters_go_up(kind):
    """A graph that needs a parameter's old values notices."""
    twins = Twins(kind)
    twins.run()
    leaf = twins.x.clone().requires_grad_()
    y = nn.Sequential(*twins.net.children())(leaf)
    changed = [
        *twins.net.parameters(),
        *(
            t
            for state in twins.step.optimizer.state.values()
            for t in state.values()
            if t is not None
        ),
    ]
    before = [t._version for t in changed]
    served(twins.step, twins.x, twins.target)
    assert all(t._version > n for t, n in zip(changed, before))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@with_state
def test_in_inference_mode(kind):
    """The first step makes state that is not for autograd; it stays usable."""
    twins = Twins(kind)
    with torch.inference_mode():
        twins.step(twins.x, twins.target)
        served(twins.step, twins.x, twins.target)
    served(twins.step, twins.x, twins.target)
    for _ in range(3):
        twins.plain()
    twins.compare()


# -- Which parameters ----------------------------------------------------------------------------


@every_kind
def test_frozen_parameters(kind):
    twins = Twins(kind)
    for names in (["0.weight"], ["2.bias", "4.weight"], [], ["0.weight", "0.bias", "2.weight"], []):
        for net in (twins.net, twins.twin):
            for name, p in net.named_parameters():
                p.requires_grad_(name not in names)
        twins.run()
        twins.check()


@every_kind
def test_everything_frozen(kind):
    """Then `backward` raises, as in the plain loop."""
    twins = Twins(kind)
    twins.run(2)
    for net in (twins.net, twins.twin):
        net.requires_grad_(False)
    for call in (lambda: twins.step(twins.x, twins.target), twins.plain):
        with pytest.raises(RuntimeError, match="does not require grad"):
            call()
    twins.compare()


@every_kind
def test_frozen_before_the_first_step(kind):
    twins = Twins(kind)
    for net in (twins.net, twins.twin):
        net[2].requires_grad_(False)
    twins.check()
    for net in (twins.net, twins.twin):
        net[2].requires_grad_(True)
    twins.check()


@every_kind
def test_parameters_in_no_group(kind):
    def make(parameters, **options):
        return KINDS[kind](parameters[1:-1], **options)

    twins = Twins(make)
    twins.check("a parameter of net is not the optimizer's")
    for optimizer, net in zip(twins.both, (twins.net, twins.twin)):
        optimizer.add_param_group({"params": [net[0].weight], "lr": 0.001})
        net[4].bias.requires_grad_(False)
    twins.check()
    for net in (twins.net, twins.twin):
        net[4].bias.requires_grad_(True)
        net[4].bias.grad = None
    for optimizer, net in zip(twins.both, (twins.net, twins.twin)):
        optimizer.add_param_group({"params": [net[4].bias], "weight_decay": 0.1})
    twins.check()


@every_kind
def test_parameters_of_another_module(kind):
    """Those without a gradient are skipped by the optimizer, one of another loss too."""
    others = [nn.Parameter(torch.ones(2)) for _ in range(2)]

    def make(parameters, **options):
        return KINDS[kind]([*parameters, others[0]], **options)

    twins = Twins(make)
    twins.check("parameters that are not net's")
    assert torch.equal(others[0], torch.ones(2))
    others[0].requires_grad_(False)
    twins.check()


@every_kind
def test_parameters_replaced_after_the_construction(kind):
    """The optimizer keeps the old one, which nothing changes any more."""
    twins = Twins(kind)
    twins.run(2)
    old = twins.net[2].weight
    for net in (twins.net, twins.twin):
        torch.manual_seed(1)
        net[2].weight = nn.Parameter(torch.randn(5, 8, dtype=torch.float64))
    before = old.detach().clone()
    for _ in range(2):
        step, plain = twins.step(twins.x, twins.target), twins.plain()
        torch.testing.assert_close(step, plain)
        assert "not net's" in twins.step.reason
    twins.compare()
    assert torch.equal(old, before)


@every_kind
def test_parameters_that_are_views(kind):
    """All of them in one flat tensor, and one that is transposed."""
    twins = Twins(kind)
    for net in (twins.net, twins.twin):
        flat = torch.cat([p.detach().flatten() for p in net.parameters()])
        begin = 0
        for p in net.parameters():
            p.data = flat[begin : begin + p.numel()].view(p.shape)
            begin += p.numel()
    twins.check()
    for net in (twins.net, twins.twin):
        net[2].weight.data = net[2].weight.data.T.contiguous().T
    twins.check("a parameter is not contiguous")
    for net in (twins.net, twins.twin):
        net[2].weight.data = torch._neg_view(-net[2].weight.data.contiguous())
        assert net[2].weight.is_contiguous()
    twins.check("a parameter is not contiguous")


def test_layers_without_outputs():
    """An empty bias has a state too."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the initialization of nothing
        net = nn.Sequential(nn.Linear(3, 0), nn.ReLU(), nn.Linear(0, 2)).double()
    for kind in KINDS:
        Twins(kind, copy.deepcopy(net)).check()


def test_tied_layers():
    shared = nn.Linear(3, 3).double()
    net = nn.Sequential(shared, nn.ReLU(), shared, nn.ReLU(), nn.Linear(3, 2).double())
    for kind in KINDS:
        Twins(kind, copy.deepcopy(net)).check("two layers share a parameter")
    net = nn.Sequential(
        nn.Linear(3, 3).double(), nn.ReLU(), nn.Linear(3, 3).double(), nn.ReLU(), nn.Linear(3, 2)
    ).double()
    net[2].weight = net[0].weight
    for kind in KINDS:
        Twins(kind, copy.deepcopy(net)).check("two layers share a parameter")


@every_kind
def test_parameters_in_the_same_memory(kind):
    """With a weight decay, the order of their updates matters."""
    twins = Twins(kind, weight_decay=0.1)
    for net in (twins.net, twins.twin):
        net[0].bias.data = net[2].weight.data[0]
    twins.check("two parameters share their memory")


def test_an_input_in_the_memory_of_a_weight():
    """Each step reads what the step before it has written."""
    for kind in KINDS:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3)).double()
        twin = copy.deepcopy(net)
        step = TrainingStep(net, "mse", KINDS[kind](net.parameters()))
        optimizer = KINDS[kind](twin.parameters())
        for _ in range(4):
            step(net[0].weight.detach(), net[2].weight.detach())
            plain_step(twin, "mse", optimizer, twin[0].weight.detach(), twin[2].weight.detach())
        assert step.reason is None
        step.repeat(net[0].weight.detach(), net[2].weight.detach(), 3)
        for _ in range(3):
            plain_step(twin, "mse", optimizer, twin[0].weight.detach(), twin[2].weight.detach())
        torch.testing.assert_close(everything(net, step.optimizer), everything(twin, optimizer))


# -- Hooks and replaced methods ------------------------------------------------------------------


def counter(seen):
    def hook(*_):
        seen.append(1)

    return hook


HOOKS = {
    "of the module": lambda net, optimizer, hook: net.register_forward_hook(hook),
    "of a child, before": lambda net, optimizer, hook: net[1].register_forward_pre_hook(hook),
    "of a child, backward": lambda net, optimizer, hook: net[2].register_full_backward_hook(hook),
    "of all modules": lambda net, optimizer, hook: nn.modules.module.register_module_forward_hook(
        hook
    ),
    "of a parameter": lambda net, optimizer, hook: net[0].weight.register_hook(hook),
    "of an accumulated gradient": lambda net, optimizer, hook: net[
        2
    ].bias.register_post_accumulate_grad_hook(hook),
    "of the optimizer, before": lambda net, optimizer, hook: optimizer.register_step_pre_hook(hook),
    "of the optimizer, after": lambda net, optimizer, hook: optimizer.register_step_post_hook(hook),
    "of all optimizers, before": lambda net, optimizer, hook: register_optimizer_step_pre_hook(
        hook
    ),
    "of all optimizers, after": lambda net, optimizer, hook: register_optimizer_step_post_hook(
        hook
    ),
}


@every_kind
@pytest.mark.parametrize("where", HOOKS)
def test_hooks_run_as_often_as_in_the_plain_loop(kind, where):
    twins = Twins(kind)
    twins.check()
    counts = []
    for call, net, optimizer in (
        (lambda: twins.step(twins.x, twins.target), twins.net, twins.step.optimizer),
        (twins.plain, twins.twin, twins.optimizer),
    ):
        seen = []
        handle = HOOKS[where](net, optimizer, counter(seen))
        for _ in range(2):
            call()
        handle.remove()
        counts.append(len(seen))
    assert counts[0] == counts[1] > 0
    twins.compare()
    twins.run(2)
    assert twins.step.reason is None or "parameter has a hook" in twins.step.reason


def test_hooks_that_change_gradients():
    twins = Twins("momentum")
    for net in (twins.net, twins.twin):
        net[0].weight.register_hook(lambda grad: 2 * grad)
    twins.check("a parameter has a hook")


def wrapped(step, seen, keep):
    """A replacement of a method. With `keep`, it has the attributes of what it replaces."""

    def replacement(*arguments, **options):
        seen.append(1)
        return step(*arguments, **options)

    return functools.wraps(step)(replacement) if keep else replacement


@every_kind
@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("scheduler", ["none", "before", "after"])
def test_replaced_step(kind, keep, scheduler):
    """Also under or over a scheduler's own replacement."""
    twins = Twins(kind)
    twins.run(2)
    optimizer, seen = twins.step.optimizer, []
    if scheduler == "before":
        lr_scheduler.ConstantLR(optimizer, 1.0)
    step = optimizer.step
    if scheduler == "after":
        # A scheduler replaces bound methods only.
        optimizer.step = wrapped(type(optimizer).step, seen, keep).__get__(optimizer)
        lr_scheduler.ConstantLR(optimizer, 1.0)
    else:
        optimizer.step = wrapped(step, seen, keep)
    twins.check("step was replaced")
    assert len(seen) == 3


@pytest.mark.parametrize("name", ["step", "zero_grad"])
@pytest.mark.parametrize("keep", [True, False])
def test_methods_replaced_in_the_class(monkeypatch, name, keep):
    twins, seen = Twins("Adam"), []
    twins.run(2)
    monkeypatch.setattr(Adam, name, wrapped(getattr(Adam, name), seen, keep))
    TrainingStep(twins.net, "mse", Adam(twins.net.parameters()))  # wraps the replacement
    twins.check("step was replaced")
    assert len(seen) == 6


def test_replaced_zero_grad():
    twins, seen = Twins("SGD"), []
    twins.step.optimizer.zero_grad = wrapped(twins.step.optimizer.zero_grad, seen, True)
    twins.check("step was replaced")
    assert len(seen) == 3


def test_subclasses():
    class Half(SGD):
        def step(self, closure=None):
            for group in self.param_groups:
                for p in group["params"]:
                    p.grad /= 2
            return super().step(closure)

    class Same(Adam):
        pass

    Twins(lambda p: Half(p, lr=0.1)).check("the optimizer is a Half")
    Twins(lambda p: Same(p)).check("the optimizer is a Same")


OTHERS = ["RMSprop", "Adagrad", "Adadelta", "Adamax", "NAdam", "RAdam", "ASGD", "Rprop"]


@pytest.mark.parametrize("name", [*OTHERS, "Adafactor"])
def test_other_optimizers(name):
    Twins(lambda p: getattr(torch.optim, name)(p, lr=0.01)).check(f"the optimizer is a {name}")


def test_optimizers_that_cannot_step():
    """SparseAdam wants other gradients, and says so as in the plain loop."""
    twins = Twins(lambda p: torch.optim.SparseAdam(p))
    for call in (lambda: twins.step(twins.x, twins.target), twins.plain):
        with pytest.raises(RuntimeError, match="SparseAdam does not support dense gradients"):
            call()


def test_capturable():
    """PyTorch refuses it on the CPU."""
    twins = Twins(lambda p: Adam(p, capturable=True))
    for call in (lambda: twins.step(twins.x, twins.target), twins.plain):
        with pytest.raises((AssertionError, RuntimeError), match="capturable"):
            call()


def test_stale_gradients_do_not_count():
    """Neither those of trained parameters nor those of frozen ones."""
    for kind in KINDS:
        twins = Twins(kind)
        for net in (twins.net, twins.twin):
            net[2].weight.requires_grad_(False)
        for _ in range(3):
            for net in (twins.net, twins.twin):
                for p in net.parameters():
                    p.grad = torch.full_like(p, 100.0)
            twins.run()
            assert all(p.grad is None for p in twins.net.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["SGD", "momentum"])
def test_16_bit_dtypes(kind, dtype):
    """The gradients of `loss_and_grads`, and the optimizer's own step."""
    torch.manual_seed(0)
    net = ReluMLP(3, 8, 2, dtype=dtype)
    weights, biases = support.layers_of(net)
    step = TrainingStep(net, "mse", KINDS[kind](net.parameters()))
    x, target = torch.randn(5, 3).to(dtype), torch.randn(5, 2).to(dtype)
    before = LOSSES["mse"](net(x), target)
    for _ in range(20):
        loss = step(x, target)
    assert loss.dtype is dtype and loss < before
    assert "not float32 or float64" in step.reason
    assert all(p.dtype is dtype for p in [*weights, *biases])
