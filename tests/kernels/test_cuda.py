"""The operators on a GPU. tools/on_gpu.sh runs this; elsewhere it is skipped.

tests/kernels/test_cuda_on_host.py runs the same kernels on the host.
"""

import copy

import pytest
import torch

import support
from relu_mlp import ReluMLP, backend, loss_and_grads, ops, reference
from support.passes import compare, integer_network, to

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.skipif(not ops.HAS_CUDA, reason="needs a library that was built for CUDA"),
]
SIZES = [
    [64, 64, 64, 64],
    [3, 2, 1],
    [5, 128, 33, 1],
    [136, 8, 16],
    [1024, 4096, 1024],
    [130, 9, 5],
    [16, 136, 1],
    [3, 0, 200],
]
every_dtype = pytest.mark.parametrize("dtype", support.DTYPES, ids=str)
every_size = pytest.mark.parametrize("sizes", SIZES, ids=str)


@pytest.fixture(autouse=True)
def float32_products_and_sums():
    """PyTorch's products round only their results."""
    settings = torch.backends.cuda.matmul
    names = ["allow_tf32", "allow_bf16_reduced_precision_reduction"]
    names += ["allow_fp16_reduced_precision_reduction"]
    were = [getattr(settings, name) for name in names]
    for name in names:
        setattr(settings, name, False)
    yield
    for name, was in zip(names, were, strict=True):
        setattr(settings, name, was)


@every_size
@every_dtype
@pytest.mark.parametrize("rows", [0, 1, 77, 4096])
def test_exact(dtype, sizes, rows):
    network = integer_network(sizes, dtype, rows)
    if max(sizes) > 1000 or rows > 1000:  # few enough ones for float16 to hold the sums
        x, weights, biases, grad_output = network
        x, weights = ([t * (torch.rand(t.shape) < 0.05) for t in group] for group in ([x], weights))
        network = x[0].to(dtype), [w.to(dtype) for w in weights], biases, grad_output
    compare(ops.extension, to("cuda", network), "none")
    compare(ops.extension, to("cuda", network), "relu")


@every_size
@every_dtype
def test_what_is_not_finite(dtype, sizes):
    """ReLU passes NaN, also in cuBLASLt's epilogues."""
    x, weights, biases, grad_output = integer_network(sizes, dtype, 300)
    x[3, 0], x[200, -1] = torch.nan, torch.nan
    exact = [x.double()], [w.double() for w in weights], [b.double() for b in biases]
    y = reference.relu_mlp(exact[0][0], *exact[1:], "relu")
    found = ops.extension.relu_mlp(*to("cuda", (x, weights, biases, grad_output))[:3], "relu")
    assert torch.equal(found.isnan().cpu(), y.isnan())


@every_size
@pytest.mark.parametrize("dtype", support.DTYPES[1:], ids=str)  # float64 is the standard
@pytest.mark.parametrize("activation", list(reference.ACTIVATIONS))
def test_errors_are_those_of_the_native_path(dtype, sizes, activation):
    """At most 1.5 times the native path's largest error against float64, plus a few roundings,
    because one of a small network's errors may be 0.
    """
    torch.manual_seed(0)
    weights, biases = support.make_network(sizes)
    x, target = torch.randn(500, sizes[0]), torch.randn(500, sizes[-1])
    arguments = [[t.to("cuda", dtype) for t in group] for group in ([x, target], weights, biases)]
    exact = [[t.double() for t in group] for group in arguments]

    def results(implementation, group):
        (x, target), weights, biases = group
        y = implementation.relu_mlp(x, weights, biases, activation)
        loss = implementation.loss_and_grads(x, target, weights, biases, "mse", activation)
        return [y, *loss[1]]

    expected = results(reference, exact)

    def worst(implementation):
        return max(
            (found.double() - value).abs().max() / value.abs().max().clamp(min=1e-30)
            for found, value in zip(results(implementation, arguments), expected, strict=True)
            if value.numel()
        )

    assert worst(ops.extension) <= 1.5 * worst(reference) + 4 * torch.finfo(dtype).eps


@every_size
@every_dtype
def test_the_same_bits_run_to_run(dtype, sizes):
    torch.manual_seed(0)
    weights, biases = (
        [t.cuda() for t in group] for group in support.make_network(sizes, dtype=dtype)
    )
    x, target = torch.randn(5000, sizes[0]), torch.randn(5000, sizes[-1])
    x, target = x.to("cuda", dtype), target.to("cuda", dtype)
    runs = [loss_and_grads(x, target, weights, biases) for _ in range(5)]
    for run in runs[1:]:
        support.assert_same(dict(enumerate(run.weights)), dict(enumerate(runs[0].weights)))
        support.assert_same(dict(enumerate(run.biases)), dict(enumerate(runs[0].biases)))


@pytest.mark.parametrize("recompute", [False, True])
def test_gradcheck(recompute):
    net = ReluMLP(3, [5, 4], 2, output_activation="tanh", recompute=recompute).cuda().double()
    x = torch.randn(6, 3, dtype=torch.float64, device="cuda", requires_grad=True)
    with backend("extension"):
        assert torch.autograd.gradcheck(net, x)
        assert torch.autograd.gradgradcheck(net, x)


@every_dtype
def test_another_stream_and_another_device(dtype):
    network = integer_network([136, 16, 8], dtype, 4096)
    device = torch.device("cuda", torch.cuda.device_count() - 1)  # the last one
    expected = reference.relu_mlp(*to("cpu", network)[:3], "none")
    on_device = to(device, network)
    stream = torch.cuda.Stream(device)
    torch.cuda.synchronize(device)
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)
        on_device[0].mul_(2).div_(2)  # work that the kernels must wait for
        y = ops.extension.relu_mlp(*on_device[:3], "none")
    stream.synchronize()
    support.assert_same(y.cpu(), expected)


def test_tensors_on_two_devices():
    x, weights, biases, _ = integer_network([6, 9, 4], torch.float32, 3)
    with pytest.raises(RuntimeError, match=r"weights\[0\] must be on cpu like x, got cuda:0"):
        ops.extension.relu_mlp(x, [w.cuda() for w in weights], biases, "none")


def test_more_than_two_to_the_31_elements():
    rows = (1 << 31) // 64 + 100
    if torch.cuda.mem_get_info()[0] < 40 << 30:
        pytest.skip("needs 40 GB of GPU memory")
    net = ReluMLP(64, 64, 64).cuda().bfloat16()
    x = torch.randn(rows, 64, dtype=torch.bfloat16, device="cuda")
    with torch.no_grad():
        support.assert_same(net(x)[-70:], net(x[-70:].clone()))


@pytest.mark.parametrize("sizes", [[64, [64, 64], 64], [256, [1024], 256]], ids=str)
def test_a_captured_training_step(sizes):
    torch.manual_seed(0)
    net = ReluMLP(*sizes).cuda().bfloat16()
    other = copy.deepcopy(net)
    optimizers = [torch.optim.SGD(n.parameters(), 0.01) for n in (net, other)]
    x = torch.randn(512, sizes[0], dtype=torch.bfloat16, device="cuda")

    def step(net, optimizer):
        optimizer.zero_grad(set_to_none=True)
        net(x).square().mean().backward()
        optimizer.step()

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step(net, optimizers[0])
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(net, optimizers[0])
    for _ in range(4):
        graph.replay()
    for _ in range(7):
        step(other, optimizers[1])
    for p, q in zip(net.parameters(), other.parameters(), strict=True):
        support.assert_same(p.detach(), q.detach())


def test_compiled_with_less_overhead():
    net = ReluMLP(64, [64, 64], 64).cuda()
    x = torch.randn(256, 64, device="cuda")
    expected = net(x).detach()
    compiled = torch.compile(net, mode="reduce-overhead")
    for _ in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        y = compiled(x)
        y.sum().backward()
        torch.testing.assert_close(y.detach(), expected)
