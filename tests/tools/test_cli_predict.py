"""`relu-mlp predict`: its predictions, its requirements on the table, and its errors."""

import csv
import pickle
import re
from pathlib import Path

import pytest
import torch

import relu_mlp
import support
from relu_mlp import cli, ops, reference
from relu_mlp.cli import train_output

pandas = pytest.importorskip("pandas")

PAGE = Path(__file__).parents[2] / "docs" / "train.md"
SMALL = ["--data", "table.csv", "--target", "y", "--hidden", "4", "3", "--epochs", "3"]


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train_output, "draw", lambda checkpoint, path: None)


@pytest.fixture
def cells():
    """30 rows of a table, as numbers."""
    x = torch.randn(30, 2, dtype=torch.float64)
    # Few digits, which every pandas version reads exactly.
    return pandas.DataFrame({"a": x[:, 0].tolist(), "b": (3 * x[:, 1]).tolist()}).round(6)


def run_train(cells, target, *flags):
    cells.assign(y=target).to_csv("table.csv", index=False)
    assert cli.main(["train", *SMALL, *map(str, flags)]) == 0


def predict(cells=None, *flags):
    """The predictions as text, column by column."""
    if cells is not None:
        cells.to_csv("new.csv", index=False)
    assert cli.main(["predict", "--data", "new.csv", "--force", *map(str, flags)]) == 0
    with open("predictions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    return {name: [row[name] for row in rows] for name in rows[0]}


def problem(capsys, *flags):
    """The single line of an error."""
    capsys.readouterr()
    assert cli.main(["predict", "--data", "new.csv", *map(str, flags)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line.removeprefix("relu-mlp predict: error: ")


def sequential(saved):
    """A user's code to load the checkpoint. Its sizes are those of the weights."""
    weights = [value for name, value in saved["model"].items() if name.endswith("weight")]
    children = []
    for weight in weights:
        children += [torch.nn.Linear(*reversed(weight.shape), dtype=weight.dtype), torch.nn.ReLU()]
    net = torch.nn.Sequential(*children[:-1])
    net.load_state_dict(saved["model"])
    return net


def load():
    return torch.load("run/model.pt", weights_only=True)


def inputs(saved, cells):
    """The features of a table, standardized, in the dtype of the network."""
    x = torch.tensor(cells[saved["features"]].to_numpy())
    x = (x - saved["feature_mean"]) / saved["feature_scale"]
    return x.to(saved["model"]["0.weight"].dtype)


# -- What it predicts ------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
def test_a_regression_is_what_a_sequential_gives(dtype, cells):
    run_train(cells, 100 * cells.a * cells.b + 5, "--dtype", dtype)
    with relu_mlp.backend("reference"):  # which makes the same calls as nn.Sequential
        (name, column), *others = predict(cells).items()
    saved = load()
    with torch.no_grad():
        z = sequential(saved)(inputs(saved, cells)).double()
    y = z * saved["target_scale"] + saved["target_mean"]
    assert name == "predicted_y" and not others
    assert [float(value) for value in column] == y[:, 0].tolist()


def test_a_classification_is_what_a_sequential_gives(cells):
    run_train(cells, ["low", "mid", "high"] * 10)
    with relu_mlp.backend("reference"):
        columns = predict(cells)
    saved = load()
    with torch.no_grad():
        logits = sequential(saved)(inputs(saved, cells)).double()
    assert list(columns) == ["predicted_y", *(f"probability_{c}" for c in ["high", "low", "mid"])]
    for n, label in enumerate(["high", "low", "mid"]):
        found = [float(value) for value in columns[f"probability_{label}"]]
        assert found == logits.softmax(1)[:, n].tolist()
    assert columns["predicted_y"] == [saved["classes"][n] for n in logits.argmax(1)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.skipif(ops.LIBRARY_PATH is None, reason="compares the extension with nn.Sequential")
def test_by_the_extension_they_agree_within_rounding(dtype, cells):
    run_train(cells, cells.a * cells.b, "--dtype", str(dtype).removeprefix("torch."))
    with relu_mlp.backend("extension"):
        columns = predict(cells)
    saved = load()
    net, x = sequential(saved), inputs(saved, cells)
    weights, biases = support.layers_of(net)
    y, hidden = support.hidden_of(reference, x, weights, biases, None)
    exact = support.Exact(x, weights, biases, None, hidden, y).y
    with torch.no_grad():
        exact.check(net(x), "nn.Sequential")
    values = torch.tensor([[float(value)] for value in columns["predicted_y"]], dtype=torch.float64)
    z = (values - saved["target_mean"]) / saved["target_scale"]
    # Four roundings in float64, to the units of the target and back.
    size = exact.value.abs() + (saved["target_mean"] / saved["target_scale"]).abs()
    exact.bound = exact.bound + 4 * torch.finfo(torch.float64).eps * size
    exact.check(z, "relu-mlp predict")


def test_columns_count_by_name_and_rows_in_order(cells):
    run_train(cells, cells.a - cells.b, "--dtype", "float64")
    whole = [float(value) for value in predict(cells)["predicted_y"]]
    shuffled = cells.iloc[::-1][["b", "a"]].assign(note="text", c=float("nan"))
    turned = predict(shuffled[["note", "b", "c", "a"]])["predicted_y"]
    # Another position in the matrix may change the order of a dozen additions, each to 1e-16.
    assert [float(value) for value in turned[::-1]] == pytest.approx(whole, rel=0, abs=1e-13)


@pytest.mark.parametrize(
    "target, expected",
    [
        ([True, False, True] * 10, {"True", "False"}),
        ([7, 5, 7] * 10, {"5", "7"}),
        ([7.0, 5.0, 7.0] * 10, {"5", "7"}),
        (["7", "5", "x"] * 10, {"5", "7", "x"}),
    ],
)
def test_classes_come_back_as_they_were(target, expected, cells, capsys):
    run_train(cells, target)
    columns = predict(cells.assign(y=target))
    assert {name for name in columns if name.startswith("prob")} == {
        f"probability_{label}" for label in expected
    }
    assert set(columns["predicted_y"]) <= expected
    texts = ["7" if label == 7.0 else "5" if label == 5.0 else str(label) for label in target]
    right = sum(found == text for found, text in zip(columns["predicted_y"], texts))
    assert (
        f"Compared with the target: accuracy {right / 30:.4g}, balanced_accuracy"
        in capsys.readouterr().out
    )


def test_scores_of_a_regression_are_in_its_own_units(cells, capsys):
    target = 1000 * cells.a
    run_train(cells, target)
    columns = predict(cells.assign(y=target))
    found = torch.tensor(list(map(float, columns["predicted_y"])), dtype=torch.float64)
    actual = torch.tensor(target.tolist(), dtype=torch.float64)
    rmse = (found - actual).square().mean().sqrt().item()
    r2 = 1 - ((found - actual).square().sum() / (actual - actual.mean()).square().sum()).item()
    assert f"r2 {r2:.4g}, rmse {rmse:.4g}\n" in capsys.readouterr().out


def test_several_targets(cells):
    cells.assign(y=cells.a, z=cells.b).to_csv("table.csv", index=False)
    assert cli.main(["train", *SMALL, "--target", "z", "y"]) == 0
    assert list(predict(cells)) == ["predicted_z", "predicted_y"]


@pytest.mark.parametrize(
    "target, said",
    [
        (["x"] * 29 + ["new"], "line 31, column 'y': expected one of the classes x, z, got new"),
        (["x"] * 29 + [None], "line 31, column 'y': expected a value, got none"),
        ([None] * 30, "new.csv: expected values in column 'y', got none"),
    ],
)
def test_a_target_that_cannot_be_compared_does_no_harm(target, said, cells, capsys):
    run_train(cells, ["x", "z"] * 15)
    assert len(predict(cells.assign(y=target))["predicted_y"]) == 30
    out = capsys.readouterr().out
    assert "Not compared with the target: new.csv" in out and said in out


def test_reports_only_what_it_can_tell_of_one_row(cells, capsys):
    run_train(cells, cells.a)
    predict(cells[:1].assign(y=1.5))
    out = capsys.readouterr().out
    assert "1 row(s)" in out and "rmse" in out and "nan" not in out


def test_blank_lines_spaces_and_other_line_ends(cells):
    run_train(cells, cells.a)
    whole = predict(cells)
    text = Path("new.csv").read_text().replace("a,b", "a , b ")
    Path("new.csv").write_bytes(b"\xef\xbb\xbf\r\n" + text.replace("\n", "\r\n\r\n").encode())
    assert predict() == whole


# -- What it refuses -------------------------------------------------------------


@pytest.fixture
def trained(cells):
    run_train(cells, cells.a)
    cells.to_csv("new.csv", index=False)
    return cells


def test_overwrites_nothing_unasked(trained, capsys):
    Path("predictions.csv").write_text("mine")
    assert problem(capsys) == "predictions.csv exists; --force overwrites it"
    assert Path("predictions.csv").read_text() == "mine"
    assert cli.main(["predict", "--data", "new.csv", "--force"]) == 0
    assert Path("predictions.csv").read_text().startswith("predicted_y\n")


@pytest.mark.parametrize(
    "content, expected",
    [
        (None, "new.csv can't be read: No such file or directory"),
        (b"", "new.csv: expected the names of columns, got an empty file"),
        (b"a,b\n", "new.csv: expected rows below the names of the columns, got none"),
        (
            b"a,B,c\n1,2,3\n",
            "new.csv has no column 'b', which run/model.pt was trained on; it has a, B, c",
        ),
        (
            b"a,b\n1,2\ninf,x\n",
            "new.csv: expected numbers from -1e+100 to 1e+100, got inf in line 3 of column 'a', "
            "the text 'x' in line 3 of column 'b'",
        ),
        (
            b"a,b\n1,2\n\n1,1e99\n",
            "new.csv, line 4: expected numbers nearer to those of the training; the result is "
            "not finite in float32",
        ),
    ],
)
def test_refuses_a_bad_table(content, expected, trained, capsys):
    Path("new.csv").unlink()
    if content is not None:
        Path("new.csv").write_bytes(content)
    assert problem(capsys) == expected
    assert not Path("predictions.csv").exists()


class NotATensor:
    pass


BAD_CHECKPOINTS = {
    "absent": lambda saved: None,
    "random": lambda saved: bytes(range(256)) * 9,
    "empty": lambda saved: b"",
    "a table": lambda saved: b"a,b\n1,2\n",
    "a pickle": lambda saved: pickle.dumps(NotATensor()),
    "an object": lambda saved: NotATensor(),
    "cut short": lambda saved: Path("run/model.pt").read_bytes()[:-100],
    "a list": lambda saved: [1, 2],
    "a state_dict": lambda saved: saved["model"],
    "an empty dict": lambda saved: {},
    "a newer one": lambda saved: {**saved, "format": 3},
    "one field more": lambda saved: {**saved, "more": 1},
    "one field": lambda saved: {"format": 1},
    "no settings": lambda saved: {**saved, "settings": {}},
    "other weights": lambda saved: {**saved, "model": torch.nn.Linear(2, 1).state_dict()},
}

IS_NOT = ": expected a checkpoint of relu-mlp train, got "
OTHER_FORMAT = IS_NOT + f"one of another format; relu-mlp {relu_mlp.__version__} reads 1 and 2"
COMPLAINTS = {
    "absent": " can't be read: No such file or directory",
    "a state_dict": IS_NOT + "a bare state_dict, without names of columns and scales",
    "an empty dict": IS_NOT
    + f"one of another format; relu-mlp {relu_mlp.__version__} reads 1 and 2",
    "a newer one": OTHER_FORMAT,
    "one field more": IS_NOT + "one with other fields",
    "one field": IS_NOT + "one with other fields",
    "no settings": IS_NOT + "one with other fields",
    "other weights": ": expected parameters of the network that it describes, got another's",
}


@pytest.mark.parametrize("kind", BAD_CHECKPOINTS)
@pytest.mark.parametrize("command", ["predict", "train"])
def test_refuses_a_bad_checkpoint(kind, command, trained, capsys):
    content = BAD_CHECKPOINTS[kind](load())
    path = Path("run/model.pt")
    path.unlink()
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    before = path.exists() and path.read_bytes()
    capsys.readouterr()
    flags = [*SMALL, "--resume", "--epochs", "9"] if command == "train" else ["--data", "new.csv"]
    assert cli.main([command, *flags]) == 2
    complaint = COMPLAINTS.get(kind, IS_NOT + "another kind of file")
    assert capsys.readouterr().err == f"relu-mlp {command}: error: {path}{complaint}\n"
    assert before == (path.exists() and path.read_bytes())
    assert not Path("predictions.csv").exists()


@pytest.mark.parametrize(
    "out, expected",
    [
        ("no/such/folder.csv", "no/such/folder.csv can't be written: "),
        ("run", "run can't be written: Is a directory"),
    ],
)
def test_refuses_an_output_that_cannot_be_written(out, expected, trained, capsys):
    assert problem(capsys, "--out", out, "--force").startswith(expected)


def test_a_directory_is_no_model(trained, capsys):
    assert problem(capsys, "--model", "run") == "run can't be read: Is a directory"


def test_a_bad_variable_is_one_line(trained, monkeypatch, capsys):
    def build_info():
        raise ValueError("RELU_MLP_BACKEND must be something else")

    monkeypatch.setattr(cli.info, "build_info", build_info)
    assert problem(capsys) == "RELU_MLP_BACKEND must be something else"


@pytest.mark.skipif(not PAGE.exists(), reason="the tests of a wheel run without docs/")
def test_the_page_does_what_it_says(capsys):
    """The program and the commands of docs/train.md, in order, with fewer epochs."""
    known = {}
    for language, block in re.findall(r"^```(\w*)\n(.*?)^```$", PAGE.read_text(), re.S | re.M):
        if language == "python":
            exec(compile(block, str(PAGE), "exec"), known)
        for command in re.findall(r"^\$ relu-mlp (.*)$", block, re.M):
            command = re.sub(r"--epochs \d+", "--epochs 4", command)
            few = " --epochs 2" if command.startswith("train") and "--epochs" not in command else ""
            assert cli.main((command + few).split()) == 0, command
    said = capsys.readouterr().out
    assert "After 4 epochs" in said and "Compared with the target: r2" in said
    # After four epochs the prediction is rough, but a distance: 0 to 90 m.
    assert 20 < known["distance"].item() < 60
    with torch.no_grad():
        z = known["net"](known["x"].float()).double()
    fused = z * known["checkpoint"]["target_scale"] + known["checkpoint"]["target_mean"]
    # The sums of 64 products in float32 in another order, with a scale of 20 m.
    assert fused.item() == pytest.approx(known["distance"].item(), abs=1e-3)
