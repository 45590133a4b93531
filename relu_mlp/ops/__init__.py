"""Everything between the package and ``torch.ops.relu_mlp``.

    library.py     loading the library; the operators' schemas and state in a process
    arguments.py   plain tensors, missing tensors, differentiated tensors
    backend.py     which implementation serves a call
    fake.py        the fake kernels
    fallback.py    the reference as kernels, where the library has none
    guards.py      operators without a derivative raise when they would be differentiated
    cpp_graphs.py  the operators in graphs that Inductor writes in C++
    node_build.py  naming and building the native autograd node
    native_node.py loading it

The kernels for autograd, vmap and autocast are in autograd.py, batching.py and autocast.py.
"""

from . import cpp_graphs, fake, fallback, guards  # noqa: F401  register kernels
from .arguments import NO_TENSOR, PLAIN, carries_tangent, is_differentiated, stand_ins
from .backend import (
    BACKENDS,
    Implementation,
    backend,
    current_backend,
    extension,
    implementation_for,
    raising_out_of_memory,
    set_backend,
    using,
)
from .library import (
    DIFFERENTIABLE,
    HAS_CUDA,
    LIBRARY_PATH,
    LIBRARY_PROBLEM,
    OPERATORS,
    REMEDY,
    SCHEMAS,
    kernels_of,
    library_info,
    this_thread,
)
from .native_node import NODE_PROBLEM, node

__all__ = [
    "BACKENDS",
    "DIFFERENTIABLE",
    "HAS_CUDA",
    "LIBRARY_PATH",
    "LIBRARY_PROBLEM",
    "NODE_PROBLEM",
    "NO_TENSOR",
    "OPERATORS",
    "PLAIN",
    "REMEDY",
    "SCHEMAS",
    "Implementation",
    "backend",
    "carries_tangent",
    "current_backend",
    "extension",
    "implementation_for",
    "is_differentiated",
    "kernels_of",
    "library_info",
    "node",
    "raising_out_of_memory",
    "set_backend",
    "stand_ins",
    "this_thread",
    "using",
]
