"""A `ReluMLP` notices at once every change of its children, and keeps no old ones alive.

Each change is made to a network that has been called before, and to the equivalent `nn.Sequential`.
Then both give the same bits (parameters and inputs are small integers), or raise the same class of
error. `FUSED` names the changes after which the network still runs fused.
"""

import copy
import gc
import pickle
import weakref
from collections import OrderedDict, defaultdict

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

import relu_mlp
import support
from relu_mlp import ReluMLP


def pair(**arguments):
    both = support.twins(3, (6, 5), 4, **arguments)
    return [support.integers_(module) for module in both]


def integers(*shape):
    """The same ones every time."""
    generator = torch.Generator().manual_seed(7)
    return torch.randint(-2, 3, shape, generator=generator).float()


def linear(n_in, n_out, bias=True):
    layer = nn.Linear(n_in, n_out, bias)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(integers(*parameter.shape))
    return layer


def run(module, x):
    """y, the gradient of x, and that of every parameter by name; or the error that was raised."""
    x = x.detach().requires_grad_()
    try:
        module.zero_grad()
        y = module(x)
        y.backward(integers(*y.shape))
    except (RuntimeError, AttributeError, TypeError) as error:
        return error
    grads = {name: p.grad for name, p in module.named_parameters()}
    return {"y": y.detach(), "x": x.grad, **grads}


def assert_same(actual, expected):
    assert isinstance(actual, Exception) == isinstance(expected, Exception), (actual, expected)
    if isinstance(expected, Exception):
        assert type(actual) is type(expected), (actual, expected)
        return
    assert list(actual) == list(expected)
    for name, value in expected.items():
        found = actual[name]
        assert (found is None) == (value is None), name
        assert value is None or torch.equal(found, value), name


# -- Changes -------------------------------------------------------------------------------

CHANGES = {}
FUSED = set()


def change(function=None, fused=False):
    def add(function):
        CHANGES[function.__name__] = function
        if fused:
            FUSED.add(function.__name__)
        return function

    return add(function) if function else add


@change(fused=True)
def setstate(net):
    net[0].__setstate__(linear(3, 6).__dict__)


@change(fused=True)
def dict_updated(net):
    net[2].__dict__.update(linear(6, 5).__dict__)


@change(fused=True)
def dict_assigned(net):
    net[2].__dict__ = linear(6, 5).__dict__


@change(fused=True)
def dict_of_a_relu_assigned(net):
    net[1].__dict__ = nn.ReLU(inplace=True).__dict__


@change(fused=True)
def dict_of_the_module_updated(net):
    other = nn.Sequential(linear(3, 6), nn.ReLU(), linear(6, 5), nn.ReLU(), linear(5, 4))
    net.__dict__.update(other.__dict__)


@change(fused=True)
def modules_replaced(net):
    net._modules = OrderedDict(zip("abc", (linear(3, 6), nn.ReLU(), linear(6, 4)), strict=True))


@change
def modules_replaced_by_others(net):
    net._modules = OrderedDict(a=linear(3, 6), b=nn.Hardswish())


@change(fused=True)
def child_swapped_in_modules(net):
    net._modules["2"] = linear(6, 5)


@change
def another_kind_of_child_in_modules(net):
    net._modules["3"] = nn.Hardtanh(-3, 3)


@change
def none_in_modules(net):
    net._modules["3"] = None


@change(fused=True)
def parameters_replaced(net):
    net[0]._parameters = dict(linear(3, 6)._parameters)


@change(fused=True)
def parameter_swapped_in_parameters(net):
    net[0]._parameters["weight"] = linear(3, 6).weight


@change(fused=True)
def plain_tensor_in_parameters(net):
    net[0]._parameters["weight"] = linear(3, 6).weight.detach()


@change(fused=True)
def bias_set_to_none(net):
    net[0].bias = None


@change(fused=True)
def all_biases_set_to_none(net):
    for child in net[::2]:
        child.bias = None


@change(fused=True)
def bias_registered_again(net):
    net[0].register_parameter("bias", None)
    net[0].register_parameter("bias", linear(3, 6).bias)


@change
def bias_emptied(net):
    net[0].bias.data = torch.empty(0)


@change
def last_bias_emptied(net):
    net[4].bias.data = torch.empty(0)


@change(fused=True)  # whose operator refuses it
def weight_emptied(net):
    net[2].weight.data = torch.empty(0)


@change
def empty_bias_swapped_in(net):
    torch.utils.swap_tensors(net[2].bias, nn.Parameter(torch.empty(0)))


@change
def sparse_bias(net):
    net[2].bias = nn.Parameter(linear(6, 5).bias.detach().to_sparse(), requires_grad=False)


@change
def sparse_weight(net):
    net[2].weight = nn.Parameter(linear(6, 5).weight.detach().to_sparse(), requires_grad=False)


@change(fused=True)
def tensors_swapped(net):
    torch.utils.swap_tensors(net[2].weight, linear(6, 5).weight)


@change(fused=True)
def data_replaced(net):
    net[2].weight.data = linear(6, 5).weight.detach()


@change(fused=True)
def width_changed_by_data(net):
    first, second = linear(3, 7), linear(7, 5)
    net[0].weight.data, net[0].bias.data = first.weight.detach(), first.bias.detach()
    net[2].weight.data = second.weight.detach()


@change(fused=True)
def assigned_by_load_state_dict(net):
    other = nn.Sequential(linear(3, 6), nn.ReLU(), linear(6, 5), nn.ReLU(), linear(5, 4))
    net.load_state_dict(other.state_dict(), assign=True)


@change(fused=True)
def converted_by_swapping(net):
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        net.double().float()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)


@change
def weight_deleted(net):
    del net[2].weight


@change
def bias_deleted(net):
    del net[2].bias


@change
def weight_of_the_instance(net):
    net[2].__dict__["weight"] = linear(6, 5).weight


@change
def bias_of_the_instance(net):
    net[2].__dict__["bias"] = None


@change
def weight_becomes_a_buffer(net):
    value = linear(6, 5).weight.detach()
    del net[2].weight
    net[2].register_buffer("weight", value)


class Scaled(nn.Linear):
    def forward(self, input):
        return 2 * super().forward(input)


@change
def class_of_a_linear_changed(net):
    net[2].__class__ = Scaled


@change
def class_of_a_relu_changed(net):
    net[1].__class__ = nn.Identity


@change
def forward_of_the_instance(net):
    net[1].forward = torch.neg


@change
def forward_of_the_instance_in_its_dict(net):
    net[4].__dict__["forward"] = lambda x: x[..., :2]


@change
def call_impl_of_the_instance(net):
    net[1]._call_impl = torch.neg


@change
def compiled_child(net):
    net[1]._compiled_call_impl = torch.neg  # as child.compile() sets it


class Fetched(dict):
    """Replaces `_parameters` like ZeRO-3 does: every access returns the whole tensor."""

    def __getitem__(self, name):
        value = super().__getitem__(name)
        return value if value is None else value + 1


@change(fused=True)
def parameters_that_are_fetched(net):
    net[2]._parameters = Fetched(net[2]._parameters)


@change
def pruned(net):
    prune.l1_unstructured(net[2], "weight", amount=0.5)


class Negated(nn.Module):
    def forward(self, weight):
        return -weight


@change
def parametrized(net):
    parametrize.register_parametrization(net[2], "bias", Negated())


@change(fused=True)
def the_same_child_twice(net):
    net[0] = linear(3, 3)
    net[2] = net[0]
    net[4] = linear(3, 4)


@change(fused=True)
def an_attribute_more(net):
    net[0].note = net[1].note = "of no importance"


@change(fused=True)
def modes_of_children(net):
    net[0].eval()
    net[1].train(False)


@change(fused=True)
def a_sigmoid_at_the_end_and_away_again(net):
    net.append(nn.Sigmoid())
    net(integers(7, 3))
    del net[-1]


@change
def tanh_in_the_middle(net):
    net[1] = nn.Tanh()


@pytest.mark.parametrize("grad", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_seen_at_once(backend, name, grad):
    results = []
    x = integers(7, 3)
    for module in pair():
        run(module, x)
        CHANGES[name](module)
        if grad:
            results.append(run(module, x))
            continue
        with torch.no_grad():
            try:
                results.append({"y": module(x)})
            except (RuntimeError, AttributeError, TypeError) as error:
                results.append(error)
    if name == "tanh_in_the_middle":  # sums may be rounded differently
        assert torch.allclose(results[0]["y"], results[1]["y"])
    else:
        assert_same(*results)


@pytest.mark.parametrize("name", CHANGES)
def test_and_the_network_is_fused_if_it_still_is_one(backend, name):
    (net, _), x = pair(), integers(7, 3)
    run(net, x)
    CHANGES[name](net)
    with support.count_calls() as calls:
        run(net, x)
    assert calls["forward"] == (name in FUSED)


def test_an_emptied_bias_is_named(backend):
    for module in (pair()[0], relu_mlp.fuse(nn.Sequential(*pair()[1], nn.Softmax(-1)))):
        module(integers(7, 3))
        module[2].bias.data = torch.empty(0)
        with pytest.raises(RuntimeError, match=r"biases\[1\] must have shape \(5,\), got \(0,\)"):
            module(integers(7, 3))


@pytest.mark.parametrize("name", CHANGES)
def test_a_longer_sequential_sees_it_too(backend, name):
    results = []
    x = integers(7, 3)
    for k in range(2):
        module = nn.Sequential(*pair()[1], nn.Softshrink())
        module = relu_mlp.fuse(module) if k == 0 else module
        run(module, x)
        CHANGES[name](module)
        results.append(run(module, x))
    if name == "tanh_in_the_middle":
        assert torch.allclose(results[0]["y"], results[1]["y"])
    else:
        assert_same(*results)


# -- Nothing is kept alive -------------------------------------------------------------------


@pytest.mark.slow
def test_what_the_module_no_longer_has_is_gone(backend):
    net, _ = pair()
    run(net, integers(7, 3))
    with torch.no_grad():
        net(integers(7, 3))
    child, weight, bias = net[0], net[2].weight, net[4].bias
    gone = [weakref.ref(thing) for thing in (child, child.weight, child.bias, weight, bias)]
    net[0] = linear(3, 6)
    net[2].weight = linear(6, 5).weight
    net[4].bias = None
    del child, weight, bias
    gc.collect()
    assert [thing() for thing in gone] == [None] * 5
    # A copy, too, keeps nothing but the children.
    assert set(net.__dict__) == set(ReluMLP(3, 2, 1).__dict__)


@pytest.mark.slow
def test_lent_parameters_are_gone_after_the_call(backend):
    net, _ = pair()
    x = integers(7, 3)
    lent = {name: p.detach() + 1 for name, p in net.named_parameters()}
    refs = [weakref.ref(tensor) for tensor in lent.values()]
    with torch.no_grad():
        torch.func.functional_call(net, lent, (x,))
    lent.clear()
    gc.collect()
    assert [ref() for ref in refs] == [None] * len(refs)


@pytest.mark.parametrize("way", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
def test_a_used_module_is_copied_like_a_new_one(backend, way):
    net, sequential = pair()
    x = integers(7, 3)
    run(net, x)
    twin = way(net)
    setstate(twin)
    setstate(sequential)
    assert_same(run(twin, x), run(sequential, x))
    net[0].weight.data.zero_()
    assert twin[0].weight.any()


# -- Subclasses -------------------------------------------------------------------------------


def subclass_of(base):
    class Reversed(base):
        def __iter__(self):
            return reversed(list(self._modules.values()))

    return Reversed


def test_a_subclass_that_iterates_otherwise(backend):
    layers = [linear(4, 3), nn.ReLU(), linear(3, 4)]
    results = []
    for base in (ReluMLP, nn.Sequential):
        module = subclass_of(base).__new__(subclass_of(base))
        nn.Sequential.__init__(module, *layers)
        results.append(run(module, integers(7, 3)))
    assert_same(*results)


def test_a_forward_of_the_instance_or_of_a_subclass(backend):
    net, sequential = pair()
    x = integers(7, 3)
    for module in (net, sequential):
        module.forward = lambda x, module=module: 2 * type(module).forward(module, x)
    assert_same(run(net, x), run(sequential, x))

    class Doubled(ReluMLP):
        def forward(self, input):
            return 2 * super().forward(input)

    doubled = Doubled(3, (6, 5), 4)
    doubled.load_state_dict(net.state_dict())
    with support.count_calls() as calls:
        assert_same(run(doubled, x), run(sequential, x))
    assert calls["forward"] == 1


# -- from_sequential --------------------------------------------------------------------------


def plain():
    return nn.Sequential(linear(3, 6), nn.ReLU(), linear(6, 4))


def with_forward_hook(sequential):
    sequential.register_forward_hook(lambda module, args, y: 2 * y)


def with_pre_hook_of_keywords(sequential):
    sequential.register_forward_pre_hook(
        lambda module, args, kwargs: ((args[0] + 1,), kwargs), with_kwargs=True
    )


def with_backward_hook(sequential):
    sequential.register_full_backward_hook(lambda module, grads, _: (2 * grads[0],))


def with_backward_pre_hook(sequential):
    sequential.register_full_backward_pre_hook(lambda module, grads: (3 * grads[0],))


def with_state_dict_hook(sequential):
    sequential.register_state_dict_post_hook(
        lambda module, state, prefix, _: state.update({f"{prefix}more": torch.ones(1)})
    )


def with_buffers(sequential):
    sequential.register_buffer("scale", torch.ones(1))
    sequential.register_buffer("passing", torch.ones(1), persistent=False)


def with_a_parameter(sequential):
    sequential.register_parameter("temperature", nn.Parameter(torch.ones(1)))


def with_attributes(sequential):
    sequential.note, sequential.options = "mine", defaultdict(list)


def with_modes(sequential):
    sequential.eval()
    sequential[0].train()


def with_an_inplace_relu(sequential):
    sequential[1] = nn.ReLU(inplace=True)


KEPT = [
    with_forward_hook, with_pre_hook_of_keywords, with_backward_hook, with_backward_pre_hook,
    with_state_dict_hook, with_buffers, with_a_parameter, with_attributes, with_modes,
    with_an_inplace_relu,
]  # fmt: skip


@pytest.mark.parametrize("what", KEPT)
def test_from_sequential_keeps(backend, what):
    sequential = plain()
    what(sequential)
    modes = [module.training for module in sequential.modules()]
    net = ReluMLP.from_sequential(sequential)
    x = integers(7, 3)
    assert_same(run(net, x), run(sequential, x))
    assert list(net.state_dict()) == list(sequential.state_dict())
    assert list(net.named_buffers()) == list(sequential.named_buffers())
    assert [module.training for module in net.modules()] == modes
    assert [module.training for module in sequential.modules()] == modes
    if what is with_attributes:
        assert (net.note, net.options) == ("mine", sequential.options)
    # Dicts that PyTorch manages are copied, so editing one does not edit the other.
    before = list(net.state_dict())
    sequential.append(nn.ReLU())
    sequential.register_buffer("later", torch.ones(1))
    sequential.register_forward_hook(lambda module, args, y: 100 * y)
    assert list(net.state_dict()) == before
    assert len(net) == 3
    assert net(x).abs().max() < sequential(x).abs().max()


class Doubled(nn.Sequential):
    def forward(self, input):
        return 2 * super().forward(input)


class Counted(nn.Sequential):
    calls = 0


class Named(nn.Sequential):
    """A subclass that defines nothing but its constructor."""

    def __init__(self):
        super().__init__(linear(3, 6), nn.ReLU(), linear(6, 4))


def refused(what):
    sequential = plain()
    if what == "forward":
        sequential.forward = torch.neg
    elif what == "compile":
        sequential.compile(backend="eager")
    elif what == "load_state_dict":
        sequential.register_load_state_dict_pre_hook(lambda module, *arguments: None)
    elif what == "hook on a child":
        sequential[0].register_forward_hook(lambda module, args, y: 2 * y)
    elif what == "None":
        sequential._modules["1"] = None
    elif what == "parametrization":
        parametrize.register_parametrization(sequential[2], "weight", Negated())
    elif what == "subclass":
        sequential = Doubled(*sequential)
    elif what == "subclass with an attribute":
        sequential = Counted(*sequential)
    return sequential


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("forward", "got a forward of its own"),
        ("compile", "got a _compiled_call_impl of its own"),
        ("load_state_dict", "got a hook for load_state_dict"),
        ("hook on a child", "got Linear at 0"),
        ("None", "got NoneType at 1"),
        ("parametrization", "got ParametrizedLinear at 2"),
        ("subclass", "got the forward of its class Doubled"),
        ("subclass with an attribute", "got the calls of its class Counted"),
    ],
)
def test_from_sequential_refuses(what, message):
    sequential = refused(what)
    before = dict(sequential.__dict__)
    with pytest.raises(ValueError, match=message):
        ReluMLP.from_sequential(sequential)
    assert sequential.__dict__ == before


def test_from_sequential_of_similar_modules(backend):
    """Subclasses that lose nothing, a ReluMLP, and modules that `fuse` has made."""
    x = integers(7, 3)
    for sequential in (Named(), ReluMLP.from_sequential(plain()), relu_mlp.fuse(plain())):
        net = ReluMLP.from_sequential(sequential)
        assert type(net) is ReluMLP
        with support.count_calls() as calls:
            assert_same(run(net, x), run(plain(), x))
        assert calls["forward"] == 1
        assert type(relu_mlp.unfuse(net)) is ReluMLP


def test_from_sequential_of_one_linear_twice(backend):
    shared = linear(3, 3)
    sequential = nn.Sequential(shared, nn.ReLU(), shared)
    net = ReluMLP.from_sequential(sequential)
    assert_same(run(net, integers(7, 3)), run(sequential, integers(7, 3)))
