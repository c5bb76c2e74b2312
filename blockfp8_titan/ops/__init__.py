"""Custom ops of blockwise-fp8 training (namespace `blockfp8`): checked, compilable, CUDA and CPU."""

from .gemm import gemm_1x128_1x128, gemm_1x128_128x128
from .quantize import quantize_1x128, quantize_1x128_both, quantize_128x128, transpose_fp8

__all__ = [
    "gemm_1x128_1x128",
    "gemm_1x128_128x128",
    "quantize_1x128",
    "quantize_1x128_both",
    "quantize_128x128",
    "transpose_fp8",
]
