"""The report as a Markdown page: every figure with its command, hardware, date and commit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

GIB = 2**30


def write_page(report: dict[str, Any], images: dict[str, str], path: Path) -> None:
    """Write the page; images: titles by file name, in the page's folder."""
    measured = [model for model in report["models"] if "skipped" not in model]
    lines = [
        *_head(report, measured),
        *_speed(measured, images),
        *_time(measured, images),
        *_memory(measured, images),
        *_growth(measured, images),
        *_serving(report, images),
        *_bounds(report),
    ]
    path.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")


def _head(report: dict[str, Any], measured: list[dict[str, Any]]) -> list[str]:
    machine, models = report["machine"], report["models"]
    return [
        f"# {machine['device']}, {machine['date'][:10]}",
        "",
        f"`{report['command']}`: {report['minutes']:.0f} minutes; {machine['system']}, {machine['memory_gib']:.0f} "
        f"GiB, Python {machine['python']}, torch {machine['torch_version']}, qvl {machine['qvl']} at commit "
        f"{machine['commit'] or 'unknown'}.",
        f"{spread_notes(report['passes'])} Full-size weights are random, which costs the same. "
        "Published figures are those of the original code on one A100-SXM4-80G: other hardware, for orientation.",
        "",
        *table(
            ("model", "read at best", "16-bit product at best", "kernels"),
            [
                (
                    m["label"],
                    spread(m["speed"]["ceilings"]["read_gb_s"], "GB/s"),
                    spread(m["speed"]["ceilings"]["gemm_gop_s"], "Gop/s"),
                    m["kernels"]["ops"],
                )
                for m in measured
            ],
        ),
        *(f"- {m['label']}: left out, {m['skipped']}" for m in models if "skipped" in m),
        "",
    ]


def _speed(measured: list[dict[str, Any]], images: dict[str, str]) -> list[str]:
    return [
        "## Speed",
        "",
        *image(images, "speed.png"),
        *table(
            ("model", "generated", "tokens/s", "GB/s", "of the read ceiling", "original, A100", "measured as"),
            [
                (
                    m["label"],
                    mean["length"],
                    spread(mean["tok_s"]),
                    f"{mean['gb_s']:.1f}",
                    f"{mean['of_read']:.0%}",
                    mean["published"] or "",
                    mean["how"],
                )
                for m in measured
                for mean in m["speed"]["means"]
            ],
        ),
        "Several sequences decoded together, tokens/s of all:",
        "",
        *table(
            ("model", "together", "tokens/s", "context"),
            [
                (m["label"], b["size"], spread(b["tok_s"]), b["context"])
                for m in measured
                for b in m["speed"]["batches"]
            ],
        ),
    ]


def _time(measured: list[dict[str, Any]], images: dict[str, str]) -> list[str]:
    return [
        "## Time",
        "",
        *image(images, "time.png"),
        *table(
            ("model", "tokens", "first token", "p50", "p95", "p99", "image", "vision", "prefill", "decode"),
            [timing(m) for m in measured],
        ),
    ]


def _memory(measured: list[dict[str, Any]], images: dict[str, str]) -> list[str]:
    return [
        "## Memory",
        "",
        *image(images, "memory.png"),
        *table(
            ("model", "case", "peak, GiB", "planned", "original, A100", "how"),
            [
                (
                    m["label"],
                    f"{case['name']} {case['tokens'] or ''}",
                    f"{case['peak'] / GIB:.2f}",
                    planned(case),
                    case["published_gib"] or "",
                    case["how"],
                )
                for m in measured
                if m["memory"]
                for case in m["memory"]["cases"]
            ],
        ),
        *(f"- {m['label']}: {m['note']}" for m in measured if m["note"]),
        "",
    ]


def _growth(measured: list[dict[str, Any]], images: dict[str, str]) -> list[str]:
    lines = ["## Growth", ""]
    for model in measured:
        for curve in model["growth"]:
            points = ", ".join(f"{p['x']}: {spread(p['seconds'], 's')}" for p in curve["points"])
            text = f"**{model['label']}, {curve['name']}** against {curve['axis']}. {curve['bound']}"
            lines += [text, "", points, ""]
        if model["growth"]:
            lines += image(images, f"growth-{model['label'].replace(',', '').replace(' ', '-').lower()}.png")
    return lines


def _serving(report: dict[str, Any], images: dict[str, str]) -> list[str]:
    return [
        "## Serving",
        "",
        *image(images, "serving.png"),
        "Poisson arrivals over `AsyncEngine` on nano; two thirds have one of six images "
        "(`benchmarks/serving/serving.py`).",
        "",
        *table(
            ("rate", "tokens/s", "TTFT p50 / p95 / p99, s", "TPOT p50 / p95 / p99, ms", "prefix hits"),
            [serving(record) for record in report["serving"]],
        ),
    ]


def _bounds(report: dict[str, Any]) -> list[str]:
    return [
        "## On a GPU: computed, and what an older version measured",
        "",
        "The most that the memory's bandwidth allows for the mean step of the published lengths, with a 16-bit cache; "
        "the original was measured on that A100. This project's figures are from one H100 on 26 November 2026, commit "
        "49678f5, before the kernels that came since: docs/gpu.md has more of them. No later version has run on a GPU.",
        "",
        *table(
            ("model", "GPU", "tokens", "GB a token", "at most, tokens/s", "original, A100", "measured, older code"),
            [
                (
                    b["model"],
                    b["machine"],
                    b["context"],
                    f"{b['gb_a_token']:.2f}",
                    f"{b['at_most_tok_s']:.0f}",
                    b["published"] or "",
                    b.get("measured") or "",
                )
                for b in report["bounds"]
            ],
        ),
    ]


def spread_notes(passes: int) -> str:
    """A sentence or two on what the figures and the parentheses are."""
    if passes == 1:
        return "Figures are medians, with p10 and p90 behind them."
    return (
        f"Every model was measured in {passes} passes, in turns with the others over the whole time. Figures are the "
        "median of the passes' medians; behind them, from the lowest p10 of a pass to the highest p90. Long "
        "measurements that ran once have no spread. Sentences on what bounds a curve are the first pass's."
    )


def table(heads: tuple[str, ...], rows: list[tuple[Any, ...]]) -> list[str]:
    """Lines of a Markdown table, and an empty one; nothing where there are no rows."""
    if not rows:
        return []
    lines = [heads, ("---",) * len(heads), *rows]
    return [f"| {' | '.join(str(cell) for cell in line)} |" for line in lines] + [""]


def image(images: dict[str, str], name: str) -> list[str]:
    """The Markdown line of a plot and an empty line, or nothing if it was not drawn."""
    return [f"![{images[name]}]({name})", ""] if name in images else []


def spread(value: dict[str, float], unit: str = "") -> str:
    """The median with p10 and p90 in parentheses, if there are several samples."""
    between = f" ({value['p10']:.3g}-{value['p90']:.3g})" if value["samples"] > 1 else ""
    return f"{value['median']:.3g}{between} {unit}".strip()


def timing(model: dict[str, Any]) -> tuple[Any, ...]:
    """A row of the time table: one answer's time to first token, time per token, and time by part."""
    answer = model["speed"]["answer"]
    gaps = [f"{1e3 * answer['tpot_s'][p]:.1f} ms" for p in ("p50", "p95", "p99")]
    parts = [f"{answer['timings'][part]:.2f} s" for part in ("image_s", "vision_s", "prefill_s", "decode_s")]
    return (model["label"], answer["tokens"], f"{answer['ttft_s']:.2f} s", *gaps, *parts)


def planned(case: dict[str, Any]) -> str:
    """The peak that `qvl plan` estimates and how far off it is; empty for loading, which it does not estimate."""
    if not case["planned"]:
        return ""
    return f"{case['planned'] / GIB:.2f} ({case['planned'] / case['peak'] - 1:+.1%})"


def serving(record: dict[str, Any]) -> tuple[Any, ...]:
    """A row of the serving table."""

    def three(name: str, unit: float) -> str:
        return " / ".join(f"{unit * value:.3g}" for value in record.get(name, {}).values())

    rate = record["rate"]
    named = rate if isinstance(rate, str) else "all at once" if rate == float("inf") else f"{rate:g} a second"
    hits = f"{record['prefix_hit_rate']:.0%}" if "prefix_hit_rate" in record else ""
    return (named, f"{record['tok_s']:.1f}", three("ttft_s", 1), three("tpot_s", 1e3), hits)
