"""The kernels of `nf4`: products with 4-bit codes of a codebook of 16 values.

Codes are read eight at a time, in 32-bit words of the flattened weight, little-endian, the first code of each byte in
its high half; the codebook is looked up in float32. On NVIDIA each lane of a warp keeps one entry, and a lookup is a
shuffle by the code. Shuffles address lanes, not elements of a tensor, so they do not depend on the compiler's tensor
layout. On other GPUs a lookup is a load.
"""

import triton
import triton.language as tl

from llmq_kernels.triton.arithmetic import product, rounded


@triton.jit
def lane_entry(codebook):
    """The codebook entry that this lane of the warp keeps: index lane mod 16."""
    return tl.inline_asm_elementwise(
        "{ .reg .u32 lane; .reg .u64 at; mov.u32 lane, %laneid; and.b32 lane, lane, 15; mul.wide.u32 at, lane, 4; "
        "add.u64 at, at, $1; ld.global.nc.f32 $0, [at]; }",
        "=f,l",
        [codebook.to(tl.uint64)],
        dtype=tl.float32,
        is_pure=True,
        pack=1,
    )


@triton.jit
def lookup(codes, codebook, entry, SHIFT: tl.constexpr, BACKEND: tl.constexpr):
    """The codebook values, float32, of bits [SHIFT, SHIFT + 4) of int32 codes."""
    shifted = codes >> SHIFT
    if BACKEND == "cuda":
        # 0x100f: the lowest four bits select one of the thread's own sixteen lanes; other bits are ignored.
        found = tl.inline_asm_elementwise(
            "shfl.sync.idx.b32 $0, $1, $2, 0x100f, 0xffffffff;",
            "=f,f,r",
            [entry, shifted],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
    else:
        found = tl.load(codebook + (shifted & 15))
    return found


@triton.jit
def magnitudes(absmax, nested_absmax, nested_codebook, offset, block, mask):
    """The magnitudes of blocks, float32."""
    found = tl.load(absmax + block, mask=mask, other=0)
    if nested_absmax is not None:
        found = tl.load(nested_codebook + found.to(tl.int32))
        found = found * tl.load(nested_absmax + (block >> 8), mask=mask, other=0.0) + offset
    return found


@triton.jit
def word_magnitudes(
    absmax, nested_absmax, nested_codebook, offset, row, word, words, N,
    BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr, RUN: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """The magnitude of each word of a tile [BLOCK_N, BLOCK_W] that starts at (row[0], word).

    RUN: words per block. WHOLE: rows and tiles start at block boundaries; each magnitude is then loaded once, not once
    per word.
    """
    if WHOLE:
        block = word // RUN + tl.arange(0, BLOCK_W // RUN)
        mask = (row < N)[:, None] & (block < words // RUN)[None, :]
        at = row[:, None] * (words // RUN) + block[None, :]
        found = magnitudes(absmax, nested_absmax, nested_codebook, offset, at, mask)
        spread = tl.broadcast_to(found[:, :, None], [BLOCK_N, BLOCK_W // RUN, RUN])
        return tl.reshape(spread, [BLOCK_N, BLOCK_W])
    else:
        column = word + tl.arange(0, BLOCK_W)
        mask = (row < N)[:, None] & (column < words)[None, :]
        at = (row[:, None] * words + column[None, :]) // RUN
        return magnitudes(absmax, nested_absmax, nested_codebook, offset, at, mask)


@triton.jit
def eighths(x):
    """x [A, 8 · B] → eight tensors [A, B]: element i of every eight."""
    A: tl.constexpr = x.shape[0]
    B: tl.constexpr = x.shape[1] // 8
    even, odd = tl.split(tl.reshape(x, [A, B, 2, 2, 2]))
    x04, x26 = tl.split(even)
    x15, x37 = tl.split(odd)
    x0, x4 = tl.split(x04)
    x1, x5 = tl.split(x15)
    x2, x6 = tl.split(x26)
    x3, x7 = tl.split(x37)
    return x0, x1, x2, x3, x4, x5, x6, x7


@triton.jit
def row_product(x, mask, w0, w1, w2, w3, w4, w5, w6, w7):
    """One row of x times eight weights of every word: x points at [8 · W], weights are [N, W]. float32 [N, W]."""
    x0, x1, x2, x3, x4, x5, x6, x7 = eighths(tl.load(x, mask=mask, other=0.0).to(tl.float32)[None, :])
    low = w0 * x0 + w1 * x1 + w2 * x2 + w3 * x3
    return low + w4 * x4 + w5 * x5 + w6 * x6 + w7 * x7


@triton.jit
def store_row(y, bias, total, n, mask, BACKEND: tl.constexpr):
    """Sums a row of y [N] over the words."""
    value = tl.sum(total, 1)
    if bias is not None:
        value += tl.load(bias + n, mask=mask, other=0.0).to(tl.float32)
    tl.store(y + n, rounded(value, y.dtype.element_ty, BACKEND), mask=mask)


@triton.jit(do_not_specialize=["words"])
def nf4_one_row_kernel(
    x, packed, absmax, codebook, nested_absmax, nested_codebook, offset, bias, y, N, words,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr, RUN: tl.constexpr, WHOLE: tl.constexpr,
    BACKEND: tl.constexpr,
):  # fmt: skip
    """y [ROWS, N] for up to four ROWS. x: [ROWS, 8 · words]; packed: int32 [N, words].

    `words` is deliberately not specialized: if the compiler knew that it is divisible by 16, it would give each thread
    four neighbouring words; the values of x, of which a thread loads eight neighbours, would then have to be exchanged
    between threads for every word.
    """
    entry = lane_entry(codebook) if BACKEND == "cuda" else 0.0
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    t = tl.arange(0, BLOCK_W)
    total0 = tl.zeros([BLOCK_N, BLOCK_W], tl.float32)
    total1 = total0
    total2 = total0
    total3 = total0
    for word in range(0, words, BLOCK_W):
        mask = (n < N)[:, None] & (word + t < words)[None, :]
        codes = tl.load(packed + n[:, None] * words + (word + t)[None, :], mask=mask, other=0)
        scale = word_magnitudes(
            absmax, nested_absmax, nested_codebook, offset, n, word, words, N, BLOCK_N, BLOCK_W, RUN, WHOLE
        )
        w0 = lookup(codes, codebook, entry, 4, BACKEND)
        w1 = lookup(codes, codebook, entry, 0, BACKEND)
        w2 = lookup(codes, codebook, entry, 12, BACKEND)
        w3 = lookup(codes, codebook, entry, 8, BACKEND)
        w4 = lookup(codes, codebook, entry, 20, BACKEND)
        w5 = lookup(codes, codebook, entry, 16, BACKEND)
        w6 = lookup(codes, codebook, entry, 28, BACKEND)
        w7 = lookup(codes, codebook, entry, 24, BACKEND)
        k = word * 8 + tl.arange(0, BLOCK_W * 8)
        inside = k < words * 8
        total0 += scale * row_product(x + k, inside, w0, w1, w2, w3, w4, w5, w6, w7)
        if ROWS > 1:
            at = x + words * 8 + k
            total1 += scale * row_product(at, inside, w0, w1, w2, w3, w4, w5, w6, w7)
        if ROWS > 2:
            at = x + words * 16 + k
            total2 += scale * row_product(at, inside, w0, w1, w2, w3, w4, w5, w6, w7)
        if ROWS > 3:
            at = x + words * 24 + k
            total3 += scale * row_product(at, inside, w0, w1, w2, w3, w4, w5, w6, w7)
    store_row(y, bias, total0, n, n < N, BACKEND)
    if ROWS > 1:
        store_row(y + N, bias, total1, n, n < N, BACKEND)
    if ROWS > 2:
        store_row(y + N * 2, bias, total2, n, n < N, BACKEND)
    if ROWS > 3:
        store_row(y + N * 3, bias, total3, n, n < N, BACKEND)


@triton.jit
def nf4_many_rows_kernel(
    x, packed, absmax, codebook, nested_absmax, nested_codebook, offset, bias, y, M, N, words,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr, RUN: tl.constexpr, WHOLE: tl.constexpr,
    PROGRAMS_K: tl.constexpr, BACKEND: tl.constexpr,
):  # fmt: skip
    """y [M, N], or with PROGRAMS_K > 1 its float32 parts [PROGRAMS_K, M, N].

    x: [M, 8 · words]; packed: int32 [N, words].
    Yᵀ = W · Xᵀ: tensor cores read the left operand from registers, so codes are dequantized there.
    """
    entry = lane_entry(codebook) if BACKEND == "cuda" else 0.0
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    part = tl.program_id(2)
    t = tl.arange(0, BLOCK_W)
    steps = tl.cdiv(words, BLOCK_W)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for step in range(steps * part // PROGRAMS_K, steps * (part + 1) // PROGRAMS_K):
        word = step * BLOCK_W
        mask = (n < N)[:, None] & (word + t < words)[None, :]
        codes = tl.load(packed + n[:, None] * words + (word + t)[None, :], mask=mask, other=0)
        scale = word_magnitudes(
            absmax, nested_absmax, nested_codebook, offset, n, word, words, N, BLOCK_N, BLOCK_W, RUN, WHOLE
        )
        k = word * 8 + tl.arange(0, BLOCK_W * 8)
        inside = (m < M)[:, None] & (k < words * 8)[None, :]
        part_x = tl.load(x + m[:, None] * (words * 8) + k[None, :], mask=inside, other=0.0)
        w04 = tl.join(lookup(codes, codebook, entry, 4, BACKEND), lookup(codes, codebook, entry, 20, BACKEND))
        w15 = tl.join(lookup(codes, codebook, entry, 0, BACKEND), lookup(codes, codebook, entry, 16, BACKEND))
        w26 = tl.join(lookup(codes, codebook, entry, 12, BACKEND), lookup(codes, codebook, entry, 28, BACKEND))
        w37 = tl.join(lookup(codes, codebook, entry, 8, BACKEND), lookup(codes, codebook, entry, 24, BACKEND))
        weight = tl.join(tl.join(w04, w26), tl.join(w15, w37)) * scale[:, :, None, None, None]
        weight = tl.reshape(rounded(weight, x.dtype.element_ty, BACKEND), [BLOCK_N, BLOCK_W * 8])
        total = product(part_x, tl.trans(weight), total, BACKEND)
    if PROGRAMS_K == 1 and bias is not None:
        total += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    at = y + part.to(tl.int64) * M * N + m[:, None] * N + n[None, :]
    tl.store(at, rounded(total, y.dtype.element_ty, BACKEND), mask=(m < M)[:, None] & (n < N)[None, :])


@triton.jit
def nf4_dequantize_kernel(
    packed, absmax, codebook, nested_absmax, nested_codebook, offset, weight, size,
    BLOCK: tl.constexpr, BLOCK_SIZE: tl.constexpr, BACKEND: tl.constexpr,
):  # fmt: skip
    """weight, flat [size], of any shape: packed uint8 [ceil(size / 2)]."""
    entry = lane_entry(codebook) if BACKEND == "cuda" else 0.0
    byte = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = byte * 2 < size
    codes = tl.load(packed + byte, mask=mask, other=0).to(tl.int32)
    scale = magnitudes(absmax, nested_absmax, nested_codebook, offset, byte * 2 // BLOCK_SIZE, mask)
    first = lookup(codes, codebook, entry, 4, BACKEND) * scale
    second = lookup(codes, codebook, entry, 0, BACKEND) * scale
    at = tl.program_id(0).to(tl.int64) * (BLOCK * 2) + tl.arange(0, BLOCK * 2)
    tl.store(weight + at, rounded(tl.interleave(first, second), weight.dtype.element_ty, BACKEND), mask=at < size)
