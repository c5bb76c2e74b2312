"""Train one model from one seed and on the same data in bf16 and with fp8 converters, and compare the losses.

    python scripts/make_corpus.py outputs/data
    python scripts/compare_loss.py debug --steps 200 --data outputs/data
    python scripts/compare_loss.py llama3_8b --layers 8 --steps 200 --data outputs/data --compile \\
        --converters bf16 blockwise_fp8 blockwise_fp8,blockwise_fp8.wgrad=fp8_block --set training.seq_len=4096

Runs plain `torchrun -m torchtitan.train` once for each converter, with the settings after it. Writes NAME.json and NAME.png to
--out, prints a table and a verdict on each converter: whether its loss, averaged over the last tenth of the steps, is within
--threshold of bf16's. Exits with 1 when one is not, or a run fails. `report.py NAME.json` makes a page of it.
"""

import argparse
import dataclasses
import math
import os
import queue
import statistics
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path

import torch
from launch import ROOT, Step, TrainingFailed
from losses import THRESHOLD, gaps, is_close, last_tenth, mean_gap, smoothed
from measure import table
from provenance import provenance
from result_files import add_out, write_json
from runs import (
    BF16,
    COLORS,
    PLOT_STYLE,
    Arm,
    add_arguments,
    check_data,
    config_path,
    overrides_of,
    train_arm,
)

from blockfp8_titan.journal import plain

TIMEOUT = 3600


@dataclasses.dataclass(frozen=True)
class Summary:
    """One run. Over the last tenth of its steps: the mean loss, its relative gap to bf16's, the largest gap of a step, the mean norm
    of the gradients; NaN where a loss is.

    tps is the median of tokens per second and process over the logged steps but the first, which holds the compilation; memory the peak
    of a process in GiB.
    """

    loss: float
    gap: float
    largest_step_gap: float
    grad_norm: float
    tps: float
    memory: float


def loss_curve(steps: Sequence[Step]) -> dict[int, float]:
    return {step.step: step.loss for step in steps}


def summarise(steps: Sequence[Step], bf16: Sequence[Step]) -> Summary:
    """Compare a run's steps with those of the bf16 run, which made as many; gaps are of the steps that both logged."""
    last = last_tenth(steps)
    found = last_tenth(list(gaps(loss_curve(steps), loss_curve(bf16)).values()))
    return Summary(
        loss=statistics.fmean(step.loss for step in last),
        gap=mean_gap(loss_curve(steps), loss_curve(bf16)),
        largest_step_gap=max(abs(gap) for gap in found),
        grad_norm=statistics.fmean(step.grad_norm for step in last),
        tps=statistics.median(step.tps for step in steps[1:] or steps),
        memory=max(step.memory for step in steps),
    )


def overview(summaries: dict[str, Summary]) -> str:
    """The summaries as Markdown."""
    header = ("converter", "loss", "gap to bf16", "grad norm", "tokens/s/process", "vs bf16", "peak memory")
    base = summaries[BF16].tps
    rows = [
        (
            *(name, f"{s.loss:.4f}", f"{s.gap:+.3%}", f"{s.grad_norm:.4f}"),
            *(f"{s.tps:,.0f}", f"{s.tps / base:.3f}", f"{s.memory:.2f} GiB"),
        )
        for name, s in summaries.items()
    ]
    return table(header, rows)


def verdicts(summaries: dict[str, Summary], threshold: float) -> dict[str, bool]:
    """Of each run but bf16's, whether it is close to that."""
    return {name: is_close(summary.gap, threshold) for name, summary in summaries.items() if name != BF16}


def plot(runs: dict[str, list[Step]], threshold: float, title: str, path: Path) -> None:
    """Loss curves; below them their relative gap to bf16 in percent, smoothed over 10 logged steps; and gradient norms."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with plt.rc_context(PLOT_STYLE):
        figure, (top, middle, bottom) = plt.subplots(
            3, 1, sharex=True, figsize=(8, 7), height_ratios=(3, 1.2, 1.2), layout="constrained"
        )
        middle.axhspan(-100 * threshold, 100 * threshold, color=COLORS[BF16], alpha=0.18, linewidth=0)
        for name, steps in runs.items():
            converter, *settings = name.split()
            style = {"color": COLORS[converter], "linestyle": "--" if settings else "-"}
            x, width = [s.step for s in steps], 4.5 if name == BF16 else 1.5
            top.plot(x, [s.loss for s in steps], linewidth=width, label=name.replace("_", " "), **style)
            gap = gaps(loss_curve(steps), loss_curve(runs[BF16]))
            middle.plot(list(gap), smoothed([100 * value for value in gap.values()]), linewidth=1.5, **style)
            bottom.plot(x, [s.grad_norm for s in steps], linewidth=width / 2, **style)
        top.set_title(title, loc="left", fontsize=11)
        top.set_ylabel("training loss")
        top.legend(frameon=False)
        middle.set_ylabel("gap to bf16, %")
        bottom.set_ylabel("grad norm")
        bottom.set_yscale("log")
        bottom.set_xlabel("step")
        figure.align_ylabels()
        figure.savefig(path, dpi=130)
        plt.close(figure)


def gpus_apart(at_once: int, nproc: int, gpus: int) -> list[dict[str, str]]:
    """Variables that give each of at_once runs nproc of this machine's GPUs; nothing to set for one run, or without GPUs.

    Raises:
        ValueError: at_once is below 1, or wants more GPUs than there are.
    """
    if at_once < 1:
        raise ValueError(f"--at-once {at_once}: must be 1 or more")
    if at_once == 1 or not gpus:
        return [{} for _ in range(at_once)]
    if at_once * nproc > gpus:
        raise ValueError(f"--at-once {at_once}: {nproc} process(es) each want {at_once * nproc} GPUs, there are {gpus}")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(i) for i in range(gpus)]
    return [{"CUDA_VISIBLE_DEVICES": ",".join(names[i * nproc : (i + 1) * nproc])} for i in range(at_once)]


def run_all(arms: Sequence[Arm], run: Callable[[Arm], object], at_once: int) -> None:
    """Run all arms. What ends one, an interruption too, keeps those that have not begun from beginning."""
    if at_once == 1:
        for arm in arms:
            run(arm)
        return
    ended = threading.Event()

    def run_unless_ended(arm: Arm) -> None:
        if ended.is_set():
            return
        try:
            run(arm)
        except BaseException:
            ended.set()  # here, before this thread takes the next
            raise

    with ThreadPoolExecutor(at_once) as pool:
        futures = [pool.submit(run_unless_ended, arm) for arm in arms]
        try:
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            for future in (*done, *futures):
                future.result()
        except BaseException:
            ended.set()
            raise


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="a bf16 TOML, or the NAME of configs/NAME_bf16.toml")
    add_arguments(parser, steps=200)
    parser.set_defaults(compile=False)
    parser.add_argument(
        "--threshold", type=float, default=THRESHOLD, help="largest gap to bf16 that is right (default: %(default)s)"
    )
    parser.add_argument(
        "--at-once",
        type=int,
        default=1,
        metavar="N",
        help="runs that go on at the same time, each on --nproc GPUs of its own; they slow each other, losses are the same "
        "(default: %(default)s)",
    )
    parser.add_argument("--timeout", type=float, default=TIMEOUT, help="seconds a run may take (default: %(default)s)")
    parser.add_argument("--name", default="loss", help="of the files written (default: %(default)s)")
    add_out(parser)
    parser.add_argument(
        "--runs", type=Path, default=ROOT / "outputs" / "compare_loss", help="folder for the runs' own files"
    )
    args = parser.parse_args(arguments)
    arms = [Arm(args.config, converter, settings) for converter, settings in args.converters]
    if not any(arm.is_base for arm in arms):
        parser.error("--converters: bf16 must be among them, the others are compared with it")
    if len({arm.name for arm in arms}) < len(arms):
        parser.error("--converters: the same run twice")
    try:
        overrides = {arm.name: overrides_of(arm, args, Path(arm.folder)) for arm in arms}
        config_path(args.config)
        check_data(args.data)
        environments = gpus_apart(args.at_once, args.nproc, torch.cuda.device_count())
    except ValueError as error:
        parser.error(str(error))

    free: queue.SimpleQueue[dict[str, str]] = queue.SimpleQueue()
    for environment in environments:
        free.put(environment)

    def run(arm: Arm) -> None:
        environment = free.get()
        print(f"{arm.name}: {args.steps} steps on {args.nproc} process(es)", flush=True)

        def show(step: Step) -> None:
            if step.step % max(1, args.steps // 10) == 0 or step.step == 1:
                print(
                    f"{arm.name:24}  step {step.step:5}  loss {step.loss:8.5f}  {step.tps:9,.0f} tokens/s  "
                    f"{step.memory:.2f} GiB",
                    flush=True,
                )

        try:
            finished[arm.name] = train_arm(
                arm,
                args,
                folder=args.runs / args.name / arm.folder,
                cache=args.runs / "cache",
                timeout=args.timeout,
                environment=environment,
                on_step=show,
            )
        finally:
            free.put(environment)

    finished: dict[str, list[Step]] = {}
    failed = False
    try:
        run_all(arms, run, args.at_once)
    except TrainingFailed as failure:
        print(failure, file=sys.stderr)
        failed = True
    runs = {arm.name: finished[arm.name] for arm in arms if finished.get(arm.name)}
    if BF16 not in runs:
        return 1

    summaries = {name: summarise(steps, runs[BF16]) for name, steps in runs.items()}
    close = verdicts(summaries, args.threshold)
    mode = "compiled" if args.compile else "eager"
    model = Path(args.config).stem + (f", {args.layers} layers" if args.layers else "")
    result = {
        **provenance(),
        "model": model,
        "mode": mode,
        "nproc": args.nproc,
        "at_once": args.at_once,
        "overrides": overrides,
        "summary": {name: dataclasses.asdict(summary) for name, summary in summaries.items()},
        "threshold": args.threshold,
        "within_threshold": close,
        "loss": {name: [[step.step, step.loss] for step in steps] for name, steps in runs.items()},
        "gap": {
            name: [list(pair) for pair in gaps(loss_curve(steps), loss_curve(runs[BF16])).items()]
            for name, steps in runs.items()
        },
        "grad_norm": {name: [[step.step, step.grad_norm] for step in steps] for name, steps in runs.items()},
    }
    write_json(args.out / f"{args.name}.json", plain(result))
    plot(runs, args.threshold, f"{model}, {mode}, {args.nproc} process(es)", args.out / f"{args.name}.png")
    print(f"\n{overview(summaries)}\n\nwritten to {args.out}: {args.name}.json, .png")
    for name, is_right in close.items():
        gap = summaries[name].gap
        found = f"{gap:+.3%} from bf16" if math.isfinite(gap) else "not at a finite distance from bf16"
        print(
            f"{'PASSED' if is_right else 'FAILED'}: {name} is {found} over the last "
            f"{len(last_tenth(runs[name]))} logged steps, {args.threshold:.2%} at most is right",
            file=sys.stdout if is_right else sys.stderr,
        )
    return 0 if all(close.values()) and not failed else 1


if __name__ == "__main__":
    sys.exit(main())
