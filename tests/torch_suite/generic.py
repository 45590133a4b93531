"""PyTorch's generic tests of operators and modules, for our entries and their controls.

The wheel of PyTorch brings the machinery: OpInfo and ModuleInfo, `TestGradients`,
`NewModuleTest`, the checks of composite compliance, of opcheck and of AOTAutograd, and the
modes for fake tensors and schemas. The tests below call each of them for every entry. (The
files of PyTorch's own `test` folder do the same for PyTorch's operators and are not part of
a wheel.)
"""

from __future__ import annotations

import copy
import io
import itertools
import pickle

import torch
from torch import nn
from torch._subclasses import CrossRefFakeMode, FakeTensorMode
from torch._subclasses.schema_check_mode import SchemaCheckMode
from torch.func import functional_call, functionalize, jvp, vjp, vmap
from torch.nn.utils._per_sample_grad import call_for_per_sample_grads
from torch.testing._internal import common_utils, composite_compliance
from torch.testing._internal.common_device_type import OpDTypes, instantiate_device_type_tests, ops
from torch.testing._internal.common_dtype import all_types_and_complex_and
from torch.testing._internal.common_jit import JitCommonTestCase, check_against_reference
from torch.testing._internal.common_modules import modules
from torch.testing._internal.common_nn import NewModuleTest, NNTestCase
from torch.testing._internal.common_subclass import (
    NonWrapperTensor,
    WrapperTensorWithCustomSizes,
    WrapperTensorWithCustomStrides,
)
from torch.testing._internal.common_utils import TestCase, TestGradients, gradcheck, gradgradcheck
from torch.testing._internal.jit_metaprogramming_utils import create_traced_fn
from torch.testing._internal.optests import aot_autograd_check, fake_check, make_fx_check
from torch.utils import _pytree as pytree

from entries import MODULES, OPS, Control, by_native

# What the command line of PyTorch's test runner sets.
common_utils.GRAPH_EXECUTOR = common_utils.ProfilingMode.PROFILING

ALL_DTYPES = all_types_and_complex_and(torch.bool, torch.bfloat16, torch.float16)
DOUBLE, SINGLE = (torch.float64,), (torch.float32,)


def arguments_of(sample):
    return (sample.input, *sample.args), sample.kwargs


def tensors_of(sample):
    """The tensors of a sample, and a function of them alone."""
    arguments, named = arguments_of(sample)
    at = [n for n, argument in enumerate(arguments) if isinstance(argument, torch.Tensor)]

    def with_tensors(op):
        def function(*tensors):
            full = list(arguments)
            for n, tensor in zip(at, tensors, strict=True):
                full[n] = tensor
            return op(*full, **named)

        return function

    return [arguments[n] for n in at], with_tensors


class TestOps(JitCommonTestCase):
    @ops(OPS, allowed_dtypes=DOUBLE)
    def test_equals_the_native_code(self, device, dtype, op):
        for sample in op.sample_inputs(device, dtype, requires_grad=True):
            arguments, named = arguments_of(sample)
            tensors = [a for a in arguments if isinstance(a, torch.Tensor)]
            y, expected = op(*arguments, **named), by_native(*arguments, **named)
            self.assertEqual(y, expected)
            self.assertEqual(y.stride(), expected.stride())
            g = torch.randn_like(y)
            self.assertEqual(
                torch.autograd.grad(y, tensors, g), torch.autograd.grad(expected, tensors, g)
            )

    @ops([op for op in OPS if op.name == "relu_mlp"], dtypes=OpDTypes.none)
    def test_dtypes(self, device, op):
        """A dtype works, forward and backward, exactly where it works natively."""

        def works(function, dtype):
            x = torch.ones(4, 3).to(dtype)
            parameters = [torch.ones(5, 3).to(dtype), torch.ones(5).to(dtype)]
            needs = dtype.is_floating_point or dtype.is_complex
            try:
                y = function(x.requires_grad_(needs), *parameters, parameters[0].mT, None)
                if needs:
                    y.sum().backward()
            except (RuntimeError, NotImplementedError):
                return False
            return True

        for dtype in ALL_DTYPES:
            self.assertEqual(works(op, dtype), works(by_native, dtype), msg=str(dtype))

    @ops(OPS, allowed_dtypes=DOUBLE)
    def test_noncontiguous_samples(self, device, dtype, op):
        for sample in op.sample_inputs(device, dtype, requires_grad=True):
            other = sample.noncontiguous()
            results = []
            for each in (sample, other):
                tensors, with_tensors = tensors_of(each)
                y = with_tensors(op)(*tensors)
                results.append((y, torch.autograd.grad(y, tensors, torch.ones_like(y))))
            self.assertEqual(*results)

    @ops(OPS, allowed_dtypes=DOUBLE)
    def test_neg_view(self, device, dtype, op):
        for sample in op.sample_inputs(device, dtype, requires_grad=True):
            tensors, with_tensors = tensors_of(sample)
            lazy = [torch._neg_view(-t.detach()).requires_grad_() for t in tensors]
            results = []
            for each in (tensors, lazy):
                y = with_tensors(op)(*each)
                results.append((y, torch.autograd.grad(y, each, torch.ones_like(y))))
            self.assertEqual(*results)

    @ops(OPS, allowed_dtypes=SINGLE)
    def test_cow_input(self, device, dtype, op):
        """Copy-on-write inputs are read without a copy, forward and backward."""
        for sample in op.sample_inputs(device, dtype, requires_grad=True):
            tensors, with_tensors = tensors_of(sample)
            lazy = [torch._lazy_clone(t.detach()).requires_grad_() for t in tensors]
            y = with_tensors(op)(*lazy)
            torch.autograd.grad(y, lazy, torch._lazy_clone(torch.ones_like(y)))
            for t in lazy:
                if t.numel():
                    self.assertTrue(torch._C._is_cow_tensor(t), "an input was copied")

    @ops(OPS, allowed_dtypes=SINGLE)
    def test_inputs_are_left_alone(self, device, dtype, op):
        for sample in op.sample_inputs(device, dtype):
            tensors, with_tensors = tensors_of(sample)
            versions = [t._version for t in tensors]
            copies = [t.clone() for t in tensors]
            y = with_tensors(op)(*tensors)
            self.assertEqual(tensors, copies)
            self.assertEqual([t._version for t in tensors], versions)
            self.assertFalse(y._is_view())

    @ops(OPS, allowed_dtypes=SINGLE)
    def test_errors(self, device, dtype, op):
        for error in op.error_inputs(device):
            arguments, named = arguments_of(error.sample_input)
            with self.assertRaises(error.error_type, msg=error.sample_input.name):
                op(*arguments, **named)

    @ops(OPS, allowed_dtypes=SINGLE)
    def test_inference_mode_and_no_grad(self, device, dtype, op):
        for sample in op.sample_inputs(device, dtype, requires_grad=True):
            tensors, with_tensors = tensors_of(sample)
            y = with_tensors(op)(*tensors)
            for mode in (torch.no_grad, torch.inference_mode):
                with mode():
                    quiet = with_tensors(op)(*tensors)
                self.assertEqual(y.detach(), quiet)
                self.assertFalse(quiet.requires_grad)
            with torch.inference_mode():
                copies = [t.clone() for t in tensors]
            self.assertEqual(y.detach(), with_tensors(op)(*copies))

    @ops(OPS, allowed_dtypes=(torch.float32, torch.float64))
    def test_autocast(self, device, dtype, op):
        for sample in op.sample_inputs(device, dtype, requires_grad=True):
            arguments, named = arguments_of(sample)
            results = []
            for function in (op, by_native):
                with torch.autocast("cpu", torch.bfloat16):
                    results.append(function(*arguments, **named))
            self.assertEqual(*results, exact_dtype=True)

    @ops(OPS, allowed_dtypes=SINGLE)
    def test_variant_consistency_jit(self, device, dtype, op):
        for sample in op.sample_inputs(device, dtype, requires_grad=True):
            if sample.kwargs["recompute"] or not sample.input.numel():
                continue
            arguments, named = arguments_of(sample)
            if None in arguments:
                continue  # the machinery takes no None
            check_against_reference(
                self, create_traced_fn(self, op), op, lambda x: x, arguments, named
            )

    @ops(OPS, allowed_dtypes=SINGLE)
    def test_fake(self, device, dtype, op):
        for sample in op.sample_inputs(device, dtype, requires_grad=True):
            arguments, named = arguments_of(sample)
            y = op(*arguments, **named)
            with FakeTensorMode() as mode:
                fake = pytree.tree_map_only(torch.Tensor, mode.from_tensor, arguments)
                fake_y = op(*fake, **named)
                fake_grads = torch.autograd.grad(
                    fake_y.sum(), [t for t in fake if isinstance(t, torch.Tensor)]
                )
            self.assertEqual(
                (fake_y.shape, fake_y.stride(), fake_y.dtype), (y.shape, y.stride(), y.dtype)
            )
            self.assertEqual(
                [g.shape for g in fake_grads],
                [t.shape for t in arguments if isinstance(t, torch.Tensor)],
            )
            with CrossRefFakeMode():
                op(*arguments, **named)

    @ops(OPS, allowed_dtypes=SINGLE)
    def test_meta(self, device, dtype, op):
        for sample in op.sample_inputs(device, dtype, requires_grad=True):
            arguments, named = arguments_of(sample)
            on_meta = pytree.tree_map_only(
                torch.Tensor, lambda t: t.detach().to("meta").requires_grad_(), arguments
            )
            y, meta = op(*arguments, **named), op(*on_meta, **named)
            self.assertTrue(meta.is_meta)
            self.assertEqual((meta.shape, meta.stride()), (y.shape, y.stride()))
            meta.sum().backward()

    @ops(OPS, allowed_dtypes=SINGLE)
    def test_schema(self, device, dtype, op):
        for sample in op.sample_inputs(device, dtype):
            arguments, named = arguments_of(sample)
            with SchemaCheckMode():
                op(*arguments, **named)

    @ops(OPS, allowed_dtypes=SINGLE)
    def test_make_fx(self, device, dtype, op):
        for sample in op.sample_inputs(device, dtype):
            for mode in ("real", "fake", "symbolic"):
                make_fx_check(op, *arguments_of(sample), mode, randomize_data=True)

    @ops(OPS, allowed_dtypes=SINGLE)
    def test_aot_autograd(self, device, dtype, op):
        for sample in op.sample_inputs(device, dtype, requires_grad=True):
            for dynamic in (False, True):
                aot_autograd_check(op, *arguments_of(sample), dynamic)

    @ops(OPS, allowed_dtypes=SINGLE)
    def test_functionalize(self, device, dtype, op):
        for sample in op.sample_inputs(device, dtype):
            tensors, with_tensors = tensors_of(sample)
            function = with_tensors(op)
            self.assertEqual(functionalize(function)(*tensors), function(*tensors))

    @ops(OPS, allowed_dtypes=SINGLE)
    def test_composite_compliance(self, device, dtype, op):
        for sample in op.sample_inputs(device, dtype):
            composite_compliance.check_with_mode(op, *arguments_of(sample), self.assertEqual)
            composite_compliance.check_all_permutations(op, *arguments_of(sample), self.assertEqual)

    @ops(OPS, allowed_dtypes=DOUBLE)
    def test_composite_compliance_of_the_backward_formula(self, device, dtype, op):
        for sample in op.sample_inputs(device, dtype, requires_grad=True):
            composite_compliance.check_backward_formula(
                op.get_op(), *arguments_of(sample), None, None, self.assertEqual
            )

    @ops(OPS, allowed_dtypes=DOUBLE)
    def test_composite_compliance_of_the_forward_formula(self, device, dtype, op):
        for sample in op.sample_inputs(device, dtype, requires_grad=False):
            composite_compliance.check_forward_ad_formula(
                op.get_op(), *arguments_of(sample), None, self.assertEqual
            )

    @ops(OPS, allowed_dtypes=SINGLE)
    def test_subclasses(self, device, dtype, op):
        """Wrapper subclasses, of every argument and of x alone."""
        for kind in (
            NonWrapperTensor,
            WrapperTensorWithCustomSizes,
            WrapperTensorWithCustomStrides,
        ):
            for sample in op.sample_inputs(device, dtype):
                tensors, with_tensors = tensors_of(sample)
                expected = with_tensors(op)(*tensors)
                wrapped = [kind(t) for t in tensors]
                for each in (wrapped, [wrapped[0], *tensors[1:]]):
                    y = with_tensors(op)(*each)
                    self.assertIs(type(y), kind)
                    y = y.as_subclass(torch.Tensor) if kind is NonWrapperTensor else y.t
                    self.assertEqual(y, expected)


class TestTransforms(TestCase):
    @ops(OPS, allowed_dtypes=DOUBLE)
    def test_vmap(self, device, dtype, op):
        """Every subset of arguments with a batch dimension, at the front and at the end."""
        for sample in op.sample_inputs(device, dtype):
            tensors, with_tensors = tensors_of(sample)
            function = with_tensors(op)
            for at, which in itertools.product((0, -1), subsets(len(tensors))):
                batched = [stacked(t, at) if n in which else t for n, t in enumerate(tensors)]
                dims = tuple(at if n in which else None for n in range(len(tensors)))
                expected = torch.stack(
                    [
                        function(
                            *[t.select(d, b) if d is not None else t for t, d in zip(batched, dims)]
                        )
                        for b in range(2)
                    ]
                )
                self.assertEqual(vmap(function, dims)(*batched), expected)

    @ops(OPS, allowed_dtypes=DOUBLE)
    def test_derivatives_of_derivatives(self, device, dtype, op):
        """vjp, jvp, and each of them over each, with vmap inside and outside, as natively."""
        for sample in op.sample_inputs(device, dtype):
            tensors, with_tensors = tensors_of(sample)
            self.check_derivatives(with_tensors(op), with_tensors(by_native), tensors)

    def check_derivatives(self, ours, native, tensors):
        y = native(*tensors)
        cotangent = torch.randn_like(y)
        tangents = tuple(torch.randn_like(t) for t in tensors)
        many = torch.stack([cotangent, 2 * cotangent])

        def pull(function, *tensors):
            return vjp(function, *tensors)[1](cotangent)

        def push(function, *tensors):
            return jvp(function, tensors, tangents)[1]

        def pull_pull(function, *tensors):
            _, back = vjp(lambda *t: pull(function, *t), *tensors)
            return back(tangents)

        def pull_push(function, *tensors):
            _, back = vjp(lambda *t: push(function, *t), *tensors)
            return back(cotangent)

        def push_pull(function, *tensors):
            return jvp(lambda *t: pull(function, *t), tensors, tangents)[1]

        def push_push(function, *tensors):
            return jvp(lambda *t: push(function, *t), tensors, tangents)[1]

        def vmap_pull(function, *tensors):
            return vmap(vjp(function, *tensors)[1])(many)

        def pull_vmap(function, *tensors):
            batched = vmap(function, (0, *[None] * (len(tensors) - 1)))
            x = torch.stack([tensors[0], 2 * tensors[0]])
            return vjp(batched, x, *tensors[1:])[1](many)

        def push_vmap(function, *tensors):
            batched = vmap(function, (0, *[None] * (len(tensors) - 1)))
            x = torch.stack([tensors[0], 2 * tensors[0]])
            return jvp(batched, (x, *tensors[1:]), (x, *tangents[1:]))[1]

        for of in (
            pull, push, pull_pull, pull_push, push_pull, push_push,
            vmap_pull, pull_vmap, push_vmap,
        ):  # fmt: skip
            self.assertEqual(of(ours, *tensors), of(native, *tensors), msg=of.__name__)


def subsets(count):
    """Non-empty subsets: each alone, all, and all except x."""
    return [*({n} for n in range(count)), set(range(count)), set(range(1, count))]


def stacked(tensor, dim):
    return torch.stack([tensor, 2 * tensor], dim % (tensor.dim() + 1))


class TestOpsGradients(TestGradients):
    @ops(OPS, allowed_dtypes=DOUBLE)
    def test_fn_grad(self, device, dtype, op):
        self._grad_test_helper(device, dtype, op, op.get_op())

    @ops(OPS, allowed_dtypes=DOUBLE)
    def test_fn_gradgrad(self, device, dtype, op):
        self._check_helper(device, dtype, op, op.get_op(), "bwgrad_bwgrad")

    @ops(OPS, allowed_dtypes=DOUBLE)
    def test_fn_fwgrad_bwgrad(self, device, dtype, op):
        self._check_helper(device, dtype, op, op.get_op(), "fwgrad_bwgrad")

    @ops(OPS, allowed_dtypes=DOUBLE)
    def test_forward_mode_AD(self, device, dtype, op):
        self._grad_test_helper(
            device, dtype, op, op.get_op(),
            check_forward_ad=True, check_backward_ad=False, check_batched_grad=False,
            check_batched_forward_grad=True,
        )  # fmt: skip


def each_input(module_info, device, dtype, requires_grad=False):
    """A module and its input, for every ModuleInput."""
    for entry in module_info.module_inputs_func(
        module_info, device, dtype, requires_grad=requires_grad, training=True
    ):
        torch.manual_seed(0)
        given = entry.constructor_input
        module = module_info.module_cls(*given.args, device=device, dtype=dtype, **given.kwargs)
        yield module, entry.forward_input.args[0], entry


class TestModule(TestCase):
    @modules(MODULES)
    def test_forward(self, device, dtype, module_info, training):
        for module, x, entry in each_input(module_info, device, dtype):
            self.assertEqual(module(x), entry.reference_fn(module, x))

    @modules(MODULES, allowed_dtypes=SINGLE)
    def test_factory_kwargs(self, device, dtype, module_info, training):
        for _, _, entry in each_input(module_info, device, dtype):
            given = entry.constructor_input
            for kind in (torch.float32, torch.float64):
                made = module_info.module_cls(*given.args, **given.kwargs, dtype=kind)
                self.assertTrue(all(p.dtype is kind for p in made.parameters()))
            made = module_info.module_cls(*given.args, **given.kwargs, device="meta")
            self.assertTrue(all(p.is_meta for p in made.parameters()))

    @modules(MODULES, allowed_dtypes=SINGLE)
    def test_repr(self, device, dtype, module_info, training):
        for module, _, _ in each_input(module_info, device, dtype):
            self.assertIn("Linear", repr(module))
            str(module)

    @modules(MODULES, allowed_dtypes=SINGLE)
    def test_pickle_and_copies(self, device, dtype, module_info, training):
        for module, x, _ in each_input(module_info, device, dtype):
            y = module(x)
            stream = io.BytesIO()
            torch.save(module, stream)
            stream.seek(0)
            for other in (
                copy.deepcopy(module),
                pickle.loads(pickle.dumps(module)),
                torch.load(stream, weights_only=False),
            ):
                self.assertEqual(other(x), y)
                self.assertIs(type(other), type(module))

    @modules(MODULES, allowed_dtypes=SINGLE)
    def test_state_dict(self, device, dtype, module_info, training):
        for module, x, entry in each_input(module_info, device, dtype):
            y, given = module(x), entry.constructor_input
            for assign in (False, True):
                other = module_info.module_cls(*given.args, **given.kwargs)
                other(x)
                other.load_state_dict(copy.deepcopy(module.state_dict()), assign=assign)
                self.assertEqual(other(x), y)
            control = Control(*given.args, **given.kwargs)
            control.load_state_dict(module.state_dict())
            self.assertEqual(control(x), y)

    @modules(MODULES, allowed_dtypes=SINGLE)
    def test_to(self, device, dtype, module_info, training):
        for swap in (False, True):
            before = torch.__future__.get_swap_module_params_on_conversion()
            torch.__future__.set_swap_module_params_on_conversion(swap)
            try:
                for module, x, entry in each_input(module_info, device, dtype):
                    module(x)
                    module.to(torch.float64)
                    self.assertEqual(module(x.double()), entry.reference_fn(module, x.double()))
                    module.to(dtype).requires_grad_(False)
                    self.assertEqual(module(x), entry.reference_fn(module, x))
            finally:
                torch.__future__.set_swap_module_params_on_conversion(before)

    @modules(MODULES, allowed_dtypes=SINGLE)
    def test_to_empty(self, device, dtype, module_info, training):
        for module, x, entry in each_input(module_info, device, dtype):
            given = entry.constructor_input
            other = module_info.module_cls(*given.args, **given.kwargs, device="meta")
            other.to_empty(device=device).load_state_dict(module.state_dict())
            self.assertEqual(other(x), module(x))

    @modules(MODULES, allowed_dtypes=DOUBLE)
    def test_non_contiguous_tensors(self, device, dtype, module_info, training):
        for module, x, _ in each_input(module_info, device, dtype, requires_grad=True):
            results = []
            for each in (x.detach().clone(), torch.stack([x.detach(), x.detach()], -1)[..., 0]):
                module.zero_grad()
                y = module(each.requires_grad_())
                y.backward(torch.stack([torch.ones_like(y)] * 2, -1)[..., 0])
                grads = [each.grad.clone(), *(p.grad.clone() for p in module.parameters())]
                results.append((y, grads))
            self.assertEqual(*results)

    @modules(MODULES, allowed_dtypes=DOUBLE)
    def test_grad(self, device, dtype, module_info, training):
        self.check_gradients(gradcheck, module_info, device, dtype)

    @modules(MODULES, allowed_dtypes=DOUBLE)
    def test_gradgrad(self, device, dtype, module_info, training):
        self.check_gradients(gradgradcheck, module_info, device, dtype)

    def check_gradients(self, check, module_info, device, dtype):
        for module, x, _ in each_input(module_info, device, dtype, requires_grad=True):
            names = [name for name, _ in module.named_parameters()]

            def function(x, *parameters, module=module, names=names):
                return functional_call(module, dict(zip(names, parameters, strict=True)), (x,))

            self.assertTrue(check(function, (x, *module.parameters()), check_batched_grad=True))

    @modules(MODULES, allowed_dtypes=SINGLE)
    def test_per_sample_gradients(self, device, dtype, module_info, training):
        """`call_for_per_sample_grads`, whose parameters are tensor subclasses."""
        for module, x, entry in each_input(module_info, device, dtype):
            if not x.numel() or x.dim() < 2 or entry.desc in ("tanh", "sigmoid"):
                continue  # ExpandedWeights do not take this, or lack such an operation
            call_for_per_sample_grads(module, batch_size=x.shape[0])(x).sum().backward()
            for p in module.parameters():
                summed = p.grad_sample.sum(0)
                self.assertEqual(summed.shape, p.shape)
            sums = [p.grad_sample.sum(0) for p in module.parameters()]
            module.zero_grad()
            self.assertEqual(sums, list(torch.autograd.grad(module(x).sum(), module.parameters())))

    @modules(MODULES, allowed_dtypes=SINGLE)
    def test_errors(self, device, dtype, module_info, training):
        for error in module_info.module_error_inputs_func(
            module_info, device, dtype, requires_grad=False, training=training
        ):
            given = error.module_error_input.constructor_input
            module = module_info.module_cls(*given.args, **given.kwargs)
            with self.assertRaises(error.error_type):
                module(*error.module_error_input.forward_input.args)


class TestNN(NNTestCase):
    """`NewModuleTest` of `common_nn`, which `test_nn.py` runs for the modules of PyTorch."""

    def _forward(self, module, input):
        return module(*input) if isinstance(input, tuple) else module(input)

    def _get_parameters(self, module):
        parameters = list(module.parameters())
        return parameters, [p.grad for p in parameters]

    def _zero_grad_parameters(self, module):
        module.zero_grad()

    def _backward(self, module, input, output, grad_output, create_graph=False):
        output.backward(grad_output, retain_graph=True, create_graph=create_graph)
        return None if input.grad is None else input.grad.data


def _add_module_tests():
    for info in MODULES:
        for entry in info.module_inputs_func(
            info, "cpu", torch.float32, requires_grad=False, training=True
        ):
            given = entry.constructor_input
            x = entry.forward_input.args[0]

            def constructor(*arguments, kind=info.module_cls, named=given.kwargs):
                return kind(*arguments, **named)

            test = NewModuleTest(
                constructor,
                fullname=f"{info.name}_{entry.desc or 'plain'}",
                constructor_args=given.args,
                input_fn=lambda shape=x.shape: torch.rand(shape).mul_(2).sub_(1),
                reference_fn=lambda x, p, m: Control.forward(nn.Sequential(*m.children()), x),
                check_gradgrad=True,
                default_dtype=torch.float64,
            )

            def run(self, test=test):
                torch.set_default_dtype(torch.float64)
                try:
                    test(self)
                finally:
                    torch.set_default_dtype(torch.float32)

            setattr(TestNN, f"test_nn_{test.get_name().removeprefix('test_')}", run)


class TestOpcheck(TestCase):
    """The registration tests of `torch.library.opcheck`, for the operator."""

    @ops([op for op in OPS if op.name == "relu_mlp_operator"], allowed_dtypes=SINGLE)
    def test_opcheck(self, device, dtype, op):
        for sample in op.sample_inputs(device, dtype, requires_grad=True):
            x, *parameters = arguments_of(sample)[0]
            missing = torch.empty(0)
            biases = [missing if b is None else b for b in parameters[1::2]]
            activation = sample.kwargs["output_activation"] or "none"
            arguments = (x, list(parameters[::2]), biases, activation)
            operator = torch.ops.relu_mlp.relu_mlp.default
            torch.library.opcheck(operator, arguments)
            fake_check(operator, arguments, {})


_add_module_tests()
for _generic in (TestOps, TestTransforms, TestOpsGradients, TestModule, TestOpcheck):
    instantiate_device_type_tests(_generic, globals(), only_for="cpu")
