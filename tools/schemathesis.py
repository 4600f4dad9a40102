"""Send requests that schemathesis makes from /openapi.json to `qvl serve`: no 500, no status that is not documented.

python -m tools.schemathesis .venv-schemathesis/bin/schemathesis --max-examples 30
"""

from __future__ import annotations

import subprocess
import sys

# A schema cannot say that stream_options needs stream, or that the last message is the user's: such requests get 400.
EXCLUDED = "positive_data_acceptance"


def main() -> int:
    """Run it, and return its exit code."""
    program, *options = sys.argv[1:]
    command = [sys.executable, "-c", "from qvl_runtime.cli.app import main; main()", "serve", "--port", "0"]
    command += ["--no-access-log", "--max-model-len", "1024", "--max-answer-tokens", "8"]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        url = ""
        for line in server.stderr or ():
            if line.startswith("listening at "):
                url = line.removeprefix("listening at ").partition(",")[0]
            if line.startswith("ready"):
                break
        judged = [program, "run", f"{url}/openapi.json", "--exclude-checks", EXCLUDED, "--phases", "coverage,fuzzing"]
        return subprocess.run([*judged, "--continue-on-failure", *options]).returncode
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    sys.exit(main())
