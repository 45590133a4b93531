"""Runs the wheel in dist/ on several PyTorches and CPythons. This is `make matrix`.

It takes the oldest and the newest CPython of PYTHONS that can be had, and on each of them the
PyTorches in TORCHES and the newest one that there is for it. Each pair gets a new environment (uv
makes it, and finds or downloads the CPython), in which the very file of dist/ is installed. There
the tests of AREAS run, from the sdist and outside of the checkout. What can't be had is a row of
the table too.

The results are written to docs/matrix.json, and printed as the table that docs/compatibility.md
shows.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "matrix.json"
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
        "composition/test_operator_registration.py::test_schemas",
        "composition/test_operator_registration.py::test_an_operator_is_complete",
        "composition/test_operator_registration.py::test_values_are_those_of_the_raw_operator",
        "core/test_loss_and_grads.py::test_values",
        "core/test_recompute.py::test_within_the_bounds_of_rounding",
    ],
    "derivatives": [
        "core/test_gradcheck.py",
        "composition/test_transforms.py::test_transform",
        "composition/test_transforms.py::test_dual_of_some",
        "composition/test_batching.py::test_vmap",
        "composition/test_batching.py::test_batched_gradients",
    ],
    "modules, autocast": [
        "core/test_module.py::test_one_fused_forward_and_one_backward",
        "core/test_module.py::test_state_dict_loads_both_ways",
        "core/test_module.py::test_hooks_on_children",
        "composition/test_autocast.py::test_is_the_native_path_to_the_bit",
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


def uv(*arguments: str | Path) -> str:
    """What uv prints. Raises Missing, with the last line of its error, if it fails."""
    result = subprocess.run(
        [sys.executable, "-m", "uv", "--no-progress", *map(str, arguments)],
        cwd=WORK,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if result.returncode:
        print(result.stdout, file=sys.stderr)
        raise Missing(" ".join(arguments[0:1]) + ": " + result.stdout.strip().splitlines()[-1])
    return result.stdout


def python_of(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs the Python of the environment, in the folder of the tests."""
    variables = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    return subprocess.run(
        [str(PYTHON), *arguments],
        cwd=WORK / "sources",
        env={**variables, **environment},
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


def can_be_had(python: str) -> bool:
    try:
        uv("venv", "--clear", "--python", python, PYTHON.parent.parent)
    except Missing:
        return False
    return True


def tested(wheel: Path, python: str, torch: str | None) -> Row:
    """The row of one CPython and one PyTorch, None for the newest. Raises Missing."""
    uv("venv", "--clear", "--python", python, PYTHON.parent.parent)
    requirements = [f"torch=={torch}" if torch else "torch", wheel]
    requirements += ["pytest>=8", "pytest-xdist>=3.2", "numpy", "setuptools>=77"]
    uv("pip", "install", "--python", PYTHON, *requirements)
    described = python_of("-c", DESCRIBE)
    if described.returncode:
        raise Missing(described.stderr.strip().splitlines()[-1])
    row: Row = json.loads(described.stdout)
    print(f"PyTorch {row['torch']}, CPython {row['python']} ...", flush=True)
    tests = [f"tests/{test}" for tests in AREAS.values() for test in tests]
    report = WORK / "report.xml"
    report.unlink(missing_ok=True)
    # What PyTorch deprecates differs from one to the next, hence -W default.
    options = ["-q", "--strength", "1", "-W", "default", "-p", "no:cacheprovider"]
    options += ["-n", "auto", "--maxprocesses", "8", "--dist", "worksteal"]
    said = python_of(
        "-m", "pytest", *options, f"--junitxml={report}", *tests, OMP_NUM_THREADS="1"
    ).stdout
    (WORK / f"{row['torch']}-{row['python']}.log").write_text(said)
    if not report.exists():
        raise Missing("pytest did not run: " + said.strip().splitlines()[-1])
    row["areas"] = outcomes(report)
    return row


def outcomes(report: Path) -> dict[str, Row]:
    """How many tests of each area passed and were skipped, and the names of those that failed."""
    areas: dict[str, Row] = {area: {"passed": 0, "skipped": 0, "failed": []} for area in AREAS}
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
        elif case.find("skipped") is not None:
            area["skipped"] += 1
        else:
            area["passed"] += 1
    return areas


def release(version: str) -> str:
    """A version without its label for a build: 2.13.0 of 2.13.0+cpu."""
    return version.partition("+")[0]


def rows_of(wheel: Path) -> Iterator[Row]:
    chosen = []
    for order in (PYTHONS[::-1], PYTHONS):  # the newest, and then the oldest
        missing = list(itertools.takewhile(lambda python: not can_be_had(python), order))
        for python in missing:
            yield missing_row(python, "any", "this CPython could not be had")
        chosen += order[len(missing) : len(missing) + 1]
    newest = None
    for python in dict.fromkeys(chosen):
        for torch in [*TORCHES, None]:
            try:
                row = tested(wheel, python, torch)
            except Missing as reason:
                row = missing_row(python, torch or "newest", str(reason))
            yield row
        if "missing" not in row:
            newest = newest or release(row["torch"])
            if release(row["torch"]) != newest:
                yield missing_row(python, newest, "the registry has none for this CPython")


def missing_row(python: str, torch: str, reason: str) -> Row:
    return {"python": python, "torch": torch, "missing": reason}


def table(results: Row) -> str:
    """The results as a table in Markdown, with what did not run below it."""
    rows = results["rows"]
    lines = [
        f"| PyTorch | CPython | {' | '.join(AREAS)} |",
        "|---|---|" + "---|" * len(AREAS),
    ]
    for row in rows:
        if "missing" in row:
            cells = [f"not run: {row['missing']}"] + [""] * (len(AREAS) - 1)
        else:
            cells = [cell(row["areas"][area]) for area in AREAS]
        lines.append(f"| {release(row['torch'])} | {row['python']} | {' | '.join(cells)} |")
    ran = next(row for row in rows if "missing" not in row)
    absent = [name for name in ran["compiled"] if name not in ran["supported"]]
    lines += ["", f"Instruction sets: {', '.join(ran['supported'])}."]
    if absent:
        lines[-1] += f" The processor has no {' or '.join(absent)}, which did not run."
    return "\n".join(lines) + "\n"


def cell(area: Row) -> str:
    text = f"{area['passed']} pass"
    if area["failed"]:
        text += f", {len(area['failed'])} fail"
    return text + (f", {area['skipped']} skipped" if area["skipped"] else "")


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    arguments.add_argument("--wheel", type=Path, help="by default the one in dist/")
    wheel = arguments.parse_args().wheel or next(iter((ROOT / "dist").glob("*.whl")), None)
    if wheel is None:
        sys.exit("there is no wheel in dist/; `make wheel` makes it")
    wheel = wheel.resolve()
    prepare(wheel)
    results: Row = {"wheel": wheel.name, "rows": []}
    for row in rows_of(wheel):
        results["rows"].append(row)
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    print(table(results))
    failed = [
        f"PyTorch {row['torch']}, CPython {row['python']}: {name}"
        for row in results["rows"]
        for area in row.get("areas", {}).values()
        for name in area["failed"]
    ]
    print(*failed, sep="\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
