"""The entries on which PyTorch's generic tests run: ours, and a native control of each.

An OpInfo describes a function by its sample inputs, a ModuleInfo a module by its constructor's
arguments and inputs. The control is the native code for the same samples. A test that fails for the
control says something about the test, and nothing about this package.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import make_tensor
from torch.testing._internal.common_dtype import floating_types_and
from torch.testing._internal.common_modules import (
    ErrorModuleInput,
    FunctionInput,
    ModuleErrorEnum,
    ModuleInfo,
    ModuleInput,
)
from torch.testing._internal.opinfo.core import ErrorInput, OpInfo, SampleInput

import relu_mlp

#: The prefix of the names of the controls.
CONTROL = "control"

# -- Functions of x, weight, bias, weight, bias, ... -------------------------------------------


def by_function(x, *parameters, output_activation=None, recompute=False):
    weights, biases = list(parameters[::2]), list(parameters[1::2])
    return relu_mlp.relu_mlp(
        x, weights, biases, output_activation=output_activation, recompute=recompute
    )


def by_operator(x, *parameters, output_activation=None, recompute=False):
    weights = list(parameters[::2])
    missing = x.new_empty(0)
    biases = [missing if bias is None else bias for bias in parameters[1::2]]
    return torch.ops.relu_mlp.relu_mlp(x, weights, biases, output_activation or "none")


def by_native(x, *parameters, output_activation=None, recompute=False):
    weights, biases = parameters[::2], parameters[1::2]
    for layer, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        x = F.linear(x, weight, bias)
        if layer < len(weights) - 1:
            x = F.relu(x)
    return getattr(torch, output_activation)(x) if output_activation else x


def sample_inputs(op_info, device, dtype, requires_grad, **_):
    make = partial(make_tensor, device=device, dtype=dtype, requires_grad=requires_grad)
    make_unit = partial(make, low=-1, high=1)
    cases = [
        # leading sizes, widths, which biases are missing, output activation, recompute
        ((4,), (3, 5, 2), (), None, False),
        ((4,), (3, 5, 2), (0, 1), "tanh", False),
        ((2, 3), (3, 4, 4, 2), (1,), "sigmoid", False),
        ((), (3, 5, 2), (), "relu", False),
        ((1,), (1, 1, 1), (), None, False),
        ((3,), (4, 2), (), "tanh", False),
        ((0,), (3, 5, 2), (), None, False),
        ((4,), (3, 5, 2), (), "tanh", True),
    ]
    for leading, widths, missing, activation, recompute in cases:
        parameters = []
        for layer in range(len(widths) - 1):
            parameters.append(make_unit((widths[layer + 1], widths[layer])))
            parameters.append(None if layer in missing else make_unit(widths[layer + 1]))
        yield SampleInput(
            make((*leading, widths[0])),
            args=tuple(parameters),
            kwargs={"output_activation": activation, "recompute": recompute},
        )


def error_inputs(op_info, device, **_):
    make = partial(make_tensor, device=device, dtype=torch.float32)
    for name, x, parameters in [
        ("weight of another width", make((4, 3)), [make((5, 4)), make(5)]),
        ("bias of another width", make((4, 3)), [make((5, 3)), make(4)]),
        ("weight of another dtype", make((4, 3)), [make((5, 3)).double(), make(5)]),
        ("bias of another dtype", make((4, 3)), [make((5, 3)), make(5).double()]),
        ("x without dimensions", make(()), [make((5, 3)), make(5)]),
        ("weights that do not chain", make((4, 3)), [make((5, 3)), None, make((2, 4)), None]),
    ]:
        sample = SampleInput(x, args=tuple(parameters), kwargs={}, name=name)
        yield ErrorInput(sample, error_type=RuntimeError, error_regex="")


def op_entry(name, function):
    return OpInfo(
        name,
        op=function,
        dtypes=floating_types_and(torch.bfloat16, torch.float16),
        sample_inputs_func=sample_inputs,
        error_inputs_func=error_inputs,
        supports_out=False,
        supports_gradgrad=True,
        supports_forward_ad=True,
        supports_fwgrad_bwgrad=True,
        check_batched_grad=True,
        check_batched_gradgrad=True,
        check_batched_forward_grad=True,
        gradcheck_fast_mode=False,
    )


#: Each of ours with the control that says what to expect of it.
OPS = [
    op_entry("relu_mlp", by_function),
    op_entry("relu_mlp_operator", by_operator),
    op_entry(CONTROL, by_native),
]

# -- Modules --------------------------------------------------------------------------------


class Control(nn.Sequential):
    """The `nn.Sequential` that a `ReluMLP` of the same arguments stands for."""

    def __init__(
        self, n_in, hidden, n_out, bias=True, output_activation=None, device=None, dtype=None
    ):
        net = relu_mlp.ReluMLP(n_in, hidden, n_out, bias, output_activation, False, device, dtype)
        super().__init__(*net)


class Recomputing(relu_mlp.ReluMLP):
    """A subclass, and one that keeps no activations."""

    recompute = True

    def __init__(self, *arguments, **named):
        super().__init__(*arguments, recompute=True, **named)


class Fused(nn.Sequential):
    """The module that `fuse` makes of a control. Here its constructor makes the object."""

    def __new__(cls, *arguments, **named):
        return relu_mlp.fuse(nn.Sequential(*Control(*arguments, **named)))


def module_inputs(module_info, device, dtype, requires_grad, training, **_):
    make = partial(make_tensor, device=device, dtype=dtype, requires_grad=requires_grad)

    def reference(module, parameters, x):
        for child in module.children():
            x = child(x)
        return x

    for desc, arguments, named, shape in [
        ("", (3, [5], 2), {}, (4, 3)),
        ("no_bias", (3, [5], 2), {"bias": False}, (4, 3)),
        ("deep", (3, [5, 4, 6], 2), {}, (2, 3, 3)),
        ("tanh", (3, [5], 2), {"output_activation": "tanh"}, (4, 3)),
        ("sigmoid", (3, [5], 2), {"output_activation": "sigmoid"}, (4, 3)),
        ("relu", (3, [5], 2), {"output_activation": "relu"}, (4, 3)),
        ("no_batch_dim", (3, [5], 2), {}, (3,)),
        ("no_rows", (3, [5], 2), {}, (0, 3)),
    ]:
        yield ModuleInput(
            FunctionInput(*arguments, **named), FunctionInput(make(shape)), desc, reference
        )


def module_error_inputs(module_info, device, dtype, requires_grad, training, **_):
    for shape in ((4, 2), (), (3, 4)):
        yield ErrorModuleInput(
            ModuleInput(FunctionInput(3, [5], 2), FunctionInput(torch.rand(shape))),
            error_on=ModuleErrorEnum.FORWARD_ERROR,
            error_type=RuntimeError,
            error_regex="",
        )


MODULES = [
    ModuleInfo(
        kind,
        module_inputs_func=module_inputs,
        module_error_inputs_func=module_error_inputs,
        dtypes=floating_types_and(torch.bfloat16, torch.float16),
    )
    for kind in (relu_mlp.ReluMLP, Recomputing, Fused, Control)
]
