"""Exchange GPTQ checkpoints with other projects, in both directions, and compare every linear.

    python -m tools.interop                                  # all three libraries, as `make interop` does
    python -m tools.interop --library auto-gptq --folder /tmp/interop
    python -m tools.interop --record tests/faults/interop_configs.json

Exit status: 0 all equal, 1 one differs or was refused, 2 a library's environment is missing.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from qvl_runtime.errors import QVLError
from qvl_runtime.quantize.options import QuantizeOptions
from qvl_runtime.quantize.quantizer import Quantizer
from tools.interop.check import compare
from tools.interop.float_checkpoint import add_code, make_float
from tools.interop.library import outputs_of
from tools.interop.record import record

FOUR = {"bits": 4, "group_size": 64, "sym": True, "desc_act": False}
ASYMMETRIC = {**FOUR, "group_size": 32, "sym": False}
ORDERED, EIGHT = {**FOUR, "desc_act": True}, {**FOUR, "bits": 8, "group_size": 128}
V2 = {**ASYMMETRIC, "format": "gptq_v2"}
COMMON = {"symmetric": FOUR, "asymmetric": ASYMMETRIC, "act-order": ORDERED, "8 bits": EIGHT}


class Library(NamedTuple):
    """One other project."""

    environment: str  # a folder in .venv-interop
    writes: dict[str, dict[str, Any]]  # settings by name
    reads: tuple[str, ...]  # names of `OURS`
    refuses: str = ""  # what it says of the others


OURS = {
    "symmetric": QuantizeOptions(samples=8, group_size=64),
    "asymmetric": QuantizeOptions(samples=8, group_size=32, sym=False),
    "act-order": QuantizeOptions(samples=8, group_size=64, order="full"),
    "8 bits": QuantizeOptions(samples=8, group_size=128, bits=8),
    "one group": QuantizeOptions(samples=8, group_size=-1),
}
LIBRARIES = {
    "auto-gptq": Library(
        "auto-gptq",
        {
            **COMMON,
            "static groups": {**ORDERED, "static_groups": True},
            "one group": {**ASYMMETRIC, "group_size": -1},
        },
        tuple(OURS),
    ),
    "gptqmodel": Library(
        "gptqmodel",
        {**COMMON, "v2": V2, "rules": {**FOUR, "dynamic": {"-:.*visual.*": {}}}},
        tuple(kind for kind in OURS if kind != "asymmetric"),
        "asymmetric checkpoints of format v1 only if GPTQModel wrote them",
    ),
    "optimum": Library(
        "gptqmodel", {**COMMON, "act-order": {**ORDERED, "act_group_aware": False}, "v2": V2}, tuple(OURS)
    ),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m tools.interop", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--library", choices=LIBRARIES, action="append", help="one of them; may be repeated")
    parser.add_argument("--environments", type=Path, default=Path(".venv-interop"), help="made by make interop")
    parser.add_argument("--folder", type=Path, help="for the checkpoints, which are then kept")
    parser.add_argument("--record", type=Path, help="write what the libraries put into their configurations")
    options = parser.parse_args(arguments)
    names = options.library or list(LIBRARIES)
    for name in names:
        if not python(options.environments, name).is_file():
            print(f"{python(options.environments, name)} is missing: run make interop", file=sys.stderr)
            return 2
    with tempfile.TemporaryDirectory() as scratch:
        folder = (options.folder or Path(scratch)).absolute()
        if not (folder / "float").exists():
            make_float(folder / "float")
        failures = sum(exchange(folder, name, options.environments) for name in names)
        if options.record:
            record(options.record, {name: folder / name for name in names})
    print(f"{failures} failed" if failures else "all equal")
    return int(failures > 0)


def python(environments: Path, name: str) -> Path:
    """The interpreter that has a library."""
    return environments.absolute() / LIBRARIES[name].environment / "bin" / "python"


def exchange(folder: Path, name: str, environments: Path) -> int:
    """Read what the library writes, and let it read what we write; returns the number of failures."""
    library, script = LIBRARIES[name], Path(__file__).resolve().with_name("library.py")
    source, theirs, ours = folder / "float", folder / name, folder / "ours"

    def run(command: str, *more: str) -> None:
        log = folder / f"{name}-{command}.log"
        with log.open("w") as out:
            subprocess.run(
                [str(python(environments, name)), str(script), command, name, *more],
                cwd=folder, stdout=out, stderr=subprocess.STDOUT, env={**os.environ, "PYTHONPATH": ""},
            )  # fmt: skip
        for line in log.read_text(errors="replace").splitlines():
            if line.startswith("failed: "):
                print(line)

    theirs.mkdir(exist_ok=True)
    missing = {kind: settings for kind, settings in library.writes.items() if not (theirs / kind).is_dir()}
    if missing:
        run("write", str(source), str(theirs), json.dumps(missing))
    for kind in library.reads:
        if not (ours / kind).exists():
            Quantizer.open(source, ours / kind, OURS[kind]).run()
            add_code(ours / kind)
    folders = [*(theirs / kind for kind in library.writes), *(ours / kind for kind in library.reads)]
    for path in folders:
        outputs_of(path).unlink(missing_ok=True)  # of another library
    run("read", *(str(path) for path in folders if path.is_dir()))
    rows = [*judge(name, "here", theirs, library.writes, source), *judge(name, "there", ours, library.reads, source)]
    for line, _ in rows:
        print(line)
    if library.refuses:
        print(f"{name:10} reads {library.refuses}")
    return sum(not equal for _, equal in rows)


def judge(name: str, where: str, folder: Path, kinds: Any, source: Path) -> Iterator[tuple[str, bool]]:
    """One line for each checkpoint, and whether both sides read it alike."""
    for kind in kinds:
        start = f"{name:10} {'written by it' if where == 'here' else 'written here':14} {kind:14}"
        try:
            result = compare(folder / kind, source)
        except (QVLError, OSError) as error:
            yield f"{start} FAILED: {error}", False
            continue
        verdict = "equal" if result.equal else "DIFFERS"
        notes = f"; {'; '.join(result.notes)}" if result.notes else ""
        yield (
            f"{start} {verdict}: {result.ours_to_theirs:.1e} of {result.bound:.0e}, {result.to_float:.2f} from the "
            f"float model{notes}",
            result.equal,
        )


if __name__ == "__main__":
    sys.exit(main())
