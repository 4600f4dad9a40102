"""Lay a checkpoint out for the kernels of a target: `qvl convert`, as a script.

python -m tools.convert_weights SRC DST --target cpu
"""

from __future__ import annotations

import sys

from qvl_runtime.cli.app import main

if __name__ == "__main__":
    sys.argv.insert(1, "convert")
    main()
