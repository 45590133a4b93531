"""`relu-mlp train`: `DESCRIPTION` says what it does."""

from __future__ import annotations

import argparse
import math
import sys
import time
from pathlib import Path
from typing import Any

from . import Problem
from .arguments import count, count_or_zero, nonnegative_seed, number
from .checkpoint import Checkpoint
from .column_kinds import check_columns
from .files import check_absent, make_folder
from .settings import DEFAULTS, DTYPES, FIXED, OPTIMIZERS, REAL
from .table import Table
from .task import Task, choose_classes
from .train_output import Files, print_confusion, print_plan, progress, write_all
from .training import Training, check_device

DESCRIPTION = """\
Train a network on a CSV table, for regression or classification.

The first line of the table has the names of its columns. All columns except the target
are features, unless --columns or --ignore selects them. Text becomes one input for each
category, and empty cells are filled in. A target of text, of booleans, or of at most 20
different integers is a classification; any other is a regression. --task overrides this.

Writes model.pt, curves.csv and curves.png into the folder --out. The network in model.pt
is that of the epoch with the lowest validation loss. With --resume, settings that are
not given stay as they were, and --epochs counts from the start.
"""

EXAMPLE = "relu-mlp train --data houses.csv --target price --hidden 64 64 --epochs 200"

MODEL = "model.pt"

#: A run that is killed loses this much, plus the epoch that it was in.
SECONDS_BETWEEN_SAVES = 10


# -- The command line ------------------------------------------------------------


def learning_rate(text: str) -> float:
    return number(text, *REAL["lr"])


def weight_decay(text: str) -> float:
    return number(text, *REAL["weight_decay"])


def fraction(text: str) -> float:
    return number(text, *REAL["validation"])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", type=Path, required=True, metavar="CSV", help="the table")
    parser.add_argument(
        "--target",
        nargs="+",
        metavar="COLUMN",
        help="the column to predict; several only for regression",
    )
    parser.add_argument(
        "--task",
        choices=("classification", "regression"),
        help="(default: depends on the target)",
    )
    columns = parser.add_mutually_exclusive_group()
    columns.add_argument(
        "--columns", nargs="+", metavar="COLUMN", help="the features (default: all but the target)"
    )
    columns.add_argument(
        "--ignore", nargs="+", metavar="COLUMN", help="columns that are not features"
    )

    network = parser.add_argument_group("network")
    network.add_argument(
        "--hidden",
        nargs="*",
        type=count,
        metavar="WIDTH",
        help="hidden widths (default: 64 64); none for a linear model",
    )
    network.add_argument("--dtype", choices=DTYPES, help="(default: float32)")
    network.add_argument("--device", default="cpu", help="cpu, cuda, ... (default: cpu)")

    training = parser.add_argument_group("training")
    training.add_argument("--epochs", type=count, help="(default: 100)")
    training.add_argument(
        "--patience",
        type=count_or_zero,
        metavar="EPOCHS",
        help="stop after so many epochs without a lower validation loss (default: 20); 0: never",
    )
    training.add_argument("--batch-size", type=count, help="(default: 32)")
    training.add_argument("--optimizer", choices=tuple(OPTIMIZERS), help="(default: adam)")
    training.add_argument(
        "--lr", type=learning_rate, help="learning rate (default: 0.001; 0.01 for sgd)"
    )
    training.add_argument("--weight-decay", type=weight_decay, help="(default: 0; 0.01 for adamw)")
    training.add_argument(
        "--validation",
        type=fraction,
        metavar="FRACTION",
        help="the fraction of the rows kept for validation (default: 0.2)",
    )
    training.add_argument(
        "--seed", type=nonnegative_seed, help="seed of weights, split and order (default: 0)"
    )

    output = parser.add_argument_group("output")
    output.add_argument(
        "--out", type=Path, default=Path("run"), metavar="FOLDER", help="(default: run)"
    )
    output.add_argument(
        "--last",
        action="store_true",
        default=None,
        help="keep the network of the last epoch, not that with the lowest validation loss",
    )
    existing = output.add_mutually_exclusive_group()
    existing.add_argument("--resume", action="store_true", help="continue from model.pt in --out")
    existing.add_argument("--force", action="store_true", help="overwrite the files in --out")


def run(options: argparse.Namespace) -> int:
    files = Files(*[options.out / name for name in (MODEL, "curves.csv", "curves.png")])
    resumed = None
    if options.resume:
        resumed = Checkpoint.load(files.model)
    elif not options.force:
        check_absent(files, "--resume continues from it, --force overwrites it")
    settings = {**DEFAULTS, **(resumed.settings if resumed else {}), **given(options)}
    table = Table.read(options.data, resumed.texts if resumed else ())
    task = make_task(options, table, resumed)
    table = with_targets(table, task.targets)
    if resumed:
        check_goes_on(resumed, settings, files.model)
    check_device(options.device, settings["dtype"])
    training = Training(table, task, settings, options.device, resumed)
    print_plan(training)
    make_folder(options.out)
    try:
        train(training, files.model)
    except KeyboardInterrupt:
        if training.epoch:
            print(f"\nInterrupted; --resume goes on from epoch {training.epoch}")
        else:
            print("\nInterrupted in the first epoch; there is nothing to save")
        raise
    finally:  # also after a divergence or an interruption
        if training.last is not None:
            write_all(training.last, files)
    assert training.last is not None
    print_confusion(training, training.last)
    return 0


def given(options: argparse.Namespace) -> dict[str, Any]:
    """The settings that the user has given."""
    chosen = {name: getattr(options, name) for name in DEFAULTS}
    return {name: value for name, value in chosen.items() if value is not None}


def check_goes_on(resumed: Checkpoint, settings: dict[str, Any], path: Path) -> None:
    """Raises a `Problem` if the settings leave a resumed training no epoch to run."""
    epochs, patience = settings["epochs"], settings["patience"]
    if resumed.epoch >= epochs:
        raise Problem(
            f"--epochs: expected more than the {resumed.epoch} that {path} has, got {epochs}"
        )
    waited = resumed.epoch - resumed.best_epoch
    if 0 < patience <= waited:
        raise Problem(
            f"--patience: expected 0, or more than the {waited} epochs without a lower "
            f"validation loss that {path} has, got {patience}"
        )


def make_task(options: argparse.Namespace, table: Table, resumed: Checkpoint | None) -> Task:
    """The task that the flags request. A resumed training already has one."""
    asked = options.target or (resumed.targets if resumed else ())
    if not asked:
        raise Problem("--target: expected the name of a column, got none")
    targets = list(dict.fromkeys(asked))
    table.require(targets, "which --target names")
    if resumed and not (options.columns or options.ignore):
        features = resumed.features
        table.require(features, "which the checkpoint was trained on")
    else:
        features = choose_features(options, table, targets)
    if resumed:
        check_same_network(options, resumed, targets, features)
        return resumed.task
    if table.nameless:
        print(f"Left out: {table.nameless} column(s) without a name")
    classes, why = choose_classes(table.with_values_of(targets), targets, options.task)
    is_labels = classes is not None and options.task is None
    check_columns(table, features, [name for name in targets if is_labels and table.is_text(name)])
    task = Task(features, targets, classes)
    print(f"Task: {task.kind}, because {why}")
    return task


def with_targets(table: Table, targets: list[str]) -> Table:
    """The rows that have all targets."""
    complete = table.with_values_of(targets)
    if left_out := len(table) - len(complete):
        names = ", ".join(map(repr, targets))
        print(f"Left out: {left_out} row(s) without a value in {names}", file=sys.stderr)
    return complete


def choose_features(options: argparse.Namespace, table: Table, targets: list[str]) -> list[str]:
    table.require(options.columns or (), "which --columns names")
    table.require(options.ignore or (), "which --ignore names")
    for name in options.columns or ():
        if name in targets:
            raise Problem(f"--columns: expected features, got the target {name!r}")
    ignored = {*targets, *(options.ignore or ())}
    chosen = options.columns or [name for name in table.names if name not in ignored]
    if not chosen:
        raise Problem(f"{table.path}: expected columns besides the target, got none")
    return list(dict.fromkeys(chosen))


def check_same_network(
    options: argparse.Namespace, resumed: Checkpoint, targets: list[str], features: list[str]
) -> None:
    """Raises a `Problem` if the flags request another network than that of the checkpoint."""
    held = {
        "target": resumed.targets,
        "columns": resumed.features,
        "task": resumed.task.kind,
        **{name: resumed.settings[name] for name in FIXED},
    }
    asked = {"target": targets, "columns": features, "task": options.task, **given(options)}
    for name, value in held.items():
        if asked.get(name) not in (None, value):
            raise Problem(
                f"{options.out / MODEL} is a checkpoint of another network: it has "
                f"{as_flag(name, value)}, but {as_flag(name, asked[name])} was asked for"
            )


def as_flag(name: str, value: Any) -> str:
    return " ".join([f"--{name}", *map(str, value if isinstance(value, list) else [value])])


# -- The training ----------------------------------------------------------------


def train(training: Training, path: Path) -> None:
    """Runs the remaining epochs. Saves at intervals, and keeps the last good state.

    Raises:
        Problem: if a loss is not finite.
    """
    epochs = training.settings["epochs"]
    saved = time.monotonic()
    with progress(training.epoch, epochs) as show:
        while training.epoch < epochs and not training.has_waited_enough:
            training.train_one_epoch()
            scores = training.evaluate()
            for name in ("train_loss", "validation_loss"):
                if not math.isfinite(scores[name]):
                    raise Problem(
                        f"the training diverged: {name} is {scores[name]} after epoch "
                        f"{training.epoch + 1}; try a smaller --lr"
                    )
            last = training.record(scores)
            if time.monotonic() - saved >= SECONDS_BETWEEN_SAVES:
                last.save(path)
                saved = time.monotonic()
            show(training.history[-1])
