import copy

import pytest
import torch
import torch.nn as nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torchtitan.tools.utils import set_default_dtype

from blockfp8_titan import BlockwiseFP8Linear, Recipe
from blockfp8_titan.numerics import SQNR_FLOOR_DB, sqnr

from .data import DEVICES
from .llama import CountOps

BACKENDS = [("cpu", "auto"), *(pytest.param("cuda", b, marks=pytest.mark.gpu) for b in ("auto", "triton", "reference"))]
FLOATS = [torch.bfloat16, torch.float32]


def pair(in_features, out_features, *, bias=False, recipe=Recipe(), device="cpu", dtype=torch.float32):
    """A blockwise-fp8 linear and an fp32 nn.Linear of the same weights."""
    linear = BlockwiseFP8Linear(in_features, out_features, bias, recipe=recipe, device=device, dtype=dtype)
    exact = nn.Linear(in_features, out_features, bias, device=device)
    exact.load_state_dict(linear.state_dict())
    return linear, exact


def gradients(module, x, dy):
    """(y, dx, {parameter: gradient})"""
    x = x.detach().clone().requires_grad_()
    y = module(x)
    y.backward(dy.to(y.dtype))
    return y.detach(), x.grad, {name: p.grad for name, p in module.named_parameters()}


@pytest.mark.parametrize("scale_format", ["fp32", "pow2"])
@pytest.mark.parametrize("wgrad", ["fp8", "bf16", "fp8_block"])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("device, backend", BACKENDS)
def test_sqnr_against_fp32(device, backend, dtype, wgrad, scale_format):
    recipe = Recipe(gemm_backend=backend, wgrad=wgrad, scale_format=scale_format)
    linear, exact = pair(528, 400, recipe=recipe, device=device, dtype=dtype)
    exact.float()
    x, dy = torch.randn(3, 129, 528, device=device), torch.randn(3, 129, 400, device=device)
    y, dx, grads = gradients(linear, x.to(dtype), dy.to(dtype))
    y_exact, dx_exact, grads_exact = gradients(exact, x, dy)
    dw = "dw" if wgrad == "fp8" else f"dw_{wgrad}"
    for name, truth, value in (("y", y_exact, y), ("dx", dx_exact, dx), (dw, grads_exact["weight"], grads["weight"])):
        floor = SQNR_FLOOR_DB["pow2" if scale_format == "pow2" and name != "dw_bf16" else name]
        assert sqnr(truth, value) >= floor, name
        assert value.dtype == dtype and value.shape == truth.shape


@pytest.mark.parametrize("shape", [(0,), (1,), (7,), (127,), (129,), (2, 0), (3, 5), (2, 3, 4), ()])
@pytest.mark.parametrize("device, backend", BACKENDS)
def test_any_number_of_tokens(device, backend, shape):
    linear, exact = pair(144, 272, bias=True, recipe=Recipe(gemm_backend=backend), device=device)
    x, dy = torch.randn(*shape, 144, device=device), torch.randn(*shape, 272, device=device)
    y, dx, grads = gradients(linear, x, dy)
    y_exact, dx_exact, grads_exact = gradients(exact, x, dy)
    assert y.shape == y_exact.shape and dx.shape == dx_exact.shape
    if x.numel() == 0:
        assert not grads["weight"].any() and not grads["bias"].any()
        return
    for truth, value in ((y_exact, y), (dx_exact, dx), (grads_exact["weight"], grads["weight"])):
        assert sqnr(truth, value) > 24  # few values: a wider spread than the floors allow for
    assert torch.allclose(grads["bias"], grads_exact["bias"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("weight_dtype", FLOATS)
@pytest.mark.parametrize("input_dtype", FLOATS)
@pytest.mark.parametrize("device", DEVICES)
def test_dtypes_with_and_without_autocast(device, input_dtype, weight_dtype):
    linear, _ = pair(128, 64, bias=True, device=device, dtype=weight_dtype)
    x = torch.randn(10, 128, device=device, dtype=input_dtype, requires_grad=True)
    y = linear(x)
    assert y.dtype == input_dtype
    with torch.autocast(device, torch.bfloat16):
        y = linear(x)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert x.grad.dtype == input_dtype
    assert linear.weight.grad.dtype == weight_dtype and linear.bias.grad.dtype == weight_dtype


@pytest.mark.parametrize("device", DEVICES)
def test_what_needs_no_gradient_costs_no_gemm(device):
    linear, _ = pair(128, 64, device=device)
    x = torch.randn(32, 128, device=device)

    def gemms(x, backward=True):
        with CountOps() as count:
            y = linear(x)
            if backward:
                y.sum().backward()
        return count

    assert gemms(x.clone().requires_grad_()).gemms == 3
    assert gemms(x).gemms == 2
    linear.weight.requires_grad_(False)
    frozen = gemms(x.clone().requires_grad_())
    assert frozen.gemms == 2 and not frozen.calls["quantize_1x128_both"]
    linear.weight.requires_grad_(True)
    with torch.no_grad():
        inference = gemms(x, backward=False)
    assert inference.gemms == 1 and not inference.calls["quantize_1x128_both"]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("wgrad, bytes_per_element", [("fp8", 1), ("fp8_block", 1), ("bf16", 2)])
def test_bytes_kept_for_backward(device, wgrad, bytes_per_element):
    linear, _ = pair(512, 256, recipe=Recipe(wgrad=wgrad), device=device, dtype=torch.bfloat16)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        linear(torch.randn(1024, 512, device=device, dtype=torch.bfloat16, requires_grad=True))
    x_bytes = sum(t.nbytes for t in kept if t.data_ptr() != linear.weight.data_ptr())
    assert x_bytes <= 1024 * 512 * bytes_per_element * 1.04
    assert any(t.data_ptr() == linear.weight.data_ptr() for t in kept)


def test_eval_and_no_grad_give_the_same_output():
    linear, _ = pair(144, 64, bias=True)
    x = torch.randn(9, 144)
    with torch.no_grad():
        without = linear(x)
    assert torch.equal(linear(x), without) and torch.equal(linear.eval()(x), without)


@pytest.mark.parametrize("device", DEVICES)
def test_double_backward_is_refused(device):
    linear, _ = pair(64, 64, device=device)
    x = torch.randn(4, 64, device=device, requires_grad=True)
    with pytest.raises(RuntimeError, match="no second derivative.*create_graph=True"):
        torch.autograd.grad(linear(x).sum(), x, create_graph=True)


@pytest.mark.parametrize("device", DEVICES)
def test_strided_inputs_and_gradients(device):
    linear, _ = pair(144, 64, device=device)
    base = torch.randn(144, 40, device=device)
    for x in (base.t(), base.t()[::2], base[:, :1].t().expand(12, 144)):
        for dy in (
            torch.ones((), device=device).expand(*x.shape[:-1], 64),
            torch.randn(64, x.shape[0], device=device).t(),
        ):
            y, dx, grads = gradients(linear, x, dy)
            linear.zero_grad()
            y_dense, dx_dense, grads_dense = gradients(linear, x.contiguous(), dy.contiguous())
            linear.zero_grad()
            assert (
                torch.equal(y, y_dense)
                and torch.equal(dx, dx_dense)
                and torch.equal(grads["weight"], grads_dense["weight"])
            )


@pytest.mark.parametrize("device", DEVICES)
def test_zeros_give_zeros_and_nan_stays_visible(device):
    linear, _ = pair(256, 128, device=device)
    nn.init.zeros_(linear.weight)
    y, dx, grads = gradients(linear, torch.zeros(4, 256, device=device), torch.zeros(4, 128, device=device))
    assert not y.any() and not dx.any() and not grads["weight"].any()
    nn.init.normal_(linear.weight)
    linear.zero_grad()
    x, dy = torch.randn(4, 256, device=device), torch.randn(4, 128, device=device)
    x[1, 3] = torch.inf
    y, dx, grads = gradients(linear, x, dy)
    assert y[1].isnan().all() and y[[0, 2, 3]].isfinite().all() and dx.isfinite().all()
    assert grads["weight"][:, 3].isnan().all()


def test_gradients_of_a_loss_averaged_over_millions_of_tokens_survive():
    # A floor of 1e-12 under amax, the field's usual one, would flush these to zero.
    linear, exact = pair(128, 128)
    x, dy = torch.randn(64, 128), torch.randn(64, 128) * 1e-20
    _, dx_exact, grads_exact = gradients(exact, x, dy)
    _, dx, grads = gradients(linear, x, dy)
    assert sqnr(dx_exact, dx) >= SQNR_FLOOR_DB["dx"]
    assert sqnr(grads_exact["weight"], grads["weight"]) >= SQNR_FLOOR_DB["dw"]


def block(device):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.RMSNorm(64), BlockwiseFP8Linear(64, 144, bias=False), nn.SiLU(), BlockwiseFP8Linear(144, 64)
    ).to(device)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("wgrad", ["fp8", "bf16", "fp8_block"])
@pytest.mark.parametrize("device", DEVICES)
def test_compiles_without_graph_breaks(device, backend, wgrad):
    torch._dynamo.reset()
    eager = block(device)
    for linear in (eager[1], eager[3]):
        linear.recipe = Recipe(wgrad=wgrad)
    compiled = torch.compile(copy.deepcopy(eager), fullgraph=True, backend=backend)
    for tokens in (24, 7, 129):  # the second size compiles again, with dynamic shapes
        x, dy = torch.randn(2, tokens, 64, device=device), torch.randn(2, tokens, 64, device=device)
        for module in (eager, compiled):
            module.zero_grad()
        y, dx, grads = gradients(eager, x, dy)
        y_compiled, dx_compiled, grads_compiled = gradients(compiled, x, dy)
        # Inductor sums the norm in another order: an element may round to the neighbouring e4m3 number.
        least = 200 if backend == "aot_eager" else 35
        for truth, value in (
            (y, y_compiled),
            (dx, dx_compiled),
            *zip(grads.values(), grads_compiled.values(), strict=True),
        ):
            assert sqnr(truth, value) > least


@pytest.mark.parametrize("device", DEVICES)
def test_compiles_under_autocast(device):
    torch._dynamo.reset()
    module = block(device)
    x = torch.randn(8, 64, device=device)
    with torch.autocast(device, torch.bfloat16):
        y = torch.compile(module, fullgraph=True, backend="aot_eager")(x)
        # Compiled, SiLU rounds to bf16 once instead of twice; that moves a few values to the neighbouring e4m3 number.
        assert y.dtype == torch.bfloat16 and sqnr(module(x), y) > 30


def full():
    return {}


def selective():
    saved = {torch.ops.blockfp8.gemm_1x128_128x128.default}

    def policy(ctx, op, *args, **kwargs):
        return CheckpointPolicy.MUST_SAVE if op in saved else CheckpointPolicy.PREFER_RECOMPUTE

    return {"context_fn": lambda: create_selective_checkpoint_contexts(policy)}


@pytest.mark.parametrize("options, gemms", [(full, 8), (selective, 6)])
@pytest.mark.parametrize("device", DEVICES)
def test_activation_checkpointing(device, options, gemms):
    module = block(device)
    x, dy = torch.randn(2, 20, 64, device=device), torch.randn(2, 20, 64, device=device)
    y, dx, grads = gradients(module, x, dy)
    module.zero_grad()
    with CountOps() as count:
        y_ac, dx_ac, grads_ac = gradients(lambda_module(module, options()), x, dy)
    assert count.gemms == gemms  # two forward, four backward, and what is computed again
    assert torch.equal(y, y_ac) and torch.equal(dx, dx_ac)
    assert all(torch.equal(grads[name], grads_ac[name]) for name in grads)


def lambda_module(module, options):
    class Checkpointed(nn.Module):
        def forward(self, x):
            return checkpoint(module, x, use_reentrant=False, **options)

        def named_parameters(self, *args, **kwargs):
            return module.named_parameters(*args, **kwargs)

    return Checkpointed()


def test_from_linear_shares_parameters_and_keeps_hooks_and_mode():
    linear = nn.Linear(32, 48).eval()
    calls = []
    linear.register_forward_hook(lambda *args: calls.append(1))
    twin = BlockwiseFP8Linear.from_linear(linear, Recipe(wgrad="bf16"))
    assert isinstance(twin, nn.Linear) and twin.weight is linear.weight and twin.bias is linear.bias
    assert not twin.training and twin.recipe.wgrad == "bf16"
    twin(torch.randn(2, 32))
    assert calls == [1]
    twin.register_forward_hook(lambda *args: calls.append(2))
    linear(torch.randn(2, 32))
    assert calls == [1, 1]
    assert type(linear) is nn.Linear and not hasattr(linear, "recipe")


def test_from_linear_on_meta_then_materialised():
    twin = BlockwiseFP8Linear.from_linear(nn.Linear(32, 48, device="meta"))
    assert twin.weight.is_meta
    twin.to_empty(device="cpu")
    nn.init.trunc_normal_(twin.weight)
    nn.init.zeros_(twin.bias)
    assert twin(torch.randn(2, 32)).isfinite().all()


def test_state_dict_is_that_of_nn_linear():
    linear, exact = pair(32, 48, bias=True)
    assert linear.state_dict().keys() == exact.state_dict().keys()
    assert all(type(value) is torch.Tensor for value in linear.state_dict().values())
    exact.load_state_dict(linear.state_dict(), strict=True)
    copied = copy.deepcopy(linear)
    assert copied.recipe == linear.recipe and torch.equal(copied.weight, linear.weight)


@pytest.mark.parametrize(
    "in_features, out_features, name",
    [(24, 16, "in_features = 24"), (16, 8, "out_features = 8"), (0, 16, "in_features = 0")],
)
def test_unaligned_features_are_refused(in_features, out_features, name):
    with pytest.raises(ValueError, match=f"{name}: must be a positive multiple of 16"):
        BlockwiseFP8Linear(in_features, out_features)
    if in_features:
        with pytest.raises(ValueError, match=f"{name}: must be a positive multiple of 16"):
            BlockwiseFP8Linear.from_linear(nn.Linear(in_features, out_features))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.float8_e4m3fn, torch.complex64])
def test_other_dtypes_are_refused(dtype):
    requirement = f"{dtype}: must be torch.bfloat16 or torch.float32, .*; cast the layer, or keep it an nn.Linear"
    with pytest.raises(ValueError, match=f"^dtype = {requirement}"):
        BlockwiseFP8Linear(32, 48, dtype=dtype)
    with pytest.raises(ValueError, match=f"^weight.dtype = {requirement}"):
        BlockwiseFP8Linear.from_linear(nn.Linear(32, 48, device="meta").to(dtype))


def test_another_default_dtype_is_refused():
    with set_default_dtype(torch.float16):
        with pytest.raises(ValueError, match="^dtype = torch.float16: must be"):
            BlockwiseFP8Linear(32, 48)
        assert BlockwiseFP8Linear(32, 48, dtype=torch.bfloat16).weight.dtype == torch.bfloat16


@pytest.mark.parametrize("fqn", ["", "layers.3.attention.wq"])
def test_bad_inputs_are_named(fqn):
    linear, _ = pair(64, 32)
    linear.fqn = fqn
    prefix = f"^{fqn}: " if fqn else "^"
    with pytest.raises(ValueError, match=f"{prefix}input of a blockwise-fp8 linear has dtype torch.float16"):
        linear(torch.randn(2, 64).half())
    with pytest.raises(ValueError, match=rf"{prefix}input has shape \(2, 32\): must be \[..., 64\]"):
        linear(torch.randn(2, 32))
    with pytest.raises(ValueError, match=f"{prefix}weight of a blockwise-fp8 linear has dtype torch.float64"):
        linear.double()(torch.randn(2, 64))
    with (
        torch.autocast("cpu", torch.float16),
        pytest.raises(ValueError, match=f"{prefix}autocast's dtype is torch.float16"),
    ):
        linear.float()(torch.randn(2, 64))


def test_code_compiled_for_one_layer_serves_the_next_and_names_its_own():
    torch._dynamo.reset()
    linears = [BlockwiseFP8Linear.from_linear(nn.Linear(64, 32), fqn=f"layers.{i}.wq") for i in range(3)]
    counter = torch._dynamo.testing.CompileCounter()
    for linear in linears:
        assert torch.compile(linear, fullgraph=True, backend=counter)(torch.randn(2, 64)).shape == (2, 32)
    assert counter.frame_count == 1
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"layers\.2\.wq: .*dtype torch\.float16"):
        torch.compile(linears[2], fullgraph=True, backend=counter)(torch.randn(2, 64).half())


@pytest.mark.parametrize("dtype", FLOATS)
def test_shapes_and_dtypes_without_data(dtype):
    with FakeTensorMode():
        fake = pair(64, 32, bias=True, dtype=dtype)[0], torch.empty(2, 7, 64, dtype=dtype)
    meta = pair(64, 32, bias=True, device="meta", dtype=dtype)[0], torch.empty(2, 7, 64, device="meta", dtype=dtype)
    for linear, x in (fake, meta):
        y, dx, grads = gradients(linear, x, torch.empty_like(x[..., :32]))
        assert (y.shape, y.dtype, y.device) == ((2, 7, 32), dtype, x.device)
        assert (dx.shape, dx.dtype) == (x.shape, dtype)
        assert all((grads[name].shape, grads[name].dtype) == (p.shape, dtype) for name, p in linear.named_parameters())
        with torch.autocast("cpu", torch.bfloat16):
            assert linear(x).dtype == nn.functional.linear(x, linear.weight).dtype


@pytest.mark.parametrize("field, value", [("gemm_backend", "cutlass"), ("wgrad", "fp16"), ("scale_format", "ue8m0")])
def test_recipe_refuses_unknown_choices(field, value):
    with pytest.raises(ValueError, match=f"{field} = '{value}': must be one of"):
        Recipe(**{field: value})


class _WithMore(nn.Linear):
    def forward(self, input):
        return super().forward(input) + 1


def test_a_linear_with_a_forward_of_its_own_is_refused():
    with pytest.raises(ValueError, match="linear is a _WithMore: must be an nn.Linear itself"):
        BlockwiseFP8Linear.from_linear(_WithMore(32, 48))
    with pytest.raises(ValueError, match="linear is a Conv1d: must be an nn.Linear itself"):
        BlockwiseFP8Linear.from_linear(nn.Conv1d(16, 16, 1))
    twin = BlockwiseFP8Linear.from_linear(BlockwiseFP8Linear(32, 48), Recipe(wgrad="bf16"))
    assert twin.recipe == Recipe(wgrad="bf16")


def test_arguments_of_other_types_are_refused():
    with pytest.raises(ValueError, match="in_features = '16': must be a positive multiple of 16"):
        BlockwiseFP8Linear("16", 16)
    with pytest.raises(ValueError, match="recipe = None: must be a Recipe"):
        BlockwiseFP8Linear(16, 16, recipe=None)
    linear = BlockwiseFP8Linear(32, 48)
    linear.fqn = "layers.0.wq"
    for input, message in (
        (None, r"input is a NoneType: must be a tensor"),
        (torch.tensor(1.0), r"input has shape \(\): must be \[\.\.\., 32\]"),
        (torch.randn(2, 32, device="meta"), "input is on meta and weight on cpu: must be on one device"),
    ):
        with pytest.raises(ValueError, match=rf"^layers\.0\.wq: {message}"):
            linear(input)
