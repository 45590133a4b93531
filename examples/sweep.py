"""A sweep over learning rates and seeds as one ensemble of small networks.

    python examples/sweep.py [--out demo]

Seven learning rates of Adam times three seeds are 21 networks, each with its own optimizer. A seed
gives the initial values and the orders of rows. `TrainingStep` trains all of them in one call per
epoch. An error ends the program unless the best of them has the same bits, in losses and
parameters, when it is trained alone. Writes OUT/sweep.png.
"""

import argparse
import itertools
import sys
from pathlib import Path

import matplotlib
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Generator, Tensor

from relu_mlp import ReluMLP, TrainingStep

RATES, SEEDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0), (0, 1, 2)
ROWS, BATCH, EPOCHS = 400, 50, 20
RUNS = list(itertools.product(RATES, SEEDS))


def make_data(seed: int) -> tuple[Tensor, Tensor]:
    x = 2 * torch.rand(ROWS, 2, generator=Generator().manual_seed(seed)) - 1
    return x, (4 * x[:, :1]).sin() * x[:, 1:]


def make_network(seed: int) -> ReluMLP:
    torch.manual_seed(seed)
    return ReluMLP(2, [32, 32], 1)


def train_all(x: Tensor, target: Tensor) -> tuple[list[ReluMLP], Tensor]:
    """The trained networks, and the losses of all batches, (networks, batches)."""
    nets = [make_network(seed) for _, seed in RUNS]
    rates = [lr for lr, _ in RUNS]
    optimizers = [
        torch.optim.Adam(net.parameters(), lr=lr) for net, lr in zip(nets, rates, strict=True)
    ]
    step = TrainingStep(nets, "mse", optimizers)
    orders = [Generator().manual_seed(seed) for _, seed in RUNS]
    epochs = [step.epoch(x, target, BATCH, generator=orders) for _ in range(EPOCHS)]
    return nets, torch.cat(epochs, 1)


def train_one(x: Tensor, target: Tensor, lr: float, seed: int) -> tuple[ReluMLP, Tensor]:
    """One run of the sweep by itself, and the losses of its batches, (batches,)."""
    net = make_network(seed)
    step = TrainingStep(net, "mse", torch.optim.Adam(net.parameters(), lr=lr))
    order = Generator().manual_seed(seed)
    return net, torch.cat([step.epoch(x, target, BATCH, generator=order) for _ in range(EPOCHS)])


def check_alone(number: int, nets: list[ReluMLP], losses: Tensor, data: list[Tensor]) -> None:
    """Trains a network of the ensemble again, alone, and compares the bits."""
    lr, seed = RUNS[number]
    net, expected = train_one(*data, lr, seed)
    pairs = zip(nets[number].parameters(), net.parameters(), strict=True)
    if not torch.equal(losses[number], expected):
        sys.exit(f"FAILED: alone, the run of lr {lr:g} and seed {seed} has other losses")
    if not all(torch.equal(one, other) for one, other in pairs):
        sys.exit(f"FAILED: alone, the run of lr {lr:g} and seed {seed} has other parameters")
    print(f"lr {lr:g}, seed {seed}: the same bits when it is trained alone")


def draw(path: Path, curves: pd.DataFrame, errors: pd.Series) -> None:
    with matplotlib.rc_context({"axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(9, 3.6), layout="constrained")
        left, right = figure.subplots(1, 2)
    colors = matplotlib.colormaps["viridis"]
    for n, lr in enumerate(RATES):
        color = colors(n / len(RATES))
        left.plot(curves[lr].median(axis=1), color=color, label=f"{lr:g}")
        right.plot([lr] * len(SEEDS), errors[lr], "o", color=color)
    left.set(xlabel="epoch", ylabel="loss, median of the seeds", yscale="log")
    left.legend(title="learning rate", frameon=False, fontsize=8)
    right.set(xlabel="learning rate", ylabel="error on new rows", xscale="log", yscale="log")
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description="A sweep as one ensemble.")
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder for the picture")
    picture = parser.parse_args().out / "sweep.png"
    picture.parent.mkdir(parents=True, exist_ok=True)
    data, (new_x, new_target) = list(make_data(10)), make_data(11)
    nets, losses = train_all(*data)
    print(f"{len(RUNS)} networks, {losses.shape[1]} steps")
    with torch.no_grad():
        errors = torch.stack([(net(new_x) - new_target).square().mean() for net in nets])
    check_alone(int(errors.argmin()), nets, losses, data)
    of_epochs = losses.unflatten(1, (EPOCHS, -1)).mean(2)
    index = pd.MultiIndex.from_tuples(RUNS, names=["lr", "seed"])
    curves = pd.DataFrame(of_epochs.T.numpy(), columns=index)
    table = pd.Series(errors.numpy(), index=index)
    draw(picture, curves, table)
    print("mean squared error on new rows")
    print(table.unstack().map("{:.1e}".format).to_string(), f"\nWrote {picture}")


if __name__ == "__main__":
    main()
