"""A `ReluMLP` over several processes: tensor parallelism through DTensor.

Layers are sharded in pairs. The first layer of a pair is cut by columns of W^T: each process holds
some of its outputs, with their biases. The second layer is cut by rows: the process holds the
weights of the matching inputs. So the two layers exchange nothing, and with S_p the sum over the
processes p, a pair computes

    x -> S_p [ max(x W_1p^T + b_1p, 0) W_2p^T ] + b_2
    d loss / d x = S_p [ the part of d loss / d x that comes through shard p ]

This takes one all-reduce in the forward pass and one in the backward pass. Each bracket is a call
of `relu_mlp` for the local shards, or its backward pass.
"""

from __future__ import annotations

import abc
import itertools
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle

from . import checks
from ._torch_private import APPLY_PARALLEL_STYLE, children_of, parameters_of, set_parameter
from .activations import ACTIVATIONS
from .functional import relu_mlp
from .interception import are_layers_replaced
from .modules import ReluMLP
from .ops import NO_TENSOR
from .run import Run, find_run

__all__ = ["ReluMLPParallel", "TensorParallelReluMLP"]


class ReluMLPParallel(ParallelStyle):
    """Shards a whole `ReluMLP` over a mesh, for `parallelize_module`::

        mesh = init_device_mesh("cpu", (4,))
        parallelize_module(model, mesh, {"mlp": ReluMLPParallel()})
        parallelize_module(net, mesh, ReluMLPParallel())  # net is the ReluMLP

    Layers 1, 3, ... are sharded over their outputs (weight and bias `Shard(0)`),
    layers 2, 4, ... over their inputs (weight `Shard(1)`, bias `Replicate()`). If
    the number of layers is odd, the last one is replicated, and every process
    computes all of it. If the number of processes does not divide a width, it is cut
    as `torch.chunk` cuts it, and a shard may be empty.

    The parameters become DTensors under their old names, with their old dtypes. The module becomes
    a `TensorParallelReluMLP`. As before, it takes the whole input and returns the whole output,
    which are the same in every process of the mesh.

    `parallelize_module` raises, before anything is changed:

    Raises:
        TypeError: if the class of the module is not `ReluMLP` itself, but a subclass for example.
        ValueError: if the mesh is not 1-dimensional, if a child was changed (by a hook, a
            parametrization or sharded parameters), or if two layers share a parameter.
    """

    def apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        """Shards the module in place. `parallelize_module` calls it.

        Args:
            module: a `ReluMLP`.
            device_mesh: a 1-dimensional mesh.

        Returns:
            The same object.
        """
        linears = _checked_linears(module, device_mesh)
        for linear, placements in zip(linears, _layouts(len(linears)), strict=True):
            for name, placement in zip(("weight", "bias"), placements, strict=True):
                parameter = parameters_of(linear)[name]
                if parameter is None:
                    continue
                shards = distribute_tensor(
                    parameter, device_mesh, [placement], src_data_rank=self.src_data_rank
                )
                set_parameter(linear, name, nn.Parameter(shards, parameter.requires_grad))
        module.__class__ = TensorParallelReluMLP
        return module


setattr(ReluMLPParallel, APPLY_PARALLEL_STYLE, ReluMLPParallel.apply)
abc.update_abstractmethods(ReluMLPParallel)  # type: ignore[type-abstract]


class TensorParallelReluMLP(ReluMLP):
    """A `ReluMLP` whose parameters `ReluMLPParallel` has sharded.

    Shape:
        (*, in_features) to (*, out_features). The input and the output are tensors that are the
        same in every process. For an input that is a DTensor of any placement on the mesh of the
        parameters, the output is a replicated DTensor.

    If a child carries a hook or has been replaced, or if the parameters have other placements, the
    children are called one by one, with DTensors.

    Raises:
        ValueError: if the input is a DTensor on another mesh.
        RuntimeError: if shapes do not chain, if dtypes or devices differ, or under `torch.func` and
            forward-mode differentiation.
    """

    def forward(self, input: Tensor) -> Tensor:
        mesh = next((p.device_mesh for p in self.parameters() if isinstance(p, DTensor)), None)
        if mesh is None:  # functional_call has put whole parameters in their place
            return super().forward(input)
        if isinstance(input, DTensor) and input.device_mesh != mesh:
            raise ValueError(
                f"input must be on the mesh of the parameters, {mesh}, got {input.device_mesh}"
            )
        run = find_run(children_of(self).values(), _is_distributed)
        if (
            run is None
            or len(run.children) < len(children_of(self))
            or not _is_laid_out(run)
            or are_layers_replaced()
        ):
            return self._forward_by_children(input, mesh)
        if isinstance(input, DTensor):
            x = input.redistribute(mesh, [Replicate()]).to_local()
            y = _forward_by_shards(x, run, self.recompute, mesh)
            return DTensor.from_local(y, mesh, [Replicate()], run_check=False)
        return _forward_by_shards(input, run, self.recompute, mesh)

    def _forward_by_children(self, input: Tensor, mesh: DeviceMesh) -> Tensor:
        if isinstance(input, DTensor):
            return super().forward(input)
        x = _OnceDifferentiable.apply(input)
        y = super().forward(DTensor.from_local(x, mesh, [Replicate()], run_check=False))
        if isinstance(y, DTensor):
            y = y.redistribute(mesh, [Replicate()]).to_local()
        return y


def _forward_by_shards(x: Tensor, run: Run, recompute: bool, mesh: DeviceMesh) -> Tensor:
    """The whole output, from the whole input and this process's shards."""
    if x.dim() and not torch.is_autocast_enabled(x.device.type):
        checks.check_chain(x, run.weights, run.biases)  # of the whole parameters
    weights = [_local(weight) for weight in run.weights]
    biases = [None if b is NO_TENSOR else _local(b) for b in run.biases] or [None] * len(weights)
    last = len(weights) - 1
    for layer in range(0, len(weights), 2):
        if layer == last:
            x = relu_mlp(x, weights[last:], biases[last:], recompute=recompute)
        else:
            pair, bias = weights[layer : layer + 2], biases[layer + 1]
            term = relu_mlp(
                _ToShards.apply(x, mesh), pair, [biases[layer], None], recompute=recompute
            )
            x = _SumOfShards.apply(term, mesh)
            if bias is not None:
                x = x + bias.to(x.dtype)  # under autocast, x has another dtype
        x = ACTIVATIONS["relu" if layer + 1 < last else run.activation](x)
    return x


# Each of these two is the derivative of the other, so derivatives of every order are right. (The
# derivative of PyTorch's own differentiable all-reduce is an all-reduce, because it assumes that
# the losses of all processes are summed. Here all processes have the same loss.)


class _ToShards(torch.autograd.Function):
    """The same tensor in every process -> a copy for each; the gradient is summed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mesh: DeviceMesh) -> Tensor:
        ctx.mesh = mesh
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _SumOfShards.apply(grad, ctx.mesh), None


class _SumOfShards(torch.autograd.Function):
    """A term in each process -> the sum in every process; each term gets the sum's gradient."""

    @staticmethod
    def forward(ctx: Any, term: Tensor, mesh: DeviceMesh) -> Tensor:
        ctx.mesh = mesh
        total = term.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(total, group=mesh.get_group())
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _ToShards.apply(grad, ctx.mesh), None


class _OnceDifferentiable(torch.autograd.Function):
    """The identity, whose gradient can't be differentiated.

    `DTensor.from_local` sums the gradient without a graph, so a second derivative would silently
    lack terms.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "the gradient of the input of a TensorParallelReluMLP can't be differentiated "
                "where its children run one by one. Remove the hook, or restore the child or the "
                "placement that was changed"
            )
        return grad


def _layouts(layers: int) -> list[tuple[Placement, Placement]]:
    """The placements of every layer's weight and bias."""
    pair: list[tuple[Placement, Placement]] = [(Shard(0), Shard(0)), (Shard(1), Replicate())]
    alone: list[tuple[Placement, Placement]] = [(Replicate(), Replicate())]
    return pair * (layers // 2) + alone * (layers % 2)


def _is_laid_out(run: Run) -> bool:
    """Whether the parameters have the placements that `ReluMLPParallel` gives them."""
    pairs = itertools.zip_longest(run.weights, run.biases, fillvalue=NO_TENSOR)
    return all(
        tensor is NO_TENSOR or tensor.placements == (placement,)  # type: ignore[attr-defined]
        for pair, layout in zip(pairs, _layouts(len(run.weights)), strict=True)
        for tensor, placement in zip(pair, layout, strict=True)
    )


def _is_distributed(parameter: object) -> bool:
    return isinstance(parameter, DTensor)


def _local(parameter: Tensor) -> Tensor:
    assert isinstance(parameter, DTensor)
    return parameter.to_local()


def _checked_linears(module: nn.Module, mesh: DeviceMesh) -> list[nn.Module]:
    """The Linears of a module, if it can be sharded; otherwise raises TypeError or ValueError."""
    if type(module) is not ReluMLP:
        raise TypeError(f"module must be a ReluMLP, got {type(module).__name__}")
    if mesh.ndim != 1:
        raise ValueError(
            f"device_mesh must have 1 dimension, got {mesh.ndim}: name one, as in mesh['tensor']"
        )
    children = list(children_of(module).values())
    run = find_run(children)
    position = len(run.children) if run else 0
    if run is None or position < len(children):
        raise ValueError(
            "module must have untouched children with parameters that are not sharded, got "
            f"{type(children[position]).__name__} with hooks or other parameters at {position}"
            if children
            else "module must have children, got none"
        )
    parameters = list(module.parameters())
    if len(parameters) < len(run.weights) + sum(bias is not NO_TENSOR for bias in run.biases):
        raise ValueError(
            "module must have a parameter of its own for every weight and bias, got one that "
            "two of its layers share, and shards can't be shared"
        )
    return [child for child in children if isinstance(child, nn.Linear)]
