from __future__ import annotations

import subprocess
import sys


def test_nothing_heavy_is_imported_before_it_is_needed() -> None:
    heavy = ("torch", "numpy", "PIL", "tiktoken", "urllib.request", "ssl")
    code = f"import sys, qvl_runtime.prompt; print([name for name in {heavy!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
