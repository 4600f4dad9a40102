"""Run the benchmark of random arrivals: `python -m benchmarks.serving`."""

from benchmarks.serving.serving import main

if __name__ == "__main__":
    main()
