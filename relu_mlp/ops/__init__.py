"""Everything between the package and ``torch.ops.relu_mlp``."""

from .library import *  # noqa: F403
from .library import _thread as _thread
