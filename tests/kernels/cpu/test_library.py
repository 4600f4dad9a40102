"""A library that does not match is rejected with the way out, and the build includes what the compiler supports."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from qvl_kernels.cpu import library as cpu_library
from tests.kernels.conftest import AVAILABLE

pytestmark = pytest.mark.unit
ROOT = Path(__file__).resolve().parents[3]
COMPILER = shutil.which("g++")


@pytest.mark.skipif(not AVAILABLE, reason="the CPU kernels were not built")
def test_a_library_with_another_abi_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_library, "ABI", -1)
    with pytest.raises(cpu_library.LibraryError, match=r"its ABI is \d+, this version needs -1; rebuild it"):
        cpu_library.Library()


@pytest.mark.skipif(not AVAILABLE, reason="the CPU kernels were not built")
def test_a_kernel_with_another_signature_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cpu_library.SIGNATURES, "gelu", "PiiPd")
    with pytest.raises(cpu_library.LibraryError, match="'gelu' takes PiiP, this version passes PiiPd; rebuild it"):
        cpu_library.Library()


@pytest.mark.skipif(COMPILER is None, reason="no g++ here")
def test_a_library_without_an_abi_number_is_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, old = tmp_path / "old.cpp", tmp_path / "old.so"
    source.write_text('extern "C" const char* qvl_instruction_sets() { return "portable"; }')
    subprocess.run(["g++", "-shared", "-fPIC", source, "-o", old], check=True)
    monkeypatch.setenv("QVL_CPU_LIBRARY", str(old))
    with pytest.raises(cpu_library.LibraryError, match="its ABI is none"):
        cpu_library.Library()


def build(tmp_path: Path, compiler: str, platform: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run setup.py in a copy with the given compiler script and the smallest sources that link."""
    shutil.copy(ROOT / "setup.py", tmp_path)
    sources = tmp_path / "kernels" / "csrc"
    shutil.copytree(ROOT / "kernels" / "csrc", sources)
    for path in sources.glob("variant_*.cpp"):
        kind = path.stem.removeprefix("variant_")
        path.write_text(f'#include "library.h"\nconst Entry* entries_{kind}() {{ return nullptr; }}\n')
    (tmp_path / "kernels" / "qvl_kernels").mkdir()
    (tmp_path / "kernels" / "qvl_kernels" / "__init__.py").touch()
    wrapper = tmp_path / "compiler"
    wrapper.write_text(compiler)
    wrapper.chmod(0o755)
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    environment = {"PATH": "/usr/bin:/bin", "CC": str(wrapper), "CXX": str(wrapper), "LDSHARED": f"{wrapper} -shared"}
    environment["LDCXXSHARED"] = environment["LDSHARED"]
    if platform is not None:
        environment["_PYTHON_HOST_PLATFORM"] = platform
    return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)


def instruction_sets(tmp_path: Path) -> str:
    """What the library that was built reports, loaded with all its symbols."""
    (built,) = (tmp_path / "kernels" / "qvl_kernels").glob("_cpu*.so")
    code = "import ctypes, os, sys; f = ctypes.CDLL(sys.argv[1], os.RTLD_NOW).qvl_instruction_sets"
    code += "; f.restype = ctypes.c_char_p; print(f())"
    return subprocess.run([sys.executable, "-c", code, built], capture_output=True, text=True, check=True).stdout


@pytest.mark.skipif(COMPILER is None or "amx" not in AVAILABLE, reason="no g++, or a CPU without AMX")
def test_without_amx_in_the_compiler_only_amx_is_skipped(tmp_path: Path) -> None:
    done = build(tmp_path, '#!/bin/sh\ncase "$*" in *-mamx*) exit 1;; esac\nexec g++ "$@"\n')
    assert done.returncode == 0, done.stderr
    assert "built without amx" in done.stderr and "without avx512" not in done.stderr
    assert instruction_sets(tmp_path) == "b'avx512 avxvnni avx2 portable'\n"


@pytest.mark.skipif(COMPILER is None, reason="no g++")
@pytest.mark.parametrize("platform", ["macosx-11.0-universal2", "linux-unheard_of"])
def test_a_platform_without_variants_gets_the_portable_kernels(tmp_path: Path, platform: str) -> None:
    done = build(tmp_path, '#!/bin/sh\nexec g++ "$@"\n', platform)
    assert done.returncode == 0, done.stderr
    assert ("portable C++ only, for both architectures" in done.stderr) == platform.endswith("universal2")
    assert instruction_sets(tmp_path) == "b'portable'\n"


def test_without_a_compiler_the_build_succeeds_with_a_warning(tmp_path: Path) -> None:
    done = build(tmp_path, "#!/bin/sh\nexit 1\n")
    assert done.returncode == 0, done.stderr
    assert "the CPU kernels are not built, and plain torch will run instead" in done.stderr
    assert not [*(tmp_path / "kernels" / "qvl_kernels").glob("_cpu*")]
