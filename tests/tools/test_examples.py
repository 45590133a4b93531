"""The programs in examples/: each runs and prints the figures that its page quotes. If one gradient
is wrong, it stops with a message that names the mistake.
"""

import importlib
import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import relu_mlp
import support
from relu_mlp import LossAndGrads

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"

# The others share agreement.py. digits.py is `make demo`, which `.ci/run` runs: it
# needs scikit-learn, which the tests do not.
PROGRAMS = sorted({path.stem for path in EXAMPLES.glob("*.py")} - {"agreement", "digits"})

# The output that a program must print. Its page in docs/examples quotes each of these too.
FIGURES = {
    "two_layers": [
        " 499  loss           150.095557815     150.095557815     150.095557815",
        " 499  biases[1]      228.714299669     228.714299669     228.714299669",
        "   -145.8972     -2.9043    175.9009",
        "     27.0994     27.0994     27.0994",
    ],
    "four_runs": [
        "rounding explains 3.0e-14 in the first step, 8.3e-13 in the last",
        "rounding explains 4.0e-14 in the first step, 5.0e-13 in the last",
        " 499    159.0668503850    150.0955578154    150.0955578154    150.0955578154",
        "  99        179.580027     180.519027 +0.5229%     179.920388 +0.1895%     181.017463 ",
        " 499        150.095558     151.498237 +0.9345%     152.138210 +1.3609%     153.602907 ",
    ],
    "numerical_gradient": [
        "W[0, 0]   -0.1916842751   -0.1916842751   -0.1916842751   -0.191684275",
        "W[0, 1]   -0.1505403047   -0.1505403047   -0.1505403047   -0.150540304",
        "W[1, 0]   -0.5027215624   -0.5027215624   -0.5027215624   -0.502721564",
        "W[1, 1]   -0.0967040759   -0.0967040759   -0.0967040759   -0.096704076",
        "W[2, 0]   -0.0302279895   -0.0302279895   -0.0302279895   -0.030227989",
        "W[2, 1]   -0.2850716981   -0.2850716981   -0.2850716981   -0.285071699",
        "W[2, 0]    4.0000000000    4.0000000000    4.0000000000    4.000000000",
    ],
    "full_size": [
        "rounding explains 6.3e-13 in the first step, 7.2e-06 in the last",
        "   0      25856544.7      25856544.7      25856544.7",
        "  99      193.548768      193.548768      193.548768",
    ],
    "physics_informed": [
        "loss by hand          0.428201514337",
        "loss by torch.func    0.428201514337",
        "loss by create_graph  0.428201514337",
    ],
    "gradient_penalty": [
        "   0  8.772115358660  8.772115358660 ",
        " 149 -2.049859034425 -2.049859034425 ",
        "D rises by 2.1758, with a slope of 1.1011",
    ],
    "per_sample": [
        "256 gradients of 4801 parameters are 1229056 numbers;",
        "the activations and their gradients, which the norms need, are 66048",
        "   0   1.894339         27.772695        218 ",
        "  49   0.189603         19.774683        224 ",
    ],
    "sweep": ["21 networks, 160 steps", "the same bits when it is trained alone"],
}

# The files that a program writes without --out. The others write none.
WRITTEN = {name: [f"demo/{name}.png"] for name in ("levenberg_marquardt", "sweep")}


@pytest.mark.slow
@pytest.mark.covering(strength=1)  # every program once, by turns on each backend
@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.parametrize("backend", support.BACKENDS)
def test_runs_and_prints_its_figures(name, backend, tmp_path):
    package = str(Path(relu_mlp.__file__).parent.parent)
    path = os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH")])])
    # In networks of this size, a second thread would only wait.
    variables = {"PYTHONPATH": path, "RELU_MLP_BACKEND": backend, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, str(EXAMPLES / f"{name}.py")],
        cwd=tmp_path,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    for figure in FIGURES.get(name, []):
        assert figure in result.stdout, result.stdout
    left = [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()]
    assert left == WRITTEN.get(name, [])


@pytest.mark.parametrize("name", FIGURES)
def test_page_quotes_the_figures(name):
    page = (ROOT / "docs" / "examples" / f"{name}.md").read_text(encoding="utf-8")
    for figure in FIGURES[name]:
        assert figure in page


# -- They can fail ---------------------------------------------------------------


@pytest.fixture
def load(monkeypatch):
    """Imports a program again. Nothing of it stays behind."""
    monkeypatch.syspath_prepend(str(EXAMPLES))

    def function(name, steps):
        for stale in ("agreement", name):
            monkeypatch.setitem(sys.modules, stale, None)  # to be put back afterwards
            del sys.modules[stale]
        module = importlib.import_module(name)
        if steps:
            monkeypatch.setattr(module, "STEPS", steps)
        return module

    return function


def fails(module):
    """The message with which a program stops."""
    with pytest.raises(SystemExit) as stop:
        module.main()
    message = stop.value.code  # a string: Python prints it and ends with status 1
    assert isinstance(message, str) and message.startswith("FAILED: ")
    return message


# Mistakes. Each gets the right gradients, with biases, and makes wrong ones of them.


def divides_bias_gradients(right, x, target, weights, biases):
    """Document 001."""
    return right._replace(biases=tuple(grad / len(x) for grad in right.biases))


def masks_before_the_bias(right, x, target, weights, biases):
    """Document 001."""
    (w1, w2), (b1, b2) = weights, biases
    grad_y = 2 * ((x @ w1.T + b1).clamp(min=0) @ w2.T + b2 - target)
    grad_z = (grad_y @ w2).masked_fill(x @ w1.T <= 0, 0)
    return LossAndGrads(
        right.loss, (grad_z.T @ x, right.weights[1]), (grad_z.sum(0), right.biases[1])
    )


def sums_over_outputs(right, x, target, weights, biases):
    """Document 000, with the right shape. With one output the mistake would not show."""
    grad_b1, grad_b2 = right.biases
    return right._replace(biases=(grad_b1, grad_b2.sum().expand(grad_b2.shape)))


def sums_everything(right, x, target, weights, biases):
    """Document 000."""
    grad_b1, grad_b2 = right.biases
    return right._replace(biases=(grad_b1, grad_b2.sum()))


def forgets_the_mask(right, x, target, weights, biases):
    grad_y = 2 * (relu_mlp.relu_mlp(x, weights, biases) - target)
    return right._replace(weights=((grad_y @ weights[1]).T @ x, right.weights[1]))


def forgets_the_two(right, x, target, weights, biases):
    return right._replace(weights=(right.weights[0], right.weights[1] / 2))


def computes_in_single_precision(right, x, target, weights, biases):
    single = relu_mlp.loss_and_grads(
        x.float(),
        target.float(),
        [w.float() for w in weights],
        biases and [b.float() for b in biases],
    )
    grad_biases = biases and tuple(grad.double() for grad in single.biases)
    return LossAndGrads(right.loss, tuple(grad.double() for grad in single.weights), grad_biases)


def is_off_in_one_element(right, x, target, weights, biases):
    """Off by a few units of the tenth digit."""
    grad_w2 = right.weights[1].clone()
    grad_w2[0, 1] *= 1 + 5e-10
    return right._replace(weights=(right.weights[0], grad_w2))


def is_nan_in_one_element(right, x, target, weights, biases):
    grad_w1 = right.weights[0].clone()
    grad_w1[1, 2] = torch.nan
    return right._replace(weights=(grad_w1, right.weights[1]))


def has_a_loss_in_single_precision(right, x, target, weights, biases):
    return right._replace(loss=right.loss.float().double())


# The names in the message.
MISTAKES = {
    divides_bias_gradients: r"biases\[0\]\[\d\] is ",
    masks_before_the_bias: r"weights\[0\]\[\d, \d\] is ",
    sums_over_outputs: r"biases\[1\]\[\d\] is ",
    sums_everything: r"biases\[1\] has shape \(\) by .* and \(1,\) by autograd",
    forgets_the_mask: r"weights\[0\]\[\d+, \d+\] is ",
    forgets_the_two: r"weights\[1\]\[\d, \d+\] is ",
    computes_in_single_precision: r"weights\[0\]\[\d+, \d+\] is ",
    is_off_in_one_element: r"weights\[1\]\[0, 1\] is ",
    is_nan_in_one_element: r"weights\[0\]\[1, 2\] is nan ",
    has_a_loss_in_single_precision: r"loss is ",
}
IN_BIASES = [divides_bias_gradients, masks_before_the_bias, sums_over_outputs, sums_everything]
CASES = [
    *[("two_layers", mistake) for mistake in MISTAKES],
    *[("four_runs", mistake) for mistake in MISTAKES if mistake is not sums_over_outputs],
    *[("full_size", mistake) for mistake in MISTAKES if mistake not in IN_BIASES],
]


def with_mistake(mistake, right, after=0):
    """The gradients `right`, wrong from some call on."""
    calls = itertools.count()

    def gradients(x, target, weights, biases=None):
        result = right(x, target, weights, *([biases] if biases else []))
        if (biases is None and mistake in IN_BIASES) or next(calls) < after:
            return result
        return mistake(result, x, target, weights, biases)

    return gradients


@pytest.mark.parametrize("way", ["by_hand", "loss_and_grads"])
@pytest.mark.parametrize(("name", "mistake"), CASES)
def test_names_the_wrong_gradient(load, monkeypatch, name, mistake, way):
    module = load(name, steps=2)
    monkeypatch.setattr(module, way, with_mistake(mistake, getattr(module, way)))
    message = fails(module)
    assert re.search(MISTAKES[mistake], message), message
    by = way.replace("_", " ") if way == "by_hand" else "by loss_and_grads"
    assert f" {by} " in message and "by autograd" in message


@pytest.mark.parametrize("way", ["by_hand", "loss_and_grads"])
@pytest.mark.parametrize(
    ("name", "mistake"),
    [
        case
        for case in CASES
        if case[0] != "two_layers" and case[1] not in (sums_everything, is_off_in_one_element)
    ],
)
def test_the_curve_shows_a_mistake_too(load, monkeypatch, name, mistake, way):
    """Also a mistake that is not made in the first step, where the gradients are compared."""
    module = load(name, steps=5)
    monkeypatch.setattr(module, way, with_mistake(mistake, getattr(module, way), after=1))
    assert re.search(r"losses\[\d+\] is ", fails(module))


@pytest.mark.parametrize(("available", "devices"), [(False, ["cpu"]), (True, ["cpu", "cuda"])])
def test_two_layers_runs_on_the_gpu_where_there_is_one(load, monkeypatch, available, devices):
    module = load("two_layers", steps=1)
    runs = []
    monkeypatch.setattr(module, "train", lambda *arguments: runs.append(arguments))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    module.main()
    assert runs == [(outputs, device) for device in devices for outputs in (1, 3)]


# -- The numerical gradient ------------------------------------------------------


def without_its_sigmoid(right, *arguments):
    """Forgets the derivative of the sigmoid."""
    return right(*arguments[:3], None)


def with_half_of_its_sigmoid(right, W, X, T, activation):
    """Y instead of Y (1 - Y)."""
    Y = torch.sigmoid(X @ W) if activation else X @ W
    return X.T @ ((Y - T) * Y) if activation else right(W, X, T, activation)


def summed_in_single_precision(right, *arguments):
    tensors = [a.float() if isinstance(a, torch.Tensor) else a for a in arguments]
    return right(*tensors).to(arguments[0].dtype)


def forward_difference(right, W, X, T, activation, step):
    """(loss(W + step) - loss(W)) / step, whose error is step / 2 times the second derivative."""
    shifts = (step * torch.eye(W.numel(), dtype=W.dtype)).view(-1, *W.shape)
    losses = [0.5 * (X @ (W + shift)).sub(T).square().sum() for shift in shifts]
    if activation:
        losses = [0.5 * (X @ (W + s)).sigmoid().sub(T).square().sum() for s in shifts]
    start = (X @ W).sigmoid() if activation else X @ W
    here = 0.5 * (start - T).square().sum()
    return (torch.stack(losses) - here).view(W.shape) / step


def one_sided_at_large_steps(right, W, X, T, activation, step):
    if step < 0.05:
        return right(W, X, T, activation, step)
    return forward_difference(right, W, X, T, activation, step)


def over_one_step(right, *arguments):
    """Divides by the step instead of twice the step."""
    return 2 * right(*arguments)


@pytest.mark.parametrize(
    ("function", "mistake", "where"),
    [
        ("by_hand", without_its_sigmoid, "Y = sigmoid(X W): gradient of W"),
        ("by_hand", with_half_of_its_sigmoid, "Y = sigmoid(X W): gradient of W"),
        ("by_hand", summed_in_single_precision, "Y = sigmoid(X W): gradient of W"),
        ("numerical", forward_difference, "Y = X W: gradient of W"),
        ("numerical", summed_in_single_precision, "Y = X W: gradient of W"),
        ("numerical", over_one_step, "Y = X W: gradient of W"),
        ("numerical", one_sided_at_large_steps, "gradient of W, step 1e-01, torch.float32"),
    ],
)
def test_numerical_gradient_can_fail(load, monkeypatch, function, mistake, where):
    module = load("numerical_gradient", steps=None)
    right = getattr(module, function)
    monkeypatch.setattr(module, function, lambda *arguments: mistake(right, *arguments))
    by = {"by_hand": "by hand and .* by autograd", "numerical": "numerically and .* by hand"}
    message = fails(module)
    pattern = re.escape(f"FAILED: {where}") + r"\[\d, \d\] is .* " + by[function]
    assert re.match(pattern, message), message


def test_numerical_gradient_knows_ten_digits(load, monkeypatch):
    module = load("numerical_gradient", steps=None)
    monkeypatch.setattr(module, "EXACT", [*module.EXACT[:3], -0.0967040760, *module.EXACT[4:]])
    message = fails(module)
    assert "gradient of W[1, 1] is -0.0967040759" in message and "to ten digits" in message


def test_numerical_gradient_checks_the_package(load, monkeypatch):
    module = load("numerical_gradient", steps=None)

    def in_single_precision(x, target, weights, **options):
        result = relu_mlp.loss_and_grads(x.float(), target.float(), [weights[0].float()], **options)
        return result._replace(weights=(result.weights[0].double(),))

    monkeypatch.setattr(module, "loss_and_grads", in_single_precision)
    assert re.search(r"W\[\d, \d\] is .* by loss_and_grads and .* by autograd", fails(module))


# -- The bounds ------------------------------------------------------------------


def test_bounds_end_at_a_kink(load):
    """A hidden unit at 0 may be on or off, so there is no bound for a gradient there."""
    agreement = load("agreement", steps=None)
    x, target = torch.zeros(1, 3).double(), torch.zeros(1, 1).double()
    weights = [torch.ones(2, 3).double(), torch.ones(1, 2).double()]
    with pytest.raises(SystemExit, match="FAILED: a hidden unit is so close to 0"):
        agreement.gradient_bounds(x, target, weights)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("sizes", [[3, 2, 1], [30, 20, 20, 5]], ids=str)
def test_bounds_hold_and_are_no_wider_than_need_be(load, sizes, bias):
    """In single precision, so that double precision can see every rounding.

    The bounds grow in proportion to the unit roundoff as long as it is small, and cover two
    computations. The largest errors are a few hundredths of the worst case.
    """
    agreement = load("agreement", steps=None)
    weights, biases = support.make_network(sizes, "all", torch.float32)
    biases = biases if bias else None
    x, target = torch.randn(16, sizes[0]), torch.randn(16, sizes[-1])
    double = x.double(), target.double(), [w.double() for w in weights]
    double += (biases and [b.double() for b in biases],)
    bounds = agreement.named(agreement.gradient_bounds(*double))
    exact = agreement.named(agreement.by_autograd(*double))
    single = agreement.named(agreement.by_autograd(x, target, weights, biases))
    scale = 2**29 / 2  # eps of float32 over that of float64, for one computation
    fractions = {
        name: ((single[name] - exact[name]).abs() / (scale * bound).clamp(min=1e-300)).max()
        for name, bound in bounds.items()
    }
    assert all(fraction < 1 for fraction in fractions.values()), fractions
    assert max(fractions.values()) > 1e-3, fractions


def test_a_sweep_that_is_not_the_same_alone(load):
    """The losses of one network, or a parameter of it, off by one bit."""
    module = load("sweep", 0)
    x, target = data = list(module.make_data(10))
    module.RUNS, module.EPOCHS = module.RUNS[:3], 2
    nets, losses = module.train_all(x, target)
    module.check_alone(1, nets, losses, data)
    wrong = losses.clone()
    wrong[1, -1] = wrong[1, -1].nextafter(torch.tensor(torch.inf))
    with pytest.raises(SystemExit, match="seed 1 has other losses"):
        module.check_alone(1, nets, wrong, data)
    with torch.no_grad():
        bias = nets[1][4].bias
        bias.copy_(bias.nextafter(torch.tensor(torch.inf)))
    with pytest.raises(SystemExit, match="parameters"):
        module.check_alone(1, nets, losses, data)
    module.check_alone(2, nets, losses, data)
