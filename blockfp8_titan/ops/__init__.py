"""Custom ops of blockwise-fp8 training (namespace `blockfp8`): checked, compilable, CUDA and CPU."""

from .feed_forward import gated_feed_forward
from .gemm import gemm_1x128_1x128, gemm_1x128_128x128
from .producers import Layout
from .quantize import (
    quantize_1x128,
    quantize_1x128_both,
    quantize_1x128_columns,
    quantize_128x128,
    quantize_128x128_both,
    quantize_128x128_columns,
    transpose_fp8,
)
from .rms_norm import rms_norm_quantize_1x128
from .shards import amax_128x128_, quantize_rows
from .swiglu import (
    HLayout,
    swiglu_backward_quantize_1x128_both,
    swiglu_quantize_1x128,
    swiglu_quantize_1x128_with_inputs,
)

__all__ = [
    "HLayout",
    "Layout",
    "amax_128x128_",
    "gated_feed_forward",
    "gemm_1x128_1x128",
    "gemm_1x128_128x128",
    "quantize_1x128",
    "quantize_1x128_both",
    "quantize_1x128_columns",
    "quantize_128x128",
    "quantize_128x128_both",
    "quantize_128x128_columns",
    "quantize_rows",
    "rms_norm_quantize_1x128",
    "swiglu_backward_quantize_1x128_both",
    "swiglu_quantize_1x128",
    "swiglu_quantize_1x128_with_inputs",
    "transpose_fp8",
]
