"""The parts of `python -m benchmarks.gpu.suite`: each yields rows, and runs at tiny sizes without a GPU."""
