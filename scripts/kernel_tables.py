"""What bench_kernels.py found, as tables: ratios by shape, details, and what our kernels occupy of a multiprocessor."""

import math
import statistics
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from candidates import BASE, COPY
from measure import table
from shapes import FORWARD, WGRAD

from blockfp8_titan.formats import ceil_div


def roofline(flops_per_byte: float, peak: float, gbps: float) -> float:
    """Attainable TFLOP/s at this intensity under a peak in TFLOP/s and a bandwidth in GB/s."""
    return min(peak, flops_per_byte * gbps / 1e3)


def ctas_per_multiprocessor(registers: int, shared: int, warps: int, limits: dict[str, int]) -> dict[str, int]:
    """How many programs fit a multiprocessor, by each resource; "fit" is the least.

    Args:
        registers: per thread; the hardware gives them to a warp in units of 256.
        shared: bytes per program; the system adds 1 KiB.
        limits: registers, shared bytes, warps and programs of a multiprocessor.
    """
    by = {
        "by_registers": limits["registers"] // (ceil_div(max(registers, 1) * 32, 256) * 256 * warps),
        "by_shared": limits["shared"] // (shared + 1024),
        "by_warps": min(limits["warps"] // warps, limits["programs"]),
    }
    return {**by, "fit": min(by.values())}


def multiprocessor_limits(device: torch.device) -> dict[str, int]:
    properties = torch.cuda.get_device_properties(device)
    return {
        "registers": 65536,  # on every GPU that has e4m3
        "shared": properties.shared_memory_per_multiprocessor,
        "warps": properties.max_threads_per_multi_processor // 32,
        "programs": 24 if (properties.major, properties.minor) == (8, 9) else 32,
    }


def resources(compiled: Iterable[tuple[str, Any]], limits: dict[str, int]) -> list[dict[str, Any]]:
    """What our kernels occupy: one row for each (constants, CompiledKernel) that differs."""
    rows: list[dict[str, Any]] = []
    for constants, kernel in compiled:
        registers, shared, warps = kernel.n_regs, kernel.metadata.shared, kernel.metadata.num_warps
        row = {
            "kernel": kernel.metadata.name,
            "constants": constants,
            "registers": registers,
            "spills": kernel.n_spills,
            "shared_bytes": shared,
            "warps": warps,
            "programs_per_multiprocessor": ctas_per_multiprocessor(registers, shared, warps, limits),
        }
        if row not in rows:
            rows.append(row)
    return sorted(rows, key=lambda row: (row["kernel"], row["constants"]))


def summarise(records: Sequence[dict[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
    """By kind and candidate: shapes measured, geometric mean and worst of the ratio to the base, and wrong results."""
    summary: dict[str, dict[str, dict[str, Any]]] = {}
    for kind in dict.fromkeys(record["kind"] for record in records):
        of_kind = [record for record in records if record["kind"] == kind]
        for name in dict.fromkeys(name for record in of_kind for name in record["candidates"]):
            measured = {r["shape"]: r["candidates"][name] for r in of_kind if "us" in r["candidates"].get(name, {})}
            row: dict[str, Any] = {"shapes": len(measured)}
            row["wrong"] = [shape for shape, record in measured.items() if record["wrong"]]
            if ratios := {s: record["ratio"] for s, record in measured.items() if record["ratio"] is not None}:
                worst = min(ratios, key=lambda shape: ratios[shape])
                row |= {"ratio": statistics.geometric_mean(ratios.values())}
                row |= {"worst_ratio": ratios[worst], "worst_shape": worst}
            summary.setdefault(kind, {})[name] = row
    return summary


KIND_TITLES = {
    FORWARD: "y and dx, 1x128 times 128x128",
    WGRAD: "dw, 1x128 times 1x128",
    "x": "activations and gradients",
    "w": "weights",
}


def summary_table(summary: dict[str, dict[str, dict[str, Any]]]) -> str:
    rows = []
    for kind, names in summary.items():
        for name, row in names.items():
            ratio, worst = "—", "—"
            if "ratio" in row:
                ratio, worst = f"{row['ratio']:.3f}", f"{row['worst_ratio']:.3f} ({row['worst_shape']})"
            rows.append((KIND_TITLES[kind], name, str(row["shapes"]), ratio, worst, str(len(row["wrong"]) or "")))
    header = ("kind", "candidate", "shapes", f"× {BASE} or copy, geometric mean", "worst shape", "wrong")
    return table(header, rows, left=2)


def matrix_table(records: Sequence[dict[str, Any]]) -> str:
    """Shapes against candidates of one kind: TFLOP/s, or the percentage of the copy's bandwidth."""
    names = list(dict.fromkeys(name for record in records for name in record["candidates"]))

    def cell(record: dict[str, Any] | None) -> str:
        if record is None or "failed" in record:
            return "—"
        text = f"{record['tflops']:.0f}" if "tflops" in record else f"{record['percent_of_copy'] or math.nan:.0f} %"
        return text + " WRONG" * record["wrong"]

    rows = []
    for record in records:
        size = f"{record['M']}x{record['N']}x{record['K']}" if "N" in record else f"{record['M']}x{record['K']}"
        rows.append((record["shape"], size, *(cell(record["candidates"].get(name)) for name in names)))
    size = "MxNxK" if "N" in records[0] else "MxK"
    return table(("shape", size, *names), rows, left=2)


def detail_table(records: Sequence[dict[str, Any]], base: str) -> str:
    """One line for each shape and candidate."""
    header = ("shape", "candidate", "µs", "spread", "TFLOP/s", "GB/s", "% of copy", f"× {base}", "relative error")
    rows = []
    for record in records:
        for name, c in record["candidates"].items():
            if "failed" in c:
                rows.append((record["shape"], name, *["—"] * 6, c["failed"].replace("|", "\\|")))
                continue
            error = "not finite" if c["error"] is None else f"{c['error']:.1e}"
            ratio = "—" if c["ratio"] is None else f"{c['ratio']:.3f}"
            copy = "—" if c["percent_of_copy"] is None else f"{c['percent_of_copy']:.0f}"
            numbers = (f"{c['us']:.1f}", f"{c['spread']:.1%}", f"{c['tflops']:.0f}" if "tflops" in c else "—")
            numbers += (f"{c['gbps']:,.0f}", copy, ratio, error + " WRONG" * c["wrong"])
            rows.append((record["shape"], name, *numbers))
    return table(header, rows, left=2)


def of_kinds(records: Sequence[dict[str, Any]]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    for kind in KIND_TITLES:
        if of_kind := [record for record in records if record["kind"] == kind]:
            yield kind, of_kind


def overview(result: dict[str, Any]) -> str:
    """Summary and matrices, as Markdown."""
    parts = [summary_table(result["summary"])]
    for kind, records in of_kinds([*result["gemm"], *result["quantize"]]):
        unit = "TFLOP/s" if "N" in records[0] else "% of the bandwidth of copying the same tensor"
        parts += [f"### {KIND_TITLES[kind]}: {unit}", matrix_table(records)]
    return "\n\n".join(parts)


def report(result: dict[str, Any]) -> str:
    """The whole result as Markdown."""
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items() if version)
    parts = [
        "# Kernels and their peers",
        f"{result['gpu']}; {versions}; {result['date']}, commit {result['commit']}. Suite {result['suite']}, "
        f"{result['seconds']:.0f} s. Copy bandwidth of this run: {result['copy']['gbps']:,.0f} GB/s "
        f"(bf16 [{result['copy']['M']}, {result['copy']['K']}], read and written).",
        "Medians of rounds in which the candidates take turns, L2 emptied before each sample; spread is (90th - 10th "
        "percentile) / median; × is the median over rounds of the ratio of speeds. GB/s count each operand and result once.",
        "\n".join(f"- {name}: {note}" for name, note in result["notes"].items()),
    ]
    if result["interrupted"]:
        parts.append("This run was not finished.")
    if result["only"]:
        parts.append(f"Only these took part: {', '.join(result['only'])}; and the bases.")
    if result["absent"]:
        parts.append("Absent:\n" + "\n".join(f"- {name}: {why}" for name, why in result["absent"].items()))
    if result["dropped"]:
        parts.append("Not measured:\n" + "\n".join(f"- {name}: {why}" for name, why in result["dropped"].items()))
    parts += ["## Overview", overview(result)]
    if result["host_us"]:
        rows = [
            (KIND_TITLES.get(k, k), n, f"{us:.1f}") for k, times in result["host_us"].items() for n, us in times.items()
        ]
        parts += ["## Host µs per eager call", table(("kind", "candidate", "µs"), rows, left=2)]
    if result["kernels"]:
        header = ("kernel", "constants", "registers", "spills", "shared memory", "warps", "programs per multiprocessor")
        rows = [
            (
                *(row["kernel"], row["constants"], str(row["registers"]), str(row["spills"])),
                *(f"{row['shared_bytes'] / 1024:.0f} KiB", str(row["warps"])),
                str(row["programs_per_multiprocessor"]["fit"]),
            )
            for row in result["kernels"]
        ]
        parts += ["## Resources of our kernels", table(header, rows, left=2)]
    for kind, records in of_kinds([*result["gemm"], *result["quantize"]]):
        parts += [f"## Details: {KIND_TITLES[kind]}", detail_table(records, BASE if "N" in records[0] else COPY)]
    return "\n\n".join(parts) + "\n"
