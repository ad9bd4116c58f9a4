"""`lightning-offload train | plan | evaluate | export | bench | doctor`: thin Hydra mains over `conf/`."""

from lightning_offload.cli.main import main

__all__ = ["main"]
