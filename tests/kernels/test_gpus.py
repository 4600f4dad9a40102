"""The table of GPUs, and finding one by the driver's name."""

from __future__ import annotations

import pytest

from qvl_kernels.gpus import GPUS, UNSUPPORTED, find_gpu, gpu_named

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("driver_name", "name"),
    [
        ("NVIDIA A100-SXM4-80GB", "A100-SXM4-80GB"),
        ("NVIDIA A100 80GB PCIe", "A100 80GB PCIe"),
        ("NVIDIA H100 80GB HBM3", "H100 80GB HBM3"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("NVIDIA A10", "A10"),
        ("NVIDIA A10G", "A10"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA A100-PCIE-40GB", None),
        ("", None),
    ],
)
def test_find_gpu_by_the_name_that_the_driver_reports(driver_name: str, name: str | None) -> None:
    gpu = find_gpu(driver_name)
    assert (gpu and gpu.name) == name


def test_names_and_keys_are_unique_and_supported() -> None:
    names, keys = [gpu.name for gpu in GPUS], [gpu.key for gpu in GPUS if gpu.key]
    assert len(set(names)) == len(names) and len(set(keys)) == len(keys) and not set(keys) & set(UNSUPPORTED)
    assert all(gpu.capability >= 80 for gpu in GPUS) and all(capability < 80 for capability in UNSUPPORTED.values())
    assert all(gpu_named(name).name == name for name in names)
    with pytest.raises(KeyError, match="no GPU is named 'A11'; known are A100"):
        gpu_named("A11")
