"""Conversions in inline PTX, where Triton's own take more instructions, slower ones, or are assembled wrongly."""

import triton
import triton.language as tl


@triton.jit
def to_fp32(x):
    """bf16 or fp32 -> fp32: two instructions for two numbers, where Triton's take three."""
    if x.dtype == tl.bfloat16:
        return tl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;",
            "=&r,=r,r",  # the first result is there before the last read
            [x],
            dtype=tl.float32,
            is_pure=True,
            pack=2,
        )
    else:  # needed: Triton would compile the return after the branch too
        return x


@triton.jit
def approximate_reciprocal(x):
    """1 / x to a unit in the last place, for normal x and results. Triton's `/` guards against others, which takes five instructions."""
    return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def round_to_bf16(x):
    """fp32 -> fp32, rounded to nearest bf16.

    Two numbers at once: one alone is converted by the slow pipe that computes exponentials.
    """
    return tl.inline_asm_elementwise(
        """{
        .reg .b32 both;
        cvt.rn.bf16x2.f32 both, $3, $2;
        shl.b32 $0, both, 16;
        and.b32 $1, both, 0xffff0000;
        }""",
        "=r,=r,f,f",
        [x],
        dtype=tl.float32,
        is_pure=True,
        pack=2,
    )


@triton.jit
def pack_e4m3(a, b, c, d):
    """fp32 a, b, c, d -> int32 words of e4m3(a), e4m3(b), e4m3(c), e4m3(d), a in the lowest byte; casts as in `scaling.quantize`.

    Instructions that convert two numbers and merge the result into a word. Not written as casts and shifts because Triton casts
    pairs along another axis, and where such a pair is packed whole and also taken apart, the assembler can read a register that
    nothing wrote: seen with those of Triton 3.6 and 3.7.1, and for sm_89 of 3.9. The assembler loses a pair of constants too, which
    it merges into many words: kernels must not be compiled for a single row, where masked rows become constants. Their launchers'
    sizes are therefore not specialised.
    """
    return tl.inline_asm_elementwise(
        """{
        .reg .b16 ab, cd;
        cvt.rn.satfinite.e4m3x2.f32 ab, $2, $1;
        cvt.rn.satfinite.e4m3x2.f32 cd, $4, $3;
        mov.b32 $0, {ab, cd};
        }""",
        "=r,f,f,f,f",
        [a, b, c, d],
        dtype=tl.int32,
        is_pure=True,
        pack=1,
    )
