"""Precision: autocast, gradient scaling, and PyTorch's settings for products and determinism.

Under autocast the native layers are the standard. The dtypes and errors must be the same, and with
small integers, which bfloat16 and float16 hold exactly, the bits too. The operators serve these
calls with tensors that were cast before.
"""

import contextlib
import itertools

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses import FakeTensorMode

import relu_mlp
import support
from relu_mlp import autocast, functional, ops
from support import (
    assert_same,
    gradients,
    integer_network,
    integers,
    leaves,
    native_mlp,
    outcome,
)

every_half = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)

#: So few that their sums stay below 256, up to which bfloat16 holds every integer.
SIZES = (3, 5, 4, 2)


def network(bias="all", sizes=SIZES, rows=7, dtype=torch.float32):
    """x, weights and biases: leaves with the entries -1, 0 and 1."""
    weights, biases = integer_network(sizes, bias, largest=1, dtype=dtype)
    x = integers(rows, sizes[0], largest=1, dtype=dtype).requires_grad_()
    if biases is not None:
        biases = [None if bias is None else nn.Parameter(bias) for bias in biases]
    return x, [nn.Parameter(weight) for weight in weights], biases


def children(weights, biases, output_activation=None):
    """The layers with these parameters."""
    layers = []
    for weight, bias in zip(weights, biases or [None] * len(weights)):
        linear = nn.Linear(*reversed(weight.shape), device="meta")
        linear.weight, linear.bias = weight, bias
        layers += [linear, nn.ReLU()]
    if output_activation == "relu":
        return layers
    return layers[:-1] + support.module_of(output_activation)


def module(x, weights, biases, *, output_activation=None, recompute=False):
    sequential = nn.Sequential(*children(weights, biases, output_activation))
    return relu_mlp.ReluMLP.from_sequential(sequential, recompute)(x)


def fused_sequential(x, weights, biases, *, output_activation=None):
    model = nn.Sequential(nn.Identity(), *children(weights, biases, output_activation))
    assert type(relu_mlp.fuse(model)) is relu_mlp.FusedSequential
    return model(x)


def operator(x, weights, biases, *, output_activation=None):
    present = [ops.NO_TENSOR if bias is None else bias for bias in biases or []]
    name = functional.ACTIVATION_NAMES[output_activation]
    return torch.ops.relu_mlp.relu_mlp(x, weights, present, name)


FORMS = {
    "function": relu_mlp.relu_mlp,
    "module": module,
    "fused_sequential": fused_sequential,
    "operator": operator,
}
every_form = pytest.mark.parametrize("form", FORMS)


def small(y):
    """Integers of the shape and dtype of y: a grad_output."""
    return (torch.arange(y.numel()) % 3 - 1).reshape(y.shape).to(y.dtype)


def both_passes(mlp, dtype, tensors, backward_inside=False, **settings):
    """y and the gradients of a forward pass under autocast."""
    with torch.autocast("cpu", dtype):
        y = mlp(*tensors, **settings)
        if backward_inside:
            return {"y": y.detach(), **gradients(y, leaves(*tensors), small(y))}
    return {"y": y.detach(), **gradients(y, leaves(*tensors), small(y))}


def assert_fused(calls, passes=1):
    assert (calls["forward"], calls["backward"], calls["native"]) == (passes, passes, 0)


# -- One region -------------------------------------------------------------------


@every_half
@every_form
@pytest.mark.parametrize("backward_inside", [False, True])
def test_is_the_native_path_to_the_bit(backend, form, dtype, backward_inside):
    for bias, activation in itertools.product(["all", "some", "none"], [None, "relu"]):
        tensors, settings = network(bias), {"output_activation": activation}
        with support.count_calls() as calls:
            found = both_passes(FORMS[form], dtype, tensors, backward_inside, **settings)
        assert_fused(calls)
        assert found["y"].dtype == dtype
        assert {found[name].dtype for name in leaves(*tensors)} == {torch.float32}
        assert_same(found, both_passes(native_mlp, dtype, tensors, backward_inside, **settings))


@every_half
@pytest.mark.parametrize("form", ["function", "module"])
@pytest.mark.parametrize("backward_inside", [False, True])
def test_recompute(backend, form, dtype, backward_inside):
    tensors = network()
    with support.count_calls() as calls:
        found = both_passes(FORMS[form], dtype, tensors, backward_inside, recompute=True)
    assert_fused(calls)
    assert_same(found, both_passes(native_mlp, dtype, tensors, backward_inside))


@every_half
@pytest.mark.parametrize("activation", support.ACTIVATIONS)
def test_within_the_bounds_of_rounding(backend, activation, dtype):
    """With real numbers. The native path meets the same bounds."""
    weights, biases = support.make_network((13, 17, 9, 3), dtype=torch.float32)
    weights, biases = [nn.Parameter(w) for w in weights], [nn.Parameter(b) for b in biases]
    x = torch.randn(19, 13, requires_grad=True)
    cast = [
        x.detach().to(dtype),
        [weight.detach().to(dtype) for weight in weights],
        [bias.detach().to(dtype) for bias in biases],
    ]
    implementation = functional.implementation_for(x)
    for mlp in (*FORMS.values(), native_mlp):
        with support.count_calls() as calls:
            found = both_passes(mlp, dtype, (x, weights, biases), output_activation=activation)
        # Where a sum is close to 0, the mask comes from the activation that the implementation
        # found.
        if mlp is native_mlp:
            hidden, a = [], cast[0]
            for weight, bias in list(zip(*cast[1:]))[:-1]:
                a = torch.relu(torch.nn.functional.linear(a, weight, bias))
                hidden.append(a)
        else:
            assert_fused(calls)
            _, hidden = support.hidden_of(
                ops.extension if mlp is operator else implementation, *cast, activation
            )
        exact = support.Exact(*cast, activation, hidden, found["y"])
        exact.y.check(found["y"], "y")
        for name, bounded in exact.backward(small(found["y"])).items():
            bounded.check(found[name], f"{name} of {mlp.__name__}")


def test_a_missing_bias_stays_missing():
    x, weights, _ = network()
    with torch.autocast("cpu"):
        _, _, biases = autocast.cast(x, weights, [ops.NO_TENSOR] * 3)
    assert all(bias is ops.NO_TENSOR for bias in biases)


@every_half
@every_form
def test_without_a_graph(backend, form, dtype):
    x, weights, biases = network()
    expected = both_passes(native_mlp, dtype, (x, weights, biases))["y"]
    for context in (torch.no_grad(), torch.inference_mode()):
        with context, torch.autocast("cpu", dtype), support.count_calls() as calls:
            y = FORMS[form](x, weights, biases)
        assert calls["forward"] and not calls["native"]
        assert_same(y.clone(), expected)


@pytest.mark.parametrize("frozen", ["x", "weights", "biases", "first layer"])
def test_partly_frozen(backend, frozen):
    """Only tensors that need a gradient get one. All of them are cast."""
    x, weights, biases = network()
    which = {"x": [x], "weights": weights, "biases": biases, "first layer": [weights[0], biases[0]]}
    for tensor in which[frozen]:
        tensor.requires_grad_(False)
    found, expected = (
        both_passes(mlp, torch.bfloat16, (x, weights, biases))
        for mlp in (relu_mlp.relu_mlp, native_mlp)
    )
    assert_same(found, expected)


@pytest.mark.parametrize("shape", [(3,), (2, 7, 3), (0, 3)], ids=str)
def test_inputs_of_any_rank(backend, shape):
    _, weights, biases = network()
    x = integers(*shape, dtype=torch.float32, largest=1).requires_grad_()
    for form in FORMS.values():
        with support.count_calls() as calls:
            found = both_passes(form, torch.bfloat16, (x, weights, biases))
        assert_fused(calls)
        assert_same(found, both_passes(native_mlp, torch.bfloat16, (x, weights, biases)))


@pytest.mark.parametrize("activation", support.ACTIVATIONS)
def test_saves_what_the_native_path_saves(backend, activation):
    x, weights, biases = network()
    saved = []
    for mlp in (relu_mlp.relu_mlp, native_mlp):
        with torch.autocast("cpu"), support.saved_tensors() as kept:
            mlp(x, weights, biases, output_activation=activation)
        assert {tensor.dtype for tensor in kept} == {torch.bfloat16}
        saved.append({tensor.untyped_storage().data_ptr() for tensor in kept})
        del kept
    assert len(saved[0]) == len(saved[1])


def test_a_weight_may_change_after_the_forward_pass(backend):
    """A float32 weight is saved as its cast copy, and a bfloat16 weight itself."""
    for dtype, raises in [(torch.float32, False), (torch.bfloat16, True)]:
        results = []
        for mlp in (relu_mlp.relu_mlp, native_mlp):
            torch.manual_seed(0)
            x, weights, biases = network(dtype=dtype)
            with torch.autocast("cpu"):
                y = mlp(x, weights, biases)
            with torch.no_grad():
                weights[1].add_(1)
            named = leaves(x, weights, biases)
            results.append(outcome(gradients, y, named, match="modified by an inplace operation"))
        assert (results[1] is RuntimeError) is raises
        assert_same(*results)


def test_one_network_twice_in_a_region(backend):
    """Natively the second call reuses the cached casts of the first. The sums are the same."""
    x, weights, biases = network(rows=3)
    results = []
    for mlp in (*FORMS.values(), native_mlp):
        with torch.autocast("cpu"), support.count_calls() as calls:
            y = mlp(x, weights, biases) + mlp(-x, weights, biases)
            with torch.no_grad():
                again = mlp(x, weights, biases)
            y = y + again
        assert bool(calls["native"]) is (mlp is native_mlp)
        results.append({"y": y.detach(), **gradients(y, leaves(x, weights, biases))})
    for result in results[:-1]:
        assert_same(result, results[-1])


@pytest.mark.parametrize("backward_inside", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
def test_second_derivative(backend, backward_inside, recompute):
    """A gradient penalty, computed in float32, of sums that stay integers in bfloat16."""
    tensors = network(sizes=(2, 3, 2, 1), rows=2)
    results = []
    for mlp in (relu_mlp.relu_mlp, native_mlp):
        settings = {} if mlp is native_mlp else {"recompute": recompute}
        with contextlib.ExitStack() as region, support.count_calls() as calls:
            region.enter_context(torch.autocast("cpu"))
            y = mlp(*tensors, **settings)
            if not backward_inside:
                region.close()
            (grad_x,) = torch.autograd.grad(y.sum(), tensors[0], create_graph=True)
            assert grad_x.dtype == torch.float32
            named = leaves(tensors[0], tensors[1])
            second = torch.autograd.grad(
                grad_x.square().sum(), list(named.values()), materialize_grads=True
            )
        if mlp is not native_mlp:
            assert calls["forward"] == 1 + recompute
        results.append({"y": y.detach(), "grad_x": grad_x.detach(), **dict(zip(named, second))})
    assert results[0]["grad_x"].any() and results[0]["weights[0]"].any()
    assert_same(*results)


# -- Several regions, and other devices --------------------------------------------


NESTED = {
    "disabled inside": [(torch.bfloat16, True), (None, False)],
    "enabled inside disabled": [(None, False), (torch.float16, True)],
    "bfloat16 inside float16": [(torch.float16, True), (torch.bfloat16, True)],
    "float16 inside bfloat16": [(torch.bfloat16, True), (torch.float16, True)],
    "three": [
        (torch.float16, True),
        (None, False),
        (torch.bfloat16, True),
    ],
}


@every_form
@pytest.mark.parametrize("nest", NESTED)
def test_nested_regions(backend, form, nest):
    """Calls before, inside and after every region.

    The native calls run without the cache of casts. It has one place for each weight, so in a
    region of another dtype PyTorch finds the wrong cast and raises.
    """
    tensors = network()
    results = []
    for mlp in (FORMS[form], native_mlp):
        outputs = []

        def visit(regions, mlp=mlp, outputs=outputs):
            outputs.append(mlp(*tensors))
            if regions:
                dtype, enabled = regions[0]
                with torch.autocast("cpu", dtype, enabled, cache_enabled=False):
                    visit(regions[1:])
                outputs.append(mlp(*tensors))

        with support.count_calls() as calls:
            visit(NESTED[nest])
            grads = [gradients(y, leaves(*tensors), small(y)) for y in outputs]
        if mlp is not native_mlp:
            assert_fused(calls, 1 + 2 * len(NESTED[nest]))
        results.append({str(n): {"y": y.detach(), **grads[n]} for n, y in enumerate(outputs)})
    inner = NESTED[nest][-1][0] or torch.float32
    assert results[0][str(len(NESTED[nest]))]["y"].dtype == inner
    assert_same(*results)


@every_form
def test_activations_cast_between_regions(backend, form):
    """The output of one region is the input of the next."""
    x, weights, biases = network(sizes=(3, 4, 3))
    results = []
    for mlp in (FORMS[form], native_mlp):
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            y = mlp(x, weights, biases)
            with torch.autocast("cpu", torch.float16, cache_enabled=False):
                y = mlp(y, weights, biases)
            with torch.autocast("cpu", enabled=False):
                y = mlp(y.float(), weights, biases)
            assert y.dtype == torch.float32
        results.append(y.detach())
    assert_same(*results)


@every_form
def test_autocast_of_another_device_changes_nothing(backend, form):
    tensors = network()
    torch.set_autocast_enabled("cuda", True)  # torch.autocast raises without a GPU
    try:
        assert torch.is_autocast_enabled("cuda") and not torch.is_autocast_enabled("cpu")
        with support.count_calls() as calls:
            y = FORMS[form](*tensors)
            grads = gradients(y, leaves(*tensors), small(y))
    finally:
        torch.set_autocast_enabled("cuda", False)
    assert_fused(calls)
    expected = native_mlp(*tensors)
    assert_same(y, expected)
    assert_same(grads, gradients(expected, leaves(*tensors), small(y)))


def test_the_operator_has_a_rule_for_cuda():
    """Tested with fake tensors, which can claim to be on a GPU without one."""
    with FakeTensorMode():
        x = torch.ones(7, 3, device="cuda")
        weights = [torch.ones(*shape, device="cuda") for shape in [(5, 3), (2, 5)]]
        torch.set_autocast_enabled("cuda", True)
        try:
            outputs = [mlp(x, weights, None) for mlp in (operator, relu_mlp.relu_mlp, native_mlp)]
        finally:
            torch.set_autocast_enabled("cuda", False)
    assert [y.dtype for y in outputs] == [torch.get_autocast_dtype("cuda")] * 3
    assert outputs[0].dtype == torch.float16 and outputs[0].is_cuda


def test_meta_tensors_have_no_autocast():
    x, weights, biases = network()
    weights, biases = ([nn.Parameter(p.to("meta")) for p in ps] for ps in (weights, biases))
    with torch.autocast("cpu"):
        for mlp in (*FORMS.values(), native_mlp):
            assert mlp(x.to("meta"), weights, biases).dtype == torch.float32


def test_backward_under_autocast_of_a_forward_pass_outside(backend):
    """It computes in the dtypes of the forward pass, with the same bits as outside."""
    x = torch.randn(7, 3, requires_grad=True)
    weights, biases = support.make_network(SIZES, dtype=torch.float32, requires_grad=True)
    named = leaves(x, weights, biases)
    for recompute in (False, True):
        y = relu_mlp.relu_mlp(x, weights, biases, output_activation="tanh", recompute=recompute)
        expected = gradients(y.clone(), named, small(y))
        y = relu_mlp.relu_mlp(x, weights, biases, output_activation="tanh", recompute=recompute)
        with torch.autocast("cpu"), support.count_calls() as calls:
            assert_same(gradients(y, named, small(y)), expected)
        assert calls["backward"] == 1


# -- Dtypes -----------------------------------------------------------------------


ALL_DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int64]


@pytest.mark.parametrize("x_dtype", ALL_DTYPES, ids=str)
def test_mixed_dtypes(backend, x_dtype):
    """Floating-point tensors other than float64 are cast. Any other mixture is an error."""
    x = torch.ones(2, 3).to(x_dtype)
    values = torch.ones(4, 3), torch.ones(2, 4), torch.ones(4)
    for dtypes in itertools.product(ALL_DTYPES, repeat=3):
        first, last, bias = map(torch.Tensor.to, values, dtypes)
        forms = [relu_mlp.relu_mlp]
        if torch.int64 not in dtypes:  # a Parameter can't have this dtype
            first, last, bias = map(nn.Parameter, (first, last, bias))
            forms.append(module)
        with torch.autocast("cpu"), torch.no_grad():
            expected = outcome(native_mlp, x, [first, last], [bias, None])
            for form in forms:
                found = outcome(form, x, [first, last], [bias, None])
                assert_same(found, expected, f"{form.__name__}, {dtypes}")


def test_float64_stays(backend):
    tensors = network(dtype=torch.float64)
    for form in FORMS.values():
        with support.count_calls() as calls:
            found = both_passes(form, torch.bfloat16, tensors)
        assert_fused(calls)
        assert {tensor.dtype for tensor in found.values()} == {torch.float64}
        assert_same(found, both_passes(native_mlp, torch.bfloat16, tensors))


@every_half
def test_half_precision_parameters(backend, dtype):
    """A bfloat16 network under float16 autocast runs in float16, and vice versa."""
    for own in (torch.bfloat16, torch.float16):
        tensors = network(dtype=own)
        found = both_passes(relu_mlp.relu_mlp, dtype, tensors)
        assert found["y"].dtype == dtype and found["weights[0]"].dtype == own
        assert_same(found, both_passes(native_mlp, dtype, tensors))


def test_autocast_does_not_apply_to_loss_and_grads(backend):
    x, weights, biases = network()
    arguments = (x.detach(), torch.ones(7, 2), weights, biases)
    expected = relu_mlp.loss_and_grads(*arguments)
    with torch.autocast("cpu"):
        found = relu_mlp.loss_and_grads(*arguments)
    assert_same(found.loss, expected.loss)
    for a, e in zip([*found.weights, *found.biases], [*expected.weights, *expected.biases]):
        assert_same(a, e)


# -- Training ----------------------------------------------------------------------


@every_half
def test_grad_scaler(backend, dtype):
    """The first scales are too large for float16, so those steps are skipped, natively too."""
    torch.manual_seed(0)
    x, target = integers(7, 3, largest=1).float(), integers(7, 2, largest=1).float()
    models, scales, calls = [], [], []
    for make in (relu_mlp.ReluMLP.from_sequential, lambda sequential: sequential):
        torch.manual_seed(1)
        _, weights, biases = network()
        models.append(make(nn.Sequential(*children(weights, biases))))
        optimizer = torch.optim.SGD(models[-1].parameters(), lr=2.0**-3)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**18, growth_interval=2)
        scales.append([])
        with support.count_calls() as counted:
            for _ in range(6):
                optimizer.zero_grad()
                with torch.autocast("cpu", dtype):
                    y = models[-1](x)
                    loss = ((y.float() - target) * target).sum()
                scaler.scale(loss).backward()
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(models[-1].parameters(), 2.0**10)
                scaler.step(optimizer)
                scaler.update()
                scales[-1].append(scaler.get_scale())
        calls.append(counted)
    assert_fused(calls[0], 6)
    assert scales[0] == scales[1]
    if dtype is torch.float16:
        assert min(scales[0]) < 2.0**18  # some steps were skipped
    assert_same(models[0].state_dict(), dict(models[1].state_dict()))


# -- torch.compile -----------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("form", "region"), [("module", "inside"), ("function", "around"), ("operator", "part")]
)
def test_compile(backend, form, region):
    """The whole graph, with the region inside the compiled function or around it."""
    x, weights, biases = network()
    mlp = FORMS[form]
    if form == "module":
        sequential = nn.Sequential(*children(weights, biases))
        net = relu_mlp.ReluMLP.from_sequential(sequential)
        mlp = lambda x, weights, biases: net(x)  # noqa: E731

    def function(mlp, x):
        if region == "around":
            return mlp(x, weights, biases)
        with torch.autocast("cpu"):
            y = mlp(x, weights, biases)
            if region == "part":
                with torch.autocast("cpu", enabled=False):
                    return y.float() + mlp(x, weights, biases)
        return y

    def run_forward(function):
        with torch.autocast("cpu") if region == "around" else contextlib.nullcontext():
            return function(x)

    def run(function):
        y = run_forward(function)
        return {"y": y.detach(), **gradients(y, leaves(x, weights, biases), small(y))}

    graphs = []

    def compiler(graph, inputs):
        graphs.append(graph)
        return make_boxed_func(graph)

    torch.compiler.reset()
    compiled = torch.compile(
        lambda x: function(mlp, x),
        fullgraph=True,
        backend=aot_autograd(fw_compiler=compiler),
    )
    found = run(compiled)
    assert_same(found, run(lambda x: function(native_mlp, x)))
    targets = [node.target for graph in graphs for node in graph.graph.nodes]
    if backend == "extension":
        calls = 2 if region == "part" else 1
        assert targets.count(torch.ops.relu_mlp.forward.default) == calls
        assert targets.count(torch.ops.relu_mlp.backward.default) == calls
    with torch.no_grad():
        assert_same(run_forward(compiled), found["y"])
    if region == "around":  # without the region, the function is compiled again
        assert_same(compiled(x).detach(), native_mlp(x, weights, biases).detach())
    torch.compiler.reset()


# -- PyTorch's settings --------------------------------------------------------------


PRECISIONS = {
    "high": lambda: torch.set_float32_matmul_precision("high"),
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
    "onednn tf32": lambda: setattr(torch.backends.mkldnn.matmul, "fp32_precision", "tf32"),
    "onednn bf16": lambda: setattr(torch.backends.mkldnn.matmul, "fp32_precision", "bf16"),
}


@pytest.fixture
def set_precision():
    """Sets the precision that PyTorch may use for float32 products, for one test."""
    before = torch.backends.mkldnn.matmul.fp32_precision
    yield lambda name: PRECISIONS[name]()
    torch.set_float32_matmul_precision("highest")
    torch.backends.mkldnn.matmul.fp32_precision = before


def float32_passes(mlp, tensors):
    y = mlp(*tensors, output_activation="relu")
    return {"y": y.detach(), **gradients(y, leaves(*tensors), small(y))}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_float32_precision(backend, precision, set_precision):
    """A setting permits less than float32. This package's own products do not use it.

    Products that PyTorch computes follow the setting, as those of the native path do. For integers
    that bfloat16 holds, both are exact.
    """
    tensors = network(sizes=(512, 256, 256), rows=256)  # PyTorch computes products of this size
    own = network()[0].detach(), *support.make_network(SIZES, dtype=torch.float32)
    expected = float32_passes(native_mlp, tensors)
    of_own = relu_mlp.relu_mlp(*own)
    assert tensors[0].abs().max() <= 1
    assert native_mlp(tensors[0], tensors[1][:1], tensors[2][:1]).abs().max() <= 256
    set_precision(precision)
    for mlp in (relu_mlp.relu_mlp, module):
        with support.count_calls() as calls:
            found = float32_passes(mlp, tensors)
        assert (calls["forward"], calls["backward"]) == (1, 1)
        assert_same(found, expected)
    # the reference calls the same functions as the native path
    assert_same(relu_mlp.relu_mlp(*own), of_own if backend == "extension" else native_mlp(*own))


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(("sizes", "rows"), [((5, 17, 3), 3000), ((256, 256, 32), 100)], ids=str)
def test_deterministic_algorithms(backend, sizes, rows, deterministic):
    """Nothing raises, and the same call gives the same bits, with new memory filled with NaN."""
    weights, biases = support.make_network(sizes, dtype=torch.float32, requires_grad=True)
    tensors = torch.randn(rows, sizes[0], requires_grad=True), weights, biases
    target = torch.randn(rows, sizes[-1])

    def run():
        with support.count_calls() as calls:
            kept = float32_passes(relu_mlp.relu_mlp, tensors)
            y = relu_mlp.relu_mlp(*tensors, recompute=True)
            again = gradients(y, leaves(*tensors))
            by_hand = relu_mlp.loss_and_grads(tensors[0].detach(), target, weights, biases)
        assert (calls["forward"], calls["backward"], calls["loss_and_grads"]) == (2, 2, 1)
        with torch.autocast("cpu"):
            half = float32_passes(relu_mlp.relu_mlp, tensors)
        named = {str(n): grad for n, grad in enumerate([*by_hand.weights, *by_hand.biases])}
        return {"kept": kept, "again": again, "by hand": named, "half": half}

    first = run()
    assert all(tensor.isfinite().all() for found in first.values() for tensor in found.values())
    assert_same(run(), first)
    torch.use_deterministic_algorithms(False)
    assert_same(run(), first)
