"""The variants for 64-bit ARM: that they compile, and, after `make arm`, that they agree with the portable kernels."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from tools import cross_arm

pytestmark = [pytest.mark.unit, pytest.mark.skipif(cross_arm.missing() is not None, reason=str(cross_arm.missing()))]
SOURCES = cross_arm.ROOT / "kernels" / "csrc"


@pytest.fixture(scope="module")
def built() -> Path:
    """The library of `make arm`, if it is newer than its sources."""
    if not cross_arm.LIBRARY.is_file():
        pytest.skip("no library for ARM in build/arm: `make arm` builds one")
    sources = [path for path in SOURCES.rglob("*") if path.is_file()]
    if max(path.stat().st_mtime for path in [*sources, cross_arm.SOURCE]) > cross_arm.PROGRAM.stat().st_mtime:
        pytest.skip("the library in build/arm is older than its sources: `make arm` builds it again")
    return cross_arm.LIBRARY


@pytest.mark.parametrize(
    ("source", "flags"),
    [
        ("variant_i8mm.cpp", ["-march=armv8.2-a+dotprod+i8mm+bf16"]),
        ("threads.cpp", []),
        ("library.cpp", []),
    ],
)
def test_sources_are_valid_there(source: str, flags: list[str]) -> None:
    command = [f"{cross_arm.PREFIX}-g++", "-std=c++17", "-fsyntax-only", f"-I{SOURCES}", *flags]
    warnings = ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-Wno-uninitialized", "-Wno-maybe-uninitialized"]
    done = subprocess.run([*command, *warnings, SOURCES / source], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("cpu", [*cross_arm.CPUS])
def test_a_cpu_gets_the_best_variant_that_it_can_run(built: Path, cpu: str) -> None:
    found = subprocess.run(cross_arm.command(cpu, "none"), capture_output=True, text=True, timeout=300).stdout
    assert found == f"instruction sets: {cross_arm.CPUS[cpu]}\n"


@pytest.mark.skipif(not os.environ.get("QVL_ARM"), reason="minutes of emulation: `make arm` does it, or set QVL_ARM=1")
@pytest.mark.parametrize("cpu", [*cross_arm.CPUS])
def test_a_variant_agrees_with_the_portable_kernels(built: Path, cpu: str) -> None:
    best = cross_arm.CPUS[cpu].split()[0]
    done = subprocess.run(cross_arm.command(cpu, best), capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout[-3000:]
    assert len(re.findall(rf"(?m)^{best} \w+: \d+ cases", done.stdout)) == 12
