"""Train one model from one seed and on the same data in bf16 and with fp8 converters, and compare the losses.

    python scripts/make_corpus.py outputs/data
    python scripts/compare_loss.py debug --steps 200
    python scripts/compare_loss.py llama3_8b --layers 8 --steps 200 --data outputs/data --compile \\
        --converters bf16 blockwise_fp8 --set training.seq_len=4096 blockwise_fp8.gemm_backend=triton

Runs plain `torchrun -m torchtitan.train` once for each converter. Writes NAME.json and NAME.png to --out and prints a table.
Exits with 1 when a run fails or a loss is further from bf16's than --threshold, averaged over the last tenth of the steps.
"""

import argparse
import dataclasses
import json
import os
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from launch import ROOT, Step, TrainingFailed, train
from provenance import provenance
from variants import LAYERS

TENSORWISE = "quantize.linear.float8"
# What each converter adds to the bf16 config; the peers as torchtitan's documentation recommends them for Llama.
CONVERTERS = {
    "bf16": [],
    "blockwise_fp8": ["--model.converters=blockwise_fp8", "--job.custom_config_module=blockfp8_titan.config"],
    "float8_tensorwise": [
        f"--model.converters={TENSORWISE}",
        f"--{TENSORWISE}.filter_fqns=output",
        f"--{TENSORWISE}.enable_fsdp_float8_all_gather",
        f"--{TENSORWISE}.precompute_float8_dynamic_scale_for_fsdp",
    ],
    "float8_rowwise": [
        f"--model.converters={TENSORWISE}",
        f"--{TENSORWISE}.recipe_name=rowwise",
        f"--{TENSORWISE}.filter_fqns=output",
    ],
}
COLORS = {"bf16": "#9aa5b1", "blockwise_fp8": "#c2410c", "float8_tensorwise": "#1d4ed8", "float8_rowwise": "#15803d"}
OURS = "blockwise_fp8."  # settings of the section, which only our converter's config has
TIMEOUT = 3600


@dataclasses.dataclass(frozen=True)
class Summary:
    """One run. The last tenth of its steps: loss, their mean, and gap, the mean's relative distance from bf16's.

    tps is the median of tokens per second and process over the second half of the logged steps, memory the peak of a process in
    GiB.
    """

    loss: float
    gap: float
    largest_step_gap: float
    tps: float
    memory: float


def last_tenth(steps: Sequence[Step]) -> Sequence[Step]:
    return steps[-max(1, len(steps) // 10) :]


def summarise(steps: Sequence[Step], bf16: Sequence[Step]) -> Summary:
    """Compare a run's steps with those of the bf16 run, which logged the same ones."""
    loss = statistics.fmean(step.loss for step in last_tenth(steps))
    truth = statistics.fmean(step.loss for step in last_tenth(bf16))
    gaps = [abs(a.loss / b.loss - 1) for a, b in zip(last_tenth(steps), last_tenth(bf16), strict=True)]
    tps = statistics.median(step.tps for step in steps[len(steps) // 2 :])
    return Summary(loss, loss / truth - 1, max(gaps), tps, max(step.memory for step in steps))


def table(summaries: dict[str, Summary]) -> str:
    """The summaries as Markdown."""
    lines = [
        "| converter | loss | gap to bf16 | tokens/s/process | vs bf16 | peak memory |",
        "| --- " + "| ---: " * 5 + "|",
    ]
    for name, s in summaries.items():
        speed = s.tps / summaries["bf16"].tps
        lines.append(f"| {name} | {s.loss:.4f} | {s.gap:+.3%} | {s.tps:,.0f} | {speed:.3f} | {s.memory:.2f} GiB |")
    return "\n".join(lines)


def plot(runs: dict[str, list[Step]], title: str, path: Path) -> None:
    """Loss curves, and below them the relative gap to bf16 in percent, smoothed over 10 logged steps."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with plt.rc_context(
        {"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": "#e4e4e4"}
    ):
        figure, (top, bottom) = plt.subplots(
            2, 1, sharex=True, figsize=(8, 5.6), height_ratios=(3, 1), layout="constrained"
        )
        for name, steps in runs.items():
            x, color, width = [s.step for s in steps], COLORS[name], 4.5 if name == "bf16" else 1.5
            top.plot(x, [s.loss for s in steps], color=color, linewidth=width, label=name.replace("_", " "))
            gap = [100 * (a.loss / b.loss - 1) for a, b in zip(steps, runs["bf16"], strict=True)]
            smooth = [statistics.fmean(gap[max(0, i - 9) : i + 1]) for i in range(len(gap))]
            bottom.plot(x, smooth, color=color, linewidth=1.5)
        top.set_title(title, loc="left", fontsize=11)
        top.set_ylabel("training loss")
        top.legend(frameon=False)
        bottom.set_ylabel("gap to bf16, %")
        bottom.set_xlabel("step")
        figure.savefig(path, dpi=130)
        plt.close(figure)


def overrides_of(name: str, args: argparse.Namespace) -> list[str]:
    """The command line of one run after the config file."""
    overrides = [
        "--experimental.custom_import=variants",
        f"--training.steps={args.steps}",
        f"--lr_scheduler.warmup_steps={max(1, args.steps // 10)}",
        f"--metrics.log_freq={args.log_freq}",
        "--debug.seed=1",
        f"--training.dataset_path={args.data / 'corpus'}",
        "--training.dataset=c4_test",
        f"--model.hf_assets_path={args.data / 'tokenizer'}",
        f"--job.dump_folder={args.runs / args.name / name}",
        *CONVERTERS[name],
    ]
    overrides.append("--compile.enable" if args.compile else "--compile.no-enable")
    if args.layers:
        overrides.append(f"--model.flavor=8B-{args.layers}L")
    settings = [setting for setting in args.set if name == "blockwise_fp8" or not setting.startswith(OURS)]
    return overrides + [f"--{setting}" for setting in settings]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "config", choices=["debug", "llama3_8b", "llama3_70b"], help="configs/CONFIG_bf16.toml is the base"
    )
    parser.add_argument("--converters", nargs="+", choices=list(CONVERTERS), default=["bf16", "blockwise_fp8"])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument(
        "--layers", type=int, choices=range(1, LAYERS), metavar=f"1..{LAYERS - 1}", help="cut llama3_8b"
    )
    parser.add_argument("--compile", action="store_true", help="torch.compile (default: eager)")
    parser.add_argument(
        "--nproc", type=int, default=torch.cuda.device_count() or 2, help="processes (default: %(default)s)"
    )
    parser.add_argument("--log-freq", type=int, default=1)
    parser.add_argument("--data", type=Path, default=ROOT / "outputs" / "demo", help="folder made by make_corpus.py")
    parser.add_argument("--threshold", type=float, default=0.0025, help="largest gap to bf16 (default: %(default)s)")
    parser.add_argument("--name", default="loss", help="of the files written (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=ROOT / "scripts" / "results")
    parser.add_argument(
        "--runs", type=Path, default=ROOT / "outputs" / "compare_loss", help="folder for the runs' own files"
    )
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="KEY=VALUE", help="more torchtitan overrides, for all runs"
    )
    args = parser.parse_args(arguments)
    if "bf16" not in args.converters:
        parser.error("--converters: bf16 must be among them, the others are compared with it")
    if args.layers and args.config != "llama3_8b":
        parser.error(f"--layers cuts llama3_8b, not {args.config}")

    # torchrun's processes import `variants` from this folder.
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT / "scripts"), str(ROOT), os.environ.get("PYTHONPATH", "")])
    runs: dict[str, list[Step]] = {}
    for name in args.converters:
        print(f"{name}: {args.steps} steps on {args.nproc} process(es)", flush=True)

        def show(step: Step) -> None:
            if step.step % max(1, args.steps // 10) == 0 or step.step == 1:
                print(
                    f"  step {step.step:5}  loss {step.loss:8.5f}  {step.tps:9,.0f} tokens/s  {step.memory:.2f} GiB",
                    flush=True,
                )

        try:
            runs[name] = train(
                Path(f"configs/{args.config}_bf16.toml"),
                overrides_of(name, args),
                nproc=args.nproc,
                log=args.runs / args.name / name / "log.txt",
                timeout=TIMEOUT,
                cache=args.runs / "cache",
                on_step=show,
            )
        except TrainingFailed as failure:
            print(failure, file=sys.stderr)
            return 1

    summaries = {name: summarise(steps, runs["bf16"]) for name, steps in runs.items()}
    mode = "compiled" if args.compile else "eager"
    model = args.config + (f", {args.layers} layers" if args.layers else "")
    result = {
        **provenance(),
        "model": model,
        "mode": mode,
        "nproc": args.nproc,
        "overrides": {name: overrides_of(name, args)[1:] for name in runs},
        "summary": {name: dataclasses.asdict(summary) for name, summary in summaries.items()},
        "loss": {name: [[step.step, step.loss] for step in steps] for name, steps in runs.items()},
    }
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / f"{args.name}.json").write_text(json.dumps(result, indent=1) + "\n")
    plot(runs, f"{model}, {mode}, {args.nproc} process(es)", args.out / f"{args.name}.png")
    print(f"\n{table(summaries)}\n")
    far = [name for name, summary in summaries.items() if not abs(summary.gap) <= args.threshold]
    for name in far:
        print(
            f"FAILED: {name} is {summaries[name].gap:+.3%} from bf16, {args.threshold:.2%} at most is right",
            file=sys.stderr,
        )
    return 1 if far else 0


if __name__ == "__main__":
    sys.exit(main())
