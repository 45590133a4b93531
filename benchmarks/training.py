"""Whole training steps: `TrainingStep`, PyTorch's optimizers, JAX and scikit-learn by turns.

    PYTHONPATH=. python benchmarks/training.py --out benchmarks/results/training.json
    PYTHONPATH=. python benchmarks/training.py --table docs/training.md

A step is the mean squared error, its gradients and Adam, in float32. Each candidate does `STEPS`
steps in a call, and the candidates take turns in one process, in an order drawn at random. A
figure is the median over the rounds, in microseconds a step. A ratio is the median of the ratios
round by round, with its 95 % confidence interval. "again" is a second copy of the baseline: its
distance from 1 shows the noise.

One step at a time, all candidates use the same rows. So do `repeat` and JAX's `scan`. In an epoch
the rows of each step are gathered from a data set of `STEPS` batches, in a new random order, whose
time counts too.

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

#: Does `STEPS` steps and returns the loss of the last one, or None.
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


def of_jax(problem: Problem) -> dict[str, Steps]:
    """`jax.jit` of a step, and of `jax.lax.scan` over steps. The arrays stay where they are.

    The parameters and the state of the optimizer are donated: each call writes the new ones over
    the old ones.
    """
    import jax
    import jax.numpy as jnp
    import optax

    def array(tensor: Tensor) -> jax.Array:
        return jnp.array(tensor.detach().numpy())

    adam = optax.adam(problem.lr)
    batch_x, batch_target = map(array, problem.batch)
    all_x, all_target = array(problem.x), array(problem.target)

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

    class Program:
        """A compiled function and the parameters and state that it carries along."""

        def __init__(self, function: Callable[..., Any]) -> None:
            weights, biases = (list(map(array, kind)) for kind in parameters_of(problem.net))
            layers = [(weight.T, bias) for weight, bias in zip(weights, biases, strict=True)]
            self.carry = jax.tree.map(jnp.copy, (layers, adam.init(layers)))
            self.function = jax.jit(function, donate_argnums=0)

        def __call__(self, *arguments: Any) -> jax.Array:
            self.carry, loss = self.function(self.carry, *arguments)
            return loss

        def wait(self, loss: jax.Array) -> jax.Array:
            jax.block_until_ready((self.carry, loss))
            return loss

    of_step, of_scan, of_epoch = Program(step), Program(scan), Program(epoch)
    one_by_one = repeated(lambda: of_step(batch_x, batch_target))
    make_order = problem.epoch_order()

    def one_epoch() -> jax.Array:
        order = make_order().int().view(STEPS, problem.rows)
        return of_epoch.wait(of_epoch(all_x, all_target, jnp.asarray(order.numpy())))[-1]

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


#: Where products take the time, a step in one call has little to gain.
SMALL = [SHAPES[n] for n in (0, 1, 2, 4)]

#: Another kind of training, such as an ensemble of networks, is another entry.
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
    found = {candidate: float(loss) for candidate, loss in losses.items() if loss is not None}
    for kind in ("in place", "epoch"):
        of_kind = {
            c: loss for c, loss in found.items() if c.endswith(" epoch") == (kind == "epoch")
        }
        if of_kind and not math.isclose(
            min(of_kind.values()), max(of_kind.values()), rel_tol=LOSS_TOLERANCE
        ):
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
    _, make, comparisons = CASES[case]
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
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


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


#: The columns of the page.
SHOWN = {
    "`nn.Sequential`, Adam": "Sequential, Adam",
    "the same, `fused=True`": "Sequential, fused Adam",
    "`step(...)`": "TrainingStep step",
    "`step.epoch`": "TrainingStep epoch",
    "JAX, a step": "JAX step",
    "JAX, an epoch": "JAX epoch",
    "scikit-learn": "MLPRegressor epoch",
}


def page_of(document: dict[str, Any]) -> str:
    """The tables of the page, from the results."""
    figures = [Figure(**figure) for figure in document["figures"]]
    ratios = [Ratio(**ratio) for ratio in document["ratios"]]
    machine_of = document["machine"]
    parts = []
    for threads in sorted({figure.threads for figure in figures}):
        case = next(iter(CASES))
        of_threads = {(f.shape, f.candidate): f for f in figures if f.threads == threads}
        rows = [
            [shape]
            + [
                f"{of_threads[shape, c].us_a_step:.1f}" if (shape, c) in of_threads else ""
                for c in SHOWN.values()
            ]
            for shape in map(name_of, CASES[case].shapes)
        ]
        parts += [
            f"Microseconds a step, {threads} thread{'s' * (threads > 1)}:",
            table(["rows x in-hidden-out", *SHOWN], rows),
            table_of_ratios(case, [r for r in ratios if r.threads == threads], goals=False),
        ]
    libraries = ", ".join(f"{package} {of}" for package, of in document["versions"].items())
    parts.append(
        f"{machine_of['date']}, {machine_of['processor']}, {machine_of['cores']} cores, PyTorch "
        f"{machine_of['torch']}, relu_mlp {machine_of['relu_mlp']} "
        f"({machine_of['instruction_set']}), {libraries}."
    )
    return "\n\n".join(parts)


BEGIN, END = "<!-- benchmarks/training.py --table -->\n", "\n<!-- end -->"


def put_into(page: Path, tables: str) -> None:
    """Replaces what stands between BEGIN and END."""
    text = page.read_text(encoding="utf-8")
    before, found, rest = text.partition(BEGIN)
    _, found_too, after = rest.partition(END)
    if not found or not found_too:
        raise SystemExit(f"{page} has no lines {BEGIN.strip()} and {END.strip()}")
    page.write_text(before + BEGIN + tables + END + after, encoding="utf-8")


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
        put_into(options.table, page_of(json.loads(RESULTS.read_text())))
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
                of_case: list[Ratio] = []
                for shape in CASES[case].shapes:
                    if options.only and name_of(shape) not in options.only:
                        continue
                    work = process.submit(measure, case, shape, threads, options.rounds)
                    of_shape, of_ratios = work.result()
                    print(f"{name_of(shape)}, {case}, {threads} thread(s), a step")
                    print(lines_of(of_shape), flush=True)
                    figures += of_shape
                    of_case += of_ratios
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
