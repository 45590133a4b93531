import os

import pytest
import torch

import relu_mlp
import support

#: Where tests make their tensors; tools/on_gpu.sh sets it.
if "RELU_MLP_TEST_DEVICE" in os.environ:
    torch.set_default_device(os.environ["RELU_MLP_TEST_DEVICE"])


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(params=support.BACKENDS)
def backend(request):
    """Every backend present in turn; the test runs under it."""
    with relu_mlp.backend(request.param):
        yield request.param
