"""The Jacobian and products with it, compared with torch.func on the native network.

`python benchmarks/jacobian.py` measures by turns, in float32 on one thread, and writes the figures
to results/jacobian.json. The first candidate of a case is the baseline. "per row" is `torch.vmap`
over `jacrev` of one row: like `jacobian`, it uses that rows do not mix.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.func import jacrev, jvp, vjp, vmap
from torch.nn import functional as F

from relu_mlp import Parameters, ReluMLP, jacobian, linearize
from relu_mlp.cli.bench.candidates import Shape, Step, name_of, parameters_of
from relu_mlp.cli.bench.turns import Figure, machine, take_turns

SHAPES: list[Shape] = [(64, 8, 64, 64, 4), (64, 3, 2, 1), (256, 64, 64, 8)]

Pair = tuple[list[Tensor], list[Tensor]]


def native(parameters: Pair, x: Tensor) -> Tensor:
    weights, biases = parameters
    for layer, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        x = F.linear(x, weight, bias)
        if layer < len(weights) - 1:
            x = F.relu(x)
    return x


def jacobian_candidates(x: Tensor, parameters: Pair) -> dict[str, Step]:
    whole = jacrev(native)
    per_row = vmap(jacrev(native), in_dims=(None, 0))
    return {
        "jacrev": lambda: whole(parameters, x),
        "jacrev again": lambda: whole(parameters, x),
        "per row": lambda: per_row(parameters, x),
        "relu_mlp": lambda: jacobian(x, *parameters),
    }


def product_candidates(x: Tensor, parameters: Pair) -> dict[str, Step]:
    """J^T J v, including the forward pass."""
    tangent = tuple([torch.randn_like(each) for each in group] for group in parameters)
    function = partial(native, x=x)

    def by_torch_func() -> object:
        change = jvp(function, (parameters,), (tangent,))[1]
        return vjp(function, parameters)[1](change)

    def by_linearize() -> object:
        return linearize(x, *parameters).gauss_newton(Parameters(*map(tuple, tangent)))

    return {"torch.func": by_torch_func, "again": by_torch_func, "relu_mlp": by_linearize}


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    figures: list[Figure] = []
    for shape in SHAPES:
        rows, n_in, *hidden, n_out = shape
        weights, biases = parameters_of(ReluMLP(n_in, hidden, n_out))
        parameters = [w.detach() for w in weights], [b.detach() for b in biases]
        x = torch.randn(rows, n_in)
        figures += take_turns(f"{name_of(shape)} jacobian", jacobian_candidates(x, parameters))
        figures += take_turns(f"{name_of(shape)} J^T J v", product_candidates(x, parameters))
    print(*figures, sep="\n")
    path = Path(__file__).parent / "results" / "jacobian.json"
    document = {"machine": machine(), "figures": [asdict(figure) for figure in figures]}
    path.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
