"""Loads the native autograd node (csrc/autograd) where it was built for this PyTorch and Python."""

from __future__ import annotations

import importlib.util
import os
import platform
from pathlib import Path
from types import ModuleType

import torch

from . import node_build
from .library import LIBRARY_PATH, process


def load_node() -> tuple[ModuleType | None, str | None]:
    """The module and None, or None and the reason why there is none, with the remedy.

    The package's folder comes before the cache. If the process has loaded the node already, that
    module serves this import too, unless it was built from other sources.
    """
    if os.environ.get("RELU_MLP_NODE") == "0":
        return None, "RELU_MLP_NODE is 0. Unset it."
    if LIBRARY_PATH is None:
        return None, "it calls the extension, which is missing."
    try:
        name = node_build.file_name()
    except OSError:
        name = None
    if name is None:
        return None, f"its sources can't be read in {node_build.SOURCE}. Install relu_mlp again."
    if process.node is not None:
        if Path(str(process.node.__file__)).name == name:
            return process.node, None
        return None, (
            "this process has loaded the node of another version of relu_mlp. "
            "Load only one version in a process."
        )
    problem = (
        f"it was not built for PyTorch {torch.__version__} and Python {platform.python_version()}"
    )
    for folder in (node_build.PACKAGE, node_build.cache_folder()):
        path = folder / name
        if not os.path.exists(path):  # Path.exists raises if a folder can't be read
            continue
        if not node_build.is_complete(path):
            problem = f"{path} is damaged or can't be read"
            continue
        try:
            module = _import(path)
            if (misfit := module.connect(str(LIBRARY_PATH))) is not None:
                problem = str(misfit)
                continue
            process.node = module
        except Exception as error:  # whatever it is, the package works without the node
            problem = f"{path} could not be loaded: {str(error).strip().partition(chr(10))[0]}"
        else:
            return process.node, None
    return None, f"{problem}. Run `relu-mlp build`."


def _import(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("relu_mlp._node", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


#: The module of the node, or None and why.
node, NODE_PROBLEM = load_node()
