"""``python tests/mutants NAME ...``; see runner.py."""

import sys
from pathlib import Path

# The folder of the areas, which Python puts first, has a `triton.py`.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

from mutants.runner import main  # noqa: E402

sys.exit(main())
