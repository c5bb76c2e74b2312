"""What bench_kernels.py found, as pictures."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from candidates import BASE, COPY, OURS
from kernel_tables import KIND_TITLES, of_kinds, roofline

COLORS = {
    OURS: "#c2410c",
    "portable": "#fdba74",
    BASE: "#111827",
    "torchao": "#7c3aed",
    "deep_gemm": "#0891b2",
    "fbgemm": "#be185d",
    "bf16": "#9aa5b1",
    "tensorwise": "#1d4ed8",
    "rowwise": "#15803d",
}


def plot(result: dict[str, Any], path: Path) -> None:
    """TFLOP/s of every shape by kind, the roofline, and quantisation as a percentage of the copy's bandwidth."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    kinds = list(of_kinds(result["gemm"]))
    quantizers = list(dict.fromkeys(n for r in result["quantize"] for n in r["candidates"] if n != COPY))
    heights = [0.24 * len(records) + 0.6 for _, records in kinds]
    heights += [4.0] if kinds else []
    heights += [0.24 * len(quantizers) + 0.6] if quantizers else []
    if not heights:
        return
    style = {"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": "#e4e4e4"}
    with plt.rc_context(style):
        figure, grid = plt.subplots(
            len(heights), 1, figsize=(9, sum(heights) + 1), height_ratios=heights, layout="constrained", squeeze=False
        )
        axes = iter(grid[:, 0])
        for kind, records in kinds:
            _plot_shapes(next(axes), KIND_TITLES[kind], records)
        if kinds:
            _plot_roofline(next(axes), result)
        if quantizers:
            _plot_quantizers(next(axes), result["quantize"], quantizers)
        handles = {h.get_label(): h for axis in figure.axes[: len(kinds)] for h in axis.get_legend_handles_labels()[0]}
        if handles:
            figure.legend(handles.values(), handles, loc="outside upper center", ncols=5, frameon=False, fontsize=9)
        top = figure.axes[0]
        top.set_title(f"{result['gpu']}: {top.get_title('left')}", loc="left", fontsize=10)
        figure.savefig(path, dpi=130)
        plt.close(figure)


def _measured(records: Sequence[dict[str, Any]], name: str) -> list[tuple[int, dict[str, Any]]]:
    return [(i, r["candidates"][name]) for i, r in enumerate(records) if "us" in r["candidates"].get(name, {})]


def _plot_shapes(axis: Any, title: str, records: Sequence[dict[str, Any]]) -> None:
    for name, color in COLORS.items():
        if found := _measured(records, name):
            axis.scatter(
                [c["tflops"] for _, c in found], [i for i, _ in found], s=26, color=color, label=name, zorder=3
            )
    axis.set_yticks(range(len(records)), [f"{r['shape']}   {r['M']}×{r['N']}×{r['K']}" for r in records], fontsize=8)
    axis.set_ylim(len(records) - 0.5, -0.5)
    axis.set_xlim(left=0)
    axis.set_xlabel("TFLOP/s")
    axis.set_title(title, loc="left", fontsize=10)


def _plot_roofline(axis: Any, result: dict[str, Any]) -> None:
    gbps, peaks = result["copy"]["gbps"], result["peak_tflops"]
    intensities = []
    for name, color in COLORS.items():
        points = []
        for record in result["gemm"]:
            c = record["candidates"].get(name, {})
            if "us" in c:
                points.append((record["flops"] / c["bytes"], c["tflops"]))
        if points:
            axis.scatter(*zip(*points, strict=True), s=14, color=color, alpha=0.8, zorder=3)
            intensities += [x for x, _ in points]
    if intensities:
        low, high = min(intensities) / 4, max(intensities) * 1.5
        grid = [low * (high / low) ** (i / 200) for i in range(201)]
        for label, peak in (peaks or {"bandwidth": math.inf}).items():
            text = f"{label} peak {peak:,.0f} TFLOP/s" if peaks else "bandwidth"
            roof = [roofline(x, peak, gbps) for x in grid]
            axis.plot(grid, roof, color="#4b5563", linewidth=1, linestyle="-" if label == "fp8" else "--", label=text)
        axis.legend(frameon=False, fontsize=8, loc="lower right")
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlabel("FLOP per byte of operands and result")
    axis.set_ylabel("TFLOP/s")
    axis.set_title(f"roofline: data-sheet peaks, {gbps:,.0f} GB/s as copied in this run", loc="left", fontsize=10)


def _plot_quantizers(axis: Any, records: Sequence[dict[str, Any]], names: Sequence[str]) -> None:
    for row, name in enumerate(names):
        found = [c["percent_of_copy"] for _, c in _measured(records, name) if c["percent_of_copy"] is not None]
        axis.scatter(found, [row] * len(found), s=26, color=COLORS.get(name.partition(" ")[0], COLORS[OURS]), zorder=3)
    axis.set_yticks(range(len(names)), names, fontsize=8)
    axis.set_ylim(len(names) - 0.5, -0.5)
    axis.set_xlim(left=0)
    axis.set_xlabel("% of the bandwidth of copying the same tensor; a dot is a shape")
    axis.set_title("quantisation", loc="left", fontsize=10)
