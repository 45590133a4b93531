"""Training runs follow the exact run, loss by loss and parameter by parameter.

How far may two correct runs drift apart? In every step, rounding causes a local error of the
gradient and the update, which `support.Exact` bounds. From then on, the map of a training step
propagates it. With z the parameters and the optimizer's state, z_{k+1} = F_k(z_k), to first order

    error_n = sum over k < n of  dF_{n-1} ... dF_{k+1} local_k

so |error_n| <= sum over k of |dF_{n-1} ... dF_{k+1}| |local_k|. Autograd computes the derivatives
dF along the run of native PyTorch in float64, which differs from the exact run by no more than its
own such bound. `SLACK` allows for the second order: as much again as the first order. That is far
more than the relative change of dF over a distance of the bound can cause.

All this assumes that the same units are on in both runs. So the tests also check that no
pre-activation comes within its bound of 0.
"""

import itertools
from dataclasses import dataclass, replace
from functools import lru_cache, partial

import pytest
import torch
from torch.nn import functional as F
from torch.nn.utils import clip_grad_norm_

import support
from relu_mlp import loss_and_grads

SIZES = (3, 5, 4, 2)
ROWS = 8
STEPS = 50
SLACK = 2
FREEZE = 25


@dataclass(frozen=True)
class Setup:
    optimizer: str = "sgd"
    loss: str = "sse"
    clip: float | None = None
    schedule: bool = False
    freeze: bool = False
    recompute: bool = False
    seed: int = 3  # a seed whose run stays away from the kinks, which `follows` checks


def data(dtype):
    """The corners of a cube, slightly displaced, and targets for them."""
    generator = torch.Generator().manual_seed(11)
    corners = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 3)
    x = corners + 0.05 * torch.randn(corners.shape, generator=generator)
    target = torch.randn(ROWS, SIZES[-1], generator=generator)
    return x.to(dtype), target.to(dtype), torch.arange(ROWS) % SIZES[-1]


def start(model, seed):
    """Initial values that keep the pre-activations away from 0 at every corner of the cube.

    They are odd numbers in the first hidden layer and halves of odd numbers in the second, up to
    the displacement of the corners.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer, (weight, bias) in enumerate(zip(*support.layers_of(model), strict=True)):
            random = torch.randn(weight.shape, generator=generator)
            weight.copy_(random.sign() if layer < 2 else random / 2)
            bias.copy_(0.5 * (layer == 1) * torch.randn(bias.shape, generator=generator).sign())


def loss_of(setup, y, target, classes):
    if setup.loss == "sse":
        return ((y - target) ** 2).sum()
    return F.cross_entropy(y, classes)


# -- The runs -------------------------------------------------------------------------


def make_optimizer(setup, parameters):
    if setup.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=0.001 if setup.loss == "sse" else 0.01, momentum=0.9)
    # A large eps: with the usual one the first update is the sign of the
    # gradient, so a rounding error could flip it where the gradient is near 0.
    return torch.optim.Adam(parameters, lr=0.004, eps=1e-2)


def train(engine, setup, dtype):
    """Losses, the parameters before each step and after the last, and learning rates."""
    net, sequential = support.twins(SIZES[0], SIZES[1:-1], SIZES[-1])
    net.recompute = setup.recompute
    model = (sequential if engine == "native" else net).to(dtype)
    start(model, setup.seed)
    x, target, classes = data(dtype)
    parameters = list(model.parameters())
    optimizer = make_optimizer(setup, parameters)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    losses, states, rates = [], [flat(parameters)], []
    for step in range(STEPS):
        optimizer.zero_grad()
        if setup.freeze and step == FREEZE:
            model[0].requires_grad_(False)
        if engine == "by hand":
            weights, biases = support.layers_of(model)
            loss, *grads = loss_and_grads(x, target, weights, biases, loss=setup.loss)
            for kind, found in zip((weights, biases), grads, strict=True):
                for parameter, grad in zip(kind, found, strict=True):
                    parameter.grad = grad if parameter.requires_grad else None
        else:
            loss = loss_of(setup, model(x), target, classes)
            loss.backward()
        assert (model[0].weight.grad is None) == (setup.freeze and step >= FREEZE)
        if setup.clip:
            clip_grad_norm_(parameters, setup.clip)
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if setup.schedule:
            scheduler.step()
        losses.append(loss.item())
        states.append(flat(parameters))
    return losses, states, rates


def flat(parameters):
    return torch.cat([p.detach().double().flatten() for p in parameters])


# -- The same as one function of the state, to differentiate -----------------------------

SHAPES = [shape for a, b in itertools.pairwise(SIZES) for shape in ((b, a), (b,))]
COUNT = sum(torch.Size(shape).numel() for shape in SHAPES)
FIRST_LAYER = SIZES[0] * SIZES[1] + SIZES[1]


def unflat(theta):
    parts = theta.split([torch.Size(shape).numel() for shape in SHAPES])
    parts = [part.view(shape) for part, shape in zip(parts, SHAPES, strict=True)]
    return parts[::2], parts[1::2]


def pre_activations(theta, x):
    """The pre-activations of the hidden units, and y."""
    weights, biases = unflat(theta)
    hidden = []
    for weight, bias in zip(weights, biases, strict=True):
        x = F.linear(x, weight, bias)
        hidden.append(x)
        x = F.relu(x)
    return torch.cat([z.flatten() for z in hidden[:-1]]), hidden[-1]


def update(setup, z, grad, step, rate):
    """The state after an optimizer's step: parameters, then its buffers."""
    theta, *buffers = z.split(COUNT)
    active = torch.ones(COUNT, dtype=torch.bool)
    active[:FIRST_LAYER] = not (setup.freeze and step >= FREEZE)
    if setup.clip:
        grad = grad * (setup.clip / (grad[active].norm() + 1e-6)).clamp(max=1)
    if setup.optimizer == "sgd":
        momentum = 0.9 * buffers[0] + grad
        new = [theta - rate * momentum, momentum]
    else:
        m = 0.9 * buffers[0] + 0.1 * grad
        v = 0.999 * buffers[1] + 0.001 * grad**2
        # A unit that is off for every row has v = 0 in all runs, where sqrt has no derivative.
        size = (v.clamp(min=1e-300) / (1 - 0.999 ** (step + 1))).sqrt() + 1e-2
        new = [theta - rate / (1 - 0.9 ** (step + 1)) * m / size, m, v]
    return torch.cat(
        [torch.where(active, n, o) for n, o in zip(new, (theta, *buffers), strict=True)]
    )


def at_own_gradient(update_here, loss_at, z):
    return update_here(z, torch.func.grad(loss_at)(z[:COUNT]))


@dataclass
class Bounds:
    """The bounds around a run in one dtype, for every step."""

    parameters: list
    losses: list
    #: The largest bound / |z| of a hidden pre-activation z. Below 1 its sign is certain.
    nearest_kink: float


@lru_cache
def reference_run(setup):
    """The native run in float64, and the bounds around it for float64 and float32."""
    setup = replace(setup, recompute=False)  # has no effect on nn.Sequential
    losses, states, rates = train("native", setup, torch.float64)
    bounds = {dtype: Bounds([], [], 0.0) for dtype in (torch.float64, torch.float32)}
    x, target, classes = data(torch.float64)
    slots = 2 if setup.optimizer == "sgd" else 3
    z = torch.cat([states[0], torch.zeros((slots - 1) * COUNT, dtype=torch.float64)])
    # (steps so far, state, state): dF ... dF diag(local) for each of the steps
    carried = {dtype: torch.empty(0, len(z), len(z), dtype=torch.float64) for dtype in bounds}

    def loss_at(theta):
        return loss_of(setup, pre_activations(theta, x)[1], target, classes)

    for step in range(STEPS):
        theta = states[step]
        grad = torch.func.grad(loss_at)(theta)
        here = partial(update, setup, step=step, rate=rates[step])
        map_of_z = torch.func.jacrev(partial(at_own_gradient, here, loss_at))(z)
        map_of_grad = torch.func.jacrev(here, argnums=1)(z, grad)
        dz_dtheta, dy_dtheta = torch.func.jacrev(lambda t: pre_activations(t, x))(theta)
        hidden = pre_activations(theta, x)[0]
        new = here(z, grad)
        # A few roundings for each number that an update makes, none larger than these.
        touched = z.abs() + new.abs() + torch.cat([grad.abs(), grad.abs(), grad**2])[: len(z)]

        for dtype, bound in bounds.items():
            local = local_errors(setup, theta, dtype)
            u = torch.finfo(dtype).eps / 2
            drift = carried[dtype].abs().sum((0, 2))[:COUNT]
            bound.parameters.append(drift)
            bound.losses.append(grad.abs() @ drift + local.loss)
            unsure = local.hidden + dz_dtheta.abs() @ drift
            bound.nearest_kink = max(bound.nearest_kink, (unsure / hidden.abs()).max().item())
            local_grad = local.grad + dy_dtheta.abs().flatten(0, 1).T @ local.grad_output.flatten()
            # Clipping adds a norm over all: COUNT roundings of every element.
            roundings = 10 + (COUNT if setup.clip else 0)
            fresh = torch.diag(map_of_grad.abs() @ local_grad + roundings * u * touched)
            carried[dtype] = torch.cat([map_of_z @ carried[dtype], fresh[None]])
        # `update` repeats what the optimizer did.
        off = (new[:COUNT] - states[step + 1]).abs()
        assert (off <= SLACK * carried[torch.float64].abs().sum((0, 2))[:COUNT]).all()
        z = torch.cat([states[step + 1], new[COUNT:]])
    for dtype, bound in bounds.items():
        bound.parameters.append(carried[dtype].abs().sum((0, 2))[:COUNT])
    return losses, states, bounds


@dataclass
class Local:
    hidden: torch.Tensor
    grad_output: torch.Tensor
    grad: torch.Tensor
    loss: torch.Tensor


def local_errors(setup, theta, dtype):
    """The effect of rounding in `dtype` on the quantities of one step."""
    x, target, classes = data(dtype)
    u = torch.finfo(dtype).eps / 2
    weights, biases = unflat(theta.to(dtype))
    with torch.no_grad():
        hidden = [F.linear(x, weights[0], biases[0]).relu()]
        hidden.append(F.linear(hidden[0], weights[1], biases[1]).relu())
        y = F.linear(hidden[1], weights[2], biases[2])
    exact = support.Exact(x, weights, biases, None, hidden, y)
    y64 = exact.y.value.requires_grad_()
    target, log_p = target.double(), F.log_softmax(exact.y.value, -1).detach()
    loss = loss_of(setup, y64, target, classes)
    (grad_output,) = torch.autograd.grad(loss, y64)
    if setup.loss == "sse":
        # 2 (y - t): the difference, and up to 3 products on the way
        from_y = 2 * exact.y.bound
        own = 4 * u * grad_output.abs()
        # ROWS * 2 squares of differences, summed
        loss_error = (y64.numel() + 4) * u * loss.detach()
    else:
        # log p = y - max - log(sum of exp): each exp is accurate to 2 u, the sum to
        # C u, the logarithm, the differences and exp(log p) to a few more
        rounds = (log_p.shape[1] + 12) * u * (1 + log_p.abs())
        p = log_p.exp()
        from_y = p * (exact.y.bound + exact.y.bound.sum(-1, keepdim=True)) / ROWS
        own = p * rounds / ROWS + 4 * u * grad_output.abs()
        loss_error = rounds.sum() / ROWS + ROWS * u * loss.detach()
    grads = exact.backward(grad_output)
    order = [f"{kind}[{layer}]" for layer in range(3) for kind in ("weights", "biases")]
    return Local(
        # z_l of the hidden layers: `Exact` keeps them as activations with the bound of z
        hidden=torch.cat([a.bound.flatten() for a in exact.a[1:3]]),
        grad_output=from_y + own,
        grad=torch.cat([grads[name].bound.flatten() for name in order]),
        loss=loss_error + (grad_output.abs() * exact.y.bound).sum(),
    )


# -- The comparison ----------------------------------------------------------------------

SETUPS = {
    "sgd-sse": Setup("sgd", "sse"),
    "sgd-cross_entropy": Setup("sgd", "cross_entropy"),
    "adam-sse": Setup("adam", "sse"),
    "adam-cross_entropy": Setup("adam", "cross_entropy"),
    "recompute": Setup("sgd", "sse", recompute=True),
    "clipped": Setup("sgd", "sse", clip=1.0, seed=1),
    "scheduled": Setup("adam", "sse", schedule=True),
    "frozen": Setup("sgd", "sse", freeze=True),
    "all": Setup("adam", "cross_entropy", clip=0.25, schedule=True, freeze=True, recompute=True),
}


def follows(run, setup, dtype):
    expected_losses, expected, bounds = reference_run(setup)
    own, exact = bounds[dtype], bounds[torch.float64]
    assert SLACK * own.nearest_kink < 1, "a unit may be on in one run and off in the other"
    losses, states, _ = run
    for step in range(STEPS):
        off = abs(losses[step] - expected_losses[step])
        assert off <= SLACK * (own.losses[step] + exact.losses[step]), f"loss {step}"
    for step in range(STEPS + 1):
        off = (states[step] - expected[step]).abs()
        allowed = SLACK * (own.parameters[step] + exact.parameters[step])
        assert (off <= allowed).all(), f"parameters before step {step}"
    # The run changed the parameters, and the bounds are small compared with that.
    assert losses[-1] < 0.8 * losses[0]
    moved = (expected[-1] - expected[0]).abs().max()
    assert own.parameters[-1].max() < moved * (1e-9 if dtype == torch.float64 else 0.1)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", SETUPS)
def test_a_training_run(backend, name, dtype):
    with support.count_calls() as calls:
        run = train("fused", SETUPS[name], dtype)
    follows(run, SETUPS[name], dtype)
    # each of its steps was one operator each way
    assert calls["backward"] == STEPS
    assert calls["forward"] == STEPS


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", ["sgd-sse", "adam-sse", "clipped", "scheduled", "frozen"])
def test_a_training_loop_by_hand(backend, name, dtype):
    with support.count_calls() as calls:
        run = train("by hand", SETUPS[name], dtype)
    follows(run, SETUPS[name], dtype)
    assert calls["loss_and_grads"] == STEPS
    assert calls["backward"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", SETUPS)
def test_the_bounds_hold_for_the_native_run(name):
    follows(train("native", SETUPS[name], torch.float32), SETUPS[name], torch.float32)
