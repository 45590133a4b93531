"""Compares a training step by each CUDA method and dtype with float64: the first stage on a GPU.

    python tools/gpu_smoke.py [--device cuda] [--small]

Prints a line for each case: the error of y and of the gradients (the largest of their root mean
squares), for the operators and for PyTorch's own layers on the same device. A case fails if the
operators' error is more than 1.5 times PyTorch's plus a few roundings, or if a second run gives
other bits. With `--small`, the cases are small enough for compute-sanitizer to finish in a minute.
"""

from __future__ import annotations

import argparse
import copy
import sys

import torch
from torch import nn

from relu_mlp import ReluMLP, backend

#: Rows and widths, by the code that serves them on CUDA.
CASES = {
    "fused, one row": (1, [64, 64, 64, 64]),
    "fused, ragged": (77, [5, 128, 33, 1]),
    "fused, many rows": (1 << 16, [64, 64, 64, 64]),
    "layer by layer": (512, [1024, 4096, 1024]),
    "PyTorch's products": (300, [130, 131, 5]),
}
SMALL = {
    "fused": (77, [64, 33, 64]),
    "layer by layer": (128, [136, 256, 136]),
    "PyTorch's products": (70, [130, 131, 5]),
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def step(net: nn.Module, x: torch.Tensor, grad: torch.Tensor) -> list[torch.Tensor]:
    """y, the gradient of x and those of the parameters."""
    x = x.detach().requires_grad_()
    y = net(x)
    return [y.detach(), *torch.autograd.grad(y, [x, *net.parameters()], grad)]


def errors(found: list[torch.Tensor], exact: list[torch.Tensor]) -> float:
    """The largest error of a tensor: its root mean square relative to that of the values.

    Single elements would be too strict: where rounding switches a unit, they are far off, also
    natively.
    """
    return max(
        float((f.double() - e).norm() / e.norm().clamp(min=1e-30))
        for f, e in zip(found, exact, strict=True)
    )


def check(
    name: str, rows: int, widths: list[int], dtype: torch.dtype, recompute: bool, device: str
) -> bool:
    torch.manual_seed(0)
    net = ReluMLP(widths[0], widths[1:-1], widths[-1], recompute=recompute).to(device, dtype)
    native = nn.Sequential(*net)
    x = torch.randn(rows, widths[0], dtype=torch.float64).to(device, dtype)
    grad = torch.randn(rows, widths[-1], dtype=torch.float64).to(device, dtype)
    exact = step(copy.deepcopy(native).double(), x.double(), grad.double())
    with backend("extension"):
        found, again = step(net, x, grad), step(net, x, grad)
    ours, theirs = errors(found, exact), errors(step(native, x, grad), exact)
    same = all(map(torch.equal, found, again))
    is_good = ours <= 1.5 * theirs + 4 * torch.finfo(dtype).eps and same
    print(
        f"{name:20} {dtype!s:15} recompute={recompute!s:5} error {ours:.2e}, PyTorch's "
        f"{theirs:.2e}, {'the same bits again' if same else 'OTHER BITS'}: "
        f"{'ok' if is_good else 'FAILED'}",
        flush=True,
    )
    return is_good


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda", help="cpu rehearses this program")
    parser.add_argument("--small", action="store_true")
    arguments = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    failed = 0
    for name, (rows, widths) in (SMALL if arguments.small else CASES).items():
        for dtype in DTYPES:
            for recompute in (False, True):
                try:
                    good = check(name, rows, widths, dtype, recompute, arguments.device)
                except Exception as error:  # the next case may still be informative
                    print(f"{name:20} {dtype!s:15} {type(error).__name__}: {error}", flush=True)
                    good = False
                failed += not good
    print(f"{failed} cases failed")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
