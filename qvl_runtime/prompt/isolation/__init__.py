"""Decode images in worker processes, which can be limited, killed and replaced."""
