"""The scale formula's claim about bf16, over all of them: kernels.scaling.quotient with BF16 is cast to e4m3(x / dq)."""

import numpy as np
import pytest
import torch

from blockfp8_titan import ops
from blockfp8_titan.formats import BLOCK, E4M3_MAX, EPS

BF16 = torch.arange(1, 0x7F80, dtype=torch.int16).view(torch.bfloat16)
"""All that are positive and finite, in order; the others are zero, these with a sign, or make their block NaN."""

BINADES = 26
"""Of x below the largest of a block: smaller ones are less than 2^-17 payloads and cast to zero whatever a quotient's last bits are."""


def below(largest):
    """BF16 from `BINADES` below its element number `largest`, which is the last."""
    return BF16[max(0, largest + 1 - 128 * BINADES) : largest + 1]


def as_e4m3(quotients):
    return torch.from_numpy(quotients).to(torch.float8_e4m3fn).view(torch.uint8)


@pytest.mark.parametrize("pow2", [False, True])
@pytest.mark.parametrize("ulps", [-1, 0, 1])
def test_quotients_of_bf16_are_cast_alike_whatever_the_reciprocals_error(ulps, pow2):
    """In IEEE fp32 as the kernel computes it: numpy rounds each operation, and float64 holds the exact fma, of 50 bits at most."""
    f = np.float32
    for largest in range(len(BF16)):
        x = below(largest).float().numpy()
        dq = f(max(x[-1], f(EPS))) / f(E4M3_MAX)
        if pow2:
            dq = ((dq.view(np.int32) + 0x7FFFFF) & 0x7F800000).astype(np.int32).view(f)
        lift = f(2.0**64) if dq < 2.0**-64 else f(1)
        lifted = dq * lift
        inverse = f(1) / lifted
        if ulps:
            inverse = np.nextafter(inverse, f(ulps) * f(np.inf))
        inverse *= f(1 - 2.0**-22)
        error = f(1.0 - np.float64(lifted) * np.float64(inverse)) * inverse
        assert error > 0
        quotients = (x.astype(np.float64) * np.float64(inverse * lift) + np.float64(x * (error * lift))).astype(f)
        assert torch.equal(as_e4m3(quotients), as_e4m3(x / dq)), x[-1]


@pytest.mark.gpu
@pytest.mark.parametrize("scale_format", ["fp32", "pow2"])
def test_the_kernel_quantises_all_pairs_of_bf16_as_its_twin(scale_format):
    width = BLOCK - 1
    rows = -(-128 * BINADES // width)
    largest = torch.arange(len(BF16), device="cuda")
    values = BF16.cuda()
    for some in largest.split(2048):
        # Rows of each that is the largest: itself, and of those below it the next 127.
        at = some[:, None] - torch.arange(rows * width, device="cuda")
        others = torch.where(at >= 0, values[at.clamp_min(0)], 0).view(-1, width)
        x = torch.cat([values[some].repeat_interleave(rows)[:, None], others], 1)
        x[1::2] *= -1
        q, dq = ops.quantize_1x128(x, scale_format)
        q_twin, dq_twin = ops.quantize_1x128(x, scale_format, backend="reference")
        assert torch.equal(dq, dq_twin) and torch.equal(q.view(torch.uint8), q_twin.view(torch.uint8))
