"""Trains on handwritten digits three ways: `nn.Sequential`, `ReluMLP`, and `TrainingStep`.

    python examples/digits.py [--epochs 30] [--batch-size 128] [--lr 0.04] [--seed 0] [--out demo]

The 1797 images of 8 x 8 pixels come with scikit-learn. All three start from the
same seed and see the same batches, in float32 and in float64. The first two are
trained by the same loop; the third trains a `ReluMLP` too, one call for each
epoch. The program stops with an error unless

- the test accuracy reaches 97 %,
- the loss of every step is the same for all, up to rounding,
- the gradients by hand and by autograd agree within a bound on their rounding errors,
- the checkpoint, loaded into a plain `nn.Sequential`, makes the same predictions.

It writes OUT/digits.png and the checkpoint OUT/digits.pt.
"""

from __future__ import annotations

import argparse
import io
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from tqdm import tqdm

import relu_mlp
from relu_mlp import ReluMLP, TrainingStep, loss_and_grads
from relu_mlp.cli import Problem
from relu_mlp.cli.files import make_folder, write

matplotlib.use("Agg")
import matplotlib.pyplot as plt

PIXELS, HIDDEN, CLASSES = 64, 64, 10
LEAST_ACCURACY = 0.97

# How far two losses may be apart, relative to their value. Each computation
# rounds in its own order, so after one step the weights differ by a few units in
# the last place: 1e-7 in float32, 1e-16 in float64. Three things keep that from
# growing:
# - SGD with a small learning rate is close to a gradient flow, which carries
#   differences along without multiplying them. (Adam divides by the size of the
#   gradient, so it makes a full step out of the rounding error of a small one.)
# - Weight decay shrinks differences, and keeps the loss away from 0.
# - A unit whose pre-activation is within rounding of 0 may be on in one network
#   and off in the other. Then the gradient of its row jumps. In float32 this
#   happens about once in a run. In a mean over 128 rows and in a narrow network it
#   does not matter; with large steps and more units it can reach the third digit.
# In 36 trainings with inputs and hidden units in random order, so that every sum
# rounded differently, the largest difference in float32 was 3e-6.
LIMITS = {torch.float32: 1e-4, torch.float64: 1e-10}


class Failure(Exception):
    """One of the conditions above does not hold."""


@dataclass
class Digits:
    """Standardized images (rows, 64) and labels (rows,), for training and test."""

    train_x: Tensor
    train_label: Tensor
    test_x: Tensor
    test_label: Tensor

    @classmethod
    def load(cls, dtype: torch.dtype) -> Digits:
        images, labels = load_digits(return_X_y=True)
        train, test, train_label, test_label = train_test_split(
            images, labels, test_size=0.2, random_state=0, stratify=labels
        )
        scaler = StandardScaler().fit(train)
        return cls(
            torch.tensor(scaler.transform(train), dtype=dtype),
            torch.tensor(train_label),
            torch.tensor(scaler.transform(test), dtype=dtype),
            torch.tensor(test_label),
        )


def make_relu_mlp(dtype: torch.dtype) -> ReluMLP:
    return ReluMLP(PIXELS, HIDDEN, CLASSES, dtype=dtype)


def make_sequential(dtype: torch.dtype) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(PIXELS, HIDDEN, dtype=dtype),
        nn.ReLU(),
        nn.Linear(HIDDEN, CLASSES, dtype=dtype),
    )


MAKERS = {"nn.Sequential": make_sequential, "ReluMLP": make_relu_mlp}


def batches(digits: Digits, batch_size: int, generator: torch.Generator) -> tuple[Tensor, ...]:
    """The rows of each batch of one epoch."""
    return torch.randperm(len(digits.train_x), generator=generator).split(batch_size)


@dataclass
class Run:
    """A network in training by a loop of one's own, and its history."""

    net: nn.Module
    optimizer: torch.optim.Optimizer
    generator: torch.Generator  # of the order of the rows
    losses: list[float] = field(default_factory=list)  # of each step
    accuracies: list[float] = field(default_factory=list)  # on the test images, after each epoch
    seconds: float = 0.0  # in training steps

    @classmethod
    def start(
        cls,
        make: Callable[[torch.dtype], nn.Module],
        dtype: torch.dtype,
        options: argparse.Namespace,
    ) -> Run:
        torch.manual_seed(options.seed)
        net = make(dtype)
        optimizer = torch.optim.SGD(
            net.parameters(), lr=options.lr, momentum=0.9, weight_decay=1e-3
        )
        return cls(net, optimizer, torch.Generator().manual_seed(options.seed))

    def train_one_epoch(self, digits: Digits, batch_size: int) -> None:
        started = time.perf_counter()
        losses = self.losses_of_epoch(digits, batch_size)
        self.seconds += time.perf_counter() - started
        self.losses += losses.tolist()
        with torch.no_grad():
            right = self.net(digits.test_x).argmax(1) == digits.test_label
        self.accuracies.append(right.double().mean().item())

    def losses_of_epoch(self, digits: Digits, batch_size: int) -> Tensor:
        losses = []
        for rows in batches(digits, batch_size, self.generator):
            loss = F.cross_entropy(self.net(digits.train_x[rows]), digits.train_label[rows])
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            losses.append(loss.detach())
        return torch.stack(losses)


@dataclass
class RunInOneCall(Run):
    """The same training, one call for each epoch."""

    def __post_init__(self) -> None:
        self.step = TrainingStep(self.net, "cross_entropy", self.optimizer)

    def losses_of_epoch(self, digits: Digits, batch_size: int) -> Tensor:
        x, label = digits.train_x, digits.train_label
        return self.step.epoch(x, label, batch_size, generator=self.generator)


def train(dtype: torch.dtype, digits: Digits, options: argparse.Namespace) -> dict[str, Run]:
    """Trains all networks from the seed in `options`.

    They take turns, an epoch each, so that other load on the machine slows down all.
    """
    runs = {name: Run.start(make, dtype, options) for name, make in MAKERS.items()}
    runs["TrainingStep"] = RunInOneCall.start(make_relu_mlp, dtype, options)
    with tqdm(total=options.epochs, desc=name_of(dtype), unit="epoch", mininterval=0.2) as progress:
        for _ in range(options.epochs):
            for run in runs.values():
                run.train_one_epoch(digits, options.batch_size)
            status = f"loss {run.losses[-1]:.4f}, test accuracy {run.accuracies[-1]:.1%}"
            progress.set_postfix_str(status, refresh=False)
            progress.update()
    return runs


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# -- The checks ----------------------------------------------------------------


def relative_difference(runs: dict[str, Run]) -> np.ndarray:
    """The largest difference of a step's losses from nn.Sequential's, relative to their value."""
    expected, *others = (np.array(run.losses) for run in runs.values())
    return np.max([np.abs(losses - expected) / np.abs(expected) for losses in others], axis=0)


def check_losses(runs: dict[str, Run], dtype: torch.dtype) -> float:
    """The largest relative difference. Raises `Failure` if it is beyond the limit."""
    difference = relative_difference(runs)
    step = int(difference.argmax())
    if not difference[step] <= LIMITS[dtype]:
        losses = ", ".join(f"{run.losses[step]!r} ({name})" for name, run in runs.items())
        raise Failure(
            f"{name_of(dtype)}: the losses of step {step}, {losses}, differ by "
            f"{difference[step]:.1e} of their value; the limit is {LIMITS[dtype]:.0e}"
        )
    return float(difference[step])


def gradient_bounds(net: nn.Sequential, x: Tensor, target: Tensor) -> tuple[Tensor, list[Tensor]]:
    """How far two computations of the gradients of the mean squared error may be apart.

    While no unit switches on or off, a gradient is a sum of products of entries of x,
    target, the weights and the biases. In a computed gradient every product is off by
    a factor of at most 1 + gamma(n). Here gamma(n) = n u / (1 - n u), u is the unit
    roundoff, and n is the number of additions and multiplications that a product goes
    through (Higham, Accuracy and Stability of Numerical Algorithms, section 3.1). So
    the error is at most gamma(n) times the same sum of absolute values, in any order
    of additions, and two computed gradients are apart by at most twice that.

    Returns:
        Which rows of x to use, (rows,), and for each parameter a bound for its gradient
        from those rows. A row is left out if rounding could switch one of its units.
    """
    unit_roundoff = torch.finfo(x.dtype).eps / 2

    def gamma(n: int) -> float:
        return n * unit_roundoff / (1 - n * unit_roundoff)

    layers = [layer for layer in net if isinstance(layer, nn.Linear)]
    weights = [layer.weight.detach().double() for layer in layers]
    biases = [layer.bias.detach().double() for layer in layers]

    # Forward: the activations, the sums of absolute values, and the units that are on.
    a, a_abs, n = x.double(), x.double().abs(), 0
    inputs, masks = [], []
    clear = torch.ones(len(x), dtype=torch.bool)
    for layer, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        inputs.append(a_abs)
        z = a @ weight.T + bias
        z_abs = a_abs @ weight.T.abs() + bias.abs()
        n += weight.shape[1] + 1
        if layer < len(layers) - 1:
            clear &= (z.abs() > gamma(n) * z_abs).all(1)
            masks.append(z > 0)
            a, a_abs = z.clamp(min=0), z_abs * (z > 0)

    # Backward, on absolute values. 2 (y - target) / elements takes up to 5 operations,
    # a product with a weight is a sum over the layer's outputs, and a gradient is a sum
    # over the rows. The hidden activation in the product was rounded on its way up.
    rows = int(clear.sum())
    n += 5 + sum(weight.shape[0] for weight in weights[1:]) + rows
    n += sum(weight.shape[1] + 1 for weight in weights[:-1])
    delta = (2 * (z_abs + target.double().abs()) / (rows * CLASSES))[clear]
    bounds: list[Tensor] = []
    for layer in reversed(range(len(layers))):
        bounds[:0] = [delta.T @ inputs[layer][clear], delta.sum(0)]
        if layer:
            delta = delta @ weights[layer].abs() * masks[layer - 1][clear]
    return clear, [2 * gamma(n) * bound for bound in bounds]


def check_gradients(dtype: torch.dtype, digits: Digits, options: argparse.Namespace) -> float:
    """Compares the gradients of the first batch: by hand, by the layer, and by autograd.

    The loss is the mean squared error against one-hot targets, which `loss_and_grads`
    has too. Returns the largest difference as a fraction of its bound. Raises `Failure`
    if that is above 1.
    """
    nets = {}
    for name, make in MAKERS.items():
        torch.manual_seed(options.seed)
        nets[name] = make(dtype)
    sequential = nets["nn.Sequential"]

    rows = batches(digits, options.batch_size, torch.Generator().manual_seed(options.seed))[0]
    x = digits.train_x[rows]
    target = F.one_hot(digits.train_label[rows], CLASSES).to(dtype)
    clear, bounds = gradient_bounds(sequential, x, target)
    x, target = x[clear], target[clear]

    grads: dict[str, list[Tensor]] = {}
    for name, net in nets.items():
        loss = F.mse_loss(net(x), target)
        grads[name] = list(torch.autograd.grad(loss, list(net.parameters())))
    weight1, bias1, weight2, bias2 = sequential.parameters()
    by_hand = loss_and_grads(x, target, [weight1, weight2], [bias1, bias2], loss="mse")
    (grad_weight1, grad_weight2), (grad_bias1, grad_bias2) = by_hand.weights, by_hand.biases
    grads["loss_and_grads"] = [grad_weight1, grad_bias1, grad_weight2, grad_bias2]

    worst = 0.0
    names = [name for name, _ in sequential.named_parameters()]
    for name in ("ReluMLP", "loss_and_grads"):
        for key, grad, expected, bound in zip(
            names, grads[name], grads["nn.Sequential"], bounds, strict=True
        ):
            difference = (grad - expected).double().abs()
            # A pixel that is the same in all images is 0, and so is its bound.
            fraction = (difference / bound.clamp(min=torch.finfo(dtype).tiny)).max().item()
            if not (difference <= bound).all():
                raise Failure(
                    f"{name_of(dtype)}: the gradient of {key} by {name} differs from autograd's by "
                    f"{fraction:.2g} times the bound on rounding errors"
                )
            worst = max(worst, fraction)
    return worst


def check_checkpoint(path: Path, net: nn.Module, digits: Digits) -> None:
    """Saves the network, loads it into a plain nn.Sequential, and compares the two."""
    buffer = io.BytesIO()
    torch.save(net.state_dict(), buffer)
    write(path, buffer.getvalue())
    plain = make_sequential(torch.float32)
    plain.load_state_dict(torch.load(path, weights_only=True))
    with torch.no_grad():
        differ = int((plain(digits.test_x).argmax(1) != net(digits.test_x).argmax(1)).sum())
    if differ:
        raise Failure(f"{path}, loaded into nn.Sequential, predicts {differ} digits differently")


# -- The picture ---------------------------------------------------------------


def draw(path: Path, runs: dict[torch.dtype, dict[str, Run]]) -> None:
    """Draws the loss, the difference of the losses, and the accuracy over the epochs."""
    blue, orange, grey = "#2166ac", "#e08214", "#555555"
    style = {
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.grid": True,
        "grid.color": "#e5e5e5",
        "legend.frameon": False,
    }
    looks = {
        "ReluMLP": {"color": blue, "linewidth": 4, "alpha": 0.45},
        "nn.Sequential": {"color": orange, "linewidth": 1.3, "linestyle": (0, (4, 2))},
        "TrainingStep": {"color": "black", "linewidth": 1.3, "linestyle": (0, (1, 5))},
    }
    with plt.rc_context(style):
        figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
        for name, look in looks.items():
            run = runs[torch.float32][name]
            epochs = len(run.accuracies)
            at_step = np.arange(1, len(run.losses) + 1) * epochs / len(run.losses)
            at_epoch = np.arange(1, epochs + 1)
            per_epoch = np.reshape(run.losses, (epochs, -1)).mean(1)
            left.plot(at_epoch, per_epoch, label=name, **look)
            right.plot(at_epoch, 100 * np.array(run.accuracies), label=name, **look)

        for dtype, color in ((torch.float32, blue), (torch.float64, grey)):
            # Equal losses are drawn below those that differ.
            least = torch.finfo(dtype).eps / 4
            difference = np.maximum(relative_difference(runs[dtype]), least)
            middle.plot(at_step, difference, ".", color=color, markersize=3)
            middle.axhline(LIMITS[dtype], color=color, linewidth=1.3, linestyle="--")
            middle.text(
                epochs, LIMITS[dtype] * 1.6, f"limit in {name_of(dtype)}", color=color, ha="right"
            )
            middle.text(
                epochs, difference.max() * 2, name_of(dtype), color=color, ha="right", weight="bold"
            )
            middle.text(epochs, least / 1.7, "equal", color=color, ha="right", va="top", size=8)
        right.axhline(100 * LEAST_ACCURACY, color=grey, linewidth=1.3, linestyle="--")
        right.text(epochs, 100 * LEAST_ACCURACY - 0.6, "97 %", color=grey, ha="right", va="top")

        left.set(title="Training loss (float32)", ylabel="cross-entropy, mean of the epoch")
        left.set_yscale("log")
        left.legend()
        middle.set(
            title="Compared with nn.Sequential", ylabel="largest relative difference of a loss"
        )
        middle.set_yscale("log")
        middle.set_ylim(3e-18, 1e-2)
        final = runs[torch.float32]["ReluMLP"].accuracies[-1]
        right.set(title=f"Test accuracy: {final:.1%}", ylabel="test images recognized, %")
        right.legend(loc="lower right")
        for axes in (left, middle, right):
            axes.set(xlabel="epoch", xlim=(0, epochs + 0.5))
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=150)
        write(path, buffer.getvalue())
        plt.close(figure)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Trains a ReluMLP on handwritten digits, by a loop and by TrainingStep.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=0.04, help="learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder for the results")
    options = parser.parse_args()
    if options.epochs < 1 or options.batch_size < 1:
        parser.error("--epochs and --batch-size must be at least 1")
    return options


def main() -> None:
    options = parse_options()
    make_folder(options.out)
    # A network of this size has no work for a second thread.
    torch.set_num_threads(1)
    print(f"PyTorch {torch.__version__}; ReluMLP runs as: {relu_mlp.build_info().runs_on_cpu}")

    runs: dict[torch.dtype, dict[str, Run]] = {}
    for dtype, limit in LIMITS.items():
        digits = Digits.load(dtype)
        fraction = check_gradients(dtype, digits, options)
        runs[dtype] = train(dtype, digits, options)
        difference = check_losses(runs[dtype], dtype)
        steps = len(runs[dtype]["ReluMLP"].losses)
        seconds = [f"{name} {run.seconds:.2f} s" for name, run in runs[dtype].items()]
        print(
            f"  gradients by hand and by autograd: apart by {fraction:.1e} of the bound\n"
            f"  losses of {steps} steps: apart by at most {difference:.1e} (limit {limit:.0e})\n"
            f"  training steps took: {', '.join(seconds)}"
        )

    trained = runs[torch.float32]["ReluMLP"]
    picture, checkpoint = options.out / "digits.png", options.out / "digits.pt"
    draw(picture, runs)
    check_checkpoint(checkpoint, trained.net, Digits.load(torch.float32))
    print(f"Test accuracy: {trained.accuracies[-1]:.1%}")
    print(f"Wrote {picture}, and {checkpoint}: nn.Sequential loads it and predicts the same")
    if trained.accuracies[-1] < LEAST_ACCURACY:
        raise Failure(f"the test accuracy is below {LEAST_ACCURACY:.0%}; train for more epochs")


if __name__ == "__main__":
    try:
        main()
    except Failure as failure:
        sys.exit(f"FAILED: {failure}")
    except Problem as problem:
        print(f"digits.py: error: {problem}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
