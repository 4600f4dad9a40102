"""Attention kernels: paged decode and prefill, and the vision encoder."""
