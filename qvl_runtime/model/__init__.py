"""The forward pass of Qwen-VL, written once on the ops of `qvl_kernels`."""
