"""`relu-mlp train` and `predict` on tables as they are: text, empty cells, dates, odd numbers."""

import math
import random
from pathlib import Path

import pytest
import torch

from relu_mlp import cli
from relu_mlp.cli import train_output

pandas = pytest.importorskip("pandas")


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train_output, "draw", lambda checkpoint, path: None)


def train(text, *flags, target="y", epochs=2):
    """Trains on the text of a table, and returns the checkpoint."""
    Path("t.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    words = ["train", "--data", "t.csv", "--target", target, "--epochs", epochs, "--force"]
    assert cli.main([str(word) for word in [*words, "--hidden", 8, *flags]]) == 0
    return torch.load("run/model.pt", weights_only=True)


def predict(text):
    Path("new.csv").write_text(text)
    assert cli.main(["predict", "--data", "new.csv", "--force"]) == 0
    return pandas.read_csv("predictions.csv")


def refusal(text, capsys, *flags):
    Path("t.csv").write_text(text)
    assert cli.main(["train", "--data", "t.csv", "--target", "y", *flags]) == 2
    assert not Path("run").exists()
    return capsys.readouterr().err.splitlines()[-1].removeprefix("relu-mlp train: error: ")


def lines(header, rows):
    return "\n".join([header, *(",".join(map(str, row)) for row in rows)]) + "\n"


# -- Tables of the kind that people have -----------------------------------------------------


def titanic(rng):
    for n in range(60):
        sex, age = rng.choice(["male", "female"]), rng.choice(["", "", *range(1, 70)])
        name = f'"Surname{n}, Mr. {n}"'
        survived = int(sex == "female")
        yield survived, n % 3 + 1, name, sex, age, rng.choice(["S", "C", "Q", ""]), f"C{n}"


def adult(rng):
    for _ in range(60):
        work = rng.choice([" Private", " State-gov", " ?"])
        hours = rng.randrange(10, 60)
        yield rng.randrange(17, 90), work, hours, " >50K" if hours > 35 else " <=50K"


def housing(rng):
    for n in range(60):
        area, near = rng.randrange(40, 200), rng.choice(["INLAND", "NEAR BAY", "<1H OCEAN"])
        price = 1000 * (area + 50 * (near == "NEAR BAY"))
        yield area, "" if n % 9 == 0 else n % 5, near, rng.choice(["TRUE", "FALSE"]), price


def wine(rng):
    for n in range(60):
        acid = rng.uniform(3, 9)
        yield round(acid, 2), "red" if n % 3 else "white", round(rng.uniform(8, 14), 1), acid > 6


def penguins(rng):
    for n in range(60):
        kind = n % 3
        bill = "NA" if n == 4 else round(35 + 8 * kind + rng.random(), 1)
        sex = rng.choice(["male", "female", "NA"])
        yield ["Adelie", "Gentoo", "Chinstrap"][kind], ["Dream", "Biscoe"][n % 2], bill, sex, 2007


TABLES = {
    titanic: ("Survived,Pclass,Name,Sex,Age,Embarked,Cabin", "Survived", ["Name", "Cabin"]),
    adult: ("age,workclass,hours,income", "income", []),
    housing: ("area,rooms,ocean,new,price", "price", []),
    wine: ("acidity,color,alcohol,good", "good", []),
    penguins: ("species,island,bill,sex,year", "species", []),
}


@pytest.mark.parametrize("rows", TABLES, ids=lambda rows: rows.__name__)
def test_learns_a_table_and_predicts(rows, capsys):
    header, target, useless = TABLES[rows]
    text = lines(header, rows(random.Random(0)))
    ignore = ["--ignore", *useless] if useless else []
    saved = train(text, *ignore, "--lr", 0.02, target=target, epochs=30)
    best = saved["history"][saved["best_epoch"] - 1]
    # The target follows from the features, and guessing has an accuracy of 0.6 or an R² of 0.
    assert best["validation_accuracy" if saved["classes"] else "validation_r2"] >= 0.75
    capsys.readouterr()
    found = predict(text)
    assert len(found) == 60 and found.notna().all(axis=None)
    assert "Compared with the target" in capsys.readouterr().out


# -- What becomes of each kind of column -------------------------------------------------------

Y = [0.5, 1.5, 2.25, 3.0, 4.0, 5.5, 6.0, 7.5, 8.0, 9.0]


def column(cells):
    return lines("a,b,y", [(cell, n % 4, Y[n % 10]) for n, cell in enumerate(cells)])


@pytest.mark.parametrize(
    "cells, inputs, categories",
    [
        (["x", "z"] * 10, 2, ["x", "z"]),
        (["x ", " x", '" x "', "z"] * 5, 2, ["x", "z"]),
        (['"a, b"', '"say ""c"""'] * 10, 2, ["a, b", 'say "c"']),
        (["x", "", '"  "', "z"] * 5, 3, ["x", "z"]),
        (["same"] * 20, 1, ["same"]),
        (["0", "1", "2", "3+"] * 5, 4, ["0", "1", "2", "3+"]),
        (["20-30", "30-40"] * 10, 2, ["20-30", "30-40"]),
        (["1.2.3", "1.2.10"] * 10, 2, ["1.2.10", "1.2.3"]),
        (["yes", "no", "?"] * 7, 3, ["no", "yes"]),
        ([1, 2, "", 4] * 5, 2, None),
        ([1, 2, "?", "NA"] * 5, 2, None),
        (["True", "False", ""] * 7, 2, None),
        (["true", "false"] * 10, 1, None),
        (["7"] * 20, 1, None),
        (['"1,234.5"', '"12"', '"-1,234,567"'] * 7, 1, None),
        (["1 ", " 2"] * 10, 1, None),
        ([f"{10**19 + n}" for n in range(20)], 1, None),
        ([f"{10**40 + n}" for n in range(20)], 1, None),
        (["1e5", "-.5"] * 10, 1, None),
    ],
)
def test_a_column_becomes_inputs(cells, inputs, categories):
    saved = train(column(cells), "--validation", 0.1)
    assert saved["categories"].get("a") == categories
    assert saved["feature_mean"].shape == (inputs + 1,)  # and one for b
    assert saved["indicators"] == ["a"] * (inputs > len(categories or [0]))
    assert saved["model"]["0.weight"].shape == (8, inputs + 1)
    assert len(predict(column(cells))) == len(cells)


def test_all_columns_that_cannot_be_used_are_named_at_once(capsys):
    rows = [
        (
            f"2024-01-{n % 28 + 1:02}",
            f"Nov {n % 28 + 1} 2025",
            f'"a note, number {n}"',
            "",
            "inf" if n == 3 else n,
            "x" if n == 4 else n,
            n % 2,
            ["red", "blue"][n % 2],
            n / 4,
        )
        for n in range(40)
    ]
    line = refusal(lines("day,other day,note,empty,big,mixed,fine,color,y", rows), capsys)
    assert line == (
        "t.csv: can't use 'day' (dates), 'other day' (dates), "
        "'note' (free text, with 40 different values), 'empty' (no values), 'big' (inf in line 5), "
        "'mixed' (the text 'x' in line 6 among numbers); "
        "--ignore day 'other day' note empty big mixed leaves out what is not needed"
    )


def test_a_target_of_free_text_is_no_class(capsys):
    text = lines("a,y", [(n, f"note {n}") for n in range(40)])
    assert refusal(text, capsys) == "t.csv: can't use 'y' (free text, with 40 different values)"


def test_rows_without_a_target_are_left_out(capsys):
    saved = train("a,y\n1,x\n2,\n3,z\n4,x\n\n5,\n6,z\n7,x\n")
    assert saved["rows"] == 5 and saved["classes"] == ["x", "z"]
    assert "Left out: 2 row(s) without a value in 'y'\n" in capsys.readouterr().err
    saved = train("a,y\n1,3\n2,\n3,4\n4,3\n")
    assert saved["classes"] == [3, 4]


def test_one_row_with_a_target_is_too_few(capsys):
    line = refusal("a,y\n1,x\n2,\n", capsys)
    assert line == "t.csv: expected a row to train and one to validate on, got one row"


def test_a_byte_order_mark_and_other_line_ends():
    assert train(b"\xef\xbb\xbfa,y\r\nx,1.5\r\nz,2\r\nx,3\r\n")["features"] == ["a"]


def test_short_lines_are_all_named(capsys):
    line = refusal("a,b,y\n1,2,3\n4,5\n\n7\n", capsys)
    assert line == "t.csv: expected 3 values in each line, got fewer in line 3, 5"


def test_says_what_becomes_of_text_and_of_empty_cells(capsys):
    train("kind,size,y\nx,1,2.5\nz,,3\nx,2,4\n,3,5\n")
    said = capsys.readouterr().err
    assert "Text, with one input for each category: 'kind' (2)\n" in said
    assert "marked in one more input: 'kind' (1), 'size' (1)\n" in said


# -- Classes of unequal sizes ------------------------------------------------------------------


def test_scores_of_unequal_classes(capsys):
    saved = train(lines("a,y", [(n, "rare" if n > 35 else "usual") for n in range(40)]), epochs=1)
    parameters = saved["model"].values()
    for parameter in parameters:
        parameter.zero_()
    saved["model"]["2.bias"][1] = 1  # always "usual"
    torch.save(saved, "run/model.pt")
    capsys.readouterr()
    predict(lines("a,y", [(n, ["usual", "rare"][n > 7]) for n in range(10)]))
    said = capsys.readouterr().out
    assert "accuracy 0.8, balanced_accuracy 0.5\n" in said
    table = [line.split() for line in said.splitlines()[-4:]]
    assert table == [
        ["predicted", "rare", "usual"],
        ["actual"],
        ["rare", "0", "2"],
        ["usual", "0", "8"],
    ]
    predict("a,y\n1,usual\n2,usual\n")  # a class that does not occur has no part in the mean
    assert "accuracy 1, balanced_accuracy 1\n" in capsys.readouterr().out


def test_says_how_often_each_class_was_taken_for_each(capsys):
    train(lines("a,y", [(n, "xz"[n % 2]) for n in range(20)]))
    table = capsys.readouterr().out.partition("Validation rows by class:\n")[2]
    counts = [int(word) for line in table.splitlines()[2:] for word in line.split()[1:]]
    assert len(counts) == 4 and sum(counts) == 4


# -- What the network gets ---------------------------------------------------------------------


def test_the_inputs_are_those_of_the_training_rows():
    """A Sequential on columns that pandas makes gives the same predictions."""
    cells = [(["x", "z", ""][n % 3], ["", n][n % 4 > 0], n % 2, n * 0.5) for n in range(30)]
    text = lines("kind,size,flag,y", cells)
    saved = train(text, "--dtype", "float64")
    assert saved["categories"] == {"kind": ["x", "z"]}
    assert saved["indicators"] == ["kind", "size"]
    table = pandas.read_csv("t.csv")
    order = torch.randperm(30, generator=torch.Generator().manual_seed(0)).tolist()
    mean = table["size"][order[6:]].mean()
    columns = [
        table["kind"] == "x",
        table["kind"] == "z",
        table["kind"].isna(),
        table["size"].fillna(mean),
        table["size"].isna(),
        table["flag"],
    ]
    x = torch.tensor(pandas.concat(columns, axis=1).to_numpy("float64"))
    numbers = [3, 5]  # categories and indicators stay 0 and 1
    scaled = x.clone()
    scaled[:, numbers] = (x - x[order[6:]].mean(0))[:, numbers] / (
        x[order[6:]].std(0, correction=0)[numbers]
    )
    net = torch.nn.Sequential(
        torch.nn.Linear(6, 8), torch.nn.ReLU(), torch.nn.Linear(8, 1)
    ).double()
    net.load_state_dict(saved["model"])
    with torch.no_grad():
        y = net(scaled) * saved["target_scale"] + saved["target_mean"]
    # Sums of a few dozen numbers below 100, each rounded to 1e-16.
    assert predict(text)["predicted_y"].tolist() == pytest.approx(y[:, 0].tolist(), abs=1e-12)


def test_what_the_training_rows_lack_is_told_once_and_counts_as_nothing(capsys):
    train(lines("kind,size,y", [("xz"[n % 2], n % 5, n / 2) for n in range(20)]))
    capsys.readouterr()
    found = predict("kind,size\nnew,1\nolder,1\nnew,1\n,1\nx,2\nx,\n")["predicted_y"]
    assert capsys.readouterr().err.splitlines() == [
        "Column 'kind': 3 cell(s) hold a category that no training row has, and count as none: "
        "new, older",
        "Column 'kind': 1 cell(s) are empty, unlike in the training rows, and count as no category",
        "Column 'size': 1 cell(s) are empty, unlike in the training rows, and count as the mean",
    ]
    # Of equal rows; one at the end of a block may be added up in another order, in float32.
    assert found[:4].tolist() == pytest.approx([found[0]] * 4, rel=1e-5) and found.notna().all()


def test_a_category_that_only_validation_rows_have(capsys):
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0)).tolist()
    kinds = ["rare" if n == order[0] else "xz"[n % 2] for n in range(20)]
    saved = train(lines("kind,y", [(kind, n / 2) for n, kind in enumerate(kinds)]))
    assert saved["categories"] == {"kind": ["x", "z"]}
    assert "1 cell(s) hold a category that no training row has" in capsys.readouterr().err


def test_categories_and_classes_that_look_like_numbers_elsewhere():
    rows = [(["0", "1", "3+"][n % 3], ["7", "8", "many"][n % 3]) for n in range(30)]
    train(lines("a,y", rows), "--lr", 0.05, epochs=30)
    found = predict("a,y\n0,7\n1,8\n,\n")["predicted_y"]
    assert found[:2].astype(str).tolist() == ["7", "8"]


def test_a_resumed_training_reads_the_same_inputs():
    text = lines("kind,size,y", [("xz"[n % 2], ["", n][n % 3 > 0], n / 2) for n in range(20)])
    whole = train(text, epochs=4)
    train(text, epochs=2)
    assert cli.main(["train", "--data", "t.csv", "--resume", "--epochs", "4"]) == 0
    parts = torch.load("run/model.pt", weights_only=True)
    assert parts["history"] == whole["history"] and math.isfinite(parts["history"][-1]["train_r2"])
    assert all(torch.equal(parts["model"][name], whole["model"][name]) for name in whole["model"])
