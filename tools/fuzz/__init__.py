"""Fuzzing: random and damaged checkpoints, configurations, images, prompts, batch records and sampling parameters.

Every input must be answered rightly or refused by a `QVLError` of one bounded line, in bounded time and memory.
"""
