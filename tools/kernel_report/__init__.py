"""Compile the Triton kernels on a machine without a GPU and judge their machine code."""
