"""`python -m qvl_runtime.cli`: the command line where `qvl` cannot be started by name, as under torchrun."""

from qvl_runtime.cli import main

if __name__ == "__main__":
    main()
