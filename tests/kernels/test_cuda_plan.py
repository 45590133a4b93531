"""The plans of calls on a GPU: plain functions, in every build of the library."""

import pytest
import torch

from relu_mlp import ops

pytestmark = pytest.mark.skipif(ops.LIBRARY_PATH is None, reason="needs the library")

R = torch.ops.relu_mlp_testing
#: multiprocessors, bytes of shared memory per block and per multiprocessor
DEVICES = {"H200": [132, 232448, 233472], "A100": [108, 166912, 167936]}
every_device = pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES)


def plan(rows, widths, element_size, is_backward, recompute, device):
    said = R.cuda_plan(rows, widths, element_size, is_backward, recompute, device)
    return dict(line.split(": ") for line in said.splitlines())


@every_device
@pytest.mark.parametrize("is_backward", [False, True])
@pytest.mark.parametrize(
    "method, rows, widths, element_size",
    [
        ("fused", 1 << 20, [64] * 4, 2),
        ("fused", 1, [3, 2, 1], 4),
        ("fused", 1 << 33, [1, 1], 2),  # more rows than an int holds
        ("layered", 8192, [4096, 16384, 4096], 2),
        ("layered", 1, [1024, 4096, 1024], 2),
        ("layered", 8192, [129, 136, 8], 2),  # one of the two products
        ("layered", 8192, [129, 130, 131], 2),
        ("layered", 8192, [1024, 4096, 1024], 4),
        ("layered", 8192, [64, 64], 8),
        ("layered", 0, [64, 64], 2),
        ("layered", 8192, [64, 0, 64], 2),
        ("layered", 8192, [8] * 18, 8),
        ("layered", 8192, [8] * 18, 2),  # more layers than the fused kernels support
        ("layered", 8192, [8, 1 << 32, 8, 8], 2),
    ],
)
def test_method(method, rows, widths, element_size, is_backward, device):
    assert plan(rows, widths, element_size, is_backward, False, device)["method"] == method


@every_device
def test_what_a_fused_backward_takes_does_not_grow_with_the_rows(device):
    many, more = (plan(rows, [64] * 4, 2, True, False, device) for rows in (1 << 16, 1 << 24))
    assert many == more
    assert int(many["shared_bytes"]) <= device[1]


GOOD = (8192, 1024, 4096, 1024, 4096, 2, True)


def test_cublaslt_serves_aligned_16_bit_products():
    assert R.is_for_cublaslt(*GOOD)
    assert R.is_for_cublaslt(1, 8, 8, 16, 24, 2, True)


@pytest.mark.parametrize(
    "place, value",
    [
        (0, 0),  # no rows
        (0, 1 << 31),
        (1, 1020),  # rows whose size is 8 bytes more than a multiple of 16
        (1, 0),
        (2, 1),  # the width at which epilogues have failed
        (2, 4100),
        (3, 1028),  # rows that start at addresses that are not divisible by 16
        (3, 1016),  # ... and overlap
        (4, 4104 - 4),
        (5, 4),  # float32: PyTorch decides about TF32
        (5, 8),
        (6, False),
    ],
)
def test_cublaslt_does_not_serve(place, value):
    arguments = list(GOOD)
    arguments[place] = value
    assert not R.is_for_cublaslt(*arguments)


@every_device
def test_the_lowest_delta_a_few_columns_at_a_time(device):
    def columns(rows, cols, recompute=False):
        return R.cuda_columns_at_once(rows, cols, recompute, device)

    assert columns(8192, 4096) == 1024
    assert columns(8192, 4096, True) == 256
    assert columns(128, 4096) == 4096  # too few rows to occupy the device with fewer columns
    assert columns(1 << 33, 100) == 100
    for rows in (0, 1, 7, 1000, 8192, 1 << 33):
        for cols in (0, 1, 128, 129, 4100, 1 << 20, (1 << 31) + 8):
            for recompute in (False, True):
                count = columns(rows, cols, recompute)
                assert count == cols or (0 < count < cols and count % 128 == 0)
                assert cols <= count * (16 if recompute else 4)


@every_device
@pytest.mark.parametrize("element_size", [2, 4, 8])
def test_every_element_has_one_block(element_size, device):
    """Tiles cover the columns and chunks the rows, and none is empty."""
    for rows in (0, 1, 7, 64, 65, 1000, 8192, 1 << 33):
        for cols in (1, 8, 31, 32, 33, 256, 4096, 1 << 20, (1 << 31) + 8):
            vector, tiles, chunks, chunk_rows = R.cuda_reduction(rows, cols, element_size, device)
            assert vector in (1, 16 // element_size) and cols % vector == 0
            width = 32 * vector
            assert (tiles - 1) * width < cols <= tiles * width
            assert chunks * chunk_rows >= rows
            assert rows == 0 or (chunks - 1) * chunk_rows < rows
            assert 1 <= chunks <= 256
            assert tiles * chunks <= max(tiles, 5 * device[0])
