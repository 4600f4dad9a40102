"""Conversion of a checkpoint to the layout of the kernels, its verification, and the way back."""
