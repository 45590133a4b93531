"""Per-sample gradients, second derivatives, ensembles and the compiled layer, compared with the
native network.

`python benchmarks/composition.py` measures by turns, in float32, and writes the figures to
results/composition.json. The first candidate of a case is the baseline. The second is the same
once more, which shows the noise. `torch.func` and the second derivatives run on one thread,
compiled training steps on all.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, stack_module_state, vmap

from relu_mlp import ReluMLP, linearize
from relu_mlp.cli.bench.candidates import Shape, Step, name_of, parameters_of
from relu_mlp.cli.bench.turns import Figure, machine, take_turns

PER_SAMPLE: list[Shape] = [(256, 64, 64, 8), (64, 3, 2, 1), (256, 784, 512, 10)]
SECOND: list[Shape] = [(256, 64, 64, 8), (2048, 64, 64, 64)]
COMPILED: list[Shape] = [
    (64, 3, 2, 1),
    (1, 8, 64, 64, 4),
    (256, 64, 64, 8),
    (2048, 64, 64, 64),
    (65536, 32, 64, 16),
    (65536, 64, 64, 64, 64, 16),
]


def twins(shape: Shape) -> tuple[nn.Module, nn.Module, Tensor, Tensor]:
    """The native network, the fused one with equal parameters, x and a target."""
    rows, n_in, *hidden, n_out = shape
    net = ReluMLP(n_in, hidden, n_out)
    return (
        nn.Sequential(*copy.deepcopy(net)),
        net,
        torch.randn(rows, n_in),
        torch.randn(rows, n_out),
    )


def loss_of(net: nn.Module, parameters: dict[str, Tensor], x: Tensor, target: Tensor) -> Tensor:
    return (functional_call(net, parameters, (x,)) - target).square().sum()


def by_turns(case: str, native: Step, fused: Step, **more: Step) -> list[Figure]:
    return take_turns(case, {"native": native, "again": native, "relu_mlp": fused, **more})


def per_sample(shape: Shape) -> list[Figure]:
    """Every row's gradient for every parameter, by vmap(grad) and by hand; and only their norms."""
    native, net, x, target = twins(shape)

    def gradients(model: nn.Module) -> Step:
        parameters = {name: p.detach() for name, p in model.named_parameters()}
        each = vmap(grad(partial(loss_of, model)), in_dims=(None, 0, 0))
        return lambda: each(parameters, x, target)

    weights, biases = ([p.detach() for p in each] for each in parameters_of(net))

    def norms() -> Tensor:
        linear = linearize(x, weights, biases)
        return linear.row_norms(2 * (linear.y - target))

    def rows() -> object:
        linear = linearize(x, weights, biases)
        return linear.row_gradients(2 * (linear.y - target))

    return by_turns(
        f"{name_of(shape)} per-sample gradients",
        gradients(native),
        gradients(net),
        row_gradients=rows,
        row_norms=norms,
    )


def second(shape: Shape) -> list[Figure]:
    """A gradient penalty, and a Hessian-vector product by forward over reverse."""
    native, net, x, target = twins(shape)
    x.requires_grad_()

    def penalty(model: nn.Module) -> Step:
        def step() -> None:
            model.zero_grad()
            (by_x,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
            by_x.square().sum().backward()

        return step

    def product(model: nn.Module) -> Step:
        parameters = {name: p.detach() for name, p in model.named_parameters()}
        tangents = {name: torch.randn_like(p) for name, p in parameters.items()}
        fixed = partial(loss_of, model, x=x.detach(), target=target)
        return lambda: jvp(grad(fixed), (parameters,), (tangents,))[1]

    return [
        *by_turns(f"{name_of(shape)} gradient penalty", penalty(native), penalty(net)),
        *by_turns(f"{name_of(shape)} Hessian-vector product", product(native), product(net)),
    ]


def ensemble(shape: Shape, members: int = 16) -> list[Figure]:
    """Many networks of one shape on the same rows, in one call."""
    native, net, x, _ = twins(shape)

    def outputs(model: nn.Module) -> Step:
        models = [copy.deepcopy(model) for _ in range(members)]
        parameters, buffers = stack_module_state(models)
        each = vmap(lambda p: functional_call(model, (p, buffers), (x,)))
        return torch.no_grad()(lambda: each(parameters))

    return by_turns(f"{name_of(shape)} ensemble of {members}", outputs(native), outputs(net))


def compiled(shape: Shape) -> list[Figure]:
    """A training step of the compiled layer, compared with that of the compiled native one."""
    native, net, x, target = twins(shape)
    torch.compiler.reset()

    def training(model: nn.Module) -> Step:
        function: Callable[[Tensor], Tensor] = torch.compile(model, fullgraph=True)
        last = list(model.parameters())[-1]

        def step() -> None:
            loss = (function(x) - target).square().sum()
            loss.backward()
            with torch.no_grad():
                last.add_(1e-6)  # as in training: nothing packed for old weights is reused
            model.zero_grad()

        step()
        return step

    return by_turns(f"{name_of(shape)} compiled training", training(native), training(net))


def main() -> None:
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    figures: list[Figure] = []
    torch.set_num_threads(1)
    for shape in PER_SAMPLE:
        figures += per_sample(shape)
    for shape in SECOND:
        figures += second(shape)
    figures += ensemble((256, 64, 64, 8))
    torch.set_num_threads(threads)
    for shape in COMPILED:
        figures += compiled(shape)
    print(*figures, sep="\n")
    path = Path(__file__).parent / "results" / "composition.json"
    document = {"machine": machine(), "figures": [asdict(figure) for figure in figures]}
    path.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
