"""The oracle itself, against definitions written out element by element."""

import math

import pytest
import torch

from blockfp8_titan import reference
from blockfp8_titan.formats import E4M3_MAX, EPS

from .data import KINDS, draw

E4M3 = sorted(
    {v for v in torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().tolist() if not math.isnan(v)}
)


def round_to_e4m3(value: float) -> float:
    """The nearest e4m3 number, ties to the even code, by search."""
    best = sorted(E4M3, key=lambda v: abs(v - value))[:2]
    if abs(best[0] - value) == abs(best[1] - value):
        codes = torch.tensor(best).to(torch.float8_e4m3fn).view(torch.uint8).tolist()
        return best[0] if codes[0] % 2 == 0 else best[1]
    return best[0]


@pytest.mark.parametrize("scale_format", ["fp32", "pow2"])
def test_quantize_1x128_is_the_definition(scale_format):
    x = draw("outliers", 5, 208, torch.bfloat16)
    x_q, x_dq = reference.quantize_1x128(x, scale_format)
    for row in range(5):
        for group, (start, stop) in enumerate(((0, 128), (128, 208))):
            values = x[row, start:stop].float()
            dq = (values.abs().max() / torch.tensor(E4M3_MAX)).item()
            if scale_format == "pow2":
                dq = 2.0 ** math.ceil(math.log2(dq))
            assert x_dq[row, group].item() == dq
            expected = [round_to_e4m3((v / torch.tensor(dq)).item()) for v in values]
            assert x_q[row, start:stop].float().tolist() == expected


def test_quantize_128x128_shares_one_multiplier_per_block():
    w = draw("normal", 200, 304, torch.float32)
    w_q, w_dq = reference.quantize_128x128(w)
    assert w_dq.shape == (2, 3)
    for n, k in ((0, 0), (0, 2), (1, 0), (1, 2)):
        block = w[n * 128 : (n + 1) * 128, k * 128 : (k + 1) * 128]
        assert w_dq[n, k] == block.abs().max() / torch.tensor(E4M3_MAX)
        assert torch.equal(
            w_q[n * 128 : (n + 1) * 128, k * 128 : (k + 1) * 128].float(),
            (block / w_dq[n, k]).to(torch.float8_e4m3fn).float(),
        )


def test_square_blocks_transpose_exactly():
    w = draw("outliers", 208, 304, torch.float32)
    w_q, w_dq = reference.quantize_128x128(w)
    wt_q, wt_dq = reference.quantize_128x128(w.t().contiguous())
    assert torch.equal(reference.transpose_fp8(w_q).float(), wt_q.float()) and torch.equal(w_dq.t(), wt_dq)


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "nonfinite"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_error_is_within_half_a_step(kind, dtype):
    x = draw(kind, 130, 272, dtype)
    q, dq = reference.quantize_1x128(x)
    error = (reference.dequantize_1x128(q, dq) - x.float()).abs()
    step = dq.repeat_interleave(128, 1)[:, :272]
    # Half a unit in the last place of 4 significand bits; half of the least subnormal, 2^-9, near zero.
    assert (error <= torch.maximum(x.float().abs() * 2**-4, step * 2**-10) * (1 + 1e-5) + 2**-149).all()


def test_zero_blocks_give_zeros():
    q, dq = reference.quantize_1x128(torch.zeros(3, 256))
    assert not q.float().any() and (dq == EPS / E4M3_MAX).all() and (1 / dq).isfinite().all()
    w_q, w_dq = reference.quantize_128x128(torch.zeros(128, 256))
    assert not w_q.float().any() and w_dq.isfinite().all()


@pytest.mark.parametrize("poison", [float("nan"), -float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("scale_format", ["fp32", "pow2"])
def test_nonfinite_blocks_are_nan_and_others_untouched(poison, scale_format):
    x = draw("normal", 4, 384, torch.float32)
    clean = reference.dequantize_1x128(*reference.quantize_1x128(x, scale_format))
    x[2, 200] = poison
    dirty = reference.dequantize_1x128(*reference.quantize_1x128(x, scale_format))
    assert dirty[2, 128:256].isnan().all()
    dirty[2, 128:256] = clean[2, 128:256]
    assert torch.equal(dirty, clean)


def test_pow2_multipliers_are_powers_of_two_and_never_clip():
    x = draw("outliers", 64, 512, torch.float32)
    _, dq = reference.quantize_1x128(x, "pow2")
    assert (dq.frexp().mantissa == 0.5).all()
    assert (x.view(64, 4, 128).abs().amax(-1) <= dq * E4M3_MAX).all()
    exact = torch.full((1, 128), E4M3_MAX * 2.0**7)
    assert reference.quantize_1x128(exact, "pow2")[1].item() == 2.0**7
    assert reference.quantize_1x128(exact.nextafter(torch.tensor(torch.inf)), "pow2")[1].item() == 2.0**8
