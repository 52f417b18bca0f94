"""Codes out of 16-bit words: what the integer kernels share.

A word holds `16 // bits` codes, lowest first; code j of 32 words in a row is one slice of 32 neighbours along K. Two
neighbouring words lie in one register, and one `lop3` turns both into floating point: it masks code j of each and puts
an exponent above it, under which a mantissa's last bit is worth one; one fused multiply-add then takes the exponent's
own value off and undoes the code's position. Every step is exact, because a code has fewer bits than a mantissa.

Triton has no tensor of register pairs, but its inline assembly takes elements of 16 bits two at a time (`pack=2`),
which is why words are of 16 bits. BACKEND "cuda" is this; elsewhere the same is done by plain arithmetic.

3 bits: five codes in each of three words fill 15 bits, and the three top bits are a sixteenth code (`sixteenth`).
"""

import triton
import triton.language as tl

# triton 3.4 has it there only.
constexpr_function = getattr(triton, "constexpr_function", None) or tl.core.constexpr_function


@constexpr_function
def slices(BITS):
    """Slices of 32 codes in a tile: what 32 words (3 bits: 96 words) of one row hold."""
    return 16 if BITS == 3 else 16 // BITS


@constexpr_function
def words(BITS):
    """Words of 16 bits in a tile."""
    return 96 if BITS == 3 else 32


@constexpr_function
def plane(BITS, j):
    """Which run of 32 words of a tile holds slice j; 3: the top bits of all three."""
    return j // 5 if BITS == 3 else 0


@constexpr_function
def position(BITS, j):
    """Where in its word a code of slice j starts."""
    return j % 15 % 5 * 3 if BITS == 3 else j * BITS


@constexpr_function
def window(BITS, POS, MANTISSA):
    """The shift that brings a code at POS into the mantissa: as few different ones as possible, to be shared."""
    per = MANTISSA // BITS
    return POS // (per * BITS) * per * BITS


@constexpr_function
def both(value):
    """The same 16 bits in both halves of a register."""
    return value * 0x00010001


@constexpr_function
def half_bits(value):
    """A number that is exact in float16, as its bits."""
    import struct

    return struct.unpack("<H", struct.pack("<e", value))[0]


@constexpr_function
def bfloat_bits(value):
    """A number that is exact in bfloat16, as its bits."""
    import struct

    return struct.unpack("<I", struct.pack("<f", value))[0] >> 16


@triton.jit
def sixteenth(w0, w1, w2, BACKEND: tl.constexpr):
    """The top bits of three words as a code in the lowest bits of one."""
    if BACKEND == "cuda":
        code = tl.inline_asm_elementwise(
            """{
            .reg .b32 a, b, c;
            shr.b32 a, $1, 15;
            and.b32 a, a, 0x00010001;
            shr.b32 b, $2, 14;
            lop3.b32 a, b, 0x00020002, a, 0xEA;
            shr.b32 c, $3, 13;
            lop3.b32 $0, c, 0x00040004, a, 0xEA;
            }""",
            "=r,r,r,r",
            [w0, w1, w2],
            dtype=tl.int16,
            is_pure=True,
            pack=2,
        )
    else:
        code = ((w0 >> 15) & 1) | ((w1 >> 14) & 2) | ((w2 >> 13) & 4)
    return code


@triton.jit
def load_words(at, mask, BITS: tl.constexpr):
    """The words of a tile, as a tuple of runs of 32: one, or three for 3 bits. at: pointers to the first run."""
    found = (tl.load(at, mask=mask, other=0),)
    if BITS == 3:
        found = found + (tl.load(at + 32, mask=mask, other=0), tl.load(at + 64, mask=mask, other=0))  # type: ignore[assignment]
    return found


@triton.jit
def slice_words(tile_words, BITS: tl.constexpr, j: tl.constexpr, BACKEND: tl.constexpr):
    """The words that hold slice j of a tile, at `position`. tile_words: from `load_words`."""
    PLANE: tl.constexpr = plane(BITS, j)
    if PLANE == 3:
        w = sixteenth(tile_words[0], tile_words[1], tile_words[2], BACKEND)
    else:
        w = tile_words[PLANE]
    return w


@triton.jit
def half_codes(w, zero, BITS: tl.constexpr, POS: tl.constexpr, DTYPE: tl.constexpr, BACKEND: tl.constexpr):
    """Code at POS of every word, less 2^(BITS − 1) and less `zero`, in 16-bit floating point, exactly.

    w: int16. zero: None, or float32 of w's shape, whole numbers in the range of codes.
    """
    if BACKEND != "cuda":
        code = (((w.to(tl.int32) >> POS) & ((1 << BITS) - 1)) - (1 << (BITS - 1))).to(tl.float32)
        if zero is not None:
            code -= zero
        half = code.to(DTYPE)
    elif BITS == 8 and tl.bfloat16 == DTYPE:
        half = _bfloat_bytes(w, zero, POS)
    else:
        half = _masked_codes(w, zero, BITS, POS, DTYPE)
    return half


@triton.jit
def _masked_codes(w, zero, BITS: tl.constexpr, POS: tl.constexpr, DTYPE: tl.constexpr):
    MANTISSA: tl.constexpr = 10 if tl.float16 == DTYPE else 7
    SHIFT: tl.constexpr = window(BITS, POS, MANTISSA)
    MASK: tl.constexpr = both(((1 << BITS) - 1) << (POS - SHIFT))
    EXPONENT: tl.constexpr = both(0x6400 if tl.float16 == DTYPE else 0x4300)
    UNIT: tl.constexpr = 2.0 ** -(POS - SHIFT)
    LESS: tl.constexpr = -(2.0**MANTISSA) * UNIT - 2 ** (BITS - 1)
    KIND: tl.constexpr = "f16x2" if tl.float16 == DTYPE else "bf16x2"
    FACTOR_BITS: tl.constexpr = both(half_bits(UNIT) if tl.float16 == DTYPE else bfloat_bits(UNIT))
    if zero is None:
        LESS_BITS: tl.constexpr = both(half_bits(LESS) if tl.float16 == DTYPE else bfloat_bits(LESS))
        half = tl.inline_asm_elementwise(
            f"""{{
            .reg .b32 t, f, l;
            shr.b32 t, $1, {SHIFT};
            lop3.b32 t, t, {MASK}, {EXPONENT}, 0xEA;
            mov.b32 f, {FACTOR_BITS};
            mov.b32 l, {LESS_BITS};
            fma.rn.{KIND} $0, t, f, l;
            }}""",
            "=r,r",
            [w],
            dtype=tl.int16,
            is_pure=True,
            pack=2,
        )
    else:
        half = tl.inline_asm_elementwise(
            f"""{{
            .reg .b32 t, f;
            shr.b32 t, $1, {SHIFT};
            lop3.b32 t, t, {MASK}, {EXPONENT}, 0xEA;
            mov.b32 f, {FACTOR_BITS};
            fma.rn.{KIND} $0, t, f, $2;
            }}""",
            "=r,r,r",
            [w, (LESS - zero).to(DTYPE)],
            dtype=tl.int16,
            is_pure=True,
            pack=2,
        )
    return half.to(DTYPE, bitcast=True)


@triton.jit
def _bfloat_bytes(w, zero, POS: tl.constexpr):
    """8-bit codes as bfloat16, whose mantissa holds 7: the top bit goes into the exponent, worth 128, and is added."""
    if zero is None:
        half = tl.inline_asm_elementwise(
            f"""{{
            .reg .b32 t, a, b, one, l;
            shr.b32 t, $1, {POS};
            lop3.b32 a, t, 0x007f007f, 0x43004300, 0xEA;
            lop3.b32 b, t, 0x00800080, 0x43004300, 0xEA;
            mov.b32 one, 0x3f803f80;
            mov.b32 l, 0xc3c0c3c0;
            fma.rn.bf16x2 b, b, one, l;
            fma.rn.bf16x2 $0, a, one, b;
            }}""",
            "=r,r",
            [w],
            dtype=tl.int16,
            is_pure=True,
            pack=2,
        )
    else:
        # low − zero is at most 255, so exact; so are 128·top − 128 and their sum.
        half = tl.inline_asm_elementwise(
            f"""{{
            .reg .b32 t, a, b, one, l;
            shr.b32 t, $1, {POS};
            lop3.b32 a, t, 0x007f007f, 0x43004300, 0xEA;
            lop3.b32 b, t, 0x00800080, 0x43004300, 0xEA;
            mov.b32 one, 0x3f803f80;
            mov.b32 l, 0xc380c380;
            fma.rn.bf16x2 b, b, one, l;
            fma.rn.bf16x2 a, a, one, $2;
            fma.rn.bf16x2 $0, a, one, b;
            }}""",
            "=r,r,r",
            [w, (-128.0 - zero).to(tl.bfloat16)],
            dtype=tl.int16,
            is_pure=True,
            pack=2,
        )
    return half.to(tl.bfloat16, bitcast=True)


@triton.jit
def single_codes(w, BITS: tl.constexpr, POS: tl.constexpr, BACKEND: tl.constexpr):
    """Code at POS of every word, less 2^(BITS − 1), in float32, exactly.

    The upper of two words is first shifted right by 12, so that its codes too end below bit 23, where 2^23 has its last
    mantissa bit.
    """
    if BACKEND == "cuda":
        LOW: tl.constexpr = ((1 << BITS) - 1) << POS
        HIGH: tl.constexpr = ((1 << BITS) - 1) << (POS + 4)
        LOW_LESS: tl.constexpr = 2.0 ** (23 - POS) + 2 ** (BITS - 1)
        HIGH_LESS: tl.constexpr = 2.0 ** (19 - POS) + 2 ** (BITS - 1)
        LOW_UNIT: tl.constexpr = 2.0**-POS
        HIGH_UNIT: tl.constexpr = 2.0 ** -(POS + 4)
        code = tl.inline_asm_elementwise(
            f"""{{
            .reg .b32 t, u;
            lop3.b32 t, $2, {LOW}, 0x4b000000, 0xEA;
            shr.b32 u, $2, 12;
            lop3.b32 u, u, {HIGH}, 0x4b000000, 0xEA;
            fma.rn.f32 $0, t, {LOW_UNIT}, -{LOW_LESS};
            fma.rn.f32 $1, u, {HIGH_UNIT}, -{HIGH_LESS};
            }}""",
            "=&r,=&r,r",
            [w],
            dtype=tl.float32,
            is_pure=True,
            pack=2,
        )
    else:
        code = (((w.to(tl.int32) >> POS) & ((1 << BITS) - 1)) - (1 << (BITS - 1))).to(tl.float32)
    return code


@triton.jit
def per_group(values, tile, n, row, N, groups, GROUP: tl.constexpr, SLICES: tl.constexpr, RUN: tl.constexpr):
    """What belongs to each run of RUN slices of a tile, from [groups, N], as a tuple; None gives an empty one.

    tile: a number, or [warps, 1] with n and row [1, rows]. Tiles past the end get the last group's.
    """
    found = ()
    if values is not None:
        for r in tl.static_range(SLICES // RUN):
            one = one_group(values, tile, r * RUN, n, row, N, groups, GROUP, SLICES)
            found = found + (one,)  # type: ignore[assignment]
    return found


@triton.jit
def one_group(values, tile, j, n, row, N, groups, GROUP: tl.constexpr, SLICES: tl.constexpr):
    """What belongs to the group of slice j of a tile, from [groups, N]; arguments as in `per_group`."""
    group = tl.minimum((tile * SLICES + j) * 32 // GROUP, groups - 1)
    return tl.load(values + group * N + n, mask=row, other=0)
