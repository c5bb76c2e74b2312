import pytest
import torch

from blockfp8_titan import ops, reference
from blockfp8_titan.numerics import GEMM_RELATIVE_ERROR, relative_error
from blockfp8_titan.ops.backend import cublas_obstacle, is_hopper

from .data import CHECKS, DEVICES, draw

KINDS = ["1x128_128x128", "1x128_1x128"]
# (M, N, K): K of gemm is also the token count of dw, so any size from 0.
SHAPES = [
    (0, 64, 128),
    (1, 16, 16),
    (7, 144, 208),
    (127, 128, 128),
    (129, 272, 384),
    (128, 1040, 1296),
    (272, 144, 0),
    (272, 144, 1),
    (272, 144, 7),
    (144, 272, 127),
    (144, 272, 129),
    (515, 528, 640),
]


def operands(kind, M, N, K, data="normal", device="cpu"):
    """(a_q, a_dq, b_q, b_dq), laid out as the quantisation ops lay them out."""

    def rows(m, k):
        # As the transposed half: contraction sizes that are no multiple of 16, rows at multiples of 16 bytes.
        return ops.quantize_1x128_both(draw(data, k, m, torch.float32).to(device))[2:]

    a_q, a_dq = rows(max(-(-M // 16) * 16, 16), K)
    a = a_q[:M], a_dq[:M].t().contiguous().t()
    if kind == "1x128_1x128":
        return *a, *rows(N, K)
    b_q, b_dq = ops.quantize_128x128(draw(data, K, N, torch.float32).to(device))
    return *a, ops.transpose_fp8(b_q), b_dq.t()


def exact(kind, a_q, a_dq, b_q, b_dq):
    """The product of the dequantised operands in fp64, on the CPU."""
    b = reference.dequantize_1x128 if kind == "1x128_1x128" else reference.dequantize_128x128
    return reference.dequantize_1x128(a_q.cpu(), a_dq.cpu()).double() @ b(b_q.cpu(), b_dq.cpu()).double().t()


def assert_close(expected, out):
    # Equal where all is zero or nothing: a relative error is NaN there.
    assert torch.equal(out.cpu().double(), expected) or relative_error(expected, out.cpu()) < GEMM_RELATIVE_ERROR


def gemm(kind, *args, **kwargs):
    return getattr(ops, f"gemm_{kind}")(*args, **kwargs)


@pytest.fixture(autouse=True)
def poisoned_outputs(monkeypatch):
    allocate = torch.Tensor.new_empty

    def new_empty(self, *args, **kwargs):
        out = allocate(self, *args, **kwargs)
        return out.fill_(torch.nan) if out.dtype in (torch.bfloat16, torch.float32) else out

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)


@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "device, backend",
    [("cpu", "auto"), *(pytest.param("cuda", b, marks=pytest.mark.gpu) for b in ("reference", "triton", "auto"))],
)
def test_product(kind, shape, out_dtype, device, backend):
    args = operands(kind, *shape, device=device)
    out = gemm(kind, *args, out_dtype, backend=backend)
    expected = exact(kind, *args)
    assert out.shape == expected.shape and out.dtype == out_dtype and out.is_contiguous()
    assert_close(expected, out)


@pytest.mark.gpu
@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [*SHAPES, (4097, 1040, 256)])  # of which programs have more than one tile
@pytest.mark.parametrize("name", ["LOW", "HIGH"])
def test_product_with_either_tile(name, shape, out_dtype, monkeypatch):
    if not is_hopper(torch.device("cuda")):
        pytest.skip("tiles are chosen on Hopper alone")
    from blockfp8_titan.kernels import gemm_hopper, gemm_hopper_launch

    tiling = getattr(gemm_hopper, name)
    monkeypatch.setattr(gemm_hopper_launch, "tiling_of", lambda *args: tiling)
    monkeypatch.setattr(gemm_hopper_launch, "_launches", {})
    args = operands("1x128_128x128", *shape, device="cuda")
    assert_close(exact("1x128_128x128", *args), gemm("1x128_128x128", *args, out_dtype, backend="triton"))


def test_tiles_by_what_the_busiest_multiprocessor_computes():
    pytest.importorskip("triton", reason="Triton is not installed on this platform")
    from blockfp8_titan.kernels.gemm_hopper import HIGH, LOW, tiling_of

    assert tiling_of(16384, 4096, 4096, False, 132) is LOW  # 21 waves of 192 rows, 16 of 256
    assert tiling_of(16384, 14336, 4096, False, 132) is LOW
    assert tiling_of(16384, 1024, 4096, False, 132) is HIGH  # 6 waves of 192, 4 of 256
    assert tiling_of(16384, 4096, 1024, False, 132) is HIGH  # as much to store, less to multiply
    assert tiling_of(192, 128, 128, False, 132) is LOW
    assert tiling_of(16384, 4096, 4096, True, 132) is HIGH


@pytest.mark.parametrize("kind", KINDS)
def test_the_reference_computes_in_fp32_under_autocast(kind):
    a_q, a_dq, b_q, b_dq = operands(kind, 32, 48, 272)
    gemm = getattr(ops, f"gemm_{kind}")
    expected = gemm(a_q, a_dq, b_q, b_dq, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(gemm(a_q, a_dq, b_q, b_dq, torch.float32), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", ["triton", "cublas", "auto"])
@pytest.mark.parametrize("data", ["outliers", "uniform", "zero_blocks", "normal"])
def test_product_of_training_sizes(kind, backend, data):
    if backend == "cublas" and (reason := cublas_obstacle(torch.device("cuda"))):
        pytest.skip(reason)
    for shape in ((512, 1024, 4096), (1024, 512, 2064), (4096, 256, 1040), (16, 4096, 512), (2064, 16, 128)):
        args = operands(kind, *shape, data=data, device="cuda")
        assert_close(exact(kind, *args), gemm(kind, *args, backend=backend))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", KINDS)
def test_zero_blocks_multiply_to_zero(kind, device):
    args = operands(kind, 144, 144, 272, data="zero_blocks", device=device)
    args[0].view(torch.uint8)[:16] = 0
    assert not gemm(kind, *args)[:16].float().any()


@pytest.mark.parametrize(
    "device, backend", [("cpu", "auto"), *(pytest.param("cuda", b, marks=pytest.mark.gpu) for b in ("triton", "auto"))]
)
@pytest.mark.parametrize("kind", KINDS)
def test_nan_stays_visible_and_local(kind, device, backend):
    x = draw("normal", 48, 272, torch.float32)
    x[5, 130] = torch.inf
    a = ops.quantize_1x128(x.to(device))
    b = operands(kind, 16, 144, 272, device=device)[2:]
    out = gemm(kind, *a, *b, backend=backend)
    assert out[5].isnan().all()
    assert out[torch.arange(48) != 5].isfinite().all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", KINDS)
def test_opcheck(kind, device):
    args = operands(kind, 16, 48, 144, device=device)
    torch.library.opcheck(
        getattr(torch.ops.blockfp8, f"gemm_{kind}").default, (*args, torch.bfloat16, "auto"), test_utils=CHECKS
    )


@pytest.mark.parametrize("kind", KINDS)
def test_bad_arguments_are_named(kind):
    a_q, a_dq, b_q, b_dq = operands(kind, 16, 48, 144)
    with pytest.raises(ValueError, match="a_q has dtype torch.float32: must be torch.float8_e4m3fn"):
        gemm(kind, a_q.float(), a_dq, b_q, b_dq)
    with pytest.raises(ValueError, match=r"a_q has shape \(16, 128\) and b_q \(48, 144\): their second dimensions"):
        gemm(kind, a_q[:, :128], a_dq, b_q, b_dq)
    with pytest.raises(ValueError, match=r"a_dq has shape \(16, 1\): must be \(16, 2\)"):
        gemm(kind, a_q, a_dq[:, :1], b_q, b_dq)
    with pytest.raises(ValueError, match="b_dq has shape"):
        gemm(kind, a_q, a_dq, b_q, b_dq[:, :1])
    with pytest.raises(ValueError, match="out_dtype = torch.float16: must be torch.bfloat16 or torch.float32"):
        gemm(kind, a_q, a_dq, b_q, b_dq, torch.float16)
    with pytest.raises(ValueError, match=r"a_q has strides \(1, 16\): rows must be contiguous"):
        gemm(kind, a_q.t().contiguous().t(), a_dq, b_q, b_dq)
    with pytest.raises(ValueError, match="b_q has strides"):
        gemm(kind, a_q, a_dq, b_q.t().contiguous().t(), b_dq)
    with pytest.raises(ValueError, match="b_dq is on meta and a_q on cpu: must be on one device"):
        gemm(kind, a_q, a_dq, b_q, b_dq.to("meta"))
    with pytest.raises(ValueError, match="a_dq requires a gradient, .* call it under torch.no_grad"):
        gemm(kind, a_q, a_dq.clone().requires_grad_(), b_q, b_dq)
    with pytest.raises(ValueError, match="gemm_backend = 'cutlass': must be one of 'auto', 'triton'"):
        gemm(kind, a_q, a_dq, b_q, b_dq, backend="cutlass")
    for backend in ("triton", "cublas"):
        with pytest.raises(
            ValueError, match=f'gemm_backend = "{backend}": it needs .* the device is cpu; use "auto" or "reference"'
        ):
            gemm(kind, a_q, a_dq, b_q, b_dq, backend=backend)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_cublas_names_the_size_it_does_not_take(kind):
    if reason := cublas_obstacle(torch.device("cuda")):
        pytest.skip(reason)
    x = ops.quantize_1x128(torch.randn(7, 256, device="cuda"))
    b = operands(kind, 16, 48, 256, device="cuda")[2:]
    with pytest.raises(ValueError, match='M = 7 is not a positive multiple of 4; use "auto"'):
        gemm(kind, *x, *b, backend="cublas")


@pytest.mark.gpu
def test_counters_of_tiles_are_used_again(monkeypatch):
    from blockfp8_titan.kernels import gemm_hopper_launch

    monkeypatch.setattr(gemm_hopper_launch, "COUNTERS", 3)
    monkeypatch.setattr(gemm_hopper_launch, "_counters", {})
    monkeypatch.setattr(gemm_hopper_launch, "_launches", {})
    args = operands("1x128_128x128", 516, 528, 640, device="cuda")
    first, *others = (gemm("1x128_128x128", *args, backend="triton") for _ in range(8))
    assert all(torch.equal(first, other) for other in others)
    assert len(gemm_hopper_launch._counters) == is_hopper(args[0].device)
    for zeros, _ in gemm_hopper_launch._counters.values():
        assert zeros.shape == (3,) and not zeros.any()


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_a_remembered_launch_reads_what_is_there_now(kind, monkeypatch):
    from blockfp8_titan.kernels import gemm_hopper_launch

    if not is_hopper(torch.device("cuda")):
        pytest.skip("remembered on Hopper alone")
    monkeypatch.setattr(gemm_hopper_launch, "REMEMBERED", 4)
    monkeypatch.setattr(gemm_hopper_launch, "_launches", {})
    # All are drawn first: what lay elsewhere in between would give results another address.
    args, *draws = (operands(kind, 516, 528, 640, device="cuda") for _ in range(4))
    gemm(kind, *args, backend="triton")  # it is compiled
    for others in draws:
        assert_close(exact(kind, *args), gemm(kind, *args, backend="triton"))
        for arg, other in zip(args, others, strict=True):
            arg.copy_(other)
    assert len(gemm_hopper_launch._launches) == 1
    kept = [gemm(kind, *args, backend="triton") for _ in range(9)]
    assert all(torch.equal(out, kept[0]) for out in kept) and 0 < len(gemm_hopper_launch._launches) <= 4
    remembered = dict(gemm_hopper_launch._launches)
    args = operands(kind, 515, 528, 640, device="cuda")  # multipliers are copied for each launch
    for _ in range(2):
        assert_close(exact(kind, *args), gemm(kind, *args, backend="triton"))
    assert gemm_hopper_launch._launches == remembered


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_products_side_by_side_and_replayed(kind):
    """Programs of a launch share a counter of tiles: no two launches at a time may, recorded ones neither, and each leaves it at zero."""
    args = operands(kind, 4096, 2048, 512, device="cuda")
    expected = gemm(kind, *args, backend="triton")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = gemm(kind, *args, backend="triton")
    streams = [torch.cuda.Stream() for _ in range(3)]
    outs, differences = [], []
    for _ in range(20):
        for stream in streams:
            with torch.cuda.stream(stream):
                outs.append(gemm(kind, *args, backend="triton"))
                # These are freed, so that the stream's next launches are remembered ones.
                differences.append((gemm(kind, *args, backend="triton") != expected).sum())
                differences.append((gemm(kind, *args, backend="triton") != expected).sum())
        replayed.fill_(torch.nan)
        graph.replay()
        outs.append(replayed.clone())
    torch.cuda.synchronize()
    assert all(torch.equal(out, expected) for out in outs) and not any(differences)
    if is_hopper(args[0].device):
        from blockfp8_titan.kernels import gemm_hopper_launch

        assert not any(zeros.any() for zeros, _ in gemm_hopper_launch._counters.values())
