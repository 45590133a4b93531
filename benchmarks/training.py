"""Whole training steps: `TrainingStep`, PyTorch's optimizers, JAX and scikit-learn by turns.

    PYTHONPATH=. python benchmarks/training.py --out benchmarks/results/training.json
    PYTHONPATH=. python benchmarks/training.py --table docs/training.md
    PYTHONPATH=. python benchmarks/training.py --table README.md

A step is the mean squared error, its gradients and Adam, in float32. Each candidate does `STEPS`
steps in a call, and the candidates take turns in one process, in an order drawn at random. A
figure is the median over the rounds, in microseconds a step. A ratio is the median of the ratios
round by round, with its 95 % confidence interval. "again" is a second copy of the baseline: its
distance from 1 shows the noise.

One step at a time, all candidates use the same rows. So do `repeat` and JAX's `scan`. In an epoch
the rows of each step are gathered from a data set of `STEPS` batches, in a new random order, whose
time counts too.

An ensemble is `NETWORKS` networks, which share the rows. There a step is one of all its networks.
It is measured with one thread, because with more of them only the ensemble would use them all.

Each number of threads has a process of its own, because JAX reads its number of threads when it is
imported. With one thread the process stays on one CPU. `make bench-training` installs the
libraries. Candidates without their library are left out.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import multiprocessing
import os
import random
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from relu_mlp import ReluMLP, TrainingStep, loss_and_grads
from relu_mlp.cli.arguments import count
from relu_mlp.cli.bench.candidates import Shape, name_of, parameters_of
from relu_mlp.cli.bench.turns import machine, median_of_ratios

#: Calls alone count at 64x3-2-1, and matrix products at 2048x64-64-64.
SHAPES: list[Shape] = [
    (64, 3, 2, 1),
    (1, 8, 64, 64, 4),
    (256, 64, 64, 8),
    (64, 1000, 100, 10),
    (128, 64, 64, 10),
    (2048, 64, 64, 64),
]

#: The steps of a call, and the batches of the data set.
STEPS = 50

#: The networks of an ensemble.
NETWORKS = 64

#: A turn is one call, and more where calls are shorter than this.
SHORTEST_TURN_S = 5e-3

#: So small that timing changes nothing. With a usual learning rate thousands of steps on the same
#: rows would fit them, the gradients would shrink to subnormal numbers, and arithmetic with these
#: is many times slower on some processors. The time of a step doesn't depend on the rate.
LEARNING_RATE = 1e-7

#: Before that, candidates must compute the same. This rate moves the parameters noticeably.
LEARNING_RATE_OF_CHECK = 1e-3

#: Each library rounds in its own order. After `STEPS` steps the losses of these candidates were at
#: most 5e-5 of their value apart. Without Adam's bias correction a loss was off by 5e-2 or more.
LOSS_TOLERANCE = 1e-3

#: What the candidates of other libraries need.
PACKAGES = {"JAX": ["jax", "optax"], "scikit-learn": ["scikit-learn"]}

#: Does `STEPS` steps and returns the loss of the last one, or its losses, or None.
Steps = Callable[[], Any]


# -- The candidates -----------------------------------------------------------------------------


@dataclass
class Problem:
    """A network, its data set of `STEPS` batches, and a learning rate."""

    shape: Shape
    net: ReluMLP
    x: Tensor  #: (STEPS * rows, in_features)
    target: Tensor  #: (STEPS * rows, out_features)
    lr: float

    @classmethod
    def make(cls, shape: Shape, lr: float) -> Problem:
        torch.manual_seed(0)
        rows, n_in, *hidden, n_out = shape
        net = ReluMLP(n_in, hidden, n_out)
        x, target = torch.randn(STEPS * rows, n_in), torch.randn(STEPS * rows, n_out)
        return cls(shape, net, x, target, lr)

    @property
    def rows(self) -> int:
        return self.shape[0]

    @property
    def batch(self) -> tuple[Tensor, Tensor]:
        """The rows of candidates that use the same in each step."""
        return self.x[: self.rows], self.target[: self.rows]

    def epoch_order(self) -> Callable[[], Tensor]:
        """Makes orders of the rows, the same ones for each candidate."""
        generator = torch.Generator().manual_seed(0)
        return lambda: torch.randperm(len(self.x), generator=generator)


def repeated(step: Callable[[], Any]) -> Steps:
    def steps() -> Any:
        for _ in range(STEPS):
            loss = step()
        return loss

    return steps


def by_autograd(problem: Problem, net: nn.Module, **options: bool) -> Steps:
    """The loop that everyone writes."""
    x, target = problem.batch
    optimizer = torch.optim.Adam(net.parameters(), lr=problem.lr, **options)

    def step() -> Tensor:
        optimizer.zero_grad()
        loss = F.mse_loss(net(x), target)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return repeated(step)


def by_hand(problem: Problem) -> Steps:
    """`loss_and_grads`, and the operator of PyTorch's fused Adam without its optimizer."""
    x, target = problem.batch
    weights, biases = parameters_of(copy.deepcopy(problem.net).requires_grad_(False))
    parameters = weights + biases
    averages, averages_of_squares = ([torch.zeros_like(p) for p in parameters] for _ in range(2))
    done = [torch.zeros(()) for _ in parameters]

    def step() -> Tensor:
        loss, grad_weights, grad_biases = loss_and_grads(x, target, weights, biases, loss="mse")
        torch._foreach_add_(done, 1)
        torch._fused_adam_(
            parameters,
            [*grad_weights, *grad_biases],
            averages,
            averages_of_squares,
            [],
            done,
            lr=problem.lr,
            beta1=0.9,
            beta2=0.999,
            weight_decay=0.0,
            eps=1e-8,
            amsgrad=False,
            maximize=False,
        )
        return loss

    return repeated(step)


def of_pytorch(problem: Problem) -> dict[str, Steps]:
    def sequential() -> nn.Sequential:
        return nn.Sequential(*copy.deepcopy(list(problem.net)))

    return {
        "Sequential, Adam": by_autograd(problem, sequential()),
        "Sequential, Adam again": by_autograd(problem, sequential()),
        "Sequential, fused Adam": by_autograd(problem, sequential(), fused=True),
        "ReluMLP, fused Adam": by_autograd(problem, copy.deepcopy(problem.net), fused=True),
        "loss_and_grads, fused Adam": by_hand(problem),
    }


def of_training_step(problem: Problem) -> dict[str, Steps]:
    x, target = problem.batch
    generator = torch.Generator().manual_seed(0)

    def new() -> TrainingStep:
        net = copy.deepcopy(problem.net)
        return TrainingStep(net, "mse", torch.optim.Adam(net.parameters(), lr=problem.lr))

    one_by_one, repeat, epoch = new(), new(), new()
    return {
        "TrainingStep step": repeated(lambda: one_by_one(x, target)),
        "TrainingStep repeat": lambda: repeat.repeat(x, target, STEPS)[-1],
        "TrainingStep epoch": lambda: epoch.epoch(
            problem.x, problem.target, problem.rows, generator=generator
        )[-1],
    }


class JaxSteps(NamedTuple):
    """Training in JAX, as functions to compile. A carry is the parameters and Adam's state."""

    start: Callable[..., Any]  #: makes a carry from the (weight, bias) of each layer
    step: Callable[..., Any]  #: (carry, x, target) to (carry, loss)
    scan: Callable[..., Any]  #: the same for `STEPS` steps: (carry, losses)
    epoch: Callable[..., Any]  #: (carry, x, target, order) to (carry, losses)


def jax_steps(lr: float) -> JaxSteps:
    import jax
    import jax.numpy as jnp
    import optax

    adam = optax.adam(lr)

    def loss_of(layers: Any, x: jax.Array, target: jax.Array) -> jax.Array:
        for n, (weight, bias) in enumerate(layers):
            x = x @ weight + bias
            if n < len(layers) - 1:
                x = jax.nn.relu(x)
        return jnp.mean((x - target) ** 2)

    def step(carry: Any, x: jax.Array, target: jax.Array) -> tuple[Any, jax.Array]:
        layers, state = carry
        loss, grads = jax.value_and_grad(loss_of)(layers, x, target)
        updates, state = adam.update(grads, state, layers)
        return (optax.apply_updates(layers, updates), state), loss

    def scan(carry: Any, x: jax.Array, target: jax.Array) -> tuple[Any, jax.Array]:
        return jax.lax.scan(lambda carry, _: step(carry, x, target), carry, length=STEPS)

    def epoch(
        carry: Any, x: jax.Array, target: jax.Array, order: jax.Array
    ) -> tuple[Any, jax.Array]:
        return jax.lax.scan(lambda carry, at: step(carry, x[at], target[at]), carry, order)

    return JaxSteps(lambda layers: (layers, adam.init(layers)), step, scan, epoch)


class JaxProgram:
    """A function that is compiled, and the carry that it hands on from call to call.

    The carry is donated: each call writes the new one over the old one.
    """

    def __init__(self, function: Callable[..., Any], carry: Any) -> None:
        import jax
        import jax.numpy as jnp

        self.carry = jax.tree.map(jnp.copy, carry)
        self.function = jax.jit(function, donate_argnums=0)
        self.block_until_ready = jax.block_until_ready

    def __call__(self, *arguments: Any) -> Any:
        self.carry, loss = self.function(self.carry, *arguments)
        return loss

    def wait(self, loss: Any) -> Any:
        self.block_until_ready((self.carry, loss))
        return loss


def jax_array(tensor: Tensor) -> Any:
    import jax.numpy as jnp

    return jnp.array(tensor.detach().numpy())


def jax_layers(weights: Sequence[Tensor], biases: Sequence[Tensor]) -> Any:
    """Each layer's (weight, bias), the weight as (in_features, out_features)."""
    return [(jax_array(w.mT), jax_array(b)) for w, b in zip(weights, biases, strict=True)]


def of_jax(problem: Problem) -> dict[str, Steps]:
    """`jax.jit` of a step, and of `jax.lax.scan` over steps. The arrays stay where they are."""
    batch_x, batch_target = map(jax_array, problem.batch)
    all_x, all_target = jax_array(problem.x), jax_array(problem.target)
    steps = jax_steps(problem.lr)
    carry = steps.start(jax_layers(*parameters_of(problem.net)))
    of_step, of_scan, of_epoch = (JaxProgram(function, carry) for function in steps[1:])
    one_by_one = repeated(lambda: of_step(batch_x, batch_target))
    make_order = problem.epoch_order()

    def one_epoch() -> Any:
        order = make_order().int().view(STEPS, problem.rows)
        return of_epoch.wait(of_epoch(all_x, all_target, jax_array(order)))[-1]

    return {
        "JAX step": lambda: of_step.wait(one_by_one()),
        "JAX scan": lambda: of_scan.wait(of_scan(batch_x, batch_target))[-1],
        "JAX epoch": one_epoch,
    }


def of_sklearn(problem: Problem) -> dict[str, Steps]:
    """`partial_fit` on the rows of a step, and on the data set in batches, which it shuffles.

    Its networks start from other values and its squared error is halved, so they return no loss.
    """
    from sklearn.neural_network import MLPClassifier, MLPRegressor

    options = {
        "hidden_layer_sizes": problem.shape[2:-1],
        "activation": "relu",
        "solver": "adam",
        "alpha": 0.0,
        "batch_size": problem.rows,
        "learning_rate_init": problem.lr,
        "random_state": 0,
    }
    (x, target), (all_x, all_target) = (
        (x.numpy(), target.squeeze(1).numpy())
        for x, target in [problem.batch, (problem.x, problem.target)]
    )
    classes = list(range(max(2, problem.shape[-1])))
    labels = torch.arange(len(problem.x)).remainder(len(classes)).numpy()
    one_by_one, epoch, classifier = (
        kind(**options) for kind in (MLPRegressor, MLPRegressor, MLPClassifier)
    )
    classifier.partial_fit(all_x, labels, classes=classes)

    def no_loss(fit: Callable[[], object]) -> Steps:
        def steps() -> None:
            fit()

        return steps

    return {
        "MLPRegressor step": no_loss(repeated(lambda: one_by_one.partial_fit(x, target))),
        "MLPRegressor epoch": no_loss(lambda: epoch.partial_fit(all_x, all_target)),
        "MLPClassifier epoch": no_loss(lambda: classifier.partial_fit(all_x, labels)),
    }


def is_installed(package: str) -> bool:
    try:
        version(package)
    except PackageNotFoundError:
        return False
    return True


def one_network(problem: Problem) -> dict[str, Steps]:
    candidates = of_pytorch(problem) | of_training_step(problem)
    if all(map(is_installed, PACKAGES["JAX"])):
        candidates |= of_jax(problem)
    if all(map(is_installed, PACKAGES["scikit-learn"])):
        candidates |= of_sklearn(problem)
    return candidates


def of_ensemble(problem: Problem, nets: list[ReluMLP]) -> dict[str, Steps]:
    """The networks alone, one after another in each step, and together."""
    x, target = problem.batch

    def optimizer_of(net: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.Adam(net.parameters(), lr=problem.lr)

    alone = [TrainingStep(net, "mse", optimizer_of(net)) for net in copy.deepcopy(nets)]
    together, repeat = (
        TrainingStep(copies, "mse", list(map(optimizer_of, copies)))
        for copies in (copy.deepcopy(nets), copy.deepcopy(nets))
    )
    return {
        "single steps": repeated(lambda: [step(x, target) for step in alone]),
        "ensemble step": repeated(lambda: together(x, target)),
        "ensemble repeat": lambda: repeat.repeat(x, target, STEPS)[:, -1],
    }


def of_vmap(problem: Problem, nets: list[ReluMLP]) -> dict[str, Steps]:
    """`jax.vmap` of the scan over parameters and states; the rows are shared."""
    import jax

    x, target = map(jax_array, problem.batch)
    steps = jax_steps(problem.lr)
    # weight, bias, weight, bias, ...
    parameters = [
        torch.stack(each) for each in zip(*(net.parameters() for net in nets), strict=True)
    ]
    carry = jax.vmap(steps.start)(jax_layers(parameters[::2], parameters[1::2]))
    program = JaxProgram(jax.vmap(steps.scan, (0, None, None)), carry)
    return {"JAX vmap scan": lambda: program.wait(program(x, target))[:, -1]}


def networks_together(problem: Problem) -> dict[str, Steps]:
    _, n_in, *hidden, n_out = problem.shape
    nets = [ReluMLP(n_in, hidden, n_out) for _ in range(NETWORKS)]
    candidates = of_ensemble(problem, nets)
    if all(map(is_installed, PACKAGES["JAX"])):
        candidates |= of_vmap(problem, nets)
    return candidates


# -- What is compared ---------------------------------------------------------------------------


class Comparison(NamedTuple):
    """The time of a candidate over that of a baseline, and how large it should be at most."""

    candidate: str
    baseline: str
    shapes: list[Shape]
    goal: float | None = None  #: at each of the shapes
    mean_goal: float | None = None  #: of the geometric mean

    def __str__(self) -> str:
        return f"{self.candidate} / {self.baseline}"


class Case(NamedTuple):
    shapes: list[Shape]
    candidates: Callable[[Problem], dict[str, Steps]]  #: the first is the baseline
    comparisons: list[Comparison]
    threads: int | None = None  #: None for any number of them


#: Where products take the time, a step in one call has little to gain.
SMALL = [SHAPES[n] for n in (0, 1, 2, 4)]

#: Of the networks of an ensemble.
SHAPES_TOGETHER = [SHAPES[n] for n in (0, 4)]

#: Another kind of training is another entry.
CASES = {
    "one network": Case(
        SHAPES,
        one_network,
        [
            Comparison("TrainingStep epoch", "JAX epoch", SHAPES, 0.7, 0.5),
            Comparison("TrainingStep repeat", "JAX scan", SHAPES, 0.7, 0.5),
            Comparison("TrainingStep step", "JAX step", SMALL, 0.35),
            Comparison("TrainingStep step", "Sequential, Adam", SMALL, 0.10),
            Comparison("TrainingStep step", "ReluMLP, fused Adam", SHAPES),
            Comparison("TrainingStep epoch", "MLPRegressor epoch", SHAPES),
            Comparison("Sequential, Adam again", "Sequential, Adam", SHAPES),
        ],
    ),
    "ensemble": Case(
        SHAPES_TOGETHER,
        networks_together,
        [
            Comparison("ensemble step", "single steps", SHAPES_TOGETHER, 0.8),
            Comparison("ensemble repeat", "JAX vmap scan", SHAPES_TOGETHER, 0.7),
        ],
        threads=1,
    ),
}


# -- Measuring ----------------------------------------------------------------------------------


@dataclass
class Figure:
    case: str
    shape: str
    threads: int
    candidate: str
    us_a_step: float  #: the median over the rounds


@dataclass
class Ratio:
    case: str
    shape: str
    threads: int
    comparison: str
    ratio: float  #: the median over the rounds
    ratio_low: float  #: 95 % confidence interval of that median
    ratio_high: float


def check_losses(name: str, candidates: dict[str, Steps]) -> None:
    """Raises RuntimeError if the losses after `STEPS` steps differ by more than rounding."""
    losses = {candidate: steps() for candidate, steps in candidates.items()}
    found = {c: np.asarray(loss, float) for c, loss in losses.items() if loss is not None}
    for kind in ("in place", "epoch"):
        of_kind = {
            c: loss for c, loss in found.items() if c.endswith(" epoch") == (kind == "epoch")
        }
        if not of_kind:
            continue
        least, most = (bound(list(of_kind.values()), 0) for bound in (np.min, np.max))
        if not np.allclose(least, most, rtol=LOSS_TOLERANCE, atol=0):
            raise RuntimeError(f"{name}: the losses differ: {of_kind}")


def time_in_random_order(candidates: dict[str, Steps], rounds: int) -> dict[str, list[float]]:
    """The seconds of a call of each candidate in each round.

    In an order that rotates, a candidate always follows the same one. With that, one of two copies
    of the baseline once took half of the other's time.
    """
    calls, turns = {}, {}
    for name, steps in candidates.items():
        steps()  # compiles, or creates the optimizer's state
        begin = time.perf_counter()
        steps()
        seconds = time.perf_counter() - begin
        calls[name] = math.ceil(SHORTEST_TURN_S / seconds)
        # What the candidate before it did slows down the first millisecond. So a short turn comes
        # twice, and only the second counts.
        turns[name] = 2 if seconds < 4 * SHORTEST_TURN_S else 1
    times: dict[str, list[float]] = {name: [] for name in candidates}
    order = random.Random(0)
    for _ in range(rounds):
        for name in order.sample(list(candidates), len(candidates)):
            for _ in range(turns[name]):
                begin = time.perf_counter()
                for _ in range(calls[name]):
                    candidates[name]()
                seconds = time.perf_counter() - begin
            times[name].append(seconds / calls[name])
    return times


def measure(case: str, shape: Shape, threads: int, rounds: int) -> tuple[list[Figure], list[Ratio]]:
    _, make, comparisons, _ = CASES[case]
    name = name_of(shape)
    check_losses(name, make(Problem.make(shape, LEARNING_RATE_OF_CHECK)))
    candidates = make(Problem.make(shape, LEARNING_RATE))
    times = time_in_random_order(candidates, rounds)
    figures = [
        Figure(case, name, threads, candidate, round(statistics.median(of) / STEPS * 1e6, 2))
        for candidate, of in times.items()
    ]
    ratios = []
    for comparison in comparisons:
        if shape in comparison.shapes and comparison.baseline in times:
            found = median_of_ratios(times[comparison.candidate], times[comparison.baseline])
            rounded = (round(value, 4) for value in found)
            ratios.append(Ratio(case, name, threads, str(comparison), *rounded))
    return figures, ratios


def prepare_process(threads: int) -> None:
    torch.set_num_threads(threads)
    warnings.simplefilter("ignore")  # about the libraries' use of each other
    if threads == 1 and hasattr(os, "sched_setaffinity"):
        # JAX hands its calls to a thread of its own, which would be a second CPU.
        os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])


def set_variables(threads: int) -> None:
    """What the libraries of the process to come read when they are imported."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = str(threads)
    one = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
    os.environ["XLA_FLAGS"] = one if threads == 1 else ""


def versions() -> dict[str, str]:
    """The versions of the libraries that are installed."""
    packages = sorted({package for of in PACKAGES.values() for package in of})
    return {package: version(package) for package in packages if is_installed(package)}


# -- Tables ---------------------------------------------------------------------------------------


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    head, *body = (f"| {' | '.join(line)} |" for line in [header, *rows])
    return "\n".join([head, "|---" * len(header) + "|", *body])


def lines_of(figures: Sequence[Figure]) -> str:
    """All candidates of one shape."""
    width = max(len(figure.candidate) for figure in figures)
    return "\n".join(f"  {f.candidate:<{width}} {f.us_a_step:>10.2f} us" for f in figures)


def table_of_ratios(case: str, ratios: Sequence[Ratio], *, goals: bool) -> str:
    """The comparisons of a case, for one number of threads."""
    shapes = [name_of(shape) for shape in CASES[case].shapes]
    rows = []
    for comparison in CASES[case].comparisons:
        found = {r.shape: r for r in ratios if r.comparison == str(comparison)}
        if not found:
            continue
        mean = statistics.geometric_mean(r.ratio for r in found.values())
        row = [str(comparison), *("" for _ in shapes), f"{mean:.3f}"]
        for n, shape in enumerate(shapes):
            if shape in found:
                r = found[shape]
                row[n + 1] = f"{r.ratio:.3f} [{r.ratio_low:.3f}, {r.ratio_high:.3f}]"
        rows.append(row + ([verdict(comparison, [r.ratio for r in found.values()], mean)] * goals))
    header = ["time over time", *shapes, "geometric mean", *(["goal"] * goals)]
    return table(header, rows)


def verdict(comparison: Comparison, ratios: Sequence[float], mean: float) -> str:
    """A goal, and at how many shapes it was met."""
    said = []
    if comparison.goal is not None:
        met = sum(ratio <= comparison.goal for ratio in ratios)
        said.append(f"{comparison.goal:.2f}: {met} of {len(ratios)}")
    if comparison.mean_goal is not None:
        met_by_mean = "met" if mean <= comparison.mean_goal else "not met"
        said.append(f"mean {comparison.mean_goal:.2f}: {met_by_mean}")
    return ", ".join(said)


#: The columns of the long page.
SHOWN = {
    "one network": {
        "`nn.Sequential`, Adam": "Sequential, Adam",
        "the same, `fused=True`": "Sequential, fused Adam",
        "`step(...)`": "TrainingStep step",
        "`step.epoch`": "TrainingStep epoch",
        "JAX, a step": "JAX step",
        "JAX, an epoch": "JAX epoch",
        "scikit-learn": "MLPRegressor epoch",
    },
    "ensemble": {
        "single `step(...)`s": "single steps",
        "`step(...)` of the ensemble": "ensemble step",
        "`step.repeat` of it": "ensemble repeat",
        "JAX, `vmap` of a scan": "JAX vmap scan",
    },
}

#: Those of the short one.
SHOWN_IN_SHORT = {
    "`nn.Sequential`, Adam": "Sequential, Adam",
    "`step(...)`": "TrainingStep step",
    "`step.epoch`": "TrainingStep epoch",
    "JAX epoch": "JAX epoch",
}

#: What a step is one of.
UNITS = {"one network": "a step", "ensemble": f"a step of {NETWORKS} networks"}


def table_of_figures(
    figures: Sequence[Figure], case: str, threads: int, columns: dict[str, str]
) -> str:
    """A row for each shape, or an empty string without figures of that case."""
    found = {
        (f.shape, f.candidate): f"{f.us_a_step:.1f}"
        for f in figures
        if (f.case, f.threads) == (case, threads)
    }
    measured = {shape for shape, _ in found}
    rows = [
        [shape, *(found.get((shape, candidate), "") for candidate in columns.values())]
        for shape in map(name_of, CASES[case].shapes)
        if shape in measured
    ]
    return table(["rows x in-hidden-out", *columns], rows) if rows else ""


def count_threads(threads: int) -> str:
    return f"{threads} thread{'s' * (threads > 1)}"


def page_of(document: dict[str, Any]) -> str:
    """All tables, from the results."""
    figures = [Figure(**figure) for figure in document["figures"]]
    ratios = [Ratio(**ratio) for ratio in document["ratios"]]
    machine_of = document["machine"]
    parts = []
    for threads in sorted({figure.threads for figure in figures}):
        for case in CASES:
            of_case = table_of_figures(figures, case, threads, SHOWN[case])
            if of_case:
                compared = [r for r in ratios if (r.case, r.threads) == (case, threads)]
                parts += [
                    f"Microseconds {UNITS[case]}, {count_threads(threads)}:",
                    of_case,
                    table_of_ratios(case, compared, goals=False),
                ]
    libraries = ", ".join(f"{package} {of}" for package, of in document["versions"].items())
    parts.append(
        f"{machine_of['date']}, {machine_of['processor']}, {machine_of['cores']} cores, PyTorch "
        f"{machine_of['torch']}, relu_mlp {machine_of['relu_mlp']} "
        f"({machine_of['instruction_set']}), {libraries}."
    )
    return "\n\n".join(parts)


def short_page_of(document: dict[str, Any]) -> str:
    """The times of one network with the least number of threads."""
    figures = [Figure(**figure) for figure in document["figures"]]
    threads = min(figure.threads for figure in figures)
    return (
        f"Microseconds a step, {count_threads(threads)} of an {document['machine']['processor']}:"
        f"\n\n{table_of_figures(figures, 'one network', threads, SHOWN_IN_SHORT)}"
    )


#: A page says by the first of these lines which tables it gets. They end before END.
BEGIN, BEGIN_SHORT = (
    f"<!-- benchmarks/training.py --table{which} -->\n" for which in ("", ", short")
)
END = "\n<!-- end -->"
TABLES = {BEGIN: page_of, BEGIN_SHORT: short_page_of}


def put_into(page: Path, document: dict[str, Any]) -> None:
    """Replaces what stands between BEGIN, or BEGIN_SHORT, and END."""
    text = page.read_text(encoding="utf-8")
    for begin, tables_of in TABLES.items():
        before, found, rest = text.partition(begin)
        _, found_too, after = rest.partition(END)
        if found and found_too:
            page.write_text(before + begin + tables_of(document) + END + after, encoding="utf-8")
            return
    lines = " or ".join(begin.strip() for begin in TABLES)
    raise SystemExit(f"{page} has no lines {lines} and {END.strip()}")


RESULTS = Path(__file__).parent / "results" / "training.json"


def parse(arguments: list[str] | None) -> argparse.Namespace:
    names = [name_of(shape) for shape in SHAPES]
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--only", choices=names, action="append", help="may be repeated (default: all)"
    )
    parser.add_argument(
        "--threads", type=count, nargs="+", default=[1, 2], help="(default: 1 and 2)"
    )
    parser.add_argument("--rounds", type=count, default=25, help="(default: %(default)s)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the results as JSON")
    parser.add_argument(
        "--table", type=Path, metavar="PAGE", help=f"put {RESULTS.name} into a page, and end"
    )
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    if options.table:
        put_into(options.table, json.loads(RESULTS.read_text()))
        return
    for library, packages in PACKAGES.items():
        if absent := [package for package in packages if not is_installed(package)]:
            print(f"without {library}: {' and '.join(absent)} not installed")
    figures: list[Figure] = []
    ratios: list[Ratio] = []
    context = multiprocessing.get_context("spawn")
    for threads in options.threads:
        set_variables(threads)
        with ProcessPoolExecutor(1, context, prepare_process, (threads,)) as process:
            for case in CASES:
                if CASES[case].threads not in (None, threads):
                    continue
                of_case: list[Ratio] = []
                for shape in CASES[case].shapes:
                    if options.only and name_of(shape) not in options.only:
                        continue
                    work = process.submit(measure, case, shape, threads, options.rounds)
                    of_shape, of_ratios = work.result()
                    print(f"{name_of(shape)}, {case}, {count_threads(threads)}, {UNITS[case]}")
                    print(lines_of(of_shape), flush=True)
                    figures += of_shape
                    of_case += of_ratios
                if of_case:
                    print(f"\n{table_of_ratios(case, of_case, goals=True)}\n", flush=True)
                ratios += of_case
    if options.out:
        about = machine() | {"threads": options.threads}
        document = {
            "machine": about,
            "versions": versions(),
            "rounds": options.rounds,
            "figures": [asdict(figure) for figure in figures],
            "ratios": [asdict(ratio) for ratio in ratios],
        }
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
