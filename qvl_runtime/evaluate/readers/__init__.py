"""Readers of the published data sets, each in the layouts that the original's scripts and its authors use."""
