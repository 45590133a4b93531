"""Memory: workspaces of every size, storages that were freed or shrunk, tensors on another device,
memory that calls leave behind, and allocations that fail.
"""

import ctypes
import gc
import itertools
import subprocess
import sys
import textwrap

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

import relu_mlp
import support
from relu_mlp import ReluMLP, loss_and_grads, ops, reference
from support import assert_same, integers, passes

R = torch.ops.relu_mlp
SETS = relu_mlp.build_info().supported_instruction_sets
needs_library = pytest.mark.skipif(ops.LIBRARY_PATH is None, reason="needs the extension")

#: The operators, and their replacement without the library.
OPERATORS = {
    "reference": reference,
    **({"extension": R} if ops.LIBRARY_PATH is not None else {}),
}


# -- Workspaces -------------------------------------------------------------------


#: Layers of width 0 and 1 beside layers of odd width and layers wider than any kernel's panel.
WIDTHS = [
    [0, 300, 65, 1],
    [3, 0, 300, 65, 1],
    [0, 130, 8, 1],
    [1, 129, 0, 33, 2],
    [7, 1, 97, 0],
    [129, 65, 0],
    [0, 0],
    [0, 1],
    [67, 31, 1],
]


@needs_library
@pytest.mark.parametrize("dtype", support.DTYPES, ids=str)
@pytest.mark.parametrize("widths", WIDTHS, ids=str)
@pytest.mark.parametrize("name", SETS)
def test_workspaces_of_every_size(name, widths, dtype):
    """One block of rows and several, one chunk and several: all passes, bit by bit."""
    before = relu_mlp.build_info().instruction_set
    torch.ops.relu_mlp_testing.choose_instruction_set(name)
    try:
        for rows in (0, 1, 5, 17, 240, 481):
            passes.compare(R, passes.integer_network(widths, dtype, rows), "none")
    finally:
        torch.ops.relu_mlp_testing.choose_instruction_set(before)


# -- Storages that do not cover their tensors -------------------------------------


def shrunk(tensor, nbytes=None):
    """The tensor over a storage of its own that lacks the last byte, or has `nbytes`."""
    tensor = tensor.clone()
    storage = tensor.untyped_storage()
    storage.resize_(storage.nbytes() - 1 if nbytes is None else nbytes)
    return tensor


def freed(tensor):
    return shrunk(tensor, 0)


def late(tensor):
    """A view of a larger storage, whose part under the view has been cut off."""
    tensor = torch.cat([tensor.flatten(), tensor.flatten()])[tensor.numel() :].view(tensor.shape)
    tensor.untyped_storage().resize_(tensor.numel() * tensor.element_size() + 1)
    return tensor


def strided(tensor):
    """Every other element of a storage that is too short for the last one."""
    tensor = torch.stack([tensor, tensor], dim=-1)[..., 0]
    storage = tensor.untyped_storage()
    storage.resize_(storage.nbytes() - 2 * tensor.element_size())
    return tensor


def repeated(tensor):
    """One element for all, whose storage is freed."""
    tensor = torch.ones(1, dtype=tensor.dtype).expand(tensor.shape)
    tensor.untyped_storage().resize_(0)
    return tensor


SPOILT = pytest.mark.parametrize(
    "spoil", [freed, shrunk, late, strided, repeated], ids=lambda f: f.__name__
)


def arguments_of(operator, dtype=torch.float32, leading=(4,)):
    """Arguments of an operator by name, for a network 3, 8, 8, 2; lists by entry."""
    weights = [integers(8, 3), integers(8, 8), integers(2, 8)]
    biases = [integers(8), integers(8), integers(2)]
    x, grad = integers(*leading, 3), integers(*leading, 2)
    y, hidden = reference.forward(x, weights, biases, "relu", True)
    network = {"x": x, "weights": weights, "biases": biases}
    arguments = {
        "relu_mlp": network,
        "forward": network,
        "backward": {"grad_output": grad, "saved": [x, y, *weights, *hidden]},
        "recompute_backward": {"grad_output": grad, **network},
        "loss_and_grads": {"x": x, "target": grad, "weights": weights, "biases": biases},
    }[operator]
    return {
        name: [t.to(dtype) for t in value] if isinstance(value, list) else value.to(dtype)
        for name, value in arguments.items()
    }


#: The arguments after the tensors.
SETTINGS = {
    "relu_mlp": ["relu"],
    "forward": ["relu", True],
    "backward": ["relu", "1" * 7],
    "recompute_backward": ["relu", "1" * 7],
    "loss_and_grads": ["sse", "relu"],
}


def places(arguments):
    """(name, index) of every tensor. The index is None for a tensor outside of a list."""
    for name, value in arguments.items():
        if isinstance(value, list):
            yield from ((name, n) for n in range(len(value)))
        else:
            yield name, None


def changed(arguments, place, change):
    name, n = place
    arguments = {k: list(v) if isinstance(v, list) else v for k, v in arguments.items()}
    if n is None:
        arguments[name] = change(arguments[name])
    else:
        arguments[name][n] = change(arguments[name][n])
    return arguments


def name_of(place):
    return place[0] if place[1] is None else f"{place[0]}[{place[1]}]"


def named(results):
    return dict(enumerate(tree_leaves(results)))


@needs_library
@SPOILT
@pytest.mark.parametrize("leading", [(4,), (2, 2)], ids=str)
@pytest.mark.parametrize("operator", SETTINGS)
def test_operators_refuse_tensors_that_their_storage_does_not_cover(operator, leading, spoil):
    """Every tensor argument in turn. The message names it."""
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        arguments = arguments_of(operator, dtype, leading)
        for place in places(arguments):
            bad = changed(arguments, place, spoil)
            with pytest.raises(RuntimeError) as error:
                getattr(R, operator)(*bad.values(), *SETTINGS[operator])
            assert f"{name_of(place)} must have a storage with all its elements" in str(error.value)


@needs_library
@pytest.mark.parametrize("operator", SETTINGS)
def test_operators_take_tensors_that_end_where_their_storage_does(operator):
    """At an offset, with gaps, repeated, and without elements over an empty storage."""

    def at_the_end(tensor):
        padded = torch.cat([torch.full((5,), 9.0), tensor.flatten()])
        return padded[5:].view(tensor.shape)

    def with_gaps(tensor):
        wide = torch.stack([tensor, tensor], dim=-1)
        wide.untyped_storage().resize_(wide.nbytes - wide.element_size())
        return wide[..., 0]

    def turned(tensor):
        return tensor.mT.contiguous().mT if tensor.dim() > 1 else tensor

    arguments = arguments_of(operator)
    expected = getattr(R, operator)(*arguments.values(), *SETTINGS[operator])
    for place, change in itertools.product(places(arguments), [at_the_end, with_gaps, turned]):
        found = getattr(R, operator)(
            *changed(arguments, place, change).values(), *SETTINGS[operator]
        )
        assert_same(named(found), named(expected), name_of(place))
    ones = {
        name: [torch.ones(1).expand(t.shape) for t in value]
        if isinstance(value, list)
        else torch.ones(1).expand(value.shape)
        for name, value in arguments.items()
    }
    found = getattr(R, operator)(*ones.values(), *SETTINGS[operator])
    copies = {
        name: [t.clone() for t in value] if isinstance(value, list) else value.clone()
        for name, value in ones.items()
    }
    expected = getattr(R, operator)(*copies.values(), *SETTINGS[operator])
    assert_same(named(found), named(expected), "expanded")
    empty = torch.empty(4, 0)
    empty.untyped_storage().resize_(0)
    y = R.relu_mlp(empty, [torch.empty(2, 0)], [torch.ones(2)])
    assert_same(y, torch.ones(4, 2), "y")


FREED = {
    "x": lambda net, x: x,
    "weights[0]": lambda net, x: net[0].weight,
    "weights[1]": lambda net, x: net[2].weight,
    "biases[0]": lambda net, x: net[0].bias,
    "biases[1]": lambda net, x: net[2].bias,
}


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("when", ["before the forward pass", "before the backward pass"])
@pytest.mark.parametrize("which", FREED)
def test_module_with_a_tensor_that_was_freed(backend, which, when, recompute):
    """As sharding and offloading free tensors: the same result as the native layers."""
    outcomes = []
    for net in map(support.integers_, support.twins(3, 8, 2, recompute=recompute)):
        x = torch.ones(4, 3, requires_grad=True)
        y = None
        storage = FREED[which](net, x).untyped_storage()
        try:
            if when == "before the forward pass":
                storage.resize_(0)
                net(x)
            else:
                y = net(x)
                storage.resize_(0)
                y.sum().backward()
        except RuntimeError as error:
            outcomes.append(error)
        else:
            outcomes.append(x.grad)
    ours, native = outcomes
    if isinstance(native, RuntimeError) or recompute:
        # With recompute=True the backward pass reads the biases, which the native one does not.
        assert isinstance(ours, RuntimeError)
    else:
        assert_same(ours, native, "grad of x")


def test_loss_and_grads_of_a_tensor_that_was_freed(backend):
    x, target = torch.ones(4, 3), torch.ones(4, 2)
    weights, biases = support.make_network([3, 8, 2], dtype=torch.float32)
    everything = [x, target, *weights, *biases]
    for n in range(len(everything)):
        args = list(everything)
        args[n] = freed(args[n])
        with pytest.raises(RuntimeError):
            loss_and_grads(args[0], args[1], args[2:4], args[4:])


# -- Another device ---------------------------------------------------------------


def on_meta(tensor):
    return tensor.to("meta")


def nothing_on_meta(tensor):
    return torch.empty(0, device="meta")


@pytest.mark.parametrize("change", [on_meta, nothing_on_meta], ids=lambda f: f.__name__)
@pytest.mark.parametrize("leading", [(4,), (2, 2)], ids=str)
@pytest.mark.parametrize("operator", SETTINGS)
@pytest.mark.parametrize("served", OPERATORS)
def test_one_tensor_on_another_device(served, operator, leading, change):
    """RuntimeError, or the right answer where it stands for a missing bias, but never the content
    of uninitialized memory.
    """
    call = getattr(OPERATORS[served], operator)
    arguments = arguments_of(operator, leading=leading)
    settings = SETTINGS[operator]
    if operator.endswith("backward"):
        needs = ["".join(bits) for bits in itertools.product("01", repeat=7)][1::9]
    else:
        needs = [None]
    for place, flags in itertools.product(places(arguments), needs):
        here = dict(arguments)
        if operator == "backward":
            kept = reference.is_kept("relu", flags)
            here["saved"] = list(itertools.compress(here["saved"], kept))
            if place[1] is not None and place[1] >= len(here["saved"]):
                continue
        if flags is not None:
            settings = ["relu", flags]
        bad = changed(here, place, change)
        try:
            found = call(*bad.values(), *settings)
        except RuntimeError:
            continue
        assert place[0] == "biases" and change is nothing_on_meta
        without = changed(here, place, lambda bias: bias.new_empty(0))
        assert_same(named(found), named(call(*without.values(), *settings)), name_of(place))


@pytest.mark.parametrize("served", OPERATORS)
def test_all_tensors_on_meta(served):
    """A missing bias may be on the CPU: the package's own placeholder always is."""
    x, w = torch.empty(4, 3, device="meta"), torch.empty(2, 3, device="meta")
    for missing in (ops.NO_TENSOR, torch.empty(0, device="meta")):
        y = OPERATORS[served].relu_mlp(x, [w], [missing])
        assert y.is_meta and y.shape == (4, 2)


# -- What calls leave behind ------------------------------------------------------


class Mallinfo(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    ]


mallinfo = getattr(ctypes.CDLL(None), "mallinfo2", None)
if mallinfo is not None:
    mallinfo.restype = Mallinfo


def left_behind(call, times):
    """Bytes of the C++ heap, and blocks of Python's, that a call leaves behind, on average.

    The smaller of two measurements, because the first includes one-time allocations.
    """
    found = []
    for _ in range(2):
        gc.collect()
        heap, blocks = mallinfo().uordblks, sys.getallocatedblocks()
        for _ in range(times):
            call()
        gc.collect()
        found.append((mallinfo().uordblks - heap, sys.getallocatedblocks() - blocks))
    return tuple(min(left) / times for left in zip(*found, strict=True))


def programs():
    """Calls of every operator and of every computing function, by name."""
    x, target = torch.ones(4, 3), torch.ones(4, 2)
    weights, biases = support.make_network([3, 8, 8, 2], dtype=torch.float32)
    for operator, settings in SETTINGS.items():
        arguments = arguments_of(operator)
        call = getattr(R, operator)
        yield operator, lambda c=call, a=arguments, s=settings: c(*a.values(), *s)
        bad = changed(arguments, next(iter(places(arguments))), on_meta)

        def refused(call=call, bad=bad, settings=settings):
            with pytest.raises(RuntimeError):
                call(*bad.values(), *settings)

        yield f"{operator}, refused", refused
        short = changed(arguments, next(iter(places(arguments))), freed)

        def failed(call=call, short=short, settings=settings):
            with pytest.raises(RuntimeError):
                call(*short.values(), *settings)

        yield f"{operator}, failed", failed

    net, native = support.twins(3, [8, 8], 2)
    checkpointed = ReluMLP(3, [8, 8], 2, recompute=True)
    fused = relu_mlp.fuse(nn.Sequential(nn.Sequential(*support.twins(3, 8, 2)[1]), nn.Tanh()))
    leaf = torch.ones(4, 3, requires_grad=True)

    def step(net):
        net.zero_grad()
        net(x).square().sum().backward()

    def second(net):
        (grad,) = torch.autograd.grad(net(leaf).square().sum(), leaf, create_graph=True)
        grad.square().sum().backward()
        net.zero_grad()
        leaf.grad = None

    for name, module in {
        "native": native,
        "ReluMLP": net,
        "recompute": checkpointed,
        "fuse": fused,
    }.items():
        yield f"training step of {name}", lambda m=module: step(m)
        yield f"second derivative of {name}", lambda m=module: second(m)
        yield f"inference of {name}", torch.no_grad()(lambda m=module: m(x))
    linear = relu_mlp.linearize(x, weights, biases)
    yield "relu_mlp", lambda: relu_mlp.relu_mlp(x, weights, biases)
    yield "loss_and_grads", lambda: loss_and_grads(x, target, weights, biases)
    yield "jacobian", lambda: relu_mlp.jacobian(x, weights, biases)
    yield "linearize", lambda: relu_mlp.linearize(x, weights, biases)
    yield "vjp", lambda: linear.vjp(target)
    yield "build_info", relu_mlp.build_info


@pytest.mark.slow
@needs_library
@pytest.mark.skipif(mallinfo is None, reason="needs mallinfo2 of glibc 2.33")
def test_calls_leave_nothing_behind():
    """A string of LibTorch takes at least 32 bytes, a Python object at least one block."""
    gc.collect()
    gc.freeze()  # the garbage collector ignores existing objects
    try:
        found = {name: left_behind(call, 200) for name, call in programs()}
    finally:
        gc.unfreeze()
    assert not {name: left for name, left in found.items() if left[0] > 8 or left[1] >= 1}


# -- The memory of a call ---------------------------------------------------------


@pytest.mark.slow
@needs_library
def test_the_outputs_of_all_rows_never_exist_at_once():
    """Cross entropy with many classes: an eighth of eager's memory, and less than one matrix of
    the outputs."""
    code = """
        import torch, torch.nn.functional as F
        import relu_mlp
        rows, classes = 4096, 20000
        x, target = torch.randn(rows, 16), torch.randint(classes, (rows,))
        weights = [torch.randn(32, 16), torch.randn(classes, 32, requires_grad=True)]

        def ours(rows):
            relu_mlp.loss_and_grads(x[:rows], target[:rows], weights, loss="cross_entropy")

        def eager(rows):
            y = F.linear(F.relu(F.linear(x[:rows], weights[0])), weights[1])
            F.cross_entropy(y, target[:rows]).backward()

        def peak():
            lines = open("/proc/self/status").read().splitlines()
            return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))

        for step in (ours, eager):
            step(2)
            open("/proc/self/clear_refs", "w").write("5")
            before = peak()
            step(rows)
            print(peak() - before)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True
    )
    if "clear_refs" in done.stderr:
        pytest.skip("the system does not reset the peak of a process's memory")
    assert done.returncode == 0, done.stderr
    ours, eager = map(int, done.stdout.split())
    assert ours <= eager / 8, (ours, eager)
    assert ours * 1024 < 4096 * 20000 * 4


# -- Memory that cannot be allocated ----------------------------------------------

ALLOCATES = r"DefaultCPUAllocator: can't allocate memory: you tried to allocate \d+ bytes"
OVERFLOWS = "Storage size calculation overflowed"


def one(*shape, dtype=torch.float32):
    return torch.ones(1, dtype=dtype).expand(shape)


#: The shapes of x and of the weights, and words of the message.
TOO_LARGE = {
    "y": ((2**40, 1), [(7, 1)], ALLOCATES),
    "y at a rank of 3": ((2**20, 2**20, 1), [(7, 1)], ALLOCATES),
    "y of a sum over nothing": ((5, 0), [(2**40, 0)], ALLOCATES),
    "y beyond 64 bits": ((2**62, 1), [(7, 1)], OVERFLOWS),
    "a hidden layer": ((6, 2), [(2**40, 2), (1, 2**40)], ALLOCATES),
    "a hidden layer beyond 64 bits": ((2**40, 2), [(2**40, 2), (1, 2**40)], ALLOCATES),
    "a weight": ((0, 2**31), [(2**31, 2**31)], OVERFLOWS),
}


@needs_library
@pytest.mark.parametrize("dtype", support.DTYPES, ids=str)
@pytest.mark.parametrize("case", TOO_LARGE)
def test_message_and_class_of_a_failed_allocation(case, dtype):
    """PyTorch's own message, without a file or a line of this package: programs search for it."""
    shape, shapes, words = TOO_LARGE[case]
    x, weights = one(*shape, dtype=dtype), [one(*s, dtype=dtype) for s in shapes]
    needs = "1" + "00" * len(weights)
    grad = one(*shape[:-1], 1, dtype=dtype)
    calls = [
        lambda: relu_mlp.relu_mlp(x, weights),
        lambda: R.recompute_backward(grad, x, weights, [], "none", needs),
    ]
    for call in calls[: 2 if shapes[-1][0] == 1 else 1]:
        with pytest.raises(RuntimeError, match=words) as error:
            call()
        assert type(error.value) is RuntimeError
        assert "csrc" not in str(error.value) and "API call" not in str(error.value)


def test_message_is_that_of_the_native_layers(backend):
    x, weight = one(2**40, 1), one(7, 1)
    said = []
    for call in (relu_mlp.relu_mlp, support.native_mlp):
        with pytest.raises(RuntimeError) as error:
            call(x, [weight])
        said.append(str(error.value).splitlines()[0])
    assert said[0] == said[1]


def test_error_class_when_a_gpu_runs_out_of_memory():
    """torch.OutOfMemoryError, which programs catch. Other errors stay unchanged."""
    for said, kind in {
        "CUDA out of memory. Tried to allocate 2.00 GiB.": torch.OutOfMemoryError,
        "x must be on cuda:0 like y, got CUDA out of memory": RuntimeError,
    }.items():

        def fail(*arguments, said=said):
            raise RuntimeError(said)

        with pytest.raises(RuntimeError) as error:
            ops.raising_out_of_memory(fail)(1, 2)
        assert type(error.value) is kind and str(error.value) == said


@pytest.mark.slow
@needs_library
def test_workspace_that_cannot_be_allocated():
    """The results fit, but the kernels' workspace does not."""
    code = """
        import resource, torch
        R = torch.ops.relu_mlp
        import relu_mlp
        torch.set_num_threads(2)
        w = [torch.ones(30000, 1), torch.ones(1, 1).expand(1, 30000)]
        x = torch.ones(500, 1)
        g = torch.ones(500, 1)
        R.recompute_backward(g[:1], x[:1], w, [], "none", "10000")  # loads all
        R.relu_mlp(x[:200], [torch.ones(30, 1), torch.ones(1, 30)], [])
        torch.ones(2**22).add_(1)  # starts the threads
        used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + 2**20, -1))
        for call in (
            lambda: R.relu_mlp(x, w, []),
            lambda: R.recompute_backward(g, x, w, [], "none", "10000"),
            lambda: R.loss_and_grads(x, g, w, [], "sse", "none"),
        ):
            try:
                call()
            except RuntimeError as error:
                print(error)
            torch.set_num_threads(1)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 3
    assert all("can't allocate memory: you tried to allocate" in line for line in lines), lines
