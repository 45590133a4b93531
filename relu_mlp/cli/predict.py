"""`relu-mlp predict`: `DESCRIPTION` says what it does."""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import Any

from torch import Tensor

from . import Problem
from .checkpoint import Checkpoint
from .files import check_absent, write
from .info import checked_build_info
from .reading import pandas
from .table import Table
from .task import MOST_CLASSES, confusion, outputs_of

DESCRIPTION = """\
Predict the target of a CSV table with a network that `relu-mlp train` has trained.

The table must have the columns that the network was trained on, under the same names;
other columns are ignored. Writes one row for each row of the table, in the same order: a
number for each target, or a class and the probability of each class. If the table has
the target too, prints how good the predictions are.
"""

EXAMPLE = "relu-mlp predict --model run/model.pt --data new_houses.csv --out predictions.csv"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        type=Path,
        default=Path("run/model.pt"),
        metavar="FILE",
        help="a checkpoint of relu-mlp train (default: run/model.pt)",
    )
    parser.add_argument("--data", type=Path, required=True, metavar="CSV", help="the table")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("predictions.csv"),
        metavar="CSV",
        help="the predictions (default: predictions.csv)",
    )
    parser.add_argument("--force", action="store_true", help="overwrite --out")


def run(options: argparse.Namespace) -> int:
    if not options.force:
        check_absent([options.out], "--force overwrites it")
    checkpoint = Checkpoint.load(options.model)
    checked_build_info()
    table = Table.read(options.data, checkpoint.texts)
    table.require(checkpoint.features, f"which {options.model} was trained on")
    for note in checkpoint.encoding.notes(table):
        print(note, file=sys.stderr)
    outputs = predict(checkpoint, table)
    columns = as_columns(checkpoint, outputs)
    write(options.out, pandas().DataFrame(columns).to_csv(index=False).encode())
    print(f"Wrote {options.out}: {', '.join(columns)} of {len(table)} row(s)")
    if set(checkpoint.targets) <= set(table.names):
        print_scores(checkpoint, table, outputs)
    return 0


def predict(checkpoint: Checkpoint, table: Table) -> Tensor:
    """(rows, outputs) of the network, in float64."""
    x = checkpoint.feature_standardization.apply(checkpoint.encoding.apply(table))
    net = checkpoint.network()
    outputs = outputs_of(net, x.to(net[0].weight.dtype))
    bad = ~outputs.isfinite().all(1)
    if bad.any():
        line = table.line(int(bad.int().argmax()))
        dtype = checkpoint.settings["dtype"]
        raise Problem(
            f"{table.path}, line {line}: expected numbers nearer to those of the training; "
            f"the result is not finite in {dtype}"
        )
    return outputs


def as_columns(checkpoint: Checkpoint, outputs: Tensor) -> dict[str, Any]:
    """The predictions as columns, by name."""
    standardization = checkpoint.target_standardization
    if standardization is not None:
        columns = standardization.undo(outputs).T.tolist()
        return {
            f"predicted_{name}": column
            for name, column in zip(checkpoint.targets, columns, strict=True)
        }
    assert checkpoint.classes is not None
    best = [checkpoint.classes[n] for n in outputs.argmax(1).tolist()]
    probabilities = outputs.softmax(1).T.tolist()
    return {
        f"predicted_{checkpoint.targets[0]}": best,
        **{
            f"probability_{label}": column
            for label, column in zip(checkpoint.classes, probabilities, strict=True)
        },
    }


def print_scores(checkpoint: Checkpoint, table: Table, outputs: Tensor) -> None:
    """Prints how good the predictions are, if the table's targets can be read."""
    try:
        targets = checkpoint.task.read_targets(table)
    except Problem as problem:
        print(f"Not compared with the target: {problem}")
        return
    standardization = checkpoint.target_standardization
    if standardization is not None:
        targets = standardization.apply(targets)
    scores = checkpoint.task.scores(outputs, targets, standardization)
    del scores["loss"]  # it has the units of the training
    known = [f"{name} {value:.4g}" for name, value in scores.items() if not math.isnan(value)]
    print(f"Compared with the target: {', '.join(known)}")
    if checkpoint.classes is not None and len(checkpoint.classes) <= MOST_CLASSES:
        print(confusion(checkpoint.classes, outputs, targets))
