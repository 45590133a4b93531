"""Mutation testing: breaks the package in known ways, one at a time, and runs the tests.

    python tools/mutations.py [--all] [--tree FOLDER] [NAME ...]

Each mutation of tools/mutation_table.py replaces one piece of text in one file. The tool applies
it to a copy of this tree in build/mutations, rebuilds the extension where the file is C++, and
runs the test files that the mutation names. It is caught if one test fails. With `--all`, the whole
suite runs for mutations that escape the named files.

At the end the tests that failed run once more on the copy without any mutation. A test that fails
there too has caught nothing.

The exit status is 1 if a mutation escapes. A run takes hours, so it is not part of CI.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from mutation_table import MUTATIONS, Mutation

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("csrc", "relu_mlp")
#: The time limit of a run in seconds. A run that takes longer hangs, and the mutation is caught.
LONGEST_RUN = 1800


def copy_of(tree: Path, scratch: Path) -> None:
    """The tracked files of a tree, in a folder that keeps its build from one use to the next."""
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=tree, check=True, capture_output=True, text=True
    )
    for name in listed.stdout.split("\0"):
        source, target = tree / name, scratch / name
        if not name or not source.is_file():
            continue
        if target.is_file() and target.read_bytes() == source.read_bytes():
            continue  # keeps its modification time, so that nothing is rebuilt
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)


def place_of(mutation: Mutation, tree: Path) -> Path:
    """The file that contains the text once: the named file, or else another one."""
    sources = [p for folder in SOURCES for p in sorted((tree / folder).rglob("*")) if p.is_file()]
    sources = [p for p in sources if p.suffix in (".py", ".h", ".cpp", ".cu", ".cuh")]
    named = [p for p in sources if p.relative_to(tree).as_posix() == mutation.file]
    for candidates in (named, sources):
        found = [p for p in candidates if p.read_text(encoding="utf-8").count(mutation.old) == 1]
        if len(found) == 1:
            return found[0]
    raise SystemExit(f"{mutation.name}: {mutation.old!r} is not in one place alone")


def tests_of(mutation: Mutation, tree: Path) -> list[str]:
    """The test files that a mutation names, wherever they are below tests/."""
    found = []
    for name in mutation.tests.split():
        paths = sorted((tree / "tests").rglob(f"test_{name}.py"))
        if not paths:
            raise SystemExit(f"{mutation.name}: there is no test_{name}.py below tests/")
        found += [path.relative_to(tree).as_posix() for path in paths]
    return found


@contextmanager
def applied(mutation: Mutation, tree: Path) -> Iterator[Path]:
    path = place_of(mutation, tree)
    original = path.read_text(encoding="utf-8")
    path.write_text(original.replace(mutation.old, mutation.new), encoding="utf-8")
    try:
        yield path
    finally:
        path.write_text(original, encoding="utf-8")


def build(tree: Path) -> bool:
    """Whether the extension builds."""
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    # Without the library, only the reference would be tested.
    environment = {**os.environ, "RELU_MLP_EXTENSION": "1"}
    with open(tree / "build.log", "w") as log:
        done = subprocess.run(command, cwd=tree, env=environment, stdout=log, stderr=log)
    return done.returncode == 0


def failure_of(tree: Path, tests: Sequence[str]) -> str | None:
    """The first test that fails, "hangs", or None if all pass."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-rfE", "--no-header", "--tb=no"]
    command += ["-p", "no:cacheprovider", *tests]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": "."}
    try:
        done = subprocess.run(
            command, cwd=tree, env=environment, capture_output=True, text=True, timeout=LONGEST_RUN
        )
    except subprocess.TimeoutExpired:
        return "hangs"
    if done.returncode == 0:
        return None
    failed = re.findall(r"^(?:FAILED|ERROR) (.*?)(?: - .*)?$", done.stdout, re.MULTILINE)
    return failed[0] if failed else f"exit status {done.returncode}"


def verdict_on(mutation: Mutation, tree: Path, ask_all: bool) -> str | None:
    """The test or compiler that caught a mutation, or None."""
    tests = tests_of(mutation, tree)
    with applied(mutation, tree) as path:
        if path.suffix != ".py" and not build(tree):
            return "the compiler"
        return failure_of(tree, tests) or (failure_of(tree, ["tests"]) if ask_all else None)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="mutations to run (default: all)")
    parser.add_argument("--all", action="store_true", help="also run the whole suite if needed")
    parser.add_argument("--tree", type=Path, default=ROOT, help="the checkout (default: this one)")
    options = parser.parse_args()
    tree = options.tree.resolve() / "build" / "mutations"
    copy_of(options.tree.resolve(), tree)
    if not build(tree):
        raise SystemExit(f"the copy does not build: see {tree / 'build.log'}")
    chosen = [m for m in MUTATIONS if not options.names or m.name in options.names]
    for mutation in chosen:  # finds mistakes in the table before the first run
        place_of(mutation, tree), tests_of(mutation, tree)
    escaped, caught_by = [], []
    for mutation in chosen:
        found = verdict_on(mutation, tree, options.all)
        print(f"{mutation.name:<44} {found or 'ESCAPED'}", flush=True)
        if found is None:
            escaped.append(mutation.name)
        elif "::" in found:
            caught_by.append(found)
    build(tree)
    if caught_by and (false_alarm := failure_of(tree, sorted(set(caught_by)))):
        raise SystemExit(f"{false_alarm} fails without any mutation")
    print(f"{len(chosen) - len(escaped)} of {len(chosen)} caught; escaped: {escaped or 'none'}")
    return 1 if escaped else 0


if __name__ == "__main__":
    sys.exit(main())
