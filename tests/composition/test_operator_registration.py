"""The operators `torch.ops.relu_mlp.*` from PyTorch's side: schemas, fake kernels, derivatives, the
guards of the raw operators, and their behavior under torch.compile and torch.export. The tests
run the library where it exists, whatever the backend.
"""

import os
import random
import subprocess
import sys

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch._subclasses import FakeTensorMode

import relu_mlp
import support
from relu_mlp import activations, ops, reference
from relu_mlp._torch_private import has_kernel
from relu_mlp.ops import library

# PyTorch says this about its own code: forward mode compiles with TorchScript.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated:FutureWarning"),
]

R = torch.ops.relu_mlp
RAW = ["forward", "backward", "backward_vjp", "loss_and_grads"]
NETWORKS = [  # sizes, leading sizes of x, bias, activation
    ([3, 2], [5], "none", "none"),
    ([3, 2], [], "all", "sigmoid"),
    ([3, 6, 2], [5], "all", "none"),
    ([3, 6, 2], [2, 3], "some", "tanh"),
    ([3, 6, 1, 7, 2], [4], "some", "relu"),
    ([3, 4, 5, 2], [2, 1, 3], "none", "sigmoid"),
    ([3, 4, 2], [0], "all", "tanh"),
]


def make_arguments(sizes, leading, bias, activation, dtype=torch.float64, requires_grad=False):
    """x, weights, biases and activation as `relu_mlp::relu_mlp` takes them."""
    weights, biases = support.make_network(sizes, bias, dtype, requires_grad)
    biases = [torch.empty(0, dtype=dtype) if b is None else b for b in biases or []]
    x = torch.randn(*leading, sizes[0], dtype=torch.float64).to(dtype)
    return x.requires_grad_(requires_grad), weights, biases, activation


def native(x, weights, biases, activation="none"):
    biases = [b if b.numel() else None for b in biases] if biases else None
    return support.native_mlp(x, weights, biases, None if activation == "none" else activation)


def raw_arguments(operator, x, weights, biases, activation, needs=None):
    """The arguments of a raw operator, and of `relu_mlp`, for one network."""
    if operator == "relu_mlp":
        return x, weights, biases, activation
    if operator == "forward":
        return x, weights, biases, activation, True
    target = torch.randn_like(native(x.detach(), weights, biases, activation))
    if operator == "loss_and_grads":
        return x, target, weights, biases, "half_sse", activation
    y, hidden = reference.forward(x, weights, biases, activation, True)
    if needs is None:
        has_bias = "".join("01"[bool(b.numel())] for b in biases) or "0" * len(weights)
        needs = "1" * (1 + len(weights)) + has_bias
    saved = reference.pack(x, y, weights, hidden, activation, needs)
    call = target, saved, activation, needs
    if operator == "backward":
        return call
    cotangents = reference.backward(*call)[::2]  # of every other result
    given = ("10" * len(needs))[: needs.count("1")]
    return *call, cotangents, given, "1" * (1 + len(saved))


def flat(result):
    return [result] if isinstance(result, torch.Tensor) else [t for r in result for t in flat(r)]


# -- Registration --------------------------------------------------------------


def test_schemas():
    """Without the library, ops/library.py defines the operators with the same schemas."""
    registered = {
        name.removeprefix("relu_mlp::")
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("relu_mlp::")
    }
    assert registered == {schema.split("(")[0] for schema in ops.SCHEMAS}
    public = {name for name in registered if not name.startswith("_")}
    assert public == {
        *("relu_mlp", "forward", "backward", "backward_vjp", "recompute_backward"),
        "loss_and_grads",
    }
    for schema in ops.SCHEMAS:
        operator = getattr(R, schema.split("(")[0]).default
        assert str(torch._C.parse_schema(f"relu_mlp::{schema}")) == str(operator._schema)


@pytest.mark.parametrize("name", ops.OPERATORS)
def test_an_operator_is_complete(name):
    """What a new operator needs (docs/adding.md), and nothing else would miss."""
    for operator in (f"relu_mlp::{name}", f"relu_mlp::_{name}_in_cpp"):
        assert has_kernel(operator, "CompositeExplicitAutograd"), operator
    assert has_kernel(f"relu_mlp::{name}", "Autograd")
    for place in (reference, ops.fake, ops.Implementation, ops.extension):
        assert hasattr(place, name), f"{place} has no {name}"


@pytest.mark.skipif(ops.LIBRARY_PATH is None, reason="is about the library")
def test_the_library_has_the_same_activations(monkeypatch):
    """An activation in only one of the two tables stops the import."""
    monkeypatch.setitem(activations.ACTIVATIONS, "elu", torch.nn.functional.elu)
    with pytest.raises(ImportError, match=r"tanh.* elu, and its library has"):
        library._check_activations(ops.LIBRARY_PATH.parent)


@pytest.mark.slow
@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("network", NETWORKS, ids=str)
def test_opcheck(network, requires_grad):
    arguments = make_arguments(*network, requires_grad=requires_grad)
    torch.library.opcheck(R.relu_mlp.default, arguments)


def test_opcheck_of_partly_frozen_networks():
    x, weights, biases, activation = make_arguments([3, 6, 5, 2], [4], "some", "tanh")
    for needing in ([x], [weights[1]], [biases[0], weights[2]]):
        for tensor in (x, *weights, *biases):
            tensor.requires_grad_(any(tensor is other for other in needing))
        torch.library.opcheck(R.relu_mlp.default, (x, weights, biases, activation))


@pytest.mark.slow
@pytest.mark.parametrize("operator", RAW)
@pytest.mark.parametrize("network", NETWORKS, ids=str)
def test_opcheck_of_raw_operators(network, operator):
    arguments = raw_arguments(operator, *make_arguments(*network))
    torch.library.opcheck(getattr(R, operator).default, arguments)


LAYOUTS = {
    "contiguous": lambda t: t,
    "transposed": lambda t: t.mT.contiguous().mT if t.dim() > 1 else t,
    "expanded": lambda t: t[..., :1].expand(t.shape) if t.dim() else t,
}


@pytest.mark.covering
@pytest.mark.parametrize("operator", ["relu_mlp", *RAW])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("network", NETWORKS, ids=str)
def test_fake_kernels(network, dtype, layout, operator):
    """The same shapes, strides and dtypes as the real ones, for fake and meta tensors."""
    arguments = make_arguments(*network, dtype=dtype)
    layers = len(arguments[1])
    # every gradient, and some random choices
    r = random.Random(0)
    patterns = [None] + ["".join(r.choices("01", k=1 + 2 * layers)) for _ in range(5)]
    for needs in patterns if operator.startswith("backward") else [None]:
        call = raw_arguments(operator, *arguments, needs)

        def convert(argument, to):
            if isinstance(argument, (list, tuple)):
                return [convert(item, to) for item in argument]
            return to(argument) if isinstance(argument, torch.Tensor) else argument

        call = convert(call, LAYOUTS[layout])
        if operator == "forward" and layout == "transposed":
            call[-1] = False  # save_hidden
        real = flat(getattr(R, operator)(*call))
        with FakeTensorMode() as mode:
            fake = flat(getattr(R, operator)(*convert(call, mode.from_tensor)))
        meta = flat(getattr(R, operator)(*convert(call, lambda t: t.to("meta"))))
        facts = [(t.shape, t.stride(), t.dtype, t.storage_offset()) for t in real]
        for others, device in ((fake, "cpu"), (meta, "meta")):
            assert [t.device.type for t in others] == [device] * len(real)
            assert [(t.shape, t.stride(), t.dtype, t.storage_offset()) for t in others] == facts, (
                needs
            )


def test_outputs_do_not_share_memory_with_inputs():
    """The schema has no aliases, which promises this."""
    for operator in ("relu_mlp", *RAW):
        for network in NETWORKS:
            call = raw_arguments(operator, *make_arguments(*network))
            inputs = {
                t.untyped_storage().data_ptr()
                for t in flat([a for a in call if isinstance(a, (torch.Tensor, list))])
                if t.numel()
            }
            outputs = [t for t in flat(getattr(R, operator)(*call)) if t.numel()]
            pointers = [t.untyped_storage().data_ptr() for t in outputs]
            assert not inputs.intersection(pointers)
            assert len(set(pointers)) == len(pointers)


# -- The public operator ----------------------------------------------------------


@pytest.mark.parametrize("dtype", support.DTYPES, ids=str)
@pytest.mark.parametrize("network", NETWORKS, ids=str)
def test_values_are_those_of_the_raw_operator(network, dtype):
    x, weights, biases, activation = make_arguments(*network, dtype=dtype)
    y = R.relu_mlp(x, weights, biases, activation)
    raw, hidden = R.forward(x, weights, biases, activation, True)
    assert torch.equal(y, raw)
    assert torch.equal(y, R.forward(x, weights, biases, activation, False)[0])
    assert torch.equal(y, R.relu_mlp(x.clone().requires_grad_(), weights, biases, activation))
    assert len(hidden) == len(weights) - 1


@pytest.mark.parametrize("network", NETWORKS, ids=str)
def test_gradients_are_those_of_the_function(network):
    """Bit by bit: both use the same Function and the same raw operators."""
    x, weights, biases, activation = make_arguments(*network, requires_grad=True)
    inputs = [x, *weights, *[b for b in biases if b.numel()]]
    y = R.relu_mlp(x, weights, biases, activation)
    grad_output = torch.randn_like(y)
    grads = torch.autograd.grad(y, inputs, grad_output)
    y = relu_mlp.relu_mlp(
        x,
        weights,
        [b if b.numel() else None for b in biases] if biases else None,
        output_activation=None if activation == "none" else activation,
    )
    expected = torch.autograd.grad(y, inputs, grad_output)
    assert all(map(torch.equal, grads, expected))


@torch.no_grad()
def is_near_the_kink(x, weights, biases, activation):
    """Whether a pre-activation is within 1e-3 of 0, so that steps of 1e-6 may cross it."""
    last = len(weights) - (activation != "relu")
    z = [native(x, weights[:n], biases[:n]) for n in range(1, last + 1)]
    return any(t.numel() and t.abs().min() < 1e-3 for t in z)


@pytest.mark.parametrize("network", NETWORKS, ids=str)
def test_first_and_second_derivatives(network):
    x, weights, biases, activation = make_arguments(*network, requires_grad=True)
    while is_near_the_kink(x, weights, biases, activation):
        x, weights, biases, activation = make_arguments(*network, requires_grad=True)
    present = [b for b in biases if b.numel()]
    layers = len(weights)

    def function(x, *parameters):
        given = iter(parameters[layers:])
        all_biases = [next(given) if b.numel() else b for b in biases]
        return R.relu_mlp(x, list(parameters[:layers]), all_biases, activation)

    inputs = (x, *weights, *present)
    # A central difference with step h = 1e-6 is off by h^2 |f'''| / 6, about
    # 1e-12, and by the rounding of f over h, about ten units of 1e-16 / 1e-6.
    tolerances = {"eps": 1e-6, "atol": 1e-8, "rtol": 1e-8}
    assert torch.autograd.gradcheck(function, inputs, **tolerances)
    assert torch.autograd.gradgradcheck(function, inputs, **tolerances)


def test_missing_biases():
    """An entry without elements, and the empty list."""
    x, weights, biases, _ = make_arguments([3, 6, 2], [5], "all", "none")
    zeros = [torch.zeros_like(b) for b in biases]
    nothing = torch.empty(0, dtype=torch.float64)
    y = R.relu_mlp(x, weights, zeros)
    assert torch.equal(R.relu_mlp(x, weights, []), y)
    assert torch.equal(R.relu_mlp(x, weights, [nothing, nothing]), y)
    assert torch.equal(R.relu_mlp(x, weights, [torch.empty(0), torch.empty(0, 7)]), y)
    assert torch.equal(
        R.relu_mlp(x, weights, [biases[0], nothing]),
        R.relu_mlp(x, weights, [biases[0], zeros[1]]),
    )


def test_missing_bias_that_requires_grad():
    """It gets no gradient, or one without elements, and the others get theirs."""
    x, weights, biases, _ = make_arguments([3, 6, 2], [5], "all", "none", requires_grad=True)
    nothing = torch.empty(0, dtype=torch.float64, requires_grad=True)
    R.relu_mlp(x, weights, [biases[0], nothing]).sum().backward()
    assert nothing.grad is None or nothing.grad.shape == (0,)
    expected = native(x, weights, [biases[0], torch.empty(0)]).sum()
    assert torch.equal(biases[0].grad, torch.autograd.grad(expected, biases[0])[0])


def test_the_default_activation_is_none():
    x, weights, biases, _ = make_arguments([3, 6, 2], [5], "all", "none")
    y = R.relu_mlp(x, weights, biases, "none")
    assert torch.equal(R.relu_mlp(x, weights, biases), y)
    assert torch.equal(R.relu_mlp(x=x, weights=weights, biases=biases), y)


# -- Guards of the raw operators ---------------------------------------------------


def positions(call):
    """Every tensor of a call, as a function that replaces it."""

    def replace(at, within=None):
        def put(make):
            changed = [list(a) if isinstance(a, (list, tuple)) else a for a in call]
            if within is None:
                changed[at] = make(changed[at])
            else:
                changed[at][within] = make(changed[at][within])
            return changed

        return put

    for at, argument in enumerate(call):
        if isinstance(argument, torch.Tensor):
            yield replace(at)
        elif isinstance(argument, (list, tuple)):
            yield from (replace(at, within) for within in range(len(argument)))


REMEDY = r"(?s)relu_mlp::{}.*torch\.ops\.relu_mlp\.relu_mlp or relu_mlp\.relu_mlp.*detach"


@pytest.mark.parametrize("operator", ["loss_and_grads", "recompute_backward", "backward_vjp"])
@pytest.mark.parametrize("network", NETWORKS[:4], ids=str)
def test_raw_operators_refuse_what_they_cannot_differentiate(network, operator):
    arguments = make_arguments(*network)
    if operator == "recompute_backward":
        x, weights, biases, activation = arguments
        needs = "11" + "1" * (len(weights) - 1) + "".join("01"[b.numel() > 0] for b in biases)
        needs += "0" * (1 + 2 * len(weights) - len(needs))
        grad_output = torch.ones(*x.shape[:-1], weights[-1].shape[0], dtype=x.dtype)
        call = (grad_output, x, weights, biases, activation, needs)
    else:
        call = raw_arguments(operator, *arguments)
    raw, refusal = getattr(R, operator), REMEDY.format(operator)
    plain = flat(raw(*call))
    for put in positions(call):
        needs_gradient = put(lambda t: t.clone().requires_grad_())
        with pytest.raises(RuntimeError, match=refusal):
            raw(*needs_gradient)
        with torch.no_grad():
            assert all(map(torch.equal, flat(raw(*needs_gradient)), plain))
        with torch.inference_mode():
            assert all(map(torch.equal, flat(raw(*needs_gradient)), plain))
        detached = put(lambda t: t.clone().requires_grad_().detach())
        results = flat(raw(*detached))
        assert all(map(torch.equal, results, plain))
        assert not any(t.requires_grad for t in results)
        with forward_ad.dual_level():
            carries_tangent = put(lambda t: forward_ad.make_dual(t, torch.ones_like(t)))
            with pytest.raises(RuntimeError, match=refusal):
                raw(*carries_tangent)
            with torch.no_grad(), pytest.raises(RuntimeError, match=refusal):
                raw(*carries_tangent)  # no_grad does not stop forward mode


# -- torch.func: right or refused, never wrong in silence ------------------------------
#
# Small integers make every sum exact, so "right" is `torch.equal`. The operators with
# derivatives must be right; those that have none may refuse.


def integers(*sizes):
    return torch.randint(-4, 5, sizes).double()


def functions_of_x(operator, weights, biases):
    """x -> an output of the operator, and the same by plain PyTorch."""
    target = integers(5, 2)
    mask = torch.ones(5, 6, dtype=torch.float64)
    return {
        "relu_mlp": (
            lambda x: R.relu_mlp(x, weights, biases),
            lambda x: native(x, weights, biases),
        ),
        "forward": (
            lambda x: R.forward(x, weights, biases, "none", True)[0],
            lambda x: native(x, weights, biases),
        ),
        "backward": (
            lambda x: R.backward(target, [x, weights[1], mask], "none", "01111")[0],
            lambda x: (target @ weights[1]).T @ x,
        ),
        "backward_vjp": (
            lambda x: R.backward_vjp(
                target, [x, weights[1], mask], "none", "01111", weights[:1], "1000", "1000"
            )[0],
            lambda x: (x @ weights[0].T) @ weights[1].T,
        ),
        "loss_and_grads": (
            lambda x: R.loss_and_grads(x, target, weights, biases, "sse", "none")[0],
            lambda x: (native(x, weights, biases) - target).square().sum(),
        ),
    }[operator]


def with_dual(function, x, tangent):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(function(forward_ad.make_dual(x, tangent))).tangent


TRANSFORMS = {
    "grad": lambda f, x, v: torch.func.grad(lambda x: f(x).sum())(x),
    "grad of a product": lambda f, x, v: torch.func.grad(lambda x: (f(x) * x.sum()).sum())(x),
    "vjp": lambda f, x, v: torch.func.vjp(f, x)[1](f(x.clone()))[0],
    "jvp": lambda f, x, v: torch.func.jvp(f, (x,), (v,))[1],
    "dual": with_dual,
    "vmap": lambda f, x, v: torch.func.vmap(f)(torch.stack([x, v])),
    "jacrev": lambda f, x, v: torch.func.jacrev(f)(x),
    "jacfwd": lambda f, x, v: torch.func.jacfwd(f)(x),
    "hessian": lambda f, x, v: torch.func.hessian(f)(x),
    "jvp of grad": lambda f, x, v: torch.func.jvp(
        torch.func.grad(lambda x: f(x).square().sum()), (x,), (v,)
    )[1],
    "vmap of grad": lambda f, x, v: torch.func.vmap(torch.func.grad(lambda x: f(x).sum()))(
        torch.stack([x, v])
    ),
}


def right_or_refused(function, expected, operator="relu_mlp"):
    try:
        result = function()
    except RuntimeError:  # NotImplementedError is one
        if operator in ops.DIFFERENTIABLE:
            raise
        return
    assert isinstance(result, torch.Tensor)
    assert torch.equal(result, expected)


@pytest.mark.parametrize("operator", ["relu_mlp", *RAW])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_torch_func(operator, transform):
    weights, biases = small_network()
    x, v = integers(5, 3), integers(5, 3)
    ours, plain = functions_of_x(operator, weights, biases)
    assert torch.equal(ours(x), plain(x))
    apply = TRANSFORMS[transform]
    right_or_refused(lambda: apply(ours, x, v), apply(plain, x, v), operator)


@pytest.mark.parametrize("which", ["weights", "biases"])
@pytest.mark.parametrize("transform", ["grad", "jvp", "dual", "vmap", "jacfwd"])
def test_torch_func_of_parameters(which, transform):
    """A transformed tensor may be inside a list."""
    (weights, biases), x = small_network(), integers(5, 3)

    def function_of(network):
        if which == "weights":
            return lambda w: network(x, [weights[0], w], biases)
        return lambda b: network(x, weights, [biases[0], b])

    value = weights[1] if which == "weights" else biases[1]
    apply, tangent = TRANSFORMS[transform], integers(*value.shape)
    expected = apply(function_of(native), value, tangent)
    for ours in (R.relu_mlp, lambda x, w, b: R.forward(x, w, b, "none", False)[0]):
        right_or_refused(lambda: apply(function_of(ours), value, tangent), expected)  # noqa: B023


@pytest.mark.slow
@pytest.mark.parametrize("operator", ["relu_mlp", "forward"])
@pytest.mark.parametrize("transform", ["grad", "jvp", "vmap"])
def test_torch_func_compiled(operator, transform):
    weights, biases = small_network()
    x, v = integers(5, 3), integers(5, 3)
    ours, plain = functions_of_x(operator, weights, biases)
    apply = TRANSFORMS[transform]
    compiled = torch.compile(lambda x, v: apply(ours, x, v), backend="aot_eager")
    right_or_refused(lambda: compiled(x, v), apply(plain, x, v))


def small_network():
    return [integers(6, 3), integers(2, 6)], [integers(6), integers(2)]


# -- torch.compile and torch.export ------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("compiler", ["eager", "aot_eager", "inductor"])
def test_compile(compiler):
    x, (weights, biases) = integers(5, 3), small_network()
    inputs = [t.requires_grad_() for t in (x, *weights, *biases)]

    # Nothing beside the operator, so that Inductor needs no C++ compiler.
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x: R.relu_mlp(x, weights, biases), fullgraph=True, backend=compiler
    )
    y, expected = compiled(x), native(x, weights, biases)
    assert torch.equal(y, expected)
    grads = torch.autograd.grad(y, inputs, torch.ones_like(y))
    assert all(map(torch.equal, grads, torch.autograd.grad(expected, inputs, torch.ones_like(y))))
    with torch.no_grad():
        assert torch.equal(compiled(x), expected)


@pytest.mark.slow
def test_compile_with_dynamic_shapes():
    weights, biases = small_network()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x: R.relu_mlp(x, weights, biases, "relu"),
        fullgraph=True,
        dynamic=True,
        backend=counter,
    )
    for rows in (5, 7, 64):
        x, twin = [integers(rows, 3).requires_grad_() for _ in range(2)]
        twin.data.copy_(x.data)
        y, expected = compiled(x), native(twin, weights, biases, "relu")
        assert torch.equal(y, expected)
        y.sum().backward()
        expected.sum().backward()
        assert torch.equal(x.grad, twin.grad)
    assert counter.frame_count == 1


class Module(torch.nn.Module):
    def __init__(self):
        super().__init__()
        weights, biases = small_network()
        self.weights, self.biases = torch.nn.ParameterList(weights), torch.nn.ParameterList(biases)

    def forward(self, x):
        weights, biases = [self.weights[0], self.weights[1]], [self.biases[0], self.biases[1]]
        return R.relu_mlp(x, weights, biases, "relu")


@pytest.mark.slow
def test_export(tmp_path):
    module, x = Module(), integers(5, 3)
    rows = torch.export.Dim("rows")
    program = torch.export.export(module, (x,), dynamic_shapes=({0: rows},))
    called = [n.target for n in program.graph.nodes if n.op == "call_function"]
    assert R.relu_mlp.default in called
    torch.export.save(program, tmp_path / "program.pt2")
    loaded = torch.export.load(tmp_path / "program.pt2")
    for exported in (program, loaded, program.run_decompositions()):
        for count in (5, 8):
            x = integers(count, 3)
            expected = native(x, [*module.weights], [*module.biases], "relu")
            assert torch.equal(exported.module()(x), expected)


def test_torchscript():
    (weights, biases), x = small_network(), integers(5, 3)
    traced = torch.jit.trace(lambda x: R.relu_mlp(x, weights, biases, "relu"), (x,))
    x = integers(7, 3)
    assert torch.equal(traced(x), native(x, weights, biases, "relu"))


# -- Malformed calls of relu_mlp::backward --------------------------------------------


def of_the_library(test):
    """These tests need the library, because the reference trusts its only caller."""
    return test if ops.LIBRARY_PATH is not None else None


def good_backward():
    """grad_output, saved (x, y, W_1, a_1), activation and needs of a network 3 -> 6 -> 2."""
    return raw_arguments("backward", *make_arguments([3, 6, 2], [5], "all", "sigmoid"), "01111")


def run(code):
    """Runs Python code in a process of its own, which a crash would end."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    # glibc fills freed and allocated memory, so stale memory shows
    environment |= {"MALLOC_PERTURB_": "165"}
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, f"{result.returncode} {result.stderr[-2000:]}"


def changed(at, make):
    grad_output, saved, activation, needs = good_backward()
    if at == "grad_output":
        grad_output = make(grad_output)
    elif at == "saved":
        saved = make(saved)
    elif at == "needs":
        needs = make(needs)
    elif at == "activation":
        activation = make(activation)
    else:
        saved[at] = make(saved[at])
    return grad_output, saved, activation, needs


MALFORMED = {
    "y missing": ("saved", lambda saved: [saved[0], *saved[2:]]),
    "nothing saved": ("saved", lambda saved: []),
    "one too few": ("saved", lambda saved: saved[:-1]),
    "in another order": ("saved", lambda saved: saved[::-1]),
    "needs empty": ("needs", lambda needs: ""),
    "needs of one": ("needs", lambda needs: "0"),
    "needs even": ("needs", lambda needs: "0111"),
    "needs too long": ("needs", lambda needs: "0111111"),
    "needs x too": ("needs", lambda needs: "11111"),
    "needs not 0 or 1": ("needs", lambda needs: "01a1b"),
    "unknown activation": ("activation", lambda activation: "gelu"),
    "grad_output of rank 0": ("grad_output", lambda t: t[0, 0]),
    "grad_output of rank 1": ("grad_output", lambda t: t[0]),
    "grad_output of other rows": ("grad_output", lambda t: t[:4]),
    "grad_output too wide": ("grad_output", lambda t: t.repeat(1, 2)),
    "grad_output empty": ("grad_output", lambda t: t[:0]),
    "grad_output float32": ("grad_output", lambda t: t.float()),
    "grad_output integer": ("grad_output", lambda t: t.long()),
    "x of rank 0": (0, lambda t: t[0, 0]),
    "x of rank 1": (0, lambda t: t[0]),
    "x of other rows": (0, lambda t: t[:4]),
    "x float32": (0, lambda t: t.float()),
    "y of rank 0": (1, lambda t: t[0, 0]),
    "y too narrow": (1, lambda t: t[:, :1]),
    "y bfloat16": (1, lambda t: t.bfloat16()),
    "weight of rank 0": (2, lambda t: t[0, 0]),
    "weight of rank 1": (2, lambda t: t[0]),
    "weight of rank 3": (2, lambda t: t[None]),
    "weight transposed": (2, lambda t: t.T),
    "weight float32": (2, lambda t: t.float()),
    "hidden of rank 0": (3, lambda t: t[0, 0]),
    "hidden of rank 3": (3, lambda t: t[None]),
    "hidden of other rows": (3, lambda t: t[:4]),
    "hidden too wide": (3, lambda t: t.repeat(1, 2)),
    "hidden integer": (3, lambda t: t.long()),
    "no tensor has rank": ("saved", lambda saved: [torch.tensor(1.0).double()] * 4),
}


NOTHING_TO_DO = """
from composition.test_operator_registration import R, torch
for activation in ("none", "relu", "sigmoid", "tanh"):
    for needs in ("000", "0000000"):
        for device in ("cpu", "meta"):
            grad_output = torch.ones(5, 2, device=device)
            assert R.backward(grad_output, [], activation, needs) == []
"""


@pytest.mark.slow
def test_backward_with_nothing_to_do():
    """No gradient is needed, so nothing was saved."""
    run(NOTHING_TO_DO)


@of_the_library
@pytest.mark.parametrize(("at", "make"), MALFORMED.values(), ids=list(MALFORMED))
def test_malformed_backward(at, make):
    R.backward(*good_backward())
    with pytest.raises(RuntimeError):
        R.backward(*changed(at, make))


FUZZ = """
import random, sys, torch
torch.manual_seed(0)
r = random.Random(0)
from composition import test_operator_registration as t

CHANGES = [
    lambda a: a[:0] if a.dim() else a,
    lambda a: a[..., :-1] if a.dim() else a,
    lambda a: a[..., :1].expand(a.shape) if a.dim() else a,
    lambda a: a.mT if a.dim() > 1 else a,
    lambda a: a.repeat(2, *[1] * a.dim()),
    lambda a: a.flatten()[0] if a.numel() else a,
    lambda a: a.flatten(),
    lambda a: a[None],
    lambda a: a.float(),
    lambda a: a.long(),
    lambda a: a.bool(),
    lambda a: a.to(torch.complex64),
    lambda a: torch.empty(r.choices([0, 1, 2, 5, 6], k=r.randint(0, 4)), dtype=torch.float64),
]

def strange(tensor):
    return r.choice(CHANGES)(tensor)

refused = 0
for case in range(3000):
    layers = r.randint(1, 4)
    sizes = [r.choice([0, 1, 2, 5, 6]) for _ in range(layers + 1)]
    activation = r.choice(["none", "relu", "sigmoid", "tanh"])
    arguments = t.make_arguments(sizes, [r.choice([0, 1, 5])], "all", activation)
    needs = "".join(r.choices("01", k=1 + 2 * layers))
    grad_output, saved, activation, needs = t.raw_arguments("backward", *arguments, needs)
    for _ in range(r.randint(0, 3)):
        what = r.randrange(5)
        if what == 0:
            grad_output = strange(grad_output)
        elif what == 1 and saved:
            at = r.randrange(len(saved))
            saved[at] = strange(saved[at])
        elif what == 2:
            r.shuffle(saved)
        elif what == 3:
            saved = [r.choice(saved) for _ in range(r.randint(0, 6))] if saved else saved
        else:
            needs = "".join(r.choices("01", k=r.randint(0, 11)))
    try:
        results = t.R.backward(grad_output, saved, activation, needs)
    except RuntimeError:
        refused += 1
    else:  # well-formed, if by chance
        assert len(results) == needs.count("1"), (needs, results)
        sum(result.sum() for result in results)
assert 500 < refused < 2500, refused
"""


@pytest.mark.slow
@of_the_library
def test_malformed_backward_never_crashes():
    run(FUZZ)


# -- Calls ------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [[3, 2], [3, 6, 2], [42, 17, 16, 5, 4, 3]], ids=str)
@pytest.mark.parametrize("activation", support.ACTIVATIONS)
def test_one_call_each_way(backend, sizes, activation):
    """One call of forward for the whole network, one of backward, and no other products."""
    weights, biases = support.make_network(sizes, "some", requires_grad=True)
    x = torch.randn(2, 5, sizes[0], dtype=torch.float64, requires_grad=True)
    one = {"forward": 1, "backward": 0, "loss_and_grads": 0, "native": 0}
    with torch.no_grad(), support.count_calls() as counts:
        relu_mlp.relu_mlp(x, weights, biases, output_activation=activation)
    assert counts == one
    with support.count_calls() as counts:
        y = relu_mlp.relu_mlp(x, weights, biases, output_activation=activation)
        assert counts == one
        y.sum().backward()
    assert counts == {**one, "backward": 1}


@pytest.mark.parametrize("network", NETWORKS, ids=str)
def test_public_operator_makes_one_call_each_way(network):
    call = make_arguments(*network, requires_grad=True)
    one = {"forward": 1, "backward": 0, "loss_and_grads": 0, "native": 0}
    with support.count_calls() as counts:
        y = R.relu_mlp(*call)
        assert counts == one
        y.sum().backward()
    assert counts == {**one, "backward": 1}
    with torch.no_grad(), support.count_calls() as counts:
        R.relu_mlp(*call)
    assert counts["native"] == counts["backward"] == 0


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize(
    ("layers", "biases", "words"),
    [
        (0, 0, "weights must have at least one entry, got none"),
        (2, 1, "one entry for each of the 2 weights, got 1"),
        (2, 3, "one entry for each of the 2 weights, got 3"),
    ],
)
def test_lists_of_wrong_length(layers, biases, words, requires_grad):
    def tensors(count, *shape):
        return [torch.ones(shape, requires_grad=requires_grad) for _ in range(count)]

    with pytest.raises(RuntimeError, match=words):
        R.relu_mlp(*tensors(1, 5, 3), tensors(layers, 3, 3), tensors(biases, 3))


# -- Calls that bypass an idle Autograd kernel ---------------------------------


@pytest.fixture
def asked(monkeypatch):
    """A growing list of the questions that the Autograd kernels in Python have asked."""
    calls = []
    asks = ops.is_differentiated
    monkeypatch.setattr(
        ops, "is_differentiated", lambda *arguments: calls.append(1) or asks(*arguments)
    )
    with support.node_enabled(False):  # its kernels ask in C++
        yield calls


OPERATORS = ["relu_mlp", "forward", "backward"]


@pytest.mark.parametrize("operator", OPERATORS)
def test_without_gradients_the_autograd_kernel_is_bypassed(operator, asked):
    arguments = raw_arguments(operator, *make_arguments([3, 4, 2], [5], "all", "none"))
    function = getattr(R, operator).default
    with_kernel = function(*arguments)
    assert asked
    asked.clear()
    with torch.no_grad():
        passed_by = function(*arguments)
    assert not asked
    torch.testing.assert_close(passed_by, with_kernel, rtol=0, atol=0)


@pytest.mark.slow
def test_a_compiled_graph_bypasses_the_autograd_kernel(asked):
    net = relu_mlp.ReluMLP(3, 4, 2)
    compiled = torch.compile(net, fullgraph=True)
    x = torch.randn(5, 3)
    compiled(x).sum().backward()
    asked.clear()
    compiled(x).sum().backward()
    assert not asked


@pytest.mark.parametrize("operator", OPERATORS)
def test_without_gradients_a_tangent_is_not_lost(operator):
    arguments = raw_arguments(operator, *make_arguments([3, 4, 2], [5], "all", "tanh"))
    first, *rest = arguments
    function = getattr(R, operator).default
    tangent = torch.randn_like(first)
    expected = torch.func.jvp(lambda t: function(t, *rest), (first,), (tangent,))[1]
    with forward_ad.dual_level(), torch.no_grad():
        results = function(forward_ad.make_dual(first, tangent), *rest)
        got = torch.utils._pytree.tree_map(lambda t: forward_ad.unpack_dual(t).tangent, results)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize(
    "transform", ["jvp", "vmap", "vmap of jvp", "jvp of vmap", "functionalize"]
)
def test_without_gradients_the_transforms_are_as_with_them(operator, transform):
    first, *rest = raw_arguments(operator, *make_arguments([3, 4, 2], [5], "all", "tanh"))
    examples, tangents = torch.randn(2, 7, *first.shape, dtype=first.dtype)

    def function(t):
        return getattr(R, operator).default(t, *rest)

    def derivative(t, tangent):
        return torch.func.jvp(function, (t,), (tangent,))[1]

    def transformed():
        if transform == "jvp":
            return derivative(examples[0], tangents[0])
        if transform == "vmap":
            return torch.vmap(function)(examples)
        if transform == "vmap of jvp":
            return torch.vmap(derivative)(examples, tangents)
        if transform == "jvp of vmap":
            return torch.func.jvp(torch.vmap(function), (examples,), (tangents,))[1]
        return torch.func.functionalize(function)(examples[0])

    expected = transformed()
    with torch.no_grad():
        torch.testing.assert_close(transformed(), expected)


def test_without_gradients_arguments_may_be_named():
    x, weights, biases, activation = make_arguments([3, 4, 2], [5], "all", "none")
    named = {"x": x, "weights": weights, "biases": biases, "output_activation": activation}
    with torch.no_grad():
        assert torch.equal(R.relu_mlp.default(**named), R.relu_mlp(x, weights, biases, activation))


def test_without_gradients_a_dispatch_mode_sees_the_operator():
    class Names(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            names.append(str(function))
            return function(*args, **(kwargs or {}))

    names, arguments = [], make_arguments([3, 4, 2], [5], "all", "none")
    with torch.no_grad(), Names():
        R.relu_mlp.default(*arguments)
    assert names == ["relu_mlp.relu_mlp.default"]
