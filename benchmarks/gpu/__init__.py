"""The parts of `python -m benchmarks.gpu.suite`: each gives rows, and runs at tiny sizes where there is no GPU."""
