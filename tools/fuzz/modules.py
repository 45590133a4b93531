"""Cases of modules: `ReluMLP` and fused models against `nn.Sequential`."""

from __future__ import annotations

import copy
import functools
import pickle
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import relu_mlp

from .case import Case
from .verdict import Refused, Wrong, check_message, compare, describe, outcome


def scaled(module: nn.Module, _: Any, y: Tensor) -> Tensor:
    return 2 * y


def doubled(module: nn.Module, x: tuple[Tensor]) -> tuple[Tensor]:
    return (2 * x[0],)


def negative(linear: nn.Linear, x: Tensor) -> Tensor:
    return nn.functional.linear(x, -linear.weight)


class OwnLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


def random_sequential(case: Case, is_run: bool) -> nn.Sequential:
    """An `nn.Sequential` that is a run. With is_run=False, it is nearly one, or contains runs."""
    r = case.r
    width = case.size(0)
    children: list[nn.Module] = []
    for _ in range(r.choice([1, 2, 2, 3, 4])):
        out = max(1, case.size(0))
        kind = OwnLinear if not is_run and case.chance(0.1) else nn.Linear
        children.append(kind(width, out, bias=case.chance(0.7)))
        children.append(nn.ReLU(inplace=case.chance(0.3)))
        if not is_run and case.chance(0.3):
            children.append(
                r.choice([nn.Identity(), nn.Dropout(0.5), nn.Flatten(0, -2), nn.Tanh()])
            )
        if not is_run and case.chance(0.15):
            children.append(random_sequential(case, True))
            last = [*children[-1].modules()][-1]
            is_linear = isinstance(last, nn.Linear)
            children.append(nn.Linear(last.out_features, out) if is_linear else nn.Identity())
        width = out
    if case.chance(0.5):
        children.pop()
    if case.chance(0.3) and (isinstance(children[-1], nn.Linear) or not is_run):
        children.append(r.choice([nn.Sigmoid(), nn.Tanh()]))
    net = nn.Sequential(*children).double()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(case.integers(parameter.shape))
    return net


def change(case: Case) -> Callable[[nn.Module], Any]:
    """A function that changes a model as users do. It changes every copy in the same way."""
    r = case.r
    n = r.randrange(99)
    how = case.note(
        "change",
        r.choice(
            [
                *("hook", "pre_hook", "weight", "no_bias", "data", "forward", "frozen", "child"),
                *("state", "_parameters", "deepcopy", "pickle", "in_place", "eval", "float"),
            ]
        ),
    )

    def linears(model: nn.Module) -> list[nn.Linear]:
        return [m for m in model.modules() if type(m) is nn.Linear]

    def apply(model: nn.Module) -> nn.Module:
        some = linears(model)
        linear = some[n % len(some)] if some else nn.Linear(1, 1).double()
        if how == "hook":
            linear.register_forward_hook(scaled)
        elif how == "pre_hook":
            linear.register_forward_pre_hook(doubled)
        elif how == "weight":
            linear.weight = nn.Parameter(2 * linear.weight.detach())
        elif how == "no_bias":
            linear.bias = None
        elif how == "data":
            linear.weight.data = 2 * linear.weight.data
        elif how == "forward":
            linear.forward = functools.partial(negative, linear)
        elif how == "frozen":
            linear.requires_grad_(False)
        elif how == "state":
            model.load_state_dict({k: -v for k, v in model.state_dict().items()})
        elif how == "_parameters":
            linear._parameters["weight"] = nn.Parameter(3 * linear.weight.detach())
        elif how == "deepcopy":
            return copy.deepcopy(model)
        elif how == "pickle":
            return pickle.loads(pickle.dumps(model))
        elif how == "in_place":
            with torch.no_grad():
                linear.weight.add_(1)
        elif how == "eval":
            model.eval()
        elif how == "float":
            model.float()
        elif how == "child":
            for m in model.modules():
                names = [name for name, child in m.named_children() if type(child) is nn.ReLU]
                if names and isinstance(m, nn.Sequential):
                    setattr(m, names[n % len(names)], nn.Identity())
                    break
        return model

    return apply


def run_twins(case: Case, twins: list[nn.Module], x: Tensor) -> str:
    """Compares calls of a fused model with those of its native twin, with changes in between."""
    for step in range(case.r.choice([1, 2, 3])):
        if step:
            alter = change(case)
            twins = [alter(model) for model in twins]
        mode = case.mode()
        dtype = next((p.dtype for p in twins[1].parameters()), x.dtype)

        def call(model: nn.Module, dtype: torch.dtype = dtype, step: int = step) -> Any:
            torch.manual_seed(step)  # for dropout
            model.zero_grad()
            y = model(x.detach().clone().to(dtype))
            if y.requires_grad:
                y.backward(torch.ones_like(y))
            return y, [p.grad for p in model.parameters()]

        with mode():
            found, expected = (outcome(functools.partial(call, model)) for model in twins)
        if isinstance(found, Refused) != isinstance(expected, Refused):
            raise Wrong(f"call {step}: {describe(found)}, natively {describe(expected)}")
        if not isinstance(found, Refused):
            loose = "autocast" in case.mode_name or dtype == torch.float32
            compare(f"call {step}", found, expected, not loose, 1e-9)
    return "right"


def module(case: Case) -> str:
    native_net = random_sequential(case, True)
    case.note("module", native_net)
    net = outcome(lambda: relu_mlp.ReluMLP.from_sequential(copy.deepcopy(native_net)))
    if isinstance(net, Refused):
        raise Wrong(f"a run was refused: {net!r}")
    if [*net.state_dict()] != [*native_net.state_dict()]:
        raise Wrong("other keys of the state_dict")
    net.recompute = case.chance(0.3)
    width = native_net[0].in_features + (case.chance(0.1))
    x = case.placed(case.integers(case.shape(case.rows(0), width)), False)
    case.note("x", x)
    return run_twins(case, [net, native_net], x)


def fuse(case: Case) -> str:
    native_net = random_sequential(case, False)
    if case.chance(0.5):
        native_net = nn.Sequential(nn.Identity(), native_net)
    net = copy.deepcopy(native_net)
    if case.chance(0.3):
        alter = change(case)
        net, native_net = alter(net), alter(native_net)
    case.note("module", native_net)
    fused = outcome(lambda: relu_mlp.fuse(net))
    if fused is not net:
        raise Wrong(f"fuse gave {fused!r}")
    if [*net.state_dict()] != [*native_net.state_dict()]:
        raise Wrong("other keys of the state_dict")
    width = next(m for m in native_net.modules() if isinstance(m, nn.Linear)).in_features
    x = case.placed(case.integers([case.rows(0), max(0, width)]), False)
    case.note("x", x)
    return run_twins(case, [net, native_net], x)


def from_sequential(case: Case) -> str:
    """`from_sequential` gives a module with the native results, or raises."""
    native_net = random_sequential(case, case.chance(0.5))
    before = copy.deepcopy(native_net)
    if case.chance(0.6):
        alter = change(case)
        native_net, before = alter(native_net), alter(before)
    case.note("module", native_net)
    given: Any = case.r.choice([None, 3, nn.Linear(2, 2)]) if case.chance(0.1) else native_net
    net = outcome(lambda: relu_mlp.ReluMLP.from_sequential(given))
    if isinstance(net, Refused):
        check_message(net)
        return "refused"
    x = case.integers([case.rows(0), before[0].in_features])
    return run_twins(case, [net, before], x)
