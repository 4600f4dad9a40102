"""`qvl quantize` from a checkout: `python -m tools.quantize SRC DST [--bits 4]`; --help lists the rest."""

from __future__ import annotations

import sys

from qvl_runtime.cli.app import main

if __name__ == "__main__":
    sys.argv[1:1] = ["quantize"]
    main()
