"""List the packages and their folders, and build the CPU kernels; all other metadata is in pyproject.toml.

The folder `kernels/` is not a package; its package is imported as `qvl_kernels`. Hugging Face publishes a package named
`kernels`, and a second package of that name in site-packages would break transformers.

The C++ part is one shared library with plain C entry points. It depends on neither Python's ABI nor torch's. Each
instruction set has a source file with its own flags and is chosen at run time, so a wheel runs on any CPU of its
architecture. If the compiler does not support an instruction set, the build leaves out that one only. Without a
compiler the package still installs, and runs on plain torch. The build prints a line in both cases.
"""

from __future__ import annotations

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from sysconfig import get_platform

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CCompilerError, CompileError, ExecError, LinkError, PlatformError

RUNTIME = find_packages(".", include=["qvl_runtime*"])
KERNELS = find_packages("kernels", include=["qvl_kernels*"])

CSRC = Path("kernels/csrc")
COMMON = ["-std=c++17", "-g0", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-Wall", "-Wextra"]
# A product and a sum fused in one instance of a template and not in another would round differently: the bits of a row
# would depend on the number of rows, which chooses the instance.
COMMON += ["-ffp-contract=off"]
# g++ 12's intrinsics headers trigger the first two warnings; the unknown pragmas are for other compilers.
COMMON += ["-Wno-uninitialized", "-Wno-maybe-uninitialized", "-Wno-unknown-pragmas"]
SHARED = {
    "threads.cpp": ["-O2"],
    "replay.cpp": ["-O2"],
    "embed.cpp": ["-O2"],
    "pack.cpp": ["-O2", "-ftree-vectorize"],
    "variant_portable.cpp": ["-O2", "-ftree-vectorize"],
}
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni"]
# What these kernels need of g++'s -O3: its limits for inlining, short loops unrolled, and branches moved out of loops.
# The rest takes a third more time to compile, and makes no kernel faster.
O3 = ["-O2", "-fpeel-loops", "-funswitch-loops"]
O3 += [f"--param={limit}" for limit in ("max-inline-insns-auto=30", "early-inlining-insns=14", "inline-min-speedup=15")]
VARIANTS_X86 = {  # a compiler may not support one, and library.cpp is then built with QVL_NO_AMX and so on
    "variant_amx.cpp": [*O3, *AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-int8", "-mamx-bf16"],
    "variant_avx512.cpp": [*O3, *AVX512],
    "variant_avxvnni.cpp": ["-O2", *AVX2],
    "variant_avx2.cpp": ["-O2", *AVX2],
}
VARIANTS_ARM = {
    "variant_i8mm.cpp": ["-O2", "-march=armv8.2-a+dotprod+i8mm+bf16"],
    "variant_dotprod.cpp": ["-O2", "-march=armv8.2-a+dotprod"],
    "variant_neon.cpp": ["-O2"],
}
LIBRARY = "library.cpp"
# The machine that is built for, which a cross build names: "linux-x86_64", "macosx-11.0-arm64", "win-amd64".
MACHINE = get_platform().rpartition("-")[2].lower()
ON_X86, ON_ARM = MACHINE in ("x86_64", "amd64"), MACHINE in ("aarch64", "arm64")
# None for "universal2", a library of both architectures: it would need its own flags for each.
VARIANTS = VARIANTS_X86 if ON_X86 else VARIANTS_ARM if ON_ARM else {}


class BuildKernels(build_ext):
    """Compile each source with its own flags, which distutils cannot express, several sources at a time."""

    def get_ext_filename(self, fullname: str) -> str:
        """Return a name without Python's ABI tag: ctypes loads the library, so one build works for every version."""
        return os.path.join(*fullname.split(".")) + (".pyd" if os.name == "nt" else ".so")

    def build_extension(self, ext: Extension) -> None:
        try:
            self._build(ext)
        except (CCompilerError, CompileError, ExecError, LinkError, PlatformError, OSError) as fault:
            if os.environ.get("QVL_CXXFLAGS"):  # an explicit build, such as `make asan`
                raise SystemExit(f"the CPU kernels are not built: {fault}") from fault
            say(f"the CPU kernels are not built, and plain torch will run instead: {fault}")

    def _build(self, ext: Extension) -> None:
        self.mkpath(self.build_temp)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            variants = {n: pool.submit(self._compile, ext, n, flags) for n, flags in VARIANTS.items()}
            shared = [pool.submit(self._compile, ext, name, flags) for name, flags in SHARED.items()]
        objects = [objects for future in shared for objects in future.result()]
        missing = {*VARIANTS_X86, *VARIANTS_ARM}  # library.cpp names those of the architecture that it is compiled for
        if MACHINE == "universal2":
            say(
                "the CPU kernels are built as portable C++ only, for both architectures; for one at its best, set "
                "ARCHFLAGS='-arch arm64' (or x86_64) and _PYTHON_HOST_PLATFORM=macosx-11.0-arm64 (or x86_64)"
            )
        for name, future in variants.items():
            try:
                objects += future.result()
                missing.remove(name)
            except CompileError as fault:
                say(f"the CPU kernels are built without {kind_of(name)}, which this compiler cannot build: {fault}")
        without = [f"-DQVL_NO_{kind_of(name).upper()}" for name in sorted(missing)]
        objects += self._compile(ext, LIBRARY, ["-O2", *without])
        target = self.get_ext_fullpath(ext.name)
        self.mkpath(os.path.dirname(target))
        extra = os.environ.get("QVL_CXXFLAGS", "").split()
        self.compiler.link_shared_object(objects, target, extra_postargs=["-pthread", *extra], target_lang="c++")

    def _compile(self, ext: Extension, name: str, flags: list[str]) -> list[str]:
        extra = os.environ.get("QVL_CXXFLAGS", "").split()  # the sanitizer flags of `make asan`
        flags = [*COMMON, *flags, *extra]
        return self.compiler.compile(
            [str(CSRC / name)], self.build_temp, include_dirs=[str(CSRC)], extra_postargs=flags, depends=ext.depends
        )


class AbiFreeWheel(bdist_wheel):
    """A wheel tagged py3-none-PLATFORM: its only binary depends on neither Python's ABI nor torch's."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


def kind_of(source: str) -> str:
    """Return the instruction set of a variant's source."""
    return source.removeprefix("variant_").removesuffix(".cpp")


def say(line: str) -> None:
    """Print to standard error, which pip shows only with -v and a build from a checkout always shows."""
    print(f"qvl_runtime: {line}", file=sys.stderr)


setup(
    packages=RUNTIME + KERNELS,
    package_dir={"qvl_runtime": "qvl_runtime", "qvl_kernels": "kernels/qvl_kernels"},
    ext_modules=[
        Extension(
            "qvl_kernels._cpu",
            [str(CSRC / name) for name in [LIBRARY, *SHARED, *VARIANTS]],
            depends=sorted(str(path) for pattern in ("*.h", "*.inl") for path in CSRC.rglob(pattern)),
            language="c++",
            optional=True,
        )
    ],
    cmdclass={"build_ext": BuildKernels, "bdist_wheel": AbiFreeWheel},
)
