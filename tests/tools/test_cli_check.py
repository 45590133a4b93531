"""`relu-mlp check`: its figures, and that it can fail."""

import pytest
import torch

import relu_mlp
import support
from relu_mlp import cli
from relu_mlp.cli import check, rounding


def lines_of(capsys):
    """The lines of the first table: backend, dtype, activation, six figures, and perhaps WRONG."""
    return [
        line.split()
        for line in capsys.readouterr().out.splitlines()
        if line.startswith(("extension", "reference"))
    ]


@pytest.mark.parametrize("arguments", [[], ["--network", "5", "3"], ["--seed", "1"]])
def test_every_combination_is_within_its_limit(arguments, capsys):
    assert cli.main(["check", *arguments]) == 0
    lines = lines_of(capsys)
    assert [line[:3] for line in lines] == [
        [backend, str(dtype).removeprefix("torch."), activation or "none"]
        for dtype in support.DTYPES
        for activation in support.ACTIVATIONS
        for backend in support.BACKENDS
    ]
    for line in lines:
        error, limit, native, *of_gradients = map(float, line[3:])
        assert error <= limit and native <= limit
        error, limit, native = of_gradients
        assert error <= limit


def test_shows_a_gradient_three_times_over(capsys):
    cli.main(["check", "--rows", "32"])
    said = capsys.readouterr().out
    assert "The float32 input is checked in float64." in said
    names = [line.split()[0] for line in said.splitlines() if line.startswith(("weights[", "bias"))]
    assert names.count("weights[0][0,") == 3 and names[-1] == "biases[1][1]"


def test_the_operators_ran(capsys):
    with support.count_calls() as calls:
        cli.main(["check", "--rows", "32"])
    combinations = len(support.DTYPES) * len(support.ACTIVATIONS) * len(support.BACKENDS)
    assert calls["forward"] == combinations
    assert calls["loss_and_grads"] == combinations + 2  # and check_gradients, once for its checks


def wrong_bias(*arguments, **options):
    loss, weights, biases = relu_mlp.loss_and_grads(*arguments, **options)
    return relu_mlp.LossAndGrads(loss, weights, (biases[0] / 64, *biases[1:]))


def wrong_output(*arguments, **options):
    return relu_mlp.relu_mlp(*arguments, **options) * (1 + 2**-6)


@pytest.mark.parametrize(
    ("name", "broken"), [("loss_and_grads", wrong_bias), ("relu_mlp", wrong_output)]
)
def test_a_wrong_result_has_status_1(name, broken, monkeypatch, capsys):
    monkeypatch.setattr(check, name, broken)
    assert cli.main(["check"]) == 1
    # The bounds of 16-bit networks are as large as some of their gradients.
    lines = [line for line in lines_of(capsys) if line[1] in ("float64", "float32")]
    assert lines and all(line[-1] == "WRONG" for line in lines)


def test_a_wrong_small_gradient_has_status_1(monkeypatch, capsys):
    def broken(x, target, weights, biases, loss):
        def backward(w1, w2, b1, b2):
            grads = relu_mlp.loss_and_grads(x.double(), target.double(), [w1, w2], [b1, b2])
            return (*grads.weights, *grads.biases)  # of another loss

        def function(w1, w2, b1, b2):
            y = relu_mlp.relu_mlp(x.double(), [w1, w2], [b1, b2])
            return (y - target).square().sum() / 2

        return relu_mlp.check_gradients(function, [*weights, *biases], backward)

    monkeypatch.setattr(check, "check_gradients", broken)
    assert cli.main(["check", "--rows", "32"]) == 1
    assert "it is 2 times autograd's" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--rows", "0"], "--rows: expected an integer of at least 1, got '0'"),
        (["--network", "3", "x"], "--network: expected an integer of at least 1, got 'x'"),
        (["--network", "3"], "--network must have at least two widths"),
        (
            ["--network", "8", "512", "512", "4", "--rows", "2"],
            "in all 2 rows a ReLU is too near its kink",
        ),
    ],
)
def test_bad_arguments_have_status_2(arguments, said, capsys):
    try:
        status = cli.main(["check", *arguments])
    except SystemExit as stop:  # argparse
        status = stop.code
    assert status == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("activation", support.ACTIVATIONS)
@pytest.mark.parametrize("dtype", support.DTYPES)
def test_bounds_hold_for_native_networks_and_are_not_idle(dtype, activation):
    """Native results stay within the bounds. Results of a network changed by two bounds do not."""
    for seed in range(10):
        options = cli.parser().parse_args(
            ["check", "--seed", str(seed), "--network", "6", "9", "3"]
        )
        case = check.Case.random(options, dtype, activation)
        results = case.run_natively()
        assert case.is_right(results)
        for position, expected in enumerate(case.expected):
            changed = list(results)
            changed[position] = changed[position].double() + 4 * expected.bound
            assert not case.is_right(changed)


def test_a_row_at_a_kink_is_not_clear():
    x = torch.tensor([[1.0], [2.0]])
    weights, biases = [torch.ones(1, 1), torch.ones(1, 1)], [torch.tensor([-1.0]), torch.zeros(1)]
    arithmetic = rounding.Arithmetic.of(torch.float32)
    clear = rounding.forward(x, weights, biases, "none", arithmetic)[1]
    assert clear.tolist() == [False, True]
