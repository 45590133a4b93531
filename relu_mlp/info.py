"""`build_info`: describes the build and the implementation that will run."""

from __future__ import annotations

import functools
import platform
from dataclasses import dataclass

import torch

from . import _torch_private, ops
from ._version import __version__

#: Remove this when tools/on_gpu.sh has passed and its results are in benchmarks/results.
NOT_RUN = "compiled and checked on the host, but this project has not yet run them on a GPU"


@dataclass(frozen=True)
class BuildInfo:
    """The result of `build_info`. `print` shows it as a table, with a line for each field."""

    relu_mlp: str  #: the version of the package
    torch: str  #: the version of the running PyTorch
    python: str  #: the version of the running Python
    backend: str  #: the backend in force in this thread: "auto", "extension" or "reference"
    #: the implementation that serves CPU tensors now: "extension", "reference" or "nothing"
    runs_on_cpu: str
    runs_on_cuda: str  #: the same for CUDA tensors
    library: str | None  #: the path of the compiled library, if it is loaded
    problem: str | None  #: the reason why it is not loaded, and the remedy
    node: str | None  #: the path of the native autograd node, if it is loaded
    node_problem: str | None  #: the reason why it is not loaded, and the remedy
    compiler: str | None  #: the compiler that built the library
    oldest_torch: str | None  #: the oldest PyTorch on which the library loads
    #: the instruction sets for which the package's own kernels were compiled, lowest first
    instruction_sets: tuple[str, ...]
    instruction_set: str | None  #: the one of them that the kernels use
    supported_instruction_sets: tuple[str, ...]  #: those of them that this processor has
    cuda: str  #: the CUDA version of the kernels for GPUs, or "not compiled"
    cuda_architectures: tuple[str, ...]  #: the architectures for which they were compiled
    missing_in_torch: tuple[str, ...]  #: the private names that this PyTorch lacks

    def advice(self) -> list[str]:
        """For each thing that runs slower here than it could: a sentence or two with the remedy."""
        lines = []
        if self.problem is not None:
            lines.append(f"The extension is missing: {self.problem}")
        elif self.node_problem is not None:
            lines.append(f"The native autograd node is not loaded: {self.node_problem}")
        if self.runs_on_cpu != "extension" and self.library is not None:
            lines.append(
                "The extension is there, but the backend in force is "
                f"{self.backend!r}. Unset RELU_MLP_BACKEND, or set it to 'auto'."
            )
        if self.supported_instruction_sets and (
            self.instruction_set != self.supported_instruction_sets[-1]
        ):
            lines.append(
                f"The kernels use {self.instruction_set}, and this processor has "
                f"{self.supported_instruction_sets[-1]}. Unset RELU_MLP_ISA."
            )
        if torch.cuda.is_available() and not self.cuda_architectures:
            lines.append(
                "There is a GPU, but there are no kernels for CUDA in this build: CUDA tensors "
                "are served in Python, by PyTorch's own products. That has not been measured."
            )
        if self.cuda_architectures:
            lines.append(f"The kernels for GPUs are {NOT_RUN}. docs/cuda.md says what was checked.")
        lines += [
            f"This PyTorch has no {name.path}: {name.without}. A newer relu_mlp may know what "
            "has taken its place."
            for name in _torch_private.MISSING
        ]
        return lines

    def __str__(self) -> str:
        width = max(map(len, self.__dataclass_fields__))
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return "\n".join(
            f"{name:<{width}}  {', '.join(value) or 'none' if isinstance(value, tuple) else value}"
            for name, value in values.items()
        )


@functools.cache  # LibTorch leaks the strings that operators return
def _built() -> dict[str, str]:
    """The library's description of itself."""
    return ops.library_info()


def build_info() -> BuildInfo:
    """Describes the build, the implementation that will run, and why anything is missing.

    Returns:
        A `BuildInfo`.

    Raises:
        ValueError: if RELU_MLP_BACKEND is not the name of a backend.
        RuntimeError: if RELU_MLP_ISA names an instruction set that is not supported here.
    """
    built = _built()
    compiled = tuple(built.get("instruction_sets", "").split())
    name = ops.current_backend()
    has_library = ops.LIBRARY_PATH is not None
    without_kernels = "nothing" if name == "extension" else "reference"
    return BuildInfo(
        relu_mlp=__version__,
        torch=torch.__version__,
        python=platform.python_version(),
        backend=name,
        runs_on_cpu="extension" if has_library and name != "reference" else without_kernels,
        runs_on_cuda="extension" if ops.HAS_CUDA and name != "reference" else without_kernels,
        library=str(ops.LIBRARY_PATH) if has_library else None,
        problem=None if has_library else f"{ops.LIBRARY_PROBLEM}. {ops.REMEDY}",
        node=None if ops.node is None else ops.node.__file__,
        node_problem=ops.NODE_PROBLEM,
        compiler=built.get("compiler"),
        oldest_torch=built.get("oldest_torch"),
        instruction_sets=compiled,
        instruction_set=compiled[torch.ops.relu_mlp._instruction_set()] if compiled else None,
        supported_instruction_sets=tuple(built.get("supported_instruction_sets", "").split()),
        cuda=f"{built['cuda']}: {NOT_RUN}" if "cuda" in built else "not compiled",
        cuda_architectures=tuple(filter(None, built.get("cuda_architectures", "").split("+"))),
        missing_in_torch=tuple(name.path for name in _torch_private.MISSING),
    )
