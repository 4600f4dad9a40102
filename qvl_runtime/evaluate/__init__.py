"""Evaluation on the published benchmarks: their files, the original's prompts, limits and metrics, and a report."""
