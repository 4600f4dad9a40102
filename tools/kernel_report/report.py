"""Compile and judge every kernel, in several processes: the compiler has one thread."""

from __future__ import annotations

import multiprocessing
import os
import re
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

from tools.kernel_report.compile import binary_of
from tools.kernel_report.judge import Row, judge
from tools.kernel_report.machines import MACHINES


def report(targets: Sequence[str], pattern: str = "", sass: str | None = None, jobs: int = 1) -> list[Row]:
    """Compile and judge every matching kernel for each target in `jobs` processes; save disassemblies in `sass`."""
    share = partial(_judge_share, targets=targets, pattern=pattern, sass=sass, jobs=jobs)
    if jobs == 1:
        judged = share(0)
    else:
        with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
            judged = [row for rows in pool.map(share, range(jobs)) for row in rows]
    return [row for _, row in sorted(judged, key=lambda numbered: numbered[0])]


def _judge_share(job: int, targets: Sequence[str], pattern: str, sass: str | None, jobs: int) -> list[tuple[int, Row]]:
    """Judge the kernels of every `jobs`-th binary, from number `job` on; returns them with their numbers."""
    os.environ.pop("TRITON_INTERPRET", None)  # interpreted functions cannot be compiled
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # pins what Triton 3.9 only warns about
    from qvl_kernels.aot import aot_specs  # imports Triton

    wanted = [(spec, target) for target in targets for spec in aot_specs(MACHINES[target].gpu.capability)]
    wanted = [(spec, target) for spec, target in wanted if re.search(pattern, spec.name)]
    binaries: dict[tuple[str, str], int] = {}  # each is compiled and read in one process
    rows = []
    for number, (spec, target) in enumerate(wanted):
        if binaries.setdefault((binary_of(spec.launch), target), len(binaries)) % jobs != job:
            continue
        row, code = judge(spec, target)
        rows.append((number, row))
        if sass and code:
            Path(sass).mkdir(parents=True, exist_ok=True)
            stem = re.sub(r"\W+", "_", f"{row.kernel} {target}")
            (Path(sass) / f"{stem}.sass").write_text(code)
    return rows
