"""Names the packages and where they lie, and builds the CPU kernels; all else stands in pyproject.toml.

The kernels live in the folder `kernels/`, which is not a package, and are imported as `qvl_kernels`: Hugging Face
publishes a package named `kernels`, and a second one of that name in site-packages breaks transformers for its owner.

The C++ part is one shared library with plain C entry points, which knows neither Python's ABI nor torch's. Each
instruction set is a source file with flags of its own and is chosen at run time, so that a wheel runs on any CPU of
its architecture. Without a compiler the package installs all the same, and runs on plain torch.
"""

from __future__ import annotations

import os
import platform
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

RUNTIME = find_packages(".", include=["qvl_runtime*"])
KERNELS = find_packages("kernels", include=["qvl_kernels*"])

CSRC = Path("kernels/csrc")
COMMON = ["-std=c++17", "-g0", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-Wall", "-Wextra"]
# g++ 12's own intrinsics headers warn of the first two; the pragmas are other compilers'
COMMON += ["-Wno-uninitialized", "-Wno-maybe-uninitialized", "-Wno-unknown-pragmas"]
SOURCES = {
    "library.cpp": ["-O2"],
    "threads.cpp": ["-O2"],
    "pack.cpp": ["-O2", "-ftree-vectorize"],
    "variant_portable.cpp": ["-O2", "-ftree-vectorize"],
}
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni"]
X86_SOURCES = {
    "variant_avx2.cpp": ["-O2", *AVX2],
    "variant_avx512.cpp": ["-O3", *AVX512],
    "variant_amx.cpp": ["-O3", *AVX512, "-mamx-tile", "-mamx-int8", "-mamx-bf16"],
}


class BuildKernels(build_ext):
    """Compiles each source with its own flags, which distutils' extensions cannot say."""

    def build_extension(self, ext: Extension) -> None:
        sources = SOURCES | (X86_SOURCES if platform.machine().lower() in ("x86_64", "amd64") else {})
        extra = os.environ.get("QVL_CXXFLAGS", "").split()  # the sanitizers of `make asan`
        objects = []
        for name, flags in sources.items():
            objects += self.compiler.compile(
                [str(CSRC / name)], self.build_temp, extra_postargs=[*COMMON, *flags, *extra], depends=ext.depends
            )
        target = self.get_ext_fullpath(ext.name)
        self.mkpath(os.path.dirname(target))
        self.compiler.link_shared_object(objects, target, extra_postargs=["-pthread", *extra], target_lang="c++")


setup(
    packages=RUNTIME + KERNELS,
    package_dir={"qvl_runtime": "qvl_runtime", "qvl_kernels": "kernels/qvl_kernels"},
    ext_modules=[
        Extension(
            "qvl_kernels._cpu",
            [str(CSRC / name) for name in [*SOURCES, *X86_SOURCES]],
            depends=sorted(str(path) for pattern in ("*.h", "*.inl") for path in CSRC.glob(pattern)),
            language="c++",
            optional=True,
        )
    ],
    cmdclass={"build_ext": BuildKernels},
)
