"""benchmarks/training.py without the libraries that it compares with, and its tables."""

import importlib.util
import json
import sys
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
PROGRAM = ROOT / "benchmarks" / "training.py"
#: With the name of the line that their tables come after.
PAGES = {"docs/training.md": "BEGIN", "README.md": "BEGIN_SHORT"}

pytestmark = pytest.mark.skipif(not PROGRAM.exists(), reason="needs the checkout")

SHAPE = (4, 3, 5, 2)


class InThisProcess:
    """A process pool that starts no process."""

    def __init__(self, *_):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def submit(self, function, *arguments):
        future = Future()
        future.set_result(function(*arguments))
        return future


@pytest.fixture
def module(monkeypatch):
    """The program as a module."""
    spec = importlib.util.spec_from_file_location("training_benchmark", PROGRAM)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "training_benchmark", module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def program(module, monkeypatch):
    """The same with few steps of a small network, where no library is installed."""
    monkeypatch.setattr(module, "is_installed", lambda package: False)
    monkeypatch.setattr(module, "ProcessPoolExecutor", InThisProcess)
    monkeypatch.setattr(module, "set_variables", lambda threads: None)
    monkeypatch.setattr(module, "STEPS", 5)
    monkeypatch.setattr(module, "SHORTEST_TURN_S", 1e-9)
    monkeypatch.setattr(module, "SHAPES", [SHAPE])
    monkeypatch.setattr(module, "NETWORKS", 3)
    cases = {}
    for name, case in module.CASES.items():
        comparisons = [each._replace(shapes=[SHAPE]) for each in case.comparisons]
        cases[name] = case._replace(shapes=[SHAPE], comparisons=comparisons)
    monkeypatch.setattr(module, "CASES", cases)
    return module


@pytest.fixture
def document(program, tmp_path):
    """What it writes for one thread and for two."""
    path = tmp_path / "new" / "training.json"
    program.main(["--threads", "1", "2", "--rounds", "2", "--out", str(path)])
    return json.loads(path.read_text())


def test_help(program, capsys):
    with pytest.raises(SystemExit) as stop:
        program.main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert all(word in text for word in ("--only", "--threads", "--rounds", "--out", "--table"))


def test_measures_and_writes_without_the_libraries(capsys, program, document):
    printed = capsys.readouterr().out
    assert "without JAX: jax and optax not installed" in printed
    assert "without scikit-learn: scikit-learn not installed" in printed
    assert {"date", "processor", "torch"} <= document["machine"].keys()
    assert document["machine"]["threads"] == [1, 2]
    figures = [program.Figure(**figure) for figure in document["figures"]]
    candidates = [figure.candidate for figure in figures]
    assert candidates[0] == "Sequential, Adam" and "TrainingStep epoch" in candidates
    assert not any(name.startswith(("JAX", "MLP")) for name in candidates)
    together = [(f.candidate, f.threads) for f in figures if f.case == "ensemble"]
    assert together == [("single steps", 1), ("ensemble step", 1), ("ensemble repeat", 1)]
    of_one_thread = [ratio for ratio in document["ratios"] if ratio["threads"] == 1]
    assert [ratio["comparison"] for ratio in of_one_thread] == [
        "TrainingStep step / Sequential, Adam",
        "TrainingStep step / ReluMLP, fused Adam",
        "Sequential, Adam again / Sequential, Adam",
        "ensemble step / single steps",
    ]


def test_the_tables_show_each_case(program, document):
    lines = program.page_of(document).splitlines()
    assert [line for line in lines if line.startswith("Micro")] == [
        "Microseconds a step, 1 thread:",
        f"Microseconds {program.UNITS['ensemble']}, 1 thread:",
        "Microseconds a step, 2 threads:",
    ]
    for figure in document["figures"]:
        figure["us_a_step"] = figure["threads"] + 0.25
    short = program.short_page_of(document).splitlines()
    assert short[0].startswith("Microseconds a step, 1 thread of an ")
    assert short[-1] == "| 4x3-5-2 | 1.2 | 1.2 | 1.2 |  |"


@pytest.mark.parametrize("name", ["Sequential, fused Adam", "TrainingStep epoch"])
def test_a_candidate_that_computes_something_else_is_found(program, name):
    def candidates():
        found, again = (
            program.one_network(program.Problem.make(SHAPE, program.LEARNING_RATE_OF_CHECK))
            for _ in range(2)
        )
        # Without JAX an epoch has no rival.
        return found | {"another epoch": again["TrainingStep epoch"]}

    program.check_losses("right", candidates())
    wrong = candidates()
    right = wrong[name]
    wrong[name] = lambda: right() * 1.01
    with pytest.raises(RuntimeError, match="wrong: the losses differ"):
        program.check_losses("wrong", wrong)


def test_one_network_of_an_ensemble_that_computes_something_else_is_found(program):
    def candidates():
        return program.networks_together(
            program.Problem.make(SHAPE, program.LEARNING_RATE_OF_CHECK)
        )

    program.check_losses("right", candidates())
    wrong = candidates()
    right = wrong["ensemble step"]
    wrong["ensemble step"] = lambda: right() * torch.tensor([1.0, 1.0, 1.01])
    with pytest.raises(RuntimeError, match="wrong: the losses differ"):
        program.check_losses("wrong", wrong)


def test_the_candidates_of_an_epoch_get_the_same_orders(program):
    problem = program.Problem.make(SHAPE, 0.0)
    one, other = problem.epoch_order(), problem.epoch_order()
    for _ in range(2):
        order = one()
        assert order.equal(other())
    assert not order.equal(torch.arange(len(order)))


def test_the_table_of_ratios_says_which_goals_were_met(program):
    comparison = program.Comparison("a", "b", [SHAPE], 0.7, 0.5)
    case = program.Case([SHAPE], program.one_network, [comparison])
    program.CASES["one network"] = case
    ratio = program.Ratio("one network", "4x3-5-2", 1, "a / b", 0.6, 0.5, 0.65)
    table = program.table_of_ratios("one network", [ratio], goals=True)
    assert table.splitlines() == [
        "| time over time | 4x3-5-2 | geometric mean | goal |",
        "|---|---|---|---|",
        "| a / b | 0.600 [0.500, 0.650] | 0.600 | 0.70: 1 of 1, mean 0.50: not met |",
    ]
    assert "goal" not in program.table_of_ratios("one network", [ratio], goals=False)


@pytest.mark.parametrize("name", PAGES.values())
def test_puts_the_tables_into_a_page(program, name, monkeypatch, tmp_path):
    page, begin = tmp_path / "page.md", getattr(program, name)
    page.write_text(f"before\n{begin}old{program.END}\nafter\n")
    monkeypatch.setitem(program.TABLES, begin, lambda document: document["tables"])
    for tables in ("new", "newer"):
        program.put_into(page, {"tables": tables})
    assert page.read_text() == f"before\n{begin}newer{program.END}\nafter\n"
    page.write_text("nothing\n")
    with pytest.raises(SystemExit, match="has no lines"):
        program.put_into(page, {"tables": "new"})
    assert page.read_text() == "nothing\n"


@pytest.mark.parametrize("name", PAGES)
def test_the_pages_have_the_figures_of_the_results(module, name):
    text, begin = (ROOT / name).read_text(encoding="utf-8"), getattr(module, PAGES[name])
    assert begin in text and module.END in text
    if module.RESULTS.exists():
        assert module.TABLES[begin](json.loads(module.RESULTS.read_text())) in text
