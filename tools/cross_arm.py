"""Build the CPU kernels for 64-bit ARM on another machine, and compare each variant there in an emulator: `make arm`.

    python -m tools.cross_arm                    # build into build/arm, then compare; minutes, mostly emulation
    python -m tools.cross_arm --cpus cortex-a72  # as one CPU alone

Needs a cross compiler and qemu-user: on Debian, apt-get install g++-aarch64-linux-gnu qemu-user-static. The library is
what setup.py builds on such a machine, with the same flags. What an emulator takes says nothing of speed.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "arm"
LIBRARY, PROGRAM = BUILD / "qvl_kernels" / "_cpu.so", BUILD / "compare_variants"
SOURCE = ROOT / "tests" / "kernels" / "csrc" / "compare_variants.cpp"
PREFIX = "aarch64-linux-gnu"
SYSROOT = Path("/usr") / PREFIX  # of Debian's cross compiler
EMULATORS = ("qemu-aarch64-static", "qemu-aarch64")
# A CPU of each class, and the instruction sets that must be found there, best first.
CPUS = {
    "cortex-a72": "neon portable",  # no dot products: a Raspberry Pi 4, a Graviton of 2018
    "neoverse-n1": "dotprod neon portable",  # an Ampere Altra, a Graviton 2
    "max": "i8mm dotprod neon portable",  # all that the emulator knows: a Graviton 3, an Apple M2
}


def missing() -> str | None:
    """Return what is not installed here, or None."""
    if shutil.which(f"{PREFIX}-g++") is None:
        return f"no {PREFIX}-g++: on Debian, apt-get install g++-{PREFIX}"
    if emulator() is None:
        return "no qemu-aarch64: on Debian, apt-get install qemu-user-static"
    return None


def emulator() -> str | None:
    """Return the emulator's name."""
    return next((name for name in EMULATORS if shutil.which(name)), None)


def build() -> None:
    """Build the library as setup.py does on ARM, and the program that compares its variants."""
    compilers = {"CC": f"{PREFIX}-gcc", "CXX": f"{PREFIX}-g++"}
    linkers = {"LDSHARED": f"{PREFIX}-gcc -shared", "LDCXXSHARED": f"{PREFIX}-g++ -shared"}
    environment = os.environ | compilers | linkers | {"_PYTHON_HOST_PLATFORM": "linux-aarch64"}
    folders = ["--build-lib", str(BUILD), "--build-temp", str(BUILD / "objects")]
    shutil.rmtree(BUILD, ignore_errors=True)
    subprocess.run([sys.executable, "setup.py", "-q", "build_ext", *folders], cwd=ROOT, env=environment, check=True)
    flags = ["-std=c++17", "-O1", "-Wall", "-Wextra"]
    subprocess.run([compilers["CXX"], *flags, SOURCE, "-o", PROGRAM, "-ldl"], check=True)


def command(cpu: str, *arguments: str) -> list[str]:
    """Return the command that runs the program as one CPU."""
    return [emulator() or EMULATORS[0], "-cpu", cpu, "-L", str(SYSROOT), str(PROGRAM), str(LIBRARY), *arguments]


def main() -> int:
    """Build, compare, and return the exit code: 2 if something is not installed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpus", default=",".join(CPUS), help="that qemu knows, with commas; default: %(default)s")
    args = parser.parse_args()
    if (reason := missing()) is not None:
        print(f"error: {reason}", file=sys.stderr)
        return 2
    build()
    failed = 0
    compared: set[str] = set()
    for cpu in args.cpus.split(","):
        found = subprocess.run(command(cpu, "none"), capture_output=True, text=True, check=False).stdout.strip()
        print(f"{cpu}: {found}", flush=True)
        failed += CPUS.get(cpu, found.partition(": ")[2]) != found.partition(": ")[2]
        best = found.partition(": ")[2].split()[:1]
        if best and best[0] not in compared:  # the other instruction sets of this CPU are another's best
            compared.add(best[0])
            failed += subprocess.run(command(cpu, best[0]), check=False).returncode != 0
    print("all as expected" if not failed else f"{failed} not as expected")
    return int(failed != 0)


if __name__ == "__main__":
    sys.exit(main())
