"""How far y, dx and dw of a linear are from fp32's: blockwise fp8, its choices, and torchao's formats where torchao is installed.

    python scripts/accuracy.py        # a minute on 2 CPU cores; writes accuracy.json and .md to --out

Computed by the reference implementations on a CPU (torchao's with emulate=True), in bf16, from one seed: on normally distributed
data, and on what strains a format: channels of x a hundred times the others, tokens of dy whose magnitudes are log-normal.
"""

import argparse
import dataclasses
import sys
from collections.abc import Callable, Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F
from measure import table
from provenance import provenance
from result_files import add_out, write_json, write_text
from torch import Tensor

from blockfp8_titan import BlockwiseFP8Linear, Recipe
from blockfp8_titan.feed_forward import gated_feed_forward
from blockfp8_titan.numerics import sqnr
from blockfp8_titan.recipe import SwiGLUInputs

TOKENS, IN, OUT = 4096, 1024, 1024

OURS = {
    "blockwise_fp8": Recipe(gemm_backend="reference"),
    'blockwise_fp8, `wgrad = "fp8_block"`': Recipe(wgrad="fp8_block", gemm_backend="reference"),
    'blockwise_fp8, `wgrad = "bf16"`': Recipe(wgrad="bf16", gemm_backend="reference"),
    'blockwise_fp8, `scale_format = "pow2"`': Recipe(scale_format="pow2", gemm_backend="reference"),
}
FEED_FORWARDS: dict[str, tuple[SwiGLUInputs, Recipe]] = {
    '`swiglu_inputs = "bf16"`': ("bf16", OURS["blockwise_fp8"]),
    '`swiglu_inputs = "fp8"`': ("fp8", OURS["blockwise_fp8"]),
    '`swiglu_inputs = "fp8"`, `wgrad = "fp8_block"`': ("fp8", OURS['blockwise_fp8, `wgrad = "fp8_block"`']),
}
PEERS = ("tensorwise", "rowwise")


def draw(data: str) -> tuple[Tensor, Tensor, Tensor]:
    """x [TOKENS, IN], w [OUT, IN] and dy [TOKENS, OUT], bf16."""
    x, w, dy = torch.randn(TOKENS, IN), torch.randn(OUT, IN) / IN**0.5, torch.randn(TOKENS, OUT)
    if data == "outliers":
        x[:, torch.randperm(IN)[: IN // 50]] *= 100
        dy *= (2 * torch.randn(TOKENS, 1)).exp()
    return x.bfloat16(), w.bfloat16(), dy.bfloat16()


def results_of(module: nn.Module, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    """y, dx, and the gradients of the parameters: as "dw" of a lone one, else by name."""
    x = x.detach().clone().requires_grad_()
    y = module(x)
    y.backward(dy)
    named = {name: parameter.grad for name, parameter in module.named_parameters()}
    gradients = {"dw": named["weight"]} if named.keys() == {"weight"} else {f"d{name}": g for name, g in named.items()}
    return {"y": y.detach(), "dx": x.grad} | gradients


def typical_sqnr(exact: Tensor, actual: Tensor, dim: int) -> float:
    """Median over dim's slices of their SQNR in dB: of what a few large slices would hide in the whole."""
    exact, actual = exact.double(), actual.double()
    other = 1 - dim
    ratios = exact.norm(dim=other) / (exact - actual).norm(dim=other)
    return (20 * ratios.log10()).median().item()


def compare_linear(make: Callable[[], nn.Module], w: Tensor, x: Tensor, dy: Tensor) -> dict[str, float]:
    """SQNR in dB of y, dx and dw; of dx by token and of dw by channel of x, the median."""
    linear = make()
    with torch.no_grad():
        linear.weight.copy_(w)
    exact = {"y": x.float() @ w.float().t(), "dx": dy.float() @ w.float(), "dw": dy.float().t() @ x.float()}
    actual = results_of(linear, x, dy)
    return {name: sqnr(truth, actual[name]) for name, truth in exact.items()} | {
        "dx, a token": typical_sqnr(exact["dx"], actual["dx"], 0),
        "dw, a channel": typical_sqnr(exact["dw"], actual["dw"], 1),
    }


def peer(recipe: str) -> nn.Module:
    """torchao's linear of this recipe, emulated."""
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    config = dataclasses.replace(Float8LinearConfig.from_recipe_name(recipe), emulate=True)
    holder = nn.Sequential(nn.Linear(IN, OUT, bias=False, dtype=torch.bfloat16))
    return convert_to_float8_training(holder, config=config)[0]


class FeedForward(nn.Module):
    """w2(silu(w1(x)) * w3(x)), fused as in a converted block."""

    def __init__(self, swiglu_inputs: SwiGLUInputs, recipe: Recipe, weights: Sequence[Tensor]) -> None:
        super().__init__()
        self.swiglu_inputs = swiglu_inputs
        for name, w in zip(("w1", "w2", "w3"), weights, strict=True):
            linear = BlockwiseFP8Linear(w.shape[1], w.shape[0], bias=False, dtype=w.dtype, recipe=recipe)
            with torch.no_grad():
                linear.weight.copy_(w)
            self.register_module(name, linear)

    def forward(self, x: Tensor) -> Tensor:
        return gated_feed_forward(x, self.w1, self.w3, self.w2, self.swiglu_inputs)


def compare_feed_forward() -> dict[str, dict[str, float]]:
    """SQNR in dB of a feed-forward's y and gradients on normal data, by what is kept of SwiGLU's inputs and how dw is computed."""
    x, w1, dy = draw("normal")
    w3, w2 = (torch.randn(OUT, IN).div(IN**0.5).bfloat16() for _ in range(2))
    leaves = [t.float().requires_grad_() for t in (x, w1, w2, w3)]
    exact_x, exact_w1, exact_w2, exact_w3 = leaves
    y = (F.silu(exact_x @ exact_w1.t()) * (exact_x @ exact_w3.t())) @ exact_w2.t()
    y.backward(dy.float())
    exact = {"y": y.detach()} | dict(
        zip(("dx", "dw1.weight", "dw2.weight", "dw3.weight"), (t.grad for t in leaves), strict=True)
    )
    found = {}
    for choice, (swiglu_inputs, recipe) in FEED_FORWARDS.items():
        actual = results_of(FeedForward(swiglu_inputs, recipe, (w1, w2, w3)), x, dy)
        found[choice] = {name.removesuffix(".weight"): sqnr(exact[name], actual[name]) for name in exact}
    return found


def measure(say: Callable[[str], None] = print) -> dict[str, object]:
    makers: dict[str, Callable[[], nn.Module]] = {
        name: lambda recipe=recipe: BlockwiseFP8Linear(IN, OUT, bias=False, dtype=torch.bfloat16, recipe=recipe)
        for name, recipe in OURS.items()
    }
    try:
        import torchao  # noqa: F401
    except ImportError:
        say("torchao is not installed and is left out: pip install '.[peers]'")
    else:
        makers |= {f"torchao {recipe}": lambda recipe=recipe: peer(recipe) for recipe in PEERS}
    linear: dict[str, dict[str, dict[str, float]]] = {}
    for data in ("normal", "outliers"):
        torch.manual_seed(0)
        x, w, dy = draw(data)
        linear[data] = {name: compare_linear(make, w, x, dy) for name, make in makers.items()}
    torch.manual_seed(0)
    shape = {"tokens": TOKENS, "in_features": IN, "out_features": OUT}
    return {**provenance(), "shape": shape, "linear": linear, "feed_forward": compare_feed_forward()}


def report(result: dict) -> str:
    """The result as Markdown."""
    shape = result["shape"]
    parts = [
        "# Accuracy against fp32",
        f"SQNR in dB, 20 log10(|exact| / |error|), of {shape['tokens']:,} tokens, {shape['in_features']} x "
        f"{shape['out_features']}, bf16 in and out; {result['date']}, commit {result['commit']}. Outliers: of x, one channel in 50 "
        "times 100; of dy, tokens' magnitudes log-normal, sigma 2. A token, a channel: the median over tokens of dx, over channels of "
        "x of dw; whole tensors show the large ones alone.",
    ]
    for data, rows in result["linear"].items():
        names = list(next(iter(rows.values())))
        cells = [(name, *(f"{values[n]:.1f}" for n in names)) for name, values in rows.items()]
        parts += [f"## A linear, {data}", table(("", *names), cells)]
    rows = result["feed_forward"]
    names = list(next(iter(rows.values())))
    cells = [(choice, *(f"{values[n]:.1f}" for n in names)) for choice, values in rows.items()]
    parts += ["## A gated feed-forward, normal", table(("", *names), cells)]
    return "\n\n".join(parts) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_out(parser)
    args = parser.parse_args(arguments)
    result = measure()
    write_json(args.out / "accuracy.json", result)
    write_text(args.out / "accuracy.md", report(result))
    print(f"{report(result)}\nwritten to {args.out}: accuracy.json, accuracy.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
