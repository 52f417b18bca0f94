"""Unpack codes from 16-bit words; shared by the integer kernels.

A word holds `16 // bits` codes, lowest first; code j of 32 consecutive words is one slice of 32 neighbours along K. Two
neighbouring words share a register, and one `lop3` turns both into floating point: it masks code j of each and sets an
exponent with which the mantissa's last bit is worth one; one fused multiply-add then subtracts the exponent's own value
and undoes the code's shift. Every step is exact, because a code has fewer bits than a mantissa.

Triton has no tensors of register pairs, but its inline assembly processes 16-bit elements two at a time (`pack=2`);
hence the 16-bit words. This is BACKEND "cuda"; other backends use plain arithmetic with the same result.

3 bits: five codes in each of three words fill 15 bits, and the three top bits are a sixteenth code (`sixteenth`).
"""

import triton
import triton.language as tl

# In triton 3.4 this is the only place that has it.
constexpr_function = getattr(triton, "constexpr_function", None) or tl.core.constexpr_function


@constexpr_function
def slices(BITS):
    """Slices of 32 codes per tile, that is, per 32 words (3 bits: 96 words) of one row."""
    return 16 if BITS == 3 else 16 // BITS


@constexpr_function
def words(BITS):
    """16-bit words per tile."""
    return 96 if BITS == 3 else 32


@constexpr_function
def plane(BITS, j):
    """The index of the 32 words of a tile that hold slice j; 3 means the top bits of all three."""
    return j // 5 if BITS == 3 else 0


@constexpr_function
def position(BITS, j):
    """The first bit, in its word, of a code of slice j."""
    return j % 15 % 5 * 3 if BITS == 3 else j * BITS


@constexpr_function
def window(BITS, POS, MANTISSA):
    """The shift that moves a code at POS into the mantissa; few different shifts, so that codes can share them."""
    per = MANTISSA // BITS
    return POS // (per * BITS) * per * BITS


@constexpr_function
def both(value):
    """The same 16 bits in both halves of a register."""
    return value * 0x00010001


@constexpr_function
def half_bits(value):
    """The bits of a number that is exact in float16."""
    import struct

    return struct.unpack("<H", struct.pack("<e", value))[0]


@constexpr_function
def bfloat_bits(value):
    """The bits of a number that is exact in bfloat16."""
    import struct

    return struct.unpack("<I", struct.pack("<f", value))[0] >> 16


@triton.jit
def sixteenth(w0, w1, w2, BACKEND: tl.constexpr):
    """The top bits of three words as a code in the lowest bits of one word."""
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
    """The words of a tile, as a tuple of blocks of 32: one, or three for 3 bits. at: pointers to the first block."""
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
    """Code at POS of every word, minus 2^(BITS − 1) and minus `zero`, exact in 16-bit floating point.

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
    """8-bit codes as bfloat16, whose mantissa has 7 bits: the top bit, worth 128, is converted on its own and added."""
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
    """Code at POS of every word, minus 2^(BITS − 1), exact in float32.

    The upper of two words is first shifted right by 12, so that its codes are also below bit 23, within the mantissa.
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
    """The values, from [groups, N], of each run of RUN slices of a tile, as a tuple; empty if `values` is None.

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
    """The values, from [groups, N], of the group of slice j of a tile; arguments as in `per_group`."""
    group = tl.minimum((tile * SLICES + j) * 32 // GROUP, groups - 1)
    return tl.load(values + group * N + n, mask=row, other=0)


@triton.jit
def side_by_side(parts, COUNT: tl.constexpr):
    """COUNT (1, 2 or 4) blocks [N, 32] → [N, 32 · COUNT]. In a tensor core's operand it only renames registers."""
    if COUNT == 4:
        joined = tl.join(tl.join(parts[0], parts[1]), tl.join(parts[2], parts[3]))
        whole = tl.reshape(tl.permute(joined, (0, 3, 2, 1)), [parts[0].shape[0], 128])
    elif COUNT == 2:
        whole = tl.reshape(tl.permute(tl.join(parts[0], parts[1]), (0, 2, 1)), [parts[0].shape[0], 64])
    else:
        whole = parts[0]
    return whole


@triton.jit
def spread_tables(tables, n, row, N, PER_ROW: tl.constexpr, SHAPE: tl.constexpr):
    """The eight registers of each row's codebook (`codebooks.tables_of`) for every word of a tile, int32 SHAPE.

    tables: [8, N] with PER_ROW, else [8]; n and row: [rows], or [1, rows].
    """
    found = ()
    for r in tl.static_range(8):
        at = tables + r * N + n if PER_ROW else tables + r + n * 0
        one = tl.load(at, mask=row, other=0)
        found = found + (tl.broadcast_to(tl.expand_dims(one, -1), SHAPE),)  # type: ignore[assignment]
    return found


@triton.jit
def table_codes(w, t, DTYPE: tl.constexpr, BACKEND: tl.constexpr):
    """The four slices of 4-bit codes of a tile as values of a codebook, as a tuple in DTYPE.

    w: int16; t: from `spread_tables`, in w's shape.
    """
    if BACKEND == "cuda":
        found = _permuted(w, t)
        values = (
            found[0].to(DTYPE, bitcast=True),
            found[1].to(DTYPE, bitcast=True),
            found[2].to(DTYPE, bitcast=True),
            found[3].to(DTYPE, bitcast=True),
        )
    else:
        values = (
            _entry(w, t, 0).to(DTYPE, bitcast=True),
            _entry(w, t, 4).to(DTYPE, bitcast=True),
            _entry(w, t, 8).to(DTYPE, bitcast=True),
            _entry(w, t, 12).to(DTYPE, bitcast=True),
        )
    return values


@triton.jit
def _entry(w, t, POS: tl.constexpr):
    """The 16 bits of the entry of the code at POS: bytes from the registers of low and of high bytes."""
    code = (w.to(tl.int32) >> POS) & 15
    low = tl.where(code < 8, tl.where(code < 4, t[0], t[1]), tl.where(code < 12, t[2], t[3]))
    high = tl.where(code < 8, tl.where(code < 4, t[4], t[5]), tl.where(code < 12, t[6], t[7]))
    shift = (code & 3) * 8
    return (((low >> shift) & 255) | (((high >> shift) & 255) << 8)).to(tl.int16)


@triton.jit
def _permuted(w, t):
    """The same by byte permutations: three instructions a code, all four codes of two neighbouring words at once.

    A permutation's selector has four nibbles: the codes of one word, without their top bits, select four bytes of eight
    entries; the top bits then select between two such results. Low and high bytes are put together last.
    """
    return tl.inline_asm_elementwise(
        """{
        .reg .b32 s, h, u, v, a, b, l0, h0, l1, h1, p, q, r, z;
        and.b32 s, $4, 0x77777777;
        shr.b32 u, $4, 1;
        lop3.b32 h, u, 0x44444444, 0x32103210, 0xEA;
        shr.b32 u, s, 16;
        shr.b32 v, h, 16;
        prmt.b32 a, $5, $7, s;
        prmt.b32 b, $9, $11, s;
        prmt.b32 l0, a, b, h;
        prmt.b32 a, $13, $15, s;
        prmt.b32 b, $17, $19, s;
        prmt.b32 h0, a, b, h;
        prmt.b32 a, $5, $7, u;
        prmt.b32 b, $9, $11, u;
        prmt.b32 l1, a, b, v;
        prmt.b32 a, $13, $15, u;
        prmt.b32 b, $17, $19, u;
        prmt.b32 h1, a, b, v;
        prmt.b32 p, l0, h0, 0x5140;
        prmt.b32 q, l0, h0, 0x7362;
        prmt.b32 r, l1, h1, 0x5140;
        prmt.b32 z, l1, h1, 0x7362;
        prmt.b32 $0, p, r, 0x5410;
        prmt.b32 $1, p, r, 0x7632;
        prmt.b32 $2, q, z, 0x5410;
        prmt.b32 $3, q, z, 0x7632;
        }""",
        "=&r,=&r,=&r,=&r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r",
        [w, t[0], t[1], t[2], t[3], t[4], t[5], t[6], t[7]],
        dtype=(tl.int16, tl.int16, tl.int16, tl.int16),
        is_pure=True,
        pack=2,
    )
