"""`python -m lightning_offload.cli`."""

import sys

from lightning_offload.cli.main import main

sys.exit(main())
