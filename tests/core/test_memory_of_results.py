"""Each result has its own memory wherever it has natively. So in-place changes, as gradient
clipping and optimizers make them, are allowed and affect nothing else.
"""

import itertools

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import nn
from torch.utils._pytree import tree_leaves

import relu_mlp
import support
from relu_mlp import reference

# PyTorch says this about its own code on the first forward-mode derivative.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")


def of_first_order(network, inputs):
    y = network(inputs)
    return list(torch.autograd.grad(y, inputs, torch.randn_like(y), retain_graph=True))


def of_second_order(network, inputs, asked):
    """The gradients that some inputs' gradients send to y, to grad_output and to every input."""
    y = network(inputs)
    grad_output = torch.randn_like(y).requires_grad_()
    wanted = list(itertools.compress(inputs, asked))
    grads = torch.autograd.grad(y, wanted, grad_output, create_graph=True)
    cotangents = [torch.randn_like(grad) for grad in grads]
    sent_on = torch.autograd.grad(
        grads, [y, grad_output, *inputs], cotangents, allow_unused=True, materialize_grads=True
    )
    return [*cotangents, *sent_on]


def of_forward_mode(network, inputs, asked):
    tangents = [torch.randn_like(tensor) for tensor in inputs]
    with forward_ad.dual_level():
        duals = [
            forward_ad.make_dual(tensor.detach(), tangent) if is_asked else tensor.detach()
            for tensor, tangent, is_asked in zip(inputs, tangents, asked, strict=True)
        ]
        y, change = forward_ad.unpack_dual(network(duals))
    return [*tangents, y, change]


def changed_by_each(results, inputs):
    """For each result: which other results and inputs change with it; None if the change raises."""
    everything = [tensor.detach() for tensor in [*results, *inputs]]
    consequences = []
    for n, result in enumerate(everything[: len(results)]):
        before = [tensor.clone() for tensor in everything]
        try:
            result.add_(1)
        except RuntimeError:
            consequences.append(None)
            continue
        pairs = enumerate(zip(everything, before, strict=True))
        consequences.append({m for m, (a, b) in pairs if m != n and not torch.equal(a, b)})
    return consequences


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("activation", [None, "relu", "tanh"], ids=str)
@pytest.mark.parametrize("layers", [1, 3])
def test_derivatives_change_nothing_else(backend, layers, activation, rows):
    sizes = [3, *[4, 3][: layers - 1], 2]

    def inputs():
        torch.manual_seed(1)
        x = torch.randn(rows, 3, dtype=torch.float64, requires_grad=True)
        weights, biases = support.make_network(sizes, requires_grad=True)
        return [x, *weights, *biases]

    def network(function):
        return lambda tensors: function(
            tensors[0],
            list(tensors[1 : 1 + layers]),
            list(tensors[1 + layers :]),
            output_activation=activation,
        )

    count = 1 + 2 * layers
    patterns = [(True,) * count, *[tuple(n == m for n in range(count)) for m in range(count)]]
    cases = [(of_first_order, ())]
    cases += [(kind, (asked,)) for kind in (of_second_order, of_forward_mode) for asked in patterns]
    for kind, asked in cases:
        native, ours = [
            changed_by_each(kind(network(function), tensors, *asked), tensors)
            for function in (support.native_mlp, relu_mlp.relu_mlp)
            for tensors in [inputs()]
        ]
        for n, (theirs, own) in enumerate(zip(native, ours, strict=True)):
            where = f"{kind.__name__} {asked}, result {n}"
            assert theirs is None or own is not None, f"{where} can't be changed"
            assert theirs is None or own <= theirs, f"{where} changes {own - theirs}"


@pytest.mark.parametrize("rows", [1, 4])
def test_the_zeros_of_a_mask_have_their_own_memory(backend, rows):
    """The gradient at an output with a ReLU, for results that depend on the mask alone."""
    net = relu_mlp.ReluMLP(3, [5], 1, output_activation="relu")
    x = torch.ones(rows, 3, requires_grad=True)
    for model in (nn.Sequential(*net.children()), net, net):
        y = model(x)
        (by_x,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        (by_y,) = torch.autograd.grad(by_x.square().sum(), y)
        assert torch.equal(by_y, torch.zeros(rows, 1))
        by_y += 1


def test_the_zeros_at_a_saved_activation_have_their_own_memory(backend):
    """The same for the operators, which take and return the hidden activations."""
    operators = torch.ops.relu_mlp
    x, weights = torch.randn(4, 3, requires_grad=True), [torch.ones(5, 3), torch.ones(1, 5)]
    for _ in range(2):
        y, hidden = operators.forward(x, weights, [], "relu", True)
        saved = [y, *weights, *hidden]
        (by_x,) = operators.backward(y.detach().requires_grad_(), saved, "relu", "10000")
        for grad in torch.autograd.grad(by_x.sum(), [y, *hidden]):
            assert not grad.any()
            grad += 1


def test_the_zeros_of_masks_cost_no_pass_of_their_own(backend, monkeypatch):
    """The backward operator may skip gradients that only masks send to the hidden activations."""
    with_hidden = []
    backward = reference.backward

    def recording(*arguments):
        with_hidden.append(any(grad is not None for grad in [*arguments[4:]][:1]))
        return backward(*arguments)

    monkeypatch.setattr(reference, "backward", recording)
    net, native = support.twins(3, [4, 5], 2, output_activation="tanh", dtype=torch.float64)
    x = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    grads = []
    for model in (native, net):
        (by_x,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        grads.append(torch.autograd.grad(by_x.square().sum(), [x, *model.parameters()]))
    torch.testing.assert_close(*grads)
    assert not any(with_hidden)


def test_zeros_of_a_mask_that_were_changed_on_the_way_count(backend):
    """A hook of the node adds to them in place, and the addition is propagated."""
    results = []
    for in_place in (False, True):
        net, _ = support.twins(3, [4], 2, output_activation="tanh", dtype=torch.float64)
        x = torch.randn(1, 3, dtype=torch.float64).fill_(1).requires_grad_()
        y = net(x)
        (by_x,) = torch.autograd.grad(y.sum(), x, create_graph=True)

        def add_one(grads, in_place=in_place):
            of_y, of_hidden = grads
            return (of_y, of_hidden.add_(1) if in_place else of_hidden + 1)

        y.grad_fn.register_prehook(add_one)
        results.append(torch.autograd.grad(by_x.square().sum(), list(net.parameters())))
    torch.testing.assert_close(*results, rtol=0, atol=0)
    assert results[0][0].any()


@pytest.mark.parametrize("bias", ["all", "some", "none"])
@pytest.mark.parametrize("activation", [None, "tanh"], ids=str)
@pytest.mark.parametrize("layers", [1, 3])
def test_results_without_a_graph_share_no_memory(backend, layers, activation, bias):
    weights, biases = support.make_network([3, *[4, 3][: layers - 1], 2], bias)
    network = (weights, biases)
    settings = {"output_activation": activation}
    for rows in (1, 5):
        x, u = (torch.randn(rows, n, dtype=torch.float64) for n in (3, 2))
        linear = relu_mlp.linearize(x, *network, **settings)
        results = [
            *[
                relu_mlp.loss_and_grads(x, u, *network, loss=loss, **settings)
                for loss in reference.LOSSES
            ],
            relu_mlp.loss_and_grads(
                x, torch.ones(rows).long(), *network, loss="cross_entropy", **settings
            ),
            relu_mlp.jacobian(x, *network, **settings),
            linear.y,
            linear.vjp(u),
            linear.jvp(network),
            linear.row_gradients(u),
            linear.row_norms(u),
            linear.gauss_newton(network),
            linear.jacobian(),
        ]
        tensors = [t for t in tree_leaves([x, u, network, results]) if t is not None]
        places = [tensor.untyped_storage().data_ptr() for tensor in tensors]
        assert len(set(places)) == len(places)
        assert all(t.untyped_storage().nbytes() == t.nbytes for t in tensors)
