"""`python tools/fuzz`: see command_line.py, or `make fuzz`."""

import sys
from pathlib import Path

# Python puts this folder first in its path, but this is the package `fuzz` of the folder above.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

from fuzz.command_line import main  # noqa: E402

sys.exit(main())
