"""Train torchtitan's Llama 3 debug model in bf16 and in blockwise fp8, and compare the two runs.

Makes a corpus and a tokenizer from Python's standard library and runs plain ``torchrun -m torchtitan.train`` on
configs/debug_bf16.toml and configs/debug_blockwise_fp8.toml, same seed and data, on GPUs or, without one, on the CPU.
Writes loss.png, result.json and the runs' logs under outputs/demo. Exits with 1 when a run fails, the loss does not fall
or the curves part.
"""

import argparse
import dataclasses
import json
import platform
import re
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import make_corpus
import matplotlib
import torch
from launch import ROOT, Step, TrainingFailed, train
from losses import last_tenth
from provenance import provenance

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import MaxNLocator

DEMO = ROOT / "outputs" / "demo"
RUNS = {"bf16": "configs/debug_bf16.toml", "blockwise_fp8": "configs/debug_blockwise_fp8.toml"}
STEPS = 70
FINAL_LOSS_BELOW = 5.5
GAP_BELOW = 0.02
# 1,024 tokens a step over two processes: two CPU cores take about two seconds for it.
CPU_OVERRIDES = ["--training.local_batch_size=4"]
WARM_UP_STEPS = 3
TIMEOUT = 3600


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Two runs side by side; "last" is the last tenth of the steps.

    gap is the mean over the last steps of |blockwise_fp8 - bf16| / bf16; tps is the median of tokens per second and
    process without the first steps; memory the peak of a process in GiB.
    """

    last_loss: dict[str, float]
    gap: float
    tps: dict[str, float]
    memory: dict[str, float]

    def failures(self) -> list[str]:
        """What speaks against the demo having worked, in words; empty when nothing does."""
        found = [
            f"{name}: the loss of the last steps is {loss:.3f}, not below {FINAL_LOSS_BELOW}"
            for name, loss in self.last_loss.items()
            if not loss < FINAL_LOSS_BELOW
        ]
        if not self.gap <= GAP_BELOW:
            found.append(f"the curves part: {self.gap:.2%} apart over the last steps, {GAP_BELOW:.0%} at most is right")
        return found


def compare(runs: dict[str, list[Step]]) -> Comparison:
    """Compare the steps of the runs "bf16" and "blockwise_fp8", which logged the same steps."""
    pairs = zip(last_tenth(runs["bf16"]), last_tenth(runs["blockwise_fp8"]), strict=True)
    return Comparison(
        last_loss={name: statistics.fmean(step.loss for step in last_tenth(steps)) for name, steps in runs.items()},
        gap=statistics.fmean(abs(fp8.loss - bf16.loss) / bf16.loss for bf16, fp8 in pairs),
        tps={
            name: statistics.median(step.tps for step in steps[WARM_UP_STEPS:] or steps) for name, steps in runs.items()
        },
        memory={name: max(step.memory for step in steps) for name, steps in runs.items()},
    )


def table(runs: dict[str, list[Step]], comparison: Comparison) -> str:
    """The comparison as aligned text."""
    bf16, fp8 = runs["bf16"], runs["blockwise_fp8"]
    marks = sorted({round(i * (len(bf16) - 1) / 5) for i in range(6)})
    last = len(last_tenth(bf16))
    rows = [("", "bf16", "blockwise fp8", "fp8 vs bf16")]
    rows += [
        (
            f"loss, step {bf16[i].step}",
            f"{bf16[i].loss:.4f}",
            f"{fp8[i].loss:.4f}",
            f"{fp8[i].loss / bf16[i].loss - 1:+.2%}",
        )
        for i in marks
    ]

    def row(what: str, values: dict[str, float], form: str, versus: str) -> tuple[str, str, str, str]:
        return what, format(values["bf16"], form), format(values["blockwise_fp8"], form), versus

    def ratio(values: dict[str, float]) -> str:
        return f"{values['blockwise_fp8'] / values['bf16']:.2f}x"

    loss = comparison.last_loss
    rows.append(row(f"loss, last {last} steps", loss, ".4f", f"{loss['blockwise_fp8'] / loss['bf16'] - 1:+.2%}"))
    rows.append((f"mean |gap|, last {last} steps", "", "", f"{comparison.gap:.2%}"))
    rows.append(row("tokens/s, one process", comparison.tps, ",.0f", ratio(comparison.tps)))
    rows.append(row("peak memory, GiB", comparison.memory, ".2f", ratio(comparison.memory)))
    widths = [max(len(cells[column]) for cells in rows) for column in range(4)]
    return "\n".join(
        "  ".join([cells[0].ljust(widths[0]), *(cells[i].rjust(widths[i]) for i in (1, 2, 3))]).rstrip()
        for cells in rows
    )


def plot(runs: dict[str, list[Step]], title: str, path: Path) -> None:
    """Draw both loss curves and, below them, their relative gap in percent."""
    bf16, fp8 = runs["bf16"], runs["blockwise_fp8"]
    x = [step.step for step in bf16]
    gap = [100 * (b.loss / a.loss - 1) for a, b in zip(bf16, fp8, strict=True)]
    style = {
        "font.size": 11,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.color": "#e4e4e4",
        "axes.edgecolor": "#888888",
    }
    with plt.rc_context(style):
        figure, (top, bottom) = plt.subplots(
            2, 1, sharex=True, figsize=(8, 5.6), height_ratios=(3, 1), layout="constrained"
        )
        top.plot(x, [step.loss for step in bf16], color="#9aa5b1", linewidth=4.5, label="bf16")
        top.plot(x, [step.loss for step in fp8], color="#c2410c", linewidth=1.6, label="blockwise fp8")
        top.set_ylabel("training loss")
        top.set_title(title, loc="left", fontsize=12)
        top.legend(frameon=False)
        bottom.axhspan(-100 * GAP_BELOW, 100 * GAP_BELOW, color="#9aa5b1", alpha=0.18, linewidth=0)
        bottom.axhline(0, color="#9aa5b1", linewidth=1)
        bottom.plot(x, gap, color="#c2410c", linewidth=1.6)
        reach = 1.15 * max(100 * GAP_BELOW, *map(abs, gap))
        bottom.set_ylim(-reach, reach)
        bottom.set_ylabel("fp8 vs bf16, %")
        bottom.set_xlabel("step")
        bottom.xaxis.set_major_locator(MaxNLocator(integer=True))
        figure.align_ylabels()
        figure.savefig(path, dpi=150)
        plt.close(figure)


def device_name(log: Path) -> str:
    """The device as torchtitan logged it."""
    match = re.search(r"\w+ capacity: (.+) with [\d.]+GiB memory", log.read_text())
    return match[1] if match else platform.machine()


def processes(count: int) -> str:
    return "1 process" if count == 1 else f"{count} processes"


def clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def run(name: str, steps: int, nproc: int, overrides: Sequence[str]) -> list[Step]:
    """Train one of `RUNS`, with a line of progress for each logged step.

    Raises:
        TrainingFailed: see `launch.train`.
    """
    print(f"\n{name}: {RUNS[name]}, {steps} steps, {processes(nproc)}", flush=True)
    begin = time.monotonic()
    first: list[float] = []

    def show(step: Step) -> None:
        first.append(time.monotonic())
        rest = (
            "" if len(first) == 1 else clock((first[-1] - first[0]) / (len(first) - 1) * (steps - step.step)) + " left"
        )
        print(
            f"  step {step.step:3}/{steps}  loss {step.loss:7.4f}  grad norm {step.grad_norm:7.4f}  "
            f"{step.tps:9,.0f} tokens/s  {step.memory:6.2f} GiB  {rest}",
            flush=True,
        )

    overrides = [f"--training.steps={steps}", "--metrics.log_freq=1", f"--job.dump_folder={DEMO / name}", *overrides]
    logged = train(
        Path(RUNS[name]),
        overrides,
        nproc=nproc,
        log=DEMO / name / "log.txt",
        timeout=TIMEOUT,
        cache=DEMO / "cache",
        on_step=show,
    )
    print(f"  {clock(time.monotonic() - begin)} in all", flush=True)
    return logged


def main(arguments: Sequence[str] | None = None) -> int:
    gpus = torch.cuda.device_count()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=STEPS, help="steps of each run (default: %(default)s)")
    parser.add_argument(
        "--nproc",
        type=int,
        default=min(gpus, 2) or 2,
        help="processes, one for each GPU if any (default here: %(default)s)",
    )
    parser.add_argument("--compile", action="store_true", help="compile the model's blocks with torch.compile")
    args = parser.parse_args(arguments)
    if args.steps < 1:
        parser.error(f"--steps {args.steps}: must be 1 or more")
    if args.nproc < 1 or (gpus and args.nproc > gpus):
        parser.error(f"--nproc {args.nproc}: must be 1 or more, and on GPUs no more than there are ({gpus} here)")

    if (DEMO / "tokenizer" / "tokenizer_config.json").exists():
        print("corpus and tokenizer: outputs/demo, made before")
    else:
        print("corpus and tokenizer: from Python's standard library ...", flush=True)
        print(f"  {make_corpus.make(DEMO):,} characters")
    overrides = [] if gpus else list(CPU_OVERRIDES)
    if args.compile:
        overrides += ["--compile.enable", "--compile.components=model"]
    try:
        runs = {name: run(name, args.steps, args.nproc, overrides) for name in RUNS}
    except TrainingFailed as failure:
        print(f"\n{failure}\n\nThe run failed; its whole log is the file named above.", file=sys.stderr)
        return 1

    comparison = compare(runs)
    device = device_name(DEMO / "bf16" / "log.txt")
    print(f"\n{table(runs, comparison)}\n")
    if not gpus:
        print("Without a GPU, fp8 is computed by plain PyTorch: the losses mean something here, the speed does not.\n")
    plot(runs, f"Llama 3 debug model, {processes(args.nproc)}, {device}", DEMO / "loss.png")
    failures = comparison.failures()
    result = {
        **provenance(),
        "device": device,
        "nproc": args.nproc,
        "configs": RUNS,
        "overrides": overrides,
        "failures": failures,
        **dataclasses.asdict(comparison),
        "runs": {name: [dataclasses.asdict(step) for step in steps] for name, steps in runs.items()},
    }
    (DEMO / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    print("outputs/demo: loss.png, result.json, bf16/log.txt, blockwise_fp8/log.txt")
    for failure in failures:
        print(f"FAILED: {failure}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
