"""`ReluMLP` behaves like the `nn.Sequential` that it replaces, and runs fused where it can.

Where values are compared, parameters and inputs are small integers. Then every gradient is an
integer too, each sum of products is exact in any order, and the results must agree to the last bit.
Many pre-activations are exactly 0.
"""

import copy
import io
import pickle
from collections import OrderedDict

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import nn
from torch.nn.modules import module as module_hooks
from torch.nn.utils import parametrizations, parametrize, prune

import support
from relu_mlp import ReluMLP

# Forward-mode differentiation loads decompositions that PyTorch writes in TorchScript.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")


def pair(in_features=3, hidden=(6, 5), out_features=4, **arguments):
    net, sequential = support.twins(in_features, hidden, out_features, **arguments)
    return support.integers_(net), support.integers_(sequential)


def integer_input(*shape, dtype=torch.float32):
    return torch.randint(-2, 3, shape).to(dtype).requires_grad_()


def run(module, x):
    """The output, and the gradients of x and of all parameters."""
    x = x.detach().clone().requires_grad_()
    module.zero_grad()
    y = module(x)
    # an integer weight for every output
    y.backward((torch.arange(y.numel()) % 5 - 2).reshape(y.shape).to(y.dtype))
    return [y.detach(), x.grad, *[p.grad for p in module.parameters()]]


def same(actual, expected):
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected, strict=True):
        assert (a is None) == (e is None)
        assert a is None or (a.dtype == e.dtype and torch.equal(a, e))


def same_as_native(net, sequential, fused, x=None):
    """Both give the same results, and `net` makes `fused` forward and backward calls."""
    x = integer_input(7, 3) if x is None else x
    with support.count_calls() as calls:
        actual = run(net, x)
    assert (calls["forward"], calls["backward"]) == (fused, fused)
    if fused == 0:
        assert calls["native"] > 0
    same(actual, run(sequential, x))


# -- What it is ------------------------------------------------------------------


def test_is_a_sequential_of_real_layers():
    net = ReluMLP(3, [6, 5], 4)
    assert isinstance(net, nn.Sequential)
    assert [type(m) for m in net] == [nn.Linear, nn.ReLU, nn.Linear, nn.ReLU, nn.Linear]
    assert [name for name, _ in net.named_children()] == list("01234")
    assert net[0].weight.shape == (6, 3)
    assert net[-1] is net[4]
    assert len(net) == 5


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("hidden", [(), (6,), (6, 5)], ids=str)
@pytest.mark.parametrize("activation", support.ACTIVATIONS)
def test_same_initial_values_and_keys(hidden, bias, activation):
    arguments = {"bias": bias, "output_activation": activation}
    net, sequential = support.twins(3, hidden, 4, **arguments)
    ours, native = net.state_dict(), sequential.state_dict()
    assert list(ours) == list(native)
    assert all(torch.equal(ours[key], native[key]) for key in native)
    assert [type(m) for m in net] == [type(m) for m in sequential]
    # ... and the generator is left where the native constructor leaves it
    torch.manual_seed(0)
    ReluMLP(3, hidden, 4, **arguments)
    state = torch.get_rng_state()
    torch.manual_seed(0)
    support.twins(3, hidden, 4, seed=0, **arguments)  # the native constructor raises too
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    "hidden", [5, [5], (5,), iter([5]), torch.Size([5])], ids=lambda h: type(h).__name__
)
def test_hidden_features(hidden):
    assert [m.out_features for m in ReluMLP(3, hidden, 2) if isinstance(m, nn.Linear)] == [5, 2]


def test_no_hidden_layer_is_the_linear_model(backend):
    net, sequential = pair(hidden=())
    assert len(net) == 1
    same_as_native(net, sequential, fused=1)


@pytest.mark.parametrize("hidden", [0, -1, [0], [5, 0], [5, -3]], ids=str)
def test_hidden_width_below_1(hidden):
    with pytest.raises(ValueError, match=r"hidden_features(\[\d\])? must be at least 1, got -?\d"):
        ReluMLP(3, hidden, 2)


@pytest.mark.parametrize("hidden", [5.0, None, [5, 2.5], ["5"], [[5]]], ids=str)
def test_hidden_width_not_an_int(hidden):
    with pytest.raises(TypeError, match="hidden_features"):
        ReluMLP(3, hidden, 2)


def test_sizes_not_ints():
    with pytest.raises(TypeError, match="in_features must be an int, got float"):
        ReluMLP(3.0, 5, 2)
    with pytest.raises(TypeError, match="out_features must be an int, got str"):
        ReluMLP(3, 5, "2")


@pytest.mark.parametrize("activation", ["gelu", "", "ReLU", nn.ReLU, nn.ReLU(), ["relu"]], ids=str)
def test_unknown_activation(activation):
    with pytest.raises(ValueError, match="output_activation must be"):
        ReluMLP(3, 5, 2, output_activation=activation)


# -- One operator each way -----------------------------------------------------------


@pytest.mark.parametrize("hidden", [(6,), (6, 5), (6, 5, 4, 3)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("recompute", [False, True])
def test_one_fused_forward_and_one_backward(backend, hidden, bias, recompute):
    net, sequential = pair(hidden=hidden, bias=bias, recompute=recompute)
    x = integer_input(7, 3)
    with support.count_calls() as calls:
        actual = run(net, x)
    # recomputing is a second forward call
    assert calls == {"forward": 1, "backward": 1, "loss_and_grads": 0, "native": 0}
    same(actual, run(sequential, x))


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_one_fused_forward_without_gradients(backend, context):
    net, sequential = pair()
    with context():
        x = integer_input(2, 7, 3)
        with support.count_calls() as calls:
            y = net(x)
        assert calls == {"forward": 1, "backward": 0, "loss_and_grads": 0, "native": 0}
        assert torch.equal(y, sequential(x))
        assert not y.requires_grad


@pytest.mark.parametrize("activation", support.ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_output_activations(backend, activation, dtype):
    # sigmoid and tanh round: they are compared with float64, within derived bounds
    net, sequential = support.twins(3, [6, 5], 4, output_activation=activation, dtype=dtype)
    x = torch.randn(9, 3, dtype=dtype)
    with torch.no_grad():
        hidden = [sequential[:n](x) for n in (2, 4)]
    grad_output = torch.randn(9, 4, dtype=dtype)
    for module, fused in ((net, 1), (sequential, 0)):
        weights, biases = support.layers_of(module)
        leaf = x.clone().requires_grad_()
        with support.count_calls() as calls:
            y = module(leaf)
            y.backward(grad_output)
        assert (calls["forward"], calls["backward"]) == (fused, fused)
        exact = support.Exact(x, weights, biases, activation, hidden, y)
        exact.y.check(y, "y")
        grads = exact.backward(grad_output)
        grads["x"].check(leaf.grad, "x.grad")
        for layer, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
            grads[f"weights[{layer}]"].check(weight.grad, f"{layer}.weight.grad")
            grads[f"biases[{layer}]"].check(bias.grad, f"{layer}.bias.grad")


def test_recompute_is_an_attribute(backend):
    net, sequential = pair()
    assert net.recompute is False
    assert ReluMLP(3, 5, 2, recompute=True).recompute is True
    x = integer_input(7, 3)
    expected = run(sequential, x)
    for recompute in (True, False):
        net.recompute = recompute
        with support.saved_tensors() as saved:
            same(run(net, x), expected)
        hidden = [tensor for tensor in saved if tensor.shape == (7, net[0].out_features)]
        assert len(hidden) == (not recompute)
    assert "recompute" not in net.state_dict()
    assert copy.deepcopy(ReluMLP(3, 5, 2, recompute=True)).recompute is True


@pytest.mark.parametrize("dtype", support.DTYPES, ids=str)
def test_dtype_argument_and_conversions(backend, dtype):
    # Below 2^8 every integer is exact in bfloat16. A narrow network stays below.
    made, native = pair(2, (3,), 2, dtype=dtype)
    converted = support.integers_(ReluMLP(2, (3,), 2)).to(dtype)
    by_name = {torch.float64: "double", torch.float32: "float", torch.bfloat16: "bfloat16"}
    named = getattr(support.integers_(ReluMLP(2, (3,), 2)), by_name.get(dtype, "half"))()
    for net in (made, converted, named):
        assert all(p.dtype == dtype for p in net.parameters())
        same_as_native(net, native, fused=1, x=integer_input(3, 2, dtype=dtype))


def test_train_and_eval(backend):
    net, sequential = pair()
    assert net.eval() is net
    assert not any(m.training for m in net.modules())
    same_as_native(net, sequential.eval(), fused=1)
    net.train()
    assert all(m.training for m in net.modules())


def test_requires_grad_false(backend):
    net, sequential = pair()
    net.requires_grad_(False)
    sequential.requires_grad_(False)
    same_as_native(net, sequential, fused=1)
    assert all(p.grad is None for p in net.parameters())
    assert not net(integer_input(7, 3).detach()).requires_grad


def test_partly_frozen(backend):
    net, sequential = pair()
    for module in (net, sequential):
        module[0].requires_grad_(False)
        module[2].bias.requires_grad_(False)
    same_as_native(net, sequential, fused=1)
    assert net[0].weight.grad is None
    assert net[2].bias.grad is None


def test_the_module_itself_may_have_hooks(backend):
    net, sequential = pair()
    seen = []
    for module in (net, sequential):
        module.register_forward_hook(lambda m, args, y: seen.append("forward"))
        module.register_forward_pre_hook(lambda m, args: seen.append("pre"))
        module.register_full_backward_hook(lambda m, gi, go: seen.append("backward"))
    same_as_native(net, sequential, fused=1)
    assert seen == ["pre", "forward", "backward"] * 2


# -- State ---------------------------------------------------------------------------


@pytest.mark.parametrize("assign", [False, True])
def test_state_dict_loads_both_ways(backend, assign):
    net, sequential = pair()
    fresh_net, fresh = support.twins(3, (6, 5), 4, seed=5)
    state = sequential.state_dict()
    fresh_net.load_state_dict(state, strict=True, assign=assign)
    fresh.load_state_dict(net.state_dict(), strict=True, assign=assign)
    assert (fresh_net[0].weight.data_ptr() == state["0.weight"].data_ptr()) == assign
    same_as_native(fresh_net, fresh, fused=1)
    same(run(fresh_net, integer_input(7, 3).detach().fill_(1)), run(net, torch.ones(7, 3)))
    with pytest.raises(RuntimeError, match="Missing key"):
        net.load_state_dict(nn.Sequential(nn.Linear(3, 6)).state_dict(), strict=True)


def test_load_state_dict_assign_to_meta(backend):
    _, sequential = pair()
    empty = ReluMLP(3, (6, 5), 4, device="meta")
    empty.load_state_dict(sequential.state_dict(), assign=True)
    same_as_native(empty, sequential, fused=1)


def copies():
    def saved(net):
        file = io.BytesIO()
        torch.save(net, file)
        file.seek(0)
        return torch.load(file, weights_only=False)

    return {
        "deepcopy": copy.deepcopy,
        "copy": copy.copy,
        "pickle": lambda net: pickle.loads(pickle.dumps(net)),
        "save": saved,
    }


@pytest.mark.parametrize("way", copies())
def test_copies(backend, way):
    net, sequential = pair(recompute=False)
    run(net, integer_input(7, 3))  # leaves gradients and anything that might be cached
    other = copies()[way](net)
    assert type(other) is ReluMLP
    assert other is not net
    shares = [a is b for a, b in zip(net.parameters(), other.parameters(), strict=True)]
    assert all(shares) if way == "copy" else not any(shares)
    same_as_native(other, sequential, fused=1)
    with torch.no_grad():
        other[0].weight += 1
        changed = sequential if way == "copy" else support.integers_(copy.deepcopy(sequential))
        changed[0].weight += 1
    same_as_native(other, changed, fused=1)
    # the original follows a shallow copy, which has the same children, but no other copy
    same_as_native(net, changed if way == "copy" else sequential, fused=1)


def test_a_shallow_copy_replaces_children_as_that_of_a_sequential(backend):
    net, sequential = pair()
    other, native = copy.copy(net), copy.copy(sequential)
    new = support.integers_(nn.Linear(5, 4))
    other[4] = native[4] = new
    same_as_native(net, sequential, fused=1)
    same_as_native(other, native, fused=1)


def test_weights_only_checkpoint(tmp_path, backend):
    net, sequential = pair()
    torch.save(net.state_dict(), tmp_path / "net.pt")
    other = support.twins(3, (6, 5), 4, seed=9)[0]
    other.load_state_dict(torch.load(tmp_path / "net.pt", weights_only=True))
    same_as_native(other, sequential, fused=1)


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW"])
def test_optimizers(backend, name):
    net, sequential = pair()
    assert [n for n, _ in net.named_parameters()] == [n for n, _ in sequential.named_parameters()]
    x = integer_input(7, 3)
    for module in (net, sequential):
        optimizer = getattr(torch.optim, name)(module.parameters(), lr=0.25)
        run(module, x)
        optimizer.step()
        optimizer.zero_grad()
        assert all(p.grad is None for p in module.parameters())
    # The gradients were equal, so the updates are too: the same code made them.
    same(list(net.parameters()), list(sequential.parameters()))


def test_changed_parameters_count_at_once(backend):
    net, sequential = pair()
    x = integer_input(7, 3)
    same(run(net, x), run(sequential, x))
    for change in (
        lambda m: m[2].weight.data.mul_(2),
        lambda m: setattr(m[0], "weight", nn.Parameter(torch.ones(6, 3))),
        lambda m: setattr(m[4], "bias", None),
        lambda m: setattr(m[4], "bias", nn.Parameter(torch.ones(4))),
        lambda m: setattr(m[0].weight, "data", torch.zeros(6, 3)),
        lambda m: m.apply(
            lambda child: (
                child.register_parameter("bias", None) if isinstance(child, nn.Linear) else None
            )
        ),
    ):
        with torch.no_grad():
            change(net)
            change(sequential)
        same_as_native(net, sequential, fused=1, x=x)


def test_functional_call(backend):
    net, sequential = pair()
    others = {
        name: torch.randint(-2, 3, p.shape).float().requires_grad_()
        for name, p in net.named_parameters()
    }
    x = integer_input(7, 3)
    results = []
    for module in (net, sequential):
        y = torch.func.functional_call(module, others, (x,))
        grads = torch.autograd.grad(y.sum(), [x, *others.values()])
        results.append([y.detach(), *grads])
        assert all(p.grad is None for p in module.parameters())
    same(*results)
    same_as_native(net, sequential, fused=1)  # it has its own parameters again


def test_meta():
    net = ReluMLP(3, [6, 5], 4, device="meta")
    assert all(p.is_meta for p in net.parameters())
    x = torch.empty(2, 7, 3, device="meta", requires_grad=True)
    y = net(x)
    assert y.is_meta
    assert y.shape == (2, 7, 4)
    assert y.dtype == torch.float32
    y.sum().backward()
    assert x.grad.is_meta
    assert net[0].weight.grad.shape == (6, 3)
    net.to_empty(device="cpu")
    _, sequential = pair()
    net.load_state_dict(sequential.state_dict())
    net.zero_grad(set_to_none=True)
    same_as_native(net, sequential, fused=1)


# -- Children --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "index",
    [slice(None, -1), slice(1, None), slice(0, 3), slice(None, None, 2), slice(5, 9)],
    ids=str,
)
def test_slices_are_plain(backend, index):
    net, sequential = pair()
    part, native = net[index], sequential[index]
    assert type(part) is nn.Sequential
    assert list(part._modules) == list(native._modules)
    assert all(child in list(net) for child in part)


def test_slices_run(backend):
    net, sequential = pair()
    same(
        run(net[:-1], integer_input(7, 3).detach().fill_(1)), run(sequential[:-1], torch.ones(7, 3))
    )
    assert net[-1] is net[4]
    assert net[0] is next(iter(net))
    with pytest.raises(IndexError):
        net[5]


def delete_last(net):
    del net[-1]


def delete_first_layer(net):
    del net[0:2]


def append(net):
    net.append(nn.ReLU())
    net.append(support.integers_(nn.Linear(4, 2)))


def append_linear(net):
    net.append(support.integers_(nn.Linear(4, 2)))


def insert(net):
    net.insert(0, support.integers_(nn.Linear(3, 3)))
    net.insert(1, nn.ReLU())


def insert_flatten(net):
    net.insert(0, nn.Flatten())


def replace(net):
    net[2] = support.integers_(nn.Linear(6, 5, bias=False))


def replace_by_name(net):
    setattr(net, "4", support.integers_(nn.Linear(5, 1)))


def add_module(net):
    net.add_module("more", nn.Hardtanh(-3, 3))


def extend(net):
    net.extend([nn.ReLU(), support.integers_(nn.Linear(4, 4))])


def empty(net):
    while len(net):
        del net[0]


@pytest.mark.parametrize(
    "edit",
    [delete_last, delete_first_layer, append, append_linear, insert, insert_flatten, replace,
     replace_by_name, add_module, extend, empty],
)  # fmt: skip
def test_edited_children(backend, edit):
    net, sequential = pair()
    x = integer_input(7, 6 if edit is delete_first_layer else 3)
    if edit is not delete_first_layer:
        run(net, x)  # nothing that was cached before may be used afterwards
    edit(net)
    edit(sequential)
    assert list(net.state_dict()) == list(sequential.state_dict())
    same(run(net, x), run(sequential, x))


@pytest.mark.parametrize("edit", [append, insert, replace, replace_by_name, extend])
def test_edited_children_that_still_are_a_network_run_fused(backend, edit):
    net, sequential = pair()
    edit(net)
    edit(sequential)
    same_as_native(net, sequential, fused=1)


def test_concatenation_and_repetition(backend):
    net, sequential = pair(out_features=3)
    x = integer_input(7, 3)
    for combine in (lambda m: m + m, lambda m: m * 2):
        same(run(combine(net), x), run(combine(sequential), x))


# -- from_sequential ---------------------------------------------------------------------


def test_from_sequential_shares_parameters(backend):
    sequential = support.integers_(
        nn.Sequential(
            nn.Linear(3, 6), nn.ReLU(inplace=True), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4)
        )
    )
    net = ReluMLP.from_sequential(sequential)
    assert type(net) is ReluMLP
    assert type(sequential) is nn.Sequential
    assert all(a is b for a, b in zip(net.parameters(), sequential.parameters(), strict=True))
    assert list(net.state_dict()) == list(sequential.state_dict())
    same_as_native(net, sequential, fused=1)
    assert ReluMLP.from_sequential(sequential.eval(), recompute=True).recompute is True
    assert not ReluMLP.from_sequential(sequential).training


@pytest.mark.parametrize("activation", [nn.ReLU, nn.Sigmoid, nn.Tanh, None])
def test_from_sequential_with_names_and_one_relu_reused(backend, activation):
    relu = nn.ReLU(inplace=True)
    children = {"first": nn.Linear(3, 6), "on": relu, "second": nn.Linear(6, 5), "again": relu}
    children["third"] = nn.Linear(5, 4, bias=False)
    if activation:
        children["out"] = activation()
    sequential = support.integers_(nn.Sequential(OrderedDict(children)))
    net = ReluMLP.from_sequential(sequential)
    assert list(net._modules) == list(children)
    x = integer_input(7, 3)
    with support.count_calls() as calls:
        y = net(x)
    assert calls["forward"] == 1
    assert calls["native"] == 0
    # z is exact; sigmoid and tanh may differ by the few roundings of `support.Exact`
    few = {nn.Sigmoid: 8, nn.Tanh: 8}.get(activation, 0) * torch.finfo(torch.float32).eps / 2
    assert ((y - sequential(x)).abs() <= few).all()


@pytest.mark.parametrize(
    "children",
    [
        [],
        [nn.ReLU()],
        [nn.ReLU(), nn.Linear(3, 4)],
        [nn.Linear(3, 3), nn.Linear(3, 3)],
        [nn.Linear(3, 3), nn.GELU(), nn.Linear(3, 3)],
        [nn.Linear(3, 3), nn.ReLU(), nn.Dropout(), nn.Linear(3, 3)],
        [nn.Linear(3, 3), nn.ReLU6(), nn.Linear(3, 3)],
        [nn.Linear(3, 3), nn.ReLU(), nn.Bilinear(3, 3, 3)],
        [nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)],
        [nn.Linear(3, 3), nn.ReLU(), nn.ReLU()],
        [nn.Sequential(nn.Linear(3, 3), nn.ReLU()), nn.Linear(3, 3)],
        [nn.Linear(3, 3), nn.ReLU(), type("MyLinear", (nn.Linear,), {})(3, 3)],
    ],
    ids=lambda children: "-".join(type(c).__name__ for c in children) or "empty",
)
def test_from_sequential_of_other_children(children):
    with pytest.raises(ValueError, match="sequential must have the children"):
        ReluMLP.from_sequential(nn.Sequential(*children))


@pytest.mark.parametrize(
    "wrong",
    [nn.Linear(3, 4), nn.ModuleList([nn.Linear(3, 4)]), [nn.Linear(3, 4)], None],
    ids=lambda w: type(w).__name__,
)
def test_from_sequential_of_something_else(wrong):
    with pytest.raises(TypeError, match=r"sequential must be an nn\.Sequential, got"):
        ReluMLP.from_sequential(wrong)


# -- Where the children must run one by one ---------------------------------------------

HOOKS = {
    "forward": lambda child, seen: child.register_forward_hook(lambda *a: seen.append("forward")),
    "forward_kwargs": lambda child, seen: child.register_forward_hook(
        lambda *a: seen.append("kwargs"), with_kwargs=True
    ),
    "forward_pre": lambda child, seen: child.register_forward_pre_hook(
        lambda *a: seen.append("pre")
    ),
    "backward": lambda child, seen: child.register_full_backward_hook(
        lambda *a: seen.append("backward")
    ),
    "backward_pre": lambda child, seen: child.register_full_backward_pre_hook(
        lambda *a: seen.append("backward_pre")
    ),
}


@pytest.mark.parametrize("position", range(5))
@pytest.mark.parametrize("hook", HOOKS)
def test_hooks_on_children(backend, hook, position):
    net, sequential = pair()
    run(net, integer_input(7, 3))
    logs = [], []
    handles = [
        HOOKS[hook](module[position], seen)
        for module, seen in zip((net, sequential), logs, strict=True)
    ]
    same_as_native(net, sequential, fused=0)
    assert logs[0] == logs[1]
    assert len(logs[0]) == 1
    for handle in handles:
        handle.remove()
    same_as_native(net, sequential, fused=1)
    assert len(logs[0]) == 1


@pytest.mark.parametrize("position", range(5))
def test_a_hook_that_changes_the_output(backend, position):
    net, sequential = pair()
    for module in (net, sequential):
        module[position].register_forward_hook(lambda m, args, y: 2 * y + 1)
    same_as_native(net, sequential, fused=0)


@pytest.mark.parametrize(
    "register",
    ["forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook"],
)
def test_global_hooks(backend, register):
    net, sequential = pair()
    seen = []
    handle = getattr(module_hooks, f"register_module_{register}")(
        lambda module, *arguments: seen.append(type(module).__name__)
    )
    x = integer_input(7, 3)
    try:
        with support.count_calls() as calls:
            actual = run(net, x)
        ours, seen[:] = list(seen), []
        expected = run(sequential, x)
    finally:
        handle.remove()
    same(actual, expected)
    assert calls["forward"] == calls["backward"] == 0
    assert [name.replace("ReluMLP", "Sequential") for name in ours] == seen
    assert len(seen) == 6
    assert seen.count("Linear") == 3
    same_as_native(net, sequential, fused=1)


@pytest.mark.parametrize("position", range(5))
def test_forward_overridden_on_a_child(backend, position):
    net, sequential = pair()
    run(net, integer_input(7, 3))
    for module in (net, sequential):
        child = module[position]
        child.forward = lambda x, child=child: 3 * type(child).forward(child, x)
    same_as_native(net, sequential, fused=0)
    del net[position].forward, sequential[position].forward
    same_as_native(net, sequential, fused=1)


@pytest.mark.parametrize("kind", [nn.Linear, nn.ReLU])
def test_forward_replaced_on_the_class(backend, kind, monkeypatch):
    net, sequential = pair()
    original = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, x: 3 * original(self, x))
    same_as_native(net, sequential, fused=0)
    monkeypatch.undo()
    same_as_native(net, sequential, fused=1)


class Negated(nn.Module):
    def forward(self, weight):
        return -weight

    def right_inverse(self, weight):
        return -weight


@pytest.mark.parametrize("position", [0, 2, 4])
def test_parametrization(backend, position):
    net, sequential = pair()
    for module in (net, sequential):
        parametrize.register_parametrization(module[position], "weight", Negated())
    same_as_native(net, sequential, fused=0)
    for module in (net, sequential):
        parametrize.remove_parametrizations(module[position], "weight")
    assert type(net[position]) is nn.Linear
    same_as_native(net, sequential, fused=1)


@pytest.mark.parametrize("name", ["weight_norm", "spectral_norm"])
def test_norms(backend, name):
    net, sequential = pair()
    for module in (net, sequential):
        torch.manual_seed(3)  # spectral_norm starts from a random vector
        getattr(parametrizations, name)(module[2])
    assert list(net.state_dict()) == list(sequential.state_dict())
    same_as_native(net.eval(), sequential.eval(), fused=0)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_old_weight_norm(backend):
    net, sequential = pair()
    for module in (net, sequential):
        nn.utils.weight_norm(module[2])
    same_as_native(net, sequential, fused=0)


@pytest.mark.parametrize("what", ["weight", "bias"])
def test_pruning(backend, what):
    net, sequential = pair()
    for module in (net, sequential):
        prune.l1_unstructured(module[2], what, amount=2)
    same_as_native(net, sequential, fused=0)
    for module in (net, sequential):
        prune.remove(module[2], what)
    assert (getattr(net[2], what) == 0).sum() >= 2
    # `remove` puts the pruned parameter back in its place but at the end of the dict
    same_as_native(net, sequential, fused=1)


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class SubclassedLinear(nn.Linear):
    pass


def replacements():
    return {
        "subclass of Linear": (2, lambda: support.integers_(Doubled(6, 5))),
        "empty subclass of Linear": (2, lambda: support.integers_(SubclassedLinear(6, 5))),
        "subclass at the end": (4, lambda: support.integers_(Doubled(5, 4))),
        "leaky": (1, lambda: nn.LeakyReLU(0.5)),
        "dropout": (3, lambda: nn.Dropout(0.5)),
        "identity": (1, lambda: nn.Identity()),
        "gelu": (1, lambda: nn.GELU()),
    }


@pytest.mark.parametrize("what", replacements())
def test_replaced_children(backend, what):
    position, make = replacements()[what]
    net, sequential = pair()
    run(net, integer_input(7, 3))
    child = make()
    for module in (net, sequential):
        module[position] = child
    x = integer_input(7, 3)
    results = []
    for module in (net, sequential):
        torch.manual_seed(4)  # for the dropout
        with support.count_calls() as calls:
            results.append(run(module, x))
        assert calls["forward"] == 0
        assert calls["native"] > 0
    same(*results)


class Loud(torch.Tensor):
    seen = 0

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        Loud.seen += func is torch.nn.functional.linear
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.mark.parametrize("what", ["weight", "bias"])
def test_tensor_subclass_as_parameter(backend, what):
    net, sequential = pair()
    for module in (net, sequential):
        value = getattr(module[2], what).detach().as_subclass(Loud)
        setattr(module[2], what, nn.Parameter(value))
    assert type(getattr(net[2], what)) is Loud
    x = integer_input(7, 3)
    seen, results = [], []
    for module in (net, sequential):
        Loud.seen = 0
        with support.count_calls() as calls:
            y = module(x)
            grads = torch.autograd.grad(y.sum(), [x, *module.parameters()])
        assert type(y) is Loud
        assert calls["forward"] == calls["backward"] == 0
        seen.append(Loud.seen)
        results.append([t.detach().as_subclass(torch.Tensor) for t in (y, *grads)])
    assert seen[0] == seen[1] > 0
    same(*results)


@pytest.mark.parametrize("what", ["weight", "bias"])
def test_tensor_subclass_swapped_into_a_parameter(backend, what):
    # as torch.__future__.set_swap_module_params_on_conversion makes modules do: the
    # Parameter stays the same object and gets another class
    net, _ = pair()
    x = integer_input(7, 3)
    expected = run(net, x)
    net.zero_grad()
    value = getattr(net[2], what).detach().clone().as_subclass(Loud)
    torch.utils.swap_tensors(getattr(net[2], what), nn.Parameter(value))
    assert type(getattr(net[2], what)) is Loud
    Loud.seen = 0
    with support.count_calls() as calls:
        y = net(x)
    assert calls["forward"] == 0
    assert Loud.seen > 0
    assert torch.equal(y.detach().as_subclass(torch.Tensor), expected[0])


def test_tensor_subclass_as_input(backend):
    net, sequential = pair()
    x = integer_input(7, 3).detach().as_subclass(Loud)
    with support.count_calls() as calls:
        y = net(x)
    assert type(y) is Loud
    assert calls["forward"] == 0
    assert torch.equal(y, sequential(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(backend, dtype):
    net, sequential = pair()
    x = integer_input(7, 3)
    with torch.autocast("cpu", dtype):
        same_as_native(net, sequential, fused=1, x=x)
        assert net(x).dtype == dtype


def test_functorch_transforms(backend):
    net, sequential = pair()
    x = integer_input(7, 3).detach()
    parameters = {name: p.detach() for name, p in net.named_parameters()}
    results = []
    for module in (net, sequential):

        def f(parameters, row, module=module):
            return torch.func.functional_call(module, parameters, (row,)).sum()

        per_sample = torch.func.vmap(torch.func.grad(f), (None, 0))(parameters, x)
        value, tangent = torch.func.jvp(
            lambda x, f=f: f(parameters, x), (x,), (torch.ones_like(x),)
        )
        value_grad = torch.func.grad(f)(parameters, x)
        jacobian = torch.func.jacrev(module)(x[0])
        mapped = torch.func.vmap(module)(x)
        results.append(
            [*per_sample.values(), value, tangent, *value_grad.values(), jacobian, mapped]
        )
    same(*results)
    assert results[0][0].shape == (7, 6, 3)
    assert results[0][0].any()


@pytest.mark.parametrize("what", ["input", "parameters"])
def test_forward_mode(backend, what):
    net, sequential = pair()
    x = integer_input(7, 3).detach()
    results = []
    for module in (net, sequential):
        with forward_ad.dual_level(), support.count_calls() as calls:
            if what == "input":
                y = module(forward_ad.make_dual(x, torch.ones_like(x)))
            else:
                duals = {
                    name: forward_ad.make_dual(p.detach(), torch.ones_like(p))
                    for name, p in module.named_parameters()
                }
                y = torch.func.functional_call(module, duals, (x,))
            primal, tangent = forward_ad.unpack_dual(y)
        assert calls["forward"] == (module is net)
        results.append([primal.detach(), tangent.detach()])
    same(*results)
    assert results[0][1].any()


@pytest.mark.parametrize("dtype", [torch.complex64], ids=str)
def test_other_dtypes_run_natively(backend, dtype):
    net, sequential = pair(hidden=(), dtype=dtype)
    same_as_native(net, sequential, fused=0, x=integer_input(7, 3, dtype=dtype))


# -- The compilers ------------------------------------------------------------------------


@pytest.mark.slow
def test_compile(backend):
    net, sequential = pair()
    x = integer_input(7, 3)
    expected = run(sequential, x)
    torch.compiler.reset()
    compiled = torch.compile(net, backend="aot_eager")
    leaf = x.detach().clone().requires_grad_()
    y = compiled(leaf)
    y.backward((torch.arange(y.numel()) % 5 - 2).reshape(y.shape).to(y.dtype))
    same([y.detach(), leaf.grad, *[p.grad for p in net.parameters()]], expected)
    with torch.no_grad():
        assert torch.equal(compiled(x), expected[0])
    torch.compiler.reset()


def test_jit_trace(backend):
    net, sequential = pair()
    x = integer_input(7, 3)
    traced = torch.jit.trace(net, (x,))
    same(run(traced, integer_input(5, 3).detach().fill_(1)), run(sequential, torch.ones(5, 3)))


def test_fx_symbolic_trace(backend):
    net, sequential = pair()
    same(run(torch.fx.symbolic_trace(net), torch.ones(7, 3)), run(sequential, torch.ones(7, 3)))
