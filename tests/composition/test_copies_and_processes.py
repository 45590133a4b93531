"""Uses of a module besides calling it: copies, tools, processes and threads.

More of this is in test_module.py (copies, state_dict, parametrizations, pruning, functional_call,
meta) and in test_backend.py (threads). Numbers are small integers, so results have the same bits in
any order of summation.
"""

import copy
import io
import multiprocessing
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import ClassVar

import pytest
import torch
from torch import nn
from torch.nn.utils import stateless
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.profiler import profile
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint, checkpoint_sequential
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode

import relu_mlp
import support
from relu_mlp import ReluMLP, functional, ops, reference
from support import assert_same, gradients, integer_network, integers, leaves, native_mlp

R = torch.ops.relu_mlp


def pair(hidden=(6, 5), out_features=4, **arguments):
    net, sequential = support.twins(3, hidden, out_features, **arguments)
    return support.integers_(net), support.integers_(sequential)


def integer_input(*shape):
    return torch.randint(-2, 3, shape).float()


def run(module, x):
    """y and the gradients of x and of the parameters, by name."""
    x = x.detach().requires_grad_()
    y = module(x)
    named = {"x": x, **{name: p for name, p in module.named_parameters() if p.requires_grad}}
    return {"y": y.detach(), **gradients(y, named)}


def same_as_native(net, sequential, calls=1):
    """The same results, with `calls` forward and backward passes of the operators."""
    x = integer_input(7, 3)
    with support.count_calls() as counted:
        found = run(net, x)
    assert (counted["forward"], counted["backward"]) == (calls, calls)
    assert (counted["native"] == 0) is (calls > 0)
    assert_same(found, run(sequential, x))


# -- Copies and files -------------------------------------------------------------


def test_a_whole_module_loads_with_weights_only(backend):
    """As PyTorch requires, with the allowed classes named."""
    net, sequential = pair(output_activation="relu", recompute=True)
    run(net, integer_input(7, 3))  # by then it may cache something
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    with torch.serialization.safe_globals([ReluMLP, nn.Linear, nn.ReLU]):
        other = torch.load(file, weights_only=True)
    assert type(other) is ReluMLP and other.recompute
    same_as_native(other, sequential)


@pytest.mark.parametrize("average", ["mean", "ema"])
def test_averaged_copies(backend, average):
    """`AveragedModel` copies a module that was used, and its copy runs fused."""
    averages = []
    for module in pair():
        settings = {"multi_avg_fn": get_ema_multi_avg_fn(0.5)} if average == "ema" else {}
        run(module, integer_input(7, 3))
        averages.append(AveragedModel(module, use_buffers=False, **settings))
        for step in range(1, 4):
            with torch.no_grad():
                for parameter in module.parameters():
                    parameter.add_(4.0**step)
            averages[-1].update_parameters(module)
    assert not torch.equal(averages[0].module[0].weight, pair()[0][0].weight)
    same_as_native(*averages)


def test_on_meta_and_then_somewhere(backend):
    """Built without memory in three ways, and then given memory."""
    _, sequential = pair()
    with torch.device("meta"):
        made = [ReluMLP(3, (6, 5), 4)]
    made.append(nn.utils.skip_init(ReluMLP, 3, (6, 5), 4, device="cpu"))
    made.append(pair()[0].to("meta"))
    for net in made:
        with relu_mlp.backend("auto"):  # the extension can't serve meta tensors
            run(net, integer_input(7, 3).to(net[0].weight.device))
        net = net.to_empty(device="cpu")
        net.load_state_dict(sequential.state_dict())
        same_as_native(net, sequential)


# -- Parameters -------------------------------------------------------------------


def test_tied_weights(backend):
    """One Parameter in two layers, and in another network: gradients add up."""
    net, sequential = support.twins(5, (5, 5), 4)
    other, other_sequential = support.twins(5, 5, 2)
    for tied, second in ((net, other), (sequential, other_sequential)):
        run(tied, torch.ones(1, 5))  # before they are tied
        tied[2].weight = tied[0].weight
        tied[2].bias = tied[0].bias
        second[0].weight = tied[0].weight
        support.integers_(nn.ModuleList([tied, second]))
    assert len(list(net.parameters())) == 4
    x = integer_input(7, 5)
    with support.count_calls() as counted:
        found = [run(net, x), run(lambda_module(net, other), x)]
    assert (counted["forward"], counted["backward"], counted["native"]) == (3, 3, 0)
    assert_same(found[0], run(sequential, x))
    assert_same(found[1], run(lambda_module(sequential, other_sequential), x))
    same_copy = copy.deepcopy(net)
    assert same_copy[0].weight is same_copy[2].weight
    assert_same(run(same_copy, x), found[0])


class lambda_module(nn.Module):
    """Two networks and the sum of their outputs."""

    def __init__(self, first, second):
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x):
        return self.first(x).sum(-1) + self.second(x).sum(-1)


def test_requires_grad_toggled(backend):
    """Parameters are frozen and freed between calls of one module."""
    net, sequential = pair()
    x = integer_input(7, 3)
    for frozen in ([0], [0, 1], [4, 5], list(range(6)), [], [3], []):
        for module in (net, sequential):
            module.requires_grad_(True)
            for n, parameter in enumerate(module.parameters()):
                parameter.requires_grad_(n not in frozen)
        with support.count_calls() as counted:
            found = run(net, x)
        assert (counted["forward"], counted["backward"], counted["native"]) == (1, 1, 0)
        assert_same(found, run(sequential, x))
    net.requires_grad_(False)
    with support.count_calls() as counted:
        assert not net(x).requires_grad
    assert (counted["forward"], counted["native"]) == (1, 0)


@pytest.mark.filterwarnings("ignore:.*stateless.functional_call:FutureWarning")
@pytest.mark.parametrize("call", [stateless.functional_call, torch.func.functional_call])
def test_parameters_lent(backend, call):
    """Only some of them, and those of tied layers under one name."""
    net, sequential = pair(hidden=(3,), out_features=3)
    for module in (net, sequential):
        module[2].weight = module[0].weight
    x = integer_input(7, 3)
    lent = {"0.weight": torch.eye(3).requires_grad_(), "2.bias": torch.ones(3).requires_grad_()}
    results = []
    for module in (net, sequential):
        with support.count_calls() as counted:
            y = call(module, lent, (x,))
            grads = torch.autograd.grad(y.sum(), [*lent.values(), module[0].bias])
        results.append(dict(enumerate([y.detach(), *grads])))
        assert counted["forward"] == counted["backward"] == (module is net)
    assert_same(*results)
    same_as_native(net, sequential)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint(backend, use_reentrant):
    """The forward pass runs twice, fused both times."""
    net, sequential = pair()
    x = integer_input(7, 3)
    results = []
    for module in (net, sequential):

        class Checkpointed(nn.Module):
            def __init__(self, inner):
                super().__init__()
                self.inner = inner

            def forward(self, x):
                return checkpoint(self.inner, x, use_reentrant=use_reentrant).relu()

        leaf = x.clone().requires_grad_()
        with support.count_calls() as counted:
            # The reentrant kind does not support autograd.grad.
            Checkpointed(module)(leaf).sum().backward()
        if module is net:
            assert (counted["forward"], counted["backward"], counted["native"]) == (2, 1, 0)
        grads = {name: parameter.grad for name, parameter in module.named_parameters()}
        results.append({"x": leaf.grad, **grads})
    assert_same(*results)


def test_checkpoint_sequential_takes_the_children(backend):
    results = []
    for module in pair():
        x = torch.ones(7, 3, requires_grad=True)
        y = checkpoint_sequential(module, 2, x, use_reentrant=False)
        results.append(
            {"y": y.detach(), **gradients(y, {"x": x, **dict(module.named_parameters())})}
        )
    assert_same(*results)


# -- Subclasses and modes -----------------------------------------------------------


class Dispatched(torch.Tensor):
    """Holds a tensor, and records the operations on it."""

    log: ClassVar[list[str]] = []
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, dtype=inner.dtype, requires_grad=inner.requires_grad
        )

    def __init__(self, inner):
        self.held = inner.detach()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        cls.log.append(func._schema.name)
        args, kwargs = tree_map_only(Dispatched, lambda t: t.held, (args, kwargs or {}))
        return tree_map_only(torch.Tensor, Dispatched, func(*args, **kwargs))


class Functions(torch.Tensor):
    log: ClassVar[list[str]] = []

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        cls.log.append(func.__name__)
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.mark.parametrize("where", ["x", "weights[1]", "biases[0]"])
@pytest.mark.parametrize("kind", ["__torch_dispatch__", "__torch_function__"])
def test_tensor_subclasses_see_the_native_operations(backend, kind, where):
    """In the function and in the module, each operation of the native path in order."""
    subclass = Dispatched if kind == "__torch_dispatch__" else Functions
    wrap = Dispatched if subclass is Dispatched else lambda tensor: tensor.as_subclass(Functions)
    seen, results = [], []
    for form in ("function", "module", "native"):
        torch.manual_seed(0)
        weights, biases = integer_network((3, 5, 2), requires_grad=False)
        named = leaves(integers(7, 3), weights, biases)
        named[where] = wrap(named[where])
        named = {
            name: tensor.requires_grad_() if name == "x" else nn.Parameter(tensor)
            for name, tensor in named.items()
        }
        assert type(named[where]) is subclass
        x, weights = named["x"], [named["weights[0]"], named["weights[1]"]]
        biases = [named["biases[0]"], named["biases[1]"]]
        net = ReluMLP(3, 5, 2, device="meta")
        for child, weight, bias in zip((net[0], net[2]), weights, biases):
            child.weight, child.bias = weight, bias
        subclass.log.clear()
        with support.count_calls() as counted:
            if form == "module":
                y = net(x)
            else:
                y = (native_mlp if form == "native" else relu_mlp.relu_mlp)(x, weights, biases)
            # reading an attribute, or the size of a bias, is no operation
            seen.append([name for name in subclass.log if name not in ("__get__", "numel")])
            grads = torch.autograd.grad(y.sum(), list(named.values()))
        assert counted["forward"] == counted["backward"] == 0
        assert type(y) is subclass
        plain = [getattr(t, "held", t).detach().as_subclass(torch.Tensor) for t in (y, *grads)]
        results.append(dict(enumerate(plain)))
    assert seen[2]
    assert_same(results[0], results[2])
    assert_same(results[1], results[2])
    assert seen[0] == seen[2]
    assert seen[1] == seen[2]


def test_under_the_modes_of_the_default_device(backend):
    net, sequential = pair()
    for mode in (torch.device("cpu"), torch.device("meta")):
        x = integer_input(7, 3)
        with mode, support.count_calls() as counted:
            y = net(x)
            torch.autograd.backward(y, torch.ones_like(y, device="cpu"))
        assert (counted["forward"], counted["backward"], counted["native"]) == (1, 1, 0)
        assert_same(y.detach(), sequential(x).detach())


# -- Counting and profiling -----------------------------------------------------------


def flops(function, *arguments):
    """The operations of a function: (total of all calls, by operator)."""
    with FlopCounterMode(display=False) as counter:
        function(*arguments)
    return counter.get_total_flops(), counter.get_flop_counts().get("Global", {})


def operator(x, weights, biases, *, output_activation=None):
    present = [ops.NO_TENSOR if bias is None else bias for bias in biases or []]
    name = functional.ACTIVATION_NAMES[output_activation]
    return R.relu_mlp(x, weights, present, name)


NEEDS = {
    "all": lambda x, weights, biases: [x, *weights, *biases],
    "parameters": lambda x, weights, biases: [*weights, *biases],
    "x": lambda x, weights, biases: [x],
    "weights": lambda x, weights, biases: weights,
    "biases": lambda x, weights, biases: biases,
    "second layer": lambda x, weights, biases: [weights[1], biases[1]],
    "x and last bias": lambda x, weights, biases: [x, biases[2]],
    "last bias": lambda x, weights, biases: [biases[2]],
    "none": lambda x, weights, biases: [],
}


@pytest.mark.parametrize("needs", NEEDS)
@pytest.mark.parametrize("activation", [None, "tanh"])
def test_flops_are_the_native_ones(backend, needs, activation):
    for shape in [(7, 3), (2, 7, 3), (0, 3)]:
        weights, biases = integer_network((3, 5, 4, 2), requires_grad=False)
        tensors = integers(*shape), weights, biases
        for tensor in NEEDS[needs](*tensors):
            tensor.requires_grad_()
        totals = []
        for mlp in (relu_mlp.relu_mlp, operator, native_mlp):
            outputs = []
            forward, names = flops(
                lambda mlp=mlp, tensors=tensors, outputs=outputs: outputs.append(
                    mlp(*tensors, output_activation=activation)
                )
            )
            backward = 0
            if needs != "none":
                backward, more = flops(outputs[0].sum().backward)
                if mlp is not native_mlp and backend == "extension":
                    assert set(names) == {R.forward} and set(more) == {R.backward}
            elif mlp is not native_mlp and backend == "extension":
                assert set(names) <= {R.forward, R.relu_mlp}
            totals.append((forward, backward))
        assert totals[2][0] > 0 or shape[0] == 0
        assert totals[0] == totals[1] == totals[2]


@pytest.mark.parametrize("activation", [None, "relu", "tanh"])
def test_flops_of_recomputation(backend, activation):
    """The same count as PyTorch's own checkpoint, non-reentrant or reentrant.

    The non-reentrant kind stops when all saved tensors are recomputed, as the extension does:
    without an output activation, before the last layer. The reference also computes y again.
    """
    weights, biases = integer_network((3, 5, 4, 2))
    tensors = integers(7, 3).requires_grad_(), weights, biases
    y = relu_mlp.relu_mlp(*tensors, output_activation=activation, recompute=True)
    found, names = flops(y.sum().backward)
    totals = {}
    for use_reentrant in (False, True):
        y = checkpoint(
            lambda *t: native_mlp(t[0], t[1:4], t[4:], output_activation=activation),
            *(tensors[0], *weights, *biases),
            use_reentrant=use_reentrant,
        )
        totals[use_reentrant] = flops(y.sum().backward)[0]
    if backend == "extension":
        assert set(names) == {R.recompute_backward}
        assert found == totals[False]
    else:
        assert found == totals[True]
    assert (totals[True] == totals[False]) is (activation is not None)


@pytest.mark.parametrize("bias", ["all", "some", "none"])
def test_flops_of_loss_and_grads(backend, bias):
    weights, biases = integer_network((3, 5, 4, 2), bias)
    x, target = integers(7, 3), integers(7, 2)
    found, names = flops(relu_mlp.loss_and_grads, x, target, weights, biases)
    expected, _ = flops(lambda: (native_mlp(x, weights, biases) - target).square().sum().backward())
    assert found == expected
    if backend == "extension":
        assert set(names) == {R.loss_and_grads}


def test_flops_of_a_second_derivative():
    """Those of the formulas where everything is wanted, and fewer where less is."""
    weights, biases = integer_network((3, 5, 4, 2), requires_grad=False)
    x, grad_output = integers(7, 3), integers(7, 2)
    y, hidden = reference.forward(x, weights, biases, "tanh", True)
    call = grad_output, [x, y, *weights, *hidden], "tanh", "1" * 7
    cotangents = reference.backward(*call)
    whole = *call, cotangents, "1" * 7, "1" * 8
    expected, _ = flops(reference.backward_vjp, *whole)
    assert flops(R.backward_vjp, *whole) == (expected, {R.backward_vjp: expected})
    # Of a penalty on x: two tangents, two deltas, and the gradients of three weights.
    products = [15 + 20, 20 + 8, 15 + 20 + 8]
    penalty = *call, cotangents[:1], "1000000", "00011100"
    assert flops(R.backward_vjp, *penalty)[0] == 2 * 7 * sum(products)
    # One cotangent, of the second weight: its product, two deltas, and the gradient of a_1.
    one = *call, cotangents[2:3], "0010000", "00000010"
    assert flops(R.backward_vjp, *one)[0] == 2 * 7 * (8 + 20)
    # And up to z_L'.
    one = *call, cotangents[2:3], "0010000", "10000000"
    assert flops(R.backward_vjp, *one)[0] == 2 * 7 * (20 + 8)


def test_flops_through_a_module(backend):
    """The counter hooks every module, so the children run, each with its own count."""
    counts = []
    for module in pair():
        x = integer_input(7, 3).requires_grad_()
        with FlopCounterMode(display=False) as counter, support.count_calls() as counted:
            module(x).sum().backward()
        assert counted["forward"] == 0
        kind = type(module).__name__
        counts.append(
            {key.replace(kind, "net"): value for key, value in counter.get_flop_counts().items()}
        )
    assert {"Global", "net", "net.0", "net.2", "net.4"} == set(counts[0])
    assert counts[0] == counts[1]


def test_profiler_shows_the_operators(backend):
    net, _ = pair()
    weights, biases = support.layers_of(net)
    x = integer_input(7, 3)
    with profile(acc_events=True) as profiled:  # otherwise PyTorch 2.11 warns
        net(x).sum().backward()
        relu_mlp.relu_mlp(x, weights, biases, recompute=True).sum().backward()
        relu_mlp.loss_and_grads(x, torch.ones(7, 4), weights, biases)
        with torch.no_grad():
            net(x)
    names = {event.key: event.count for event in profiled.key_averages()}
    assert names["MLPBackward"] == 2
    if backend == "extension":
        assert names["relu_mlp::forward"] == 2
        for name in ("relu_mlp", "backward", "recompute_backward", "loss_and_grads"):
            assert names[f"relu_mlp::{name}"] == 1
    else:
        assert not [name for name in names if name.startswith("relu_mlp::")]


# -- Processes and threads ----------------------------------------------------------


@pytest.fixture
def threads():
    """Sets the number of PyTorch's threads, for one test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


class Answers(Dataset):
    """The network's result for its index, computed by the worker that gets it."""

    def __init__(self, net, xs):
        self.net, self.xs = net, xs

    def __len__(self):
        return len(self.xs)

    def __getitem__(self, index):
        with support.count_calls() as counted:
            results = run(self.net, self.xs[index])
        calls = torch.tensor([counted["forward"], counted["backward"], counted["native"]])
        return {**results, "calls": calls, "backend": ops.current_backend()}


@pytest.fixture
def forks():
    """`fork` of a process that has threads, about which newer Pythons warn."""
    if "fork" not in multiprocessing.get_all_start_methods():
        pytest.skip("this system has no fork")
    if torch.cuda.is_available():
        pytest.skip("PyTorch's autograd refuses to work in a fork of a process with a GPU")
    return multiprocessing.get_context("fork")


fork_warnings = pytest.mark.filterwarnings(
    "ignore:.*fork.*:DeprecationWarning", "ignore:This DataLoader will create:UserWarning"
)


@pytest.mark.slow
@fork_warnings
def test_dataloader_workers(backend, forks, threads):
    """Forward and backward passes in two workers, of a network that was used before."""
    threads(2)
    net, sequential = pair()
    xs = [integer_input(2000, 3) for _ in range(4)]
    expected = [run(sequential, x) for x in xs]
    run(net, xs[0])
    loader = DataLoader(
        Answers(net, xs), batch_size=None, num_workers=2, multiprocessing_context=forks, timeout=60
    )
    for found, native in zip(loader, expected):
        assert found.pop("calls").tolist() == [1, 1, 0]
        assert found.pop("backend") == backend
        assert_same(found, native)


@pytest.mark.slow
@fork_warnings
@pytest.mark.parametrize("rows", [7, 4000])
def test_fork_after_use(backend, forks, threads, rows):
    """A child computes the same as its parent, on one thread.

    The threads of PyTorch's pool do not exist in the child, and waiting for them hangs. That limit
    is PyTorch's and applies to the native layers too. A child that computes much calls
    torch.set_num_threads(1), as DataLoader does for its workers.
    """
    threads(2)
    net, _ = pair()
    x = integer_input(rows, 3)
    expected = run(net, x)

    def child(sender):
        if rows > 1000:
            torch.set_num_threads(1)
        with support.count_calls() as counted:
            found = run(net, x)
        found = {name: tensor.tolist() for name, tensor in found.items()}
        sender.send((found, counted))

    receiver, sender = forks.Pipe(duplex=False)
    process = forks.Process(target=child, args=(sender,))
    process.start()
    try:
        assert receiver.poll(60), "the child hangs or has died"
        found, counted = receiver.recv()
    finally:
        process.kill()
        process.join()
    assert (counted["forward"], counted["backward"], counted["native"]) == (1, 1, 0)
    assert_same({name: torch.tensor(values) for name, values in found.items()}, expected)


@pytest.mark.slow
@pytest.mark.parametrize("rows", [100, 4000])
def test_four_threads_at_once(backend, threads, rows):
    """Each with PyTorch's threads to itself, and each with the result of a single thread."""
    threads(2)
    net, sequential = pair(hidden=(33, 17))
    xs = [integers(rows, 3, largest=1).float() for _ in range(4)]
    expected = [run(sequential, x) for x in xs]
    start = threading.Barrier(4)

    def work(x):
        torch.set_num_threads(2)
        with relu_mlp.backend(backend):
            start.wait(60)
            assert net(x).grad_fn.name() == "MLPBackward"
            return [run(net, x) for _ in range(5)]

    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(work, xs, timeout=60))
    for results, single in zip(answers, expected):
        for found in results:
            assert_same(found, single)
