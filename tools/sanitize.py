"""The kernels and operators under sanitizers: `make sanitize`.

AddressSanitizer and UndefinedBehaviorSanitizer, whose first report ends the process, check:

- the fuzzer (tools/fuzz) on a copy of the package in build/sanitize, whose library is built with
  them. PyTorch is not, so memory accesses of its own code are not checked.
- tests/sanitize/driver.cpp, which runs the passes on plain data without PyTorch. Every operand,
  result and workspace ends at a page that must not be touched. This also finds accesses that the
  sanitizer does not see: masked ones and those of AMX.

ThreadSanitizer checks the same driver on several threads of its own.

Arguments are passed on to the fuzzer. MAX_JOBS compilers (default: 2) run at once.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch.utils import cpp_extension

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "build" / "sanitize"
PACKAGE = OUT / "package" / "relu_mlp"
COMPILER = os.environ.get("CXX", "c++").split()

FLAGS = [
    "-std=c++20",
    "-O1",
    "-g1",
    "-fno-omit-frame-pointer",
    "-fPIC",
    "-fvisibility=hidden",
    "-DTORCH_TARGET_VERSION=0x020b000000000000",
]
# -w: the sanitizers' own branches cause spurious compiler warnings.
MEMORY = [
    "-fsanitize=address,undefined,float-cast-overflow",
    "-fno-sanitize-recover=all",
    "-w",
]
THREADS = ["-fsanitize=thread", "-w"]

#: Sources that need nothing of PyTorch except two headers.
KERNELS = [
    "csrc/cpu/packing.cpp",
    "csrc/cpu/plan.cpp",
    "csrc/cpu/tuning.cpp",
    *sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/cpu/isa/*.cpp")),
]
DRIVER = ["tests/sanitize/driver.cpp", "tests/sanitize/pytorch.cpp"]
OPTIONS = {
    # Python and PyTorch do not free all memory at the end.
    "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",
    "UBSAN_OPTIONS": "print_stacktrace=1",
    "TSAN_OPTIONS": "halt_on_error=1",
}


def run(*command: str | Path, **variables: str) -> None:
    """Runs a command; ends the program if it fails."""
    done = subprocess.run(
        list(map(str, command)), cwd=ROOT, env={**os.environ, **OPTIONS, **variables}
    )
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command[:4]))} ... ended with {done.returncode}")


def objects(sources: Iterable[str], flags: Sequence[str], kind: str) -> list[Path]:
    """The object files of the sources. Files that are newer than all of csrc are reused."""
    headers = [*ROOT.glob("csrc/**/*"), *ROOT.glob("tests/sanitize/*.h")]
    newest = max(path.stat().st_mtime for path in [*headers, Path(__file__)])
    folder = OUT / kind
    folder.mkdir(parents=True, exist_ok=True)

    def compiled(source: str) -> Path:
        target = folder / (source.replace("/", "-") + ".o")
        own = (ROOT / source).stat().st_mtime
        if not target.exists() or target.stat().st_mtime < max(newest, own):
            run(*COMPILER, *FLAGS, *flags, "-c", source, "-o", target)
        return target

    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", "2"))) as pool:
        return list(pool.map(compiled, sources))


def includes() -> list[str]:
    return [f"-isystem{path}" for path in cpp_extension.include_paths()]


def build_package() -> None:
    """A copy of the package in build/sanitize with a library under the sanitizers."""
    shutil.rmtree(PACKAGE, ignore_errors=True)
    shutil.copytree(ROOT / "relu_mlp", PACKAGE, ignore=shutil.ignore_patterns("_C*", "__pycache__"))
    sources = [*ROOT.glob("csrc/*.cpp"), *ROOT.glob("csrc/cpu/**/*.cpp")]
    names = sorted(str(path.relative_to(ROOT)) for path in [*sources, ROOT / "csrc/cuda/plan.cpp"])
    lib = Path(torch.__file__).parent / "lib"
    link = ["-shared", f"-L{lib}", "-ltorch", "-ltorch_cpu", "-lc10"]
    # The kernels are those of the driver.
    compiled = objects(names, [*MEMORY, *includes()], "memory")
    run(*COMPILER, *MEMORY, *compiled, *link, "-o", PACKAGE / "_C.abi3.so")


def runtime(*names: str) -> str:
    """The libraries to preload into a Python that was not built with sanitizers."""
    found = (
        subprocess.run([*COMPILER, f"-print-file-name={name}"], capture_output=True, text=True)
        for name in names
    )
    return ":".join(str(Path(done.stdout.strip()).resolve()) for done in found)


def fuzz(arguments: Sequence[str]) -> None:
    run(
        sys.executable,
        "tools/fuzz",
        *(arguments or ["--seconds", "60"]),
        LD_PRELOAD=runtime("libasan.so", "libubsan.so", "libstdc++.so"),
        PYTHONPATH=str(PACKAGE.parent),
    )


def drive(kind: str, flags: Sequence[str], networks: int) -> None:
    """Builds and runs the driver, with a small replacement for PyTorch."""
    compiled = objects([*KERNELS, *DRIVER], [*flags, *includes()], kind)
    driver = OUT / f"driver-{kind}"
    run(*COMPILER, *flags, *compiled, "-lpthread", "-o", driver)
    run(driver, str(networks))


def main() -> None:
    drive("memory", MEMORY, 250)
    drive("threads", THREADS, 160)  # the first 108 are small
    build_package()
    fuzz(sys.argv[1:])


if __name__ == "__main__":
    main()
