"""Imports PyTorch. At its import PyTorch warns that NumPy is missing, but nothing here needs it."""

import warnings

with warnings.catch_warnings():
    warnings.filterwarnings("ignore", "Failed to initialize NumPy: No module named")
    import torch  # noqa: F401
