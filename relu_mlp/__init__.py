"""A fused multilayer perceptron for PyTorch with a backward pass derived by hand."""

from . import _import_torch as _import_torch  # before all that imports PyTorch
from . import flops as flops  # registers them
from ._version import __version__
from .functional import LossAndGrads, loss_and_grads, relu_mlp
from .fusion.patching import fuse, unfuse
from .fusion.report import FuseReport
from .fusion.rules import register_fusion
from .fusion.sequential import FusedSequential
from .gradient_checks.check import check_gradients
from .gradient_checks.report import GradientReport
from .info import BuildInfo, build_info
from .linearization import Linearization, Parameters, jacobian, linearize
from .modules import ReluMLP
from .ops import backend
from .training import TrainingStep

__all__ = [
    "BuildInfo",
    "FuseReport",
    "FusedSequential",
    "GradientReport",
    "Linearization",
    "LossAndGrads",
    "Parameters",
    "ReluMLP",
    "TrainingStep",
    "__version__",
    "backend",
    "build_info",
    "check_gradients",
    "fuse",
    "jacobian",
    "linearize",
    "loss_and_grads",
    "register_fusion",
    "relu_mlp",
    "unfuse",
]
