"""Everything between the package and ``torch.ops.relu_mlp``.

Loading the library, the fake kernels, the guards of the raw operators, and
the choice of the implementation that serves a call.
"""

from __future__ import annotations

import functools
import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Protocol

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch._C._functorch import peek_interpreter_stack
from torch.fx.experimental.proxy_tensor import ProxyTorchDispatchMode
from torch.nn import Parameter

from . import checks, reference

#: csrc/ops.cpp has the same schemas. They are needed here only where the
#: library is not, so that the operators exist all the same.
SCHEMAS = (
    'relu_mlp(Tensor x, Tensor[] weights, Tensor[] biases, str output_activation="none") -> Tensor',
    "forward(Tensor x, Tensor[] weights, Tensor[] biases, "
    "str output_activation, bool save_hidden) -> (Tensor, Tensor[])",
    "backward(Tensor grad_output, Tensor[] saved, str output_activation, str needs) -> Tensor[]",
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
    "_recompute_backward_in_cpp(Tensor grad_output, Tensor x, Tensor[] weights, "
    "Tensor[] biases, str output_activation, str needs) -> Tensor[]",
    "_loss_and_grads_in_cpp(Tensor x, Tensor target, Tensor[] weights, "
    "Tensor[] biases, str loss, str output_activation) -> Tensor[]",
    "_build_info() -> str",
    "_instruction_set() -> int",
    "_supported_instruction_sets() -> str",
    "_choose_instruction_set(str name) -> ()",
    "_plan(int rows, int[] widths, str dtype, str instruction_set, str family, "
    "bool has_half_arithmetic) -> str",
    "_cuda_plan(int rows, int[] widths, int element_size, bool is_backward, "
    "bool recompute, int[] device) -> str",
    "_is_for_cublaslt(int rows, int in_features, int out_features, "
    "int input_ld, int output_ld, int element_size, bool aligned) -> bool",
    "_cuda_columns(int rows, int cols, int element_size, int[] device) -> int[]",
    "_cuda_columns_at_once(int rows, int cols, bool recompute, int[] device) -> int",
)

REMEDY = (
    "Build it where PyTorch 2.11 or newer and a C++20 compiler are installed: "
    "`pip install --no-build-isolation .` in a checkout of relu_mlp, "
    "or `python setup.py build_ext --inplace` to use the checkout itself."
)

#: The types of ordinary tensors; a subclass may mean anything.
PLAIN = frozenset({Tensor, Parameter})


def _make_no_tensor() -> Tensor:
    """An ordinary tensor without elements, wherever the first import happens.

    A functorch transform or a mode that is in force would make it one of its own kind. All of
    them belong to a thread, and a new thread has none.
    """
    made: list[Tensor] = []
    thread = threading.Thread(
        target=lambda: made.append(torch.empty(0, dtype=torch.float32, device="cpu"))
    )
    thread.start()
    thread.join()
    return made[0]


#: Stands in an operator's arguments for a tensor that is missing.
NO_TENSOR = _make_no_tensor()


def stand_ins(biases: Sequence[Tensor]) -> Sequence[Tensor]:
    """The biases as an operator takes them in the modes that are in force.

    A FakeTensorMode refuses the real `NO_TENSOR`, and gets one of its own.
    """
    if _get_dispatch_mode(_FAKE) is None:
        return biases
    return [torch.empty(0) if bias is NO_TENSOR else bias for bias in biases]


_get_dispatch_mode, _FAKE = torch._C._get_dispatch_mode, torch._C._TorchDispatchModeKey.FAKE

#: Suspends the Autograd keys. The Function holds it while it calls the raw
#: operators, which lets it past the guards registered below.
below_autograd = torch._C._AutoDispatchBelowAutograd
_nothing = nullcontext()

_is_grad_enabled = torch.is_grad_enabled


# -- Loading ----------------------------------------------------------------


def _load_library() -> tuple[Path | None, str | None]:
    """The library's path, or why there is none.

    Where the process has the operators already, this copy of the library serves nothing
    (csrc/ops.cpp), and what is there is used, if it is the same.
    """
    folder = Path(__file__).parent
    found = sorted(folder.glob("_C*.so")) + sorted(folder.glob("_C*.pyd"))
    problem = f"it was not built: there is no _C.abi3.so in {folder}"
    if found:
        try:
            torch.ops.load_library(found[0])
            problem = "its operators were defined in this process before it could be loaded"
        except (OSError, RuntimeError) as error:
            problem = f"{found[0].name} could not be loaded: {error}"
    if _are_defined():
        for text in SCHEMAS:
            _check_schema(torch._C.parse_schema(f"relu_mlp::{text}"), folder)
        if found and torch._C._dispatch_has_kernel_for_dispatch_key("relu_mlp::forward", "CPU"):
            return found[0], None
    return None, problem


def _are_defined() -> bool:
    return torch._C._dispatch_has_kernel("relu_mlp::forward")


def _check_schema(expected: Any, folder: Path) -> None:
    there = "missing"
    if torch._C._dispatch_has_kernel(expected.name):
        there = str(torch._C._get_schema(expected.name, ""))
    if there == str(expected):
        return
    raise ImportError(
        f"the package in {folder} needs the operator {expected}, and the one in this process is "
        f"{there}. Its library was built from another version of relu_mlp, or is loaded from "
        "elsewhere. Build it anew, or load one version alone in a process."
    )


LIBRARY_PATH, LIBRARY_PROBLEM = _load_library()

#: Whether the library has kernels for CUDA.
HAS_CUDA = LIBRARY_PATH is not None and torch._C._dispatch_has_kernel_for_dispatch_key(
    "relu_mlp::forward", "CUDA"
)


# -- What there is once in a process --------------------------------------------
#
# The operators belong to the process. The package may be imported again, after it left
# `sys.modules` or from another place, while objects of the first import live on. So what
# the operators need lies beside them, and the last import serves them.


class _Thread(threading.local):
    """What `backend` has set in a thread, and to begin with the environment's choice."""

    backend = os.environ.get("RELU_MLP_BACKEND", "auto")

    def __init__(self) -> None:
        self.outer: list[str] = []  #: what to go back to, innermost last


class _Process:
    """What outlives an import, as an attribute of `torch.ops.relu_mlp`."""

    def __init__(self) -> None:
        self.thread = _Thread()
        self.definitions = torch.library.Library("relu_mlp", "FRAGMENT")
        #: The kernels that a module of the package has registered, by its name.
        self.kernels: dict[str, torch.library.Library] = {}
        #: The operators as PyTorch has them, before `_lead_straight_down`.
        self.calls: dict[str, Callable[..., Any]] = {}


def _process() -> _Process:
    found: _Process | None = vars(torch.ops.relu_mlp).get("_package")
    if found is None:
        found = _Process()
        vars(torch.ops.relu_mlp)["_package"] = found
        if not _are_defined():
            for schema in SCHEMAS:
                found.definitions.define(schema)
    return found


_here = _process()
_thread = _here.thread


def kernels_of(module: str) -> torch.library.Library:
    """Where a module registers its kernels. Those that it registered before are gone."""
    module = module.rpartition(".")[2]
    if module in _here.kernels:
        _here.kernels[module]._destroy()
    _here.kernels[module] = torch.library.Library("relu_mlp", "FRAGMENT")
    return _here.kernels[module]


_library = kernels_of(__name__)


# -- The implementations ------------------------------------------------------


class Implementation(Protocol):
    """What serves a call: functions with the signatures of the operators."""

    @property
    def relu_mlp(self) -> Callable[..., Tensor]: ...
    @property
    def forward(self) -> Callable[..., tuple[Tensor, list[Tensor]]]: ...
    @property
    def backward(self) -> Callable[..., list[Tensor]]: ...
    @property
    def recompute_backward(self) -> Callable[..., list[Tensor]]: ...
    @property
    def loss_and_grads(self) -> Callable[..., tuple[Tensor, list[Tensor]]]: ...


def raising_out_of_memory(call: Callable[..., Any]) -> Callable[..., Any]:
    """`call`, but a GPU's want of memory is a torch.OutOfMemoryError, as natively.

    The library's RuntimeError has PyTorch's words: the C interface hands on no classes.
    """

    def called(*arguments: Any) -> Any:
        try:
            return call(*arguments)
        except RuntimeError as error:
            if str(error).startswith("CUDA out of memory"):
                raise torch.OutOfMemoryError(*error.args) from None
            raise

    return called


def _original(name: str) -> Callable[..., Any]:
    """An operator as PyTorch has it, before `_lead_straight_down`."""
    return _here.calls.setdefault(name, getattr(torch.ops.relu_mlp, name).default._op)


def _op_of(name: str) -> Any:
    """What `OpOverload.__call__` calls; to name it saves a microsecond."""
    call = _original(name)
    return staticmethod(raising_out_of_memory(call)) if HAS_CUDA else call


class Extension:
    """The operators of the library."""

    relu_mlp = _op_of("relu_mlp")
    forward = _op_of("forward")
    backward = _op_of("backward")
    recompute_backward = _op_of("recompute_backward")
    loss_and_grads = _op_of("loss_and_grads")


extension = Extension()

BACKENDS = ("auto", "extension", "reference")


_said_missing = False


class backend:
    """Chooses the implementation of the operators, for the calling thread.

    A context manager, and a decorator of functions::

        with relu_mlp.backend("reference"):
            y = net(x)

    A backward pass uses the implementation that its forward pass used. The
    environment variable RELU_MLP_BACKEND, read at import, is the default for
    all threads.

    Args:
        name: ``"extension"``: the compiled library; RuntimeError where it is
            absent or can't serve the device. Around `torch.export` or a trace it puts the
            operator into the graph, not the layers. ``"reference"``: the same
            mathematics in Python. ``"auto"``: the extension where it can serve
            the call, and the reference elsewhere.

    Raises:
        ValueError: for any other name.
    """

    def __init__(self, name: Literal["auto", "extension", "reference"]) -> None:
        self.name = _checked_backend(name, "name")

    def __enter__(self) -> backend:
        _thread.outer.append(_thread.backend)
        _thread.backend = self.name
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        _thread.backend = _thread.outer.pop()

    def __call__(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            with backend(self.name):  # type: ignore[arg-type]
                return function(*args, **kwargs)

        return wrapped


def _checked_backend(name: str, argument: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{argument} must be 'auto', 'extension' or 'reference', got {name!r}")
    return name


def current_backend() -> str:
    """The name that is in force in this thread."""
    return _checked_backend(_thread.backend, "RELU_MLP_BACKEND")


def implementation_for(x: Tensor) -> Implementation:
    """What serves a call on the device of `x`, under the backend in force."""
    if x is None:  # an operator takes it for a tensor, as PyTorch's own do
        raise TypeError("the first argument must be a Tensor, got None")
    name = _thread.backend
    if name == "auto" or name == "extension":
        if LIBRARY_PATH is not None and (x.is_cpu or (HAS_CUDA and x.is_cuda)):
            return extension
        if name == "extension":
            reason = LIBRARY_PROBLEM or f"it has no kernels for the device {x.device}"
            raise RuntimeError(f"relu_mlp's extension can't serve this call: {reason}. {REMEDY}")
        if LIBRARY_PATH is None:
            _say_missing()
    else:
        _checked_backend(name, "RELU_MLP_BACKEND")
    return reference


@contextmanager
def using(implementation: Implementation) -> Iterator[None]:
    """`backend` with the name of an implementation, for a call through the dispatcher."""
    outer, _thread.backend = (
        _thread.backend,
        "reference" if implementation is reference else "extension",
    )
    try:
        yield
    finally:
        _thread.backend = outer


def _say_missing() -> None:
    global _said_missing
    if not _said_missing:
        _said_missing = True
        warnings.warn(
            f"relu_mlp runs in Python, without its C++ extension: {LIBRARY_PROBLEM}. {REMEDY} "
            'RELU_MLP_BACKEND="reference" chooses Python and silences this.',
            UserWarning,
            stacklevel=4,
        )


# -- Fake kernels: shapes and dtypes without values ---------------------------


@torch.library.register_fake("relu_mlp::forward", lib=_library)
def _fake_forward(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    output_activation: str,
    save_hidden: bool,
) -> tuple[Tensor, list[Tensor]]:
    checks.check_layers(x, weights, biases)
    checks.check_name("output_activation", output_activation, reference.ACTIVATIONS)
    y = x.new_empty(*x.shape[:-1], weights[-1].shape[0])
    rows = reference.as_matrix(x).shape[0]
    hidden = [x.new_empty(rows, weight.shape[0]) for weight in weights[:-1] if save_hidden]
    return y, hidden


@torch.library.register_fake("relu_mlp::relu_mlp", lib=_library)
def _fake_relu_mlp(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    output_activation: str = "none",
) -> Tensor:
    checks.check_layers(x, weights, biases)
    checks.check_name("output_activation", output_activation, reference.ACTIVATIONS)
    return x.new_empty(*x.shape[:-1], weights[-1].shape[0])


@torch.library.register_fake("relu_mlp::backward", lib=_library)
def _fake_backward(
    grad_output: Tensor, saved: Sequence[Tensor], output_activation: str, needs: str
) -> list[Tensor]:
    return [
        grad.new_empty(grad.shape)
        for grad in reference.backward(grad_output, saved, output_activation, needs)
    ]


@torch.library.register_fake("relu_mlp::recompute_backward", lib=_library)
def _fake_recompute_backward(
    grad_output: Tensor,
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    output_activation: str,
    needs: str,
) -> list[Tensor]:
    return [
        grad.new_empty(grad.shape)
        for grad in reference.recompute_backward(
            grad_output, x, weights, biases, output_activation, needs
        )
    ]


@torch.library.register_fake("relu_mlp::loss_and_grads", lib=_library)
def _fake_loss_and_grads(
    x: Tensor,
    target: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    loss: str,
    output_activation: str,
) -> tuple[Tensor, list[Tensor]]:
    checks.check_layers(x, weights, biases)
    checks.check_name("output_activation", output_activation, reference.ACTIVATIONS)
    output_shape = torch.Size([*x.shape[:-1], weights[-1].shape[0]])
    checks.check_like_output("target", target, x, output_shape)
    checks.check_name("loss", loss, reference.LOSSES)
    return x.new_empty(()), [p.new_empty(p.shape) for p in [*weights, *biases]]


# -- Straight to the kernel ----------------------------------------------------


def _lead_straight_down(name: str) -> None:
    """Lets calls from Python pass by the Autograd kernel where it would find nothing to do.

    A compiled graph calls its operators in that state. The Autograd kernel is written in
    Python, and the way through it takes as long as a small network.
    """
    operator = getattr(torch.ops.relu_mlp, name).default
    call = _original(name)
    if operator._op is not call:  # an earlier import has done it
        return

    def below_autograd_if_idle(*arguments: Any, **named: Any) -> Any:
        is_idle = (
            not _is_grad_enabled()
            and forward_ad._current_level < 0
            and arguments
            and type(arguments[0]) in PLAIN  # not so where a graph is recorded
        )
        # In one line for both: `torch.jit.trace` writes its number into the graph, and compares
        # the graph with that of a second trace, made without gradients.
        with below_autograd() if is_idle else _nothing:
            return call(*arguments, **named)

    operator._op = below_autograd_if_idle


for _name in ("relu_mlp", "forward", "backward"):
    _lead_straight_down(_name)


# -- Devices that the library has no kernels for: the reference ----------------


_library.impl("relu_mlp", reference.relu_mlp, "CompositeExplicitAutograd")
_library.impl("forward", reference.forward, "CompositeExplicitAutograd")
_library.impl("backward", reference.backward, "CompositeExplicitAutograd")
_library.impl("recompute_backward", reference.recompute_backward, "CompositeExplicitAutograd")
_library.impl("loss_and_grads", reference.loss_and_grads, "CompositeExplicitAutograd")
# torch.autograd.grad(is_grads_batched=True) has a vmap of its own, older than torch.func's. It
# takes no rules in Python, but knows PyTorch's operators.
for _name in ("relu_mlp", "forward", "backward", "recompute_backward"):
    _library.impl(_name, getattr(reference, _name), "Batched")
for _name in ("_build_info", "_supported_instruction_sets"):
    _key = "CompositeExplicitAutograd"
    if not torch._C._dispatch_has_kernel_for_dispatch_key(f"relu_mlp::{_name}", _key):
        _library.impl(_name, lambda: "", _key)


# -- Guards: a raw operator has no derivative and must not seem to have one ----


def _tensors_in(arguments: Iterable[Any]) -> Iterator[Tensor]:
    for argument in arguments:
        if isinstance(argument, Tensor):
            yield argument
        elif isinstance(argument, (list, tuple)):
            yield from _tensors_in(argument)


def carries_tangent(*arguments: Any) -> bool:
    """Whether a tensor among the arguments carries a forward-mode tangent."""
    # Level 0 is the only one. A graph that is being compiled enters it without the knowledge
    # of `forward_ad`, but its tensors are wrapped or are no plain ones.
    if forward_ad._current_level < 0 and peek_interpreter_stack() is None and _are_plain(arguments):
        return False
    return any(
        forward_ad.unpack_dual(tensor, level=0).tangent is not None
        for tensor in _tensors_in(arguments)
    )


def _are_plain(arguments: Iterable[Any]) -> bool:
    for argument in arguments:
        if isinstance(argument, (list, tuple)):
            if not PLAIN.issuperset(map(type, argument)):
                return False
        elif isinstance(argument, Tensor) and type(argument) not in PLAIN:
            return False
    return True


def is_differentiated(*arguments: Any) -> bool:
    """Whether a tensor among the arguments needs a gradient or carries a tangent."""
    return (
        torch.is_grad_enabled() and any(t.requires_grad for t in _tensors_in(arguments))
    ) or carries_tangent(*arguments)


def _guard(name: str) -> Callable[..., Any]:
    operator = getattr(torch.ops.relu_mlp, name).default

    def guarded(*arguments: Any) -> Any:
        if is_differentiated(*arguments):
            raise RuntimeError(
                f"relu_mlp::{name} has no derivative, and an argument needs a gradient or "
                "carries a tangent. Call torch.ops.relu_mlp.relu_mlp or relu_mlp.relu_mlp, "
                "which are differentiable, or detach the arguments."
            )
        with below_autograd():
            return operator(*arguments)

    return guarded


for _name in ("recompute_backward", "loss_and_grads"):
    _library.impl(_name, _guard(_name), "Autograd")


# -- Graphs that Inductor writes in C++: AOTInductor, cpp_wrapper --------------


def _as_list(function: Callable[..., tuple[Tensor, list[Tensor]]]) -> Callable[..., list[Tensor]]:
    """With the tensor at the head of the list."""

    def as_list(*arguments: Any) -> list[Tensor]:
        first, others = function(*arguments)
        return [first, *others]

    return as_list


def _is_written_in_cpp() -> bool:
    """Whether Inductor is at work, and will write C++."""
    inductor = sys.modules.get("torch._inductor.virtualized")  # if it was never imported, not
    return (
        inductor is not None
        and torch._inductor.config.cpp_wrapper
        and not isinstance(inductor.V.real_inputs, inductor.NullHandler)
    )


def _in_cpp(
    mode: ProxyTorchDispatchMode,
    operator: torch._ops.OpOverload[..., Any],
    types: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any] | None,
) -> Any:
    """What records a call in a graph. If that will be C++, another operator takes its place.

    It has no kernel in Python (csrc/boxed.h says why), and no derivative: below autograd,
    where this runs, there is none left to ask for.
    """
    if not _is_written_in_cpp():
        return mode.__torch_dispatch__(operator, types, args, kwargs)
    name = operator._schema.name.removeprefix("relu_mlp::")
    in_cpp = getattr(torch.ops.relu_mlp, f"_{name}_in_cpp").default
    results: Any = mode.__torch_dispatch__(in_cpp, types, args, kwargs)
    return (results[0], results[1:]) if len(operator._schema.returns) == 2 else results


for _name, _kernel, _fake in (
    ("relu_mlp", reference.relu_mlp, _fake_relu_mlp),
    ("forward", _as_list(reference.forward), _as_list(_fake_forward)),
    ("backward", reference.backward, _fake_backward),
    ("recompute_backward", reference.recompute_backward, _fake_recompute_backward),
    ("loss_and_grads", _as_list(reference.loss_and_grads), _as_list(_fake_loss_and_grads)),
):
    _library.impl(f"_{_name}_in_cpp", _kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"relu_mlp::_{_name}_in_cpp", _fake, lib=_library)
    torch.library.register_torch_dispatch(
        f"relu_mlp::{_name}", ProxyTorchDispatchMode, _in_cpp, lib=_library
    )
