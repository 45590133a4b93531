"""torch.compile of derivatives. The fused layers compile wherever the native ones do, with the same
values, also at a second width, in fake tensor modes and in graphs of symbolic sizes.

Most tests use integers, for which every sum is exact; tanh is compared within the bounds of
support/bounds.py.
"""

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.export import Dim, export
from torch.func import grad, jvp, vjp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_leaves, tree_map

import relu_mlp
import support
from support import assert_same, integer_network, integers

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated:FutureWarning"),
]


@pytest.fixture(autouse=True)
def fresh():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def squares(tensors):
    return sum(tensor.square().sum() for tensor in tree_leaves(tensors))


def ones_like(p):
    return tree_map(torch.ones_like, p)


def examples_of(p):
    return tree_map(lambda tensor: torch.stack([tensor, 2 * tensor]), p)


# f is the network as a function of a dict of tensors, p is that dict, and `of` is the loss.
TRANSFORMS = {
    "value": lambda f, p, of: f(p),
    "grad": lambda f, p, of: grad(lambda p: of(f(p)))(p),
    "vmap of grad": lambda f, p, of: vmap(grad(lambda p: of(f(p))))(examples_of(p)),
    "jvp": lambda f, p, of: jvp(f, (p,), (ones_like(p),)),
    "jvp of grad": lambda f, p, of: jvp(grad(lambda p: of(f(p))), (p,), (ones_like(p),)),
    "vjp of grad": lambda f, p, of: vjp(grad(lambda p: of(f(p))), p)[1](ones_like(p)),
    "gradient penalty": lambda f, p, of: grad(lambda p: squares(grad(lambda p: of(f(p)))(p)))(p),
}


def tensors_of(width=4):
    torch.manual_seed(width)
    weights, biases = integer_network([3, width, 2], requires_grad=False, largest=1)
    return {"x": integers(3, 3, largest=1), "w0": weights[0], "w1": weights[1], "b0": biases[0]}


def derivative(network, transform, of, names, activation):
    """A function of the tensors of a network whose last layer has no bias."""

    def function(given):
        def f(p):
            p = {**given, **p}
            return network(
                p["x"], [p["w0"], p["w1"]], [p["b0"], None], output_activation=activation
            )

        chosen = {name: tensor for name, tensor in given.items() if name[0] in names}
        return tree_leaves(TRANSFORMS[transform](f, chosen, of))

    return function


def assert_alike(actual, expected, activation):
    for n, (ours, native) in enumerate(zip(actual, expected, strict=True)):
        if activation == "relu":
            assert_same(ours, native, f"result {n}")
        else:
            torch.testing.assert_close(ours, native, msg=f"result {n}")


CASES = [  # transform, its loss, the tensors to differentiate by, output activation, compiler
    ("grad", torch.sum, "x", "relu", "aot_eager"),
    ("vmap of grad", torch.sum, "x", "relu", "aot_eager"),
    ("jvp", squares, "xwb", "tanh", "aot_eager"),
    ("jvp of grad", torch.sum, "xw", "relu", "aot_eager"),
    ("vjp of grad", torch.sum, "x", "tanh", "eager"),
    ("gradient penalty", torch.sum, "w", "tanh", "aot_eager"),
    ("gradient penalty", squares, "xwb", "relu", "eager"),
]


@pytest.mark.parametrize("transform, of, names, activation, compiler", CASES)
def test_compiled(transform, of, names, activation, compiler):
    arguments = (transform, of, names, activation)
    compiled = torch.compile(
        derivative(relu_mlp.relu_mlp, *arguments), backend=compiler, fullgraph=True
    )
    given = tensors_of()
    assert_alike(compiled(given), derivative(support.native_mlp, *arguments)(given), activation)


@pytest.mark.parametrize("dynamic", [None, True], ids=["by itself", "from the start"])
@pytest.mark.parametrize("transform", ["value", "gradient penalty"])
def test_compiled_for_another_width(transform, dynamic):
    arguments = (transform, squares, "w", "relu")
    compiled = torch.compile(
        derivative(relu_mlp.relu_mlp, *arguments), backend="eager", dynamic=dynamic, fullgraph=True
    )
    for width in (4, 8):
        given = tensors_of(width)
        assert_alike(compiled(given), derivative(support.native_mlp, *arguments)(given), "relu")


def test_exported_with_any_width():
    class Network(torch.nn.Module):
        def forward(self, x, w0, b0, w1):
            return relu_mlp.relu_mlp(x, [w0, w1], [b0, None])

    rows, width = Dim("rows"), Dim("width")
    shapes = ({0: rows}, {0: width}, {0: width}, {1: width})
    given = {width: [tensors_of(width)[n] for n in ("x", "w0", "b0", "w1")] for width in (4, 8)}
    exported = export(Network(), tuple(given[4]), dynamic_shapes=shapes).module()
    for x, w0, b0, w1 in given.values():
        x = torch.cat([x, x])
        assert_same(exported(x, w0, b0, w1), support.native_mlp(x, [w0, w1], [b0, None]))


@pytest.mark.parametrize("transform", ["value", "jvp", "gradient penalty"])
def test_graph_with_symbolic_sizes(backend, transform):
    """With make_fx, which compiles no fake tensor."""
    arguments = (transform, squares, "xwb", "tanh")
    ours, native = (derivative(f, *arguments) for f in (relu_mlp.relu_mlp, support.native_mlp))
    graph = make_fx(ours, tracing_mode="symbolic")(tensors_of(4))
    for width in (4, 8):
        given = tensors_of(width)
        assert_alike(graph(given), native(given), "tanh")


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_shapes_in_a_fake_tensor_mode(backend, transform):
    """Below a transform, its tensors are fake, and so is the placeholder of the missing bias."""
    shapes = []
    for network in (support.native_mlp, relu_mlp.relu_mlp):
        with FakeTensorMode() as mode:
            given = {name: mode.from_tensor(tensor) for name, tensor in tensors_of().items()}
            results = derivative(network, transform, torch.sum, "xwb", "relu")(given)
        shapes.append([(type(result), result.shape, result.dtype) for result in results])
    assert shapes[0] == shapes[1]


def test_functions_without_a_graph_in_a_fake_tensor_mode(backend):
    with FakeTensorMode() as mode:
        x, w0, w1, b0 = map(mode.from_tensor, tensors_of().values())
        network = (x, [w0, w1], [b0, None])
        loss = relu_mlp.loss_and_grads(x, x.new_ones(3, 2), *network[1:])
        entries = relu_mlp.jacobian(*network)
        assert [None if b is None else b.shape for b in loss.biases] == [b0.shape, None]
        assert entries.biases[0].shape == (3, 2, *b0.shape) and entries.biases[1] is None


def test_second_derivative_of_fake_tensors(backend):
    """Uses the operators, which serve fake tensors while a graph of them is recorded."""
    with FakeTensorMode() as mode:
        given = {n: mode.from_tensor(t).requires_grad_() for n, t in tensors_of().items()}
        weights, biases = [given["w0"], given["w1"]], [given["b0"], torch.empty(0)]
        y = torch.ops.relu_mlp.relu_mlp(given["x"], weights, biases, "relu")
        grads = torch.autograd.grad(y.sum(), list(given.values()), create_graph=True)
        of = list(given.values())
        second = torch.autograd.grad(squares(grads), of)
        assert [grad.shape for grad in second] == [tensor.shape for tensor in of]


def test_opcheck_of_backward_with_saved_tensors_that_require_gradients(backend):
    operators = torch.ops.relu_mlp
    given = tensors_of()
    y, hidden = operators.forward(given["x"], [given["w0"], given["w1"]], [], "tanh", True)
    saved = [t.detach().requires_grad_() for t in (y, given["w0"], given["w1"], *hidden)]
    grad_output = torch.randn_like(y).requires_grad_()
    torch.library.opcheck(operators.backward.default, (grad_output, saved, "tanh", "10000"))
