"""Tensor parallelism: one decoder split among processes, each on a device of its own."""
