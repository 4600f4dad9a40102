"""Kernels of linears with packed int4 and int8 weights."""
