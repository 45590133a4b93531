"""Compiles all of csrc for CUDA with plain nvcc, and checks the result: `make cuda-check`.

It needs neither a GPU nor a PyTorch with CUDA. It compiles every .cu file for sm_80, sm_90 and PTX,
links the whole library, loads it in a new process, lists its operators for CUDA, and writes ptxas's
report on every kernel to build/cuda_check/resources.txt. A kernel that spills registers is an
error. Nothing is run on a device.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch.utils import cpp_extension

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "build" / "cuda_check"
LIBRARY = OUT / "relu_mlp_cuda.so"

ARCHITECTURES = ["sm_80", "sm_90", "compute_90"]
FLAGS = [
    "-std=c++20",
    f"-I{cpp_extension.include_paths()[0]}",
    "-DTORCH_TARGET_VERSION=0x020b000000000000",
    "-DRELU_MLP_WITH_CUDA",
    f"-DRELU_MLP_CUDA_ARCHITECTURES={'+'.join(ARCHITECTURES)}",
    "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wextra,-Werror=switch,-Werror=return-type",
]
CUDA_FLAGS = [
    "-O3",
    "--resource-usage",
    # as PyTorch compiles extensions
    "-D__CUDA_NO_HALF_OPERATORS__",
    "-D__CUDA_NO_HALF_CONVERSIONS__",
    "-D__CUDA_NO_BFLOAT16_CONVERSIONS__",
    "-D__CUDA_NO_HALF2_OPERATORS__",
    *(f"-gencode=arch=compute_{name.split('_')[1]},code={name}" for name in ARCHITECTURES),
]
# The CPU's code is compiled only to be linked, and has its own tests.
CPP_FLAGS = ["-O1"]

#: Runs in a new process, with the library's path as its argument.
LOAD = """
import sys, torch
torch.ops.load_library(sys.argv[1])
names = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("relu_mlp::")]
for name in sorted(names):
    if torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA"):
        print("operator for CUDA:", name)
print(torch.ops.relu_mlp._build_info())
"""
OPERATORS = {"relu_mlp", "forward", "backward", "recompute_backward", "loss_and_grads"}
OPERATORS |= {f"_{name}_in_cpp" for name in OPERATORS}


def run(*command: str | Path) -> str:
    """The command's output. If the command fails, exits with that output."""
    result = subprocess.run(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if result.returncode:
        sys.exit(f"{' '.join(map(str, command))}\n{result.stdout}")
    return result.stdout


def compiled(nvcc: str, source: Path) -> tuple[Path, str]:
    """The object file of a source file, and nvcc's output."""
    target = OUT / (str(source.relative_to(ROOT)).replace("/", "-") + ".o")
    flags = CUDA_FLAGS if source.suffix == ".cu" else CPP_FLAGS
    return target, run(nvcc, *FLAGS, *flags, "-c", source, "-o", target)


def resources(said: str) -> list[tuple[str, str, int, int, int, int]]:
    """Every kernel's name, architecture, registers, and bytes of stack, spills, shared memory."""
    found = []
    entries = said.split("Compiling entry function ")[1:]
    for entry in entries:
        name, architecture = re.match(r"'(\S+)' for '(\w+)'", entry).groups()

        def number(pattern: str, entry: str = entry) -> int:
            return sum(map(int, re.findall(pattern, entry)))

        found.append(
            (
                name,
                architecture,
                number(r"Used (\d+) registers"),
                number(r"(\d+) bytes stack frame"),
                number(r"(\d+) bytes spill"),
                number(r"(\d+) bytes smem"),
            )
        )
    return found


def demangled(names: list[str]) -> list[str]:
    """Names as in C++, without namespaces, or unchanged if no demangler is installed."""
    tool = shutil.which("cu++filt") or shutil.which("c++filt")
    if tool is None:
        return names
    said = subprocess.run([tool], input="\n".join(names), capture_output=True, text=True).stdout
    short = re.sub(r"relu_mlp::cuda::|\(anonymous namespace\)::|c10::|^void ", "", said, flags=re.M)
    return [line.split("(")[0] for line in short.splitlines()]


def report(kernels: list[tuple[str, str, int, int, int, int]]) -> bool:
    """Prints and writes the table, and returns whether a kernel spills."""
    names = demangled([kernel[0] for kernel in kernels])
    lines = ["registers  stack  spills  shared  for    kernel"]
    spilling = 0
    for name, (_, architecture, registers, stack, spills, shared) in sorted(
        zip(names, kernels, strict=True)
    ):
        lines.append(f"{registers:9}  {stack:5}  {spills:6}  {shared:6}  {architecture:5}  {name}")
        spilling += spills > 0
    text = "\n".join(lines)
    (OUT / "resources.txt").write_text(text + "\n")
    print(text)
    print(f"{len(kernels)} kernels, {spilling} of them spill")
    return spilling > 0


def check_cublaslt() -> None:
    """Compares our declarations with NVIDIA's header, if it is found."""
    cuda = Path(shutil.which("nvcc") or "").resolve().parent.parent / "include"
    folders = [cuda, *Path(sysconfig.get_path("purelib")).glob("nvidia/*/include")]
    folders += map(Path, filter(None, os.environ.get("CPATH", "").split(os.pathsep)))
    for folder in folders:
        if (folder / "cublasLt.h").exists():
            run("nvcc", "-std=c++20", f"-I{folder}", "-Xcompiler=-fsyntax-only", "-c",
                ROOT / "tools" / "cublaslt_api.cpp", "-o", OUT / "cublaslt_api.o")  # fmt: skip
            print("cublasLt.h agrees with csrc/cuda/layered/cublaslt_api.h")
            return
    print("cublasLt.h was not found (CPATH, the nvidia-cublas wheel): its check is left out")


def main() -> None:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        sys.exit("cuda-check needs nvcc in PATH")
    print(run(nvcc, "--version").strip().splitlines()[-2], "| PyTorch", torch.__version__)
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir(parents=True)
    # The slowest files come first.
    found = set((ROOT / "csrc").rglob("*.c*")) - set((ROOT / "csrc" / "autograd").iterdir())
    sources = sorted(found, key=lambda path: (path.suffix != ".cu", path))
    sources = [path for path in sources if path.suffix in (".cu", ".cpp")]
    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", "2"))) as pool:
        done = list(pool.map(lambda source: compiled(nvcc, source), sources))
    spills = report(resources("".join(said for _, said in done)))
    check_cublaslt()

    # libtorch.so loads libtorch_cuda.so where that exists. The CUDA runtime is linked in.
    lib = Path(torch.__file__).parent / "lib"
    run(nvcc, "-shared", *(target for target, _ in done), "-o", LIBRARY, f"-L{lib}",
        "-Xlinker=--no-as-needed", "-ltorch", "-ltorch_cpu", "-lc10")  # fmt: skip
    said = run(sys.executable, "-c", LOAD, LIBRARY)
    print(said.strip())
    found = set(re.findall(r"operator for CUDA: relu_mlp::(\w+)", said))
    if found != OPERATORS:
        sys.exit(f"the operators for CUDA are {sorted(found)}, not {sorted(OPERATORS)}")
    if spills:
        sys.exit("a kernel spills registers")
    print("cuda-check: compiled, linked and loaded. Nothing was run on a GPU.")


if __name__ == "__main__":
    main()
