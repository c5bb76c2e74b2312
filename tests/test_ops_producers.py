import pytest
import torch
import torch.nn.functional as F
from torch._inductor.utils import run_and_get_code

from blockfp8_titan import ops, reference

from .data import CHECKS, KINDS, bits, draw, padding
from .test_ops_quantize import DEVICES, poisoned_outputs  # noqa: F401

LAYOUTS = {
    "rows": ops.quantize_1x128,
    "columns": ops.quantize_1x128_columns,
    "both": ops.quantize_1x128_both,
    "blocks": ops.quantize_128x128_columns,
}
H_LAYOUTS = ("columns", "blocks")
SHAPES = [(0, 144), (1, 16), (7, 272), (127, 144), (129, 128), (300, 272), (16, 16), (176, 272)]
LARGE = [(300, 4096), (129, 14336), (7, 16400), (384, 4096)]
BF16, FP32 = torch.bfloat16, torch.float32


def assert_equal(outs, expected, *case):
    """Bit for bit, and laid out alike, with zeros between the rows of payloads."""
    for i, (out, twin) in enumerate(zip(outs, expected, strict=True)):
        assert torch.equal(bits(out), bits(twin)) and out.stride() == twin.stride(), (i, *case)
        assert out.dtype != torch.float8_e4m3fn or not padding(out).any(), (i, *case)


# The twins, against PyTorch


@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("weight_dtype", [BF16, FP32])
def test_rms_norm_is_that_of_pytorch(dtype, weight_dtype):
    x, weight = draw("outliers", 130, 272, dtype), draw("normal", 1, 272, weight_dtype)[0]
    exact = F.rms_norm(x.double(), (272,), weight.double(), 1e-5)
    y = reference.rms_norm(x, reference.rms_norm_rstd(x, 1e-5), weight)
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), exact, rtol=2**-8 if dtype == BF16 else 1e-6, atol=0)


@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_swiglu_and_its_gradients_are_those_of_pytorch(dtype):
    dh, gate, up = (draw("normal", 130, 272, dtype) * 4 for _ in range(3))
    g, u = gate.double().requires_grad_(), up.double().requires_grad_()
    exact = F.silu(g) * u
    exact.backward(dh.double())
    results = (reference.swiglu(gate, up), *reference.swiglu_backward(dh, gate, up))
    for actual, expected in zip(results, (exact, g.grad, u.grad), strict=True):
        assert actual.dtype == dtype
        # One rounding; the slope of silu, which is at most 1.1, has a zero, near which terms cancel.
        atol = 0 if expected is not g.grad else 1e-6 * (dh.double() * up.double()).abs().max().item()
        torch.testing.assert_close(actual.double(), expected.detach(), rtol=2**-8 if dtype == BF16 else 2e-6, atol=atol)


# The ops, against quantising what the twins compute


@pytest.mark.parametrize("scale_format", ["fp32", "pow2"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_ops_quantise_what_they_compute(layout, scale_format):
    quantize = LAYOUTS[layout]
    for number, shape in enumerate(SHAPES):
        dtype = (BF16, FP32)[number % 2]
        gate, up = (draw("outliers", *shape, dtype) for _ in range(2))
        weight = draw("normal", 1, shape[1], (FP32, BF16)[number // 2 % 2])[0]
        outs = ops.swiglu_quantize_1x128(gate, up, layout, scale_format)
        assert_equal(outs, quantize(reference.swiglu(gate, up), scale_format), shape)
        *outs, rstd = ops.rms_norm_quantize_1x128(gate, weight, 1e-5, layout, scale_format)
        assert rstd.shape == shape[:1] and rstd.dtype == FP32
        y = quantize(reference.rms_norm(gate, rstd, weight), scale_format)
        assert_equal(outs, y, shape)
        *outs, same = ops.rms_norm_quantize_1x128(gate, weight, 99.0, layout, scale_format, rstd=rstd)
        assert same is rstd
        assert_equal(outs, y, shape)


def test_gradients_are_quantised_both_ways():
    for dtype, shape in ((BF16, (129, 272)), (FP32, (7, 144)), (BF16, (0, 16))):
        dh, gate, up = (draw("outliers", *shape, dtype) for _ in range(3))
        results = ops.swiglu_backward_quantize_1x128_both(dh, gate, up)
        for outs, exact in zip(results, reference.swiglu_backward(dh, gate, up), strict=True):
            assert_equal(outs, ops.quantize_1x128_both(exact), shape)
        for layout in H_LAYOUTS:
            *gradients, h = ops.swiglu_backward_quantize_1x128_both(dh, gate, up, h=layout)
            for outs, same in zip(gradients, results, strict=True):
                assert_equal(outs, same, shape)
            assert_equal(h, ops.swiglu_quantize_1x128(gate, up, layout), shape)


@pytest.mark.parametrize("scale_format", ["fp32", "pow2"])
def test_inputs_of_swiglu_are_kept_in_fp8(scale_format):
    for dtype, shape in ((BF16, (129, 272)), (FP32, (7, 144)), (BF16, (0, 16))):
        dh, gate, up = (draw("outliers", *shape, dtype) for _ in range(3))
        kept = ops.swiglu_quantize_1x128_with_inputs(gate, up, scale_format)
        for outs, values in zip(kept, (reference.swiglu(gate, up), gate, up), strict=True):
            assert_equal(outs, ops.quantize_1x128(values, scale_format), shape)
        _, (gate_q, gate_dq), (up_q, up_dq) = kept
        of_payloads = {
            layout: ops.swiglu_backward_quantize_1x128_both(
                dh, gate_q, up_q, scale_format, gate_dq=gate_dq, up_dq=up_dq, h=layout
            )
            for layout in H_LAYOUTS
        }
        gate, up = reference.dequantize_1x128(gate_q, gate_dq), reference.dequantize_1x128(up_q, up_dq)
        dgate, dup = (x.to(dtype) for x in reference.swiglu_backward(dh.float(), gate, up))
        h = reference.swiglu(gate, up).to(dtype)
        twins = [ops.quantize_1x128_both(x, scale_format) for x in (dgate, dup)]
        for layout, results in of_payloads.items():
            for outs, twin in zip(results, (*twins, LAYOUTS[layout](h, scale_format)), strict=True):
                assert_equal(outs, twin, shape, layout)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("poison", [torch.nan, -torch.inf])
def test_nonfinite_values_spoil_their_own_blocks(device, poison):
    M, K = 260, 272
    gate, up, dh = (torch.randn(M, K, device=device, dtype=BF16) for _ in range(3))
    weight = torch.ones(K, device=device)

    def spoilt(q, dq):
        return reference.dequantize_1x128(q, dq).isnan().cpu()

    rows, columns = torch.zeros(M, K, dtype=torch.bool), torch.zeros(K, M, dtype=torch.bool)
    rows[5, 128:256] = True
    columns[200, :128] = True
    blocks = torch.zeros(K, M, dtype=torch.bool)
    blocks[128:256, :128] = True
    up[5, 200] = poison
    t_q, t_dq = ops.swiglu_quantize_1x128(gate, up, "blocks")
    assert torch.equal(reference.dequantize_128x128(t_q, t_dq).isnan().cpu(), blocks)
    t_q, t_dq = ops.swiglu_backward_quantize_1x128_both(dh, gate, up, h="blocks")[2]
    assert torch.equal(reference.dequantize_128x128(t_q, t_dq).isnan().cpu(), blocks)
    q, dq, t_q, t_dq = ops.swiglu_quantize_1x128(gate, up)
    assert torch.equal(spoilt(q, dq), rows) and torch.equal(spoilt(t_q, t_dq), columns)
    dgate, dup = ops.swiglu_backward_quantize_1x128_both(dh, gate, up)
    assert torch.equal(spoilt(*dgate[:2]), rows) and torch.equal(spoilt(*dgate[2:]), columns)
    assert not any(spoilt(*pair).any() for pair in (dup[:2], dup[2:]))
    # Of payloads, the group that held it is spoilt, in dgate and h.
    _, kept_gate, kept_up = ops.swiglu_quantize_1x128_with_inputs(gate, up)
    dgate, dup, h = ops.swiglu_backward_quantize_1x128_both(
        dh, kept_gate[0], kept_up[0], gate_dq=kept_gate[1], up_dq=kept_up[1], h="columns"
    )
    for found, expected in ((dgate[:2], rows), (dgate[2:], blocks), (h, blocks)):
        assert torch.equal(spoilt(*found), expected)
    assert not any(spoilt(*pair).any() for pair in (dup[:2], dup[2:]))
    # A row with NaN has no mean; one with Inf has 1 / Inf, and Inf times that is NaN.
    rows[5] |= poison != poison
    columns[:, :128] |= poison != poison
    q, dq, t_q, t_dq, _ = ops.rms_norm_quantize_1x128(up, weight, 1e-5)
    assert torch.equal(spoilt(q, dq), rows) and torch.equal(spoilt(t_q, t_dq), columns)


@pytest.mark.parametrize("device", DEVICES)
def test_strided_inputs(device):
    base = draw("normal", 160, 640, BF16).to(device)
    weight = base[:1, ::2].float()[0]
    for x in (base[:, 16:336], base.t()[:320, :160].t(), base[:1, :320].expand(50, 320), base[::2, 320:]):
        plain = x.contiguous()
        assert_equal(ops.swiglu_quantize_1x128(x, plain), ops.swiglu_quantize_1x128(plain, x))
        for layout in ("rows", "both"):
            outs = ops.rms_norm_quantize_1x128(x, base[0, ::2].float(), 1e-5, layout)
            assert_equal(outs, ops.rms_norm_quantize_1x128(plain, weight, 1e-5, layout))
        for outs, expected in zip(
            ops.swiglu_backward_quantize_1x128_both(x, plain, x),
            ops.swiglu_backward_quantize_1x128_both(plain, x, plain),
            strict=True,
        ):
            assert_equal(outs, expected)


# The kernels, against the twins


@pytest.mark.gpu
@pytest.mark.parametrize("scale_format", ["fp32", "pow2"])
@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("kind", KINDS)
def test_rms_norm_kernels_equal_their_twins(kind, dtype, scale_format):
    for number, shape in enumerate(SHAPES + LARGE):
        x = draw(kind, *shape, dtype).cuda()
        weight = draw("normal", 1, shape[1], (FP32, BF16)[number % 2])[0].cuda()
        for layout, quantize in LAYOUTS.items():
            *outs, rstd = ops.rms_norm_quantize_1x128(x, weight, 1e-5, layout, scale_format)
            # The order of summation is the kernel's own; all that follows from the sum is the twin's.
            torch.testing.assert_close(rstd, reference.rms_norm_rstd(x, 1e-5), rtol=1e-6, atol=0, equal_nan=True)
            y = quantize(reference.rms_norm(x, rstd, weight), scale_format, backend="reference")
            assert_equal(outs, y, kind, shape, layout)
            *outs, _ = ops.rms_norm_quantize_1x128(x, weight, 1e-5, layout, scale_format, rstd=rstd)
            assert_equal(outs, y, kind, shape, layout, "rstd given")


@pytest.mark.gpu
@pytest.mark.parametrize("scale_format", ["fp32", "pow2"])
@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("kind", KINDS)
def test_swiglu_kernels_quantise_what_they_compute(kind, dtype, scale_format):
    from . import elementwise

    compared, differing = 0, 0.0
    for shape in SHAPES + LARGE:
        dh, gate, up = (draw(kind, *shape, dtype).cuda() for _ in range(3))
        h, (dgate, dup) = elementwise.swiglu(gate, up), elementwise.swiglu_backward(dh, gate, up)
        for layout, quantize in LAYOUTS.items():
            outs = ops.swiglu_quantize_1x128(gate, up, layout, scale_format)
            assert_equal(outs, quantize(h, scale_format, backend="reference"), kind, shape, layout)
        exact = [ops.quantize_1x128_both(x, scale_format, backend="reference") for x in (dgate, dup)]
        for layout in (None, *H_LAYOUTS):
            of_h = [LAYOUTS[layout](h, scale_format, backend="reference")] if layout else []
            results = ops.swiglu_backward_quantize_1x128_both(dh, gate, up, scale_format, h=layout)
            for outs, twin in zip(results, exact + of_h, strict=True):
                assert_equal(outs, twin, kind, shape, layout)
        kept = ops.swiglu_quantize_1x128_with_inputs(gate, up, scale_format)
        for outs, values in zip(kept, (h, gate, up), strict=True):
            assert_equal(outs, ops.quantize_1x128(values, scale_format, backend="reference"), kind, shape)
        values = [reference.dequantize_1x128(*pair) for pair in kept[1:]]
        exact = [
            ops.quantize_1x128_both(x.to(dtype), scale_format, backend="reference")
            for x in elementwise.swiglu_backward(dh.float(), *values)
        ]
        h_again = elementwise.swiglu(*values).to(dtype)
        for layout in (None, *H_LAYOUTS):
            of_h = [LAYOUTS[layout](h_again, scale_format, backend="reference")] if layout else []
            results = ops.swiglu_backward_quantize_1x128_both(
                *(dh, kept[1][0], kept[2][0], scale_format), gate_dq=kept[1][1], up_dq=kept[2][1], h=layout
            )
            for outs, twin in zip(results, exact + of_h, strict=True):
                assert_equal(outs, twin, kind, shape, layout, "of payloads")
        expected_dgate, expected_dup = reference.swiglu_backward(dh, gate, up)
        for actual, expected, terms in (
            (h, reference.swiglu(gate, up), 0.0),
            (dgate, expected_dgate, (dh.float() * up.float()).abs()),
            (dup, expected_dup, 0.0),
        ):
            differing += elementwise.different(actual, expected, terms) * actual.numel()
            compared += actual.numel()
    assert differing < elementwise.DIFFERENT * compared


@pytest.mark.gpu
@pytest.mark.parametrize("of_payloads", [False, True])
def test_rows_of_gradients_may_lie_anywhere(of_payloads):
    """At multiples of 16 bytes, at others, and apart."""
    M, K = 144, 272
    whole = torch.randn(M, 3 * K + 24, device="cuda", dtype=BF16)
    for first, step in ((0, K), (8, K + 8), (1, K), (3, K + 5)):
        dh, gate, up = (whole[:, first + i * step : first + i * step + K] for i in range(3))
        multipliers = {}
        if of_payloads:
            (gate, gate_dq), (up, up_dq) = ops.quantize_1x128(gate), ops.quantize_1x128(up)
            multipliers = {"gate_dq": gate_dq, "up_dq": up_dq}
        alone = (dh.contiguous(), gate.contiguous(), up.contiguous())
        for layout in H_LAYOUTS:
            results = ops.swiglu_backward_quantize_1x128_both(dh, gate, up, h=layout, **multipliers)
            expected = ops.swiglu_backward_quantize_1x128_both(*alone, h=layout, **multipliers)
            for outs, others in zip(results, expected, strict=True):
                assert_equal(outs, others, first, step, layout)
        assert_equal(ops.quantize_1x128_both(dh), ops.quantize_1x128_both(alone[0]), first, step)


@pytest.mark.gpu
def test_more_than_two_to_the_31_elements():
    """The last rows of tall matrices, whose offsets no 32-bit number holds."""
    gate = torch.randn(70_000, 32_768, device="cuda", dtype=BF16)
    weight = torch.ones(32_768, device="cuda")
    tail = gate[-112:]  # 70,000 = 546 * 128 + 112
    outs = ops.swiglu_quantize_1x128(gate, gate)
    expected = ops.swiglu_quantize_1x128(tail, tail)
    last = slice(-112, None)
    assert torch.equal(bits(outs[0][last]), bits(expected[0])) and torch.equal(bits(outs[1][last]), bits(expected[1]))
    assert torch.equal(bits(outs[2][:, last]), bits(expected[2]))
    assert torch.equal(bits(outs[3][:, -1:]), bits(expected[3]))
    del outs
    results = ops.swiglu_backward_quantize_1x128_both(gate, gate, gate, h="columns")
    *gradients, h = ops.swiglu_backward_quantize_1x128_both(tail, tail, tail, h="columns")
    for outs, expected in zip(results, gradients, strict=False):
        assert torch.equal(bits(outs[0][last]), bits(expected[0])) and torch.equal(
            bits(outs[1][last]), bits(expected[1])
        )
        assert torch.equal(bits(outs[2][:, last]), bits(expected[2]))
        assert torch.equal(bits(outs[3][:, -1:]), bits(expected[3]))
    assert torch.equal(bits(results[2][0][:, last]), bits(h[0])) and torch.equal(
        bits(results[2][1][:, -1:]), bits(h[1])
    )
    del results, outs
    results = ops.swiglu_backward_quantize_1x128_both(gate, gate, gate, h="blocks")[2]
    expected = ops.swiglu_backward_quantize_1x128_both(tail, tail, tail, h="blocks")[2]
    for t_q, t_dq in (results, ops.swiglu_quantize_1x128(gate, gate, "blocks")):
        assert torch.equal(bits(t_q[:, last]), bits(expected[0])) and torch.equal(bits(t_dq[:, -1:]), bits(expected[1]))
    del results, t_q, t_dq
    t_q, t_dq = ops.quantize_128x128_columns(gate)
    expected = ops.quantize_128x128_columns(tail)
    assert torch.equal(bits(t_q[:, last]), bits(expected[0])) and torch.equal(bits(t_dq[:, -1:]), bits(expected[1]))
    del t_q, t_dq
    *outs, rstd = ops.rms_norm_quantize_1x128(gate, weight, 1e-5, "rows")
    expected = ops.rms_norm_quantize_1x128(tail, weight, 1e-5, "rows")
    assert torch.equal(bits(outs[0][last]), bits(expected[0])) and torch.equal(bits(rstd[last]), bits(expected[2]))


# Under torch.compile


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("M", [0, 7, 128])
def test_opcheck(device, M):
    x, weight, rstd = (torch.randn(*size, device=device) for size in ((M, 144), (144,), (M,)))
    for layout in LAYOUTS:
        for given in (None, rstd):
            arguments = (x, weight, 1e-5, layout, "fp32", given, "auto")
            torch.library.opcheck(torch.ops.blockfp8.rms_norm_quantize_1x128, arguments, test_utils=CHECKS)
        arguments = (x, x + 1, layout, "fp32", "auto")
        torch.library.opcheck(torch.ops.blockfp8.swiglu_quantize_1x128, arguments, test_utils=CHECKS)
    arguments = (x, x + 1, "fp32", "auto")
    torch.library.opcheck(torch.ops.blockfp8.swiglu_quantize_1x128_with_inputs, arguments, test_utils=CHECKS)
    _, gate, up = ops.swiglu_quantize_1x128_with_inputs(x + 1, x + 2)
    for layout in (None, *H_LAYOUTS):
        for inputs in ((x + 1, None, x + 2, None), (*gate, *up)):
            arguments = (x, *inputs, "fp32", layout, "auto")
            torch.library.opcheck(torch.ops.blockfp8.swiglu_backward_quantize_1x128_both, arguments, test_utils=CHECKS)


@pytest.mark.parametrize("device", DEVICES)
def test_compiled_calls_give_the_same_and_layouts_stay_apart(device):
    """A forward keeps the rows and a checkpointed backward the columns: one op for both would bring the memory back."""
    x, up, weight = (
        torch.randn(130, 144, device=device),
        torch.randn(130, 144, device=device),
        torch.ones(144, device=device),
    )

    def run(x, up, weight):
        y_q, y_dq, rstd = ops.rms_norm_quantize_1x128(x, weight, 1e-5, "rows")
        yt_q, yt_dq, _ = ops.rms_norm_quantize_1x128(x, weight, 1e-5, "columns", rstd=rstd)
        dgate, dup = ops.swiglu_backward_quantize_1x128_both(x, up, x)
        rows, columns, blocks = (ops.swiglu_quantize_1x128(x, up, layout) for layout in ("rows", "columns", "blocks"))
        return (
            y_q,
            y_dq,
            rstd,
            yt_q,
            yt_dq,
            *dgate,
            *dup,
            *rows,
            *columns,
            *blocks,
            *ops.quantize_1x128_columns(x),
            *ops.quantize_128x128_columns(x),
        )

    outs, code = run_and_get_code(torch.compile(run, fullgraph=True), x, up, weight)
    assert_equal(outs, run(x, up, weight))
    for name, calls in (("rms_norm_quantize_1x128", 2), ("swiglu_quantize_1x128", 3)):
        assert sum(text.count(f"= torch.ops.blockfp8.{name}.default(") for text in code) == calls


# Bad arguments


def test_bad_arguments_are_named():
    x, weight = torch.randn(4, 32), torch.ones(32)
    q, dq = ops.quantize_1x128(x)
    norm, swiglu, backward = (
        ops.rms_norm_quantize_1x128,
        ops.swiglu_quantize_1x128,
        ops.swiglu_backward_quantize_1x128_both,
    )
    for call, message in (
        (lambda: norm(x[0], weight, 1e-5), r"x has shape \(32,\): must be 2D"),
        (lambda: norm(x[:, :24], weight[:24], 1e-5), "dimension 1 must be a positive multiple of 16"),
        (lambda: norm(x, weight[:16], 1e-5), r"weight has shape \(16,\): must be \(32,\) for x of shape \(4, 32\)"),
        (lambda: norm(x, weight.half(), 1e-5), "weight has dtype torch.float16: must be torch.bfloat16 or torch.float32"),
        (lambda: norm(x, weight, -1.0), "eps = -1.0: must be at least 0"),
        (lambda: norm(x, weight, float("nan")), "eps = nan: must be at least 0"),
        (lambda: norm(x, weight, 1e-5, "row"), "layout = 'row': must be one of 'rows', 'columns', 'both'"),
        (lambda: norm(x, weight, 1e-5, rstd=torch.ones(5)), r"rstd has shape \(5,\): must be \(4,\)"),
        (lambda: norm(x, weight, 1e-5, rstd=torch.ones(4).bfloat16()), "rstd has dtype torch.bfloat16: must be torch.float32"),
        (lambda: norm(x, weight.requires_grad_(), 1e-5), "weight requires a gradient, which a quantising op does not have"),
        (lambda: norm(x, weight.detach().to("meta"), 1e-5), "weight is on meta and x on cpu: must be on one device"),
        (lambda: swiglu(x, x.bfloat16()), "up and gate differ in dtype, torch.bfloat16 and torch.float32: must have the same"),
        (lambda: swiglu(x, x[:3]), "up and gate differ in shape"),
        (lambda: swiglu(x, x, "both", "ue8m0"), "scale_format = 'ue8m0': must be one of 'fp32', 'pow2'"),
        (lambda: swiglu(x, x, backend="tritn"), "backend = 'tritn': must be one of 'auto', 'reference'"),
        (lambda: backward(x[:3], x, x), "dh and gate differ in shape"),
        (lambda: backward(x, q, q), "gate has dtype torch.float8_e4m3fn: must be torch.bfloat16 or torch.float32"),
        (lambda: backward(x, q, q, gate_dq=dq), "up_dq is None: gate and up are both payloads with multipliers, or neither is"),
        (lambda: backward(x, x, q, gate_dq=dq, up_dq=dq), "gate has dtype torch.float32: must be torch.float8_e4m3fn"),
        (lambda: backward(x, q, q[:3], gate_dq=dq, up_dq=dq), r"up has shape \(3, 32\): must be dh's, \(4, 32\)"),
        (lambda: backward(x, q, q, gate_dq=dq[:3], up_dq=dq), r"gate_dq has shape \(3, 1\): must be \(4, 1\) for its payload"),
        (lambda: backward(x, q, q, gate_dq=dq, up_dq=dq.to("meta")), "up_dq is on meta and dh on cpu: must be on one device"),
        (lambda: backward(x, x, x, h="rows"), "h = 'rows': must be one of None, 'columns', 'blocks'"),
        (lambda: backward(x.half(), x, x), "dh has dtype torch.float16"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            call()
    with torch.no_grad():
        assert not any(out.requires_grad for out in norm(x, weight, 1e-5))
