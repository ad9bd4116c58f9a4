"""`lightning-offload train | plan | evaluate | export | bench | doctor | compare`: thin Hydra mains over `conf/`."""

from lightning_offload.cli.main import main

__all__ = ["main"]
