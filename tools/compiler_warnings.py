"""Compiles all C++ with -Wall -Wextra -Werror by g++ and clang++: `make warnings`. clang++ reads
GCC's standard library, and for csrc LLVM's (libc++) too, where that is installed.

Nothing is linked or run, and no object file is written (-fsyntax-only). The flags are those of
setup.py. csrc/cuda and tests/cuda_on_host are compiled for the host, as
tests/kernels/test_cuda_on_host.py compiles them. MAX_JOBS compilers (default: 2) run at once. A
compiler that is not installed is left out. If neither is installed, the command fails.

    python tools/compiler_warnings.py                # every file by every compiler found
    python tools/compiler_warnings.py csrc/cpu/plan.cpp   # some files
"""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from torch.utils import cpp_extension

ROOT = Path(__file__).resolve().parent.parent
#: With LLVM's standard library instead of GCC's. It checks csrc alone: the programs in examples are
#: linked with LibTorch, which has GCC's.
LIBCXX = "clang++ -stdlib=libc++"
COMPILERS = ("g++", "clang++", LIBCXX)

WARNINGS = [
    "-Wall",
    "-Wextra",
    "-Werror",
    # Aggregates leave trailing members to their defaults on purpose.
    "-Wno-missing-field-initializers",
]

FOLDERS = ("csrc", "tests", "examples", "tools")
#: Files that need CUDA's own headers; other checks compile them.
NEEDS_CUDA = {"tools/cublaslt_api.cpp", "examples/extension/csrc/squared_relu.cu"}


def flags_of_setup() -> list[str]:
    """FLAGS of setup.py, which runs the build when it is imported."""
    tree = ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "FLAGS":
            return list(ast.literal_eval(node.value))
    raise SystemExit("tools/compiler_warnings.py: setup.py has no list FLAGS")


def files() -> list[str]:
    found = (path for folder in FOLDERS for path in (ROOT / folder).rglob("*"))
    names = (p.relative_to(ROOT).as_posix() for p in found if p.suffix in (".cpp", ".cu"))
    return sorted(set(names) - NEEDS_CUDA)


def flags_of(name: str) -> list[str]:
    flags = [*flags_of_setup(), "-fvisibility=hidden"]
    if name.startswith(("csrc/autograd/", "examples/")):  # for the whole of LibTorch
        flags = [flag for flag in flags if not flag.startswith("-DTORCH_TARGET_VERSION")]
    if name.startswith(("csrc/cuda/", "tests/cuda_on_host/")):
        flags += ["-DRELU_MLP_CUDA_ON_HOST", f"-I{ROOT}", f"-I{ROOT}/tests/cuda_on_host"]
    # Warnings in the headers of PyTorch and Python are suppressed.
    folders = [*cpp_extension.include_paths(), sysconfig.get_path("include")]
    if name.startswith("csrc/autograd/"):
        flags.append(f"-I{ROOT}/csrc/autograd/include")
    return [*flags, *(f"-isystem{path}" for path in folders)]


def is_installed(compiler: str) -> bool:
    """Whether the compiler is there, with the standard library that it is to read."""
    command = compiler.split()
    if not shutil.which(command[0]):
        return False
    probe = [*command, "-fsyntax-only", "-x", "c++", "-include", "vector", "/dev/null"]
    return subprocess.run(probe, capture_output=True).returncode == 0


def complaint(compiler: str, name: str) -> str | None:
    """A compiler's output for a file, or None if it accepts the file."""
    command = [*compiler.split(), *flags_of(name), *WARNINGS, "-fsyntax-only", "-x", "c++", name]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return done.stderr if done.returncode else None


def main(names: list[str]) -> int:
    compilers = [compiler for compiler in COMPILERS if is_installed(compiler)]
    if not compilers:
        print("tools/compiler_warnings.py: neither g++ nor clang++ was found", file=sys.stderr)
        return 2
    pairs = [
        (compiler, name)
        for compiler in compilers
        for name in names or files()
        if compiler != LIBCXX or name.startswith("csrc/")
    ]
    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", "2"))) as pool:
        complaints = list(pool.map(lambda pair: complaint(*pair), pairs))
    failed = [(*pair, text) for pair, text in zip(pairs, complaints, strict=True) if text]
    for compiler, name, text in failed:
        print(f"{compiler} {name}\n{text}")
    clean = len(pairs) - len(failed)
    print(f"{', '.join(compilers)}: {clean} of {len(pairs)} compilations without a warning")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
