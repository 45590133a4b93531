"""Loads the compiled library, and holds the operators' state, which exists once per process."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import torch

from .._torch_private import (
    CAN_COMPARE_SCHEMAS,
    LIBRARY_OBSTACLE,
    destroy,
    has_kernel,
    normal_schema,
    schema_of,
)
from ..activations import ACTIVATIONS

_T = TypeVar("_T")

#: csrc/operators.h has the same schemas. These define the operators where the library is missing.
SCHEMAS = (
    'relu_mlp(Tensor x, Tensor[] weights, Tensor[] biases, str output_activation="none") -> Tensor',
    "forward(Tensor x, Tensor[] weights, Tensor[] biases, "
    "str output_activation, bool save_hidden) -> (Tensor, Tensor[])",
    "backward(Tensor grad_output, Tensor[] saved, str output_activation, str needs) -> Tensor[]",
    "backward_vjp(Tensor grad_output, Tensor[] saved, str output_activation, str needs, "
    "Tensor[] cotangents, str given, str wanted) -> Tensor[]",
    "recompute_backward(Tensor grad_output, Tensor x, Tensor[] weights, Tensor[] biases, "
    "str output_activation, str needs) -> Tensor[]",
    "loss_and_grads(Tensor x, Tensor target, Tensor[] weights, "
    "Tensor[] biases, str loss, str output_activation) -> (Tensor, Tensor[])",
    "_relu_mlp_in_cpp(Tensor x, Tensor[] weights, Tensor[] biases, "
    'str output_activation="none") -> Tensor',
    "_forward_in_cpp(Tensor x, Tensor[] weights, Tensor[] biases, "
    "str output_activation, bool save_hidden) -> Tensor[]",
    "_backward_in_cpp(Tensor grad_output, Tensor[] saved, "
    "str output_activation, str needs) -> Tensor[]",
    "_backward_vjp_in_cpp(Tensor grad_output, Tensor[] saved, str output_activation, "
    "str needs, Tensor[] cotangents, str given, str wanted) -> Tensor[]",
    "_recompute_backward_in_cpp(Tensor grad_output, Tensor x, Tensor[] weights, "
    "Tensor[] biases, str output_activation, str needs) -> Tensor[]",
    "_loss_and_grads_in_cpp(Tensor x, Tensor target, Tensor[] weights, "
    "Tensor[] biases, str loss, str output_activation) -> Tensor[]",
    "_build_info() -> str",
    "_instruction_set() -> int",
    "_new_trainer(Tensor[] weights, Tensor[] biases, Tensor[] state, str loss, "
    "str output_activation, str optimizer, int[] groups, int group_count) -> int",
    "_train(int[] trainers, Tensor x, Tensor target, Tensor(a!) losses, Tensor order, "
    "float[] hyperparameters, float max_norm, int batch, int first, int last) -> int",
    "_delete_trainer(int trainer) -> ()",
)

#: The operators by name, without those that graphs in C++ call and what the library says of itself.
OPERATORS = tuple(text.partition("(")[0] for text in SCHEMAS if not text.startswith("_"))

#: Those that have a derivative (autograd.py). guards.py makes the others refuse one.
DIFFERENTIABLE = ("relu_mlp", "forward", "backward")

#: Remedies for a missing library.
BUILD_IT = (
    "Build it where PyTorch 2.11 or newer and a C++20 compiler are installed: "
    "`pip install --no-build-isolation .` in a checkout of relu_mlp, "
    "or `python setup.py build_ext --inplace` to use the checkout itself."
)
START_ELSEWHERE = (
    "Start Python in another folder, and without this one in PYTHONPATH. Or build the extension "
    "here too: `python setup.py build_ext --inplace`."
)


# -- Loading ----------------------------------------------------------------


def _libraries(folder: Path) -> list[Path]:
    return sorted(folder.glob("_C*.so")) + sorted(folder.glob("_C*.pyd"))


def _why_missing(folder: Path) -> tuple[str, str]:
    """The reason why this copy of the package has no library, and the remedy."""
    for entry in sys.path:
        other = Path(entry, folder.name)
        if _libraries(other) and not other.samefile(folder):
            return (
                f"there is no _C.abi3.so in {folder}, and Python finds this copy of the package "
                f"before the one that is installed in {other} and has it",
                START_ELSEWHERE,
            )
    return f"it was not built: there is no _C.abi3.so in {folder}", BUILD_IT


def _load_library() -> tuple[Path | None, str | None, str]:
    """The library's path, or the reason why there is none, and the remedy.

    If the process already has the operators, this copy of the library registers nothing
    (csrc/registration.h). The package then uses the existing operators, if their schemas are equal.
    """
    if LIBRARY_OBSTACLE is not None:
        return None, LIBRARY_OBSTACLE, BUILD_IT
    folder = Path(__file__).parent.parent
    found = _libraries(folder)
    remedy = BUILD_IT
    if found:
        try:
            torch.ops.load_library(found[0])
            problem = "its operators were defined in this process before it could be loaded"
        except (OSError, RuntimeError) as error:
            problem = f"{found[0].name} could not be loaded: {error}"
    else:
        problem, remedy = _why_missing(folder)
    if _is_defined("forward"):
        for text in SCHEMAS if CAN_COMPARE_SCHEMAS else ():
            _check_schema(normal_schema(f"relu_mlp::{text}"), folder)
        if found and has_kernel("relu_mlp::forward", "CPU"):
            _check_activations(folder)
            return found[0], None, remedy
    return None, problem, remedy


def library_info() -> dict[str, str]:
    """The library's description of itself, by key. LibTorch leaks the string, so call it rarely."""
    lines = torch.ops.relu_mlp._build_info().splitlines()
    return {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}


def outside_modes(function: Callable[[], _T]) -> _T:
    """The result of `function` without functorch transforms and modes.

    Both belong to a thread, so a new thread has none.
    """
    results: list[_T] = []
    thread = threading.Thread(target=lambda: results.append(function()))
    thread.start()
    thread.join()
    return results[0]


def _check_activations(folder: Path) -> None:
    """Raises ImportError unless activations.py and csrc/activation.h have the same names."""
    said = outside_modes(library_info).get("output_activations", "nothing")
    if sorted(said.split()) != sorted(ACTIVATIONS):
        raise ImportError(
            f"the package in {folder} has the output activations {' '.join(ACTIVATIONS)}, and "
            f"its library has {said}. Rebuild it, or load only one version in a process."
        )


def _is_defined(operator: str) -> bool:
    return hasattr(torch.ops.relu_mlp, operator)


def _check_schema(expected: str, folder: Path) -> None:
    """Raises ImportError unless the process has an operator of exactly this schema."""
    operator = expected.partition("(")[0]
    actual = "missing"
    if _is_defined(operator.removeprefix("relu_mlp::")):
        actual = schema_of(operator)
    if actual == expected:
        return
    raise ImportError(
        f"the package in {folder} needs the operator {expected}, and the one in this process is "
        f"{actual}. Its library was built from another version of relu_mlp, or is loaded from "
        "elsewhere. Rebuild it, or load only one version in a process."
    )


#: Without the library, its path is None. With it, the problem is None.
LIBRARY_PATH, LIBRARY_PROBLEM, REMEDY = _load_library()

#: Whether the library has kernels for CUDA.
HAS_CUDA = LIBRARY_PATH is not None and has_kernel("relu_mlp::forward", "CUDA")


# -- State that exists once per process -------------------------------------------
#
# The operators belong to the process. The package may be imported again, after it was removed from
# `sys.modules` or from another place, while objects of the first import live on. So the operators'
# state is stored beside them, and the kernels of the last import serve all objects.


_FIRST_BACKEND = os.environ.get("RELU_MLP_BACKEND", "auto")


class _Thread(threading.local):
    """The backend in force in a thread. Initially it is the environment's choice."""

    def __init__(self) -> None:
        # No attribute of the class: in PyTorch 2.11 torch.compile would read that instead.
        self.backend = _FIRST_BACKEND
        self.outer: list[str] = []  #: the backends to restore, innermost last


class _Process:
    """The state that outlives an import. It is an attribute of `torch.ops.relu_mlp`."""

    def __init__(self) -> None:
        self.thread = _Thread()
        self.definitions = torch.library.Library("relu_mlp", "FRAGMENT")
        #: The kernels that a module of the package has registered, by its name.
        self.kernels: dict[str, torch.library.Library] = {}
        #: The function that PyTorch calls for an operator, before guards.py replaces it.
        self.calls: dict[str, Callable[..., Any]] = {}
        #: The native autograd node, once it is loaded.
        self.node: ModuleType | None = None


def _process() -> _Process:
    found: _Process | None = vars(torch.ops.relu_mlp).get("_package")
    if found is None:
        found = _Process()
        vars(torch.ops.relu_mlp)["_package"] = found
        if not _is_defined("forward"):
            for schema in SCHEMAS:
                found.definitions.define(schema)
    return found


process = _process()
this_thread = process.thread


def kernels_of(module: str) -> torch.library.Library:
    """The Library for the kernels of a module. Kernels that it registered before are removed."""
    module = module.rpartition(".")[2]
    if module in process.kernels:
        destroy(process.kernels.pop(module))
    process.kernels[module] = torch.library.Library("relu_mlp", "FRAGMENT")
    return process.kernels[module]
