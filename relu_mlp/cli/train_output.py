"""The output of `relu-mlp train`: printed lines and files."""

from __future__ import annotations

import io
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from . import Missing, needs
from .checkpoint import Checkpoint
from .files import write
from .info import checked_build_info
from .reading import listed, pandas
from .task import MOST_CLASSES, confusion, outputs_of
from .training import Training


class Files(NamedTuple):
    model: Path
    curves: Path
    picture: Path


def print_plan(training: Training) -> None:
    task, settings, info = training.task, training.settings, checked_build_info()
    sizes = [training.encoding.inputs, *settings["hidden"], task.outputs]
    by = info.runs_on_cuda if training.device.startswith("cuda") else info.runs_on_cpu
    print(
        f"Table: {training.table.path}, {len(training.train.x)} rows to train on, "
        f"{len(training.validation.x)} to validate on\n"
        f"From {listed(task.features)} to {listed(task.targets)}"
    )
    for note in training.encoding.notes(training.table):
        print(note, file=sys.stderr)
    if task.classes is not None:
        print(f"Classes: {len(task.classes)}: {listed(task.classes)}")
    print(
        f"Network: {'-'.join(map(str, sizes))}, {settings['dtype']}, on {training.device}, "
        f"run by the {by}"
    )


@contextmanager
def progress(done: int, epochs: int) -> Iterator[Callable[[dict[str, float]], None]]:
    """A progress bar, or ten lines if there is no terminal.

    Yields a function that takes the scores of each epoch.
    """
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
    """The losses of both parts and the other validation scores, as text."""
    text = f"train loss {scores['train_loss']:.4g}"
    for name, value in scores.items():
        score = name.removeprefix("validation_")
        if score != name and not math.isnan(value):
            text += (
                f", validation loss {value:.4g}" if score == "loss" else f", {score} {value:.4g}"
            )
    return text


def write_all(checkpoint: Checkpoint, files: Files) -> None:
    epoch, best = checkpoint.epoch, checkpoint.best_epoch
    print(f"After {epoch} epochs: {in_words(checkpoint.history[-1])}")
    if best != epoch:
        kept = f"the network of epoch {epoch if checkpoint.settings['last'] else best} is kept"
        print(
            f"The validation loss was lowest after epoch {best}: "
            f"{in_words(checkpoint.history[best - 1])}; {kept}"
        )
    checkpoint.save(files.model)
    written = [files.model, files.curves]
    write(files.curves, pandas().DataFrame(checkpoint.history).to_csv(index=False).encode())
    try:
        draw(checkpoint, files.picture)
        written.append(files.picture)
    except Missing as missing:
        files.picture.unlink(missing_ok=True)  # it may be from another training
        print(f"No {files.picture}: {missing}")
    print(f"Wrote {', '.join(map(str, written))}")


def print_confusion(training: Training, checkpoint: Checkpoint) -> None:
    """Prints the confusion matrix of the validation rows, of a few classes."""
    classes, part = checkpoint.classes, training.validation
    if classes is not None and len(classes) <= MOST_CLASSES:
        outputs = outputs_of(checkpoint.network(), part.x.cpu())
        print("Validation rows by class:")
        print(confusion(classes, outputs, part.targets.cpu()))


def draw(checkpoint: Checkpoint, path: Path) -> None:
    """Draws loss, and accuracy or R², of both parts over the epochs."""
    figure = needs("matplotlib.figure", "cli", "a picture").Figure((10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    history = checkpoint.history
    score = "r2" if checkpoint.classes is None else "accuracy"
    for part, color in (("train", "#2166ac"), ("validation", "#e08214")):
        for axes, name in ((left, f"{part}_loss"), (right, f"{part}_{score}")):
            epochs = [scores["epoch"] for scores in history]
            values = [scores[name] for scores in history]
            axes.plot(epochs, values, label=part, color=color, marker="." * (len(history) == 1))
    left.axvline(checkpoint.best_epoch, color="#999999", linestyle=":", label="lowest")
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
