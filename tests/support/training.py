"""Training steps in plain PyTorch, and bounds on what rounding changes in one step.

A step of Adam divides by the root of its state, so an error of a gradient may grow from one step to
the next. The bounds here are for one step from equal parameters and equal states.
"""

from __future__ import annotations

import copy
import random
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import relu_mlp
from relu_mlp import TrainingStep, loss_and_grads

LOSSES = {
    "sse": lambda y, target: (y - target).square().sum(),
    "half_sse": lambda y, target: (y - target).square().sum() / 2,
    "mse": F.mse_loss,
}


def plain_step(net, loss, optimizer, x, target, max_norm=None):
    """The loop in the docstring of `TrainingStep`."""
    optimizer.zero_grad()
    value = LOSSES[loss](net(x), target)
    value.backward()
    if max_norm is not None:
        nn.utils.clip_grad_norm_(net.parameters(), max_norm)
    optimizer.step()
    return value.detach()


def network_of(net):
    """Weights, biases and output activation of an nn.Sequential of layers."""
    linears = [child for child in net.children() if isinstance(child, nn.Linear)]
    activation = next((n for n, k in MODULES.items() if type(net[-1]) is k), None)
    return [m.weight for m in linears], [m.bias for m in linears], activation


def own_gradients(net, loss, x, target):
    """The loss and the gradients by parameter from `loss_and_grads`: the operator's own bits."""
    weights, biases, activation = network_of(net)
    result = loss_and_grads(x, target, weights, biases, loss=loss, output_activation=activation)
    pairs = [*zip(weights, result.weights), *zip(biases, result.biases or [])]
    return result.loss, {p: g for p, g in pairs if p is not None}


def step_by_gradients(net, loss, optimizer, x, target, max_norm=None):
    """The loop with the gradients of `loss_and_grads`."""
    value, grads = own_gradients(net, loss, x, target)
    optimizer.zero_grad()
    for parameter, grad in grads.items():
        parameter.grad = grad if parameter.requires_grad else None
    if max_norm is not None:
        nn.utils.clip_grad_norm_(net.parameters(), max_norm)
    optimizer.step()
    return value


MODULES = {"relu": nn.ReLU, "sigmoid": nn.Sigmoid, "tanh": nn.Tanh}


def contracts_like_pytorch() -> bool:
    """Whether PyTorch's kernels and the operator's use the same fused multiply-adds."""
    has_fma = "AVX" in torch.backends.cpu.get_cpu_capability()
    return has_fma and relu_mlp.build_info().instruction_set != "baseline"


# -- Random steps --------------------------------------------------------------------------------


class Setting(NamedTuple):
    """An optimizer's class and its arguments, for all parameters or by group."""

    kind: type[torch.optim.Optimizer]
    arguments: dict[str, Any]
    groups: list[dict[str, Any]]

    def make(self, net: nn.Module) -> torch.optim.Optimizer:
        parameters = list(net.parameters())
        if not self.groups:
            return self.kind(parameters, **self.arguments)
        n = len(self.groups)
        groups = [{"params": parameters[k::n], **own} for k, own in enumerate(self.groups)]
        return self.kind([g for g in groups if g["params"]], **self.arguments)


def random_setting(r: random.Random, kind: type[torch.optim.Optimizer]) -> Setting:
    arguments = {
        "lr": r.choice([0.1, 0.01, 0.003]),
        "weight_decay": r.choice([0, 0.01, 0.3]),
        "maximize": r.random() < 0.3,
        **r.choice([{}, {}, {"foreach": True}, {"foreach": False}, {"fused": True}]),
    }
    own: list[dict[str, Any]]
    if kind is torch.optim.SGD:
        arguments["momentum"] = r.choice([0, 0.9, 0.5])
        arguments["nesterov"] = arguments["momentum"] > 0 and r.random() < 0.4
        if not arguments["nesterov"]:
            arguments["dampening"] = r.choice([0, 0.3])
        own = [{"momentum": 0.7}, {"lr": 0.02, "maximize": False}, {"weight_decay": 0.1}]
    else:
        arguments["betas"] = r.choice([(0.9, 0.999), (0.5, 0.9), (0.2, 0.7), (0.0, 0.99)])
        arguments["eps"] = r.choice([1e-8, 1e-3])
        arguments["amsgrad"] = r.random() < 0.4
        own = [{"betas": (0.8, 0.95)}, {"lr": 0.02, "eps": 1e-5}, {"weight_decay": 0.1}]
    return Setting(kind, arguments, r.choice([[], [], own[:1], own[:2], own]))


# -- Bounds --------------------------------------------------------------------------------------


class Bound(NamedTuple):
    """How far two steps may be apart in a parameter and in its state, by name."""

    parameter: Tensor
    state: dict[str, Tensor]


def bound_of_step(
    optimizer: torch.optim.Optimizer, parameter: Tensor, grad: Tensor, error: Tensor | float
) -> Bound:
    """Bounds for one step from the present values, before it is done.

    Both steps compute in the dtype of the parameter, every operation of which has a relative error
    of at most u. `grad` is the gradient, in float64; in both steps it is off by at most `error`.
    The bounds are twice those for one step against the exact one.
    """
    (group,) = (g for g in optimizer.param_groups if any(p is parameter for p in g["params"]))
    state = {name: value.double() for name, value in optimizer.state.get(parameter, {}).items()}
    info = torch.finfo(parameter.dtype)
    bounds = _of_sgd if isinstance(optimizer, torch.optim.SGD) else _of_adam
    found = bounds(group, state, parameter.detach().double(), grad.double(), error, info.eps / 2)
    # Numbers close to 0 have an absolute error.
    tiny = 16 * info.smallest_normal * info.eps
    return Bound(
        2 * found.parameter + tiny, {name: 2 * b + tiny for name, b in found.state.items()}
    )


def _of_sgd(group, state, p, g, e, u):
    # The size of every term, and an error of e plus a rounding for each of its operations.
    size = g.abs() + group["weight_decay"] * p.abs()
    e = e + 3 * u * size
    of_state = {}
    if group["momentum"]:
        buffer = state.get("momentum_buffer")
        undampened = 1 if buffer is None else abs(1 - group["dampening"])
        buffer = torch.zeros_like(p) if buffer is None else buffer
        buffer_size = group["momentum"] * buffer.abs() + undampened * size
        buffer_error = undampened * e + 4 * u * buffer_size
        of_state["momentum_buffer"] = buffer_error
        if group["nesterov"]:
            size = size + group["momentum"] * buffer_size
            e = e + group["momentum"] * buffer_error + 3 * u * size
        else:
            size, e = buffer_size, buffer_error
    return Bound(group["lr"] * e + 3 * u * (p.abs() + group["lr"] * size), of_state)


def _of_adam(group, state, p, g, e, u):
    (beta1, beta2), lr, decay = group["betas"], float(group["lr"]), group["weight_decay"]
    mean, square = (state.get(k, torch.zeros_like(p)) for k in ("exp_avg", "exp_avg_sq"))
    step = float(state.get("step", 0)) + 1
    if group["maximize"]:
        g = -g
    if decay and not group["decoupled_weight_decay"]:
        e = e + 3 * u * (g.abs() + decay * p.abs())
        g = g + decay * p
    size = beta1 * mean.abs() + (1 - beta1) * g.abs()
    mean_error = (1 - beta1) * e + 6 * u * (size + mean.abs() + g.abs())
    mean = beta1 * mean + (1 - beta1) * g
    square = beta2 * square + (1 - beta2) * g.square()
    square_error = (1 - beta2) * e * (2 * g.abs() + e) + 6 * u * square
    of_state = {"exp_avg": mean_error, "exp_avg_sq": square_error, "step": torch.zeros(())}
    if group["amsgrad"]:
        # The larger of two numbers is off by no more than the one that is off by more.
        square = torch.maximum(state.get("max_exp_avg_sq", torch.zeros_like(p)), square)
        of_state["max_exp_avg_sq"] = square_error
    factor = (1 - beta2**step) ** -0.5
    root, eps = square.sqrt() * factor, group["eps"]
    least = (square - square_error).clamp(min=0).sqrt() * factor
    divisor, least = root + eps, (least + eps) * (1 - 8 * u)
    step_size = lr / (1 - beta1**step)
    moved = mean.abs() / divisor
    error = step_size * (
        mean_error / least + mean.abs() * (1 / least - 1 / divisor) + 8 * u * moved
    )
    decayed = p.abs() * (1 + (lr * decay if group["decoupled_weight_decay"] else 0))
    return Bound(error + 4 * u * decayed + u * step_size * moved, of_state)


# -- Comparisons ---------------------------------------------------------------------------------


def copy_training(source: tuple, target: tuple) -> None:
    """Copies parameters and state from one (net, optimizer) to another."""
    target[0].load_state_dict(source[0].state_dict())
    # load_state_dict would share the tensors of the state.
    target[1].load_state_dict(copy.deepcopy(source[1].state_dict()))


def everything(net: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Copies of all parameters and states, by name."""
    found = {}
    for name, parameter in net.named_parameters():
        found[name] = parameter.detach().clone()
        for key, value in optimizer.state.get(parameter, {}).items():
            if value is not None:
                found[f"{key} of {name}"] = value.detach().clone()
    return found


def served(step: TrainingStep, x: Tensor, target: Tensor) -> Tensor:
    """A step that the operator must have served."""
    loss = step(x, target)
    assert step.reason is None, step.reason
    return loss
