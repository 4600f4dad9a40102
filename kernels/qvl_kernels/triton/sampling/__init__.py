"""Sampling on the GPU: selection of candidates and the draw of a token."""
