"""The two examples about J = dy/dw: they run, print the known figures, and detect mistakes."""

import importlib.util
import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import relu_mlp
from relu_mlp import Parameters, reference
from support import BACKENDS, make_network

pytest.importorskip("pandas")
pytest.importorskip("matplotlib")

EXAMPLES = Path(__file__).parents[2] / "examples"

# The output of the source document: losses of epochs 500, 1000, ..., 5000; w, b.
LOSSES = {
    500: 7.860115051269531,
    1000: 3.828537940979004,
    1500: 3.092191219329834,
    2000: 2.957697868347168,
    2500: 2.933133840560913,
    3000: 2.9286484718322754,
    3500: 2.9278297424316406,
    4000: 2.9276793003082275,
    4500: 2.927651882171631,
    5000: 2.9276468753814697,
}
FINAL = {"b": -17.3012, "w": 5.3671}


def run(name, backend, *arguments, cwd):
    """The program's output. It must end well and print no warnings."""
    package = Path(relu_mlp.__file__).parents[1]
    environment = {"RELU_MLP_BACKEND": backend, "PYTHONPATH": str(package), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-W", "error", EXAMPLES / f"{name}.py", *arguments],
        env=os.environ | environment,
        cwd=cwd,
        capture_output=True,
        text=True,
    )
    assert (result.returncode, result.stderr) == (0, "")
    return result.stdout


def load(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def model_and_loss():
    return load("model_and_loss")


@pytest.fixture
def levenberg_marquardt(monkeypatch, tmp_path):
    threads = torch.get_num_threads()
    monkeypatch.setattr(sys, "argv", ["levenberg_marquardt.py", "--out", str(tmp_path)])
    yield load("levenberg_marquardt")
    torch.set_num_threads(threads)


# -- They run ------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_model_and_loss(backend, tmp_path):
    rows = [line.split() for line in run("model_and_loss", backend, cwd=tmp_path).splitlines()]
    # Six decimals are printed.
    for epoch, loss in LOSSES.items():
        (found,) = (row[2:] for row in rows if row[:2] == ["loss", str(epoch)])
        assert len(found) == 6
        assert all(abs(float(number) - loss) <= 1e-5 * loss + 5e-7 for number in found)
    for name, value in FINAL.items():
        (found,) = (row[1:] for row in rows if row[:1] == [name])
        assert len(found) == 6 and all(round(float(number), 4) == value for number in found)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_levenberg_marquardt(backend, tmp_path):
    printed = run("levenberg_marquardt", backend, "--out", "pictures", cwd=tmp_path)
    (final,) = (line.split() for line in printed.splitlines() if line.startswith("3000 "))
    loss, *of_adam = map(float, final[1:])
    assert len(of_adam) == 3 and 0 < loss <= 1e-6 * min(of_adam)
    assert [path.name for path in tmp_path.rglob("*.*")] == ["levenberg_marquardt.png"]
    picture = tmp_path / "pictures" / "levenberg_marquardt.png"
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size < 100_000
    assert f"Wrote {picture.relative_to(tmp_path)}" in printed


# -- They notice what is wrong -------------------------------------------------


def failure_of(main, capsys):
    with pytest.raises(SystemExit) as stop:
        main()
    capsys.readouterr()
    said = str(stop.value)
    assert said.startswith("FAILED: ") and len(said.splitlines()) == 1
    return said


def change(monkeypatch, owner, name, entry, how):
    """Makes one tensor in the results of `owner.name` wrong: the one at `entry`, (kind, layer)."""
    right = getattr(owner, name)

    def wrong(*arguments, **options):
        result = right(*arguments, **options)
        kind, layer = entry
        tensors = list(getattr(result, kind))
        tensors[layer] = how(tensors[layer])
        return result._replace(**{kind: tuple(tensors)})

    monkeypatch.setattr(owner, name, wrong)


def next_up(tensor):
    """One unit in the last place, which is enough where a check has no tolerance."""
    return torch.nextafter(tensor, torch.full_like(tensor, torch.inf))


@pytest.fixture
def short(model_and_loss, monkeypatch):
    """The line's first 500 epochs, after which its loss depends most on the gradient."""
    known = torch.cat([model_and_loss.KNOWN[:1], torch.zeros(2)])
    limit = torch.cat([model_and_loss.LIMIT[:1], torch.tensor([torch.inf, torch.inf])])
    monkeypatch.setattr(model_and_loss, "EPOCHS", range(500, 501))
    monkeypatch.setattr(model_and_loss, "KNOWN", known)
    monkeypatch.setattr(model_and_loss, "LIMIT", limit)
    return model_and_loss


#: The functions from which the ways get their gradients, besides the Jacobian.
SOURCES = {
    "without J": lambda example: (relu_mlp.Linearization, "vjp"),
    "one call": lambda example: (example, "loss_and_grads"),
}


def test_nothing_is_wrong(short, backend, capsys):
    short.main()
    assert "in every bit" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["weights", "biases"])
def test_a_wrong_jacobian(short, monkeypatch, capsys, kind):
    change(monkeypatch, short, "jacobian", (kind, 0), next_up)
    assert f"the Jacobian of {kind}[0] has" in failure_of(short.main, capsys)


def test_a_jacobian_without_the_mask(short, monkeypatch, capsys):
    right = short.jacobian

    def wrong(x, weights, biases):
        J = right(x, weights, biases)
        if len(weights) == 1:
            return J
        return J._replace(biases=(weights[1].expand_as(J.biases[0]), J.biases[1]))

    monkeypatch.setattr(short, "jacobian", wrong)
    assert "the Jacobian of biases[0] has" in failure_of(short.main, capsys)


# The relative error of the first loss is that of dL/db, or 1/20 of that of dL/dw. The
# limit is 1e-5.
@pytest.mark.parametrize(("kind", "wrong"), [("weights", 1e-3), ("biases", 3e-5)])
@pytest.mark.parametrize("way", SOURCES)
def test_a_wrong_gradient_of_the_line(short, monkeypatch, capsys, way, kind, wrong):
    change(monkeypatch, *SOURCES[way](short), (kind, 0), lambda grad: (1 + wrong) * grad)
    assert f"the line by {way} has" in failure_of(short.main, capsys)


@pytest.mark.parametrize("kind", ["weights", "biases"])
@pytest.mark.parametrize("way", SOURCES)
def test_a_wrong_gradient_of_the_network(short, monkeypatch, capsys, way, kind):
    change(monkeypatch, *SOURCES[way](short), (kind, 0), next_up)
    said = failure_of(short.main, capsys)
    assert f"the network by {way}: gradient of {kind}[0] has" in said


def test_a_wrong_loss_gradient(short, monkeypatch, capsys):
    """The factor 2 is missing in the table that the reference uses."""
    monkeypatch.setitem(reference.LOSS_BACKWARDS, "mse", lambda y, target: (y - target) / y.numel())
    with relu_mlp.backend("reference"):
        assert "the line by one call has" in failure_of(short.main, capsys)


def test_a_wrong_loss(short, monkeypatch, capsys):
    right = short.loss_and_grads

    def wrong(*arguments, loss):
        result = right(*arguments, loss=loss)
        return result._replace(loss=(1 + 3e-5) * result.loss)

    monkeypatch.setattr(short, "loss_and_grads", wrong)
    assert "the line by one call has" in failure_of(short.main, capsys)


def test_a_wrong_autograd(short, monkeypatch, capsys):
    # With a relative error of 1e-3, the loss falls too fast, and ends too small by 6e-5 of itself.
    right = F.mse_loss
    monkeypatch.setattr(F, "mse_loss", lambda y, target: (1 + 1e-3) * right(y, target))
    assert "the line by autograd has" in failure_of(short.main, capsys)


def test_the_autograd_of_another_network(short, monkeypatch, capsys):
    """One without ReLU."""
    monkeypatch.setattr(F, "relu", lambda x: x)
    assert "the Jacobian of weights[0] has" in failure_of(short.main, capsys)


@pytest.fixture
def start():
    weights, biases = make_network([2, 16, 1])
    return Parameters(tuple(weights), tuple(biases))


def test_parameters_survive_being_flattened(levenberg_marquardt, start):
    vector = levenberg_marquardt.flatten(start)
    again = levenberg_marquardt.unflatten(vector.clone(), start)
    for kind in ("weights", "biases"):
        for one, other in zip(getattr(again, kind), getattr(start, kind), strict=True):
            assert torch.equal(one, other)


def test_a_step_solves_its_equation(levenberg_marquardt, monkeypatch, start, backend):
    calls, right = [], relu_mlp.Linearization.gauss_newton

    def counted(net, v):
        calls.append(v)
        return right(net, v)

    monkeypatch.setattr(relu_mlp.Linearization, "gauss_newton", counted)
    x, b = torch.randn(50, 2).double(), torch.randn(65).double()
    d, products = levenberg_marquardt.solve(relu_mlp.linearize(x, *start), 1.0, b, start)
    assert 0 < products < 50 and products == len(calls)
    of_weights, of_biases = relu_mlp.jacobian(x, *start)
    J = torch.cat([entry.flatten(2).flatten(0, 1) for entry in (*of_weights, *of_biases)], 1)
    # It stops at a residual that it updates recursively, which rounding moves by about 1e-13.
    assert (J.T @ (J @ d) + d - b).norm() <= (1e-2 + 1e-9) * b.norm()


def test_a_jvp_without_the_biases(levenberg_marquardt, monkeypatch, capsys):
    right = relu_mlp.Linearization.jvp
    monkeypatch.setattr(
        relu_mlp.Linearization, "jvp", lambda net, v: right(net, Parameters(v.weights, None))
    )
    assert "J^T J v by linearize and by jacobian" in failure_of(levenberg_marquardt.main, capsys)


@pytest.mark.parametrize("kind", ["weights", "biases"])
@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("name", ["vjp", "jacobian"])
def test_a_wrong_product(levenberg_marquardt, monkeypatch, capsys, name, layer, kind):
    owner = relu_mlp.Linearization if name == "vjp" else levenberg_marquardt
    change(monkeypatch, owner, name, (kind, layer), lambda entry: entry + 1)
    assert "J^T J v by linearize and by jacobian" in failure_of(levenberg_marquardt.main, capsys)


def test_a_fit_that_stops_too_early(levenberg_marquardt, monkeypatch, capsys):
    monkeypatch.setattr(levenberg_marquardt, "MOST", 200)
    assert "Levenberg-Marquardt ends at" in failure_of(levenberg_marquardt.main, capsys)


def test_a_fit_that_diverges(levenberg_marquardt, monkeypatch, capsys):
    monkeypatch.setattr(levenberg_marquardt, "MOST", 200)
    monkeypatch.setattr(
        levenberg_marquardt,
        "levenberg_marquardt",
        lambda *arguments: itertools.repeat((1, torch.tensor(torch.nan))),
    )
    assert "Levenberg-Marquardt ends at nan" in failure_of(levenberg_marquardt.main, capsys)
