"""Pure functions on tensors: no devices, no state, no Lightning."""
