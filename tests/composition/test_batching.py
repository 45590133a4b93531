"""torch.vmap of the network: over inputs, over parameters, over both, and with derivatives,
against vmap of the native path.

The comparison is that of test_transforms.py: bit for bit on integer networks, and within the
bounds of support/bounds.py for sigmoid and tanh.
"""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import vmap
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vjp
from torch.utils._pytree import tree_flatten

import support
from relu_mlp import ReluMLP, relu_mlp
from support import BIASES, assert_same, integer_network, integers, native_mlp
from support.transforms import compare, loss, of_loss, of_names, problem

# PyTorch's own forward mode compiles its rules with TorchScript, which is deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")
activations = pytest.mark.parametrize("activation", support.ACTIVATIONS, ids=str)
EXAMPLES = 3


def stacked(tensor, dim=0, examples=EXAMPLES):
    """The same numbers in different tensors."""
    return torch.stack([tensor.roll(n) + n * tensor for n in range(examples)], dim)


def stack(p, names, dim=0):
    """The tensors of `names` with one value per example, and the in_dims that describe this."""
    batched = {name: stacked(t, dim) if name in names else t for name, t in p.items()}
    return batched, {name: dim if name in names else None for name in p}


def others(p, names):
    """All other names, or the same names if there are no others."""
    return [name for name in p if name not in names] or names


def each(function, p, names, dim=0, **options):
    """vmap of a function of the dict p over some of its tensors."""
    batched, dims = stack(p, names, dim)
    return vmap(function, in_dims=(dims,), **options)(batched)


def sum_of_each(f, p, names):
    """The loss summed over all examples, as a function of p."""
    return lambda p: loss(each(f, p, names))


# f is the network as a function of a dict of its tensors, and p is that dict. t and s are tangents
# of p, g is a gradient for the output, and n holds the names of the batched tensors. The
# number is the order of the highest derivative.
TRANSFORMS = {
    "vmap": (0, lambda f, p, t, s, g, n: each(f, p, n)),
    "in_dims 1, out_dims 1": (0, lambda f, p, t, s, g, n: each(f, p, n, 1, out_dims=1)),
    "in_dims -1, out_dims -1": (0, lambda f, p, t, s, g, n: each(f, p, n, -1, out_dims=-1)),
    "chunks": (0, lambda f, p, t, s, g, n: each(f, p, n, chunk_size=2)),
    "vmap of vmap": (
        0,
        lambda f, p, t, s, g, n: each(lambda q: each(f, q, n, -1), p, n),
    ),
    "vmap of vmap of others": (
        0,
        lambda f, p, t, s, g, n: each(lambda q: each(f, q, others(p, n)), p, n),
    ),
    "vmap of grad": (1, lambda f, p, t, s, g, n: each(grad(of_loss(f)), p, n)),
    "grad of vmap": (1, lambda f, p, t, s, g, n: grad(sum_of_each(f, p, n))(p)),
    "vmap of vjp": (1, lambda f, p, t, s, g, n: each(lambda q: vjp(f, q)[1](g), p, n)),
    "vmap over gradients": (1, lambda f, p, t, s, g, n: vmap(vjp(f, p)[1])(stacked(g))),
    "vmap of jvp": (1, lambda f, p, t, s, g, n: each(lambda q: jvp(f, (q,), (t,)), p, n)),
    "jvp of vmap": (1, lambda f, p, t, s, g, n: jvp(lambda p: each(f, p, n), (p,), (t,))),
    "vmap over tangents": (
        1,
        lambda f, p, t, s, g, n: each(lambda u: jvp(f, (p,), (u,))[1], t, n),
    ),
    "vmap of jacrev": (1, lambda f, p, t, s, g, n: each(jacrev(f), p, n)),
    "vmap of jacfwd": (1, lambda f, p, t, s, g, n: each(jacfwd(f), p, n)),
    "vmap of hessian": (
        2,
        lambda f, p, t, s, g, n: each(
            lambda q: hessian(lambda x: loss(f({**q, "x": x})))(q["x"]), p, n
        ),
    ),
    "vmap of forward over reverse": (
        2,
        lambda f, p, t, s, g, n: each(lambda q: jvp(grad(of_loss(f)), (q,), (t,)), p, n),
    ),
    "grad of vmap of grad": (
        2,
        lambda f, p, t, s, g, n: grad(
            lambda p: sum(map(loss, tree_flatten(each(grad(of_loss(f)), p, n))[0]))
        )(p),
    ),
    "jvp of vmap of jvp": (
        2,
        lambda f, p, t, s, g, n: jvp(
            lambda p: each(lambda q: jvp(f, (q,), (t,))[1], p, n), (p,), (s,)
        ),
    ),
}


def mapped(p, activation):
    """The batched tensors: x alone, or all; also the parameters of an ensemble, and some."""
    parameters = [name for name in p if name != "x"]
    biases = [name for name in p if name.startswith("biases")]
    some = [parameters, ["x", "weights[1]"], ["weights[2]"], biases[-1:] or ["weights[0]"]]
    return [["x"], list(p), *(some if activation == "relu" else [])]


@activations
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_vmap(backend, transform, activation):
    order, function = TRANSFORMS[transform]
    bias = BIASES[list(TRANSFORMS).index(transform) % 3]
    arguments = problem(activation, bias)
    for names in mapped(arguments[0], activation):
        compare(lambda *a, n=names: function(*a, n), activation, arguments, order)


@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("transform", ["vmap", "vmap of grad", "vmap of vjp"])
def test_every_tensor(backend, transform, bias):
    """One batched tensor, and every pair."""
    order, function = TRANSFORMS[transform]
    sizes = [2, 3, 2]
    arguments = problem("relu", bias, sizes=sizes)
    names = list(arguments[0])
    for some in [*itertools.combinations(names, 1), *itertools.combinations(names, 2)]:
        compare(lambda *a, n=some: function(*a, n), "relu", arguments, order, sizes)


@pytest.mark.parametrize("shape", [(), (1,), (2, 1, 2), (0,)], ids=str)
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_shapes_of_x(backend, transform, shape):
    if not shape and transform in ("in_dims 1, out_dims 1", "vmap of vmap"):
        shape = (2,)
    order, function = TRANSFORMS[transform]
    sizes = [2, 3, 2]
    arguments = problem(None, "all", shape, sizes)
    for names in (["x"], ["weights[0]", "weights[1]"]):
        compare(lambda *a, n=names: function(*a, n), None, arguments, order, sizes)


@pytest.mark.parametrize("sizes", [[0, 2, 2], [2, 0, 2], [2, 2, 0]], ids=str)
@pytest.mark.parametrize("names", [["x"], ["weights[0]", "weights[1]"], ["biases[0]"]], ids=str)
def test_sizes_of_0(backend, names, sizes):
    arguments = problem("relu", "all", (2,), sizes)
    for transform in ("vmap", "vmap of vjp", "vmap of grad", "vmap of jvp", "vmap of jacrev"):
        order, function = TRANSFORMS[transform]
        compare(lambda *a, n=names, f=function: f(*a, n), "relu", arguments, order, sizes)


@pytest.mark.parametrize("sizes", [[2, 3, 2], [2, 0, 2]], ids=str)
def test_hidden_activations_of_examples(backend, sizes):
    """The raw operator returns every hidden activation with the rows of its example."""
    p, *_ = problem(None, sizes=sizes)
    weights, biases = ([p[f"{kind}[{n}]"] for n in (0, 1)] for kind in ("weights", "biases"))
    for shape in [(), (2,), (2, 2), (0,)]:
        x = integers(EXAMPLES, *shape, 2)
        y, hidden = vmap(lambda x: torch.ops.relu_mlp.forward(x, weights, biases, "none", True))(x)
        singly = [torch.ops.relu_mlp.forward(e, weights, biases, "none", True) for e in x]
        assert_same(y, torch.stack([y for y, _ in singly]))
        for layer, a in enumerate(hidden):
            assert_same(a, torch.stack([hidden[layer] for _, hidden in singly]))


@pytest.mark.parametrize("names", [["x"], ["weights[0]"], ["x", "biases[1]"]], ids=str)
def test_no_examples(backend, names):
    p, *_ = problem("relu", sizes=[2, 3, 2])
    batched = {name: t.new_empty(0, *t.shape) if name in names else t for name, t in p.items()}
    dims = ({name: 0 if name in names else None for name in p},)
    for transform in (lambda f: f, lambda f: grad(of_loss(f))):
        ours, native = (
            vmap(transform(of_names(network, "relu", 2)), in_dims=dims)(batched)
            for network in (relu_mlp, native_mlp)
        )
        for pair in zip(tree_flatten(ours)[0], tree_flatten(native)[0], strict=True):
            assert_same(*pair)


@pytest.mark.parametrize("transform", ["vmap", "vmap of grad", "vmap of jacrev", "vmap of jvp"])
def test_float32(backend, transform):
    order, function = TRANSFORMS[transform]
    for activation in ("relu", "tanh"):
        arguments = problem(activation, "some", dtype=torch.float32)
        for names in (["x"], list(arguments[0])):
            compare(lambda *a, n=names: function(*a, n), activation, arguments, order)


def test_nan_and_infinity(backend):
    """The mask passes NaN, and stops an infinite gradient at a unit that is off."""
    inf, nan = float("inf"), float("nan")
    p, t, s, g = problem("relu")
    p["x"] = torch.tensor([[nan, 1], [inf, -2]], dtype=torch.float64)
    g[0, 0] = inf
    for transform in ("vmap", "vmap of vjp", "vmap of jacrev", "vmap of jvp"):
        order, function = TRANSFORMS[transform]
        for names in (["x"], ["weights[0]", "weights[2]"]):
            compare(lambda *a, n=names, f=function: f(*a, n), "relu", (p, t, s, g), order)


@pytest.mark.parametrize("names", [["x"], ["weights[0]", "weights[1]", "biases[1]"]], ids=str)
def test_gradients_outside(backend, names):
    """vmap of tensors that require gradients, and under no_grad."""

    def outside(f, p):
        p = {name: tensor.clone().requires_grad_() for name, tensor in p.items()}
        y = each(f, p, names)
        with torch.no_grad():
            without = each(f, p, names)
        assert not without.requires_grad
        return [without, *torch.autograd.grad(loss(y), list(p.values()))]

    for activation in ("relu", "tanh"):
        sizes = [2, 3, 2]
        compare(outside, activation, problem(activation, sizes=sizes)[:1], 1, sizes)


# -- The vmap of torch.autograd, which is an older one ------------------------------------------

BATCHED = {
    "gradient": (1, lambda f, p, g: torch.autograd.grad(f(p), of(p), g, is_grads_batched=True)),
    "gradient of x": (
        1,
        lambda f, p, g: torch.autograd.grad(f(p), p["x"], g, is_grads_batched=True),
    ),
    "second derivative": (
        2,
        lambda f, p, g: torch.autograd.grad(
            torch.autograd.grad(loss(f(p)), of(p), create_graph=True),
            of(p),
            [stacked(tensor.detach()) for tensor in of(p)],
            is_grads_batched=True,
        ),
    ),
    "through the gradients": (
        2,
        lambda f, p, g: torch.autograd.grad(
            sum(map(loss, BATCHED["gradient with a graph"][1](f, p, g))), of(p)
        ),
    ),
    "gradient with a graph": (
        1,
        lambda f, p, g: torch.autograd.grad(
            f(p), of(p), g, is_grads_batched=True, create_graph=True
        ),
    ),
    "jacobian": (
        1,
        lambda f, p, g: torch.autograd.functional.jacobian(
            lambda x, w: f({**p, "x": x, "weights[0]": w}),
            (p["x"], p["weights[0]"]),
            vectorize=True,
        ),
    ),
    "jacobian, forward": (
        1,
        lambda f, p, g: torch.autograd.functional.jacobian(
            lambda x, w: f({**p, "x": x, "weights[0]": w}),
            (p["x"], p["weights[0]"]),
            vectorize=True,
            strategy="forward-mode",
        ),
    ),
    "hessian": (
        2,
        lambda f, p, g: torch.autograd.functional.hessian(
            lambda x: loss(f({**p, "x": x})), p["x"], vectorize=True
        ),
    ),
    "hessian, forward": (
        2,
        lambda f, p, g: torch.autograd.functional.hessian(
            lambda x: loss(f({**p, "x": x})),
            p["x"],
            vectorize=True,
            outer_jacobian_strategy="forward-mode",
        ),
    ),
}


def of(p):
    return list(p.values())


@pytest.mark.parametrize("recompute", [False, True], ids=["saved", "recomputed"])
@pytest.mark.parametrize("transform", BATCHED)
def test_batched_gradients(backend, transform, recompute):
    """PyTorch batches its own operations. A call of the fused operator would not be batched."""
    order, function = BATCHED[transform]

    def network(*arguments, **options):
        return relu_mlp(*arguments, recompute=recompute, **options)

    def batched(f, p, g):
        p = {name: tensor.clone().requires_grad_() for name, tensor in p.items()}
        return [result.detach() for result in tree_flatten(function(f, p, stacked(g)))[0]]

    for activation in ("relu", "tanh"):
        p, _, _, g = problem(activation, "some")
        compare(batched, activation, (p, g), order, network=network)


# -- Transforms of torch.autograd.grad of a forward pass that is finished -----------------------


def sum_of(pull):
    return lambda v: sum(map(loss, pull(v)))


FINISHED = {
    "vmap": (1, lambda pull, p, g: vmap(pull)(stacked(g))),
    "vmap of vmap": (1, lambda pull, p, g: vmap(vmap(pull))(stacked(stacked(g)))),
    "jvp": (1, lambda pull, p, g: jvp(pull, (g,), (g.roll(1),))),
    "vmap of jvp": (1, lambda pull, p, g: vmap(lambda v: jvp(pull, (v,), (g,)))(stacked(g))),
    "jacrev": (1, lambda pull, p, g: jacrev(pull)(g)),
    "jacfwd": (1, lambda pull, p, g: jacfwd(pull)(g)),
    "vmap of grad": (2, lambda pull, p, g: vmap(grad(sum_of(pull)))(stacked(g))),
    "gradients of vmap": (
        2,
        lambda pull, p, g: torch.autograd.grad(
            sum(map(loss, vmap(pull)(stacked(g)))), of(p), materialize_grads=True
        ),
    ),
    "vmap of a second derivative": (
        2,
        lambda pull, p, g: vmap(
            lambda u: torch.autograd.grad(
                pull.of_loss, of(p), u, retain_graph=True, materialize_grads=True
            )
        )([stacked(tensor.detach()) for tensor in of(p)]),
    ),
}


@pytest.mark.parametrize("recompute", [False, True], ids=["saved", "recomputed"])
@pytest.mark.parametrize(
    "transform, create_graph",
    [
        (name, graph)
        for name in FINISHED
        for graph in (False, True)
        if graph or FINISHED[name][0] < 2
    ],
)
def test_gradients_of_a_finished_pass(backend, transform, create_graph, recompute):
    order, function = FINISHED[transform]

    def network(*arguments, **options):
        return relu_mlp(*arguments, recompute=recompute, **options)

    def transformed(f, p, g):
        p = {name: tensor.clone().requires_grad_() for name, tensor in p.items()}
        y = f(p)

        def pull(v):
            return torch.autograd.grad(y, of(p), v, retain_graph=True, create_graph=create_graph)

        pull.of_loss = torch.autograd.grad(loss(y), of(p), create_graph=True)
        return [result.detach() for result in tree_flatten(function(pull, p, g))[0]]

    for activation in ("relu", "tanh"):
        p, _, _, g = problem(activation, "some")
        compare(transformed, activation, (p, g), order, network=network)


@pytest.mark.parametrize("needs", ["11111", "10000", "00001"])
@pytest.mark.parametrize("mapped", ["grad_output", "x", "weights", "all"])
def test_recompute_backward(backend, mapped, needs):
    """The operator with batched examples gives the same as a loop."""
    operator = torch.ops.relu_mlp.recompute_backward
    weights, biases = integer_network([3, 4, 2], requires_grad=False)
    given = {"grad_output": [integers(5, 2)], "x": [integers(5, 3)], "weights": weights}
    dims = {name: 0 if mapped in (name, "all") else None for name in given}
    given = {n: [stacked(t) if dims[n] == 0 else t for t in given[n]] for n in given}

    def backward(grad_output, x, weights):
        return operator(*grad_output, *x, weights, biases, "relu", needs)

    results = vmap(backward, in_dims=tuple(dims.values()))(*given.values())
    for n in range(EXAMPLES):
        one = [[t[n] if dims[name] == 0 else t for t in given[name]] for name in given]
        for result, expected in zip(results, backward(*one), strict=True):
            assert_same(result[n], expected)


# -- Ensembles of modules ----------------------------------------------------------------


def ensemble(kind, recompute=False):
    """A function of (parameters, x), and the parameters of three networks, stacked."""
    nets = []
    for n in range(EXAMPLES):
        net = support.twins(3, [4], 2, output_activation="relu", recompute=recompute)[kind]
        nets.append(support.integers_(net.double()))
        with torch.no_grad():
            nets[-1][0].weight += n
    parameters, buffers = stack_module_state(nets)
    base = copy.deepcopy(nets[0]).to("meta")
    return lambda p, x: functional_call(base, (p, buffers), (x,)), parameters


@pytest.mark.parametrize("recompute", [False, True], ids=["saved", "recomputed"])
@pytest.mark.parametrize("x_dim", [None, 0], ids=["one x", "an x for each"])
def test_ensemble_of_modules(backend, x_dim, recompute):
    x = integers(5, 3) if x_dim is None else integers(EXAMPLES, 5, 3)
    results = []
    for kind in (0, 1):
        function, parameters = ensemble(kind, recompute)
        y = vmap(function, (0, x_dim))(parameters, x)
        grads = vmap(grad(lambda p, x, f=function: loss(f(p, x))), (0, x_dim))(parameters, x)
        outer = torch.autograd.grad(loss(y), list(parameters.values()))
        results.append([y.detach(), *map(torch.Tensor.detach, grads.values()), *outer])
    for n, pair in enumerate(zip(*results, strict=True)):
        assert_same(*pair, f"result {n}")


def test_ensemble_built_on_meta(backend):
    _, parameters = ensemble(0)
    base = ReluMLP(3, [4], 2, output_activation="relu", device="meta")
    x = integers(5, 3)
    y = vmap(lambda p: functional_call(base, p, (x,)))(parameters)
    for n in range(EXAMPLES):
        weights = [parameters[f"{layer}.weight"][n] for layer in (0, 2)]
        biases = [parameters[f"{layer}.bias"][n] for layer in (0, 2)]
        assert_same(y[n], native_mlp(x, weights, biases, output_activation="relu"))


# -- Wrong shapes ------------------------------------------------------------------------

#: The name of a tensor, and a wrong shape of its examples. x is (2, 2) and the widths are 2, 3, 2.
WRONG = {
    "x without features": ("x", ()),
    "x of another width": ("x", (2, 3)),
    "weights[0] of another width": ("weights[0]", (3, 4)),
    "weights[1] of another width": ("weights[1]", (2, 2)),
    "a vector for weights[0]": ("weights[0]", (2,)),
    "a cube for weights[1]": ("weights[1]", (1, 2, 3)),
    "biases[0] of another width": ("biases[0]", (2,)),
    "biases[0] of one element": ("biases[0]", (1,)),
    "biases[1] of one element": ("biases[1]", (1,)),
    "biases[1] of no elements": ("biases[1]", (0,)),
    "biases[1] without a dimension": ("biases[1]", ()),
    "a matrix for biases[0]": ("biases[0]", (2, 3)),
}


@pytest.mark.parametrize("others", ["alike", "with x", "with all"])
@pytest.mark.parametrize("case", WRONG)
def test_wrong_shapes(backend, case, others):
    """RuntimeError, also where PyTorch's decomposition under vmap would broadcast a bias."""
    name, shape = WRONG[case]
    p, *_ = problem(None, sizes=[2, 3, 2])
    names = {"alike": [name], "with x": [name, "x"], "with all": list(p)}[others]
    batched, dims = stack(p, names)
    # As many examples as features: the batch dimension must not be mistaken for features.
    batched = {key: t[:2] if dims[key] == 0 else t for key, t in batched.items()}
    batched[name] = integers(2, *shape)
    argument = "weights" if name == "x" and shape else name.partition("[")[0]
    with pytest.raises(RuntimeError, match=argument):
        vmap(of_names(relu_mlp, None, 2), in_dims=(dims,))(batched)


@pytest.mark.parametrize("name", ["weights[0]", "biases[1]"])
def test_wrong_dtypes(backend, name):
    p, *_ = problem(None, sizes=[2, 3, 2])
    p[name] = p[name].float()
    for names in (["x"], [name], list(p)):
        with pytest.raises(RuntimeError, match=r"float64.*float32"):
            each(of_names(relu_mlp, None, 2), p, names)


# -- What runs: one call, and no loop ----------------------------------------------------


def network_of(sizes, rows):
    weights, biases = integer_network(sizes, requires_grad=False)
    return integers(rows, sizes[0]), weights, biases


@pytest.mark.parametrize("examples", [1, 7])
@activations
def test_examples_of_x_are_one_batch(backend, activation, examples):
    x, weights, biases = network_of([3, 4, 4, 2], examples * 2)
    x = x.reshape(examples, 2, 3)

    def f(x):
        return relu_mlp(x, weights, biases, output_activation=activation)

    with support.count_calls() as counts:
        vmap(f)(x)
    assert counts == {"forward": 1, "backward": 0, "loss_and_grads": 0, "native": 0}
    with support.count_calls() as counts:
        vmap(vmap(f))(x)
    assert counts == {"forward": 1, "backward": 0, "loss_and_grads": 0, "native": 0}
    with support.count_calls() as counts:
        vmap(grad(lambda x: loss(f(x))))(x)
    assert counts == {"forward": 1, "backward": 1, "loss_and_grads": 0, "native": 0}
    with support.count_calls() as counts:
        vmap(vmap(grad(lambda x: loss(f(x)))))(x)
    assert counts == {"forward": 1, "backward": 1, "loss_and_grads": 0, "native": 0}


def operations(function):
    with support.dispatched() as found:
        function()
    return [name for name, _ in found]


LOOPS = {
    "x": lambda f, x, w, b: vmap(lambda x: f(x, w, b))(x),
    "per-sample gradients": lambda f, x, w, b: vmap(
        grad(lambda w, b, x: loss(f(x, w, b)), (0, 1)), (None, None, 0)
    )(w, b, x),
    "per-sample Jacobians": lambda f, x, w, b: vmap(jacrev(lambda x: f(x, w, b)))(x),
    "per-sample tangents": lambda f, x, w, b: vmap(lambda x: jvp(lambda w: f(x, w, b), (w,), (w,)))(
        x
    ),
    "ensemble": lambda f, x, w, b: vmap(lambda w, b: f(x[:2], w, b))(*_ensemble(x, w, b)),
    "gradients of an ensemble": lambda f, x, w, b: vmap(
        grad(lambda w, b: loss(f(x[:2], w, b)), (0, 1))
    )(*_ensemble(x, w, b)),
    "gradient through an ensemble": lambda f, x, w, b: grad(
        lambda e: loss(vmap(lambda w, b: f(x[:2], w, b))(*e))
    )(_ensemble(x, w, b)),
}


def _ensemble(x, weights, biases):
    """As many networks as there are rows."""
    return tuple(
        [t.expand(x.shape[0], *t.shape).clone() for t in tensors] for tensors in (weights, biases)
    )


@pytest.mark.parametrize("transform", LOOPS)
def test_no_loop(backend, transform):
    """The number of operations is the same for 17 examples as for 2."""
    few, many = (
        operations(lambda n=n: LOOPS[transform](relu_mlp, *network_of([3, 4, 2], n)))
        for n in (2, 17)
    )
    assert few == many


# -- torch.compile -----------------------------------------------------------------------

COMPILED = {
    "vmap": lambda f, x, w: vmap(lambda x: f(x, w))(x),
    "vmap of weights": lambda f, x, w: vmap(lambda w: f(x[0], w))([stacked(a) for a in w]),
    "vmap of grad": lambda f, x, w: vmap(grad(lambda x: loss(f(x, w))))(x),
    "per-sample gradients": lambda f, x, w: vmap(grad(lambda w, x: loss(f(x, w))), (None, 0))(w, x),
}


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(
    "backend, operator, transform",
    [
        # When compiled, the function runs the native layers on the reference.
        *[(name, "function", "vmap of grad") for name in support.BACKENDS],
        *[(support.BACKENDS[0], "function", n) for n in COMPILED if n != "vmap of grad"],
        *[(name, "relu_mlp", "per-sample gradients") for name in support.BACKENDS],
        *[(name, "forward", "vmap of grad") for name in support.BACKENDS],
    ],
    indirect=["backend"],
)
def test_compiled(backend, transform, operator):
    weights, biases = integer_network([3, 4, 2], requires_grad=False)
    ours = {
        "function": lambda x, w: relu_mlp(x, w, biases),
        "relu_mlp": lambda x, w: torch.ops.relu_mlp.relu_mlp(x, w, biases),
        "forward": lambda x, w: torch.ops.relu_mlp.forward(x, w, biases, "none", False)[0],
    }[operator]
    x = integers(3, 2, 3)
    function = COMPILED[transform]
    compiled = torch.compile(lambda x, w: function(ours, x, w), backend="aot_eager", fullgraph=True)
    expected = function(lambda x, w: native_mlp(x, w, biases), x, weights)
    actual = tree_flatten(compiled(x, weights))[0]
    for n, pair in enumerate(zip(actual, tree_flatten(expected)[0], strict=True)):
        assert_same(*pair, f"result {n}")
