"""The networks of the suite, and the ways to run them.

A step is a function without arguments. A training step runs forward, runs backward from a
given gradient, resets the gradients, and changes one weight in place, as an optimizer does, so
that nothing that was packed for the old weights can be used again. (Steps that return loss and
gradients change no weight, because JAX's arrays can't be changed in place.)
"""

from __future__ import annotations

import copy
import functools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from ... import ReluMLP, loss_and_grads

Step = Callable[[], object]
Shape = tuple[int, ...]  #: rows, in_features, hidden widths, out_features

SHAPES: list[Shape] = [
    (64, 3, 2, 1),
    (64, 1000, 100, 10),
    (1, 8, 64, 64, 4),
    (256, 64, 64, 8),
    (2048, 64, 64, 64),
    (65536, 32, 64, 16),
    (65536, 64, 64, 64, 64, 16),
    (128, 784, 512, 10),
    (2048, 784, 1024, 10),
    (2048, 479, 1024, 1024, 512, 256, 1),
    (4096, 512, 512, 512),
    (2048, 768, 3072, 768),
]

#: A network whose hidden activations take most of the memory, for recompute=True.
WIDE = (64, 1024, 64)


def name_of(shape: Shape) -> str:
    """A shape as text: rows x in-hidden-out, such as 64x3-2-1."""
    return f"{shape[0]}x" + "-".join(map(str, shape[1:]))


def name_of_dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@dataclass
class Job:
    """One case at one shape."""

    shape: Shape
    case: str
    dtype: torch.dtype
    candidates: dict[str, Step]  #: the first is the baseline
    alternatives: Sequence[str] = ()  #: the speed-up of the layer is that over the best of them
    input_grad: bool = False
    has_roofline: bool = True

    def __str__(self) -> str:
        return f"{name_of(self.shape)} {self.case_name} {name_of_dtype(self.dtype)}"

    @property
    def case_name(self) -> str:
        return self.case + ("_input_grad" if self.input_grad else "")


def networks(shape: Shape, dtype: torch.dtype) -> dict[str, nn.Module]:
    """Four copies of one network, each with parameters of its own."""
    net = ReluMLP(shape[1], shape[2:-1], shape[-1], dtype=dtype)
    eager, again, to_compile = (nn.Sequential(*copy.deepcopy(list(net))) for _ in range(3))
    # Dynamo keeps a limited number of graphs for the code of nn.Module, which all networks
    # share: the graphs of the last shape must go.
    torch.compiler.reset()
    # With fullgraph it is an error if nothing is compiled, as with compiled.compile() in PyTorch
    # 2.13.
    compiled = cast(nn.Module, torch.compile(to_compile, fullgraph=True))
    return {"eager": eager, "eager again": again, "compile": compiled, "relu_mlp": net}


def training_job(
    shape: Shape,
    nets: dict[str, nn.Module],
    x: Tensor,
    grad_output: Tensor,
    input_grad: bool,
) -> Job:
    x = x.clone().requires_grad_(input_grad)
    steps = {name: training_step(net, x, grad_output) for name, net in nets.items()}
    steps["by hand"] = training_by_hand(copy.deepcopy(nets["relu_mlp"]), x, grad_output)
    return Job(shape, "training", x.dtype, steps, ["eager", "compile"], input_grad)


def inference_job(shape: Shape, nets: dict[str, nn.Module], x: Tensor) -> Job:
    steps = {name: inference(net, x) for name, net in nets.items()}
    return Job(shape, "inference", x.dtype, steps, ["eager", "compile"])


def loss_job(shape: Shape, nets: dict[str, nn.Module], x: Tensor, target: Tensor) -> Job:
    steps = {"eager": eager_loss_step(nets["eager"], x, target)}
    if has_jax():
        steps["jax"] = jax_loss_step(nets["relu_mlp"], x, target)
    opponent = list(steps)[-1]
    steps["relu_mlp"] = loss_and_grads_step(nets["relu_mlp"], x, target)
    return Job(shape, "loss_and_grads", x.dtype, steps, [opponent])


def recompute_job(rows: int) -> Job:
    """recompute=True against recompute=False, with large activations."""
    n_in, hidden, n_out = WIDE
    net = ReluMLP(n_in, hidden, n_out)
    recompute = ReluMLP.from_sequential(copy.deepcopy(net), recompute=True)
    nets = {"relu_mlp": net, "recompute": recompute}
    x, grad_output = torch.randn(rows, n_in), torch.randn(rows, n_out)
    steps = {name: training_step(net, x, grad_output) for name, net in nets.items()}
    return Job((rows, *WIDE), "recompute", x.dtype, steps, has_roofline=False)


def touch(weight: Tensor) -> None:
    """Changes the version counter of a weight, and keeps its values."""
    with torch.no_grad():
        weight.mul_(1.0)


def parameters_of(net: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """The weights and biases of the Linear children."""
    linears = [child for child in net.children() if isinstance(child, nn.Linear)]
    return [linear.weight for linear in linears], [linear.bias for linear in linears]


def training_step(net: nn.Module, x: Tensor, grad_output: Tensor) -> Step:
    parameters = list(net.parameters())
    leaves = [*parameters, x]

    def step() -> None:
        net(x).backward(grad_output)
        for leaf in leaves:
            leaf.grad = None
        touch(parameters[0])

    return step


def inference(net: nn.Module, x: Tensor) -> Step:
    def call() -> None:
        with torch.no_grad():
            net(x)

    return call


def training_by_hand(net: nn.Module, x: Tensor, grad_output: Tensor) -> Step:
    """The training step as the source documents write it: matrix products and no autograd."""
    weights, biases = ([each.detach() for each in group] for group in parameters_of(net))
    rows, input_grad = x.detach(), x.requires_grad

    def step() -> None:
        activations = [rows]
        for weight, bias in zip(weights[:-1], biases[:-1], strict=True):
            activations.append(torch.clamp_min(torch.mm(activations[-1], weight.t()) + bias, 0))
        torch.mm(activations[-1], weights[-1].t()) + biases[-1]

        delta = grad_output
        grads = []
        for layer in reversed(range(len(weights))):
            grads += [torch.mm(delta.t(), activations[layer]), delta.sum(dim=0)]
            if layer > 0:
                delta = torch.mm(delta, weights[layer])
                delta[activations[layer] <= 0] = 0
            elif input_grad:
                grads.append(torch.mm(delta, weights[0]))
        touch(weights[0])

    return step


def eager_loss_step(net: nn.Module, x: Tensor, target: Tensor) -> Step:
    parameters = list(net.parameters())
    loss = nn.MSELoss(reduction="sum")

    def step() -> None:
        loss(net(x), target).backward()
        for parameter in parameters:
            parameter.grad = None

    return step


def loss_and_grads_step(net: nn.Module, x: Tensor, target: Tensor) -> Step:
    weights, biases = parameters_of(net)

    def step() -> None:
        loss_and_grads(x, target, weights, biases, loss="sse")

    return step


@functools.cache
def has_jax() -> bool:
    """Whether JAX can be imported. If not, it prints the reason once."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    try:
        import jax  # noqa: F401
    except ImportError as problem:
        print(f"without JAX: {problem}")
        return False
    return True


def jax_loss_step(net: nn.Module, x: Tensor, target: Tensor) -> Step:
    """`jax.jit(jax.value_and_grad(loss))` of the same network, on the CPU.

    The weights are JAX arrays. JAX uses one thread for each core, whatever PyTorch uses.
    """
    import jax
    import jax.numpy as jnp

    def array(tensor: Tensor) -> jax.Array:
        return jnp.array(tensor.detach().numpy())

    def loss(
        layers: Sequence[tuple[jax.Array, jax.Array]], x: jax.Array, target: jax.Array
    ) -> jax.Array:
        for n, (weight, bias) in enumerate(layers):
            x = x @ weight.T + bias
            if n < len(layers) - 1:
                x = jax.nn.relu(x)
        return jnp.sum((x - target) ** 2)

    value_and_grad = jax.jit(jax.value_and_grad(loss))
    weights, biases = (list(map(array, group)) for group in parameters_of(net))
    arguments = list(zip(weights, biases, strict=True)), array(x), array(target)

    def step() -> None:
        jax.block_until_ready(value_and_grad(*arguments))

    return step
