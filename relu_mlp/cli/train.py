"""`relu-mlp train`: `DESCRIPTION` says what it does."""

from __future__ import annotations

import argparse
import io
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from . import Missing, Problem, needs
from .checkpoint import Checkpoint
from .files import check_absent, make_folder, write
from .info import checked_build_info
from .settings import DEFAULTS, DTYPES, FIXED, OPTIMIZERS, REAL, WHOLE
from .table import Table, listed, pandas
from .task import Task, choose_classes
from .training import Training, check_device

DESCRIPTION = """\
Train a network on a CSV table, for regression or classification.

The first line of the table names its columns. All but the target are features and
must hold numbers (true and false count as 1 and 0), unless --columns or --ignore
chooses. A target of text or of true and false is a class, and so is one of whole
numbers with at most 20 different ones; any other is a number to be predicted.
--task overrides this.

Writes model.pt, curves.csv and curves.png into the folder --out. With --resume,
what is not said anew is as it was, and --epochs counts from the very beginning.
"""

EXAMPLE = "relu-mlp train --data houses.csv --target price --hidden 64 64 --epochs 200"

MODEL = "model.pt"

#: A run that is killed loses this much, and the epoch that it was in.
SECONDS_BETWEEN_SAVES = 10


# -- The command line ------------------------------------------------------------


def at_least_one(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 on, got {text!r}")
    if int(text) > (most := WHOLE["epochs"][1]):
        raise argparse.ArgumentTypeError(f"expected a whole number up to {most}, got {text!r}")
    return int(text)


def seed(text: str) -> int:
    if not text.isdecimal() or int(text) > WHOLE["seed"][1]:
        raise argparse.ArgumentTypeError(f"expected a whole number from 0 to 2**63, got {text!r}")
    return int(text)


def number(text: str, least: float, most: float) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not least <= value <= most:
        expected = f"expected a number from {least:g} to {most:g}"
        raise argparse.ArgumentTypeError(f"{expected}, got {text!r}")
    return value


def learning_rate(text: str) -> float:
    return number(text, *REAL["lr"])


def weight_decay(text: str) -> float:
    return number(text, *REAL["weight_decay"])


def fraction(text: str) -> float:
    return number(text, *REAL["validation"])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", type=Path, required=True, metavar="CSV", help="the table")
    parser.add_argument(
        "--target", nargs="+", metavar="COLUMN", help="what to predict; several for regression"
    )
    parser.add_argument(
        "--task", choices=("classification", "regression"), help="(default: told from the target)"
    )
    columns = parser.add_mutually_exclusive_group()
    columns.add_argument(
        "--columns", nargs="+", metavar="COLUMN", help="the features (default: all but the target)"
    )
    columns.add_argument(
        "--ignore", nargs="+", metavar="COLUMN", help="columns that are no features"
    )

    network = parser.add_argument_group("network")
    network.add_argument(
        "--hidden",
        nargs="*",
        type=at_least_one,
        metavar="WIDTH",
        help="hidden sizes (default: 64 64); none for a linear model",
    )
    network.add_argument("--dtype", choices=DTYPES, help="(default: float32)")
    network.add_argument("--device", default="cpu", help="cpu, cuda, ... (default: cpu)")

    training = parser.add_argument_group("training")
    training.add_argument("--epochs", type=at_least_one, help="(default: 100)")
    training.add_argument("--batch-size", type=at_least_one, help="(default: 32)")
    training.add_argument("--optimizer", choices=tuple(OPTIMIZERS), help="(default: adam)")
    training.add_argument(
        "--lr", type=learning_rate, help="learning rate (default: 0.001, of sgd 0.01)"
    )
    training.add_argument("--weight-decay", type=weight_decay, help="(default: 0, of adamw 0.01)")
    training.add_argument(
        "--validation",
        type=fraction,
        metavar="FRACTION",
        help="of the rows, kept out of training (default: 0.2)",
    )
    training.add_argument("--seed", type=seed, help="of weights, split and order (default: 0)")

    output = parser.add_argument_group("output")
    output.add_argument(
        "--out", type=Path, default=Path("run"), metavar="FOLDER", help="(default: run)"
    )
    existing = output.add_mutually_exclusive_group()
    existing.add_argument("--resume", action="store_true", help="continue from model.pt in --out")
    existing.add_argument("--force", action="store_true", help="overwrite what is in --out")


class Files(NamedTuple):
    model: Path
    curves: Path
    picture: Path


def run(options: argparse.Namespace) -> int:
    files = Files(*[options.out / name for name in (MODEL, "curves.csv", "curves.png")])
    resumed = None
    if options.resume:
        resumed = Checkpoint.load(files.model)
    elif not options.force:
        check_absent(files, "--resume continues from it, --force overwrites it")
    settings = {**DEFAULTS, **(resumed.settings if resumed else {}), **given(options)}
    table = Table.read(options.data)
    task = make_task(options, table, resumed)
    if resumed and resumed.epoch >= settings["epochs"]:
        raise Problem(
            f"--epochs: expected more than the {resumed.epoch} that {files.model} has, "
            f"got {settings['epochs']}"
        )
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
    finally:  # also when the training diverged, or was interrupted
        if training.last is not None:
            write_all(training.last, files)
    return 0


def given(options: argparse.Namespace) -> dict[str, Any]:
    """The settings that the person has chosen."""
    chosen = {name: getattr(options, name) for name in DEFAULTS}
    return {name: value for name, value in chosen.items() if value is not None}


def make_task(options: argparse.Namespace, table: Table, resumed: Checkpoint | None) -> Task:
    """The columns that are asked for, and what is to be learnt; a resumed training knows both."""
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
    classes, why = choose_classes(table, targets, options.task)
    task = Task(features, targets, classes)
    print(f"Task: {task.kind}, because {why}")
    return task


def choose_features(options: argparse.Namespace, table: Table, targets: list[str]) -> list[str]:
    table.require(options.columns or (), "which --columns names")
    table.require(options.ignore or (), "which --ignore names")
    for name in options.columns or ():
        if name in targets:
            raise Problem(f"--columns: expected features, got the target {name!r}")
    ignored = {*targets, *(options.ignore or ())}
    chosen = options.columns or [name for name in table.names if name not in ignored]
    if not chosen:
        raise Problem(f"{table.path}: expected columns beside the target, got none")
    return list(dict.fromkeys(chosen))


def check_same_network(
    options: argparse.Namespace, resumed: Checkpoint, targets: list[str], features: list[str]
) -> None:
    """A `Problem` if the flags ask for something else than what the checkpoint holds."""
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
                f"{options.out / MODEL} is a checkpoint of another network: it has --{name} "
                f"{words(value)}, asked for was --{name} {words(asked[name])}"
            )


def words(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


# -- The training ----------------------------------------------------------------


def train(training: Training, path: Path) -> None:
    """All epochs that are left; saves now and then, and keeps the last state that is good.

    Raises:
        Problem: if a loss is no longer a finite number.
    """
    epochs = training.settings["epochs"]
    saved = time.monotonic()
    with progress(training.epoch, epochs) as show:
        while training.epoch < epochs:
            training.train_one_epoch()
            scores = training.evaluate()
            for name in ("train_loss", "validation_loss"):
                if not math.isfinite(scores[name]):
                    raise Problem(
                        f"the training diverged: {name} is {scores[name]} after epoch "
                        f"{training.epoch + 1}; try a smaller --lr"
                    )
            training.history.append({"epoch": training.epoch + 1, **scores})
            training.last = training.checkpoint()
            if time.monotonic() - saved >= SECONDS_BETWEEN_SAVES:
                training.last.save(path)
                saved = time.monotonic()
            show(training.history[-1])


# -- What the person sees --------------------------------------------------------


def print_plan(training: Training) -> None:
    task, settings, info = training.task, training.settings, checked_build_info()
    sizes = [len(task.features), *settings["hidden"], task.outputs]
    by = info.runs_on_cuda if training.device.startswith("cuda") else info.runs_on_cpu
    print(
        f"Table: {training.table.path}, {len(training.train.x)} rows to train on, "
        f"{len(training.validation.x)} to validate on\n"
        f"From {listed(task.features)} to {listed(task.targets)}"
    )
    if task.classes is not None:
        print(f"Classes: {len(task.classes)}: {listed(task.classes)}")
    print(
        f"Network: {'-'.join(map(str, sizes))}, {settings['dtype']}, on {training.device}, "
        f"run by the {by}"
    )


@contextmanager
def progress(done: int, epochs: int) -> Iterator[Callable[[dict[str, float]], None]]:
    """A bar at a terminal, or else ten lines; to be called with the scores of each epoch."""
    try:
        bar = needs("tqdm", "cli", "a progress bar").tqdm(
            total=epochs, initial=done, unit="epoch", disable=None
        )
    except Missing as missing:
        print(f"Progress in lines: {missing}")
        bar = None
    every = math.ceil((epochs - done) / 10)

    def show(scores: dict[str, float]) -> None:
        if bar is not None:
            bar.set_postfix_str(in_words(scores), refresh=False)
            bar.update()
        epoch = int(scores["epoch"])
        if (bar is None or bar.disable) and ((epoch - done) % every == 0 or epoch == epochs):
            print(f"epoch {epoch:{len(str(epochs))}}: {in_words(scores)}", flush=True)

    try:
        yield show
    finally:
        if bar is not None:
            bar.close()


def in_words(scores: dict[str, float]) -> str:
    """Losses of both parts, and what else is known of the validation."""
    text = f"train loss {scores['train_loss']:.4g}"
    for name, value in scores.items():
        score = name.removeprefix("validation_")
        if score != name and not math.isnan(value):
            text += (
                f", validation loss {value:.4g}" if score == "loss" else f", {score} {value:.4g}"
            )
    return text


def write_all(checkpoint: Checkpoint, files: Files) -> None:
    best = min(checkpoint.history, key=lambda scores: scores["validation_loss"])
    print(f"After {checkpoint.epoch} epochs: {in_words(checkpoint.history[-1])}")
    if best is not checkpoint.history[-1]:
        print(f"The validation loss was lowest after epoch {best['epoch']}: {in_words(best)}")
    checkpoint.save(files.model)
    written = [files.model, files.curves]
    write(files.curves, pandas().DataFrame(checkpoint.history).to_csv(index=False).encode())
    try:
        draw(checkpoint, files.picture)
        written.append(files.picture)
    except Missing as missing:
        files.picture.unlink(missing_ok=True)  # it would be another training's
        print(f"No {files.picture}: {missing}")
    print(f"Wrote {', '.join(map(str, written))}")


def draw(checkpoint: Checkpoint, path: Path) -> None:
    """Loss, and accuracy or R², of both parts over the epochs."""
    figure = needs("matplotlib.figure", "cli", "a picture").Figure((10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    history = checkpoint.history
    score = "r2" if checkpoint.classes is None else "accuracy"
    for part, color in (("train", "#2166ac"), ("validation", "#e08214")):
        for axes, name in ((left, f"{part}_loss"), (right, f"{part}_{score}")):
            epochs = [scores["epoch"] for scores in history]
            values = [scores[name] for scores in history]
            axes.plot(epochs, values, label=part, color=color, marker="." * (len(history) == 1))
    loss = "mean squared error, standardized" if score == "r2" else "cross-entropy"
    left.set(title="Loss", xlabel="epoch", ylabel=loss)
    if all(scores[f"{part}_loss"] > 0 for scores in history for part in ("train", "validation")):
        left.set_yscale("log")
    right.set(title="R²" if score == "r2" else "Accuracy", xlabel="epoch")
    if history[-1][f"validation_{score}"] > -1:
        right.set_ylim(max(-1, right.get_ylim()[0]), 1.02)  # the first epochs may be far below
    for axes in (left, right):
        axes.grid(color="#e5e5e5")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    write(path, buffer.getvalue())
