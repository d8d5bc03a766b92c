"""``python -m sdtp_kernels`` is the command ``sdtp``."""

from sdtp_kernels.cli import main

raise SystemExit(main())
