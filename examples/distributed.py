"""One training run, by one process or by many.

    python examples/distributed.py
    torchrun --standalone --nproc-per-node 4 examples/distributed.py
    torchrun --standalone --nproc-per-node 4 examples/distributed.py --tensor-parallel 2

With `--tensor-parallel N`, N processes form a group, which splits the units of the network. The
groups split the rows, by FSDP. So 4 processes are 4 groups of 1, 2 groups of 2, or 1 group of 4. In
every case they train the same network on the same rows, so the loss must be the same; otherwise the
program stops with an error. It runs on the CPU.
"""

from __future__ import annotations

import argparse

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import parallelize_module

from relu_mlp import ReluMLP
from relu_mlp.parallel import ReluMLPParallel

ROWS = 256
STEPS = 100
EXPECTED = 0.0949998370  # the loss in the last step, to ten digits


def start_processes() -> None:
    """Joins the processes that torchrun started, or makes a group of this process alone."""
    if dist.is_torchelastic_launched():
        dist.init_process_group("gloo")
    else:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)


def make_mesh(tensor_parallel: int) -> DeviceMesh:
    """A mesh of shape (groups that split the rows, processes of a group that split the units)."""
    processes = dist.get_world_size()
    if tensor_parallel < 1 or processes % tensor_parallel:
        raise SystemExit(
            f"FAILED: --tensor-parallel must divide the number of processes, {processes}, "
            f"got {tensor_parallel}"
        )
    shape = (processes // tensor_parallel, tensor_parallel)
    return init_device_mesh("cpu", shape, mesh_dim_names=("rows", "units"))


def make_data() -> tuple[Tensor, Tensor]:
    """All rows of x and target. The target is a simple function of four numbers."""
    x = torch.rand(ROWS, 4, dtype=torch.float64) * 4 - 2
    return x, torch.stack([x[:, 0] * x[:, 1], x[:, 2].abs() - x[:, 3]], dim=1)


def train(mesh: DeviceMesh) -> float:
    """The mean squared error over all rows in the last step."""
    torch.manual_seed(0)  # the same network and the same rows in every process
    net = ReluMLP(4, [64, 63, 62], 2, dtype=torch.float64)
    x, target = make_data()

    if dist.get_rank() == 0:
        print(f"{mesh.size(0)} group(s) for the rows, each of {mesh.size(1)} for the units")
    parallelize_module(net, mesh["units"], ReluMLPParallel())
    fully_shard(net, mesh=mesh["rows"])
    mine = slice(mesh.get_local_rank("rows"), None, mesh.size(0))
    x, target = x[mine], target[mine]

    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = (net(x) - target).square().sum() / (2 * ROWS)  # the share of these rows
        (mesh.size(0) * loss).backward()  # FSDP takes the mean over the groups
        optimizer.step()

        if step % 20 == 19:
            total = loss.detach()
            dist.all_reduce(total, group=mesh.get_group("rows"))
            if dist.get_rank() == 0:
                print(f"step {step:3}  loss {total.item():.10f}")
    return total.item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tensor-parallel", type=int, default=1, metavar="N")
    arguments = parser.parse_args()
    start_processes()
    try:
        loss = train(make_mesh(arguments.tensor_parallel))
    finally:
        dist.destroy_process_group()
    if not abs(loss - EXPECTED) < 1e-10:
        raise SystemExit(f"FAILED: the last loss is {loss:.10f}, and should be {EXPECTED:.10f}")


if __name__ == "__main__":
    main()
