"""The kernel report: reading machine code, judging, and (a minute, in a process of its own) every kernel's bars."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest

from tools.kernel_report import sass
from tools.kernel_report.__main__ import complain, main
from tools.kernel_report.judge import Row
from tools.kernel_report.machines import MACHINES
from tools.kernel_report.tables import decode_step, page, text
from tools.kernel_report.versions import SUPPORTED, FetchError, fetch, side_by_side, versions

pytestmark = pytest.mark.unit
HERE = find_spec("triton") is not None

LISTING = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_0:
        /*0010*/                   LDGSTS.E.BYPASS.LTC128B.128 [R5], [R2.64] ;
        /*0020*/                   LDG.E.U16 R4, [R2.64] ;
        /*0030*/                   LOP3.LUT R6, R4, 0x780078, RZ, 0xc0, !PT ;
        /*0040*/                   HMMA.16816.F32 R8, R4, R6, R8 ;
        /*0050*/               @P0 BRA `(.L_x_0) ;
        /*0060*/                   STG.E.128 [R2.64], R8 ;
        /*0070*/                   EXIT ;
        /*0080*/                   NOP;
"""


def test_machine_code_is_read() -> None:
    code = sass.parse(LISTING)
    assert len(code.instructions) == 8 and code.loops == [range(1, 6)]
    assert [sass.classify(line).name for line in code.instructions] == [
        "int",
        "ldg",
        "ldg",
        "bits",
        "mma",
        "ctl",
        "stg",
        "ctl",
    ]
    loop = sass.main_loop(code)
    assert sass.loads(loop) == [16, 2]
    assert sass.spill_share(code) == 0.0
    assert sass.spill_share(sass.parse(LISTING.replace("LDG.E.U16 R4, [R2.64]", "LDL.64 R4, [R1]"))) == 1 / 5
    assert sass.after_wait(code.instructions) == code.instructions
    assert sass.after_wait(["S2R R0", "ACQBULK", "EXIT"]) == ["ACQBULK", "EXIT"]
    cycles = sass.pipe_cycles(MACHINES["sm_80"], loop)
    assert cycles == {"issue": 5, "lsu": 4 + 12 + 4, "alu": 2, "mma": 8}
    widths = {"LDSM.16.M88.4 R24, [R8]": 16, "LDSM.16.MT88.2 R2, [R8]": 8, "LDS R2, [R8]": 4, "STS.U16 [R8], R2": 2}
    assert {text: sass.access_bytes(text) for text in widths} == widths


def test_what_limits_the_programs_on_a_multiprocessor() -> None:
    a100 = MACHINES["sm_80"]
    assert a100.occupancy(registers=255, shared=0, warps=4) == (2, "registers")
    assert a100.occupancy(registers=32, shared=80 << 10, warps=4) == (2, "shared")
    assert a100.occupancy(registers=16, shared=0, warps=8) == (8, "warps")
    assert [machine.shared_per_program >> 10 for machine in MACHINES.values()] == [163, 99, 99, 227]


GOOD = Row(
    "int4 qkv, 1 row",
    "sm_80",
    ratio=0.5,
    max_ratio=0.6,
    wide=1.0,
    min_wide=0.9,
    memory_us=10,
    issue_us=5,
    pipe_us=4,
    pipe="alu",
    bytes_moved=20_000_000,
    least_bytes=19_000_000,
    per_layer=4,
    mix={"mma": 3},
)


def test_the_worst_fault_gives_the_status(capsys: pytest.CaptureFixture[str]) -> None:
    def last_line() -> str:
        return capsys.readouterr().err.splitlines()[-1]

    slow, narrow = replace(GOOD, ratio=0.7), replace(GOOD, wide=0.5)
    spilling, broken = replace(GOOD, spilled=24, ratio=0.7), Row("x", "sm_90", error="CompilationError: no")
    in_loop, tolerated = replace(GOOD, spilled=8, spill_share=0.02), replace(GOOD, spilled=8, spill_share=0.004)
    assert complain({"": [GOOD, tolerated]}) == 0
    assert "2 kernels: 0 do not compile, 0 spill registers, 0 bars missed (1 spill 16 bytes or less)" in last_line()
    shared = replace(GOOD, shared_stores=4, from_registers=True)
    assert complain({"": [GOOD, slow]}) == complain({"": [narrow]}) == complain({"": [shared]}) == 3
    assert complain({"": [in_loop]}) == 2
    assert complain({"": [replace(GOOD, shared=200, most_shared=100)]}) == 1
    assert complain({"triton 3.6.0": [slow], "triton 3.9.0": [spilling]}) == 2
    assert complain({"": [spilling, broken]}) == 1
    said = capsys.readouterr().err
    assert said.splitlines()[-1] == "2 kernels: 1 do not compile, 1 spill registers, 1 bars missed"
    assert "triton 3.6.0 int4 qkv, 1 row sm_80 exceeds" in said
    assert "int4 qkv, 1 row sm_80 exceeds the ratio: 0.70, bar 0.6" in said
    assert "loads 50% of its bytes 128 bits at a time, bar 90%" in said
    assert "sends weights through shared memory: 4 stores in its loop" in said
    assert "does not run: needs 200 bytes of shared memory of 100" in said
    assert "spills 24 bytes" in said and "x sm_90 does not compile: CompilationError: no" in said


def test_versions_side_by_side() -> None:
    assert versions(["oldest", "newest", "3.7.1", "oldest"]) == ["3.6.0", "3.9.0", "3.7.1"]
    assert versions(["all"]) == list(SUPPORTED)
    table = side_by_side({"3.6.0": [GOOD, Row("x", "sm_90", error="no")], "3.9.0": [replace(GOOD, ratio=0.7)]})
    rows = {line.split("  ")[0]: " ".join(line.split()) for line in table.splitlines()}
    assert rows["int4 qkv, 1 row"] == "int4 qkv, 1 row sm_80 0 0 0.50 0 0 0.70!"
    assert rows["x"].endswith("sm_90 FAILED")


def test_a_version_that_cannot_be_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(FetchError, match=r"triton 0\.0\.1 could not be installed: ERROR: "):
        fetch("0.0.1")
    assert not (tmp_path / "build/triton/0.0.1").exists()


def test_tables() -> None:
    broken = Row("x", "sm_90", error="CompilationError: no")
    assert "FAILED: CompilationError: no" in text([GOOD, broken]) and "mma 3" in text([GOOD])
    step = decode_step([GOOD, replace(GOOD, kernel="int4 qkv, 16 rows")], "sm_80", 1)
    # 4 launches of 10 us in 32 layers, and the output matrix: 1245 MB at 2039 GB/s
    assert "| one layer | 4 | 80000 | 76000 | 40.0 |" in step and "= 1.89 ms, 529 tokens/s" in step
    assert page([GOOD, broken]).count("###") == 4


def test_without_triton_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("tools.kernel_report.__main__.find_spec", lambda name: None)
    assert main([]) == 4
    assert "make setup" in capsys.readouterr().err


@pytest.mark.skipif(not HERE, reason="triton is not installed: `make setup`")
@pytest.mark.parametrize("capability", [machine.gpu.capability for machine in MACHINES.values()])
def test_every_product_with_packed_weights_is_to_keep_them_from_shared_memory(capability: int) -> None:
    """With 1 to 64 rows and more, on every target: the report fails on a single store of such a kernel's loop."""
    from qvl_kernels.aot import aot_specs

    products = [spec for spec in aot_specs(capability) if re.match(r"int[48]_(?!dequantize)", spec.name)]
    assert {f"int4_gemm {name}, 64 rows" for name in ("qkv", "out", "up_gate", "down")} <= {s.name for s in products}
    assert [spec.name for spec in products if not spec.from_registers] == []


@pytest.mark.skipif(not HERE, reason="triton is not installed: `make setup`")
@pytest.mark.timeout(600)
def test_every_kernel_compiles_and_meets_its_bars() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tools.kernel_report"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("int4_small_m") >= 24
