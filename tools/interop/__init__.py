"""Checkpoints that other projects write load here, and ours load there: `make interop`."""
