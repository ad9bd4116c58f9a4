"""What happens to a parameter: numerics and memory put together, without Lightning."""
