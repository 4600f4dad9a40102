"""One page of a check's findings, to attach to an issue."""

from __future__ import annotations

from collections.abc import Sequence

from qvl_runtime.evaluate.check.check import CheckReport
from qvl_runtime.evaluate.check.dialogues import DEMO_PICTURE
from qvl_runtime.evaluate.check.replies import Compared
from qvl_runtime.profile.memory import PUBLISHED
from qvl_runtime.profile.speed import as_table


def page(report: CheckReport) -> str:
    """The report in Markdown."""
    lines = [f"# Check of {report.model}", "", *_summary(report), "", *_dialogues(report.compared)]
    if report.other is not None:
        lines += ["", f"## Compared with {report.other}", "", *_other(report)]
    if report.speed is not None:
        rows = as_table(report.speed)
        if rows:
            lines += ["", "## Speed", "", *_table(list(rows[0]), [list(row.values()) for row in rows])]
    lines += ["", "## Files", "", *_table(["file", "bytes", "SHA-256"], _files(report))]
    return "\n".join(lines) + "\n"


def _summary(report: CheckReport) -> list[str]:
    kernels, machine = report.engine["kernels"], report.machine
    tensors = ", ".join(f"{count} {dtype}" for dtype, count in sorted(report.files.tensors.items())) or "converted"
    finite = {True: "all finite", False: "NOT FINITE", None: "not looked at: no picture was named"}[report.finite]
    unasked = f"not asked: name the authors' demo picture, {DEMO_PICTURE}"
    names = ", ".join(report.reproduced) or ("none" if report.compared else unasked)
    return [
        f"- dialogues reproduced: {names}",
        f"- tensors: as the configuration requires ({tensors})",
        f"- logits: {finite}",
        f"- runs in {report.engine['dtype']} on {machine.device}; ops: {kernels['ops']}",
        f"- memory at its peak: {report.peak_bytes / 1e9:.2f} GB{_documented_memory(report)}",
        f"- versions: qvl {machine.qvl} {machine.commit}, torch {machine.torch_version}, Python {machine.python}, "
        f"{machine.system}; {machine.date}",
        f"- checkpoint: SHA-256 {report.files.whole}",
    ]


def _documented_memory(report: CheckReport) -> str:
    """What the authors measured for weights of this format, where these are of the published size."""
    if report.speed is None or all(mean.published is None for mean in report.speed.means):
        return ""
    known = {name: figure for (weights, name), figure in PUBLISHED.items() if weights == report.speed.weights}
    listed = ", ".join(f"{name} {figure} GB" for name, figure in known.items())
    return f"; the original on an A100-80G: {listed}"


def _dialogues(compared: Sequence[Compared]) -> list[str]:
    if not compared:
        return []
    lines = ["## Dialogues", "", "Asked greedily; each turn after the documented answers to those before it.", ""]
    for one in compared:
        lines += [
            f"- {one.dialogue}: {_code(one.question)}: **{one.verdict}**",
            f"    - documented: {_code(one.expected)}",
            *([] if one.reproduced else [f"    - here: {_code(one.answer)}"]),
            f"    - {one.likeliest} of the documented answer's {one.tokens} tokens are the likeliest here; mean log "
            f"probability {one.logprob:.3f}",
        ]
    return lines


def _other(report: CheckReport) -> list[str]:
    rows = [
        [
            one.dialogue,
            _code(one.question),
            "yes" if one.answer == two.answer else f"no: {_code(two.answer)}",
            f"{one.likeliest} and {two.likeliest} of {one.tokens}",
            f"{one.logprob:.3f} and {two.logprob:.3f}",
        ]
        for one, two in zip(report.compared, report.of_other, strict=True)
    ]
    return _table(["dialogue", "question", "same answer", "likeliest tokens", "mean log probability"], rows)


def _files(report: CheckReport) -> list[list[str]]:
    return [[name, f"{size:,}", digest] for name, (size, digest) in report.files.files.items()]


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [f"| {' | '.join(headings)} |", "|---" * len(headings) + "|"]
    return lines + [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows]


def _code(text: str) -> str:
    """Text in backticks, on one line."""
    return f"`{' '.join(text.replace('`', chr(39)).split())}`"
