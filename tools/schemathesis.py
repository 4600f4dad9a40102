"""Send requests that schemathesis makes from /openapi.json to `qvl serve`: no 500, no status that is not documented.

python -m tools.schemathesis .venv-schemathesis/bin/schemathesis --max-examples 30
"""

from __future__ import annotations

import subprocess
import sys

from tools.serving import serving

# A schema cannot say that stream_options needs stream, or that the last message is the user's: such requests get 400.
EXCLUDED = "positive_data_acceptance"


def main() -> int:
    """Run it, and return its exit code."""
    program, *options = sys.argv[1:]
    with serving("--max-model-len", "1024", "--max-answer-tokens", "8") as url:
        judged = [program, "run", f"{url}/openapi.json", "--exclude-checks", EXCLUDED, "--phases", "coverage,fuzzing"]
        return subprocess.run([*judged, "--continue-on-failure", *options]).returncode


if __name__ == "__main__":
    sys.exit(main())
