import pytest
import torch

from blockfp8_titan import ops, reference
from blockfp8_titan.ops.layouts import contiguous_rows

from .data import CHECKS, DEVICES, KINDS, bits, draw, padding, poisoned

OPS = [
    ops.quantize_1x128,
    ops.quantize_1x128_both,
    ops.quantize_1x128_columns,
    ops.quantize_128x128,
    ops.quantize_128x128_both,
    ops.quantize_128x128_columns,
]
# M = 0 and 1, around one group, a prime, a token count; K: least, no multiple of 128, one group, more.
SHAPES = [(0, 256), (1, 16), (7, 144), (127, 128), (129, 208), (130, 272), (384, 640), (144, 208), (1003, 1296)]


@pytest.fixture(autouse=True)
def poisoned_outputs(monkeypatch):
    """Every buffer that an op allocates starts as NaN, so that an element left unwritten shows."""
    for name in ("new_empty", "new_empty_strided"):
        monkeypatch.setattr(torch.Tensor, name, poisoned(getattr(torch.Tensor, name)))


def test_the_poison_works():
    assert torch.ones(2).new_empty(3).isnan().all()
    assert torch.ones(2).new_empty_strided((2, 3), (1, 2)).isnan().all()


@pytest.mark.gpu
@pytest.mark.parametrize("scale_format", ["fp32", "pow2"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("op", OPS)
def test_kernels_equal_their_twins_bitwise(op, kind, dtype, scale_format):
    for shape in SHAPES:
        x = draw(kind, *shape, dtype)
        expected = getattr(reference, op.__name__)(x, scale_format)
        for i, (out, twin) in enumerate(zip(op(x.cuda(), scale_format), expected, strict=True)):
            assert torch.equal(bits(out), bits(twin)), f"output {i} of {op.__name__} at {shape}"


@pytest.mark.gpu
def test_twins_on_gpu_equal_twins_on_cpu():
    for kind in KINDS:
        x = draw(kind, 129, 272, torch.float32)
        for op in OPS:
            for out, twin in zip(op(x.cuda(), backend="reference"), op(x), strict=True):
                assert torch.equal(bits(out), bits(twin)), (kind, op.__name__)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", SHAPES)
def test_layouts(device, shape):
    M, K = shape
    x = draw("normal", M, K, torch.bfloat16).to(device)
    x_q, x_dq, xt_q, xt_dq = ops.quantize_1x128_both(x)
    groups_k, groups_m = -(-K // 128), -(-M // 128)
    assert x_q.shape == (M, K) and x_q.stride() == (K, 1) and x_q.dtype == torch.float8_e4m3fn
    assert x_dq.shape == (M, groups_k) and x_dq.t().is_contiguous() and x_dq.dtype == torch.float32
    assert xt_q.shape == (K, M) and xt_q.stride(1) == 1 and (xt_q.stride(0) % 16 == 0 or M == 0)
    assert xt_dq.shape == (K, groups_m) and xt_dq.t().is_contiguous()
    for part, whole in zip(ops.quantize_1x128(x), (x_q, x_dq), strict=True):
        assert torch.equal(bits(part), bits(whole)) and part.stride() == whole.stride()
    for part, whole in zip(ops.quantize_1x128_columns(x), (xt_q, xt_dq), strict=True):
        assert torch.equal(bits(part), bits(whole)) and part.stride() == whole.stride()
    w_q, w_dq = ops.quantize_128x128(x)
    for part, whole in zip(ops.quantize_128x128_both(x), (w_q, w_dq, ops.transpose_fp8(w_q)), strict=True):
        assert torch.equal(bits(part), bits(whole)) and part.stride() == whole.stride()
    for part, whole in zip(ops.quantize_128x128_columns(x), (ops.transpose_fp8(w_q), w_dq.t()), strict=True):
        assert torch.equal(bits(part), bits(whole)) and part.stride() == whole.stride()
    assert w_q.is_contiguous() and w_dq.shape == (groups_m, groups_k) and w_dq.is_contiguous()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("M", [1, 7, 127, 129])
def test_padding_of_transposed_rows_is_zero(device, M):
    x = draw("nonfinite", M, 144, torch.float32).to(device)
    x[0, 0] = torch.nan
    for xt_q in (
        ops.quantize_1x128_both(x)[2],
        ops.quantize_1x128_columns(x)[0],
        ops.quantize_128x128_both(x)[2],
        ops.quantize_128x128_columns(x)[0],
        ops.transpose_fp8(ops.quantize_128x128(x)[0]),
    ):
        assert padding(xt_q).numel() and not padding(xt_q).any()
        assert xt_q[0, 0].float().isnan()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", SHAPES)
def test_transpose(device, shape):
    w_q = torch.randint(256, shape, dtype=torch.uint8, device=device).view(torch.float8_e4m3fn)
    assert torch.equal(bits(ops.transpose_fp8(w_q)), bits(w_q.t()))
    view = w_q[: shape[0] // 2]
    assert torch.equal(bits(ops.transpose_fp8(view)), bits(view.t()))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("op", OPS)
def test_strided_and_expanded_inputs(op, device):
    base = draw("normal", 160, 320, torch.bfloat16).to(device)
    for x in (base[:, 16:288], base.t()[:, :144], base[:1].expand(50, 320), base[::2]):
        for out, expected in zip(op(x), op(x.contiguous()), strict=True):
            assert torch.equal(bits(out), bits(expected)) and out.stride() == expected.stride()


@pytest.mark.parametrize("device", DEVICES)
def test_inputs_are_left_alone(device):
    x = draw("nonfinite", 130, 272, torch.float32).to(device)
    before = bits(x.clone())
    for op in OPS:
        op(x)
    assert torch.equal(bits(x), before)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("M", [0, 7, 128])
def test_opcheck(device, M):
    x = torch.randn(M, 144, device=device)
    for op in OPS:
        torch.library.opcheck(getattr(torch.ops.blockfp8, op.__name__), (x, "fp32", "auto"), test_utils=CHECKS)
    w_q, _ = ops.quantize_128x128(x)
    torch.library.opcheck(torch.ops.blockfp8.transpose_fp8, (w_q,), test_utils=CHECKS)
    torch.library.opcheck(torch.ops.blockfp8.transpose_fp8, (w_q, x), test_utils=CHECKS)
    torch.library.opcheck(torch.ops.blockfp8.quantize_128x128_both, (x, "pow2", "auto", w_q), test_utils=CHECKS)


def shards(w, rows):
    """w cut into shards of so many rows, the last ones shorter or empty as torch.chunk and FSDP2 leave them: (first row, shard)."""
    return [(first, w[first : first + rows]) for first in (0, rows, 2 * rows, 3 * rows)]


# Rows of a shard, 4 shards and fewer rows than they could hold: below, at, across and off the blocks' edges; an empty last shard.
SHARDS = [
    (64, 256, 272),
    (96, 384, 144),
    (448, 1700, 16),
    (1000, 4000, 144),
    (1, 3, 128),
    (43, 128, 640),
    (128, 512, 256),
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("scale_format", ["fp32", "pow2"])
@pytest.mark.parametrize("rows, N, K", SHARDS)
def test_shards_quantise_as_the_whole_does(rows, N, K, scale_format, device):
    for kind in KINDS:
        for dtype in (torch.bfloat16, torch.float32):
            w = draw(kind, N, K, dtype)
            whole_q, whole_dq = reference.quantize_128x128(w, scale_format)
            parts = [(first, part.to(device)) for first, part in shards(w, rows)]
            tables = [torch.zeros_like(whole_dq, dtype=torch.int32, device=device) for _ in parts]
            ops.amax_128x128_([part for _, part in parts], [first for first, _ in parts], tables)
            amax = torch.stack(tables).amax(0).view(torch.float32)
            w_dq = reference.block_multiplier(amax, scale_format)
            assert torch.equal(bits(w_dq), bits(whole_dq)), (kind, dtype)
            w_q = torch.cat([ops.quantize_rows(part, w_dq, first) for first, part in parts])
            assert torch.equal(bits(w_q), bits(whole_q)), (kind, dtype)


@pytest.mark.parametrize("device", DEVICES)
def test_amax_leaves_blocks_of_other_rows_alone(device):
    w = torch.full((200, 272), -3.0, device=device)
    bits_of_w = torch.full((4, 3), 7, dtype=torch.int32, device=device)
    ops.amax_128x128_([w], [100], [bits_of_w])
    three = torch.tensor(3.0).view(torch.int32).item()
    assert bits_of_w.tolist() == [[three] * 3, [three] * 3, [three] * 3, [7] * 3]
    ops.amax_128x128_([w[:0]], [9999], [bits_of_w])
    assert bits_of_w[0, 0] == three


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("M", [0, 7, 128])
def test_opcheck_of_shards(device, M):
    w, w_dq = torch.randn(M, 144, device=device), torch.ones(3, 2, device=device)
    bits_of_w = torch.zeros(3, 2, dtype=torch.int32, device=device)
    torch.library.opcheck(torch.ops.blockfp8.quantize_rows, (w, w_dq, 120, "auto"), test_utils=CHECKS)
    torch.library.opcheck(torch.ops.blockfp8.amax_128x128_, ([w], [120], [bits_of_w]), test_utils=CHECKS)


def test_bad_tables_are_named():
    w, table = torch.randn(130, 144), torch.ones(2, 2)
    for w_dq, first_row in ((table, 200), (table, -1), (torch.ones(2, 3), 0), (torch.ones(2, 4)[:, ::2], 0)):
        with pytest.raises(
            ValueError, match=rf"w_dq has shape .*, first_row is {first_row}: w_dq must be contiguous and"
        ):
            ops.quantize_rows(w, w_dq, first_row)
    with pytest.raises(ValueError, match="amax_bits has dtype torch.float32: must be torch.int32"):
        ops.amax_128x128_([w], [0], [table])
    with pytest.raises(ValueError, match="have 1, 2 and 1 items: must have as many"):
        ops.amax_128x128_([w], [0, 1], [table])


@pytest.mark.parametrize("op", OPS)
def test_bad_arguments_are_named(op):
    name = "w" if op in (ops.quantize_128x128, ops.quantize_128x128_both) else "x"
    with pytest.raises(ValueError, match=rf"{name} has shape \(2, 3, 16\): must be 2D"):
        op(torch.randn(2, 3, 16))
    with pytest.raises(ValueError, match=rf"{name} has dtype torch.float16: must be torch.bfloat16 or torch.float32"):
        op(torch.randn(4, 16).half())
    for k in (0, 8, 24):
        with pytest.raises(
            ValueError, match=rf"{name} has shape \(4, {k}\): dimension 1 must be a positive multiple of 16"
        ):
            op(torch.randn(4, k))
    with pytest.raises(ValueError, match="scale_format = 'ue8m0': must be one of 'fp32', 'pow2'"):
        op(torch.randn(4, 16), "ue8m0")
    with pytest.raises(ValueError, match="backend = 'tritn': must be one of 'auto', 'reference'"):
        op(torch.randn(4, 16), backend="tritn")
    x = torch.randn(4, 16, requires_grad=True)
    with pytest.raises(ValueError, match=f"{name} requires a gradient, which a quantising op does not have"):
        op(x)
    with torch.no_grad():
        assert not any(out.requires_grad for out in op(x))


def test_rows_wider_than_kernels_count_are_refused():
    x = torch.zeros(1, 1).expand(1, 2**24 + 16)
    for op in (ops.quantize_1x128, ops.quantize_1x128_both, ops.quantize_128x128):
        with pytest.raises(
            ValueError, match=r"has shape \(1, 16777232\): dimension 1 must be at most 16,777,216; split it"
        ):
            op(x)


@pytest.mark.gpu
def test_more_than_two_to_the_31_elements():
    x = torch.randn(70_000, 32_768, device="cuda", dtype=torch.bfloat16)
    x_q, x_dq, xt_q, xt_dq = ops.quantize_1x128_both(x)
    tail = x[-112:].cpu()  # 70,000 = 546 * 128 + 112
    for out, twin in zip((x_q[-112:], x_dq[-112:]), reference.quantize_1x128(tail), strict=True):
        assert torch.equal(bits(out), bits(twin))
    for out, twin in zip((xt_q[:, -112:], xt_dq[:, -1:]), reference.quantize_1x128(tail.t()), strict=True):
        assert torch.equal(bits(out), bits(twin))


def test_rows_too_far_apart_for_32_bits_are_copied():
    x = torch.empty(2, 2**25, device="meta")
    assert contiguous_rows(x[:, :32]).stride() == (32, 1)
    assert contiguous_rows(x[:, : 2**24]).stride() == (2**24, 1)
    near = torch.empty(2, 2**24, device="meta")[:, :32]
    assert contiguous_rows(near) is near


@pytest.mark.parametrize("device", DEVICES)
def test_a_divisor_whose_reciprocal_rounds_badly(device):
    """Its bits are all ones: Newton's step does not mend an approximate reciprocal that is a unit off, and x / dq is at a tie."""
    x = torch.zeros(1, 128, device=device)
    x[0, :2] = torch.tensor([1.75 - 2**-23, 2**-18])
    x = torch.cat([x * 2.0**e for e in range(-100, 101, 20)])
    for out, twin in zip(
        ops.quantize_1x128_both(x), ops.quantize_1x128_both(x.cpu(), backend="reference"), strict=True
    ):
        assert torch.equal(bits(out.cpu()), bits(twin))
