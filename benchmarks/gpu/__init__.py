"""The parts of `python -m benchmarks.gpu_suite`: each gives rows, and runs at tiny sizes where there is no GPU."""
