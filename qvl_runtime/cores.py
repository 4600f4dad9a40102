"""How many threads an engine uses on a CPU: one for each core that the process may use, whatever torch's default is."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from qvl_kernels.affinity import allowed_cpus, unbind
from qvl_kernels.numa import cpu_list, nodes_of

SYS, PROC = Path("/sys"), Path("/proc")
SET_BY_USER = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


class Cores(NamedTuple):
    """The part of a machine that a process may use."""

    logical: int  # CPUs in its affinity mask
    physical: int  # cores of these: SMT siblings are one, since they share what kernels are bound by
    quota: float | None  # CPUs' worth of time that its cgroups grant; None: no limit
    nodes: int  # NUMA nodes with memory that these CPUs belong to; 0: not reported

    @property
    def threads(self) -> int:
        """Threads that keep these cores busy and are not throttled for long; a part of a CPU counts as one."""
        granted = self.physical if self.quota is None else -int(-self.quota // 1)
        return max(1, min(self.physical, granted))


def usable_cores(system: Path = SYS, processes: Path = PROC, affinity: set[int] | None = None) -> Cores:
    """Count the cores that this process may use. affinity: its CPUs; None: as the OS says."""
    affinity = allowed_cpus() if affinity is None else affinity
    cores = {_siblings(system, cpu) for cpu in affinity}
    return Cores(
        len(affinity), len(cores), _quota(system, processes), len(nodes_of(affinity, system / "devices/system/node"))
    )


def settle_threads(cores: Cores | None = None) -> None:
    """Lower torch's number of threads, which the kernels use, to a core each, if it is still a default.

    A thread for each SMT sibling, or more than a container's share, makes every step wait for the slowest. A number
    that OMP_NUM_THREADS, MKL_NUM_THREADS or `torch.set_num_threads` chose is kept; of the latter, numbers that torch
    may have chosen itself (all CPUs, all cores) cannot be told from defaults, and are kept if set after this call.
    A thread that OpenMP has bound to a core is released first, since the kernels' threads would inherit its mask.
    """
    import torch

    unbind()
    cores = usable_cores() if cores is None else cores
    defaults = {os.cpu_count(), cores.logical, cores.physical, _machine_cores()}
    chosen = any(os.environ.get(name) for name in SET_BY_USER) or torch.get_num_threads() not in defaults
    if not chosen and torch.get_num_threads() > cores.threads:
        torch.set_num_threads(cores.threads)


def _machine_cores(system: Path = SYS) -> int:
    return len({_siblings(system, cpu) for cpu in range(os.cpu_count() or 1)})


def _siblings(system: Path, cpu: int) -> frozenset[int]:
    """The CPUs of a CPU's core; itself alone where the OS does not say."""
    topology = system / "devices/system/cpu" / f"cpu{cpu}" / "topology"
    for name in ("core_cpus_list", "thread_siblings_list"):  # the second is the name before Linux 5.3
        try:
            found = cpu_list((topology / name).read_text())
        except (OSError, ValueError):
            continue
        if cpu in found:  # an empty list would make one core of all CPUs
            return frozenset(found)
    return frozenset((cpu,))


def _quota(system: Path, processes: Path) -> float | None:
    """The least quota of the process's cgroups and of those around them, versions 1 and 2, in CPUs."""
    found = []
    for line in _lines(processes / "self" / "cgroup"):
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            top, read = system / "fs/cgroup", _quota_v2
        elif "cpu" in controllers.split(","):
            top, read = _first_folder(system / "fs/cgroup" / controllers, system / "fs/cgroup/cpu"), _quota_v1
        else:
            continue
        group = Path(path.strip("/"))
        found += [read(top / part) for part in (group, *group.parents)]  # a container may see its own group as the top
    granted = [quota for quota in found if quota is not None]
    return min(granted, default=None)


def _quota_v2(group: Path) -> float | None:
    return _share(" ".join(_lines(group / "cpu.max")))


def _quota_v1(group: Path) -> float | None:
    return _share(" ".join(_lines(group / "cpu.cfs_quota_us") + _lines(group / "cpu.cfs_period_us")))


def _share(text: str) -> float | None:
    """CPUs of a quota and its period in microseconds: "max 100000" and "-1 100000" are no limit."""
    try:
        quota, period = map(int, text.split())
    except ValueError:
        return None
    return quota / period if quota > 0 and period > 0 else None


def _first_folder(*folders: Path) -> Path:
    return next((folder for folder in folders if folder.is_dir()), folders[0])


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(errors="replace").split("\n") if path.is_file() else []
    except OSError:
        return []
