"""Hydra configuration of the `lightning-offload` command, installed as `lightning_offload.conf`."""
