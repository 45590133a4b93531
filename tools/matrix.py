"""Runs the wheel in dist/ on several PyTorches and CPythons. This is `make matrix`.

The PyTorches are those in TORCHES and the newest one that the registry has. Each runs on the oldest
and on the newest CPython in PYTHONS that it has a build for and that can be had. Each pair gets a
new environment, in which the very file of dist/ is installed. There the tests of AREAS run, from
the sdist and outside of the checkout. A pair that can't run is a row of the table too, with the
reason.

It needs the package registry, a C++ compiler for Inductor, and the CPythons: on PATH, under pyenv,
or where uv can download them. The registry's PyTorches for Linux bring CUDA, so that each takes
about 5 GB in uv's cache; with UV_TORCH_BACKEND=cpu uv takes smaller ones. The cache is kept.

The results are written to docs/matrix.json, and as a table to docs/compatibility.md.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "matrix.json"
PAGE = ROOT / "docs" / "compatibility.md"
#: What comes before and after the table on the page.
MARKS = ("<!-- make matrix -->\n", "<!-- end -->")
WORK = ROOT / "build" / "matrix"
PYTHON = WORK / "venv" / "bin" / "python"

#: All that the package supports.
PYTHONS = ["3.10", "3.11", "3.12", "3.13", "3.14"]
#: The oldest PyTorch that the package supports, and the one that its tests run on.
TORCHES = ["2.11.0", "2.13.0"]

#: The tests that run, by the column of the table: files of tests/, or functions in them.
AREAS = {
    "operators, dtypes, instruction sets": [
        "kernels/test_binary.py",
        "kernels/test_cpu_kernels.py::test_exact_on_small_integers",
        "kernels/test_cpu_kernels.py::test_within_the_bounds_of_rounding",
        "kernels/test_backward_vjp.py::test_exact_on_small_integers",
        "kernels/test_backward_vjp.py::test_within_the_bounds_of_rounding",
        "composition/test_operator_registration.py::test_schemas",
        "composition/test_operator_registration.py::test_an_operator_is_complete",
        "composition/test_operator_registration.py::test_values_are_those_of_the_raw_operator",
        "core/test_loss_and_grads.py::test_values",
        "core/test_recompute.py::test_within_the_bounds_of_rounding",
    ],
    "derivatives": [
        "core/test_gradcheck.py",
        "core/test_jacobian.py::test_matches_torch_func",
        "core/test_linearization.py::test_products_are_the_native_ones",
        "composition/test_transforms.py::test_transform",
        "composition/test_transforms.py::test_dual_of_some",
        "composition/test_batching.py::test_vmap",
        "composition/test_batching.py::test_batched_gradients",
    ],
    "modules, autocast, fuse": [
        "core/test_module.py::test_one_fused_forward_and_one_backward",
        "core/test_module.py::test_state_dict_loads_both_ways",
        "core/test_module.py::test_hooks_on_children",
        "composition/test_autocast.py::test_is_the_native_path_to_the_bit",
        "composition/test_fuse.py",
        "composition/test_fuse_idioms.py::test_idiom",
        "composition/test_fuse_models.py",
        "composition/test_modes.py::test_a_dispatch_mode_sees_the_native_operators",
    ],
    "compile": [
        "composition/test_compile.py::test_one_operator_each_way",
        "composition/test_compile.py::test_no_recompilation_for_another_batch_size",
        "composition/test_compile.py::test_inside_a_model_by_inductor",
        "composition/test_compile.py::test_the_compiled_layer_compares_little",
    ],
    "export": [
        "composition/test_export.py::test_one_operator",
        "composition/test_export.py::test_the_program_is_that_of_the_layers",
    ],
    "private names": ["core/test_torch_private.py::test_this_pytorch_has_them_all"],
}

#: Runs in a new environment.
DESCRIBE = """
import json, sys, relu_mlp
info = relu_mlp.build_info()
assert info.runs_on_cpu == "extension" and relu_mlp.__file__.startswith(sys.prefix), info
print(json.dumps({"python": info.python, "torch": info.torch, "compiled": info.instruction_sets,
    "supported": info.supported_instruction_sets, "missing_names": info.missing_in_torch}))
"""

Row = dict[str, Any]


class Missing(Exception):
    """Something that can't be had, with the reason."""


def uv(*arguments: str | Path, **options: Any) -> str:
    """What uv prints. Raises Missing if it fails: the last line here, all of it in uv.log."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    path = [*map(str, pyenv.glob("versions/*/bin")), os.environ.get("PATH", os.defpath)]
    result = subprocess.run(
        [sys.executable, "-m", "uv", "--no-progress", *map(str, arguments)],
        cwd=WORK,
        env={**os.environ, "PATH": os.pathsep.join(path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **options,
    )
    if result.returncode:
        with (WORK / "uv.log").open("a") as log:
            print(*arguments, result.stdout, file=log)
        raise Missing(f"uv {arguments[0]} {arguments[1]}: {last_line(result.stdout)}")
    return result.stdout


def last_line(text: str) -> str:
    return text.strip().rpartition("\n")[2].strip() or "it said nothing"


@functools.cache
def version_for(python: str, torch: str = "torch") -> str:
    """The PyTorch that the registry has for a CPython. Raises Missing if it has none."""
    options = ["--no-deps", "--no-header", "--no-annotate", "--only-binary", ":all:"]
    said = uv("pip", "compile", "-q", *options, "--python-version", python, "-", input=torch)
    return release(said.strip().rpartition("torch==")[2])


@functools.cache
def can_be_had(python: str) -> bool:
    """Whether uv finds or downloads a CPython."""
    try:
        uv("venv", "--clear", "--python", python, PYTHON.parent.parent)
    except Missing:
        return False
    return True


def reason_against(python: str, torch: str) -> str | None:
    """The reason why a PyTorch can't run on a CPython, if there is one."""
    try:
        version_for(python, f"torch=={torch}")
    except Missing:
        return "the registry has no build of this PyTorch for this CPython"
    if not can_be_had(python):
        return "this CPython is neither on PATH nor under pyenv, and uv could not download it"
    return None


def python_of(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs the Python of the environment, in the folder of the tests."""
    variables = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    return subprocess.run(
        [str(PYTHON), *arguments],
        cwd=WORK / "sources",
        env={**variables, "TORCHINDUCTOR_CACHE_DIR": str(WORK / "inductor"), **environment},
        capture_output=True,
        text=True,
    )


def prepare(wheel: Path) -> None:
    """Fills WORK with all of the sdist but the package."""
    shutil.rmtree(WORK, ignore_errors=True)
    WORK.mkdir(parents=True)
    (sdist,) = wheel.parent.glob("*.tar.gz")
    shutil.unpack_archive(sdist, WORK)
    (top,) = WORK.iterdir()
    top.rename(WORK / "sources")
    shutil.rmtree(WORK / "sources" / "relu_mlp")


def tested(wheel: Path, python: str, torch: str) -> Row:
    """The row of one CPython and one PyTorch. Raises Missing."""
    started = time.monotonic()
    uv("venv", "--clear", "--python", python, PYTHON.parent.parent)
    requirements = ["pytest>=8", "pytest-xdist>=3.2", "numpy", "setuptools>=77"]
    uv("pip", "install", "--python", PYTHON, f"torch=={torch}", wheel, *requirements)
    installed = time.monotonic()
    described = python_of("-c", DESCRIBE)
    if described.returncode:
        raise Missing("the package does not import: " + last_line(described.stderr))
    row: Row = json.loads(described.stdout)
    tests = [f"tests/{test}" for tests in AREAS.values() for test in tests]
    report = WORK / "report.xml"
    report.unlink(missing_ok=True)
    # Few cases, in which each dtype and each instruction set occurs. Each PyTorch deprecates
    # something else, hence -W default.
    options = ["-q", "--strength", "1", "-W", "default", "-p", "no:cacheprovider"]
    options += ["-n", "auto", "--maxprocesses", "8", "--dist", "worksteal"]
    said = python_of(
        "-m", "pytest", *options, f"--junitxml={report}", *tests, OMP_NUM_THREADS="1"
    ).stdout
    (WORK / f"{torch}-{python}.log").write_text(said)
    if not report.exists():
        raise Missing("pytest did not run: " + last_line(said))
    row["areas"] = outcomes(report)
    row["seconds"] = {
        "installation": round(installed - started),
        "tests": round(time.monotonic() - installed),
    }
    return row


def outcomes(report: Path) -> dict[str, Row]:
    """How many tests of each area passed, why some were skipped, and the names of the failed."""
    areas: dict[str, Row] = {
        area: {"passed": 0, "skipped": Counter(), "failed": []} for area in AREAS
    }
    area_of = {test: area for area, tests in AREAS.items() for test in tests}
    for case in ElementTree.parse(report).iter("testcase"):
        # As in "tests.core.test_module" and "test_values[float32]". A file that can't be imported
        # has only a name.
        module, name = case.get("classname") or case.get("name", ""), case.get("name", "")
        file = module.removeprefix("tests.").replace(".", "/") + ".py"
        test = f"{file}::{name}"
        area = areas[area_of.get(file) or area_of[test.partition("[")[0]]]
        if case.find("failure") is not None or case.find("error") is not None:
            area["failed"].append(test)
        elif (skipped := case.find("skipped")) is not None:
            area["skipped"][skipped.get("message", "without a reason")] += 1
        else:
            area["passed"] += 1
    return areas


def release(version: str) -> str:
    """A version without its label for a build: 2.13.0 of 2.13.0+cpu."""
    return version.partition("+")[0]


def rows_of(wheel: Path) -> Iterator[Row]:
    newest = max((version_for(python) for python in PYTHONS), key=numbers)
    for torch in dict.fromkeys([*TORCHES, newest]):
        done = set()
        for order in (PYTHONS, PYTHONS[::-1]):  # the oldest, and then the newest
            for python in order:
                reason = reason_against(python, torch)
                if python not in done:
                    row = {"python": python, "torch": torch, "missing": reason}
                    if reason is None:
                        try:
                            row = tested(wheel, python, torch)
                        except Missing as problem:
                            row = {"python": python, "torch": torch, "failed": str(problem)}
                    yield row
                done.add(python)
                if reason is None:
                    break


def numbers(version: str) -> list[int]:
    return [int(part) for part in version.split(".") if part.isdigit()]


def table(results: Row) -> str:
    """The results as a table in Markdown, and remarks below it."""
    rows = results["rows"]
    lines = [
        f"| PyTorch | CPython | {' | '.join(AREAS)} |",
        "|---|---|" + "---|" * len(AREAS),
        *map(line, rows),
        "",
        *remarks([row for row in rows if "areas" in row]),
    ]
    return "\n".join(lines) + "\n"


def line(row: Row) -> str:
    if "areas" in row:
        cells = [cell(row["areas"][area]) for area in AREAS]
    else:
        text = f"not run: {row['missing']}" if "missing" in row else f"failed: {row['failed']}"
        cells = [text.replace("|", "/")] + [""] * (len(AREAS) - 1)
    return f"| {release(row['torch'])} | {row['python']} | {' | '.join(cells)} |"


def cell(area: Row) -> str:
    text = f"{area['passed']} pass"
    if area["failed"]:
        text += f", {len(area['failed'])} fail"
    skipped = sum(area["skipped"].values())
    return text + (f", {skipped} skipped" if skipped else "")


def remarks(rows: list[Row]) -> Iterator[str]:
    """What the numbers of the table do not say."""
    if not rows:
        return
    compiled, supported = rows[0]["compiled"], rows[0]["supported"]
    yield f"Instruction sets: {', '.join(supported)}."
    if absent := [name for name in compiled if name not in supported]:
        yield f"The processor has no {' or '.join(absent)}, which did not run."
    for row in rows:
        for name in row["missing_names"]:
            yield f"PyTorch {row['torch']} has no `{name}`."
    skipped = {
        reason for row in rows for area in row["areas"].values() for reason in area["skipped"]
    }
    if skipped:
        yield f"Skipped: {'; '.join(sorted(skipped))}."


def page_with(text: str, page: str) -> str:
    """The page with another table between the marks."""
    before, _, rest = page.partition(MARKS[0])
    _, end, after = rest.partition(MARKS[1])
    return before + MARKS[0] + text + end + after


def main() -> int:
    arguments = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument(
        "--wheel", type=Path, help="by default the one in dist/, with the sdist beside it"
    )
    wheel = arguments.parse_args().wheel or next((ROOT / "dist").glob("*.whl"), None)
    if wheel is None or not any(wheel.parent.glob("*.tar.gz")):
        sys.exit("a wheel and an sdist beside it are needed; `make wheel` makes them in dist/")
    wheel = wheel.resolve()
    started = time.monotonic()
    prepare(wheel)
    results: Row = {
        "wheel": wheel.name,
        "sha256": hashlib.sha256(wheel.read_bytes()).hexdigest(),
        "rows": [],
    }
    try:
        for row in rows_of(wheel):
            results["rows"].append(row)
            RESULTS.write_text(json.dumps(results, indent=1) + "\n")
            print(line(row), row.get("seconds", ""), flush=True)
    except Missing as problem:
        sys.exit(f"the registry did not say which PyTorches it has. {problem}")
    shutil.rmtree(PYTHON.parent.parent, ignore_errors=True)
    PAGE.write_text(page_with(table(results), PAGE.read_text()))
    failed = [
        f"PyTorch {row['torch']}, CPython {row['python']}: {what}"
        for row in results["rows"]
        for what in problems(row)
    ]
    ran = sum("areas" in row for row in results["rows"])
    print(*failed, sep="\n")
    print(f"{ran} of {len(results['rows'])} pairs ran, {time.monotonic() - started:.0f} s in all")
    return 1 if failed or not ran else 0


def problems(row: Row) -> list[str]:
    """What went wrong with a pair that can be had."""
    failed = [name for area in row.get("areas", {}).values() for name in area["failed"]]
    return failed + ([row["failed"]] if "failed" in row else [])


if __name__ == "__main__":
    sys.exit(main())
