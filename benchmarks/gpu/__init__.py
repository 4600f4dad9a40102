"""What `python -m benchmarks.gpu_suite` is made of: each part gives rows, and runs at tiny sizes where there is no GPU."""
