"""A fused multilayer perceptron for PyTorch with a backward pass derived by hand."""

from ._version import __version__
from .functional import LossAndGrads, loss_and_grads, relu_mlp
from .gradient_check import check_gradients
from .gradient_report import GradientReport
from .info import BuildInfo, build_info
from .linearization import Linearization, Parameters, jacobian, linearize
from .modules import FusedSequential, ReluMLP, fuse
from .ops import backend

__all__ = [
    "BuildInfo",
    "FusedSequential",
    "GradientReport",
    "Linearization",
    "LossAndGrads",
    "Parameters",
    "ReluMLP",
    "__version__",
    "backend",
    "build_info",
    "check_gradients",
    "fuse",
    "jacobian",
    "linearize",
    "loss_and_grads",
    "relu_mlp",
]
