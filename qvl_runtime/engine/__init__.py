"""The engine: `Engine` and `AsyncEngine`, how much memory they may take, and their report."""
