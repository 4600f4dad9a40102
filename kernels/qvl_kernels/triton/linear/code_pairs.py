"""Two codes of a packed word as two floats, in one or two instructions; `qvl_kernels.layouts.gpu` defines the layout.

A code q becomes UNIT * (BASE + q), exactly, by `unit` and `base`:

| | float16 | bfloat16 |
|---|---|---|
| 4 bits | q * 2^-21, a subnormal | 16 + q, by the bits of an exponent |
| 8 bits | q * 2^-24, a subnormal | q - 128, through a float32 |

Tensor cores multiply subnormals exactly (Fasi et al. 2021, "Numerical behavior of NVIDIA tensor cores"), so float16
needs no conversion. bfloat16 has 8 bits of mantissa: too few for 8-bit codes with an exponent, and the unit of its
subnormals would leave float32's range. The instructions are written in PTX: the compiler would take a pair apart.
"""

from __future__ import annotations

import triton
import triton.language as tl

from qvl_kernels.triton.gluon import gl, gluon
from qvl_kernels.triton.launch import interpreted

EXPONENT = tl.constexpr(0x41804180)  # of two bfloat16 of 16: what a 4-bit code is added to


@triton.constexpr_function
def unit(bits: int, half: bool) -> float:
    """UNIT, in float16 (`half`) or bfloat16."""
    return (2.0**-21 if bits == 4 else 2.0**-24) if half else 1.0


@triton.constexpr_function
def base(bits: int, half: bool) -> int:
    """BASE, in float16 (`half`) or bfloat16."""
    return 0 if half else 16 if bits == 4 else -128


@triton.constexpr_function
def pair_ptx(bits: int, half: bool, chunk: int) -> str:
    """PTX from a word ($2) to its codes `chunk` and `chunk + 4` (4 bits) or `chunk + 2` (8 bits), as floats $0 and $1.

    In bfloat16 the operand $3 is EXPONENT: in a register, since ptxas needs two instructions for two constants.
    """
    if bits == 4:
        rotate = f"shf.r.wrap.b32 t, $2, $2, {4 * chunk};" if chunk else "mov.b32 t, $2;"
        select = "and.b32 t, t, 0x00780078;" if half else "lop3.b32 t, t, 0x00780078, $3, 0xEA;"
        body = f".reg .b32 t; {rotate} {select}"
    elif half:
        body = f".reg .b32 t; prmt.b32 t, $2, 0, 0x4{chunk + 2}4{chunk};"
    else:  # bytes to 2^23 + q, then to q - 128
        floats = "; ".join(
            f"prmt.b32 {name}, $2, 0x4B000000, 0x754{byte}; sub.rn.f32 {name}, {name}, 0f4B000080"
            for name, byte in (("low", chunk), ("high", chunk + 2))
        )
        body = f".reg .f32 low, high; .reg .b32 t; {floats}; cvt.rn.bf16x2.f32 t, high, low;"
    return "{" + body + " mov.b32 {$0, $1}, t;}"


if interpreted():

    @triton.jit
    def code_pair(words, exponent, FLOAT: tl.constexpr, BITS: tl.constexpr, CHUNK: tl.constexpr):
        """Both floats of codes CHUNK of the words, as two tensors of FLOAT."""
        word = words.to(tl.uint32, bitcast=True)
        if BITS == 4:
            word = ((word >> (4 * CHUNK)) | (word << ((32 - 4 * CHUNK) & 31))) & 0x00780078
            if FLOAT == tl.bfloat16:
                word = word | exponent.to(tl.uint32)
        else:
            word = (word >> (8 * CHUNK)) & 0x00FF00FF
        low, high = word & 0xFFFF, word >> 16
        if BITS == 8 and FLOAT == tl.bfloat16:
            return (low.to(tl.float32) - 128).to(FLOAT), (high.to(tl.float32) - 128).to(FLOAT)
        return low.to(tl.uint16).to(FLOAT, bitcast=True), high.to(tl.uint16).to(FLOAT, bitcast=True)

else:

    @gluon.jit
    def code_pair(words, exponent, FLOAT: tl.constexpr, BITS: tl.constexpr, CHUNK: tl.constexpr):
        """Both floats of codes CHUNK of the words, as two tensors of FLOAT."""
        HALF: tl.constexpr = FLOAT == gl.float16
        PTX: tl.constexpr = pair_ptx(BITS, HALF, CHUNK)
        if BITS == 4 and not HALF:
            low, high = gl.inline_asm_elementwise(
                PTX, "=h,=h,r,r", [words, exponent], (gl.int16, gl.int16), is_pure=True, pack=1
            )
        else:
            low, high = gl.inline_asm_elementwise(PTX, "=h,=h,r", [words], (gl.int16, gl.int16), is_pure=True, pack=1)
        return low.to(FLOAT, bitcast=True), high.to(FLOAT, bitcast=True)
