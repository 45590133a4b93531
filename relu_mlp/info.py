"""What was built and what will run."""

from __future__ import annotations

import functools
import platform
from dataclasses import dataclass

import torch

from . import _torch_private, ops
from ._version import __version__

#: To be taken out when tools/on_gpu.sh has passed, and its results are in benchmarks/results.
NOT_RUN = "compiled and checked on the host, but this project has not yet run them on a GPU"


@dataclass(frozen=True)
class BuildInfo:
    """The answer of `build_info`; `print` it for a table."""

    relu_mlp: str  #: version of the package
    torch: str  #: version of the PyTorch that is running
    python: str  #: version of the Python that is running
    backend: str  #: what is in force in this thread: auto, extension or reference
    runs_on_cpu: str  #: what serves CPU tensors now: "extension", "reference" or "nothing"
    runs_on_cuda: str  #: the same for CUDA tensors
    library: str | None  #: path of the compiled library, if it is loaded
    problem: str | None  #: why it is not loaded, and what to do
    compiler: str | None  #: what compiled it
    oldest_torch: str | None  #: the oldest PyTorch that the library loads on
    instruction_sets: tuple[str, ...]  #: that the package's own kernels were compiled for
    instruction_set: str | None  #: the one of them that this machine uses
    supported_instruction_sets: tuple[str, ...]  #: those of them that this machine has
    cuda: str  #: which CUDA the kernels for GPUs were compiled against, if they were
    cuda_architectures: tuple[str, ...]  #: that CUDA kernels were compiled for
    missing_in_torch: tuple[str, ...]  #: private names of PyTorch that this version lacks

    def advice(self) -> list[str]:
        """What runs slower here than it could, and the remedy, in a sentence or two each."""
        lines = []
        if self.problem is not None:
            lines.append(f"The extension is missing: {self.problem}")
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
    """What the library says of itself."""
    return ops.library_says()


def build_info() -> BuildInfo:
    """What was built, what will run, and why, if that is less than it could be."""
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
        compiler=built.get("compiler"),
        oldest_torch=built.get("oldest_torch"),
        instruction_sets=compiled,
        instruction_set=compiled[torch.ops.relu_mlp._instruction_set()] if compiled else None,
        supported_instruction_sets=tuple(built.get("supported_instruction_sets", "").split()),
        cuda=f"{built['cuda']}: {NOT_RUN}" if "cuda" in built else "not compiled",
        cuda_architectures=tuple(filter(None, built.get("cuda_architectures", "").split("+"))),
        missing_in_torch=tuple(name.path for name in _torch_private.MISSING),
    )
