"""Every private name of PyTorch that this package uses.

PyTorch may rename or drop a private name in any release. So each is looked up here, once, at
import, and each entry says why the package uses it, which public name would do and at what
cost, and what happens without it. Where a name is missing the package works all the same:
slower, or without one feature. `relu_mlp.build_info()` and ``relu-mlp info`` say which names
are missing and what that costs.

The other files import from here and use no private name of PyTorch themselves
(tests/core/test_torch_private.py). A function that is called for every network is bound to a plain
name of this module, because a lookup per call would take longer than some of the calls.

The stable C++ library needs none of these names. TorchScript's ``__jit_..__`` class attributes are
in scripting.py, with all other support for TorchScript.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack, nullcontext
from operator import attrgetter
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypeVar

import torch
import torch.autograd.forward_ad
from torch import Tensor

_Function = TypeVar("_Function", bound=Callable[..., Any])


class PrivateName(NamedTuple):
    """A private name of PyTorch."""

    path: str  #: its dotted path; ``()`` in it is a call without arguments
    why: str  #: the reason why the package needs it
    public: str  #: the public name that would do, and its cost
    without: str  #: the package's behavior in a PyTorch that lacks it


#: All private names, in the order of this file.
NAMES: list[PrivateName] = []

#: The names that this PyTorch lacks.
MISSING: list[PrivateName] = []

#: Paths to treat as missing. A test sets it before it executes this file.
HIDDEN: frozenset[str] = globals().get("HIDDEN", frozenset())


def _find(path: str, *, why: str, public: str = "none", without: str) -> Any:
    """The object at a path, or None. In both cases the name is listed in `NAMES`."""
    found = None
    if _listed(path, why=why, public=public, without=without):
        found = _lookup(path)
        if found is None:
            MISSING.append(NAMES[-1])
    return found


def _lookup(path: str) -> Any:
    parts = path.split(".")
    value: Any = torch
    for end, part in enumerate(parts[1:], start=2):
        name = part.removesuffix("()")
        try:
            value = getattr(value, name)
        except AttributeError:
            try:
                value = importlib.import_module(".".join(parts[:end]))
            except ImportError:
                return None
        if part.endswith("()"):
            value = value()
    return value


def _listed(path: str, *, why: str, public: str = "none", without: str) -> bool:
    """Lists a name without looking it up, which may import much of PyTorch.

    Returns False if the name is hidden.
    """
    name = PrivateName(path, why, public, without)
    NAMES.append(name)
    if path in HIDDEN:
        MISSING.append(name)
    return path not in HIDDEN


def _zero(*_: Any) -> int:
    return 0


# -- The dispatcher ------------------------------------------------------------------------------

#: A guard: the Autograd keys are off while it lives. It is active from its creation.
below_autograd: Any = _find(
    "torch._C._AutoDispatchBelowAutograd",
    why="the Function calls the operators below autograd, past their own Autograd kernels",
    without="the library can't be called: the reference serves every call, in Python",
)
HAS_BELOW_AUTOGRAD = below_autograd is not None
#: Why the library can't be called, or None.
LIBRARY_OBSTACLE = (
    None if HAS_BELOW_AUTOGRAD else f"PyTorch has no {NAMES[-1].path}, which its calls need"
)
if not HAS_BELOW_AUTOGRAD:
    below_autograd = nullcontext

_has_kernel = _find(
    "torch._C._dispatch_has_kernel_for_dispatch_key",
    why="to find the devices for which the loaded library has kernels",
    public="OpOverload.has_kernel_for_dispatch_key, which takes an enum of torch._C",
    without="the library is assumed to have kernels for the CPU only",
)


def has_kernel(operator: str, key: str) -> bool:
    """Whether an operator ("relu_mlp::forward") has a kernel on a dispatch key ("CUDA")."""
    return key == "CPU" if _has_kernel is None else bool(_has_kernel(operator, key))


_parse_schema = _find(
    "torch._C.parse_schema",
    why="schemas show whether a library is of another version",
    without="a library of another version is not recognized when it is loaded",
)
_get_schema = _find(
    "torch._C._get_schema",
    why="the same as for torch._C.parse_schema",
    without="a library of another version is not recognized when it is loaded",
)
CAN_COMPARE_SCHEMAS = _parse_schema is not None and _get_schema is not None


def normal_schema(text: str) -> str:
    """A schema ("relu_mlp::forward(...) -> ...") in PyTorch's spelling."""
    return str(_parse_schema(text))


def schema_of(operator: str) -> str:
    """The schema of a defined operator ("relu_mlp::forward"), in PyTorch's spelling."""
    return str(_get_schema(operator, ""))


_destroy = _find(
    "torch.library.Library._destroy",
    why="a second import of the package replaces the kernels of the first",
    public="none; a Library removes its kernels when the garbage collector frees it",
    without="a second import of the package in one process may fail",
)


def destroy(library: torch.library.Library) -> None:
    """Removes the kernels of a library."""
    if _destroy is not None:
        _destroy(library)


_has_op = _find(
    "torch.ops.aten.relu.default._op",
    why="a call of `OpOverload._op` takes a microsecond less than one of the OpOverload, and "
    "replacing it lets calls bypass an Autograd kernel that would have nothing to do",
    public="the OpOverload itself, a microsecond slower",
    without="every call takes a microsecond longer, and compiled inference several",
)


def call_of(operator: Any) -> Callable[..., Any]:
    """The function that an OpOverload calls."""
    return operator if _has_op is None else operator._op


def replace_call(operator: Any, call: Callable[..., Any]) -> None:
    """Makes an OpOverload call another function, where this PyTorch allows that."""
    if _has_op is not None:
        operator._op = call


_has_schema = _find(
    "torch.ops.aten.relu.default._schema",
    why="`check_gradients` must not perturb views and in-place operations",
    without="`check_gradients` allows for less rounding in a function of your own",
)


def schema_of_overload(operator: Any) -> Any:
    """The schema of an OpOverload as an object; None if it has none, or if it can't be read."""
    return None if _has_schema is None else getattr(operator, "_schema", None)


_parse_dispatch_key = _find(
    "torch._C._parse_dispatch_key",
    why="to check that the dispatch keys below exist",
    public="Library.impl, which raises RuntimeError",
    without="the dispatch keys are assumed to exist",
)


def _has_key(name: str, why: str, public: str, without: str) -> bool:
    if not _listed(f"dispatch key {name}", why=why, public=public, without=without):
        return False
    if _parse_dispatch_key is None or _parse_dispatch_key(name) is not None:
        return True
    MISSING.append(NAMES[-1])
    return False


#: The dispatch keys that `register` knows.
_KEYS = {
    "Batched": _has_key(
        "Batched",
        why="`torch.autograd.grad(is_grads_batched=True)` has a vmap older than torch.func's",
        public="none",
        without="`is_grads_batched=True` runs row by row, or raises",
    ),
    "AutocastCPU": _has_key(
        "AutocastCPU",
        why="the public operator follows autocast",
        public="torch.library.register_autocast, which supports only one dtype",
        without="torch.ops.relu_mlp.relu_mlp does not follow autocast on the CPU, nor do "
        "compiled calls; the layer and the function do",
    ),
    "AutocastCUDA": _has_key(
        "AutocastCUDA",
        why="the same as for AutocastCPU",
        public="the same as for AutocastCPU",
        without="torch.ops.relu_mlp.relu_mlp does not follow autocast on a GPU, nor do "
        "compiled calls; the layer and the function do",
    ),
}


def register(
    library: torch.library.Library, name: str, kernel: Callable[..., Any], key: str
) -> None:
    """`Library.impl`, if this PyTorch has the dispatch key."""
    if _KEYS[key]:
        library.impl(name, kernel, key)


# -- Autograd ------------------------------------------------------------------------------------

_single_level_function = _find(
    "torch.autograd.function._SingleLevelFunction",
    why="its `apply` does not check for functorch, which would take as long as a small network",
    public="torch.autograd.Function, slower by that",
    without="training is slower; under torch.func and forward-mode AD the operators run as "
    "PyTorch's own operations",
)
enable_single_level_autograd_function: Any = _find(
    "torch._functorch.utils.enable_single_level_autograd_function",
    why="PyTorch lets a Function run within a level of torch.func only inside this context",
    without="under torch.func and forward-mode AD the operators run as PyTorch's own operations",
)
set_fwd_grad_enabled: Any = _find(
    "torch.autograd.forward_ad._set_fwd_grad_enabled",
    why="PyTorch disables tangents in a Function, which loses those of the levels below",
    without="under torch.func and forward-mode AD the operators run as PyTorch's own operations",
)
is_fwd_grad_enabled: Any = _find(
    "torch._C._is_fwd_grad_enabled",
    why="a Function restores its caller's modes for the levels below",
    without="under torch.func and forward-mode AD the operators run as PyTorch's own operations",
)

#: Whether the operators can be differentiated as one node for each level of torch.func and of
#: forward-mode AD. If not, their Autograd kernels run the reference, which PyTorch differentiates
#: operation by operation.
HAS_LEVELS = HAS_BELOW_AUTOGRAD and None not in (
    _single_level_function,
    enable_single_level_autograd_function,
    set_fwd_grad_enabled,
    is_fwd_grad_enabled,
)

if TYPE_CHECKING:
    _FunctionBase = torch.autograd.Function
else:
    _FunctionBase = _single_level_function or torch.autograd.Function


class SingleLevelFunction(_FunctionBase):
    """A `torch.autograd.Function` that does not check for functorch.

    `torch.autograd.Function` passes a call to functorch, which makes one of these for each level.
    In this package the dispatcher handles the levels.
    """

    apply: ClassVar[Callable[..., tuple[Tensor, ...]]]  # in C++

    if _single_level_function is not None:

        @staticmethod
        def _compiled_autograd_key(ctx: Any) -> tuple[int]:
            return (getattr(ctx, "_autograd_function_id", 0),)


#: ``FORWARD_AD[LEVEL] >= 0`` inside a level of forward-mode AD. It is a dict and a key, because a
#: function call would take longer than the comparison.
FORWARD_AD: Mapping[str, Any] = vars(torch.autograd.forward_ad)
LEVEL = "_current_level"
if (
    _find(
        "torch.autograd.forward_ad._current_level",
        why="most calls are outside of a level, and need not look for tangents",
        public="torch.autograd.forward_ad.unpack_dual of every tensor, in every call",
        without="every call goes through PyTorch's dispatcher, which is slower",
    )
    is None
):
    FORWARD_AD = {LEVEL: 0}

_will_execute = _find(
    "torch._C._will_engine_execute_node",
    why="to find the gradients that a backward pass with create_graph=True has to compute",
    without="such a backward pass computes the gradients of all inputs that require one",
)


def leads_to(node: Any) -> bool:
    """Whether the running backward pass will reach a node of the graph."""
    if _will_execute is None:
        return True
    try:
        return bool(_will_execute(node))
    except RuntimeError:  # the engine raises for a leaf that was requested
        return True


_has_version = _find(
    "torch.Tensor._version",
    why="it counts the in-place changes of a tensor",
    without="`Linearization` doesn't notice that a parameter was changed in place, and second "
    "derivatives compute products with zeros",
)

#: The number of a tensor's in-place changes; -1 if it can't be read.
version_of: Callable[[Tensor], int] = attrgetter("_version")
if _has_version is None:
    version_of = lambda tensor: -1  # noqa: E731


# -- torch.func ----------------------------------------------------------------------------------

#: The innermost level of torch.func, or None.
peek_interpreter_stack: Callable[[], Any] = _find(
    "torch._C._functorch.peek_interpreter_stack",
    why="to find out whether a call is inside a transform of torch.func",
    without="a backward pass with create_graph=True computes the gradients of all inputs that "
    "require one, and derivatives look for tangents in every call",
) or (lambda: "perhaps")

#: Whether a transform of torch.func is active.
are_functorch_transforms_active: Callable[[], bool] = _find(
    "torch._C._are_functorch_transforms_active",
    why="under a transform the dispatcher has to handle each level",
    without="every call goes through PyTorch's dispatcher, which is slower",
) or (lambda: peek_interpreter_stack() is not None)

#: Whether `are_functorch_transforms_active` really knows. Otherwise it returns True to be safe.
KNOWS_TRANSFORMS = not {
    "torch._C._functorch.peek_interpreter_stack",
    "torch._C._are_functorch_transforms_active",
} <= {name.path for name in MISSING}

is_functorch_wrapped_tensor: Callable[[Tensor], bool] | None = _find(
    "torch._C._functorch.is_functorch_wrapped_tensor",
    why="such a tensor has no storage of its own, which must not count as freed by `resize_`",
    without="a tensor whose storage was freed is not refused in Python",
)

_vmap_tools = (
    _find(
        "torch._functorch.pyfunctorch.retrieve_current_functorch_interpreter",
        why="it has the level and the batch size of a vmap",
        public="torch.library.register_vmap, which flattens lists of tensors as pytrees, six "
        "times per call; per-sample gradients of a small network take twice as long with it",
        without="vmap is slower",
    ),
    _find(
        "torch._C._functorch._unwrap_batched",
        why="it returns the tensor below a vmap's tensor, and its batch dimension",
        public="torch.library.register_vmap",
        without="vmap is slower",
    ),
    _find(
        "torch._C._functorch._add_batch_dim",
        why="it makes a vmap's tensor of a tensor",
        public="torch.library.register_vmap",
        without="vmap is slower",
    ),
    _find(
        "torch._C._ExcludeDispatchKeyGuard",
        why="a batching rule runs below its vmap",
        public="torch.library.register_vmap",
        without="vmap is slower",
    ),
    _find(
        "torch._C.DispatchKeySet",
        why="the same as for torch._C._ExcludeDispatchKeyGuard",
        public="torch.library.register_vmap",
        without="vmap is slower",
    ),
    _find(
        "torch._C.DispatchKey.FuncTorchBatched",
        why="the same as for torch._C._ExcludeDispatchKeyGuard",
        public="torch.library.register_vmap",
        without="vmap is slower",
    ),
)

#: Whether a batching rule can be registered as a kernel, without `torch.library.register_vmap`.
HAS_VMAP_TOOLS = None not in _vmap_tools
current_interpreter, unwrap_batched, add_batch_dim, *_below_vmap = _vmap_tools


def below_vmap() -> Any:
    """A context without the dispatch key of vmap."""
    exclude, key_set, key = _below_vmap
    return exclude(key_set(key))


# -- Autocast ------------------------------------------------------------------------------------


def _devices_with_autocast() -> list[str]:
    return [
        device
        for device in ("cpu", "cuda", "xpu", "mps", "hpu")
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    ]


#: Whether autocast is enabled for any device.
is_any_autocast_enabled: Callable[[], bool] = _find(
    "torch._C._is_any_autocast_enabled",
    why="every call checks this",
    public="torch.is_autocast_enabled of every kind of device",
    without="every call takes a few microseconds longer",
) or (lambda: bool(_devices_with_autocast()))


def _disabled_autocast() -> ExitStack:
    stack = ExitStack()
    for device in _devices_with_autocast():
        stack.enter_context(torch.autocast(device, enabled=False))
    return stack


#: A context without autocast.
disable_autocast: Callable[[], Any] = (
    _find(
        "torch._C._DisableAutocast",
        why="tensors that were cast must not be cast again, on any device",
        public="torch.autocast(device, enabled=False) for every kind of device",
        without="calls under autocast are slower",
    )
    or _disabled_autocast
)


# -- Modes ---------------------------------------------------------------------------------------

_modes = (
    _find(
        "torch._C._len_torch_function_stack",
        why="under a mode that has to see the native layers' calls, those layers run",
        without="such a mode sees the operators and not the layers",
    ),
    _find(
        "torch._C._get_function_stack_at",
        why="the same as for torch._C._len_torch_function_stack",
        without="such a mode sees the operators and not the layers",
    ),
    _find(
        "torch._C._len_torch_dispatch_stack",
        why="the same as for torch._C._len_torch_function_stack",
        without="such a mode sees the operators and not the layers",
    ),
    _find(
        "torch._C._get_dispatch_stack_at",
        why="the same as for torch._C._len_torch_function_stack",
        without="such a mode sees the operators and not the layers",
    ),
)

#: The number of active modes, and the mode at a position, counted from the outermost.
len_function_modes: Callable[[], int]
function_mode_at: Callable[[int], Any]
len_dispatch_modes: Callable[[], int]
dispatch_mode_at: Callable[[int], Any]
len_function_modes, function_mode_at = _modes[:2] if None not in _modes[:2] else (_zero, _zero)
len_dispatch_modes, dispatch_mode_at = _modes[2:] if None not in _modes[2:] else (_zero, _zero)

#: The modules that define modes which may see an operator in place of the layers: the mode of the
#: default device, the modes with which PyTorch records graphs, and its counter of operations, which
#: has formulas for the operators (flops.py). If PyTorch has moved a mode, it counts like any other,
#: and the native layers run under it.
MODES_FOR_OPERATORS = frozenset(
    {
        "torch.utils._device",
        "torch._subclasses.fake_tensor",
        "torch._subclasses.functional_tensor",
        "torch.fx.experimental.proxy_tensor",
        "torch._export.non_strict_utils",
        "torch.export._safeguard",
        "torch.utils.flop_counter",
    }
)

#: The module of torch.fx that wraps methods of Module to record a graph of operations. If PyTorch
#: has moved it, the native layers are recorded.
TRACER_OF_FX = "torch.fx._symbolic_trace"

_get_dispatch_mode = _find(
    "torch._C._get_dispatch_mode",
    why="under a mode of fake tensors, the real placeholder of a missing bias is rejected",
    without="each call of an operator by name makes new tensors for missing biases",
)
_fake_mode = _find(
    "torch._C._TorchDispatchModeKey.FAKE",
    why="the same as for torch._C._get_dispatch_mode",
    without="each call of an operator by name makes new tensors for missing biases",
)


def may_be_fake() -> bool:
    """Whether a FakeTensorMode is active, or may be."""
    if _get_dispatch_mode is None or _fake_mode is None:
        return True
    return _get_dispatch_mode(_fake_mode) is not None


if TYPE_CHECKING:
    from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode
else:

    class _NoMode:
        """A mode that sees nothing."""

        def __enter__(self) -> _NoMode:
            return self

        def __exit__(self, *_: Any) -> None:
            pass

    TorchDispatchMode = (
        _find(
            "torch.utils._python_dispatch.TorchDispatchMode",
            why="`check_gradients` perturbs every operation to learn how rounding spreads",
            without="`check_gradients` allows for less rounding in a function of your own",
        )
        or _NoMode
    )


_HAS_NUMPY = _listed(
    "torch._numpy",
    why="`check_gradients` differentiates a function that is written in NumPy",
    public="none: torch.compile traces NumPy, and takes seconds",
    without="a function that is written in NumPy can't be checked",
)


def torch_numpy() -> Any:
    """NumPy on tensors; None if there is none. Imported by those who need it."""
    return importlib.import_module("torch._numpy") if _HAS_NUMPY else None


# -- Modules -------------------------------------------------------------------------------------


def _key(name: str, why: str, public: str, without: str) -> str:
    """A key of the `__dict__` of a Module. If PyTorch has moved it, a key that no dict has."""
    path = f"torch.nn.Module().{name}"
    return name if _find(path, why=why, public=public, without=without) is not None else path


_HOOKS = {
    "why": "a module with a hook has to be called, so that the hook runs",
    "public": "none",
    "without": "the layer runs its children one by one, as nn.Sequential does",
}

#: Keys of the `__dict__` of a Module.
FORWARD_HOOKS = _key("_forward_hooks", **_HOOKS)
FORWARD_PRE_HOOKS = _key("_forward_pre_hooks", **_HOOKS)
BACKWARD_HOOKS = _key("_backward_hooks", **_HOOKS)
BACKWARD_PRE_HOOKS = _key("_backward_pre_hooks", **_HOOKS)
PARAMETERS = _key(
    "_parameters",
    why="it has the parameters that a call of F.linear would get, and not those of a wrapper",
    public="module.weight, which takes a search and may run code that somebody has added",
    without="the layer runs its children one by one, as nn.Sequential does",
)
MODULES = _key(
    "_modules",
    why="every call reads the children by name",
    public="Module.named_children(), a generator that leaves out repeated children",
    without="the layer runs its children one by one, as nn.Sequential does",
)
LOAD_STATE_DICT_PRE_HOOKS = _key(
    "_load_state_dict_pre_hooks",
    why="such a hook refers to its module, and `from_sequential` and `fuse` would lose it",
    public="none",
    without="`from_sequential` and `fuse` lose such a hook",
)

_global_hooks = [
    _find(
        f"torch.nn.modules.module._global_{kind}_hooks",
        why="a hook for all modules has to run for the children",
        without="the layer runs its children one by one, as nn.Sequential does",
    )
    for kind in ("forward", "forward_pre", "backward", "backward_pre")
]
# If one is missing, there may be hooks, and the nonempty tuple says so.
(
    GLOBAL_FORWARD_HOOKS,
    GLOBAL_FORWARD_PRE_HOOKS,
    GLOBAL_BACKWARD_HOOKS,
    GLOBAL_BACKWARD_PRE_HOOKS,
) = (("unknown",) if hooks is None else hooks for hooks in _global_hooks)

#: Attributes that a module has if somebody has replaced the way it is called.
CALL_IMPL = "_call_impl"
COMPILED_CALL_IMPL = "_compiled_call_impl"
#: The method of a class of modules that `__call__` calls.
call_impl_of: Callable[[Any], Any] = (
    attrgetter(CALL_IMPL)
    if _find(
        f"torch.nn.Module.{CALL_IMPL}",
        why="tools replace it to see every call of a module",
        public="Module.__call__, which is checked too",
        without="a tool that replaces its successor does not see the children's calls",
    )
    is not None
    else _zero
)


def children_of(module: torch.nn.Module) -> Mapping[str, Any]:
    """The children of a module by name. Too slow for every call of a network."""
    children: Mapping[str, Any] | None = module.__dict__.get(MODULES)
    return dict(module.named_children()) if children is None else children


def parameters_of(module: torch.nn.Module) -> dict[str, torch.nn.Parameter | None]:
    """A module's own parameters by name. Too slow for every call of a network."""
    found: dict[str, torch.nn.Parameter | None] | None = module.__dict__.get(PARAMETERS)
    return dict(module.named_parameters(recurse=False)) if found is None else found


def set_parameter(module: torch.nn.Module, name: str, parameter: torch.nn.Parameter) -> None:
    """Replaces a parameter, whatever its present type."""
    parameters_of(module)[name] = parameter
    if PARAMETERS not in module.__dict__:
        setattr(module, name, parameter)


# -- Graphs: torch.compile, torch.export, TorchScript --------------------------------------------

#: The state of a TorchScript trace; None outside of a trace.
get_tracing_state: Callable[[], Any] = _find(
    "torch._C._get_tracing_state",
    why="every call checks this",
    public="torch.jit.is_tracing, a Python function",
    without="every call takes a little longer",
) or (lambda: torch.jit.is_tracing() or None)  # type: ignore[attr-defined]

#: Public, but PyTorch's types do not say so.
is_scripting: Callable[[], bool] = torch.jit.is_scripting  # type: ignore[attr-defined]

_copy_to_script_wrapper = _find(
    "torch._jit_internal._copy_to_script_wrapper",
    why="it lets a scripted module be sliced, like a scripted nn.Sequential",
    without="a scripted module can't be sliced",
)


def copy_to_script_wrapper(method: _Function) -> _Function:
    """A decorator: the scripted module has this method too."""
    return method if _copy_to_script_wrapper is None else _copy_to_script_wrapper(method)


_can_mark_constants = _listed(
    "torch._dynamo: function._dynamo_marked_constant",
    why="`torch.compile` treats the results of functions with this mark as constants",
    public="torch.compiler.assume_constant_result, which imports the compiler",
    without="`import relu_mlp` takes longer",
)


def constant_in_a_graph(function: _Function) -> _Function:
    """`torch.compiler.assume_constant_result` without importing the compiler.

    A compiled function does not compare in every call what this function has read.
    """
    if not _can_mark_constants:
        return torch.compiler.assume_constant_result(function)
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


class _NoTensor:
    """A type that no tensor has."""


#: The type that torch.export uses instead of Tensor.
FakeTensor: Any = (
    _find(
        "torch._subclasses.FakeTensor",
        why="torch.export with `backend('extension')` keeps the operator in the program",
        without="torch.export always makes a program of PyTorch's own layers",
    )
    or _NoTensor
)

_can_see_inductor = _listed(
    "torch._inductor.virtualized.V.real_inputs",
    why="a graph that Inductor writes in C++ needs special operators",
    without="AOTInductor and `cpp_wrapper` can't serve the operators",
)


def inductor_writes_cpp() -> bool:
    """Whether Inductor is running and will write C++."""
    virtualized = sys.modules.get("torch._inductor.virtualized")  # absent until it is used
    if virtualized is None or not _can_see_inductor:
        return False
    try:
        return torch._inductor.config.cpp_wrapper and not isinstance(
            virtualized.V.real_inputs, virtualized.NullHandler
        )
    except AttributeError:
        return False


# -- Tensors -------------------------------------------------------------------------------------

_is_zerotensor = _find(
    "torch.Tensor._is_zerotensor",
    why="such a tensor has no storage by its nature",
    without="a tensor whose storage was freed is not refused in Python",
)
_is_functional_tensor = _find(
    "torch._is_functional_tensor",
    why="such a tensor has no storage by its nature",
    without="a tensor whose storage was freed is not refused in Python",
)


def has_no_storage_by_nature(tensor: Tensor) -> bool:
    """Whether a tensor has, or may have, no storage although nothing has freed it."""
    return (
        _is_zerotensor is None
        or _is_functional_tensor is None
        or is_functorch_wrapped_tensor is None
        or tensor.is_meta
        or _is_zerotensor(tensor)
        or _is_functional_tensor(tensor)
        or is_functorch_wrapped_tensor(tensor)
    )


def _copy_in_shape(tensor: Tensor, shape: list[int]) -> Tensor:
    return tensor.reshape(shape).clone()


#: A tensor in another shape. Autograd does not treat it as a view, so it may be changed in place.
unsafe_view: Callable[[Tensor, list[int]], Tensor] = (
    _find(
        "torch.ops.aten._unsafe_view",
        why="the output of the reference may be changed in place, like that of nn.Linear",
        public="Tensor.clone of a view, which copies the output",
        without="the reference copies the output of an input that is not 2-dimensional",
    )
    or _copy_in_shape
)


# -- torch.distributed, which only relu_mlp.parallel imports -------------------------------------

_listed(
    "torch.distributed.tensor.parallel.ParallelStyle._apply",
    why="`parallelize_module` calls it",
    public="none; the class is public, but its only method is not",
    without="`ReluMLPParallel().apply(module, mesh)` shards a network; `parallelize_module` can't",
)
#: The name of the method that `parallelize_module` calls.
APPLY_PARALLEL_STYLE = "_apply"


# -- Optimizers and the hooks of parameters --------------------------------------------------------

_STEP_HOOKS = {
    "why": "`TrainingStep` must not pass over a hook of the optimizer",
    "without": "`TrainingStep` calls the optimizer's own step",
}
GLOBAL_OPTIMIZER_HOOKS = [
    _find(f"torch.optim.optimizer._global_optimizer_{kind}_hooks", **_STEP_HOOKS)
    for kind in ("pre", "post")
]
#: Keys of the `__dict__` of an optimizer.
OPTIMIZER_HOOKS = [
    name if _listed(f"torch.optim.SGD(...).{name}", **_STEP_HOOKS) else ""
    for name in ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")
]


def has_optimizer_hooks(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a step of this optimizer runs hooks, or may run some."""
    state = vars(optimizer)
    return any(hooks is None or hooks for hooks in GLOBAL_OPTIMIZER_HOOKS) or any(
        state.get(name, "unknown") for name in OPTIMIZER_HOOKS
    )


_PARAMETER_HOOKS = tuple(
    name
    for name in ("_backward_hooks", "_post_accumulate_grad_hooks")
    if _find(
        f"torch.Tensor.{name}",
        why="`TrainingStep` must not pass over a hook of a parameter",
        without="`TrainingStep` calls the optimizer's own step",
    )
    is not None
)
#: The dicts of a parameter's hooks, or None for each. They may be empty.
get_parameter_hooks: Callable[[Tensor], Any] = (
    attrgetter(*_PARAMETER_HOOKS) if len(_PARAMETER_HOOKS) == 2 else lambda parameter: ("unknown",)
)

_COUNTED_STEP = (
    "_wrapped_by_lr_sched"
    if _listed(
        "torch.optim.lr_scheduler.LRScheduler(...).optimizer.step._wrapped_by_lr_sched",
        why="a scheduler replaces the optimizer's step by a function that counts its calls",
        without="`TrainingStep` calls the optimizer's own step where there is a scheduler",
    )
    else ""
)


def is_step_replaced(optimizer: torch.optim.Optimizer) -> bool:
    """Whether somebody other than a scheduler has replaced a method that a step calls."""
    own, kind = vars(optimizer), type(optimizer)
    step = own.get("step")
    if "zero_grad" in own or not (_is_by_pytorch(kind.step) and _is_by_pytorch(kind.zero_grad)):
        return True
    # `functools.wraps` copies the attribute to the wrappers of others.
    return step is not None and not (
        hasattr(step, _COUNTED_STEP) and getattr(step, "__wrapped__", None) is kind.step
    )


@functools.cache
def _is_by_pytorch(function: Any) -> bool:
    """Whether a function, and everything that it wraps, is PyTorch's own."""
    home = str(getattr(function, "__globals__", {}).get("__name__"))
    inner = getattr(function, "__wrapped__", None)
    return home.startswith("torch.") and (inner is None or _is_by_pytorch(inner))


def count_step(optimizer: torch.optim.Optimizer) -> None:
    """Tells a scheduler that a step was done. It warns if there was none."""
    if "step" in vars(optimizer):
        optimizer._opt_called = True  # type: ignore[attr-defined]
