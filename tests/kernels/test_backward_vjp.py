"""`relu_mlp::backward_vjp`, the vector-Jacobian product of the backward pass, on every instruction
set that this machine has: values, memory, accuracy, bits, numbers that are not finite, errors.
"""

import functools
import itertools
import math
import random

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import relu_mlp
import support
from kernels import test_cpu_kernels as kernels
from relu_mlp import reference, second_order
from support import gamma
from support.covering import covering

#: Nothing here depends on whether the native node records a graph.
backend = support.backend_fixture(support.BACKENDS)

R = torch.ops.relu_mlp
__test__ = kernels.__test__  # without the library there is nothing to test here

instruction_set, on_baseline, threads = (
    kernels.instruction_set,
    kernels.on_baseline,
    kernels.threads,
)
every_dtype = kernels.every_dtype
covering_pairs = pytest.mark.covering(strength=2)


# -- Networks whose sums are exact ------------------------------------------------------


def integers(generator, *shape, density=1.0):
    signs = torch.randint(-1, 2, shape, generator=generator, dtype=torch.float64)
    return signs * (torch.rand(shape, generator=generator) < density)


def exact_call(seed, rows, sizes, activation, needs, given):
    """The arguments of backward_vjp before `wanted`, in float64.

    They are small integers, y too, although no y of a smooth activation is one. So every number
    that is computed is an integer that every dtype holds, except for sums over rows.
    """
    generator = torch.Generator().manual_seed(seed)
    layers = len(sizes) - 1
    make = functools.partial(integers, generator)
    densities = [4 / max(1, *pair) for pair in itertools.pairwise(sizes)]
    shapes = [(out, below) for below, out in itertools.pairwise(sizes)]
    weights = [make(*shape, density=density) for shape, density in zip(shapes, densities)]
    inputs = [make(rows, sizes[0]), *[make(rows, width).relu() for width in sizes[1:-1]]]
    y = make(rows, sizes[-1])
    y = y.relu() if activation == "relu" else y + (y > 0)  # phi' is -3, -2, 0 or 1
    grad_output = make(rows, sizes[-1], density=min(1, 500 / max(1, rows)))
    results = [
        make(rows, sizes[0]),
        *[make(*shape, density=density) for shape, density in zip(shapes, densities)],
        *[make(width) for width in sizes[1:]],
    ]
    saved = reference.pack(inputs[0], y, weights, inputs[1:], activation, needs)
    results = list(itertools.compress(results, map(int, needs)))
    cotangents = list(itertools.compress(results, map(int, given)))
    check_exact(grad_output, saved, activation, needs, cotangents, given, layers)
    return grad_output, saved, activation, needs, cotangents, given


def check_exact(grad_output, saved, activation, needs, cotangents, given, layers):
    """bfloat16 holds the integers up to 256."""
    if not cotangents:
        return
    y, weights, inputs = reference.unpack(saved, activation, needs)
    remaining = iter(cotangents)
    of_results = [next(remaining) if flag == "1" else None for flag in given]
    tangents = second_order.by_need(of_results, needs)
    operands = inputs, weights, *tangents, reference.lowest_layer(needs), grad_output.shape[0]
    computed = [
        *second_order.propagate_deltas(grad_output, y, weights, inputs, activation, needs),
        *reference.propagate_tangents(*operands),
    ]
    assert all(t is None or t.numel() == 0 or t.abs().max() < 200 for t in computed)


def changed(call, change):
    """The call with `change` applied to all tensors."""
    grad_output, saved, activation, needs, cotangents, given = call
    saved, cotangents = (list(map(change, tensors)) for tensors in (saved, cotangents))
    return change(grad_output), saved, activation, needs, cotangents, given


def check_exactly(call, wanted, dtype, place=lambda t: t, expected=None):
    """Compares the operator with the formulas in float64, whose results may be given."""
    expected = reference.backward_vjp(*call, wanted) if expected is None else expected
    found = R.backward_vjp(*changed(call, lambda t: place(t.to(dtype))), wanted)
    assert all(t.is_contiguous() for t in found)
    support.assert_same(
        dict(enumerate(found)), {n: t.to(dtype) for n, t in enumerate(expected)}, f"{call[2:]}"
    )


@functools.cache
def small_calls(layers):
    """A covering array of small calls: (call, wanted, results).

    The factors are the sizes, the activation, for each result of the backward pass whether it was
    needed and has a cotangent, and for each gradient whether it is wanted.
    """
    r = random.Random(layers)
    rows = [
        (
            r.choice([0, 1, 5, 33]),
            *r.choices([0, 1, 3, 8, 17], [1, 4, 4, 4, 4], k=1 + layers),
            r.choice([*reference.ACTIVATIONS]),
            *r.choices(["not needed", "needed", "given"], k=1 + 2 * layers),
            *r.choices("01", k=2 + 2 * layers),  # grad_output, x, y, the weights, a_1, ...
        )
        for _ in range(250)
    ]
    calls = []
    for n in covering(rows, 2):
        sizes, (activation, *rest) = rows[n][1 : 2 + layers], rows[n][2 + layers :]
        states, flags = rest[: 1 + 2 * layers], rest[1 + 2 * layers :]
        needs = "".join("01"[state != "not needed"] for state in states)
        given = "".join("01"[state == "given"] for state in states if state != "not needed")
        kept = reference.is_kept(activation, needs)
        wanted = flags[0] + "".join(itertools.compress(flags[1:], kept))
        call = exact_call(n, rows[n][0], sizes, activation, needs, given)
        calls.append((call, wanted, reference.backward_vjp(*call, wanted)))
    return calls


def whole_call(seed, rows, sizes, activation):
    """A call in which everything is given and wanted."""
    flags = "1" * (2 * len(sizes) - 1)
    call = exact_call(seed, rows, sizes, activation, flags, flags)
    return call, "1" * (1 + len(call[1]))


@functools.cache
def whole_case(seed):
    """The same for a random shape, and the results."""
    activation = [*reference.ACTIVATIONS][seed % len(reference.ACTIVATIONS)]
    call, wanted = whole_call(seed, *kernels.random_shape(seed), activation)
    return call, wanted, reference.backward_vjp(*call, wanted)


@covering_pairs
@every_dtype
@pytest.mark.parametrize("layers", [1, 2, 3])
def test_exact_on_small_integers(instruction_set, layers, dtype):
    calls = small_calls(layers)
    assert len(calls) > 25
    for call, wanted, expected in calls:
        check_exactly(call, wanted, dtype, expected=expected)


@every_dtype
def test_exact_for_every_plan(instruction_set, dtype):
    """On both sides of every edge of a vector, a tile, a panel, a block and a chunk."""
    for seed in range(60):
        call, wanted, expected = whole_case(seed)
        check_exactly(call, wanted, dtype, expected=expected)


@every_dtype
def test_exact_where_the_library_multiplies(on_baseline, dtype):
    rows, sizes = 2500, (365, 362, 2)
    served = kernels.plan_here(rows, sizes, dtype)
    assert served["layers"] == "library"
    assert (served["block"] < rows) == (dtype not in kernels.DTYPES_16BIT)
    check_exactly(*whole_call(0, rows, sizes, "sigmoid"), dtype)


# -- Memory -----------------------------------------------------------------------------


@covering_pairs
@every_dtype
@pytest.mark.parametrize("where", kernels.PLACES)
def test_reads_nothing_but_the_operands(instruction_set, dtype, where):
    """For all strides. The memory around the operands does not change."""
    around = []

    def placed(t):
        result = kernels.PLACES[where](t)
        around.append((result._base, result._base.clone()))
        return result

    for call, wanted, expected in small_calls(2)[::2]:
        check_exactly(call, wanted, dtype, placed, expected)
    for now, before in around:
        support.assert_same(now, before)


@every_dtype
def test_expanded_operands(instruction_set, dtype):
    """Strides of 0, as in the gradients that sum() sends back."""
    for rows, sizes in [(7, [5, 33, 17]), (500, [33, 17, 65])]:
        call, wanted = whole_call(0, rows, sizes, "tanh")
        call = changed(call, lambda t: t[..., :1].expand(t.shape).to(dtype))
        found = R.backward_vjp(*changed(call, lambda t: t.contiguous()), wanted)
        expanded = R.backward_vjp(*call, wanted)
        support.assert_same(dict(enumerate(expanded)), dict(enumerate(found)))


def test_leading_sizes():
    """x, y, grad_output and the cotangent of x may have more dimensions, or only one."""
    for leading in [(), (2, 3), (0, 3), (1,)]:
        rows = math.prod(leading)
        call, wanted = whole_call(0, rows, [3, 8, 2], "tanh")
        shaped = changed(
            call,
            lambda t, rows=rows, leading=leading: (
                t.reshape(*leading, t.shape[1])
                if t.dim() == 2 and t.shape[0] == rows and t.shape[1] in (3, 2)
                else t
            ),
        )
        if rows in (2, 3, 8):
            continue  # a weight could pass for x
        for implementation in (R, reference):
            found = implementation.backward_vjp(*shaped, wanted)
            like = [shaped[0], *shaped[1]]
            assert [t.shape for t in found] == [t.shape for t in like]
            flat = R.backward_vjp(*call, wanted)
            for ours, theirs in zip(found, flat, strict=True):
                support.assert_same(ours.reshape(theirs.shape), theirs)


# -- Accuracy and bits ------------------------------------------------------------------


def random_call(rows, sizes, activation, dtype):
    weights, biases = support.make_network(sizes, "all", dtype, False)
    x = torch.randn(rows, sizes[0], dtype=torch.float64).to(dtype)
    y, hidden = reference.forward(x, weights, biases, activation, True)
    flags = "1" * (2 * len(sizes) - 1)
    saved = reference.pack(x, y, weights, hidden, activation, flags)
    results = [x, *weights, *biases]
    cotangents = [torch.randn(t.shape, dtype=torch.float64).to(dtype) for t in results]
    return torch.randn_like(y), saved, activation, flags, cotangents, flags


def bounds_of(call, wanted, dtype):
    """How far rounding may take each result from the value in float64.

    A bound for every product and sum is the same computation with absolute values. Without masks
    that is the call of a network without an output activation, whose gradients at grad_output and
    y are multiplied by bounds of phi' and of its derivative.
    """
    grad_output, saved, activation, needs, cotangents, given = changed(
        call, lambda t: t.double().abs()
    )
    y, weights, inputs = reference.unpack(saved, activation, needs)
    steep = torch.ones_like(grad_output) if y is None else (1 + y).square()
    without_y = reference.pack(inputs[0], None, weights, inputs[1:], "none", needs)
    of_grad_output, of_x, *rest = reference.backward_vjp(
        grad_output * steep, without_y, "none", needs, cotangents, given, "1" * (1 + len(without_y))
    )
    of_y = [] if y is None else [2 * grad_output * of_grad_output * (1 + y)]
    magnitudes = [of_grad_output * steep, of_x, *of_y, *rest]
    layers, longest = len(weights), max(max(w.shape) for w in weights)
    # Deltas and tangents go through all layers, and then into a sum over the rows.
    sums = gamma(2 * layers + 2, max(longest, grad_output.shape[0]), torch.float32)
    if dtype == torch.float64:
        sums = gamma(2 * layers + 2, max(longest, grad_output.shape[0]))
    info = torch.finfo(dtype)
    # In a 16-bit format, what is stored is rounded too: a delta or a tangent of each layer, the two
    # products that make a tangent, and the result. Numbers near 0 are rounded to a fixed step.
    stored = 0 if dtype in (torch.float32, torch.float64) else (5 * layers + 3) * info.eps
    steps = (5 * layers + 3) * longest**2 * info.tiny * info.eps
    return [(sums + stored) * magnitude + steps for magnitude in magnitudes]


@covering_pairs
@every_dtype
@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
def test_within_the_bounds_of_rounding(instruction_set, activation, dtype):
    for rows, sizes in [(5, [7, 5, 3]), (40, [33, 17, 9, 4]), (300, [16, 64, 8]), (1, [40, 30])]:
        call = random_call(rows, sizes, activation, dtype)
        wanted = "1" * (1 + len(call[1]))
        expected = reference.backward_vjp(*changed(call, lambda t: t.double()), wanted)
        found = R.backward_vjp(*call, wanted)
        for n, each in enumerate(zip(found, expected, bounds_of(call, wanted, dtype), strict=True)):
            support.assert_within(each[0].double(), *each[1:], f"{rows, sizes}, result {n}")


@covering_pairs
@every_dtype
@pytest.mark.parametrize("rows, sizes", [(2100, [9, 17, 3]), (200, [129, 300, 65]), (3, [9, 5])])
def test_the_same_bits_for_any_number_of_threads(instruction_set, threads, rows, sizes, dtype):
    assert kernels.plan_here(rows, sizes, dtype)["layers"] != "library"
    call = random_call(rows, sizes, "tanh", dtype)
    wanted = "1" * (1 + len(call[1]))
    threads(1)
    first = kernels.bits(dict(enumerate(R.backward_vjp(*call, wanted))))
    for count in (1, 2, 3):
        threads(count)
        found = kernels.bits(dict(enumerate(R.backward_vjp(*call, wanted))))
        support.assert_same(found, first, f"{count} threads")


@every_dtype
def test_a_result_does_not_depend_on_what_else_is_wanted(instruction_set, dtype):
    """The same bits, whatever is left out of the computation."""
    call = random_call(60, [12, 20, 9, 5], "sigmoid", dtype)
    count = 1 + len(call[1])
    everything = R.backward_vjp(*call, "1" * count)
    for n in range(count):
        (alone,) = R.backward_vjp(*call, "0" * n + "1" + "0" * (count - n - 1))
        support.assert_same(alone, everything[n], f"result {n}")


# -- Numbers that are not finite --------------------------------------------------------


@covering_pairs
@every_dtype
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite(instruction_set, value, dtype):
    """One in each operand in turn. Masks select: NaN passes them, and an infinity does not become
    NaN where a unit is off."""
    for activation, sizes in [("none", [3, 8, 5, 2]), ("sigmoid", [3, 8, 2]), ("relu", [3, 4])]:
        call, wanted = whole_call(1, 6, sizes, activation)
        for n in range(1 + len(call[1]) + len(call[4])):
            seen = itertools.count()

            def with_value(t, n=n, seen=seen):
                t = t.clone()
                if next(seen) == n:
                    t.view(-1)[t.numel() // 2] = value
                return t

            check_exactly(changed(call, with_value), wanted, dtype)


# -- Arguments --------------------------------------------------------------------------


def good_call():
    """grad_output, (x, y, W_1, a_1), the cotangents of dW_1, dW_2 and db_2, and what is wanted."""
    call = exact_call(0, 5, [3, 6, 2], "sigmoid", "01111", "1101")
    return {
        **dict(zip(("grad_output", "saved", "activation", "needs", "cotangents", "given"), call)),
        "wanted": "11111",
    }


BAD = {
    "grad_output of rank 0": ("grad_output", lambda t: t[0, 0], "grad_output"),
    "grad_output of integers": ("grad_output", lambda t: t.long(), "must be|no kernel"),
    "grad_output of other rows": ("grad_output", lambda t: t[:4], "must be float64 of shape"),
    "saved too short": ("saved", lambda saved: saved[:-1], "wanted must be 4 characters"),
    "x of other rows": ("saved", lambda saved: [saved[0][:4], *saved[1:]], "the input of layer 0"),
    "an activation": ("activation", lambda name: "gelu", "output_activation must be"),
    "needs of other characters": ("needs", lambda needs: "01112", "needs must be 1 \\+ 2 L"),
    "needs for fewer results": ("needs", lambda needs: "01110", "given must be 3 characters"),
    "given too short": ("given", lambda given: given[1:], "given must be 4 characters"),
    "given of other characters": ("given", lambda given: "11a1", "given must be 4 characters"),
    "given more": ("given", lambda given: "1111", "given '1111' asks for 4 tensors in cotangents"),
    "wanted too long": ("wanted", lambda wanted: "111111", "wanted must be 5 characters"),
    "wanted of other characters": ("wanted", lambda wanted: "1111\0", "wanted must be 5 char"),
    "a cotangent too few": ("cotangents", lambda c: c[1:], "in cotangents, got 2"),
    "a cotangent of another dtype": (
        "cotangents",
        lambda c: [c[0].float(), *c[1:]],
        r"cotangents\[0\] must be float64 of shape \(6, 3\), got float32",
    ),
    "a cotangent of another shape": (
        "cotangents",
        lambda c: [*c[:2], c[2][:1]],
        r"cotangents\[2\] must be float64 of shape \(2,\), got float64 of shape \(1,\)",
    ),
    "a cotangent in another order": (
        "cotangents",
        lambda c: [c[1], c[0], c[2]],
        r"cotangents\[0\] must be float64 of shape \(6, 3\), got float64 of shape \(2, 6\)",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_errors_name_the_argument(backend, what):
    argument, change, words = BAD[what]
    operator = support.implementation_of(backend).backward_vjp
    good = good_call()
    operator(*good.values())
    with pytest.raises(RuntimeError, match=words):
        operator(*{**good, argument: change(good[argument])}.values())


def test_a_cotangent_without_memory(backend):
    good = good_call()
    good["cotangents"][1].untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match=r"cotangents\[1\] must have a storage"):
        support.implementation_of(backend).backward_vjp(*good.values())


def test_nothing_given_or_needed(backend):
    """Every gradient is 0."""
    operator = support.implementation_of(backend).backward_vjp
    grad_output, saved, activation, needs, _, _ = whole_call(0, 5, [3, 6, 2], "tanh")[0]
    for grad in operator(grad_output, saved, activation, needs, [], "0" * 5, "1" * 6):
        assert not grad.any()
    (of_grad_output,) = operator(grad_output, [], activation, "00000", [], "", "1")
    support.assert_same(of_grad_output, torch.zeros_like(grad_output))
    assert operator(grad_output, [], activation, "00000", [], "", "0") == []


# -- Who calls it -----------------------------------------------------------------------


def test_what_reaches_a_tensor():
    """`reach_of` says beforehand what the formulas return, for every pattern."""
    kinds = second_order.Reach
    for activation, layers in itertools.product(reference.ACTIVATIONS, [1, 2]):
        for pattern in list(support.patterns(1 + 2 * layers))[1:]:
            needs = "".join("01"[need] for need in pattern)
            for flags in support.patterns(needs.count("1")):
                given = "".join("01"[flag] for flag in flags)
                call = exact_call(0, 3, [2] * (1 + layers), activation, needs, given)
                remaining = iter(call[4])
                cotangents = [next(remaining) if flag else None for flag in flags]
                found = [
                    kinds.NOTHING
                    if grad is None
                    else kinds.ZEROS
                    if second_order.is_symbolic_zero(grad)
                    else kinds.NUMBERS
                    for grad in second_order.backward_vjp(*call[:4], cotangents)
                ]
                assert found == second_order.reach_of(activation, needs, given), (needs, given)


def of_penalty(net, x, create_graph=False):
    """The gradients of a gradient penalty."""
    (by_x,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
    wanted = [x, *net.parameters()]
    return torch.autograd.grad(
        by_x.square().sum(), wanted, create_graph=create_graph, materialize_grads=True
    )


@pytest.mark.parametrize("activation", support.ACTIVATIONS, ids=str)
def test_a_second_derivative_calls_it(backend, activation):
    net = relu_mlp.ReluMLP(3, [6, 5], 2, output_activation=activation).double()
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    with support.count_calls() as counts:
        found = of_penalty(net, x)
    assert counts.get("backward_vjp", 0) == (backend == "extension")
    assert (counts["native"] == 0) == (backend == "extension")
    with support.count_calls() as counts:
        recorded = of_penalty(net, x, create_graph=True)
    assert "backward_vjp" not in counts and counts["native"] > 0
    torch.testing.assert_close(found, recorded)


def test_a_penalty_on_x_leaves_out_what_is_not_needed():
    """Only the weights get numbers, and nothing is computed for grad_output."""

    class Mode(TorchDispatchMode):
        understands_relu_mlp = True

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is R.backward_vjp.default:
                asked.append((args[3], *args[5:]))
            return function(*args, **(kwargs or {}))

    net, asked = relu_mlp.ReluMLP(3, [6, 5], 2), []
    x = torch.randn(4, 3, requires_grad=True)
    with Mode():
        of_penalty(net, x)
    assert asked == [("1000000", "1", "0" + "111" + "00")]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("activation", [None, "relu"])
def test_second_derivatives_of_small_integers(instruction_set, activation, dtype):
    """The bits of the native path. Here gradients reach the hidden activations too."""
    for rows, sizes in [(6, [5, 33, 17, 3]), (40, [16, 9, 4]), (300, [3, 20, 2]), (0, [3, 4, 2])]:
        weights, biases = support.integer_network(sizes, dtype=dtype, largest=1)
        x = support.integers(rows, sizes[0], dtype=dtype, largest=1).requires_grad_()
        named = support.leaves(x, weights, biases)
        directions = [support.integers(*t.shape, dtype=dtype, largest=1) for t in named.values()]
        ends = support.integers(rows, sizes[-1], dtype=dtype, largest=1).requires_grad_()
        found = []
        for mlp in (relu_mlp.relu_mlp, support.native_mlp):
            y = mlp(x, weights, biases, output_activation=activation)
            grads = torch.autograd.grad(y, named.values(), ends, create_graph=True)
            of_grads = torch.autograd.grad(
                grads, [*named.values(), ends], directions, materialize_grads=True
            )
            found.append(dict(zip([*named, "grad_output"], of_grads, strict=True)))
        support.assert_same(*found)


def test_batched_gradients(backend):
    """`is_grads_batched` calls the reference for all gradients at once."""
    net = relu_mlp.ReluMLP(3, 6, 2, output_activation="tanh").double()
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    (by_x,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
    parameters, many = [*net.parameters()], torch.randn(5, *x.shape, dtype=torch.float64)

    def gradients(grad, **settings):
        return torch.autograd.grad(
            by_x, parameters, grad, retain_graph=True, materialize_grads=True, **settings
        )

    batched = gradients(many, is_grads_batched=True)
    expected = [torch.stack(grads) for grads in zip(*map(gradients, many))]
    torch.testing.assert_close([*batched], expected)
