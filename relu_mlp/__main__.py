"""`python -m relu_mlp`: see relu_mlp/cli."""

import sys

from .cli import main

sys.exit(main())
