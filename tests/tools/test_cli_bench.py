"""`relu-mlp bench`: its output, its errors, and the meaning of its figures.

No test here asserts a measured time. Where times matter, they come from a clock that the test
moves.
"""

import csv
import functools
import importlib.util
import io
import itertools
import json
import math
import re
import sys
from contextlib import redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import relu_mlp
from relu_mlp import cli
from relu_mlp.cli.bench import candidates, memory, plan, report, roofline, suite, turns
from relu_mlp.cli.bench import command as bench

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
HAS_MATPLOTLIB = importlib.util.find_spec("matplotlib") is not None
LOOK_FOR_JAX = candidates.has_jax.__wrapped__  # each test looks again
TINY = "8,4,3,2"  # rows, in, hidden, out


@pytest.fixture(autouse=True)
def threads():
    """The command sets the number of threads for the whole process."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def quick(monkeypatch):
    """Leaves out the slow parts: compiling, the import of JAX, the probes of the estimate."""
    monkeypatch.setattr(torch, "compile", lambda net, fullgraph: net)
    monkeypatch.setattr(candidates, "has_jax", lambda: False)
    monkeypatch.setattr(suite, "estimated_seconds", lambda plan: 240.0)


@pytest.fixture
def measures_nothing(monkeypatch):
    def run(plan, directory):
        raise AssertionError("measured, though it should have stopped before")

    monkeypatch.setattr(suite, "run", run)


def run(out, *arguments):
    """Runs the command on one thread for one round."""
    return cli.main(["bench", "--threads", "1", "--rounds", "1", "--out", str(out), *arguments])


def records(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def is_drawn(path):
    """Whether this is a picture. `make abi` runs without matplotlib."""
    if not HAS_MATPLOTLIB:
        return not path.exists()
    return path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def options(*arguments):
    return cli.parser().parse_args(["bench", *arguments])


# -- What is written and printed ---------------------------------------------------------


@pytest.mark.slow
def test_sizes_given(quick, tmp_path, capsys):
    assert run(tmp_path / "a" / "b", "--shape", TINY, "--shape", "1,2,2") == 0
    rows = records(tmp_path / "a" / "b" / "suite.csv")
    assert ",".join(rows[0]) == (
        "shape,case,dtype,threads,candidate,rounds,median_us,ratio,low,high,"
        "roofline,against,speedup,speedup_low,speedup_high"
    )

    step = ["eager", "eager again", "compile", "relu_mlp"]
    names = {"training": [*step, "by hand"], "inference": step}
    wanted = [
        (shape, case, dtype, candidate)
        for dtype in ("float32", "bfloat16")
        for shape in ("8x4-3-2", "1x2-2")
        for case in ("training", "inference", "loss_and_grads")
        if (case, dtype) != ("loss_and_grads", "bfloat16")
        for candidate in names.get(case, ["eager", "relu_mlp"])
    ]
    assert [(r["shape"], r["case"], r["dtype"], r["candidate"]) for r in rows] == wanted
    for row in rows:
        assert (row["threads"], row["rounds"], row["roofline"]) == ("1", "1", "")
        assert (row["speedup"] != "") == (row["candidate"] == "relu_mlp")
        assert row["candidate"] != "eager" or row["ratio"] == "1.0"

    about = json.loads((tmp_path / "a" / "b" / "suite.json").read_text())["suite.csv"]
    assert about["threads"] == 1 and about["torch"] == torch.__version__
    assert is_drawn(tmp_path / "a" / "b" / "speedup.png")
    assert not (tmp_path / "a" / "b" / "roofline.png").exists()  # too small for a roofline

    said = capsys.readouterr().out
    assert said.startswith("about 4 min;") or "\nabout 4 min;" in said
    assert re.search(r"^ +eager +compile +relu_mlp   speed-up \[95 % confidence", said, re.M)
    time = r" +[\d.]+ (µs|ms)"
    assert re.search(
        rf"^8x4-3-2 training float32 {time}{time}{time}   "
        r"\d+\.\d\d \[\d+\.\d\d, \d+\.\d\d\] over (eager|compile)$",
        said,
        re.M,
    )
    names = ["suite.csv", "suite.json"] + ["speedup.png"] * HAS_MATPLOTLIB
    assert said.endswith(f"results are in {tmp_path / 'a' / 'b'}: {', '.join(names)}\n")


# PyTorch says this about its own code: its compiler uses deprecated functions.
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_torch_compile_is_measured(tmp_path):
    said = io.StringIO()
    with redirect_stdout(said):
        arguments = ["--shape", TINY, "--case", "inference", "--dtype", "float32"]
        assert run(tmp_path, *arguments) == 0
    torch.compiler.reset()
    found = [row["candidate"] for row in records(tmp_path / "suite.csv")]
    if "No working C++ compiler" in said.getvalue():
        assert found == ["eager", "eager again", "relu_mlp"]
    else:
        assert found == ["eager", "eager again", "compile", "relu_mlp"], said.getvalue()


def test_what_is_not_measured_shape_by_shape(quick, monkeypatch, tmp_path, capsys):
    def peak_of_a_step(rows, candidate, threads):
        assert threads == 1
        return rows * 2**20 * (1 + memory.CANDIDATES.index(candidate))

    monkeypatch.setattr(bench, "LENGTHS", (8, 16))
    monkeypatch.setattr(memory, "ROWS", [2, 4])
    monkeypatch.setattr(memory, "CAN_BE_MEASURED", True)
    monkeypatch.setattr(memory, "peak_of_a_step", peak_of_a_step)
    assert run(tmp_path, "--case", "rows", "--case", "memory", "--case", "recompute") == 0

    rows = records(tmp_path / "rows.csv")
    assert ",".join(rows[0]) == "rows,threads,candidate,rounds,ns_per_row,ratio,low,high"
    found = [(row["rows"], row["candidate"]) for row in rows]
    assert found == list(itertools.product(["8", "16"], ["eager", "relu_mlp"]))

    rows = records(tmp_path / "suite.csv")
    found = [(row["case"], row["shape"], row["candidate"], row["speedup"]) for row in rows]
    assert found == [("recompute", "4x64-1024-64", n, "") for n in ("relu_mlp", "recompute")]

    rows = records(tmp_path / "memory.csv")
    assert list(rows[0]) == ["rows", "threads", "candidate", "peak_mib"]
    assert [(row["rows"], row["candidate"], row["peak_mib"]) for row in rows] == [
        *(("2", "eager", "2.0"), ("2", "relu_mlp", "4.0"), ("2", "recompute", "6.0")),
        *(("4", "eager", "4.0"), ("4", "relu_mlp", "8.0"), ("4", "recompute", "12.0")),
    ]
    assert is_drawn(tmp_path / "rows.png") and is_drawn(tmp_path / "memory.png")
    assert not (tmp_path / "speedup.png").exists()
    about = json.loads((tmp_path / "suite.json").read_text())
    assert set(about) == {"suite.csv", "rows.csv", "memory.csv"}
    assert "recompute=True float32 4x64-1024-64: takes" in capsys.readouterr().out


def test_memory_is_for_linux(quick, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(memory, "CAN_BE_MEASURED", False)
    assert run(tmp_path, "--case", "memory") == 0
    assert "without memory" in capsys.readouterr().out
    assert not (tmp_path / "memory.csv").exists()


@pytest.mark.slow
@pytest.mark.skipif(not memory.CAN_BE_MEASURED, reason="memory is read from Linux's /proc")
def test_the_peak_of_memory(monkeypatch, tmp_path):
    # A folder in which `python -m` would find another package of this name.
    (tmp_path / "relu_mlp").mkdir()
    (tmp_path / "relu_mlp" / "__init__.py").write_text("raise ImportError('not this one')")
    monkeypatch.chdir(tmp_path)
    # Eager keeps the hidden activations, 4096 x 1024 floats, and more.
    assert memory.peak_of_a_step(4096, "eager", 1) >= 4096 * 1024 * 4


@pytest.mark.slow
def test_large_cases_have_a_roofline(quick, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(suite, "ROOFLINE_FROM", 1)
    arguments = ["--shape", TINY, "--case", "training", "--dtype", "float32", "--input-grad"]
    assert run(tmp_path, *arguments) == 0
    rows = {row["candidate"]: row for row in records(tmp_path / "suite.csv")}
    assert {row["case"] for row in rows.values()} == {"training_input_grad"}
    assert list(rows)[-2:] == [roofline.MM, roofline.COPY]
    assert all((row["roofline"] == "") == (" of " in n or "mm" in n) for n, row in rows.items())
    assert float(rows["relu_mlp"]["roofline"]) > 0
    assert is_drawn(tmp_path / "roofline.png")
    assert "times the roofline's time" in capsys.readouterr().out


def test_jax_is_measured_where_it_is(quick, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(candidates, "has_jax", functools.cache(LOOK_FOR_JAX))
    arguments = ["--shape", TINY, "--shape", "1,2,2", "--case", "loss_and_grads"]
    assert run(tmp_path, *arguments) == 0
    said = capsys.readouterr().out
    rows = records(tmp_path / "suite.csv")
    others = ["eager", "jax"] if importlib.util.find_spec("jax") else ["eager"]
    assert [row["candidate"] for row in rows] == 2 * [*others, "relu_mlp"]
    assert [row["against"] for row in rows if row["speedup"]] == 2 * others[-1:]
    assert said.count("without JAX") == (len(others) == 1)


def test_without_jax(quick, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(candidates, "has_jax", functools.cache(LOOK_FOR_JAX))
    monkeypatch.setitem(sys.modules, "jax", None)
    arguments = ["--shape", TINY, "--shape", "1,2,2", "--case", "loss_and_grads"]
    assert run(tmp_path, *arguments) == 0
    assert capsys.readouterr().out.count("without JAX") == 1
    against = [row["against"] for row in records(tmp_path / "suite.csv") if row["speedup"]]
    assert against == ["eager", "eager"]


def test_without_matplotlib(quick, monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert run(tmp_path, "--shape", TINY, "--case", "inference") == 0
    assert len(records(tmp_path / "suite.csv")) == 8
    assert not list(tmp_path.glob("*.png"))
    lines = capsys.readouterr().out.splitlines()
    assert sum("pip install 'relu-mlp[bench]'" in line for line in lines) == 1


def test_candidates_that_fail(capsys):
    def fail():
        raise RuntimeError("the backend raised:\nno compiler\nand the rest of it")

    def work():
        pass

    assert suite.runnable({"eager": work, "compile": fail}) == {"eager": work}
    assert capsys.readouterr().out == "  without torch.compile: the backend raised: no compiler\n"
    with pytest.raises(RuntimeError, match="no compiler"):
        suite.runnable({"eager": work, "relu_mlp": fail})


# -- Nothing is overwritten unasked ------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        *("suite.csv", "rows.csv", "memory.csv", "suite.json"),
        *("speedup.png", "roofline.png", "rows.png", "memory.png"),
    ],
)
def test_stops_before_it_would_overwrite(name, measures_nothing, tmp_path, capsys):
    (tmp_path / name).write_text("precious")
    assert run(tmp_path, "--shape", TINY) == 2
    assert (tmp_path / name).read_text() == "precious"
    (line,) = capsys.readouterr().err.splitlines()
    assert name in line and "--force" in line


def test_force(quick, tmp_path):
    for name in ("suite.csv", "roofline.png", "notes.txt"):
        (tmp_path / name).write_text("precious")
    about_rows = {"rows.csv": {"threads": 7}}
    (tmp_path / "suite.json").write_text(json.dumps(about_rows))
    assert run(tmp_path, "--shape", TINY, "--case", "inference", "--force") == 0
    assert len(records(tmp_path / "suite.csv")) == 8
    # An outdated picture is removed. Entries of another run about other files stay.
    assert not (tmp_path / "roofline.png").exists()
    about = json.loads((tmp_path / "suite.json").read_text())
    assert list(about) == ["rows.csv", "suite.csv"] and about["rows.csv"] == {"threads": 7}
    assert (tmp_path / "notes.txt").read_text() == "precious"


def test_out_must_be_a_folder(measures_nothing, tmp_path, capsys):
    (tmp_path / "file").write_text("precious")
    assert run(tmp_path / "file", "--shape", TINY) == 2
    assert "file can't be made: File exists" in capsys.readouterr().err


def test_out_must_be_writable(measures_nothing, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench.os, "access", lambda path, mode: False)
    assert run(tmp_path, "--shape", TINY) == 2
    assert f"the folder {tmp_path} can't be written to" in capsys.readouterr().err


# -- Arguments ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        ["--shape", ""],
        ["--shape", "4"],
        ["--shape", "4,2"],
        ["--shape", "4,0,1"],
        ["--shape", "0,3,1"],
        ["--shape", "4,-3,1"],
        ["--shape", "4,2.5,1"],
        ["--shape", "4,x,1"],
        ["--threads", "0"],
        ["--rounds", "0"],
        ["--case", "nonsense"],
        ["--dtype", "float8"],
        ["--device", "cuda"],
    ],
)
def test_what_makes_no_sense(arguments, measures_nothing, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        run(tmp_path / "new", *arguments)
    assert stop.value.code == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert arguments[0] in said and "invalid _" not in said  # not a name of the code
    assert not (tmp_path / "new").exists()


def test_sizes_beyond_the_memory(measures_nothing, monkeypatch, tmp_path, capsys):
    # 3 GiB, in pages of 1 GiB.
    monkeypatch.setattr(bench.os, "sysconf", {"SC_PHYS_PAGES": 3, "SC_PAGE_SIZE": 2**30}.get)
    for size in (2**29, 10**400):
        assert run(tmp_path / "new", "--shape", f"{size},1,2,1", "--dtype", "float32") == 2
        said = capsys.readouterr().err
        assert len(said.splitlines()) == 1 and said.endswith("and this machine has 3\n")
    assert not (tmp_path / "new").exists()
    for dtype, count in (("bfloat16", 2**29), ("float32", 2**28)):
        arguments = options("--shape", f"{count},1,2,1", "--dtype", dtype)
        assert bench._plan(arguments).shapes == [(count, 1, 2, 1)]


def test_float32_only(measures_nothing, tmp_path, capsys):
    assert run(tmp_path / "new", "--case", "loss_and_grads", "--dtype", "bfloat16") == 2
    assert "float32 only" in capsys.readouterr().err


def test_an_extension_that_is_insisted_on(measures_nothing, monkeypatch, tmp_path, capsys):
    info = SimpleNamespace(runs_on_cpu="nothing", problem="it was not built. Build it.")
    monkeypatch.setattr(bench, "checked_build_info", lambda: info)
    assert run(tmp_path / "new") == 2
    assert "it was not built" in capsys.readouterr().err


def test_what_is_measured_by_default():
    whole = bench._plan(options())
    assert whole.shapes == candidates.SHAPES and whole.rounds == 45
    assert whole.cases == ["training", "inference", "loss_and_grads", "rows", "memory", "recompute"]
    assert whole.dtypes == [torch.float32, torch.bfloat16]
    assert len(whole.lengths) == 9 and len(whole.memory_rows) == 5
    assert options().out == Path("bench")

    given = bench._plan(options("--shape", TINY, "--shape", TINY, "--dtype", "bfloat16"))
    assert given.shapes == [(8, 4, 3, 2)] and given.dtypes == [torch.bfloat16]
    assert given.cases == ["training", "inference", "loss_and_grads"]

    little = bench._plan(options("--quick"))
    assert len(little.shapes) == 3 and little.rounds == 5 and little.cases == whole.cases
    assert len(little.lengths) == 3 and len(little.memory_rows) == 1


def test_the_estimate(monkeypatch):
    speeds = plan.Speeds(rate=1e9, bandwidth=1e9, probing=0.5)
    monkeypatch.setattr(plan, "_speeds_just_now", lambda dtype: speeds)

    def estimate(shape, cases, dtypes=(torch.float32,), **more):
        return plan.estimated_seconds(plan.Plan([shape], cases, dtypes, 1, **more))

    # 2 * 1000 * 20000 operations and 4 * 220200 bytes: 0.044 s + 4 * 0.00088 s a step, once
    # uncounted and once counted; 4 candidates; 25 rounds, as they take longer than 5 s;
    # 0.3 s for each candidate before, and torch.compile.
    step = 1.1 * 0.04 + 4 * 220200 * 4e-9
    narrow = (1000, 100, 100, 100)
    assert estimate(narrow, ["inference"]) == pytest.approx(25 * 4 * 2 * step + 4 * 0.3 + 10 + 4)
    # Long steps have no uncounted call, and the probes take turns with them.
    step = 1.1 * 0.4 + 4 * (1000000 + 20200 + 1000000) * 4e-9
    wide = (10000, 100, 100, 100)
    assert estimate(wide, ["inference"], rounds=2) == pytest.approx(2 * (4 * step + 1) + 1.2 + 14)
    assert estimate(narrow, ["rows"], lengths=[1, 2]) == pytest.approx(1.3 * 5 * 2)
    assert estimate(narrow, ["memory"], memory_rows=[1, 2]) == 2 * 3 * 4
    assert estimate(narrow, ["loss_and_grads"], dtypes=[torch.bfloat16]) == 0


# -- Time by turns -----------------------------------------------------------------------


class Clock:
    """Time passes when a candidate runs, and at no other time."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        self.calls = []
        monkeypatch.setattr(turns, "time", SimpleNamespace(perf_counter=lambda: self.now))

    def candidate(self, name, seconds, first=0.0):
        """A function that takes so long, and more if another one ran before it."""

        def function():
            changed = self.calls[-1:] != [name]
            self.calls.append(name)
            self.now += seconds + changed * first

        return function


def turns_of(calls):
    """The calls grouped by name: [(name, how many calls), ...]."""
    return [(name, len(list(group))) for name, group in itertools.groupby(calls)]


def test_turns_rotate_and_the_first_call_does_not_count(monkeypatch):
    clock = Clock(monkeypatch)
    functions = {name: clock.candidate(name, 0.25, first=4) for name in ("a", "b", "c")}
    monkeypatch.setattr(turns, "LONG_CALL_S", 1)
    monkeypatch.setattr(turns, "_warm_up", lambda function: 0.25)
    times = turns.time_by_turns(functions, rounds=4, turn_ms=600)
    # 0.6 s are three calls of 0.25 s, after one that is not counted.
    order = ["a", "b", "c", "b", "c", "a", "c", "a", "b", "a", "b", "c"]
    assert turns_of(clock.calls) == [(name, 4) for name in order]
    assert times == {name: [0.25] * 4 for name in "abc"}


def test_each_round_has_a_time_of_its_own(monkeypatch):
    clock = Clock(monkeypatch)
    costs = iter([1, 1, 0.5, 0.25, 2, 4])  # the first two warm up

    def function():
        clock.now += next(costs)

    monkeypatch.setattr(turns, "LONG_CALL_S", 1)
    times = turns.time_by_turns({"a": function}, rounds=4, turn_ms=1)
    assert times == {"a": [0.5, 0.25, 2, 4]}


def test_long_calls_are_made_once_a_turn(monkeypatch):
    clock = Clock(monkeypatch)
    functions = {"short": clock.candidate("short", 0.0625), "long": clock.candidate("long", 0.5)}
    assert turns.LONG_CALL_S == 0.1
    turns.time_by_turns(functions, rounds=3, turn_ms=10)
    # Warming up: until 0.2 s have passed after the first call. Then one turn each.
    warm = [("short", 1 + 4), ("long", 1 + 1)]
    assert turns_of(clock.calls) == [*warm, ("short", 2), ("long", 2), ("short", 4), ("long", 1)]


def test_the_fewest_calls(monkeypatch):
    clock = Clock(monkeypatch)
    turns.time_by_turns({"a": clock.candidate("a", 0.5)}, rounds=2, turn_ms=10, fewest_calls=3)
    assert len(clock.calls) == 2 + 2 * 3


@pytest.mark.parametrize("budget, rounds", [(0, 3), (2.5, 3), (3.5, 4), (100, 6)])
def test_a_slow_case_ends_after_its_budget(budget, rounds, monkeypatch):
    clock = Clock(monkeypatch)
    functions = {"a": clock.candidate("a", 0.5), "b": clock.candidate("b", 0.5)}
    times = turns.time_by_turns(functions, rounds=6, fewest_rounds=3, budget_s=budget)
    assert [len(mine) for mine in times.values()] == [rounds, rounds]


# -- What the times come to --------------------------------------------------------------


def test_the_median_of_ratios():
    # Round by round 2, 3, 0.5. The ratio of the medians would be 1.
    assert turns.median_of_ratios([2, 30, 50], [1, 10, 100]) == (2, 0.5, 3)
    assert turns.median_of_ratios([4], [2]) == (2, 2, 2)
    with pytest.raises(ValueError):
        turns.median_of_ratios([1, 2], [1])


def chance_of_covering(rounds, low, high):
    """The probability that the median lies between these order statistics, counted from 0.

    It does if more than `low` values are below it, and no more than `high`.
    """
    return sum(math.comb(rounds, below) for below in range(low + 1, high + 1)) / 2**rounds


@pytest.mark.parametrize("rounds", range(7, 60))
def test_the_confidence_interval(rounds):
    ratios = torch.randperm(rounds).tolist()  # each value equals its position
    _, low, high = turns.median_of_ratios(ratios, [1] * rounds)
    # 95 % in whole percents: the normal approximation covers 94.75 % at 21 rounds.
    assert round(chance_of_covering(rounds, int(low), int(high)), 2) >= 0.95
    # It is no wider than necessary.
    assert chance_of_covering(rounds, int(low) + 1, int(high) - 1) < 0.95


def test_figures_are_relative_to_the_first():
    eager, layer = turns.figures("case", {"eager": [2e-6, 4e-6, 6e-6], "layer": [1e-6, 3e-6, 3e-6]})
    assert (eager.median_us, eager.ratio, eager.ratio_low, eager.ratio_high) == (4, 1, 1, 1)
    assert (layer.median_us, layer.ratio) == (3, 0.5)
    assert (layer.ratio_low, layer.ratio_high) == (0.5, 0.75)
    assert layer.without_case().split() == ["layer", "3.0", "us", "0.500", "[0.500,", "0.750]"]


def row(candidate, median_us=1.0, ratio=1.0, **more):
    given = {"shape": "8x4-3-2", "case": "training", "dtype": "float32", **more}
    return report.Row(
        **given, threads=1, candidate=candidate, rounds=3, median_us=median_us, ratio=ratio,
        low=ratio, high=ratio,
    )  # fmt: skip


@pytest.mark.parametrize(
    "compile_times, against, speedup",
    [([3, 3, 3], "compile", (3, 1.5, 3)), ([8, 8, 8], "eager", (4, 2, 4))],
)
def test_the_speedup_is_over_the_better_alternative(compile_times, against, speedup):
    times = {
        "eager": [4, 4, 4],
        "compile": compile_times,
        "relu_mlp": [1, 2, 1],
        "by hand": [1] * 3,
    }
    rows = [
        row(figure.candidate, figure.median_us, figure.ratio)
        for figure in turns.figures("case", times)
    ]
    suite.add_speedup(rows, times, ["eager", "compile"])
    layer = rows[2]
    assert layer.against == against
    assert (layer.speedup, layer.speedup_low, layer.speedup_high) == speedup
    assert all(other.speedup is other.against is None for other in rows if other is not layer)


def test_no_alternative_no_speedup():
    rows = [row("relu_mlp"), row("recompute")]
    suite.add_speedup(rows, {"relu_mlp": [1], "recompute": [1]}, [])
    assert rows == [row("relu_mlp"), row("recompute")]


# -- The roofline ------------------------------------------------------------------------

SHAPE = (10, 2, 3, 5)  # products of 2 * 3 and 3 * 5, 10 rows


@pytest.mark.parametrize(
    "case, input_grad, count",
    [
        ("inference", False, 2 * 10 * (6 + 15)),
        ("training", False, 2 * 10 * (2 * 6 + 3 * 15)),
        ("training", True, 2 * 10 * (3 * 6 + 3 * 15)),
        ("loss_and_grads", False, 2 * 10 * (2 * 6 + 3 * 15)),
    ],
)
def test_operations(case, input_grad, count):
    assert roofline.operations(SHAPE, case, input_grad) == count


@pytest.mark.parametrize(
    "case, input_grad, elements",
    [
        # x, parameters, y
        ("inference", False, 20 + 29 + 50),
        # x twice, hidden twice, y and its gradient, parameters and their gradients, W2 again
        ("training", False, 2 * 20 + 2 * 30 + 2 * 50 + 2 * 29 + 15),
        # and W1 again, and the gradient of x
        ("training", True, 2 * 20 + 2 * 30 + 2 * 50 + 2 * 29 + 15 + 6 + 20),
        # x, target, parameters and their gradients
        ("loss_and_grads", False, 20 + 50 + 2 * 29),
    ],
)
@pytest.mark.parametrize("dtype, itemsize", [(torch.float32, 4), (torch.bfloat16, 2)])
def test_compulsory_bytes(case, input_grad, elements, dtype, itemsize):
    assert roofline.compulsory_bytes(SHAPE, case, dtype, input_grad) == itemsize * elements


def test_the_limit_is_the_later_of_the_two():
    rate, bandwidth = roofline.rates(1.0, 1.0)
    assert rate == 2 * 1536**3 and bandwidth == 2 * 128 * 2**20  # read and written
    work, traffic = 2 * 10 * (6 + 15) / rate, 4 * (20 + 29 + 50) / bandwidth
    assert work < traffic
    # In the second round the products are slow.
    times = {roofline.MM: [1.0, 1000.0], roofline.COPY: [1.0, 1.0]}
    limits = roofline.limits(SHAPE, "inference", torch.float32, False, times)
    assert limits == pytest.approx([traffic, 1000 * work])


# -- Steps and machine -------------------------------------------------------------------


def test_a_training_step_touches_the_weight_and_leaves_no_gradient():
    net = relu_mlp.ReluMLP(4, 3, 2)
    before, version = net[0].weight.clone(), net[0].weight._version
    x = torch.randn(8, 4, requires_grad=True)
    candidates.training_step(net, x, torch.randn(8, 2))()
    assert net[0].weight._version == version + 1 and torch.equal(net[0].weight, before)
    assert all(parameter.grad is None for parameter in [*net.parameters(), x])


def test_the_networks_are_equal_and_share_nothing(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda net, fullgraph: net)
    nets = list(candidates.networks((8, 4, 3, 2), torch.bfloat16).values())
    assert len(nets) == 4
    for parameters in zip(*(net.parameters() for net in nets), strict=True):
        assert len({parameter.data_ptr() for parameter in parameters}) == 4
        assert all(torch.equal(parameter, parameters[0]) for parameter in parameters)


def test_the_machine_says_what_ran(backend):
    name = turns.machine()["instruction_set"]
    assert name == (relu_mlp.build_info().instruction_set if backend == "extension" else None)


# -- Lines and tables --------------------------------------------------------------------


def layer(median_us, speedup, against, **more):
    mine = row("relu_mlp", median_us, **more)
    mine.against, mine.speedup = against, speedup
    mine.speedup_low, mine.speedup_high = speedup - 0.1, speedup + 0.1
    return mine


def squeezed(line):
    return re.sub(" +", " ", line)


def test_side_by_side():
    inference = {"case": "inference", "dtype": "bfloat16"}
    slow = layer(1e6, 1.25, "compile", **inference)
    slow.roofline = 2.5
    rows = [
        *(row("eager", 150.4), row("eager again", 150), row("compile", 250), row("by hand", 90)),
        layer(100, 1.5, "eager"),
        *(row("eager", 1250e3, **inference), slow),
        *(row("relu_mlp", case="recompute"), row("recompute", 1, 1.5, case="recompute")),
    ]
    head, *lines = report.summary(rows)
    assert squeezed(head) == " eager compile relu_mlp speed-up [95 % confidence interval]"
    assert [squeezed(line) for line in lines[:2]] == [
        "8x4-3-2 training float32 150 µs 250 µs 100 µs 1.50 [1.40, 1.60] over eager",
        "8x4-3-2 inference bfloat16 1.25 s - 1 s 1.25 [1.15, 1.35] over compile, "
        "2.50 times the roofline's time",
    ]
    # The names end above the ends of their columns.
    for name, times in {"eager": ["150 µs", "1.25 s"], "relu_mlp": ["100 µs", " 1 s"]}.items():
        ends = {line.index(time) + len(time) for line, time in zip(lines, times)}
        assert ends == {head.index(name) + len(name)}
    assert lines[2:] == [
        "inference bfloat16, 1 shapes that take eager 1 ms or more: 2.50 times the roofline's time",
        "recompute=True float32 8x4-3-2: takes 1.50 [1.50, 1.50] times as long",
    ]


ABOUT = {
    "date": "2030-01-02",
    "processor": "a processor",
    "cores": 4,
    "threads": 3,
    "torch": "2.99",
    "relu_mlp": "0.9",
    "instruction_set": None,
}


def store(directory, rows):
    report.write_csv(directory / "suite.csv", rows)
    (directory / "suite.json").write_text(json.dumps({"suite.csv": ABOUT}))


def test_rows_survive_the_file(tmp_path):
    rows = [row("eager"), layer(100, 1.5, "eager"), row("recompute", case="recompute")]
    rows[0].roofline = 2.125
    store(tmp_path, rows)
    assert report.read_suite(tmp_path / "suite.csv") == rows


def test_the_stored_table(measures_nothing, tmp_path, capsys):
    loss = layer(1500, 3, "jax", case="loss_and_grads", shape="1x2-2")
    loss.roofline = 1.25
    store(tmp_path, [row("eager"), layer(100, 1.5, "eager"), loss])
    assert run(tmp_path, "--table") == 0
    assert (
        capsys.readouterr().out
        == """\
Speed-up over the better of eager and `torch.compile` (loss_and_grads: over jax) \
[95 % confidence interval], and time:

| rows x in-hidden-out | training float32 | loss_and_grads float32 |
| --- | --- | --- |
| 8x4-3-2 | 1.50 [1.40, 1.60], 100 µs |  |
| 1x2-2 |  | 3.00 [2.90, 3.10], 1.5 ms |

Time over the roofline's, from 50 million operations on:

| rows x in-hidden-out | training float32 | loss_and_grads float32 |
| --- | --- | --- |
| 1x2-2 |  | 1.25 |

2030-01-02, a processor, 4 cores, 3 threads, PyTorch 2.99, relu_mlp 0.9 (in Python).
"""
    )


def test_means_of_the_suite(tmp_path):
    names = [candidates.name_of(shape) for shape in candidates.SHAPES]
    # 2 for the first seven, 1 for the rest: 2 ** (7 / 12) in all.
    rows = [layer(1, 2 if n < 7 else 1, "eager", shape=name) for n, name in enumerate(names)]
    some = [layer(1, 2, "eager", shape=name, case="inference") for name in names[:7]]
    store(tmp_path, rows + some)
    lines = report.markdown(tmp_path).splitlines()
    assert "(loss_and_grads" not in lines[0]
    assert "| geometric mean of the first 7 | **2.00** | **2.00** |" in lines
    assert "| geometric mean of all 12 | **1.50** |  |" in lines
    assert report.means(rows + some) == [
        "training float32, first 7 shapes: 2.00 times as fast as eager",
        "training float32, first 12 shapes: 1.50 times as fast as eager",
        "inference float32, first 7 shapes: 2.00 times as fast as eager",
    ]


@pytest.mark.parametrize("spoil", ["empty", "no suite.csv", "no json", "json", "csv"])
def test_a_table_of_nothing(spoil, measures_nothing, tmp_path, capsys):
    if spoil != "empty":
        store(tmp_path, [layer(100, 1.5, "eager")])
    if spoil == "no suite.csv":
        (tmp_path / "suite.csv").unlink()
    if spoil == "no json":
        (tmp_path / "suite.json").unlink()
    if spoil == "json":
        (tmp_path / "suite.json").write_text("{}")
    if spoil == "csv":
        (tmp_path / "suite.csv").write_text("a,b\n1,2\n")
    assert run(tmp_path, "--table") == 2
    said = capsys.readouterr()
    assert not said.out and len(said.err.splitlines()) == 1
    assert str(tmp_path) in said.err


@pytest.mark.skipif(not RESULTS.exists(), reason="the figures are not beside the tests")
def test_the_table_in_the_documentation(capsys):
    assert cli.main(["bench", "--table", "--out", str(RESULTS)]) == 0
    page = (ROOT / "docs" / "performance.md").read_text()
    kept = page.split("<!-- relu-mlp bench --table -->\n")[1].split("<!-- end -->")[0]
    assert kept.startswith(capsys.readouterr().out)
