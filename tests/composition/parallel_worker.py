"""The cases that each process of test_parallel.py runs, on every backend.

    torchrun ... tests/composition/parallel_worker.py FOLDER

A process adds a line to FOLDER/rank<n> for each case that it has passed, and ends at the first that
fails. Everything is compared with one process that computes natively. Parameters and inputs are
integers, or in training multiples of `GRID`. So all sums of their products are exact in float64, in
any order (`check_exact`), and all results have the same bits.
"""

from __future__ import annotations

import copy
import datetime
import faulthandler
import functools
import sys
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.autograd.forward_ad as forward_ad
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

import relu_mlp
import support
from relu_mlp.parallel import ReluMLPParallel, TensorParallelReluMLP

#: The longest that a process lives, in seconds.
LIMIT = 150


def whole(tensor):
    """The whole tensor, wherever its shards are."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()


def held(tensor):
    """The part that this process holds. It shares the memory."""
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


@contextmanager
def counted():
    """`support.count_calls`, with the counts "all_reduce" and "other" of collective operations."""

    class Mode(TorchDispatchMode):
        understands_relu_mlp = True

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace in ("c10d", "_c10d_functional"):
                name = func._schema.name.partition("::")[2].replace("_", "")
                if name != "waittensor":
                    counts["all_reduce" if name == "allreduce" else "other"] += 1
            return func(*args, **(kwargs or {}))

    with support.count_calls() as counts, Mode():
        counts["all_reduce"] = counts["other"] = 0
        yield counts


def pair(sizes, **options):
    """A ReluMLP and its nn.Sequential, with the same integers as parameters."""
    both = support.twins(sizes[0], sizes[1:-1], sizes[-1], dtype=torch.float64, **options)
    return [support.integers_(net) for net in both]


def integers_like(tensor):
    return torch.randint_like(tensor, -2, 3)


def check(net, sequential, x, x_needs_grad=True, names=""):
    """Compares y and every gradient with the native network, and returns the counts."""
    grad_output = integers_like(sequential(x)).detach()
    found = []
    for module in (sequential, net):
        leaf = x.clone().requires_grad_(x_needs_grad)
        with counted() as counts:
            y = module(leaf)
            y.backward(grad_output)
        grads = {name: whole(p.grad) for name, p in module.named_parameters()}
        found.append({"y": whole(y), **grads} | ({"x": leaf.grad} if x_needs_grad else {}))
    support.assert_same(found[1], found[0], f"{names} {net}")
    return counts


# -- Tensor parallelism ----------------------------------------------------------------

NETWORKS = [
    ((5, 8, 3), {}),
    ((5, 7, 3), {"bias": False, "output_activation": "relu"}),
    ((5, 1, 2), {}),  # some processes have an empty shard
    ((4, 6, 5, 6, 2), {"output_activation": "relu"}),
    ((4, 3, 5, 3), {"bias": False}),
    ((4, 6, 5, 6, 5, 2), {"recompute": True, "output_activation": "relu"}),
    ((4, 6, 3), {"recompute": True}),
    ((4, 2), {}),
]


def case_tensor_parallel(mesh):
    """The operators on the local shards, and one all-reduce each way for two layers."""
    for sizes, options in NETWORKS:
        net, sequential = pair(sizes, **options)
        assert parallelize_module(net, mesh, ReluMLPParallel()) is net
        for x_needs_grad in (True, False):
            net.zero_grad()
            sequential.zero_grad()
            counts = check(net, sequential, support.integers(6, sizes[0]), x_needs_grad)
            pairs, alone = divmod(len(sizes) - 1, 2)
            assert counts["forward"] == counts["backward"] == pairs + alone, counts
            assert counts["native"] == counts["other"] == 0, counts
            of_x = pairs > 0 and not x_needs_grad  # no gradient needs that sum
            assert counts["all_reduce"] == 2 * pairs - of_x, counts


def case_parts_are_where_they_should_be(mesh):
    """Each process holds its share and no more. Names stay. A hidden width may be too small to
    share.
    """
    net, sequential = pair((5, 7, 3, 2))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(1 + mesh.get_local_rank())  # the values of the first process count
    model = nn.ModuleDict({"mlp": net, "other": nn.Linear(2, 2)})
    parallelize_module(model, mesh, {"mlp": ReluMLPParallel()})
    assert type(net) is TensorParallelReluMLP and isinstance(net, relu_mlp.ReluMLP)
    mine = len(torch.arange(7).chunk(mesh.size())[mesh.get_local_rank() :][:1][0])
    shapes = {name: tuple(p.to_local().shape) for name, p in net.named_parameters()}
    assert shapes == {
        "0.weight": (mine, 5),
        "0.bias": (mine,),
        "2.weight": (3, mine),
        "2.bias": (3,),
        "4.weight": (2, 3),
        "4.bias": (2,),
    }
    for (name, p), q in zip(net.state_dict().items(), sequential.state_dict().values()):
        assert p.shape == q.shape
        support.assert_same(whole(p), q, name)
    assert all(type(p) is nn.Parameter for p in model["other"].parameters())


def case_shapes_of_the_input(mesh):
    for shape in [(4,), (2, 3, 4), (0, 4), (2, 0, 4)]:
        net, sequential = pair((4, 6, 3))
        parallelize_module(net, mesh, ReluMLPParallel())
        assert check(net, sequential, support.integers(*shape))["native"] == 0


def case_smooth_output_activations(mesh):
    for activation in ("sigmoid", "tanh"):
        for sizes in ((3, 4, 2), (3, 4, 3, 2)):
            net, sequential = pair(sizes, output_activation=activation)
            x = support.integers(5, 3).requires_grad_()
            weights, biases = support.layers_of(sequential)
            bounds = support.first_order_bounds(x, weights, biases, activation)
            parallelize_module(net, mesh, ReluMLPParallel())
            found = []
            for module in (sequential, net):
                x.grad = None
                y = module(x)
                y.sum().backward()
                weights, biases = support.layers_of(module)
                leaves = support.leaves(x, weights, biases)
                found.append({name: whole(leaf.grad) for name, leaf in leaves.items()})
            support.assert_within(found[1], found[0], bounds)


def case_recompute(mesh):
    """No hidden units are saved, except for the sum after a pair."""
    x = support.integers(9, 4)
    for recompute in (False, True):
        net, _ = pair((4, 64, 3), recompute=recompute)
        parallelize_module(net, mesh, ReluMLPParallel())
        with support.saved_tensors() as saved:
            net(x)
        hidden = [tensor for tensor in saved if tensor.shape == (9, 64 // mesh.size())]
        assert len(hidden) == (not recompute)


def case_frozen_layers(mesh):
    """requires_grad is kept, and a gradient that nothing needs is not summed."""
    net, sequential = pair((4, 6, 5, 6, 2))
    for module in (net, sequential):
        module[:3].requires_grad_(False)
    parallelize_module(net, mesh, ReluMLPParallel())
    x = support.integers(6, 4)
    with counted() as counts:
        net(x).sum().backward()
    sequential(x).sum().backward()
    for p, q in zip(net.parameters(), sequential.parameters()):
        assert p.requires_grad == q.requires_grad
        support.assert_same(p.grad if p.grad is None else whole(p.grad), q.grad)
    assert counts["all_reduce"] == 2 and counts["forward"] == 2 and counts["backward"] == 1


def case_inference(mesh):
    net, sequential = pair((4, 6, 5, 3))
    parallelize_module(net, mesh, ReluMLPParallel())
    x = support.integers(6, 4)
    for context in (torch.no_grad, torch.inference_mode):
        with context(), counted() as counts:
            support.assert_same(net(x), sequential(x))
        assert counts["forward"] == 2 and counts["all_reduce"] == 1


def gradient_penalty(net, x):
    """The gradients of a function of the gradient of x, and that gradient."""
    x = x.clone().requires_grad_()
    y = net(x)
    (grad_x,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    grads = torch.autograd.grad(grad_x.square().sum(), [x, *net.parameters()], allow_unused=True)
    return {"grad_x": grad_x.detach()} | {
        str(n): None if grad is None else whole(grad) for n, grad in enumerate(grads)
    }


def case_second_derivatives(mesh):
    for sizes in ((3, 4, 2), (3, 3, 2, 2), (2, 3, 2, 3, 1)):
        net, sequential = pair(sizes)
        parallelize_module(net, mesh, ReluMLPParallel())
        x = support.integers(4, sizes[0])
        expected = gradient_penalty(sequential, x)
        with counted() as counts:
            actual = gradient_penalty(net, x)
        support.assert_same(actual, expected)
        assert counts["forward"] >= (len(sizes)) // 2, counts


def case_transforms(mesh):
    """Forward mode and `torch.func` raise in all processes, so that none waits for another."""
    net, _ = pair((4, 6, 3))
    parallelize_module(net, mesh, ReluMLPParallel())
    x = support.integers(6, 4)
    raises(RuntimeError, "", torch.func.jvp, net, (x,), (x,))
    raises(RuntimeError, "", torch.func.grad(lambda x: net(x).sum()), x)
    raises(RuntimeError, "", torch.vmap(net), x)
    with forward_ad.dual_level():
        raises(RuntimeError, "", net, forward_ad.make_dual(x, x))


def case_dtensors_as_input(mesh):
    """DTensors return DTensors. Every placement is changed to a replicated one first."""
    for placement in (Replicate(), Shard(0), Shard(1)):
        net, sequential = pair((4, 6, 3))
        parallelize_module(net, mesh, ReluMLPParallel())
        x = support.integers(8, 4)
        expected = check(sequential, copy.deepcopy(sequential), x) and sequential(x)
        rank, size = mesh.get_local_rank(), mesh.size()
        local = x
        if isinstance(placement, Shard):
            local = x.tensor_split(size, placement.dim)[rank]
        leaf = DTensor.from_local(local, mesh, [placement], run_check=False).requires_grad_()
        with counted() as counts:
            y = net(leaf)
        assert counts["forward"] == 1 and counts["native"] == 0
        assert isinstance(y, DTensor) and y.placements == (Replicate(),)
        support.assert_same(whole(y), expected.detach())
        y.sum().backward()
        plain = x.clone().requires_grad_()
        sequential.zero_grad()
        sequential(plain).sum().backward()
        support.assert_same(whole(leaf.grad), plain.grad)
        for p, q in zip(net.parameters(), sequential.parameters()):
            support.assert_same(whole(p.grad), q.grad)


def case_autocast(mesh):
    """Autocast of the local shards. Integers up to 256 are exact in bfloat16."""
    for sizes in ((2, 4, 2), (2, 4, 2, 2)):
        net, sequential = pair(sizes)
        for module in (net, sequential):
            module.float()
            with torch.no_grad():
                for p in module.parameters():
                    p.clamp_(-1, 1)
        parallelize_module(net, mesh, ReluMLPParallel())
        x = support.integers(4, 2, dtype=torch.float32, largest=1)
        with torch.autocast("cpu", torch.bfloat16):
            counts = check(net, sequential, x)
            assert net(x).dtype == torch.bfloat16
        assert counts["native"] == 0 < counts["forward"]


def case_hooks_on_children(mesh):
    """The children run natively, with DTensors."""
    seen = []
    net, sequential = pair((4, 6, 5, 3))
    parallelize_module(net, mesh, ReluMLPParallel())
    net[2].register_forward_hook(lambda module, args, output: seen.append(type(output)))
    counts = check(net, sequential, support.integers(6, 4))
    assert seen == [DTensor]
    assert counts["forward"] == 0 < counts["native"]

    handle = register_module_forward_hook(lambda module, args, output: None)
    other, sequential = pair((4, 6, 3))
    parallelize_module(other, mesh, ReluMLPParallel())
    with counted() as counts:
        other(support.integers(6, 4))
    handle.remove()
    assert counts["forward"] == 0 < counts["native"]

    # DTensor sums the gradient of x without a graph.
    x = support.integers(6, 4).requires_grad_()
    y = net(x).sum()
    raises(RuntimeError, "can't be differentiated", torch.autograd.grad, y, x, create_graph=True)


def case_styles_for_the_children(mesh):
    """`ColwiseParallel` and `RowwiseParallel` add hooks, so the children run natively."""
    net, sequential = pair((4, 8, 3))
    parallelize_module(net, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
    counts = check(net, sequential, support.integers(6, 4))
    assert counts["forward"] == 0 < counts["native"]
    assert counts["all_reduce"] == 2


def case_other_placements_and_children(mesh):
    """Other placements of the parameters, or an added child, make the native children run."""
    net, sequential = pair((4, 6, 3))
    parallelize_module(net, mesh, ReluMLPParallel())
    for module in (net, sequential):
        module.append(nn.Flatten(0))
    counts = check(net, sequential, support.integers(6, 4))
    assert counts["forward"] == 0 < counts["native"]
    net, sequential = pair((4, 6, 3))
    parallelize_module(net, mesh, ReluMLPParallel())
    weight = net[0].weight.detach().redistribute(placements=[Replicate()])
    net[0].weight = nn.Parameter(weight)
    counts = check(net, sequential, support.integers(6, 4))
    assert counts["forward"] == 0 < counts["native"]


def case_functional_call(mesh):
    """`functional_call` with whole parameters: the module behaves as if it were not sharded."""
    net, sequential = pair((4, 6, 3))
    parallelize_module(net, mesh, ReluMLPParallel())
    x = support.integers(6, 4)
    with counted() as counts:
        y = torch.func.functional_call(net, dict(sequential.named_parameters()), x)
    support.assert_same(y.detach(), sequential(x).detach())
    assert counts["forward"] == 1 and counts["all_reduce"] == 0


def case_functions_of_dtensors(mesh):
    """`relu_mlp` takes the native path. `loss_and_grads` raises for a mixture."""
    net, sequential = pair((4, 6, 3))
    parallelize_module(net, mesh, ReluMLPParallel())
    x, target = support.integers(6, 4), support.integers(6, 3)
    parameters = support.layers_of(net)
    replicated = DTensor.from_local(x, mesh, [Replicate()], run_check=False)
    y = relu_mlp.relu_mlp(replicated, *parameters)
    support.assert_same(whole(y), sequential(x).detach())
    raises(RuntimeError, "mixed torch.Tensor and DTensor", relu_mlp.relu_mlp, x, *parameters)
    kinds = (RuntimeError, ValueError)  # PyTorch 2.11 raises the latter
    raises(kinds, "", relu_mlp.loss_and_grads, x, target, *parameters)


def case_copies(mesh):
    net, sequential = pair((4, 6, 5, 3))
    parallelize_module(net, mesh, ReluMLPParallel())
    twin = copy.deepcopy(net)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
    counts = check(twin, sequential, support.integers(6, 4))
    assert counts["forward"] == 2 and counts["native"] == 0


def raises(kind, match, function, *arguments, **named):
    try:
        function(*arguments, **named)
    except kind as error:
        assert match in str(error), error
    else:
        raise AssertionError(f"{function} did not raise")


def case_refused(mesh):
    def refused(kind, match, net, mesh=mesh):
        before = dict(net.named_parameters())
        raises(kind, match, ReluMLPParallel()._apply, net, mesh)
        after = dict(net.named_parameters())
        assert before.keys() == after.keys() and all(before[n] is after[n] for n in before)

    def make():
        return relu_mlp.ReluMLP(4, [4], 4)

    grid = init_device_mesh("cpu", (mesh.size() // 2, 2), mesh_dim_names=("data", "tensor"))
    refused(ValueError, "device_mesh must have 1 dimension, got 2", make(), grid)
    refused(TypeError, "must be a ReluMLP, got Sequential", nn.Sequential(nn.Linear(4, 4)))
    hooked, tied, twice, sharded = make(), make(), make(), make()
    hooked[2].register_forward_hook(print)
    refused(ValueError, "got Linear with hooks or other parameters at 2", hooked)
    tied[2].weight = tied[0].weight
    refused(ValueError, "a parameter of its own", tied)
    twice[2] = twice[0]
    refused(ValueError, "a parameter of its own", twice)
    fully_shard(sharded)
    refused(TypeError, "must be a ReluMLP, got FSDPReluMLP", sharded)
    net = parallelize_module(make(), mesh, ReluMLPParallel())
    refused(TypeError, "must be a ReluMLP, got TensorParallelReluMLP", net)
    childless = make()
    childless._modules.clear()
    refused(ValueError, "must have children, got none", childless)

    net = parallelize_module(make(), mesh, ReluMLPParallel())
    single = init_device_mesh("cpu", (mesh.size(), 1), mesh_dim_names=("data", "tensor"))["tensor"]
    x = DTensor.from_local(torch.ones(2, 4), single, [Replicate()])
    raises(ValueError, "input must be on the mesh of the parameters", net, x)
    for wrong, match in [
        (torch.ones(2, 3), "weights[0] must have shape (out_features, 3)"),
        (torch.ones(2, 4).double(), "weights[0] must be float64 like x, got float32"),
        (torch.ones(2, 4).long(), "weights[0] must be int64 like x, got float32"),
        (torch.tensor(1.0), "x must have at least one dimension"),
    ]:
        raises(RuntimeError, match, net, wrong)
    net[2].bias = nn.Parameter(net[2].bias.detach().double())
    raises(RuntimeError, "biases[1] must be float32 like x, got float64", net, torch.ones(2, 4))


# -- Training ----------------------------------------------------------------------------

STEPS = 20
PART = 5
GRID = 1 / 4
ROWS = 8  # powers of two, like the numbers of outputs and processes, so means are exact
TRAINED = (4, 6, 5, 6, 2)  # widths that the number of processes does not divide


def start():
    """The network, the native one, and an input and a target."""
    net, sequential = pair(TRAINED)
    generator = torch.Generator().manual_seed(2)
    x, target = (
        torch.randint(-2, 3, (ROWS, n), dtype=torch.float64, generator=generator)
        for n in (TRAINED[0], TRAINED[-1])
    )
    return net, sequential, x, target


def make_optimizer(model):
    return torch.optim.Adam(model.parameters(), lr=GRID, fused=True)


def train(model, optimizer, x, target, steps, before_step=lambda model: None):
    """For each step: the loss, the gradients, and the updated parameters that this process holds.

    After each step the parameters are rounded to the grid. Equal gradients make equal updates
    except for the last bits (a compiler may contract products and sums), and the rounding removes
    these.
    """
    history = []
    for _ in range(steps):
        optimizer.zero_grad()
        before_step(model)
        loss = F.mse_loss(model(x), target)
        loss.backward()
        optimizer.step()
        for parameter in model.parameters():
            held(parameter).div_(GRID).round_().mul_(GRID)
        history.append(
            {
                "loss": loss.detach(),
                "grads": [held(p.grad).clone() for p in model.parameters()],
                "parameters": [held(p).clone() for p in model.parameters()],
            }
        )
    return history


def check_exact(model, x, target):
    """Every sum in a training step is a multiple of a power of two, and less than 2^53 times it.

    With L layers, y is a multiple of GRID^L, the gradient at y a multiple of that times 2 /
    elements, and every other gradient has at most L - 1 more factors. The majorant bounds the sums
    of the absolute values.
    """
    weights, biases = support.layers_of(model)
    layers, elements = len(weights), target.numel()
    majors = [support.absolutes(tensors) for tensors in ([x], weights, biases)]
    y = support.majorant(majors[0][0], *majors[1:])
    error = y.detach() + target.abs()
    grads = torch.autograd.grad(y, majors[1] + majors[2], 2 / elements * error)
    largest = max(grad.max().item() for grad in grads)
    assert largest < 2**53 * GRID ** (2 * layers - 1) * 2 / elements
    assert error.square().sum().item() < 2**53 * GRID ** (2 * layers)


@functools.cache
def expected_history():
    """The steps of one process with PyTorch's own layers, and two more."""
    _, sequential, x, target = start()
    optimizer = make_optimizer(sequential)
    history = train(
        sequential, optimizer, x, target, STEPS + 2, lambda model: check_exact(model, x, target)
    )
    assert history[-1]["loss"] < history[0]["loss"] / 10
    return history


class Layout:
    """A way to spread the training over the processes: over rows, over units, or both."""

    def __init__(self, mesh, rows=None, units=False):
        """`rows` is None, "ddp" or "fsdp"; `units` says whether to use `ReluMLPParallel`."""
        of_units = 1 if not units else mesh.size() if rows is None else 2
        shape = (mesh.size() // of_units, of_units)
        self.mesh = init_device_mesh("cpu", shape, mesh_dim_names=("rows", "units"))
        self.by_rows, self.by_units = rows, units

    def spread(self, net):
        numbered = copy.deepcopy(net)
        with torch.no_grad():
            for parameter in numbered.parameters():
                parameter.copy_(torch.arange(parameter.numel()).view_as(parameter))
        #: For each parameter, the elements that this process holds.
        self.elements = [held(p).long() for p in self._spread(numbered).parameters()]
        return self._spread(net)

    def _spread(self, net):
        if self.by_units:
            parallelize_module(net, self.mesh["units"], ReluMLPParallel())
        if self.by_rows == "ddp":
            return DistributedDataParallel(net, process_group=self.mesh.get_group("rows"))
        if self.by_rows == "fsdp":
            # The parameters are freed when the forward pass ends, and gathered again for the
            # backward pass.
            fully_shard(net, mesh=self.mesh["rows"], reshard_after_forward=True)
        return net

    def rows(self, tensor):
        """The rows of this process."""
        return tensor[self.mesh.get_local_rank("rows") :: self.mesh.size(0)]

    def check(self, model, history, first=0):
        """Compares the steps from `first` on with those of the single process."""
        assert history
        for step, actual in enumerate(history, first):
            expected = expected_history()[step]
            loss = actual["loss"].clone()
            dist.all_reduce(loss, group=self.mesh.get_group("rows"))
            support.assert_same(loss / self.mesh.size(0), expected["loss"], f"loss {step}")
            for kind in ("grads", "parameters"):
                parts = zip(actual[kind], expected[kind], self.elements, strict=True)
                for n, (p, q, elements) in enumerate(parts):
                    support.assert_same(p, q.flatten()[elements], f"{kind} {n}, step {step}")
        for n, (p, q) in enumerate(zip(model.parameters(), expected["parameters"], strict=True)):
            support.assert_same(whole(p), q, f"parameter {n} after all")


LAYOUTS = {
    "ddp": ("ddp", False),
    "fsdp": ("fsdp", False),
    "units": (None, True),
    "fsdp and units": ("fsdp", True),
}


def case_training(mesh):
    """Twenty steps in each layout, served by the operators."""
    for name in ("ddp", "fsdp", "units"):
        layout = Layout(mesh, *LAYOUTS[name])
        net, _, x, target = start()
        model = layout.spread(net)
        optimizer = make_optimizer(model)
        with counted() if name == "units" else support.count_calls() as counts:
            history = train(model, optimizer, layout.rows(x), layout.rows(target), STEPS)
        layout.check(model, history)
        calls = STEPS * (2 if layout.by_units else 1)
        assert counts["forward"] == counts["backward"] == calls, (name, counts)
        assert counts["native"] == 0, (name, counts)
        if name == "units":  # twice forward and once backward, because x needs no gradient
            assert counts["all_reduce"] == 3 * STEPS and counts["other"] == 0, counts


def case_fsdp_of_the_children(mesh):
    """`fully_shard` on a child adds hooks, so the children run natively."""
    net, _, x, target = start()
    layout = Layout(mesh, "fsdp")
    layout.spread(copy.deepcopy(net))
    for child in net:
        if isinstance(child, nn.Linear):
            fully_shard(child, mesh=mesh)
    fully_shard(net, mesh=mesh)
    with support.count_calls() as counts:
        history = train(net, make_optimizer(net), layout.rows(x), layout.rows(target), 2)
    layout.check(net, history)
    assert counts["forward"] == 0 < counts["native"]


def case_fsdp_of_a_larger_model(mesh):
    """The `ReluMLP` is sharded together with the module around it, in bfloat16, and the operators
    run in bfloat16.
    """
    net, sequential = pair((2, 4, 2))
    for module in (net, sequential):
        module.float()
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.clamp_(-1, 1)
    model = nn.Sequential(nn.Identity(), net)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    x = support.integers(4, 2, dtype=torch.float32, largest=1)
    with support.count_calls() as counts:
        y = model(x)
        y.sum().backward()
    assert counts["forward"] == counts["backward"] == 1 and counts["native"] == 0
    assert y.dtype == torch.bfloat16
    expected = sequential(x)
    expected.sum().backward()
    support.assert_same(y.detach().float(), expected.detach())
    for p, q in zip(net.parameters(), sequential.parameters()):
        support.assert_same(whole(p.grad), q.grad)  # the mean of equal ones


# -- Checkpoints -------------------------------------------------------------------------


def save(folder, model, optimizer):
    states = get_state_dict(model, optimizer)
    dcp.save(dict(zip(("model", "optimizer"), states)), checkpoint_id=folder)


def load(folder, model, optimizer):
    states = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer)))
    dcp.load(states, checkpoint_id=folder)
    set_state_dict(
        model,
        optimizer,
        model_state_dict=states["model"],
        optim_state_dict=states["optimizer"],
    )


def other_start():
    """The same as `start`, with parameters that a checkpoint must replace."""
    net, _, x, target = start()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(1)
    return net, x, target


def case_checkpoints(mesh):
    """Started in one process, and continued in another layout after every `PART` steps."""
    saved = checkpoint("alone")
    for part, name in enumerate(["units", "fsdp", "fsdp and units"], 1):
        layout = Layout(mesh, *LAYOUTS[name])
        net, x, target = other_start()
        model = layout.spread(net)
        optimizer = make_optimizer(model)
        load(saved, model, optimizer)
        with support.count_calls() as counts:
            history = train(model, optimizer, layout.rows(x), layout.rows(target), PART)
        layout.check(model, history, part * PART)
        assert counts["forward"] == counts["backward"] == PART * (1 + layout.by_units), counts
        assert counts["native"] == 0, counts
        saved = checkpoint(name)
        save(saved, model, optimizer)


def checkpoint(layout):
    return folder / layout.replace(" ", "-")


folder = Path()
CASES = {name: case for name, case in globals().items() if name.startswith("case_")}
#: The cases in which the number of processes matters. The others run with two.
WITH_FOUR = [
    "case_tensor_parallel",
    "case_parts_are_where_they_should_be",
    "case_training",
    "case_checkpoints",
]
#: Cases that end in PyTorch's own layers, or involve no layers: the same on every backend.
ON_ONE_BACKEND = [
    "case_parts_are_where_they_should_be",
    "case_transforms",
    "case_autocast",
    "case_hooks_on_children",
    "case_styles_for_the_children",
    "case_other_placements_and_children",
    "case_refused",
    "case_fsdp_of_the_children",
    "case_checkpoints",
]


def cases(processes):
    """(backend, name) of all cases for this number of processes."""
    return [
        (backend, name)
        for backend in support.WITH_NODE
        for name in CASES
        if (processes == 2 or name in WITH_FOUR)
        and (backend == support.WITH_NODE[0] or name not in ON_ONE_BACKEND)
    ]


def main():
    global folder
    folder = Path(sys.argv[1])
    faulthandler.dump_traceback_later(LIMIT, exit=True)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=LIMIT))
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("all",))
    for backend, name in cases(mesh.size()):
        torch.manual_seed(0)
        with support.backend(backend):
            CASES[name](mesh)
        with open(folder / f"rank{dist.get_rank()}", "a", encoding="utf-8") as report:
            print(backend, name, file=report)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
