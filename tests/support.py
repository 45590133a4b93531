"""What the tests share: the native network, a network in float64 with bounds on
the rounding errors, and a count of the operators' calls.

Every tolerance in these tests comes from here. A sum of n products, in any
order, with or without fused multiply-add, in arithmetic of unit roundoff u, is
off by at most gamma(n) = n u / (1 - n u) times the sum of the absolute values
(Higham, Accuracy and Stability of Numerical Algorithms, section 3.1). The bounds
are carried through the layers beside the values.
"""

from __future__ import annotations

import linecache
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import relu_mlp
from relu_mlp import functional, ops, reference
from relu_mlp._torch_private import below_autograd

BACKENDS = ["reference"] if ops.LIBRARY_PATH is None else ["extension", "reference"]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
ACTIVATIONS = [None, "relu", "sigmoid", "tanh"]

#: PyTorch's matrix products, as its dispatcher calls them.
PRODUCTS = {"aten::addmm", "aten::mm", "aten::linear", "aten::bmm", "aten::matmul"}


def native(x, weights, biases=None, output_activation=None):
    """The plain PyTorch that `relu_mlp.relu_mlp` equals."""
    for layer, weight in enumerate(weights):
        x = F.linear(x, weight, biases[layer] if biases else None)
        if layer < len(weights) - 1:
            x = F.relu(x)
    return getattr(torch, output_activation)(x) if output_activation else x


def class_from_source(base, body, arguments="self, x", before="", is_async=False, **names):
    """A subclass whose `forward` has this text as its body, to be found as a notebook's is.

    Args:
        before: the lines before it in the class, such as a decorator.
        names: the global variables of the method, besides torch, nn and F.
    """
    header = f"{before}\n{'async ' * is_async}def forward({arguments}):\n"
    method = header + textwrap.indent(textwrap.dedent(body).strip("\n"), "    ")
    source = "class Own(Base):\n" + textwrap.indent(method, "    ") + "\n"
    name = f"<source {len(linecache.cache)}>"
    linecache.cache[name] = (len(source), None, source.splitlines(True), name)
    namespace = {
        "__name__": base.__module__,
        "Base": base,
        "torch": torch,
        "nn": nn,
        "F": F,
        **names,
    }
    exec(compile(source, name, "exec", dont_inherit=True), namespace)
    return namespace["Own"]


def make_network(sizes, bias="all", dtype=torch.float64, requires_grad=False, scale=1.0):
    """Weights and biases; `bias` is "all", "none" or "some" (those of odd layers are None)."""
    weights = [
        (scale * torch.randn(n_out, n_in, dtype=torch.float64) / max(1, n_in) ** 0.5)
        .to(dtype)
        .requires_grad_(requires_grad)
        for n_in, n_out in zip(sizes, sizes[1:])
    ]
    if bias == "none":
        return weights, None
    biases = [
        None
        if bias == "some" and layer % 2
        else torch.randn(n_out, dtype=torch.float64).to(dtype).requires_grad_(requires_grad)
        for layer, n_out in enumerate(sizes[1:])
    ]
    return weights, biases


@dataclass
class Bounded:
    """Values in float64 and how far a computation in another dtype may be off."""

    value: Tensor
    bound: Tensor

    def check(self, actual: Tensor | None, name: str) -> None:
        assert actual is not None, f"{name} is missing"
        assert actual.shape == self.value.shape, f"{name}: {actual.shape} != {self.value.shape}"
        excess = (actual.double() - self.value).abs() - self.bound
        worst = int(excess.flatten().argmax()) if excess.numel() else 0
        found, value, bound = (t.flatten()[worst:] for t in (actual, self.value, self.bound))
        assert not excess.numel() or excess.flatten()[worst] <= 0, (
            f"{name}, element {worst}: {found[0].item()!r} should be {value[0].item()!r} "
            f"within {bound[0].item():.3g}"
        )


class Exact:
    """A network in float64 whose results carry bounds for one dtype.

    Where a pre-activation is within its bound of 0, the rounding decides
    whether the unit is on: there, and only there, the mask is taken from the
    activations of the implementation under test.

    Args:
        x: (rows, in_features), in the dtype under test, as are the others.
        hidden: the hidden activations that the implementation found.
    """

    def __init__(self, x, weights, biases, output_activation, hidden, y):
        dtype = x.dtype
        info = torch.finfo(dtype)
        self.store = info.eps / 2  # one rounding to dtype
        self.tiny = info.smallest_normal * info.eps  # ... of a number close to 0
        # bfloat16 and float16 are summed in float32
        self.u = min(info.eps, torch.finfo(torch.float32).eps) / 2
        self.activation = output_activation
        self.weights = [w.detach().double() for w in weights]
        biases = biases or [None] * len(weights)
        self.a = [Bounded(x.detach().double(), torch.zeros_like(x, dtype=torch.float64))]
        self.masks = []
        for layer, weight in enumerate(self.weights):
            bias = biases[layer]
            z = self.product(self.a[-1], Bounded(weight.T, torch.zeros_like(weight.T)), bias)
            last = layer == len(weights) - 1
            if last and output_activation != "relu":
                break
            found = (y if last else hidden[layer]).detach().reshape(z.value.shape) > 0
            unclear = z.value.abs() <= z.bound
            on = torch.where(unclear, found, z.value > 0)
            self.masks.append(on)
            self.a.append(Bounded(z.value.clamp(min=0), z.bound))
        if output_activation == "sigmoid":
            # |sigmoid'| <= 1/4; PyTorch's functions are good to a few units
            y64 = z.value.sigmoid()
            self.y = self.stored(Bounded(y64, z.bound / 4 + 4 * self.u * y64.abs()))
        elif output_activation == "tanh":
            y64 = z.value.tanh()
            self.y = self.stored(Bounded(y64, z.bound + 4 * self.u * y64.abs()))
        elif output_activation == "relu":
            self.y = self.a.pop()
        else:
            self.y = z

    def gamma(self, n: int) -> float:
        assert n * self.u < 0.5, "the bound says nothing about sums this long"
        return n * self.u / (1 - n * self.u)

    def stored(self, b: Bounded) -> Bounded:
        return Bounded(b.value, b.bound + self.store * (b.value.abs() + b.bound) + self.tiny)

    def product(self, a: Bounded, b: Bounded, bias: Tensor | None = None) -> Bounded:
        """a b + bias, by sums of products, then stored."""
        value = a.value @ b.value
        largest = (a.value.abs() + a.bound) @ (b.value.abs() + b.bound)
        carried = largest - a.value.abs() @ b.value.abs()
        if bias is not None:
            value = value + bias.detach().double()
            largest = largest + bias.detach().double().abs()
        terms = a.value.shape[1] + (bias is not None)
        return self.stored(Bounded(value, carried + self.gamma(terms) * largest))

    def backward(self, grad_output: Tensor) -> dict[str, Bounded]:
        """The gradients by name: "x", "weights[0]", ..., "biases[0]", ..."""
        g = grad_output.detach().double().reshape(self.y.value.shape)
        y, none = self.y, torch.zeros_like(g)
        if self.activation == "sigmoid":
            factor = Bounded(y.value * (1 - y.value), y.bound + 3 * self.u)
        elif self.activation == "tanh":
            factor = Bounded(1 - y.value**2, (2 * y.value.abs() + y.bound) * y.bound + 3 * self.u)
        elif self.activation == "relu":
            factor = Bounded(self.masks[-1].double(), none)
        else:
            factor = Bounded(torch.ones_like(g), none)
        delta = Bounded(g * factor.value, g.abs() * factor.bound)
        if self.activation in ("sigmoid", "tanh"):
            # PyTorch stores this delta in the dtype, and rounds two products
            size = delta.value.abs() + delta.bound
            delta = self.stored(Bounded(delta.value, delta.bound + 3 * self.u * size))
        grads = {}
        for layer in reversed(range(len(self.weights))):
            transposed = Bounded(delta.value.T, delta.bound.T)
            ones = torch.ones(g.shape[0], 1, dtype=torch.float64)
            grads[f"weights[{layer}]"] = self.product(transposed, self.a[layer])
            sums = self.product(transposed, Bounded(ones, torch.zeros_like(ones)))
            grads[f"biases[{layer}]"] = Bounded(sums.value[:, 0], sums.bound[:, 0])
            weight = self.weights[layer]
            delta = self.product(delta, Bounded(weight, torch.zeros_like(weight)))
            if layer:
                on = self.masks[layer - 1]
                delta = Bounded(delta.value * on, delta.bound * on)
        grads["x"] = delta
        return grads


def hidden_of(implementation, x, weights, biases, output_activation):
    """y and the hidden activations that an implementation finds."""
    present = [ops.NO_TENSOR if b is None else b.detach() for b in biases or []]
    with below_autograd(), torch.no_grad():
        return implementation.forward(
            x.detach(),
            [w.detach() for w in weights],
            present,
            functional.activation_name(output_activation),
            True,
        )


@contextmanager
def count_calls() -> Iterator[dict[str, int]]:
    """Counts the calls of the operators, or of the reference in their place.

    The keys are "forward", "backward" and "loss_and_grads", and "native" for
    the linear layers and matrix products that ran outside of them. A pass is
    counted under its direction, whichever of the operators makes it.
    """
    counts = dict.fromkeys(["forward", "backward", "loss_and_grads", "native"], 0)
    passes = {
        "relu_mlp": "forward",
        "forward": "forward",
        "backward": "backward",
        "recompute_backward": "backward",
        "loss_and_grads": "loss_and_grads",
    }
    inside = [0]

    class Mode(TorchDispatchMode):
        understands_relu_mlp = True

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            name = func._schema.name
            if name.startswith("relu_mlp::"):
                counts[passes[name.removeprefix("relu_mlp::")]] += 1
            elif name in PRODUCTS and not inside[0]:
                counts["native"] += 1
            return func(*args, **(kwargs or {}))

    originals = {name: getattr(reference, name) for name in passes if name != "relu_mlp"}
    passes |= {f"_{name}_in_cpp": direction for name, direction in passes.items()}

    def counted(name):
        def function(*args, **kwargs):
            if not inside[0]:
                counts[passes[name]] += 1
            inside[0] += 1
            try:
                return originals[name](*args, **kwargs)
            finally:
                inside[0] -= 1

        return function

    for name in originals:
        setattr(reference, name, counted(name))
    try:
        with Mode():
            yield counts
    finally:
        for name, function in originals.items():
            setattr(reference, name, function)


@contextmanager
def dispatched() -> Iterator[list[tuple[str, int]]]:
    """Collects what PyTorch computes: each operation's name, and the most elements
    that a tensor returned by it holds in memory."""
    operations: list[tuple[str, int]] = []

    class Mode(TorchDispatchMode):
        understands_relu_mlp = True

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            held = [
                tensor.untyped_storage().nbytes() // tensor.element_size()
                for tensor in tree_leaves(result)
                if isinstance(tensor, Tensor)
            ]
            operations.append((func._schema.name, max(held, default=0)))
            return result

    with Mode():
        yield operations


@contextmanager
def saved_tensors() -> Iterator[list[Tensor]]:
    """Collects the tensors that are saved for a backward pass."""
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield saved


def layers_of(net: Sequence[torch.nn.Module]) -> tuple[list[Tensor], list[Tensor | None]]:
    linears = [m for m in net if isinstance(m, torch.nn.Linear)]
    return [m.weight for m in linears], [m.bias for m in linears]


def integers_(module):
    """Integers from -2 to 2 for every parameter, the same ones in every network alike."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randint(-2, 3, parameter.shape))
    return module


def twins(in_features, hidden, out_features, seed=0, **arguments):
    """A ReluMLP and the nn.Sequential that it stands for, with equal parameters of their own."""
    torch.manual_seed(seed)
    net = relu_mlp.ReluMLP(in_features, hidden, out_features, **arguments)
    torch.manual_seed(seed)
    sizes = [in_features, *([hidden] if isinstance(hidden, int) else hidden), out_features]
    options = {k: v for k, v in arguments.items() if k in ("bias", "device", "dtype")}
    children = []
    for n_in, n_out in zip(sizes, sizes[1:]):
        children += [torch.nn.Linear(n_in, n_out, **options), torch.nn.ReLU()]
    children.pop()
    last = arguments.get("output_activation")
    if last:
        children.append(
            {"relu": torch.nn.ReLU, "sigmoid": torch.nn.Sigmoid, "tanh": torch.nn.Tanh}[last]()
        )
    return net, torch.nn.Sequential(*children)
