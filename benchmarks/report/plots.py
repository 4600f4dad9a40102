"""The images of a report: speed, time, memory, growth, serving."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

# Color-blind safe (Okabe and Ito, 2008): ours, the original's published figure, the machine's bound.
OURS, PUBLISHED, BEST = "#0072B2", "#E69F00", "#999999"
SHADES = ("#0072B2", "#56B4E9", "#009E73", "#E69F00", "#CC79A7", "#D55E00")
Model = dict[str, Any]


def draw(report: dict[str, Any], folder: Path) -> dict[str, str]:
    """Write the plots that the report has figures for; their titles by file name."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams.update({"figure.dpi": 110, "font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    models = [model for model in report["models"] if "skipped" not in model]
    plots: dict[str, tuple[str, Callable[[], bool]]] = {
        "speed.png": ("Tokens a second", lambda: speed(pyplot, models)),
        "time.png": ("Where the time of one answer goes", lambda: split(pyplot, models)),
        "memory.png": ("Memory", lambda: memory(pyplot, models)),
        "serving.png": ("Throughput against latency", lambda: serving(pyplot, report["serving"])),
    }
    for model in models:
        if model["growth"]:
            name = "growth-" + model["label"].replace(",", "").replace(" ", "-").lower() + ".png"
            plots[name] = (f"How cost grows: {model['label']}", partial(growth, pyplot, model))
    drawn = {}
    for name, (title, plot) in plots.items():
        if plot():
            pyplot.tight_layout()
            pyplot.savefig(folder / name)
            drawn[name] = title
        pyplot.close("all")
    return drawn


def speed(pyplot: Any, models: list[Model]) -> bool:
    """Bars of each model and length, with the published figure and the bound of the read bandwidth."""
    full = [m for m in models if any(mean["published"] for mean in m["speed"]["means"])] or models
    rows = [(m, mean) for m in full for mean in m["speed"]["means"]]
    if not rows:
        return False
    _, axes = pyplot.subplots(figsize=(8, 0.9 + 0.75 * len(rows)))
    for y, (_, mean) in enumerate(rows):
        rate, ceiling = mean["tok_s"], mean["tok_s"]["median"] / max(mean["of_read"], 1e-9)
        axes.barh(y + 0.27, ceiling, 0.25, color=BEST, label="this machine's memory at best" if not y else None)
        axes.barh(y, rate["median"], 0.25, color=OURS, label="qvl here" if not y else None)
        axes.plot([rate["p10"], rate["p90"]], [y, y], color="black", linewidth=1)
        if mean["published"]:
            axes.barh(
                y - 0.27,
                mean["published"],
                0.25,
                color=PUBLISHED,
                label="original on an A100-80G (other hardware)" if not y else None,
            )
        axes.text(rate["p90"], y, f"  {rate['median']:.3g}", va="center")
    axes.set_yticks(range(len(rows)), [f"{m['label']}\n{mean['length']} tokens" for m, mean in rows])
    axes.set_xlabel("tokens a second, one sequence")
    axes.invert_yaxis()
    axes.legend(frameon=False, ncols=3, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1))
    return True


def split(pyplot: Any, models: list[Model]) -> bool:
    """One stacked bar a model: image decode, vision encoder, prefill, decode, as shares."""
    if not models:
        return False
    _, axes = pyplot.subplots(figsize=(8, 0.8 + 0.5 * len(models)))
    parts = ("image_s", "vision_s", "prefill_s", "decode_s")
    for y, model in enumerate(models):
        timings, left = model["speed"]["answer"]["timings"], 0.0
        total = sum(timings[part] for part in parts)
        for part, color in zip(parts, SHADES, strict=False):
            label = {"image_s": "image decode", "vision_s": "vision encoder"}.get(part, part.removesuffix("_s"))
            axes.barh(y, timings[part] / total, left=left, color=color, label=label if not y else None)
            left += timings[part] / total
        axes.text(1.01, y, f"{total:.2f} s", va="center")
    names = [f"{m['label']}\n1 image, {m['speed']['answer']['tokens']} tokens" for m in models]
    axes.set_yticks(range(len(models)), names)
    axes.invert_yaxis()
    axes.legend(frameon=False, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1))
    axes.xaxis.set_major_formatter("{x:.0%}")
    return True


def memory(pyplot: Any, models: list[Model]) -> bool:
    """Weights by part and the rest of the peak, for both published cases, with the published peaks."""
    rows = [(m, case) for m in models if m["memory"] for case in m["memory"]["cases"] if case["name"] != "load"]
    rows = [row for row in rows if row[1]["published_gib"]] or rows
    if not rows:
        return False
    _, axes = pyplot.subplots(figsize=(8, 0.8 + 0.6 * len(rows)))
    for y, (model, case) in enumerate(rows):
        parts = dict(model["memory"]["parts"])
        parts["KV cache"] = case["tokens"] * model["memory"]["kv_per_token"]
        parts["all else"] = max(0, case["peak"] - sum(parts.values()))
        left = 0.0
        for (name, size), color in zip(parts.items(), SHADES, strict=False):
            axes.barh(y, size / 2**30, 0.6, left=left, color=color, label=name if not y else None)
            left += size / 2**30
        axes.text(left, y, f" {case['peak'] / 2**30:.2f}", va="center")
        if case["published_gib"]:
            axes.plot(
                [case["published_gib"]] * 2,
                [y - 0.35, y + 0.35],
                color="black",
                linewidth=2,
                label="original, A100-80G" if not y else None,
            )
    axes.set_yticks(range(len(rows)), [f"{m['label']}\n{case['name']} {case['tokens']}" for m, case in rows])
    axes.invert_yaxis()
    axes.set_xlabel("GiB at the peak")
    axes.legend(frameon=False, ncols=4, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1))
    return True


def serving(pyplot: Any, records: list[dict[str, Any]]) -> bool:
    """Tokens a second of all against the time to the first token, one point a rate."""
    points = [record for record in records if record.get("ttft_s")]
    if not points:
        return False
    _, axes = pyplot.subplots(figsize=(6, 3.4))
    x = [record["tok_s"] for record in points]
    for name, color in zip(("p50", "p95"), SHADES, strict=False):
        waits = [record["ttft_s"][name] for record in points]
        axes.plot(x, waits, "o-", color=color, label=f"time to first token, {name}")
    for record in points:
        label = "at once" if record["rate"] == float("inf") else f"{record['rate']:g}/s"
        axes.annotate(label, (record["tok_s"], record["ttft_s"]["p95"]), (4, 4), textcoords="offset points")
    alone = next((record["tok_s"] for record in records if record["rate"] == "one at a time"), None)
    if alone:
        axes.axvline(alone, color=BEST, label="one at a time")
    axes.set_xlabel("tokens a second, all requests")
    axes.set_ylabel("seconds")
    axes.legend(frameon=False)
    return True


def growth(pyplot: Any, model: Model) -> bool:
    """Four curves, each with its spread."""
    _, grid = pyplot.subplots(2, 2, figsize=(8, 5.6))
    for axes, curve in zip(grid.flat, model["growth"], strict=False):
        x = [point["x"] for point in curve["points"]]
        median, low, high = ([point["seconds"][k] for point in curve["points"]] for k in ("median", "p10", "p90"))
        axes.plot(x, median, "o-", color=OURS)
        axes.fill_between(x, low, high, color=OURS, alpha=0.2)
        axes.set_title(curve["name"])
        axes.set_xlabel(curve["axis"])
        axes.set_ylabel("seconds")
        axes.set_ylim(bottom=0)
        axes.xaxis.get_major_locator().set_params(integer=True)
    return True
