"""Training programs of other libraries, with their networks plain and fused.

    PYTHONPATH=. python benchmarks/clients.py --out benchmarks/results/clients.json

Each client is a small training program that uses another library, with the network sizes of that
library or of its examples. One candidate is the program as it is, the other has its networks
patched by `relu_mlp.fuse`. Both run in one process, on one thread. In each round each candidate
trains for some steps from the same seed, in an order drawn at random. A round takes in everything
that the program does: data, environments, losses, optimizers. A figure is the median over the
rounds of the fused candidate's CPU time divided by the plain one's, with its 95 % confidence
interval.

Before that, the losses of both candidates must agree, and PyTorch's profiler counts how many calls
of `F.linear` have gone. Each client has a process of its own, because libraries patch PyTorch.
`make bench-clients` installs the libraries. A client without its library is left out.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import math
import multiprocessing
import os
import random
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from relu_mlp import fuse
from relu_mlp.cli.arguments import count
from relu_mlp.cli.bench.turns import figures, machine

#: `fuse`, or a function that leaves the model as it is.
Patch = Callable[[nn.Module], object]
#: Trains for some steps and returns losses.
Round = Callable[[], list[float]]


# -- The programs -------------------------------------------------------------------------------


def ppo(patch: Patch) -> Round:
    """PPO on CartPole, with the default networks but for the ReLU.

    As with the default `n_steps`, there are 6.4 steps of the environment to one of the optimizer.
    """
    from stable_baselines3 import PPO
    from stable_baselines3.common.logger import Logger

    networks = {"activation_fn": nn.ReLU}
    model = PPO("MlpPolicy", "CartPole-v1", n_steps=128, policy_kwargs=networks, seed=0)
    patch(model.policy)
    model.set_logger(Logger(None, []))

    def train() -> list[float]:
        model.learn(128, reset_num_timesteps=False)
        values = model.logger.name_to_value
        return [values["train/policy_gradient_loss"], values["train/value_loss"]]

    return train


def sac(patch: Patch) -> Round:
    """SAC on Pendulum, all by default: one step of the optimizers for each of the environment."""
    from stable_baselines3 import SAC
    from stable_baselines3.common.logger import Logger

    model = SAC("MlpPolicy", "Pendulum-v1", seed=0)
    patch(model.policy)
    model.set_logger(Logger(None, []))
    model.learn(model.learning_starts)

    def train() -> list[float]:
        model.learn(8, reset_num_timesteps=False)
        values = model.logger.name_to_value
        return [values["train/actor_loss"], values["train/critic_loss"]]

    return train


def skorch(patch: Patch) -> Round:
    """A classifier with the default network of skorch.toy, on the data of skorch's README."""
    from sklearn.datasets import make_classification
    from skorch import NeuralNetClassifier
    from skorch.toy import make_classifier

    epochs = 5
    x, labels = make_classification(1000, 20, n_informative=10, random_state=0)
    x = x.astype("float32")
    net = NeuralNetClassifier(make_classifier(), max_epochs=epochs, lr=0.1, verbose=0)
    net.initialize()
    patch(net.module_)

    def train() -> list[float]:
        net.partial_fit(x, labels)
        return net.history[-epochs:, "train_loss"]

    return train


def lightning(patch: Patch) -> Round:
    """The autoencoder of Lightning's README, on random images."""
    from lightning import LightningModule, Trainer
    from torch.utils.data import DataLoader, TensorDataset

    class AutoEncoder(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.Sequential(nn.Linear(28 * 28, 128), nn.ReLU(), nn.Linear(128, 3))
            self.decoder = nn.Sequential(nn.Linear(3, 128), nn.ReLU(), nn.Linear(128, 28 * 28))

        def training_step(self, batch: list[Tensor], index: int) -> Tensor:
            x = batch[0].flatten(1)
            loss = F.mse_loss(self.decoder(self.encoder(x)), x)
            self.log("train_loss", loss)
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.parameters(), lr=1e-3)

    model = AutoEncoder()
    patch(model)
    loader = DataLoader(TensorDataset(torch.rand(32 * 32, 1, 28, 28)), batch_size=32, shuffle=True)
    quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    trainer = Trainer(max_epochs=0, accelerator="cpu", **dict.fromkeys(quiet, False))

    def train() -> list[float]:
        trainer.fit_loop.max_epochs += 1
        trainer.fit(model, loader)
        return [float(trainer.callback_metrics["train_loss"])]

    return train


def gin(patch: Patch) -> Round:
    """GINConv as in PyTorch Geometric's benchmarks and its example for MUTAG, on such graphs."""
    from torch_geometric.datasets import FakeDataset
    from torch_geometric.loader import DataLoader
    from torch_geometric.nn import GINConv, global_add_pool

    width, classes = 32, 2

    class Network(nn.Module):
        def __init__(self, in_features: int, layers: int) -> None:
            super().__init__()
            self.convolutions = nn.ModuleList(
                GINConv(
                    nn.Sequential(
                        nn.Linear(width if layer else in_features, width),
                        nn.ReLU(),
                        nn.Linear(width, width),
                        nn.ReLU(),
                        nn.BatchNorm1d(width),
                    )
                )
                for layer in range(layers)
            )
            self.head = nn.Sequential(
                nn.Linear(width, width), nn.ReLU(), nn.Dropout(0.5), nn.Linear(width, classes)
            )

        def forward(self, x: Tensor, edge_index: Tensor, batch: Tensor, graphs: int) -> Tensor:
            for convolution in self.convolutions:
                x = convolution(x, edge_index)
            return self.head(global_add_pool(x, batch, graphs))

    graphs = FakeDataset(
        num_graphs=3 * 128, avg_num_nodes=18, avg_degree=2.2, num_channels=7, num_classes=classes
    )
    loader = DataLoader(graphs, batch_size=128, shuffle=True)
    model = Network(graphs.num_features, layers=5)
    patch(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)

    def train() -> list[float]:
        losses = []
        for data in loader:
            optimizer.zero_grad()
            y = model(data.x, data.edge_index, data.batch, data.num_graphs)
            loss = F.cross_entropy(y, data.y)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    return train


def td3(patch: Patch) -> Round:
    """TD3 on Pendulum with the sizes of torchrl's example, from torchrl's parts.

    The networks are an `nn.Sequential`, because `fuse` leaves torchrl's own `MLP`, a subclass.
    """
    from tensordict.nn import TensorDictModule, TensorDictSequential
    from torchrl.collectors import Collector
    from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer
    from torchrl.envs import GymEnv
    from torchrl.modules import AdditiveGaussianModule, TanhModule, ValueOperator
    from torchrl.objectives import SoftUpdate, TD3Loss

    def network(in_features: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Linear(in_features, 256),
            nn.ReLU(),
            nn.Linear(256, 256),
            nn.ReLU(),
            nn.Linear(256, 1),
        )

    class Critic(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network(4)

        def forward(self, observation: Tensor, action: Tensor) -> Tensor:
            return self.network(torch.cat([observation, action], dim=-1))

    environment = GymEnv("Pendulum-v1")
    environment.set_seed(0)
    spec = environment.action_spec
    actor = TensorDictSequential(
        TensorDictModule(network(3), ["observation"], ["action"]),
        TanhModule(in_keys=["action"], spec=spec),
    )
    critic = ValueOperator(Critic(), in_keys=["observation", "action"])
    patch(actor)
    patch(critic)
    loss = TD3Loss(actor, critic, action_spec=spec)
    loss.make_value_estimator(gamma=0.99)
    update = SoftUpdate(loss, tau=0.005)
    noise = AdditiveGaussianModule(spec, sigma_init=0.1, sigma_end=0.1)
    steps = 8
    collector = Collector(
        environment, TensorDictSequential(actor, noise), frames_per_batch=steps, total_frames=-1
    )
    collected = iter(collector)
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(10_000), batch_size=256)
    of_actor = torch.optim.Adam(loss.actor_network_params.parameters(), lr=3e-4)
    of_critics = torch.optim.Adam(loss.qvalue_network_params.parameters(), lr=3e-4)

    def minimize(value: Tensor, optimizer: torch.optim.Optimizer) -> float:
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        return value.item()

    def train() -> list[float]:
        losses = []
        buffer.extend(next(collected).reshape(-1))
        for step in range(steps):
            sample = buffer.sample()
            losses.append(minimize(loss.value_loss(sample)[0], of_critics))
            if step % 2:
                losses.append(minimize(loss.actor_loss(sample)[0], of_actor))
                update.step()
        return losses

    return train


def deepxde(patch: Patch) -> Round:
    """u' = -u, with the sizes of DeepXDE's example of ordinary differential equations.

    The network is an `nn.Sequential`, because DeepXDE's `FNN` calls its layers one by one.
    """
    os.environ["DDE_BACKEND"] = "pytorch"
    import deepxde

    class Network(deepxde.nn.NN):
        def __init__(self) -> None:
            super().__init__()
            sizes = [1, 50, 50, 50, 1]
            layers = [[nn.Linear(*each), nn.ReLU()] for each in itertools.pairwise(sizes)]
            self.layers = nn.Sequential(*itertools.chain(*layers))[:-1]

        def forward(self, x: Tensor) -> Tensor:
            return self.layers(x)

    network = Network()
    patch(network)
    domain = deepxde.geometry.TimeDomain(0, 1)
    start = deepxde.icbc.IC(domain, lambda x: 1 + 0 * x, lambda _, is_initial: is_initial)
    data = deepxde.data.PDE(
        domain, lambda x, u: deepxde.grad.jacobian(u, x) + u, start, num_domain=35, num_boundary=2
    )
    model = deepxde.Model(data, network)
    model.compile("adam", lr=1e-3, verbose=0)

    def train() -> list[float]:
        model.train(iterations=50, verbose=0)
        return model.losshistory.loss_train[-1].tolist()

    return train


class Client(NamedTuple):
    package: str
    make: Callable[[Patch], Round]


CLIENTS = {
    "ppo": Client("stable-baselines3", ppo),
    "sac": Client("stable-baselines3", sac),
    "skorch": Client("skorch", skorch),
    "lightning": Client("lightning", lightning),
    "gin": Client("torch-geometric", gin),
    "td3": Client("torchrl", td3),
    "deepxde": Client("DeepXDE", deepxde),
}


# -- Measuring ------------------------------------------------------------------------------------


@dataclass
class Result:
    client: str
    package: str  #: with its version
    plain_ms: float  #: the median CPU time of a round
    fused_ms: float
    ratio: float  #: the median of fused / plain over the rounds
    ratio_low: float  #: 95 % confidence interval of that median
    ratio_high: float
    linears: int  #: the calls of `F.linear` in a round of the plain candidate
    fused_linears: int  #: those that the fused candidate did not make

    def __str__(self) -> str:
        return (
            f"{self.client:<10} {self.package:<25} {self.plain_ms:>8.1f} {self.fused_ms:>8.1f}   "
            f"{self.ratio:.3f} [{self.ratio_low:.3f}, {self.ratio_high:.3f}]   "
            f"{self.fused_linears} of {self.linears}"
        )


HEAD = (
    f"{'client':<10} {'package':<25} {'plain ms':>8} {'fused ms':>8}   "
    f"{'fused / plain':<22} Linears fused"
)


def seed(n: int) -> None:
    import numpy

    random.seed(n)
    numpy.random.seed(n)
    torch.manual_seed(n)


def count_linears(train: Round) -> int:
    """The number of calls of `F.linear` in a round."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        train()
    return sum(event.count for event in profiler.key_averages() if event.key == "aten::linear")


def check_losses(plain: list[float], fused: list[float]) -> None:
    """Raises RuntimeError if losses differ by more than rounding, after some steps of training."""
    for one, other in zip(plain, fused, strict=True):
        if not math.isclose(one, other, rel_tol=1e-4, abs_tol=1e-6):
            raise RuntimeError(f"the losses differ: {plain} plain, {fused} fused")


def prepare_process() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # about the libraries' use of PyTorch
    logging.disable(logging.WARNING)


def measure(name: str, package: str, rounds: int) -> Result:
    programs, losses, linears = {}, {}, {}
    for candidate, patch in {"plain": lambda model: model, "fused": fuse}.items():
        seed(0)
        programs[candidate] = train = CLIENTS[name].make(patch)
        losses[candidate] = list(map(float, train()))
        linears[candidate] = count_linears(train)
    check_losses(losses["plain"], losses["fused"])
    if (fused_linears := linears["plain"] - linears["fused"]) <= 0:
        raise RuntimeError(f"{name}: nothing ran fused")

    times: dict[str, list[float]] = {candidate: [] for candidate in programs}
    order = random.Random(0)
    for n in range(rounds):
        for candidate in order.sample(list(programs), len(programs)):
            seed(n)
            begin = time.process_time()
            programs[candidate]()
            times[candidate].append(time.process_time() - begin)
    plain, fused = figures(name, times)
    return Result(
        name,
        package,
        round(plain.median_us / 1e3, 2),
        round(fused.median_us / 1e3, 2),
        fused.ratio,
        fused.ratio_low,
        fused.ratio_high,
        linears["plain"],
        fused_linears,
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--only", choices=CLIENTS, action="append", help="may be repeated (default: all)"
    )
    parser.add_argument("--rounds", type=count, default=100, help="(default: %(default)s)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the results as JSON")
    options = parser.parse_args(arguments)
    results = []
    print(HEAD, flush=True)
    for name in options.only or CLIENTS:
        package = CLIENTS[name].package
        try:
            found = f"{package} {version(package)}"
        except PackageNotFoundError:
            print(f"{name:<10} {package:<25} not installed")
            continue
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, context, initializer=prepare_process) as process:
            results.append(process.submit(measure, name, found, options.rounds).result())
        print(results[-1], flush=True)
    if options.out:
        if not results:
            raise SystemExit(f"nothing was measured, so {options.out} was not written")
        document = {
            "machine": machine() | {"threads": 1},
            "rounds": options.rounds,
            "results": [asdict(result) for result in results],
        }
        options.out.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
