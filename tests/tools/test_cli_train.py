"""`relu-mlp train`: what it learns and writes, how it resumes, and its errors."""

import csv
import io
import math
import os
import sys

import pytest
import torch

import relu_mlp
import support
from relu_mlp import cli
from relu_mlp.cli import checkpoint, info, train, train_output
from relu_mlp.cli.training import Training

pandas = pytest.importorskip("pandas")

DRAW = train_output.draw
SMALL = ["--data", "table.csv", "--target", "y", "--hidden", "4", "--epochs", "4"]


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # Pictures take longer than these trainings. Tests that need one restore DRAW.
    monkeypatch.setattr(train_output, "draw", lambda checkpoint, path: path.write_text("a picture"))


@pytest.fixture
def table(tmp_path):
    """20 rows of numbers, and a target that is not a class."""
    x = torch.randn(20, 2, dtype=torch.float64)
    return save(tmp_path / "table.csv", a=x[:, 0], b=3 * x[:, 1] + 5, y=x.prod(1))


def save(path, **columns):
    pandas.DataFrame({k: getattr(v, "tolist", lambda v=v: v)() for k, v in columns.items()}).to_csv(
        path, index=False
    )
    return path


def run(*arguments):
    return cli.main(["train", *map(str, arguments)])


def load(folder="run"):
    return torch.load(f"{folder}/model.pt", weights_only=True)


def problem(capsys, *arguments):
    """The single line of an error."""
    capsys.readouterr()
    try:
        status = run(*arguments)
    except SystemExit as stop:  # argparse prints the usage above the line
        assert stop.code == 2
        return capsys.readouterr().err.splitlines()[-1]
    assert status == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line.removeprefix("relu-mlp train: error: ")


def assert_same(a, b, where="checkpoint"):
    """Equal to the last bit, at any depth."""
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b), where
    elif isinstance(a, dict):
        assert list(a) == list(b), where
        for key in a:
            assert_same(a[key], b[key], f"{where}[{key!r}]")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for n, pair in enumerate(zip(a, b)):
            assert_same(*pair, f"{where}[{n}]")
    else:
        assert a == b or (a != a and b != b), f"{where}: {a} != {b}"


# -- What it learns --------------------------------------------------------------


def test_learns_a_curve(capsys):
    # sin(3 x) has a variance of about 1/2, the noise one of 0.01. A perfect fit has an R² of
    # 0.98, and one whose own error has twice the variance of the noise still has 0.94.
    x = 4 * torch.rand(400) - 2
    save("table.csv", x=x, y=100 + 20 * (torch.sin(3 * x) + 0.1 * torch.randn(400)))
    assert (
        run("--data", "table.csv", "--target", "y", "--epochs", 60, "--lr", 0.005, "--patience", 0)
        == 0
    )
    said = capsys.readouterr().out
    assert "Task: regression, because 'y' holds numbers that are not all whole" in said
    assert "320 rows to train on, 80 to validate on" in said
    last = load()["history"][-1]
    assert last["epoch"] == 60
    assert last["validation_r2"] > 0.94 and last["train_r2"] > 0.94
    assert 2 * 0.8 < last["validation_rmse"] < 2 * 3**0.5  # the noise's is 2, in units of y


def test_learns_classes(capsys):
    # The centers are 4.3 apart, so the nearest class is wrong for 2 Q(4.3 / 2) = 3 % at
    # most. Of 80 rows that is 2.4 with a standard deviation of 1.5, and 8 are allowed.
    names = ["oak", "ash", "elm"]
    label = torch.randint(3, (400,))
    angle = label * 2 * math.pi / 3
    x = 2.5 * torch.stack([angle.cos(), angle.sin()], 1) + torch.randn(400, 2)
    save("table.csv", u=x[:, 0], v=1e4 + x[:, 1], tree=[names[n] for n in label])
    assert run("--data", "table.csv", "--target", "tree", "--epochs", 20) == 0
    said = capsys.readouterr().out
    assert "Task: classification, because 'tree' holds text" in said
    assert "Classes: 3: ash, elm, oak" in said and "Network: 2-64-64-3, float32" in said
    assert load()["classes"] == ["ash", "elm", "oak"]
    assert load()["history"][-1]["validation_accuracy"] >= 0.9


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_learns_in_16_bits(dtype):
    # y = a - b is linear: in float32 the R² is 1, and rounding to bfloat16 leaves a
    # relative error of 2^-9 at each of a few roundings, far below the tenth allowed here.
    x = torch.randn(200, 2)
    save("table.csv", a=x[:, 0], b=x[:, 1], y=x[:, 0] - x[:, 1])
    assert run(*SMALL, "--hidden", "--dtype", dtype, "--epochs", 40, "--lr", 0.01) == 0
    saved = load()
    assert saved["history"][-1]["validation_r2"] > 0.99
    for parameter, master in zip(saved["last_model"].values(), saved["master_weights"]):
        assert parameter.dtype is getattr(torch, dtype) and master.dtype is torch.float32
        assert torch.equal(parameter, master.to(parameter.dtype))


def test_16_bits_take_updates_that_would_round_away(table):
    run(*SMALL, "--dtype", "bfloat16", "--lr", 1e-6, "--optimizer", "sgd", "--epochs", 1)
    saved = load()
    changed = [
        (m != p.float()).any() for m, p in zip(saved["master_weights"], saved["model"].values())
    ]
    assert any(changed)


@pytest.mark.parametrize("device", ["cpu"] + ["cuda"] * torch.cuda.is_available())
def test_training_is_by_the_fused_operators(device, backend, table, monkeypatch):
    known = relu_mlp.build_info()  # the mode also counts another operator, which is left out
    monkeypatch.setattr(train_output, "checked_build_info", lambda: known)
    with support.count_calls() as counts:
        assert run(*SMALL, "--batch-size", 8, "--device", device) == 0
    # 16 rows to train on are 2 batches; both parts are evaluated; 4 epochs. On the reference,
    # loss_and_grads calls both passes. Where a mode looks on, TrainingStep takes it step by step.
    assert counts.pop("loss_and_grads") == 4 * 2
    assert counts.pop("native") == 0
    assert counts.pop("forward") == 4 * 2
    assert counts == {"backward": 0}


def test_scores_are_those_of_a_sequential_on_the_rows_kept_out(table):
    run(*SMALL, "--dtype", "float64", "--seed", 3, "--validation", 0.25)
    saved = load()
    cells = torch.tensor(pandas.read_csv(table).to_numpy())
    order = torch.randperm(20, generator=torch.Generator().manual_seed(3))
    kept_out, trained_on = cells[order[:5]], cells[order[5:]]
    # sums of 15 numbers in another order differ by gamma(15) of their sizes
    close = {"rtol": 4e-15, "atol": 1e-14}
    torch.testing.assert_close(saved["feature_mean"], trained_on[:, :2].mean(0), **close)
    torch.testing.assert_close(
        saved["feature_scale"], trained_on[:, :2].std(0, correction=0), **close
    )
    torch.testing.assert_close(saved["target_mean"], trained_on[:, 2:].mean(0), **close)
    torch.testing.assert_close(
        saved["target_scale"], trained_on[:, 2:].std(0, correction=0), **close
    )

    net = torch.nn.Sequential(
        torch.nn.Linear(2, 4), torch.nn.ReLU(), torch.nn.Linear(4, 1)
    ).double()
    net.load_state_dict(saved["model"])
    for name, rows in (("validation", kept_out), ("train", trained_on)):
        with torch.no_grad():
            z = net((rows[:, :2] - saved["feature_mean"]) / saved["feature_scale"])
        error = z * saved["target_scale"] + saved["target_mean"] - rows[:, 2:]
        spread = (rows[:, 2:] - rows[:, 2:].mean()).square().sum()
        best = saved["history"][saved["best_epoch"] - 1]
        # A few dozen roundings of 1e-16, of numbers that are not much larger than their sums.
        expected = {
            "rmse": error.square().mean().sqrt(),
            "r2": 1 - error.square().sum() / spread,
            "loss": (error / saved["target_scale"]).square().mean(),
        }
        for score, value in expected.items():
            assert best[f"{name}_{score}"] == pytest.approx(value.item(), rel=1e-12)


def test_the_start_is_that_of_a_sequential_with_the_seed(table):
    run(*SMALL, "--seed", 5, "--epochs", 1, "--lr", 1e-30, "--optimizer", "sgd")
    torch.manual_seed(5)
    net = torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.ReLU(), torch.nn.Linear(4, 1))
    assert_same(load()["model"], dict(net.state_dict()))


# -- What it writes --------------------------------------------------------------


def test_writes_a_table_and_a_picture_of_the_curves(table, monkeypatch, capsys):
    monkeypatch.setattr(train_output, "draw", DRAW)
    assert run(*SMALL) == 0
    assert "Wrote run/model.pt, run/curves.csv, run/curves.png" in capsys.readouterr().out
    with open("run/curves.csv", newline="") as file:
        curves = [
            {name: float(value) for name, value in row.items()} for row in csv.DictReader(file)
        ]
    assert curves == load()["history"] and len(curves) == 4
    assert list(curves[0]) == ["epoch"] + [
        f"{part}_{score}" for part in ("train", "validation") for score in ("loss", "r2", "rmse")
    ]
    with open("run/curves.png", "rb") as picture:
        header = picture.read(24)
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    assert [int.from_bytes(header[at : at + 4], "big") for at in (16, 20)] == [1500, 600]
    names = {path.name for path in table.parent.glob("run/*")}
    assert names == {"model.pt", "curves.csv", "curves.png"}  # and no temporary file


@pytest.mark.parametrize("history, classes", [(1, None), (3, ["a", "b"])])
def test_draws_any_history(history, classes, tmp_path):
    score = "accuracy" if classes else "r2"
    epochs = [
        {"epoch": n + 1, "train_loss": 0.0, "validation_loss": 1.0}
        | {f"train_{score}": 1.0, f"validation_{score}": math.nan}
        for n in range(history)
    ]
    fields = dict.fromkeys(checkpoint.Checkpoint.__dataclass_fields__)
    saved = checkpoint.Checkpoint(
        **{**fields, "history": epochs, "classes": classes, "best_epoch": 1}
    )
    DRAW(saved, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_several_targets(capsys):
    x = torch.randn(40, 2)
    save("table.csv", a=x[:, 0], far=1000 * x[:, 0], b=x[:, 1], near=x[:, 1])
    assert run("--data", "table.csv", "--target", "near", "far", "--hidden", "--epochs", 60) == 0
    assert "Network: 2-2, float32" in capsys.readouterr().out
    saved = load()
    assert saved["features"] == ["a", "b"] and saved["targets"] == ["near", "far"]
    last = saved["history"][-1]
    assert {"validation_rmse_near", "validation_rmse_far"} < set(last)
    assert 100 < last["validation_rmse_far"] / last["validation_rmse_near"] < 10000


@pytest.mark.parametrize(
    "values, flag, kind, classes",
    [
        (["b", "a", "b", "c"], None, "classification", ["a", "b", "c"]),
        ([True, False, True, True], None, "classification", [False, True]),
        ([3, 1, 2, 1], None, "classification", [1, 2, 3]),
        ([3.0, 1.0, 2.0, 1.0], None, "classification", [1, 2, 3]),
        ([1, 2, 3, 4.5], None, "regression", None),
        ([3, 1, 2, 1], "regression", "regression", None),
        ([True, False, True, True], "regression", "regression", None),
        ([0.5, 1.5, 0.5, 1.5], "classification", "classification", [0.5, 1.5]),
        (list(range(20)), None, "classification", list(range(20))),
        (list(range(21)), None, "regression", None),
    ],
)
def test_the_task_is_told_from_the_target(values, flag, kind, classes, capsys):
    save("table.csv", x=list(range(len(values))), y=values)
    assert run(*SMALL, "--epochs", 1, *(["--task", flag] if flag else [])) == 0
    assert f"Task: {kind}, because" in capsys.readouterr().out
    found = load()["classes"]
    assert found == classes and [type(c) for c in found or ()] == [type(c) for c in classes or ()]


def test_chooses_columns(table, capsys):
    cells = pandas.read_csv(table)
    cells.insert(1, "note", "text")
    cells.insert(2, "ok", [True, False] * 10)
    cells.to_csv(table)  # with an index that has no name
    assert run(*SMALL, "--ignore", "note", "a", "--out", "one") == 0
    assert "Left out: 1 column(s) without a name" in capsys.readouterr().out
    assert load("one")["features"] == ["ok", "b"]
    assert run(*SMALL, "--columns", "b", "a", "--out", "two") == 0
    assert load("two")["features"] == ["b", "a"]


def test_a_constant_column_and_a_class_seen_once_do_no_harm():
    save("table.csv", x=list(range(30)), same=[0.1] * 30, y=["a"] * 14 + ["b"] + ["c"] * 15)
    assert run(*SMALL) == 0
    assert load()["feature_scale"][1] == 1
    assert math.isfinite(load()["history"][-1]["validation_loss"])


def test_two_rows_are_enough():
    save("table.csv", x=[1, 2], y=[1.5, 2.5])
    assert run(*SMALL, "--validation", 0.01) == 0
    assert math.isnan(load()["history"][-1]["validation_r2"])


# -- The epoch that is kept ------------------------------------------------------


def test_keeps_the_epoch_with_the_lowest_validation_loss(table, capsys):
    flags = [*SMALL, "--lr", 0.1, "--batch-size", 4, "--patience", 3]
    assert run(*flags, "--epochs", 99) == 0
    kept, said = load(), capsys.readouterr().out
    losses = [line["validation_loss"] for line in kept["history"]]
    best = losses.index(min(losses)) + 1
    assert (kept["best_epoch"], kept["epoch"]) == (best, best + 3)
    assert f"The validation loss was lowest after epoch {best}: " in said
    assert f"; the network of epoch {best} is kept\n" in said
    assert run(*flags, "--epochs", best, "--last", "--out", "shorter") == 0
    assert_same(kept["model"], load("shorter")["model"])
    assert run(*flags, "--epochs", 99, "--last", "--out", "last") == 0
    assert_same(kept["last_model"], load("last")["model"])
    assert not torch.equal(kept["model"]["0.weight"], kept["last_model"]["0.weight"])
    line = problem(capsys, "--data", table, "--resume")
    assert line == (
        "--patience: expected 0, or more than the 3 epochs without a lower validation loss that "
        "run/model.pt has, got 3"
    )
    for flag in [], ["--last"]:
        epochs = ["--epochs", best + 4 + len(flag), "--patience", 0]
        assert run("--data", table, "--resume", *epochs, *flag) == 0
        assert load()["epoch"] == best + 4 + len(flag)
        if flag:
            assert_same(load()["model"], load()["last_model"])


def test_never_stops_with_a_patience_of_0(table):
    assert run(*SMALL, "--lr", 0.1, "--epochs", 40, "--patience", 0) == 0
    assert load()["epoch"] == 40


# -- Repeated and resumed --------------------------------------------------------


def test_the_same_seed_gives_the_same_bits(table):
    for out, seed in (("one", 1), ("again", 1), ("two", 2)):
        run(*SMALL, "--seed", seed, "--out", out)
    assert_same(load("one"), load("again"))
    assert not torch.equal(load("one")["model"]["0.weight"], load("two")["model"]["0.weight"])


@pytest.mark.parametrize(
    "flags",
    [
        ["--optimizer", "adam"],
        ["--optimizer", "adamw", "--weight-decay", "0.1"],
        ["--optimizer", "sgd", "--lr", "0.02"],
        ["--dtype", "float64", "--hidden"],
        ["--dtype", "bfloat16"],
        ["--dtype", "float16", "--optimizer", "sgd"],
        ["--task", "classification"],
    ],
)
def test_a_resumed_training_goes_on_bit_for_bit(flags, table):
    flags = [*SMALL, "--batch-size", 6, *flags]
    run(*flags, "--epochs", 6, "--out", "whole")
    run(*flags, "--epochs", 2, "--out", "parts")
    for epochs in (3, 6):
        assert run("--data", table, "--resume", "--epochs", epochs, "--out", "parts") == 0
    assert_same(load("whole"), load("parts"))
    assert len(load("whole")["history"]) == load("whole")["epoch"] == 6


def test_a_resumed_training_takes_another_learning_rate(table):
    run(*SMALL, "--epochs", 1)
    before = load()["model"]
    run("--data", table, "--resume", "--epochs", 2, "--lr", 1e-30)
    assert_same(load()["model"], before)
    assert load()["optimizer"]["param_groups"][0]["lr"] == 1e-30


class Stop:
    """Replaces `Training.train_one_epoch` and raises instead of running the last of `epochs`."""

    def __init__(self, monkeypatch, epochs, error):
        original, self.left = Training.train_one_epoch, epochs

        def train_one_epoch(training):
            self.left -= 1
            original(training)
            if not self.left:
                raise error

        monkeypatch.setattr(Training, "train_one_epoch", train_one_epoch)


def test_an_interrupted_training_keeps_what_it_has(table, capsys):
    run(*SMALL, "--out", "whole")
    with pytest.MonkeyPatch.context() as patch:
        Stop(patch, 3, KeyboardInterrupt())
        assert run(*SMALL) == 130
    assert "Interrupted; --resume goes on from epoch 2" in capsys.readouterr().out
    assert load()["epoch"] == 2 and len(pandas.read_csv("run/curves.csv")) == 2
    assert run("--data", table, "--resume") == 0  # to the epochs of the first command
    assert_same(load(), load("whole"))


def test_a_training_interrupted_at_once_writes_nothing(table, monkeypatch, capsys):
    Stop(monkeypatch, 1, KeyboardInterrupt())
    assert run(*SMALL) == 130
    assert "there is nothing to save" in capsys.readouterr().out
    assert not list(table.parent.glob("run/*"))


def test_a_killed_training_has_saved_by_the_way(table, monkeypatch):
    class Killed(BaseException):
        pass

    def killed(*_):
        raise Killed

    monkeypatch.setattr(train, "SECONDS_BETWEEN_SAVES", 0)
    monkeypatch.setattr(train, "write_all", killed)
    with pytest.raises(Killed):
        run(*SMALL)
    assert load()["epoch"] == 4


def test_a_training_that_diverges_keeps_the_last_good_state(table, capsys):
    flags = [*SMALL, "--optimizer", "sgd", "--batch-size", 2]
    run(*flags, "--epochs", 2)
    before = load()
    line = problem(capsys, "--data", table, "--resume", "--epochs", 9, "--lr", 1e6)
    assert line == "the training diverged: train_loss is nan after epoch 3; try a smaller --lr"
    assert_same(load(), before)
    assert run("--data", table, "--resume", "--epochs", 3) == 0
    assert "diverged" in problem(capsys, *flags, "--lr", 1e6, "--out", "other")
    assert not list(table.parent.glob("other/*"))


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch, table, capsys):
    run(*SMALL, "--epochs", 1)
    before = (tmp_path / "run/model.pt").read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    line = problem(capsys, "--data", table, "--resume", "--epochs", 2)
    assert line == "run/model.pt can't be written: No space left on device"
    assert (tmp_path / "run/model.pt").read_bytes() == before
    assert len(list(tmp_path.glob("run/.*"))) == 0


# -- What it refuses -------------------------------------------------------------


@pytest.mark.parametrize("name", ["model.pt", "curves.csv", "curves.png"])
def test_overwrites_nothing_unasked(name, table, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).write_text("mine")
    line = problem(capsys, *SMALL)
    assert line == f"run/{name} exists; --resume continues from it, --force overwrites it"
    assert (tmp_path / "run" / name).read_text() == "mine"
    assert len(list(tmp_path.glob("run/*"))) == 1
    assert run(*SMALL, "--force") == 0
    assert (tmp_path / "run" / name).read_bytes() != b"mine"
    assert "not allowed with" in problem(capsys, *SMALL, "--force", "--resume")


HEADER = b"a,b,y\n"
GOOD = b"1,2,3.5\n2,3,4.5\n"
NO_FILE = "table.csv can't be read: No such file or directory"


@pytest.mark.parametrize(
    "content, flags, expected",
    [
        (None, [], NO_FILE),
        ("folder", [], "table.csv can't be read: Is a directory"),
        (b"", [], "table.csv: expected the names of columns, got an empty file"),
        (b"\n\n", [], "table.csv: expected the names of columns, got an empty file"),
        (HEADER, [], "table.csv: expected rows below the names of the columns, got none"),
        (
            HEADER + b"1,2,3\n",
            [],
            "table.csv: expected a row to train and one to validate on, got one row",
        ),
        (
            HEADER + GOOD + b"1,x,3\n",
            [],
            "table.csv: can't use 'b' (the text 'x' in line 4 among numbers); "
            "--ignore b leaves out what is not needed",
        ),
        # blank lines and line breaks in quotes count as lines
        (
            b'\na,b,"y\nz",y\n\n"1",2,"\n\n",3\n1,inf,4,5\n',
            ["--ignore", "y\nz"],
            "table.csv: can't use 'b' (inf in line 8); --ignore b leaves out what is not needed",
        ),
        (
            HEADER + GOOD + b"1,2\n",
            [],
            "table.csv: expected 3 values in each line, got fewer in line 4",
        ),
        (
            HEADER + b"1,-inf,3\n" + GOOD,
            [],
            "table.csv: can't use 'b' (-inf in line 2); --ignore b leaves out what is not needed",
        ),
        (
            HEADER + GOOD + b"1,2,1e101\n",
            [],
            "table.csv: expected numbers from -1e+100 to 1e+100, "
            "got 1e+101 in line 4 of column 'y'",
        ),
        (
            b"a,b,y\n,2,3.5\n,3,4.5\n",
            [],
            "table.csv: can't use 'a' (no values); --ignore a leaves out what is not needed",
        ),
        (b"a,b,y\n1,2,\n2,3,\n", [], "table.csv: expected values in column 'y', got none"),
        (
            b"a,b,y\n1,2,x\n2,3,x\n",
            [],
            "table.csv: expected a target that varies, got one value for all of 'y'",
        ),
        (
            b"a,b,y\n1,2,.5\n2,3,.5\n",
            [],
            "table.csv: expected a target that varies, got one value for all of 'y'",
        ),
        (
            b"a,b,y\n1,2,x\n2,3,z\n",
            ["--task", "regression"],
            "table.csv: expected numbers from -1e+100 to 1e+100, "
            "got the text 'x' in line 2 of column 'y'",
        ),
        (
            b"a,a,y,y,y\n1,2,3,4,5\n",
            [],
            "table.csv: expected a name for each column, got 'a' 2 times, 'y' 3 times",
        ),
        (b"y\n1\n2\n", [], "table.csv: expected columns besides the target, got none"),
        (
            b"a;b;y\n1;2;3\n",
            [],
            "table.csv: expected commas between the names, got 'a;b;y'",
        ),
        (
            b"a,b,y\n1,2,3\n\xe9,2,3\n",
            [],
            "table.csv, line 3: expected text in UTF-8, got the byte 0xe9",
        ),
        (
            HEADER + GOOD + b"1,2,3,4\n",
            [],
            "table.csv: expected a CSV table, got: Expected 3 fields in line 4, saw 4",
        ),
        (
            HEADER + b"1,2,3,4\n" + GOOD,
            [],
            "table.csv: expected a CSV table, got: a line has more values than the first line "
            "has names",
        ),
        (
            HEADER + b'1,2,"3\n',
            [],
            "table.csv: expected a CSV table, got: EOF inside string starting at row 1",
        ),
    ],
)
def test_refuses_a_bad_table(content, flags, expected, tmp_path, capsys):
    if content == "folder":
        (tmp_path / "table.csv").mkdir()
    elif content is not None:
        (tmp_path / "table.csv").write_bytes(content)
    assert problem(capsys, *SMALL, *flags) == expected
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "flags, expected",
    [
        (
            ["--target", "yy"],
            "table.csv has no column 'yy', which --target names; did you mean 'y'?",
        ),
        (
            ["--target", "price"],
            "table.csv has no column 'price', which --target names; it has a, b, y",
        ),
        (
            ["--ignore", "bb"],
            "table.csv has no column 'bb', which --ignore names; did you mean 'b'?",
        ),
        (
            ["--columns", "a", "A"],
            "table.csv has no column 'A', which --columns names; it has a, b, y",
        ),
        (["--columns", "a", "y"], "--columns: expected features, got the target 'y'"),
        (["--ignore", "a", "b"], "table.csv: expected columns besides the target, got none"),
        (
            ["--target", "y", "a", "--task", "classification"],
            "--target: expected one column for classification, got 2",
        ),
        (["--device", "nonsense"], "--device nonsense can't be used with float32: "),
        (["--device", "meta"], "--device meta can't be used with float32: "),
        (["--device", "cuda:77"], "--device cuda:77 can't be used with float32: "),
        (["--out", "table.csv"], "the folder table.csv can't be made: File exists"),
        (["--out", "table.csv/run"], "the folder table.csv/run can't be made: Not a directory"),
        (["--resume"], "run/model.pt can't be read: No such file or directory"),
        (["--epochs", "0"], "--epochs: expected an integer of at least 1, got '0'"),
        (["--epochs", "ten"], "--epochs: expected an integer of at least 1, got 'ten'"),
        (["--batch-size", "0"], "--batch-size: expected an integer of at least 1, got '0'"),
        (["--hidden", "8", "0"], "--hidden: expected an integer of at least 1, got '0'"),
        (["--hidden", "8", "-1"], "--hidden: expected an integer of at least 1, got '-1'"),
        (["--validation", "0"], "--validation: expected a number from 0.001 to 0.999, got '0'"),
        (["--validation", "1"], "--validation: expected a number from 0.001 to 0.999, got '1'"),
        (["--validation", "half"], "--validation: expected a number from 0.001 to 0.999, got 'ha"),
        (["--lr", "-1"], "--lr: expected a number from 1e-30 to 1e+06, got '-1'"),
        (["--lr", "nan"], "--lr: expected a number from 1e-30 to 1e+06, got 'nan'"),
        (["--weight-decay", "inf"], "--weight-decay: expected a number from 0 to 1e+06, got"),
        (["--seed", "-1"], "--seed: expected an integer from 0 to 2**63 - 1, got '-1'"),
        (["--seed", str(2**63)], "--seed: expected an integer from 0 to 2**63 - 1, got"),
        (["--dtype", "int8"], "--dtype: invalid choice: 'int8'"),
        (["--optimizer", "lbfgs"], "--optimizer: invalid choice: 'lbfgs'"),
        (["--columns", "a", "--ignore", "b"], "--ignore: not allowed with argument --columns"),
    ],
)
def test_refuses_bad_flags(flags, expected, table, capsys):
    line = problem(capsys, *SMALL, *flags).removeprefix("relu-mlp train: error: argument ")
    assert line.startswith(expected)
    assert not (table.parent / "run").exists()


def test_needs_a_target(table, capsys):
    line = problem(capsys, "--data", table)
    assert line == "--target: expected the name of a column, got none"


def test_refuses_a_folder_that_cannot_be_written_to(table, monkeypatch, capsys):
    # Not a matter of its mode, because the superuser may write everywhere.
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert problem(capsys, *SMALL) == "the folder run can't be written to"


@pytest.mark.parametrize(
    "flags, expected",
    [
        (["--hidden", "5"], "it has --hidden 4, but --hidden 5 was asked for"),
        (["--hidden"], "it has --hidden 4, but --hidden was asked for"),
        (["--dtype", "float64"], "it has --dtype float32, but --dtype float64 was asked for"),
        (["--optimizer", "sgd"], "it has --optimizer adam, but --optimizer sgd was asked for"),
        (["--seed", "1"], "it has --seed 0, but --seed 1 was asked for"),
        (["--validation", "0.3"], "it has --validation 0.2, but --validation 0.3 was asked for"),
        (["--target", "a"], "it has --target y, but --target a was asked for"),
        (["--columns", "b", "a"], "it has --columns a b, but --columns b a was asked for"),
        (["--ignore", "b"], "it has --columns a b, but --columns a was asked for"),
        (
            ["--task", "classification"],
            "it has --task regression, but --task classification was asked for",
        ),
    ],
)
def test_does_not_resume_another_network(flags, expected, table, capsys):
    run(*SMALL)
    before = load()
    line = problem(capsys, "--data", table, "--resume", "--epochs", 9, *flags)
    assert line == f"run/model.pt is a checkpoint of another network: {expected}"
    assert_same(load(), before)
    run("--data", table, "--resume", "--epochs", 5, *SMALL[2:-2])  # the same flags again


def test_does_not_resume_on_another_table(table, capsys):
    run(*SMALL)
    text = table.read_text()
    resume = ["--data", table, "--resume", "--epochs", 9]
    table.write_text(text + "1,2,3\n")
    line = problem(capsys, *resume)
    assert line == (
        f"{table}: expected the 20 rows that the checkpoint was trained on, "
        "got 21 rows of another table"
    )
    table.write_text(text[:-2] + "5\n" if text[-2] != "5" else text[:-2] + "4\n")
    assert "got 20 rows of another table" in problem(capsys, *resume)
    table.write_text(text.replace("a,b", "a,c"))
    line = problem(capsys, *resume)
    assert line == (
        f"{table} has no column 'b', which the checkpoint was trained on; it has a, c, y"
    )
    table.write_text(text)
    assert run(*resume) == 0


def test_does_not_resume_what_is_done(table, capsys):
    run(*SMALL)
    for flags in ([], ["--epochs", "3"]):
        line = problem(capsys, "--data", table, "--resume", *flags)
        asked = flags[-1] if flags else 4
        assert line == f"--epochs: expected more than the 4 that run/model.pt has, got {asked}"


# -- Without the optional packages, and at a terminal ----------------------------


class Absent:
    """In `sys.meta_path`: makes a package look as if it were not installed."""

    def __init__(self, monkeypatch, package):
        self.package = package
        for name in list(sys.modules):
            if name.split(".")[0] == package:
                monkeypatch.delitem(sys.modules, name)
        monkeypatch.setattr(sys, "meta_path", [self, *sys.meta_path])

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == self.package:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def test_without_pandas(table, monkeypatch, capsys):
    Absent(monkeypatch, "pandas")
    line = problem(capsys, *SMALL)
    assert line.startswith("reading a table needs pandas") and "'relu-mlp[cli]'" in line


def test_without_matplotlib(table, monkeypatch, capsys):
    run(*SMALL)
    monkeypatch.setattr(train_output, "draw", DRAW)
    Absent(monkeypatch, "matplotlib")
    assert run(*SMALL, "--force") == 0
    said = capsys.readouterr().out
    assert "No run/curves.png: a picture needs matplotlib, which is not installed" in said
    assert "'relu-mlp[cli]'" in said and "Wrote run/model.pt, run/curves.csv\n" in said
    assert {path.name for path in table.parent.glob("run/*")} == {"model.pt", "curves.csv"}


def test_without_tqdm(table, monkeypatch, capsys):
    Absent(monkeypatch, "tqdm")
    assert run(*SMALL) == 0
    said = capsys.readouterr().out
    assert "Progress in lines: a progress bar needs tqdm" in said and "'relu-mlp[cli]'" in said
    assert said.count("\nepoch ") == 4


@pytest.mark.parametrize("epochs, lines", [(4, 4), (20, 10), (25, 9)])
def test_progress_in_about_ten_lines(epochs, lines, table, capsys):
    assert run(*SMALL, "--epochs", epochs) == 0
    said, bar = capsys.readouterr()
    assert said.count("\nepoch ") == lines and f"\nepoch {epochs}: train loss" in said
    assert not bar


def test_progress_as_a_bar_at_a_terminal(table, monkeypatch, capsys):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    assert run(*SMALL) == 0
    assert "4/4" in terminal.getvalue() and "validation loss" in terminal.getvalue()
    assert "\nepoch " not in capsys.readouterr().out


def test_a_bad_variable_is_one_line(table, monkeypatch, capsys):
    def build_info():
        raise ValueError("RELU_MLP_BACKEND must be something else")

    monkeypatch.setattr(info, "build_info", build_info)
    assert problem(capsys, *SMALL) == "RELU_MLP_BACKEND must be something else"
