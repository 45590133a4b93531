"""Values and all gradients over a few hundred random configurations: against float64 with derived
bounds, and against native autograd.
"""

import random

import pytest
import torch

import support

WIDTHS = [1, 2, 3, 6, 7, 16, 17, 42, 64, 123, 431]
ROWS = [1, 2, 3, 5, 16, 33, 64, 130, 431]


def random_case(seed):
    r = random.Random(seed)
    depth = r.randint(1, 5)
    sizes = [r.choice(WIDTHS) for _ in range(depth + 1)]
    return sizes, r.choice(ROWS), r.choice(["all", "none", "some"]), r.choice(support.ACTIVATIONS)


@pytest.mark.covering(strength=2)
@pytest.mark.parametrize("dtype", support.DTYPES, ids=str)
@pytest.mark.parametrize("seed", range(60))
def test_random_networks(backend, seed, dtype):
    torch.manual_seed(seed)
    sizes, rows, bias, activation = random_case(seed)
    support.compare_with_float64(sizes, rows, bias, activation, dtype, backend)
