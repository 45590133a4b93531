"""`check_gradients` compares the gradient derived by hand with autograd's and with finite
differences. Right derivations pass, and wrong ones get a diagnosis.
"""

import itertools
import math
import random

import numpy as np
import pytest
import torch
from torch import nn

import relu_mlp
import support
from relu_mlp import GradientReport, check_gradients
from relu_mlp.gradient_checks import differences
from relu_mlp.gradient_checks.report import HEAD
from relu_mlp.gradient_checks.rounding import ulp
from support import make_case_with_target
from support.bad_arguments import (
    NETWORKS,
    NO_ACTIVATIONS,
    NO_LOSSES,
    TARGETS,
    assert_unchanged,
    raised,
    snapshot,
    under_every_backend,
)

#: Nothing here depends on whether the native node records a graph.
backend = support.backend_fixture(support.BACKENDS)

STEP = torch.finfo(torch.float64).eps ** (1 / 3)


def draw(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def of(report):
    """The report's parameters by name."""
    return {parameter.name: parameter for parameter in report.parameters}


def findings(report):
    """The findings about each parameter, by name."""
    return {p.name: list(p.findings()) for p in report.parameters if list(p.findings())}


class Perceptron:
    """A user's own derivation, in the layout of the source documents: weights are (in, out).

    loss = sum (max(x w1 + b1, 0) w2 + b2 - t)²
    """

    def __init__(self, rows=64, inputs=3, hidden=2, outputs=1):
        self.x, self.t = draw(rows, inputs), draw(rows, outputs)
        self.inputs = {
            "w1": draw(inputs, hidden),
            "b1": draw(hidden),
            "w2": draw(hidden, outputs),
            "b2": draw(outputs),
        }

    def loss(self, w1, b1, w2, b2):
        hidden = (self.x @ w1 + b1).clamp(min=0)
        return (hidden @ w2 + b2 - self.t).square().sum()

    def backward(self, w1, b1, w2, b2, mask=lambda z, bias: z > 0):
        z = self.x @ w1 + b1
        hidden = z.clamp(min=0)
        grad_y = 2 * (hidden @ w2 + b2 - self.t)
        grad_hidden = (grad_y @ w2.T) * mask(z, b1)
        return {
            "w1": self.x.T @ grad_hidden,
            "b1": grad_hidden.sum(0),
            "w2": hidden.T @ grad_y,
            "b2": grad_y.sum(0),
        }

    def check(self, **changes):
        """The report on a derivation with mistakes. `mistakes` maps names to functions of right
        gradients.
        """

        def backward(**inputs):
            right = self.backward(**inputs)
            return {n: changes[n](g) if n in changes else g for n, g in right.items()}

        return check_gradients(self.loss, self.inputs, backward)


# -- Right derivations -----------------------------------------------------------


def test_the_contract(backend):
    x, target, weights, biases = make_case_with_target([3, 4, 2])
    report = check_gradients(x, target, weights, biases)
    assert type(report) is GradientReport
    assert report.ok is True
    assert isinstance(report.max_error, float) and 0 <= report.max_error < 1e-13
    assert "by hand" in str(report) and "autograd" in str(report) and "numerical" in str(report)
    assert list(of(report)) == ["weights[0]", "biases[0]", "weights[1]", "biases[1]"]
    loss = relu_mlp.loss_and_grads(x, target, weights, biases).loss
    assert report.loss == pytest.approx(loss.item(), rel=1e-14)


@pytest.mark.parametrize(
    ("loss", "bias"), [("sse", "all"), ("half_sse", "none"), ("mse", "some")], ids=str
)
@pytest.mark.parametrize("activation", support.ACTIVATIONS)
def test_the_three_columns_of_a_network(backend, activation, bias, loss):
    """The gradient by hand is that of `loss_and_grads`, bit by bit; the others agree within
    rounding.
    """
    x, target, weights, biases = make_case_with_target([3, 4, 2], bias=bias)
    options = {"loss": loss, "output_activation": activation}
    report = check_gradients(x, target, weights, biases, **options)
    by_hand = relu_mlp.loss_and_grads(x, target, weights, biases, **options)
    leaves = [p.clone().requires_grad_() for p in [*weights, *(biases or [])] if p is not None]
    given = iter(leaves)
    their_weights = [next(given) for _ in weights]
    their_biases = biases and [b if b is None else next(given) for b in biases]
    error = support.native_mlp(x, their_weights, their_biases, activation) - target
    value = {"sse": 1.0, "half_sse": 0.5, "mse": 1 / 10}[loss] * error.square().sum()
    autograd = torch.autograd.grad(value, leaves)
    names = [f"weights[{n}]" for n in range(2)]
    names += [f"biases[{n}]" for n in range(2) if biases and biases[n] is not None]
    hands = [*by_hand.weights, *(b for b in by_hand.biases or [] if b is not None)]
    assert sorted(names) == sorted(of(report))
    for name, hand, auto in zip(names, hands, autograd, strict=True):
        found = of(report)[name]
        assert torch.equal(found.by_hand, hand)
        # the same operations except for the scale of the loss: two roundings
        torch.testing.assert_close(found.autograd, auto, rtol=1e-15, atol=1e-15)
        assert not found.is_at_kink.any() and not found.is_wrong.any()
        # the stated difference is true, and not empty
        assert ((found.numerical - auto).abs() <= found.uncertainty).all()
        assert (found.uncertainty <= 1e-5 * auto.abs().clamp(min=1)).all()
        assert 0 < found.tolerance <= 1e-8 * max(1.0, auto.abs().max().item(), report.loss)
    assert report.ok


def random_case(seed):
    """A network of any kind and scale, also with a perfect fit and with outputs far from 0."""
    r = random.Random(seed)
    torch.manual_seed(seed)
    sizes = [r.choice([1, 2, 3, 5]) for _ in range(r.randint(2, 4))]
    activation = r.choice(support.ACTIVATIONS)
    scale = r.choice([0.1, 1, 1, 3])
    weights, biases = support.make_network(sizes, r.choice(["all", "none", "some"]), scale=scale)
    if biases and biases[-1] is not None and activation is None:
        biases[-1] += r.choice([0, 0, 1e3, 1e6])
    x = r.choice([0.1, 1, 1, 10]) * draw(r.choice([1, 3, 10]), sizes[0])
    y = relu_mlp.relu_mlp(x, weights, biases, output_activation=activation)
    target = r.choice([y, y + 0.1 * torch.randn_like(y), y + 10 * torch.randn_like(y)])
    loss = r.choice(["sse", "half_sse", "mse"])
    return x, target, weights, biases, {"loss": loss, "output_activation": activation}


@pytest.mark.parametrize("seed", range(40))
def test_no_false_alarm(backend, seed):
    x, target, weights, biases, options = random_case(seed)
    report = check_gradients(x, target, weights, biases, **options)
    assert report.ok, str(report)


@pytest.mark.parametrize("eps", [None, 1e-2, 1e-3, 1e-4, 1e-8, 1e-11, 1e-14], ids=str)
@pytest.mark.parametrize("seed", range(6))
def test_no_false_alarm_with_any_step(eps, seed):
    """Where rounding swamps the difference, the check makes no claim."""
    x, target, weights, biases, options = random_case(seed)
    report = check_gradients(x, target, weights, biases, eps=eps, **options)
    assert report.ok, str(report)


@pytest.mark.parametrize("activation", support.ACTIVATIONS)
def test_a_perfect_fit(backend, activation):
    """Every gradient is 0 or consists of rounding errors, and so does every difference."""
    for seed in range(3):
        torch.manual_seed(seed)
        x, _, weights, biases = make_case_with_target([3, 4, 2])
        for network in (relu_mlp.relu_mlp, support.native_mlp):
            target = network(x, weights, biases, output_activation=activation)
            report = check_gradients(x, target, weights, biases, output_activation=activation)
            assert report.ok and not findings(report), str(report)


def test_outputs_far_from_0(backend):
    """A difference then consists of the rounding errors of the outputs, not of the loss."""
    for seed in range(5):
        torch.manual_seed(seed)
        x, noise, weights, biases = make_case_with_target([3, 1])
        biases[0] += 1e6
        target = support.native_mlp(x, weights, biases) + 10 * noise
        report = check_gradients(x, target, weights, biases)
        assert report.ok and not findings(report), str(report)


@pytest.mark.parametrize("outputs", [1, 3])
def test_a_right_derivation_of_ones_own(outputs):
    """That of document 000, also with several outputs; passed by name and in order."""
    net = Perceptron(outputs=outputs)
    report = net.check()
    assert report.ok and not findings(report), str(report)
    listed = check_gradients(
        net.loss, list(net.inputs.values()), lambda *inputs: list(net.backward(*inputs).values())
    )
    assert list(of(listed)) == list(of(report)) == ["w1", "b1", "w2", "b2"]
    assert str(listed) == str(report)
    assert str(report).startswith("The gradient of loss(w1, b1, w2, b2).\n")


def test_one_input_needs_no_list():
    report = check_gradients(lambda p: p.square().sum(), [draw(3)], lambda p: 2 * p)
    assert report.ok and list(of(report)) == ["p"]


def test_inputs_without_names():
    assert list(of(check_gradients(torch.sum, [draw(3)], torch.ones_like))) == ["inputs[0]"]
    report = check_gradients(lambda *p: p[0] @ p[1], [draw(3), draw(3)], lambda a, b: (b, a))
    assert report.ok and list(of(report)) == ["inputs[0]", "inputs[1]"]


def test_results_in_other_orders_and_shapes():
    """A mapping is matched by name. The loss is a tensor of one element, of any shape."""
    inputs = {"a": draw(3), "b": draw(3)}
    report = check_gradients(
        lambda a, b: (a * b).sum(0, keepdim=True)[None], inputs, lambda a, b: {"b": a, "a": b}
    )
    assert report.ok and list(of(report)) == ["a", "b"]


def test_a_network_of_this_package_as_a_function(backend):
    """Its value is the same with and without a graph."""
    net = relu_mlp.ReluMLP(7, [6, 5], 3, output_activation="tanh").double()
    x, target = draw(9, 7), draw(9, 3)

    def loss(**parameters):
        return (torch.func.functional_call(net, parameters, (x,)) - target).square().sum()

    def backward(**parameters):
        weights = [p for name, p in parameters.items() if "weight" in name]
        biases = [p for name, p in parameters.items() if "bias" in name]
        grads = relu_mlp.loss_and_grads(x, target, weights, biases, output_activation="tanh")
        pairs = zip(grads.weights, grads.biases, strict=True)
        return [grad for pair in pairs for grad in pair]

    report = check_gradients(loss, dict(net.named_parameters()), backward)
    assert report.ok, str(report)
    assert list(of(report)) == list(dict(net.named_parameters()))


# -- Document 002 ----------------------------------------------------------------


def document_002():
    """T, X and W as the document drew them. They are integers."""
    torch.manual_seed(42)
    return torch.randint(10, (4, 2)), torch.randint(3, (4, 3)), torch.randint(3, (3, 2))


FIGURES = [-0.1916842751, -0.1505403047, -0.5027215624]
FIGURES += [-0.0967040759, -0.0302279895, -0.2850716981]


@pytest.mark.parametrize("dtype", support.DTYPES, ids=str)
def test_document_002(backend, dtype):
    """The exact gradient, whatever the dtype of the input, because the inputs are integers."""
    target, x, weight = document_002()
    report = check_gradients(
        x.to(dtype), target, [weight.T.to(dtype)], loss="half_sse", output_activation="sigmoid"
    )
    found = of(report)["weights[0]"]
    for column in (found.by_hand, found.autograd):
        assert [round(value, 10) for value in column.T.flatten().tolist()] == FIGURES
    assert report.ok and not findings(report)


def test_document_002_as_a_derivation_of_ones_own():
    """With the step 1e-4, which left two digits in single precision, the differences are off by
    h²/6 times the third derivative, and by rounding.
    """
    target, x, weight = document_002()

    def loss(W, X, T):
        return (torch.sigmoid(X.double() @ W) - T).square().sum() / 2

    def backward(W, X, T):
        y = torch.sigmoid(X.double() @ W)
        return {"W": X.double().T @ (y * (1 - y) * (y - T))}

    inputs = {"W": weight.float(), "X": x, "T": target}
    report = check_gradients(loss, inputs, backward, eps=1e-4)
    found = of(report)["W"]
    assert [round(value, 10) for value in found.by_hand.flatten().tolist()] == FIGURES
    assert report.ok and not findings(report)

    w = weight.double().requires_grad_()
    third = loss(w, x, target)
    for _ in range(3):  # for each element alone: W[i, k] affects only column k, through x[:, i]
        third = torch.stack(
            [
                torch.autograd.grad(value, w, create_graph=True)[0][index]
                for index, value in zip(itertools.product(range(3), range(2)), values_of(third))
            ]
        )
    h = 1e-4 * weight.clamp(min=1)
    # 1 % for the higher derivatives, because h is small
    truncation = 1.01 * h**2 / 6 * third.detach().abs().view(3, 2)
    rounding = 64 * 2.0**-53 * report.loss / 1e-4
    assert ((found.numerical - found.autograd).abs() <= truncation + rounding).all()
    # the figure in shared/seeds/README.md
    assert (found.numerical - found.autograd).abs().max() < 3.5e-9


def values_of(tensor):
    """Six values to differentiate, one for each element of W."""
    return [tensor] * 6 if tensor.dim() == 0 else list(tensor)


# -- The step and the dtype ------------------------------------------------------


@pytest.mark.parametrize("eps", [None, 1e-4, 2.0**-10, 1, np.float64(1e-3), np.float32(2.0**-9)])
def test_the_step(eps):
    """h = eps max(1, |p|), in both directions, once and twice."""
    p, seen = torch.tensor([0.5, -100.0, 0.0], dtype=torch.float64), []

    def loss(p):
        seen.append(p.detach().clone())
        return p.sum()

    report = check_gradients(loss, [p], torch.ones_like, eps=eps)
    assert report.eps == (STEP if eps is None else eps)
    assert report.ok
    moved = [(q - p) for q in seen if not torch.equal(q, p)]
    assert len(moved) == 4 * 3
    for n, size in enumerate([1.0, 100.0, 1.0]):
        steps = sorted((m[n] / size / report.eps).item() for m in moved if m[n])
        assert steps == pytest.approx([-2, -1, 1, 2], rel=2.0**-52 / report.eps)
        others = [m for m in moved if m[n]]
        assert all((m != 0).sum() == 1 for m in others)
    assert f"with the step {report.eps:.2g} * max(1, |element|)" in str(report)


def test_the_default_step_is_the_cube_root_of_the_precision_of_float64():
    x, target, weights, biases = make_case_with_target([3, 2], dtype=torch.float32)
    report = check_gradients(x, target, weights, biases)
    assert report.eps == differences.STEP == torch.finfo(torch.float64).eps ** (1 / 3)


WRONG_STEPS = [0, 0.0, -1e-4, math.nan, math.inf, "1e-4", [1e-4], 1j, torch.tensor([1e-4, 1e-3])]


@pytest.mark.parametrize("eps", WRONG_STEPS, ids=repr)
def test_wrong_steps(eps):
    x, target, weights, biases = make_case_with_target([3, 2])
    call = lambda: check_gradients(x, target, weights, biases, eps=eps)  # noqa: E731
    under_every_backend(call, ValueError, ["eps", "above 0"])
    raised(
        lambda: check_gradients(torch.sum, [x], torch.ones_like, eps=eps),
        ValueError,
        ["eps", "above 0"],
    )


@pytest.mark.parametrize("dtype", support.DTYPES, ids=str)
def test_the_check_runs_in_float64_and_says_so(backend, dtype):
    x, target, weights, biases = make_case_with_target([3, 4, 2], dtype=dtype)
    report = check_gradients(x, target, weights, biases)
    in_double = check_gradients(
        x.double(), target.double(), [w.double() for w in weights], [b.double() for b in biases]
    )
    note = f"The {str(dtype).removeprefix('torch.')} input is checked in float64.\n"
    assert (note in str(report)) == (dtype != torch.float64)
    assert str(report).replace(note, "") == str(in_double)
    assert report.ok
    for parameter in report.parameters:
        tensors = [parameter.by_hand, parameter.autograd, parameter.numerical]
        assert {tensor.dtype for tensor in tensors} == {torch.float64}


def test_a_function_gets_float64_and_integers_as_they_are():
    seen = set()

    def loss(w, b, scale, k, mask):
        seen.add(tuple(t.dtype for t in (w, b, scale, k, mask)))
        return ((w * k + b)[mask] * scale).sum()

    def backward(w, b, scale, k, mask):
        seen.add(tuple(t.dtype for t in (w, b, scale, k, mask)))
        return scale * k * mask, scale * mask, (w * k + b)[mask].sum(), None, None

    inputs = [
        torch.randn(4),
        torch.randn(4, dtype=torch.bfloat16),
        torch.tensor(2.0).half(),
        torch.arange(4),
        torch.tensor([True, False, True, True]),
    ]
    report = check_gradients(loss, inputs, backward)
    assert seen == {(torch.float64,) * 3 + (torch.int64, torch.bool)}
    assert report.ok and list(of(report)) == ["w", "b", "scale"]
    assert "The bfloat16 and float16 and float32 input is checked in float64." in str(report)


# -- Wrong derivations: the mistakes of the source documents ---------------------


def wrong(report):
    """The diagnosis of each parameter that is wrong by hand. No other findings are allowed."""
    assert not report.ok and "\nNOT OK." in str(report)
    said = findings(report)
    for name, parameter in of(report).items():
        assert parameter.ok == (name not in said)
    assert all(len(sentences) == 1 for sentences in said.values())
    diagnoses = {}
    for name, (sentence,) in said.items():
        assert f"\n{name}: {sentence}.\n" in str(report)
        assert sentence.startswith("wrong by hand: ")
        diagnoses[name] = sentence.removeprefix("wrong by hand: ")
    return diagnoses


def assert_says(report, expected):
    """The diagnoses begin with these words; what follows explains them, and where to look."""
    said = wrong(report)
    assert list(said) == list(expected), said
    for name, words in expected.items():
        assert said[name].startswith(words), said


def test_001_bias_gradients_divided_by_the_batch_size():
    report = Perceptron().check(b1=lambda g: g / 64, b2=lambda g: g / 64)
    assert_says(report, dict.fromkeys(["b1", "b2"], "it is 1/64 of autograd's"))


def test_001_mask_before_the_bias_is_added():
    net = Perceptron(hidden=4)
    net.inputs["b1"][2] = 0  # the right mask there

    def backward(**inputs):
        return net.backward(**inputs, mask=lambda z, bias: z - bias > 0)

    report = check_gradients(net.loss, net.inputs, backward)
    said = "the mask of relu at relu(x @ w1 + b1) is taken at x @ w1: b1 is forgotten"
    assert_says(report, {"w1": said, "b1": said})
    assert "Everything above layer 1 is right (w2 and b2)" in wrong(report)["w1"]
    assert {element.parameter for element in report.worst(12)} == {"w1", "b1"}


def test_000_sum_over_outputs():
    report = Perceptron(outputs=3).check(b2=torch.sum)
    said = "it has shape () instead of (3,); it is the sum over all elements of the gradient"
    assert_says(report, {"b2": said})
    report = Perceptron(outputs=3).check(b2=lambda g: g.sum().expand(3))
    assert_says(report, {"b2": "every element is the sum over all elements of the gradient"})


def test_000_transposed():
    """grad_w2 = s.T h instead of h.T s, also for square matrices, whose shapes do not differ."""
    report = Perceptron(outputs=3).check(w2=lambda g: g.T)
    assert_says(report, {"w2": "it has shape (3, 2) instead of (2, 3); it is the transpose"})
    report = Perceptron(inputs=2).check(w1=lambda g: g.T)
    assert_says(report, {"w1": "it is the transpose"})


@pytest.mark.parametrize("outputs", [1, 3])
def test_002_single_precision(outputs):
    """A derivation that loses half of the digits, also for a single element."""
    names = ["w1", "b1", "w2", "b2"]
    report = Perceptron(outputs=outputs).check(**dict.fromkeys(names, lambda g: g.float()))
    said = "it is right to some digits only, as if computed in single precision"
    assert_says(report, dict.fromkeys(names, said))


FACTORS = {
    -1: "it is minus autograd's",
    2: "it is 2 times autograd's",
    0.5: "it is 1/2 of autograd's",
    -0.5: "it is -1/2 of autograd's",
    -3: "it is -3 times autograd's",
    64: "it is 64 times autograd's",
    1 / 64: "it is 1/64 of autograd's",
    0: "it is 0",
    0.75: "it is 0.75 times autograd's",
    1.01: "it is 1.01 times autograd's",
    math.nan: "it is not finite",
    math.inf: "it is not finite",
}


@pytest.mark.parametrize(("factor", "said"), FACTORS.items(), ids=str)
def test_factors(factor, said):
    """A forgotten 2, ½, minus sign or chain rule. w1 is a matrix, b2 has one element."""
    report = Perceptron().check(w1=lambda g: factor * g, b2=lambda g: factor * g)
    assert_says(report, {"w1": said, "b2": said})


def change(index, by=1.0):
    def changed(grad):
        grad = grad.clone()
        grad[index] += by
        return grad

    return changed


PLACES = {
    "an element": (
        "w1",
        change((1, 0)),
        "1 of 12 elements are wrong, all in row 1, all in column 0",
    ),
    "a row": ("w1", change(2), "4 of 12 elements are wrong, all in row 2"),
    "a column": ("w1", change((slice(None), 3)), "3 of 12 elements are wrong, all in column 3"),
    "rows": ("w1", change([0, 2]), "8 of 12 elements are wrong, all in rows 0, 2"),
    "all": ("w1", lambda g: g + draw(3, 4), "12 of 12 elements are wrong"),
    "an index": ("b1", change(3), "1 of 4 elements are wrong, all in index 3"),
    "indices": ("b1", change([1, 3]), "2 of 4 elements are wrong, all in indices 1, 3"),
}


@pytest.mark.parametrize(("name", "mistake", "said"), PLACES.values(), ids=list(PLACES))
def test_where_it_is_wrong(name, mistake, said):
    assert_says(Perceptron(hidden=4).check(**{name: mistake}), {name: said})


def test_many_places_are_not_all_listed():
    w = draw(9, 2)

    def backward(w):
        return 2 * w + torch.tensor([1.0, 0.0]) * torch.arange(9).bool()[:, None]

    said = wrong(check_gradients(lambda w: w.square().sum(), [w], backward))["w"]
    assert said == "8 of 18 elements are wrong, all in rows 1, 2, 3, 4, 5, ..., all in column 0"


@pytest.mark.parametrize("shape", [(), (1,), (2, 3), (3, 1), (0,)], ids=str)
def test_a_gradient_of_another_shape(shape):
    p = draw(3)
    report = check_gradients(
        lambda p: (p * torch.arange(3)).sum(), [p], lambda p: torch.full(shape, 9.0)
    )
    assert_says(report, {"p": f"it has shape {shape} instead of (3,)"})
    assert report.max_error == math.inf
    assert math.isnan(report.worst()[0].by_hand)


def test_a_gradient_that_would_broadcast_is_wrong():
    """With one output, the sum over everything is the right number in the wrong shape."""
    report = Perceptron().check(b2=torch.sum)
    said = "it has shape () instead of (1,); it is the sum over all elements of the gradient"
    assert_says(report, {"b2": said})


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(40))
def test_no_mistake_is_missed(seed):
    """One element is wrong by a millionth of the largest. The report finds and names it."""
    r = random.Random(seed)
    torch.manual_seed(seed)
    net = Perceptron(*(r.choice([1, 2, 3, 5]) for _ in range(4)))
    right = net.backward(**net.inputs)
    names = [n for n, g in right.items() if g.any()]  # not an element of a unit that is always off
    assert names
    name = r.choice(names)
    index = tuple(r.randrange(size) for size in right[name].shape)
    by = r.choice([-1, 1]) * 1e-6 * right[name].abs().max().item()
    report = net.check(**{name: change(index, by)})
    assert set(wrong(report)) == {name}
    assert of(report)[name].is_wrong.nonzero().tolist() == [list(index)]
    worst = report.worst()[0]
    assert (worst.parameter, worst.index) == (name, index)
    assert worst.difference == pytest.approx(by, rel=1e-6)
    assert f"{name}[{', '.join(map(str, index))}] " in str(report)


# -- What is rounding and what is not --------------------------------------------

CASES = [(seed, offset, scale) for seed in range(4) for offset in (0, 1e12) for scale in (1, 1e-20)]


class LeastSquares:
    """scale * (sum (x w - t)² + offset), with targets of any size, and its gradient."""

    def __init__(self, seed, offset, scale):
        torch.manual_seed(seed)
        self.offset, self.scale = offset, scale
        self.x, self.w = draw(30, 3), draw(3)
        self.t = [1, 1e3, 1e6][seed % 3] * draw(30)

    def loss(self, w):
        return self.scale * ((self.x @ w - self.t).square().sum() + self.offset)

    def backward(self, w):
        return 2 * self.scale * self.x.T @ (self.x @ w - self.t)


@pytest.mark.parametrize(("seed", "offset", "scale"), CASES)
def test_a_wrong_gradient_beside_any_loss(seed, offset, scale):
    """By hand and autograd agree to rounding. The size of the loss says nothing about that."""
    net = LeastSquares(seed, offset, scale)
    assert check_gradients(net.loss, [net.w], net.backward).ok
    report = check_gradients(net.loss, [net.w], lambda w: -net.backward(w))
    assert_says(report, {"w": "it is minus autograd's"})
    assert report.ok is False
    for factor in (1 + 1e-6, 0, 2):
        factors = torch.tensor([1, factor, 1], dtype=torch.float64)
        report = check_gradients(net.loss, [net.w], lambda w: factors * net.backward(w))  # noqa: B023
        assert of(report)["w"].is_wrong.tolist() == [False, True, False]


@pytest.mark.parametrize(("seed", "offset", "scale"), CASES)
def test_a_right_gradient_whose_terms_cancel(seed, offset, scale):
    """At the minimum it consists of rounding errors of large residuals, in three orders."""
    net = LeastSquares(seed, offset, scale)
    x, t = net.x, net.t
    best = torch.linalg.lstsq(x, t[:, None]).solution[:, 0]

    def exactly(w):  # up to the rounding of the residuals
        terms = (x * (x @ w - t)[:, None]).T.tolist()
        sums = [math.fsum(column) for column in terms]
        return 2 * scale * torch.tensor(sums, dtype=torch.float64)

    def expanded(w):
        return 2 * scale * (x.T @ x @ w - x.T @ t)

    for backward in (net.backward, expanded, exactly):
        report = check_gradients(net.loss, [best], backward)
        assert report.ok and not of(report)["w"].is_wrong.any(), str(report)


def far(p):
    return ((p + 1e9) ** 2).sum() - ((p + 1e9) ** 2).sum() + p.sum()


CANCELLING = {
    "softmax": (lambda p: (3 * p.softmax(0)).sum(), None),
    "standardized": (lambda p: ((p - p.mean()) / p.std()).sum(), None),
    "log_softmax": (lambda p: -p.log_softmax(0).sum(), lambda p: len(p) * p.softmax(0) - 1),
    "a difference": (lambda p: 1e9 * p.sum() - 1e9 * p.sum() + p.sum(), torch.ones_like),
    "a difference of squares": (far, torch.ones_like),
}


@pytest.mark.parametrize("offset", [0, 1e12])
@pytest.mark.parametrize(("function", "derivative"), CANCELLING.values(), ids=list(CANCELLING))
def test_a_backward_pass_that_cancels(function, derivative, offset):
    """The gradient by hand is what the terms sum to in exact arithmetic."""
    for _ in range(5):
        report = check_gradients(
            lambda p: function(p) + offset, [5 * draw(4)], derivative or torch.zeros_like
        )
        assert report.ok, str(report)


def test_a_sum_over_rows_that_cancels():
    half = 1e8 * draw(50, 3)
    rows = torch.cat([half, -half.flip(0)])
    for loss in (lambda w: (rows @ w).sum(), lambda w: (rows * w).sum() + 1e12):
        report = check_gradients(loss, [draw(3)], torch.zeros_like)
        assert report.ok, str(report)


def test_a_small_element_beside_a_large_one():
    factors = torch.tensor([1e12, 1, 1], dtype=torch.float64)
    signs = torch.tensor([1.0, -1, 1], dtype=torch.float64)
    report = check_gradients(
        lambda p: (factors * p * p).sum(), [draw(3)], lambda p: 2 * signs * factors * p
    )
    assert not report.ok and of(report)["p"].is_wrong.tolist() == [False, True, False]


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1, 1e20])
def test_gradients_of_any_size(scale):
    report = check_gradients(lambda p: scale * p.sum(), [draw(3)], lambda p: -scale * p.sign() ** 2)
    assert_says(report, {"p": "it is minus autograd's"})
    right = check_gradients(lambda p: scale * p.sum(), [draw(3)], lambda p: scale * p.sign() ** 2)
    assert right.ok


def test_a_mask_that_is_wrong_where_a_sum_is_exactly_0():
    """Measuring the effect of rounding never moves a function across its kink."""
    x = torch.tensor([[1.0, 2.0]], dtype=torch.float64)
    w = torch.tensor([2.0, -1.0], dtype=torch.float64)
    for loss in (lambda w: torch.relu(x @ w).sum(), lambda w: (x @ w).clamp(max=0).sum()):
        report = check_gradients(loss, [w], lambda w: torch.zeros(2))
        right = of(report)["w"].autograd
        assert check_gradients(loss, [w], lambda w: right).ok  # noqa: B023
        report = check_gradients(loss, [w], lambda w: x[0] - right)  # noqa: B023
        assert not report.ok and of(report)["w"].is_wrong.all()


class Once(torch.autograd.Function):
    """A square without a second derivative. Its backward pass writes in place and needs Python."""

    @staticmethod
    def forward(ctx, p):
        ctx.save_for_backward(p)
        return p.square()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        (p,) = ctx.saved_tensors
        result = grad.clone()
        result[: len(p) // 2] *= 2
        result[len(p) // 2 :] *= 2
        return result.mul_(p)


@pytest.mark.parametrize("offset", [0, 1e12])
def test_a_function_without_a_second_derivative(offset):
    loss = lambda p: Once.apply(p + 1e6).sum() + offset  # noqa: E731
    p = draw(5)
    assert check_gradients(loss, [p], lambda p: 2 * (p + 1e6)).ok
    assert not check_gradients(loss, [p], lambda p: -2 * (p + 1e6)).ok


def test_the_random_numbers_of_the_caller_are_left_alone():
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    p = torch.ones(3)
    check_gradients(lambda p: p.square().sum(), [p], lambda p: 2 * p)
    assert torch.equal(torch.rand(4), expected)


# -- Units of the errors ---------------------------------------------------------


def linear_case(gradient, by_hand):
    """The report on a function with exactly that gradient."""
    gradient = torch.as_tensor(gradient, dtype=torch.float64)
    p = torch.zeros_like(gradient)
    return check_gradients(lambda p: (gradient * p).sum(), [p], lambda p: by_hand)


def steps(tensor, count):
    """The number that lies `steps` neighbors farther from 0, or nearer if it is negative."""
    for _ in range(abs(count)):
        towards = tensor.sign() * math.inf if count > 0 else torch.zeros_like(tensor)
        tensor = torch.nextafter(tensor, towards)
    return tensor


def test_units_in_the_last_place():
    gradient = torch.tensor([1.5, -3.0, 1e-300, 0.1, 1e300, 7.0], dtype=torch.float64)
    for count in (1, 2, 17, -1, -3):
        report = linear_case(gradient, steps(gradient, count))
        assert {e.ulps for e in report.worst(6)} == {float(abs(count))}
    # below a power of 2 the neighbor is nearer
    assert linear_case([4.0], steps(torch.tensor([4.0]).double(), -1)).worst()[0].ulps == 0.5
    assert linear_case([4.0], steps(torch.tensor([4.0]).double(), 1)).worst()[0].ulps == 1
    # the smallest positive number, next to 0
    smallest = torch.tensor([5e-324], dtype=torch.float64)
    assert linear_case([0.0], smallest).worst()[0].ulps == 1
    assert linear_case([1.5, 0.0], torch.tensor([1.5, 0.0]).double()).worst()[0].ulps == 0


@pytest.mark.parametrize("dtype", support.DTYPES, ids=str)
def test_ulp_is_the_distance_to_the_next_number(dtype):
    info = torch.finfo(dtype)
    values = torch.tensor([1.0, 1.5, 3.0, 0.1, 1000.0, info.smallest_normal, info.max / 2])
    values = torch.tensor([info.max / 2, info.smallest_normal], dtype=dtype).double().tolist()
    values = torch.tensor([1.0, 1.5, 3.0, 0.1, 1000.0, 0.0, *values], dtype=dtype)
    expected = torch.nextafter(values, torch.full_like(values, math.inf)).double() - values.double()
    assert torch.equal(ulp(values, dtype), expected)
    assert torch.equal(ulp(-values, dtype), expected)


def test_the_largest_error_is_relative_above_1():
    by_hand = torch.tensor([0.501, 201.0], dtype=torch.float64)
    report = linear_case([0.5, 200.0], by_hand)
    assert report.max_error == 1 / 200
    by_hand = torch.tensor([2.5, 2001.0], dtype=torch.float64)
    assert linear_case([0.5, 2000.0], by_hand).max_error == 2
    assert linear_case([], torch.zeros(0)).max_error == 0
    assert linear_case([1.0, 2.0], torch.tensor([1.0, math.nan])).max_error == math.inf
    assert linear_case([1.0, 2.0], torch.tensor([1.0, -math.inf])).max_error == math.inf


def test_the_worst_elements():
    a, b = torch.tensor([[10.0, 20.0], [30.0, 40.0]]).double(), torch.tensor([5.0, 6.0]).double()
    wrong_a = a + torch.tensor([[0.0, 0.5], [-3.0, 0.25]])
    report = check_gradients(
        lambda p, q: (a * p).sum() + (b * q).sum(),
        {"p": torch.zeros(2, 2), "q": torch.zeros(2)},
        lambda p, q: {"p": wrong_a, "q": b + torch.tensor([-1.0, 0.0])},
    )
    found = [(e.parameter, e.index, e.by_hand, e.autograd, e.difference) for e in report.worst(4)]
    assert found == [
        ("p", (1, 0), 27.0, 30.0, -3.0),
        ("q", (0,), 4.0, 5.0, -1.0),
        ("p", (0, 1), 20.5, 20.0, 0.5),
        ("p", (1, 1), 40.25, 40.0, 0.25),
    ]
    assert report.worst(1) == report.worst()[:1]
    assert len(report.worst()) == 6  # of six elements
    assert report.worst(0) == []
    assert [e.ulps for e in report.worst(2)] == [3 / ulp(torch.tensor(30.0)).item(), 1 / 2.0**-50]


def test_only_eight_are_shown_of_many():
    report = check_gradients(lambda p: p.square().sum(), [draw(40)], lambda p: 2 * p + p.abs() / 8)
    differences = [abs(e.difference) for e in report.worst(40)]
    assert len(report.worst()) == 8 and differences == sorted(differences, reverse=True)
    shown = [str(e) for e in report.worst()]
    lines = str(report).splitlines()
    head = lines.index(HEAD)
    assert lines[head + 1 : head + 9] == shown
    assert lines[head + 9].startswith("(of 40 elements, those where by hand and autograd differ")


# -- Kinks -----------------------------------------------------------------------


@pytest.mark.parametrize("distance", [0, 0.3, 2 / 3, 0.9, 1, 1.5, 1.9])
@pytest.mark.parametrize("eps", [None, 1e-4, 1e-2])
@pytest.mark.parametrize("at", [0.25, -40.0])
def test_a_kink_within_the_step(at, eps, distance):
    """On either side, on or off. It is reported, but does not reject a right derivation."""
    p = torch.tensor([at] * 5, dtype=torch.float64)
    side = torch.tensor([-1.0, -1.0, 1.0, 1.0, 1.0], dtype=torch.float64)
    on = torch.tensor([-2.0, 2.0, -2.0, 2.0, 0.0], dtype=torch.float64)  # the last layer has none
    kink = at + side * distance * (eps or STEP) * max(1.0, abs(at))

    def loss(p):
        return (3 * p + torch.relu(on * (p - kink))).sum()

    report = check_gradients(loss, [p], lambda p: 3 + on * (on * (p - kink) > 0), eps=eps)
    assert of(report)["p"].is_at_kink.tolist() == [True, True, True, True, False]
    assert report.ok and report.max_error < 1e-15
    text = "4 of 5 elements are so near a kink of the loss that the numerical value means nothing"
    assert findings(report) == {"p": [text]}
    assert f"\np: {text}.\n" in str(report)
    lines = [line for line in str(report).splitlines() if line.startswith("p[")]
    assert ["at a kink" in line for line in lines] == [True, True, True, True, False]


@pytest.mark.parametrize("distance", [2.1, 3, 100])
@pytest.mark.parametrize("side", [-1, 1])
@pytest.mark.parametrize("eps", [None, 1e-4, 1e-2])
def test_a_kink_beyond_the_step(eps, side, distance):
    kink = 0.25 + side * distance * (eps or STEP)
    p = torch.tensor([0.25], dtype=torch.float64)
    report = check_gradients(
        lambda p: 3 * p.sum() + 2 * torch.relu(p - kink).sum(),
        [p],
        lambda p: 3 + 2 * (p > kink),
        eps=eps,
    )
    found = of(report)["p"]
    assert report.ok and not findings(report)
    # the function is linear there, so only rounding remains of the difference
    assert (found.numerical - found.autograd).abs() <= 16 * 2.0**-53 * 5 / report.eps


@pytest.mark.parametrize("seed", range(30))
def test_no_kink_rejects_a_right_derivation(seed):
    """Wherever the kink is, and however small it is next to slope and curvature."""
    r = random.Random(seed)
    eps = r.choice([STEP, 1e-4, 1e-3])
    count = 20
    slope = torch.tensor([r.choice([0, 1, -30]) for _ in range(count)], dtype=torch.float64)
    bend = torch.tensor([r.choice([0, 1, -5]) for _ in range(count)], dtype=torch.float64)
    jump = torch.tensor([10 ** r.uniform(-9, 1) for _ in range(count)], dtype=torch.float64)
    at = torch.tensor([r.uniform(-1, 1) for _ in range(count)], dtype=torch.float64)
    kink = at + eps * torch.tensor([r.uniform(-3, 3) for _ in range(count)], dtype=torch.float64)
    report = check_gradients(
        lambda p: (slope * p + bend * p**2 + jump * torch.relu(p - kink)).sum(),
        [at],
        lambda p: slope + 2 * bend * p + jump * (p > kink),
        eps=eps,
    )
    assert report.ok, str(report)


def test_a_pre_activation_of_exactly_0(backend):
    """The weights that move it are at a kink. The weights above and beside it are not."""
    x = torch.tensor([[1.0, 2.0, 0.0]], dtype=torch.float64)
    first = torch.tensor([[2.0, -1.0, 5.0], [1.0, 1.0, 1.0]], dtype=torch.float64)
    second = torch.tensor([[3.0, 1.0]], dtype=torch.float64)
    biases = [torch.zeros(2).double(), torch.ones(1).double()]
    report = check_gradients(x, torch.zeros(1, 1).double(), [first, second], biases)
    found = of(report)
    assert found["weights[0]"].is_at_kink.tolist() == [[True, True, False], [False] * 3]
    assert found["biases[0]"].is_at_kink.tolist() == [True, False]
    assert not found["weights[1]"].is_at_kink.any() and not found["biases[1]"].is_at_kink.any()
    assert found["weights[0]"].by_hand[0].tolist() == [0, 0, 0]
    assert report.ok


def test_a_wrong_derivation_at_a_kink_is_wrong():
    """relu'(0) is 0 here, as in PyTorch. A mask of >= is found."""
    p = torch.zeros(1, dtype=torch.float64)
    report = check_gradients(lambda p: torch.relu(p).sum(), [p], lambda p: (p >= 0).double())
    assert not report.ok and "wrong by hand" in str(report) and "at a kink" in str(report)


SMOOTH = {
    "sigmoid": (torch.sigmoid, lambda p: torch.sigmoid(p) * (1 - torch.sigmoid(p))),
    "tanh": (torch.tanh, lambda p: 1 - torch.tanh(p) ** 2),
    "exp": (torch.exp, torch.exp),
    "square": (torch.square, lambda p: 2 * p),
    "cosine": (torch.cos, lambda p: -torch.sin(p)),
}


@pytest.mark.parametrize("eps", [None, 1e-4, 1e-3, 1e-2])
@pytest.mark.parametrize(("function", "derivative"), SMOOTH.values(), ids=list(SMOOTH))
def test_smooth_functions_have_no_kinks(function, derivative, eps):
    """Also where their slope is 0, and where the function itself is 0."""
    p = torch.cat([torch.linspace(-3, 3, 25, dtype=torch.float64), draw(25)])
    for offset in (0.0, 100.0):
        report = check_gradients(lambda p: function(p).sum() + offset, [p], derivative, eps=eps)  # noqa: B023
        assert report.ok and not findings(report), str(report)
    for value in p[:25:4]:
        report = check_gradients(lambda p: function(p).sum(), [value], derivative, eps=eps)
        assert report.ok and not findings(report), str(report)


# -- Where autograd itself is wrong ----------------------------------------------


class WrongSquare(torch.autograd.Function):
    """x². Its author forgot the 2 for one element."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        factor = torch.full_like(x, 2.0)
        factor[1] = 1.0
        return grad * factor * x


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("repeated", [True, False])
def test_a_wrong_backward_is_found_by_the_differences(repeated, dtype):
    """Even if the derivation by hand repeats the mistake."""
    x = torch.tensor([1.0, 3.0, -2.0], dtype=dtype)

    def backward(x):
        return torch.tensor([2.0, 1.0 if repeated else 2.0, 2.0]) * x

    report = check_gradients(lambda x: WrongSquare.apply(x).sum(), [x], backward)
    found = of(report)["x"]
    assert not report.ok and "\nNOT OK." in str(report)
    assert found.is_disputed.tolist() == [False, True, False]
    assert found.is_wrong.tolist() == [False, not repeated, False]
    assert (report.max_error == 0) == repeated
    (sentence,) = [s for s in findings(report)["x"] if "contradicts" in s]
    assert sentence.startswith("the difference quotient contradicts autograd, as in x[1] ")
    assert f"\nx: {sentence}.\n" in str(report)


@pytest.mark.parametrize("relative", [1e-2, 1e-4, 1e-5])
def test_how_small_a_mistake_the_differences_find(relative):
    class Scaled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.exp()

        @staticmethod
        def backward(ctx, grad):
            return grad * (1 + relative) * torch.tensor([0.5]).exp().double()

    x = torch.tensor([0.5], dtype=torch.float64)
    by_hand = lambda x: (1 + relative) * torch.tensor([0.5]).exp().double()  # noqa: E731
    report = check_gradients(lambda x: Scaled.apply(x).sum(), [x], by_hand)
    assert report.max_error == 0 and not report.ok


# -- Invalid functions -----------------------------------------------------------


def test_a_function_with_two_values():
    p = draw(3)
    for loss in (
        lambda p: (p * torch.rand(3)).sum(),
        lambda p: nn.functional.dropout(p, 0.5, training=True).sum(),
    ):
        torch.manual_seed(1)
        raised(
            lambda: check_gradients(loss, [p], torch.ones_like),  # noqa: B023
            RuntimeError,
            ["function", "same value", "Seed"],
        )

    def seeded(p):
        noise = torch.rand(3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        return (p * noise).sum()

    noise = torch.rand(3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert check_gradients(seeded, [p], lambda p: noise).ok


def test_functions_that_change_their_inputs():
    def loss(w, b):
        w.mul_(2)
        b += 1
        return (w * b).sum()

    def backward(w, b):
        w.mul_(4)  # d/dw 2 w (b + 1)
        b += 1
        return 2 * b, w / 2

    w, b = draw(3), draw(3)
    before = w.clone(), b.clone()
    report = check_gradients(loss, [w, b], backward)
    assert report.ok, str(report)
    assert torch.equal(w, before[0]) and torch.equal(b, before[1])


FUNCTIONS = {
    "a number": (lambda p: 3.0, TypeError, ["function", "Tensor", "float"]),
    "nothing": (lambda p: None, TypeError, ["function", "Tensor", "NoneType"]),
    "a vector": (lambda p: 2 * p, RuntimeError, ["function", "one element", "(3,)"]),
    "no elements": (lambda p: p[:0], RuntimeError, ["function", "one element", "(0,)"]),
    "detached": (lambda p: p.detach().sum(), RuntimeError, ["function", "differentiable"]),
    "an item": (lambda p: torch.tensor(p.sum().item()).double(), RuntimeError, ["differentiable"]),
    "of something else": (
        lambda p: torch.ones(1, dtype=torch.float64),
        RuntimeError,
        ["function", "depend on its inputs"],
    ),
    "in float32": (lambda p: p.float().sum(), RuntimeError, ["function", "float64", "float32"]),
    "with float32": (
        lambda p: torch.ones(3) @ p,
        RuntimeError,
        ["function", "float64", "Pass every tensor that they use as an input"],
    ),
}


@pytest.mark.parametrize(("loss", "error", "words"), FUNCTIONS.values(), ids=list(FUNCTIONS))
def test_bad_functions(loss, error, words):
    raised(lambda: check_gradients(loss, [draw(3)], torch.ones_like), error, words)


def test_a_backward_in_another_dtype():
    matrix = torch.ones(3, 3)
    words = ["function", "float64", "Pass every tensor that they use as an input"]
    loss = lambda p: (matrix.double() @ p).sum()  # noqa: E731
    raised(lambda: check_gradients(loss, [draw(3)], lambda p: matrix @ p), RuntimeError, words)


RESULTS = {
    "a number": (lambda a, b: 3.0, TypeError, ["backward", "sequence", "mapping", "float"]),
    "a number among them": (lambda a, b: (a, 3.0), TypeError, ["backward", "b", "Tensor", "float"]),
    "a list": (lambda a, b: (a, b.tolist()), TypeError, ["backward", "b", "Tensor", "list"]),
    "few": (lambda a, b: (a,), ValueError, ["backward", "a, b", "got 1"]),
    "one tensor": (lambda a, b: a, ValueError, ["backward", "a, b", "got 1"]),
    "nothing": (lambda a, b: None, ValueError, ["backward", "a, b", "got 1"]),
    "none at all": (lambda a, b: (None, None), ValueError, ["backward", "a or b", "got none"]),
    "an empty mapping": (lambda a, b: {}, ValueError, ["backward", "a or b", "got none"]),
    "a complex one": (
        lambda a, b: (b, a * 1j),
        TypeError,
        ["backward", "b", "real", "complex128"],
    ),
    "many": (lambda a, b: (a, b, a), ValueError, ["backward", "a, b", "got 3"]),
    "unknown": (lambda a, b: {"a": a, "c": b}, ValueError, ["backward", "a, b", "['c']"]),
}


@pytest.mark.parametrize(("backward", "error", "words"), RESULTS.values(), ids=list(RESULTS))
def test_bad_results_of_backward(backward, error, words):
    inputs = [draw(3), draw(3)]
    raised(lambda: check_gradients(lambda a, b: (a * b).sum(), inputs, backward), error, words)


def test_a_backward_without_its_return():
    def backward(p):
        2 * p

    call = lambda: check_gradients(lambda p: p.square().sum(), [draw(3)], backward)  # noqa: E731
    raised(call, ValueError, ["backward", "gradient", "p", "None", "return"])
    by_name = lambda: check_gradients(torch.sum, {"input": draw(3)}, lambda input: None)  # noqa: E731
    raised(by_name, ValueError, ["backward", "input", "None"])


def test_only_what_is_of_floating_point_is_checked():
    """An integer input has no gradient; a complex input can't be compared with anything."""
    inputs = [draw(3), torch.arange(3), torch.ones(3, dtype=torch.complex128)]

    def loss(a, k, c):
        return (a * k * c.real).sum()

    call = lambda *grads: lambda: check_gradients(loss, inputs, lambda a, k, c: grads)  # noqa: E731
    raised(call(None, inputs[0], None), ValueError, ["backward", "a", "got none"])
    raised(call(inputs[1], None, inputs[0]), TypeError, ["input c", "real", "complex128", "None"])
    assert call(inputs[1], None, None)().ok


def test_a_sparse_gradient():
    places = torch.tensor([2, 0, 2])
    loss = lambda table: torch.nn.functional.embedding(places, table, sparse=True).sum()  # noqa: E731
    right = torch.tensor([[1.0], [0], [2], [0]]).expand(4, 2)
    for by_hand in (right, right.to_sparse()):
        assert check_gradients(loss, [draw(4, 2)], lambda table: by_hand).ok  # noqa: B023
        assert not check_gradients(loss, [draw(4, 2)], lambda table: -by_hand).ok  # noqa: B023


INPUTS = {
    "a tensor": (torch.ones(3), TypeError, ["inputs", "sequence", "Tensor"]),
    "a number": (3, TypeError, ["inputs", "sequence", "int"]),
    "None": (None, TypeError, ["inputs", "sequence", "NoneType"]),
    "a number among them": ([3.0], TypeError, ["p", "Tensor", "float"]),
    "a list by name": ({"p": [1.0]}, TypeError, ["p", "Tensor", "list"]),
    "none": ([], ValueError, ["inputs", "floating-point", "none"]),
    "integers": ([torch.arange(3)], ValueError, ["inputs", "floating-point", "none"]),
}


@pytest.mark.parametrize(("inputs", "error", "words"), INPUTS.values(), ids=list(INPUTS))
def test_bad_inputs(inputs, error, words):
    raised(lambda: check_gradients(lambda p: p.sum(), inputs, torch.ones_like), error, words)


def test_backward_is_no_function():
    words = ["backward", "callable", "Tensor"]
    raised(lambda: check_gradients(torch.sum, [draw(3)], draw(3)), TypeError, words)


def test_options_of_a_network_are_not_for_functions():
    for options in ({"loss": "mse"}, {"output_activation": "relu"}, {"biases": [draw(3)]}):
        call = lambda: check_gradients(torch.sum, [draw(3)], torch.ones_like, **options)  # noqa: B023, E731
        raised(call, TypeError, ["check_gradients(function, inputs, backward)", "eps"])


@pytest.mark.parametrize("bad", NETWORKS.values(), ids=list(NETWORKS))
def test_bad_networks(bad):
    call = lambda: check_gradients(bad.x, torch.ones(5, 2), bad.weights, bad.biases)  # noqa: E731
    under_every_backend(call, bad.expected_error(), bad.words)


@pytest.mark.parametrize(("target", "error", "words"), TARGETS.values(), ids=list(TARGETS))
def test_bad_targets(target, error, words):
    weights = [torch.ones(4, 3), torch.ones(2, 4)]
    call = lambda: check_gradients(torch.ones(5, 3), target, weights)  # noqa: E731
    under_every_backend(call, error, words)


@pytest.mark.parametrize("option", ["loss", "output_activation"])
def test_bad_options(option):
    x, target, weights, biases = make_case_with_target([3, 2])
    for value in NO_LOSSES if option == "loss" else NO_ACTIVATIONS:
        call = lambda: check_gradients(x, target, weights, biases, **{option: value})  # noqa: B023, E731
        under_every_backend(call, ValueError, [option, repr(value)])


# -- Missing, nonfinite, empty or large gradients --------------------------------


def test_what_was_not_derived():
    net = Perceptron()
    report = net.check(b1=lambda g: None, w2=lambda g: 2 * g)
    said = findings(report)
    assert list(said) == ["b1", "w2"] and said["b1"] == ["no gradient by hand was given"]
    assert said["w2"][0].startswith("wrong by hand: it is 2 times autograd's")
    without = check_gradients(
        net.loss, net.inputs, lambda **inputs: {"w1": net.backward(**inputs)["w1"]}
    )
    assert without.ok and list(findings(without)) == ["b1", "w2", "b2"]
    assert of(without)["b1"].by_hand is None and of(without)["b1"].max_error == 0
    line = next(line for line in str(without).splitlines() if line.startswith("b1[0]"))
    assert line.split()[1:3] == ["not", "given"] and "nan" not in line


@pytest.mark.parametrize("where", ["x", "target", "weights[0]", "biases[0]"])
@pytest.mark.parametrize("special", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite(backend, special, where):
    """By hand and autograd may agree on such a loss; there is nothing else to compare with."""
    x, target, weights, biases = make_case_with_target([3, 4, 2])
    tensors = {"x": x, "target": target, "weights[0]": weights[0], "biases[0]": biases[0]}
    tensors[where].view(-1)[1] = special
    report = check_gradients(x, target, weights, biases)
    error = support.native_mlp(x, weights, biases) - target
    if where == "biases[0]" and special == -math.inf:  # a unit that is always off
        assert report.loss == pytest.approx(error.square().sum().item(), rel=1e-14)
    else:
        assert not math.isfinite(report.loss)
        assert "nan" in str(report)
    for parameter in report.parameters:
        assert not parameter.is_disputed.any() and not parameter.is_at_kink.any()
        if parameter.max_error == 0:
            assert parameter.ok


def test_gradients_that_are_not_finite():
    """Equal infinities, or two NaNs, count as no difference. Anything else is an infinite one."""
    gradient = [math.nan, math.inf, -math.inf, 2.0]
    same = torch.tensor(gradient, dtype=torch.float64)
    assert linear_case(gradient, same).ok and linear_case(gradient, same).max_error == 0
    for index, value in [(0, 1.0), (1, -math.inf), (1, math.nan), (2, 5.0), (3, math.nan)]:
        other = same.clone()
        other[index] = value
        report = linear_case(gradient, other)
        assert not report.ok and report.max_error == math.inf
        assert of(report)["p"].is_wrong.nonzero().tolist() == [[index]]
        assert "wrong by hand" in str(report)


def test_parameters_without_elements():
    report = check_gradients(
        lambda a, b: a.sum() + b.sum(),
        [torch.zeros(0, 3), draw(2)],
        lambda a, b: (torch.ones(0, 3), torch.ones(2)),
    )
    assert report.ok and report.max_error == 0 and len(report.worst()) == 2
    report = check_gradients(
        lambda a, b: a.sum() + b.sum(),
        [torch.zeros(0, 3), draw(2)],
        lambda a, b: (torch.ones(3, 0), torch.ones(2)),
    )
    said = "it has shape (3, 0) instead of (0, 3); it is the transpose"
    assert_says(report, {"a": said})


@pytest.mark.parametrize(("sizes", "rows"), [([3, 4, 2], 0), ([0, 4, 2], 3), ([3, 4, 0], 3)])
def test_networks_of_size_0(backend, sizes, rows):
    x, target, weights, biases = make_case_with_target(sizes, rows)
    report = check_gradients(x, target, weights, biases)
    assert report.ok and report.max_error < 1e-14


def test_of_a_large_parameter_4096_elements_have_a_numerical_gradient():
    p = torch.zeros(4100)
    report = check_gradients(torch.sum, [p], torch.ones_like)
    assert (~of(report)["inputs[0]"].numerical.isnan()).sum() == 4096
    assert report.ok and not findings(report)


@pytest.mark.parametrize("shape", [(8, 8), (33,), (2, 32), (32, 2), (3, 4, 5)], ids=str)
def test_large_parameters(monkeypatch, shape):
    """The elements with a numerical gradient spread over all rows and columns. The other elements
    are compared too.
    """
    monkeypatch.setattr(differences, "MAX_ELEMENTS", 32)
    gradient, p = draw(*shape), torch.zeros(shape)
    report = check_gradients(lambda p: (p * gradient).sum(), [p], lambda p: gradient)
    has_one = ~of(report)["p"].numerical.isnan()
    assert has_one.sum() == 32 < p.numel()
    for dim in range(len(shape)):
        places = has_one.movedim(dim, 0).reshape(shape[dim], -1).any(1)
        assert places.sum() >= min(shape[dim], 32) / 2
    assert report.ok and not findings(report)
    index = tuple((~has_one).nonzero()[-1].tolist())
    report = check_gradients(lambda p: (p * gradient).sum(), [p], lambda p: change(index)(gradient))
    assert list(wrong(report)) == ["p"]
    assert report.worst()[0].index == index and math.isnan(report.worst()[0].numerical)


# -- The report ------------------------------------------------------------------


def test_the_text_of_a_small_network(backend):
    """With integers and a step of 2⁻¹⁰, every number in the report is exact."""
    x = torch.tensor([[1.0, 2.0], [0.0, 1.0]])
    weights, biases = [torch.tensor([[3.0, -1.0]])], [torch.tensor([2.0])]
    target = torch.tensor([[1.0], [3.0]])  # with the outputs 3 and 1, the errors are 2 and -2
    report = check_gradients(x, target, weights, biases, eps=2.0**-10)
    assert str(report).splitlines() == [
        "The gradient of the sse loss of a 2-1 network over 2 rows.",
        "The float32 input is checked in float64.",
        "Numerical: central differences with the step 0.00098 * max(1, |element|).",
        "",
        "                              by hand           autograd          numerical  "
        "hand-auto  in ulps",
        "weights[0][0, 0]                    4                  4                  4    "
        "0.0e+00        0",
        "weights[0][0, 1]                    4                  4                  4    "
        "0.0e+00        0",
        "biases[0][0]                        0                  0                  0    "
        "0.0e+00        0",
        "",
        "OK. By hand and autograd differ by at most 0 "
        "(of autograd's value, where that is above 1).",
    ]


def test_the_text_of_a_wrong_derivation():
    w, b = torch.tensor([[1.0, 2.0]]).double(), torch.tensor(3.0).double()
    x = torch.tensor([4.0, -1.0]).double()

    def squared_error(w, b):
        return (w @ x + b).square().sum()

    report = check_gradients(
        squared_error,
        [w, b],
        lambda w, b: (2 * (w @ x + b) * x[None], (w @ x + b).sum()),
        eps=2**-6,
    )
    assert str(report).splitlines() == [
        "The gradient of squared_error(w, b).",
        "Numerical: central differences with the step 0.016 * max(1, |element|).",
        "",
        HEAD,
        "w[0, 0]                            40                 40                 40    "
        "0.0e+00        0",
        "w[0, 1]                           -10                -10                -10    "
        "0.0e+00        0",
        "b                                   5                 10                 10   "
        "-5.0e+00  2.8e+15",
        "",
        "b: wrong by hand: it is 1/2 of autograd's: the derivative of a square, (w @ x + b)**2, "
        "has a factor 2.",
        "NOT OK. By hand and autograd differ by at most 0.5 "
        "(of autograd's value, where that is above 1).",
    ]


@pytest.mark.parametrize(("elements", "lines"), [(24, 24), (25, 9)])
def test_the_table_shows_all_of_few_elements(elements, lines):
    report = check_gradients(lambda p: p.square().sum(), [draw(elements)], lambda p: 2 * p)
    text = str(report).splitlines()
    start = text.index(HEAD) + 1
    assert len(text[start : text.index("", start)]) == lines
    assert all(len(line.rstrip()) <= 100 for line in text)


# -- What it leaves alone --------------------------------------------------------


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_nothing_of_the_callers_is_changed(backend, mode):
    x, target, weights, biases = make_case_with_target([3, 4, 2])
    net = Perceptron()
    tensors = [x, target, *weights, *biases, *net.inputs.values()]
    for tensor in tensors:
        tensor.requires_grad_().grad = torch.ones_like(tensor)
    before = snapshot(tensors)
    with mode():
        enabled, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        report = check_gradients(x, target, weights, biases, output_activation="tanh")
        assert report.ok and net.check().ok
        assert torch.is_grad_enabled() == enabled
        assert torch.is_inference_mode_enabled() == inference
    assert_unchanged(before)
    assert all(tensor.requires_grad for tensor in tensors)
    for parameter in report.parameters:
        assert not parameter.autograd.requires_grad and not parameter.by_hand.requires_grad
    assert relu_mlp.build_info().backend == backend


def test_tensors_of_inference_mode(backend):
    with torch.inference_mode():
        x, target, weights, biases = make_case_with_target([3, 4, 2])
    assert check_gradients(x, target, weights, biases).ok
    assert check_gradients(lambda w: w.square().sum(), weights[:1], lambda w: 2 * w).ok


def test_a_graph_is_not_followed():
    """Inputs that are not leaves, and a gradient by hand that carries a graph."""
    w = (draw(3).requires_grad_() * 2).exp()
    scale = torch.ones(3, dtype=torch.float64, requires_grad=True)
    report = check_gradients(lambda w: w.square().sum(), [w], lambda w: 2 * w * scale)
    assert report.ok and not of(report)["w"].by_hand.requires_grad and scale.grad is None


def test_iterators_and_tuples(backend):
    x, target, weights, biases = make_case_with_target([3, 4, 2])
    expected = str(check_gradients(x, target, weights, biases))
    for kind in (tuple, iter, nn.ParameterList):
        assert str(check_gradients(x, target, kind(weights), kind(biases))) == expected


def strided(tensor):
    return torch.stack([tensor, torch.full_like(tensor, 7)], -1)[..., 0]


def test_memory_layouts():
    w = draw(3, 4)
    for strange in (w.T.contiguous().T, strided(w), draw(4).expand(3, 4), torch._neg_view(-w)):
        coefficients = draw(3, 4)
        report = check_gradients(
            lambda w: (w.square() * coefficients).sum(),  # noqa: B023
            [strange],
            lambda w: 2 * w * coefficients,  # noqa: B023
        )
        assert report.ok and not findings(report), str(report)


def test_x_of_more_dimensions(backend):
    weights, biases = support.make_network([3, 4, 2])
    report = check_gradients(draw(2, 3, 3), draw(2, 3, 2), weights, biases)
    assert report.ok and "a 3-4-2 network over 6 rows" in str(report)
    assert check_gradients(draw(3), draw(2), weights, biases).ok


def test_targets_of_integers(backend):
    x, _, weights, biases = make_case_with_target([3, 2])
    for target in (torch.randint(5, (5, 2)), torch.rand(5, 2) < 0.5):
        assert check_gradients(x, target, weights, biases).ok
