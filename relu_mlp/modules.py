"""`ReluMLP`, the layer."""

from __future__ import annotations

import itertools
import operator
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Linear, Parameter, ReLU

from . import checks, functional, interception
from ._torch_private import (
    CALL_IMPL,
    COMPILED_CALL_IMPL,
    LOAD_STATE_DICT_PRE_HOOKS,
    children_of,
    constant_in_a_graph,
    copy_to_script_wrapper,
    is_scripting,
)
from .activations import DEFAULTS, OUTPUT_ACTIVATIONS, OutputActivation
from .functional import call_operators, is_served, leaves_python
from .interception import are_layers_replaced
from .ops import backend, extension, implementation_for, node, this_thread
from .run import Run, find_run, has_defaults, network_of
from .scripting import Scriptable

_is_compiling = torch.compiler.is_compiling
_operator = torch.ops.relu_mlp.relu_mlp.default
_iterate = interception.iterate
_function_modes = interception.function_modes


class ReluMLP(Scriptable):
    """`nn.Sequential(Linear, ReLU, ..., Linear)` as one operator each way.

    The children are those that the `nn.Sequential` would have, with the same names and, after a
    given seed, the same initial values. `state_dict`, optimizers, hooks and slices work as they do
    there. If a child carries a hook or has been replaced, parametrized or pruned, or if the
    operators can't serve the input, the children are called one by one. `relu_mlp` has the formula.

    Args:
        in_features: the size of the last dimension of the input.
        hidden_features: the width of the hidden layer, or a sequence of widths, each at least 1.
            The empty sequence gives the linear model.
        out_features: the size of the last dimension of the output.
        bias: whether the layers have biases.
        output_activation: None, ``"relu"``, ``"sigmoid"``, ``"tanh"`` or another name of
            `activations.OutputActivation`. The module of that name becomes the last child.
        recompute: whether to save no hidden activations, and compute them again in the backward
            pass.
        device, dtype: the device and dtype of the parameters.

    Shape:
        (*, in_features) to (*, out_features), in the dtype of the parameters (under autocast, in
        that of `F.linear`).

    Raises:
        TypeError: if a width is not an int.
        ValueError: if a hidden width is below 1, or if the activation is unknown.
        RuntimeError: if `in_features` or `out_features` is negative. A call raises it if the shape,
            dtype or device of the input does not fit.

    Example::

        net = ReluMLP(784, [512, 256], 10)
        logits = net(torch.randn(64, 784))
    """

    recompute: bool = False  #: as in the constructor; it may be changed at any time

    def __init__(
        self,
        in_features: int,
        hidden_features: int | Iterable[int],
        out_features: int,
        bias: bool = True,
        output_activation: OutputActivation | None = None,
        recompute: bool = False,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        functional.activation_name(output_activation)
        widths = _checked_widths(hidden_features)
        sizes = [
            _checked_size("in_features", in_features),
            *widths,
            _checked_size("out_features", out_features),
        ]
        children: list[nn.Module] = []
        for size, next_size in itertools.pairwise(sizes):
            children += [Linear(size, next_size, bias, device=device, dtype=dtype), ReLU()]
        children.pop()
        children += [
            kind() for kind, name in OUTPUT_ACTIVATIONS.items() if name == output_activation
        ]
        super().__init__(*children)
        self.recompute = bool(recompute)

    @classmethod
    def from_sequential(cls, sequential: nn.Sequential, recompute: bool = False) -> ReluMLP:
        """A `ReluMLP` that holds the same children under the same names.

        It also gets the training mode of `sequential`, its attributes, its hooks (in new dicts),
        and any parameters and buffers of its own.

        Args:
            sequential: Linear, ReLU, ..., Linear, and at most one output activation at the end,
                such as ReLU, Sigmoid or Tanh.
            recompute: as for the constructor.

        Returns:
            The new module. Its parameters are those of `sequential`, not copies.

        Raises:
            TypeError: if `sequential` is not an `nn.Sequential`.
            ValueError: if it has other children, or children with hooks or parametrizations; or if
                something would be lost: a `forward` set on the object, a definition of a subclass,
                or a hook that refers to this one module.
        """
        if not isinstance(sequential, nn.Sequential):
            raise TypeError(f"sequential must be an nn.Sequential, got {type(sequential).__name__}")
        children = list(children_of(sequential).values())
        run = find_run(children)
        position = len(run.children) if run else 0
        if run is None or position < len(children):
            got = f"{type(children[position]).__name__} at {position}" if children else "none"
            raise ValueError(
                "sequential must have the children Linear, ReLU, ..., Linear and at most an "
                f"output activation, without hooks or parametrizations; got {got}"
            )
        if lost := _lost_by_another_class(sequential):
            raise ValueError(f"sequential must have nothing that a ReluMLP can't keep, got {lost}")
        result = cls.__new__(cls)
        nn.Sequential.__init__(result)
        for name, value in sequential.__dict__.items():
            # Dicts and sets that nn.Module manages are copied, so that both can be edited apart.
            is_managed = name in result.__dict__ and isinstance(value, (dict, set))
            result.__dict__[name] = value.copy() if is_managed else value
        result.__dict__.pop("_is_fused", None)  # `fuse` has set it on the other one
        result.recompute = bool(recompute)
        return result

    def forward(self, input: Tensor) -> Tensor:
        if is_scripting():
            return self._scripted_forward(input)
        else:
            if _is_compiling():
                if leaves_python():  # first: parameters are named after the first read
                    return super().forward(input)
                result = self._traced_forward(input)
                if result is not None:
                    return result
            elif node is not None:
                output = node.call_module(self, input)
                if output is not NotImplemented:
                    return output
            if is_served(input) and type(self).__iter__ is _iterate:
                network = network_of(self)
                if network is not None and not are_layers_replaced():
                    weights, biases, activation = network
                    return call_operators(input, weights, biases, activation, self.recompute, self)
            elif functional.has_other_dtype(input) and input.dim():
                network = network_of(self)
                if network is not None:
                    checks.check_chain(input, *network[:2])
            return super().forward(input)

    def _traced_forward(self, input: Tensor) -> Tensor | None:
        """The output in a graph of `torch.compile`; None where `forward` has to look closer.

        In every call, a compiled function compares everything that was read here, and comparing
        all that `forward` reads takes as long as a small network. So this method reads the children
        as their own forward methods would, and checks the rest once per graph.
        """
        activation = self._activation_in_a_graph(this_thread.backend)
        weights: list[Tensor] = []
        biases: list[Tensor] = []
        for child in self:
            if child.forward is None:  # never true, but the read is guarded
                return None
            if type(child) is Linear:
                weights.append(child.weight)
                if child.bias is not None:
                    biases.append(child.bias)
            elif DEFAULTS and not has_defaults(child):
                return None
        if (
            activation is None  # checked last, so that the reads above are guarded
            or (_function_modes() and interception.is_under_a_mode())
            or type(input) is not torch.Tensor
            or input.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64)
            or len(biases) not in (0, len(weights))
        ):
            return None
        for tensor in (input, *weights, *biases):
            if type(tensor) not in (torch.Tensor, Parameter) or tensor.layout is not torch.strided:
                return None
        return _operator(input, weights, biases, activation)

    @constant_in_a_graph
    def _activation_in_a_graph(self, name: str) -> str | None:
        """The output activation, if the operator serves all children under the backend `name`."""
        network = None if are_layers_replaced() else network_of(self)
        if network is None or torch.onnx.is_in_onnx_export():
            return None
        weights, _, activation = network
        try:
            with backend(name):  # type: ignore[arg-type]
                is_served = implementation_for(weights[0]) is extension
        except RuntimeError:  # `forward` will say why
            return None
        return activation if is_served else None

    def _find_runs(self) -> list[tuple[int, Run]]:
        network = None if are_layers_replaced() else network_of(self)
        return [] if network is None else [(0, Run(tuple(self), *network))]

    @copy_to_script_wrapper
    def __getitem__(self, index: Any) -> Any:
        return slice_or_child(self, index)


def slice_or_child(sequential: nn.Sequential, index: Any) -> Any:
    """``sequential[index]``; a slice is a plain `nn.Sequential`."""
    if isinstance(index, slice):
        return nn.Sequential(OrderedDict(list(children_of(sequential).items())[index]))
    return nn.Sequential.__getitem__(sequential, index)


def _lost_by_another_class(sequential: nn.Sequential) -> str | None:
    """What a module of another class with the same `__dict__` would lose, or None."""
    for name in ("forward", CALL_IMPL, COMPILED_CALL_IMPL):
        if name in sequential.__dict__:
            return f"a {name} of its own"
    if sequential.__dict__.get(LOAD_STATE_DICT_PRE_HOOKS):
        return "a hook for load_state_dict, which refers to its module"
    for kind in itertools.takewhile(
        lambda kind: kind is not nn.Sequential, type(sequential).__mro__
    ):
        is_ours = kind.__module__.partition(".")[0] == __name__.partition(".")[0]
        defined = [name for name in vars(kind) if name not in _OF_EVERY_CLASS]
        if defined and not is_ours:
            return f"the {defined[0]} of its class {kind.__name__}"
    return None


#: The attributes of a class that defines nothing but `__init__`.
_OF_EVERY_CLASS = {*vars(type("_", (), {})), "__init__", "__annotations__", "__annotate__"}
_OF_EVERY_CLASS |= {"__firstlineno__", "__static_attributes__", "__annotate_func__"}


def _checked_size(name: str, value: Any) -> int:
    try:
        size = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an int, got {type(value).__name__}") from None
    if size < 0:  # the class that Linear raises
        raise RuntimeError(f"{name} must not be negative, got {size}")
    return size


def _checked_widths(hidden_features: int | Iterable[int]) -> list[int]:
    if isinstance(hidden_features, Iterable):
        named = {f"hidden_features[{n}]": width for n, width in enumerate(hidden_features)}
    else:
        named = {"hidden_features": hidden_features}
    for name, width in named.items():
        if not hasattr(width, "__index__"):
            raise TypeError(f"{name} must be an int, got {type(width).__name__}")
        if operator.index(width) < 1:
            raise ValueError(f"{name} must be at least 1, got {width}")
    return [operator.index(width) for width in named.values()]
