import pytest
import torch

import relu_mlp
import support


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(params=support.BACKENDS)
def backend(request):
    """Every backend present in turn; the test runs under it."""
    with relu_mlp.backend(request.param):
        yield request.param
