"""What Triton kernels cost, read from their machine code, on a machine without a GPU."""
