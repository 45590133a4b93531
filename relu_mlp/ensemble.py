"""`ReluMLPEnsemble`: networks of one shape in stacked parameters, and how they are taken apart."""

from __future__ import annotations

import copy
import operator
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import Linear, Parameter, ReLU
from torch.optim import Optimizer

from ._torch_private import children_of, get_parameter_hooks, is_step_replaced
from .activations import ACTIVATION_NAMES, OUTPUT_ACTIVATIONS, OutputActivation
from .functional import is_plain, relu_mlp
from .modules import ReluMLP
from .ops import NO_TENSOR
from .run import Run, find_run, is_patched

#: The names of output activations by the operators' names.
_PUBLIC_NAMES: dict[str, Any] = {name: key for key, name in ACTIVATION_NAMES.items()}


class StackedLinear(nn.Module):
    """The parameters of `nn.Linear` for each network of an ensemble."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """weight: (networks, out_features, in_features); bias: (networks, out_features)."""
        super().__init__()
        self.weight = Parameter(weight)
        self.bias: Parameter | None
        self.register_parameter("bias", None if bias is None else Parameter(bias))

    def linear(self, index: int) -> Linear:
        """The layer of one network, with copies of its parameters."""
        _, out_features, in_features = self.weight.shape
        linear: Linear = _Uninitialized(
            in_features, out_features, self.bias is not None, device="meta"
        )
        linear.__class__ = Linear
        for name, stacked in self.named_parameters():
            values = stacked.detach()[index].clone(memory_format=torch.contiguous_format)
            setattr(linear, name, Parameter(values, requires_grad=stacked.requires_grad))
        return linear

    def extra_repr(self) -> str:
        networks, out_features, in_features = self.weight.shape
        return (
            f"networks={networks}, in_features={in_features}, out_features={out_features}, "
            f"bias={self.bias is not None}"
        )


class _Uninitialized(Linear):
    """A Linear that draws no random numbers."""

    def reset_parameters(self) -> None:
        pass


class ReluMLPEnsemble(nn.Module):
    """Networks of one shape, `ReluMLP`, side by side in stacked parameters.

    `TrainingStep` trains them in one call, each as it would be trained alone. So an ensemble is
    for many seeds, folds of a cross-validation, learning rates, or tasks with the same network.

    The parameters have the names of those of a `ReluMLP`, such as ``"0.weight"`` and ``"2.bias"``,
    and one more dimension in front. `torch.func.stack_module_state` stacks them in the same way.
    After a given seed, the initial values are those of `networks` ReluMLPs created one after
    another.

    Args:
        networks: how many networks, at least 1.
        in_features, hidden_features, out_features, bias, output_activation: as for `ReluMLP`.
        device, dtype: the device and dtype of the parameters.

    Shape:
        (rows, in_features), which all networks share, or (networks, rows, in_features), one input
        for each; to (networks, rows, out_features).

    Raises:
        TypeError: if a width or `networks` is not an int.
        ValueError: if `networks` or a hidden width is below 1, or if the activation is unknown.
        RuntimeError: if `in_features` or `out_features` is negative. A call raises it if the shape,
            dtype or device of the input does not fit.

    Example::

        ensemble = ReluMLPEnsemble(8, 3, [64, 64], 1)
        optimizer = torch.optim.Adam(ensemble.parameters())
        step = TrainingStep(ensemble, "mse", optimizer, lr=[0.001 * 2**n for n in range(8)])
        losses = step.epoch(x, y, batch_size=64)  # (batches, 8)
        best = ensemble.network(losses[-1].argmin())
    """

    output_activation: OutputActivation | None  #: as in the constructor

    def __init__(
        self,
        networks: int,
        in_features: int,
        hidden_features: int | Iterable[int],
        out_features: int,
        bias: bool = True,
        output_activation: OutputActivation | None = None,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        try:
            count = operator.index(networks)
        except TypeError:
            raise TypeError(f"networks must be an int, got {type(networks).__name__}") from None
        if count < 1:
            raise ValueError(f"networks must be at least 1, got {count}")
        if isinstance(hidden_features, Iterable):
            hidden_features = list(hidden_features)
        nets = [
            ReluMLP(
                in_features,
                hidden_features,
                out_features,
                bias,
                output_activation,
                device=device,
                dtype=dtype,
            )
            for _ in range(count)
        ]
        super().__init__()
        self._stack([_run_of(net, n) for n, net in enumerate(nets)])

    @classmethod
    def from_networks(cls, networks: Iterable[nn.Sequential]) -> ReluMLPEnsemble:
        """An ensemble with copies of the parameters of these networks.

        Args:
            networks: `ReluMLP`s, or `nn.Sequential`s of Linear, ReLU, ..., Linear and at most one
                output activation, all of one shape, dtype and device.

        Returns:
            The ensemble. Its parameters require gradients where those of the networks do.

        Raises:
            TypeError: if a network is not an `nn.Sequential`.
            ValueError: if there are none, if one has other children or children with hooks or
                parametrizations, or if they differ in shapes, dtypes, devices, activations, or in
                which parameters require gradients.
        """
        runs = [_run_of(net, n) for n, net in enumerate(networks)]
        if not runs:
            raise ValueError("networks must have at least one entry, got none")
        first = _description(runs[0])
        for n, run in enumerate(runs):
            for name, value in _description(run).items():
                if value != first.get(name):
                    raise ValueError(
                        f"networks[{n}] must be like networks[0], with {name} {first.get(name)}, "
                        f"got {value}"
                    )
        ensemble = cls.__new__(cls)
        nn.Module.__init__(ensemble)
        ensemble._stack(runs)
        return ensemble

    def _stack(self, runs: Sequence[Run]) -> None:
        """Adds stacked copies of the parameters of these networks, which have one shape."""
        self.output_activation = _PUBLIC_NAMES[runs[0].activation]
        for layer, child in enumerate(runs[0].children[::2]):
            stacked: list[Tensor | None] = [None, None]
            for kind in range(2):
                each = [(run.weights, run.biases)[kind] for run in runs]
                if each[0] and each[0][layer] is not NO_TENSOR:
                    stacked[kind] = torch.stack([tensors[layer].detach() for tensors in each])
            assert stacked[0] is not None
            added = StackedLinear(stacked[0], stacked[1])
            for name, parameter in added.named_parameters():
                parameter.requires_grad_(getattr(child, name).requires_grad)
            # A ReLU follows each layer of a ReluMLP and takes a number too.
            self.add_module(str(2 * layer), added)

    def __len__(self) -> int:
        """The number of networks."""
        return len(self._layers()[0].weight)

    def _layers(self) -> list[StackedLinear]:
        return list(children_of(self).values())

    def forward(self, x: Tensor) -> Tensor:
        if not isinstance(x, Tensor):
            raise TypeError(f"x must be a Tensor, got {type(x).__name__}")
        is_stacked = is_one_for_each("x", x, len(self))
        parameters: dict[str, list[Tensor]] = {"weights": [], "biases": []}
        missing = []
        for layer in self._layers():
            parameters["weights"].append(layer.weight)
            missing.append(layer.bias is None)
            if layer.bias is not None:
                parameters["biases"].append(layer.bias)

        def one(x: Tensor, parameters: dict[str, list[Tensor]]) -> Tensor:
            present = iter(parameters["biases"])
            biases = [None if is_missing else next(present) for is_missing in missing]
            return relu_mlp(
                x, parameters["weights"], biases, output_activation=self.output_activation
            )

        y: Tensor = torch.vmap(one, (0 if is_stacked else None, 0))(x, parameters)
        return y

    def network(self, number: int) -> ReluMLP:
        """One network of the ensemble, as a `ReluMLP` with copies of its parameters.

        Args:
            number: which one, from 0; a negative number counts from the end.

        Returns:
            The network. Its parameters require gradients where those of the ensemble do.

        Raises:
            TypeError: if `number` is not an int.
            IndexError: if there is no such network.
        """
        try:
            index = operator.index(number)
        except TypeError:
            raise TypeError(f"number must be an int, got {type(number).__name__}") from None
        if not -len(self) <= index < len(self):
            raise IndexError(f"number must be in [0, {len(self)}), got {index}")
        children: list[nn.Module] = []
        for layer in self._layers():
            children += [layer.linear(index), ReLU()]
        children.pop()
        children += [
            kind() for kind, name in OUTPUT_ACTIVATIONS.items() if name == self.output_activation
        ]
        net = ReluMLP.from_sequential(nn.Sequential(*children))
        return net.train(self.training)

    def extra_repr(self) -> str:
        """What `repr` says of the ensemble."""
        activation = self.output_activation
        of_activation = "" if activation is None else f", output_activation={activation!r}"
        return f"networks={len(self)}{of_activation}"


def is_one_for_each(name: str, tensor: Tensor, networks: int, dim: int = 2) -> bool:
    """Whether an argument of an ensemble has a dimension for the networks in front.

    Raises RuntimeError unless it has `dim` dimensions, or that one and `dim` others.
    """
    if tensor.dim() == dim or (tensor.dim() == dim + 1 and len(tensor) == networks):
        return tensor.dim() > dim
    one = "rows, features" if dim == 2 else "rows"
    raise RuntimeError(
        f"{name} must have shape ({one}) or ({networks}, {one}), got {tuple(tensor.shape)}"
    )


def _run_of(net: nn.Module, n: int) -> Run:
    if not isinstance(net, nn.Sequential):
        raise TypeError(f"networks[{n}] must be an nn.Sequential, got {type(net).__name__}")
    children = children_of(net)
    run = find_run(children.values())
    if run is None or len(run.children) < len(children) or is_patched(vars(net)):
        raise ValueError(
            f"networks[{n}] must have the children Linear, ReLU, ..., Linear and at most an output "
            "activation, without hooks or parametrizations"
        )
    return run


def _description(run: Run) -> dict[str, Any]:
    """What is equal in all networks of an ensemble, by the names of an error message."""
    described: dict[str, Any] = {"the output activation": run.activation}
    for kind, tensors in (("weight", run.weights), ("bias", run.biases)):
        for layer in range(len(run.weights)):
            tensor = tensors[layer] if tensors else NO_TENSOR
            described[f"{kind} {layer}"] = (
                "missing"
                if tensor is NO_TENSOR
                else f"{tuple(tensor.shape)} {tensor.dtype} on {tensor.device}"
                + ("" if tensor.requires_grad else " without gradients")
            )
    return described


# -- For TrainingStep ------------------------------------------------------------------------


def checked_rates(lr: Sequence[float] | Tensor, networks: int | None) -> list[float]:
    """A learning rate for each network, as numbers."""
    rates = lr.tolist() if hasattr(lr, "tolist") else lr
    if not isinstance(rates, Sequence) or isinstance(rates, str):
        raise TypeError(f"lr must be a sequence or a tensor of numbers, got {type(lr).__name__}")
    rates = [float(rate) for rate in rates]
    if len(rates) != networks:
        raise ValueError(f"lr must have {networks} learning rates, got {len(rates)}")
    if not all(rate >= 0 for rate in rates):
        raise ValueError(f"lr must not have negative learning rates, got {rates}")
    return rates


def stacked_network_of(ensemble: ReluMLPEnsemble) -> tuple[list[Tensor], list[Tensor], str]:
    """The stacked (weights, biases, activation); NO_TENSOR for a missing bias.

    Raises RuntimeError if something of it was changed, which copies of its networks would lack.
    """
    layers = list(children_of(ensemble).values())
    kind = type(ensemble)
    if kind.forward is not ReluMLPEnsemble.forward or is_patched(vars(ensemble)):
        raise RuntimeError("net must be an unchanged ReluMLPEnsemble, got one with hooks or such")
    weights: list[Tensor] = []
    biases: list[Tensor] = []
    for n, layer in enumerate(layers):
        if type(layer) is not StackedLinear or is_patched(vars(layer)):
            raise RuntimeError(
                f"net must be an unchanged ReluMLPEnsemble, got a replaced or patched layer {n}"
            )
        weights.append(layer.weight)
        biases.append(NO_TENSOR if layer.bias is None else layer.bias)
    present = [parameter for parameter in weights + biases if parameter is not NO_TENSOR]
    for parameter in present:
        if not is_plain(parameter) or any(get_parameter_hooks(parameter)):
            raise RuntimeError("the parameters of an ensemble must be dense and without hooks")
    addresses = [address for parameter in present if (address := parameter.data_ptr())]
    if len(set(map(id, present))) < len(present) or len(set(addresses)) < len(addresses):
        raise RuntimeError("the layers of an ensemble must not share parameters")
    return weights, biases, ACTIVATION_NAMES[ensemble.output_activation]


class Single(NamedTuple):
    """One network of an ensemble by itself, with an optimizer of its own."""

    net: ReluMLP
    optimizer: Optimizer


def split(
    ensemble: ReluMLPEnsemble, optimizer: Optimizer, lrs: Sequence[float] | None
) -> list[Single]:
    """The networks of an ensemble with their parts of the optimizer's state, all copied.

    Raises RuntimeError if `step` of the optimizer was replaced, because copies would not call it.
    """
    if is_step_replaced(optimizer):
        raise RuntimeError("optimizer must have its own step to train an ensemble, got another one")
    return [
        _single(ensemble, optimizer, e, None if lrs is None else lrs[e])
        for e in range(len(ensemble))
    ]


def _single(ensemble: ReluMLPEnsemble, optimizer: Optimizer, e: int, lr: float | None) -> Single:
    net = ensemble.network(e)
    own = dict(zip(ensemble.parameters(), net.parameters(), strict=True))
    part = object.__new__(type(optimizer))  # __init__ may take anything
    vars(part).update(vars(optimizer))
    vars(part).pop("step", None)  # a scheduler's, which counts steps of `optimizer`
    part.param_groups = [
        {
            **group,
            "params": [own[p] for p in group["params"] if p in own],
            **({} if lr is None else {"lr": lr}),
        }
        for group in optimizer.param_groups
    ]
    part.state = defaultdict(dict)
    for stacked, parameter in own.items():
        if stacked in optimizer.state:
            state = optimizer.state[stacked]
            part.state[parameter] = {name: _of_network(value, e) for name, value in state.items()}
    return Single(net, part)


def _of_network(value: Any, e: int) -> Any:
    """A network's part of something in the state: counts, of no dimension, belong to all."""
    if not isinstance(value, Tensor):
        return copy.deepcopy(value)
    return (value[e] if value.dim() else value).clone(memory_format=torch.contiguous_format)


@torch.no_grad()
def merge(ensemble: ReluMLPEnsemble, optimizer: Optimizer, singles: Sequence[Single]) -> None:
    """Copies parameters and state of the single networks back to the ensemble."""
    columns = list(zip(*(single.net.parameters() for single in singles), strict=True))
    merged = []
    for column in columns:
        states = [
            single.optimizer.state.get(parameter, {})
            for single, parameter in zip(singles, column, strict=True)
        ]
        merged.append({name: _merged([state[name] for state in states]) for name in states[0]})
    for stacked, column, state in zip(ensemble.parameters(), columns, merged, strict=True):
        if state:
            optimizer.state[stacked].update(state)
        if stacked.requires_grad:
            stacked.copy_(torch.stack(column))
        stacked.grad = None


def _merged(values: Sequence[Any]) -> Any:
    """Stacks what the networks have in their states. A count that all have stays one number."""
    first = values[0]
    if isinstance(first, Tensor):
        if first.dim() == 0 and all(bool(value == first) for value in values):
            return first
        return torch.stack(list(values))
    if any(value != first for value in values):
        raise RuntimeError(
            f"the optimizer's state must be tensors where networks differ, got {first!r}"
        )
    return first
