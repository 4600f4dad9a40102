"""Names the packages and where they lie; everything else about the distribution stands in pyproject.toml.

The kernels live in the folder `kernels/`, which is not a package, and are imported as `qvl_kernels`: Hugging Face
publishes a package named `kernels`, and a second one of that name in site-packages breaks transformers for its owner.
"""

from __future__ import annotations

from setuptools import find_packages, setup

RUNTIME = find_packages(".", include=["qvl_runtime*"])
KERNELS = find_packages("kernels", include=["qvl_kernels*"])

setup(
    packages=RUNTIME + KERNELS,
    package_dir={"qvl_runtime": "qvl_runtime", "qvl_kernels": "kernels/qvl_kernels"},
)
