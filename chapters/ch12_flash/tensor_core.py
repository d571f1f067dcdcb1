"""Chapter 12, FlashAttention on tensor cores: q, k, v in float16, warps multiply, tiles arrive in the background.

``flash_v3_register_tiles`` multiplies in float32, each thread for itself. Here both products, q @ k^T and p @ v, are
made of chapter 9's products of 16 x 8 x 16. Then what lies between them has to keep up: beside 4 * head_dim operations
of a tensor core, each score takes a maximum, a multiply-add, a power, a sum and its rounding to float16.

===========================  ================================  ==============================  =========================
kernel                       who multiplies                    probabilities                   tiles of k and v
===========================  ================================  ==============================  =========================
``flash_v3_register_tiles``  a thread, in float32; 64 queries  through shared memory: made by  through registers, a
                             a block                           one thread, needed by 16        barrier before and after
``flash_v4_64``              a warp, float16 into float32;     stay in the registers of the    copied in the background
                             128 queries a block, 32 a warp    lane that made them             while the tiles before
                                                                                               them are worked on; one
                                                                                               barrier a tile
``flash_v4_128``             64 queries a block, 16 a warp     the same                        the same
===========================  ================================  ==============================  =========================

**From scores to operands.** A lane holds of a product of 16 x 8 two numbers in row lane // 4 and two in row
lane // 4 + 8, side by side. As pairs of float16, those of two neighbouring products are just what it must hold of the
left operand, 16 x 16, of the next product. So probabilities need no way through shared memory, only ``pack_half2``. And
a row's scores lie in 4 lanes: two shuffles find the largest. The sum stays in four parts until the end.

**Base 2.** exp(scale * s - largest) is 2 ** (s * factor - largest) with factor = scale * log2(e): one multiply-add and
one instruction for the power. ``largest`` is kept in that unit.

**The swizzle** is chapter 9's, with 8 places: row r keeps its piece c of 16 bytes at place c ^ r % 8. So 8 rows of a
tile have the same piece in 8 different places, and ``ldmatrix`` gets them at once, without padding.

**The largest blocks first.** With ``causal``, the last queries see the most keys. A grid starts its blocks along x
first; so heads lie along x, and queries along y, the last ones first: the blocks that start last are small, and few
multiprocessors have nothing to do at the end.

What it costs: probabilities are rounded to float16, 11 bits, before they meet v, as in other libraries. A head that is
smaller than 64 or 128 elements costs as much as one that is not. And v4 loses where there are few queries: a block
computes 128 (or 64) of them, even for one; ``decode_half.py`` is for that. Source: Dao 2023, "FlashAttention-2".
"""

import math

import numpy as np
from numba import cuda, float32, uint32
from numba.cuda import libdevice
from numba.types import float16

from chapters.ch07_warp_reduce.kernels import FULL_WARP
from chapters.ch10_softmax.kernels import LOWEST
from common.ptx import (
    cp_async_commit,
    cp_async_half8,
    cp_async_wait,
    exp2_approx,
    ldmatrix_x4,
    ldmatrix_x4_trans,
    mma_m16n8k16,
    pack_half2,
    store_half2,
)

WARP = 32
WARPS = 4  # one below the other: each has its own queries, and all keys
THREADS = 128  # WARPS * WARP
TWO_BLOCKS = (THREADS, 2)  # a thread has up to 255 registers; while one block is at its softmax, the other multiplies
MMA_M = 16
MMA_N = 8
MMA_K = 16
QUERIES_64, QUERIES_128 = 128, 64  # of a block: in either case a thread holds 64 numbers of the output
HEAD_DIM_MAX = 128
GRID_Y_MAX = 65535
LOG2_E = np.float32(1 / math.log(2))
LN_2 = np.float32(math.log(2))


def flash_v4_launch(n_tokens, n_head, head_dim):
    """Launch configuration of ``flash_v4(head_dim)``, heads along x, queries along y: ``(grid, block)``.

    n_tokens: number of queries a head. Raises ValueError if a size is not positive, head_dim not a multiple of 8 up to
    128, or n_tokens more than 65535 blocks of queries.
    """
    if n_tokens <= 0 or n_head <= 0:
        raise ValueError(f"{n_tokens} tokens, {n_head} heads: attention needs at least 1 of each")
    check_head_dim(head_dim)
    queries = queries_of(head_dim)
    if n_tokens > GRID_Y_MAX * queries:
        most = GRID_Y_MAX * queries
        raise ValueError(f"n_tokens = {n_tokens}: a launch takes at most {most}; launch parts, with ``start``")
    return (n_head, (n_tokens + queries - 1) // queries), THREADS


def queries_of(head_dim):
    """Queries of a block."""
    return QUERIES_64 if head_dim <= 64 else QUERIES_128


def check_head_dim(head_dim):
    """Raises ValueError unless head_dim is a multiple of 8 from 8 to 128."""
    if not 8 <= head_dim <= HEAD_DIM_MAX or head_dim % 8:
        raise ValueError(
            f"head_dim = {head_dim}: the kernels take multiples of 8 up to {HEAD_DIM_MAX}; pad with zeros, or use "
            "flash_attention"
        )


# --- device functions ------------------------------------------------------------------------------------------------
#
# The shapes of the arrays that they are given say how often they loop: so the same lines serve both sizes of a head.
# A warp's operands and results are local arrays of [16 rows, 16 or 8 columns, a lane's registers].


@cuda.jit(device=True, forceinline=True)
def swizzle(row, piece):
    """Where in its row a tile keeps piece ``piece``, 16 bytes, of row ``row``: an element's index."""
    return (piece ^ row % 8) * 8


@cuda.jit(device=True, forceinline=True)
def load_rows(tile, tile_row, count, x, head, row0, rows):
    """Begin to copy x[head, row0 : row0 + count] to the tile's rows from ``tile_row`` on; 0 from row ``rows`` of x on.

    Zeros, not what lies there: a probability of 0 makes nothing of it, but 0 * NaN is NaN. Zeros also fill a row of the
    tile that is longer than a head.
    """
    pieces = tile.shape[1] // 8
    piece = cuda.threadIdx.x % pieces
    first = cuda.threadIdx.x // pieces
    place = swizzle(first, piece)  # in all rows of this thread: they are multiples of 8 apart
    end = rows if 8 * piece < x.shape[2] else 0
    for i in range(0, count, THREADS // pieces):
        row = first + i
        cp_async_half8(tile, (tile_row + row, place), x, (head, row0 + row, 8 * piece), row0 + row < end)


@cuda.jit(device=True, forceinline=True)
def add_product(c, m, n, a, k, b0, b1):
    """c[m, n] += a[m, k] @ b, 16 x 8 x 16, on a tensor core; b0, b1: this lane's pairs of b."""
    c[m, n, 0], c[m, n, 1], c[m, n, 2], c[m, n, 3] = mma_m16n8k16(
        a[m, k, 0], a[m, k, 1], a[m, k, 2], a[m, k, 3], b0, b1, c[m, n, 0], c[m, n, 1], c[m, n, 2], c[m, n, 3]
    )


@cuda.jit(device=True, forceinline=True)
def read_queries(tile, warp_row, q_pairs):
    """q_pairs = the warp's queries, from row ``warp_row`` of the tile on, as left operands."""
    lane = cuda.threadIdx.x % WARP
    row = warp_row + lane % 16
    for m in range(q_pairs.shape[0]):
        for k in range(q_pairs.shape[1]):
            place = swizzle(lane, 2 * k ^ lane // 16)
            q_pairs[m, k, 0], q_pairs[m, k, 1], q_pairs[m, k, 2], q_pairs[m, k, 3] = ldmatrix_x4(
                tile, (row + MMA_M * m, place)
            )


@cuda.jit(device=True, forceinline=True)
def multiply_keys(q_pairs, k_tiles, now, scores):
    """scores = q @ k^T of the warp's queries and the tile from row ``now`` on. Keys as they lie are right operands.

    A load brings of 8 keys what two products need, 32 elements: lanes 0 … 7 name the first pieces of the 8 keys.
    """
    lane = cuda.threadIdx.x % WARP
    for m in range(scores.shape[0]):
        for n in range(scores.shape[1]):
            for e in range(4):
                scores[m, n, e] = float32(0)
    for k in range(0, q_pairs.shape[1], 2):
        place = swizzle(lane, 2 * k ^ lane // 8)  # ^ is + here, as 4 divides 2 * k, and goes well with the swizzle's
        for n in range(scores.shape[1]):
            b0, b1, b2, b3 = ldmatrix_x4(k_tiles, (now + lane % 8 + MMA_N * n, place))
            for m in range(scores.shape[0]):
                add_product(scores, m, n, q_pairs, k, b0, b1)
            for m in range(scores.shape[0]):
                add_product(scores, m, n, q_pairs, k + 1, b2, b3)


@cuda.jit(device=True, forceinline=True)
def mask_scores(scores, position0, key0, n_keys, causal):
    """Scores of keys that do not count become -inf: those from n_keys on and, with ``causal``, later than the query.

    position0: where the warp's first query stands in the text. key0: the tile's first key.
    """
    lane = cuda.threadIdx.x % WARP
    for m in range(scores.shape[0]):
        for half in range(2):
            position = position0 + MMA_M * m + 8 * half + lane // 4
            count = (min(n_keys, position + 1) if causal else n_keys) - key0 - lane % 4 * 2
            for n in range(scores.shape[1]):
                for e in range(2):
                    if MMA_N * n + e >= count:
                        scores[m, n, 2 * half + e] = float32(-math.inf)


@cuda.jit(device=True, forceinline=True)
def begin_rows(acc, largest, total):
    """What the warp's queries begin with: no key yet."""
    for m in range(acc.shape[0]):
        for half in range(2):
            largest[m, half] = LOWEST
            total[m, half] = float32(0)
        for n in range(acc.shape[1]):
            for e in range(4):
                acc[m, n, e] = float32(0)


@cuda.jit(device=True, forceinline=True)
def softmax_step(scores, factor, largest, total, acc, p_pairs):
    """The online softmax for a tile: p_pairs = probabilities, as left operands; total and acc shrink.

    largest is alike in the 4 lanes of a row, total each one's own part. Every row has a key that counts in its first
    tile, key 0; so largest is finite from then on, and a tile of nothing but -inf changes nothing.
    """
    for m in range(scores.shape[0]):
        for half in range(2):
            top = max(scores[m, 0, 2 * half], scores[m, 0, 2 * half + 1])
            for n in range(1, scores.shape[1]):
                top = max(top, max(scores[m, n, 2 * half], scores[m, n, 2 * half + 1]))
            top = max(top, cuda.shfl_xor_sync(FULL_WARP, top, 1))
            top = max(top, cuda.shfl_xor_sync(FULL_WARP, top, 2))
            top = max(largest[m, half], top * factor)
            shrink = exp2_approx(largest[m, half] - top)
            largest[m, half] = top
            minus = -top
            part = float32(0)
            for n in range(scores.shape[1]):
                p0 = exp2_approx(libdevice.fmaf(scores[m, n, 2 * half], factor, minus))  # one rounding, in every copy
                p1 = exp2_approx(libdevice.fmaf(scores[m, n, 2 * half + 1], factor, minus))  # of the loop that is made
                part += p0 + p1
                p_pairs[m, n // 2, n % 2 * 2 + half] = pack_half2(p0, p1)
            total[m, half] = libdevice.fmaf(total[m, half], shrink, part)
            for n in range(acc.shape[1]):
                acc[m, n, 2 * half] *= shrink
                acc[m, n, 2 * half + 1] *= shrink


@cuda.jit(device=True, forceinline=True)
def add_values(p_pairs, v_tiles, now, acc):
    """acc += p @ v. The pairs of a right operand run down a column: ``ldmatrix_x4_trans`` makes them of rows of v."""
    lane = cuda.threadIdx.x % WARP
    for k in range(p_pairs.shape[1]):
        for n in range(0, acc.shape[1], 2):
            place = swizzle(lane, n ^ lane // 16)
            b0, b1, b2, b3 = ldmatrix_x4_trans(v_tiles, (now + lane % 16 + MMA_K * k, place))
            for m in range(acc.shape[0]):
                add_product(acc, m, n, p_pairs, k, b0, b1)
                add_product(acc, m, n + 1, p_pairs, k, b2, b3)


@cuda.jit(device=True, forceinline=True)
def store_rows(acc, largest, total, out, lse, head, head_dim, query0, n_tokens):
    """out and lse of the warp's queries, from ``query0`` on: sums of the 4 lanes of a row, and the one division."""
    lane = cuda.threadIdx.x % WARP
    inner = lane % 4 * 2
    for m in range(acc.shape[0]):
        for half in range(2):
            query = query0 + MMA_M * m + 8 * half + lane // 4
            row_total = total[m, half]
            row_total += cuda.shfl_xor_sync(FULL_WARP, row_total, 1)
            row_total += cuda.shfl_xor_sync(FULL_WARP, row_total, 2)
            inverse = float32(1) / row_total
            if query < n_tokens:
                for n in range(acc.shape[1]):
                    pair = pack_half2(acc[m, n, 2 * half] * inverse, acc[m, n, 2 * half + 1] * inverse)
                    if MMA_N * n < head_dim:
                        store_half2(out, (query, head * head_dim + MMA_N * n + inner), pair)
                if lane % 4 == 0:
                    lse[head, query] = libdevice.fmaf(largest[m, half], LN_2, math.log(row_total))  # as above


@cuda.jit(device=True, forceinline=True)
def attend(
    q, k, v, out, lse, n_tokens, start, scale, causal,
    k_tiles, v_tiles, q_pairs, scores, p_pairs, acc, largest, total,
):  # fmt: skip
    """The whole of v4 with the shared memory and the registers that a kernel gives: two tiles of k and two of v.

    The block's queries pass through the tiles of k once, on their way to registers.
    """
    keys = k_tiles.shape[0] // 2  # of a tile
    warp_queries = MMA_M * q_pairs.shape[0]
    queries = WARPS * warp_queries
    head = cuda.blockIdx.x
    query0 = (cuda.gridDim.y - 1 - cuda.blockIdx.y) * queries  # blocks with the most keys start first
    warp_row = cuda.threadIdx.x // WARP * warp_queries
    n_keys = start + n_tokens
    end = min(n_keys, start + query0 + queries) if causal else n_keys  # of the keys that a query here sees
    unmasked = min(n_keys, start + query0 + 1) if causal else n_keys  # of those that all of them see
    factor = scale * LOG2_E
    load_rows(k_tiles, 0, queries, q, head, query0, n_tokens)
    cp_async_commit()
    begin_rows(acc, largest, total)
    cp_async_wait(0)
    cuda.syncthreads()
    read_queries(k_tiles, warp_row, q_pairs)
    cuda.syncthreads()  # all have read their queries
    load_rows(k_tiles, 0, keys, k, head, 0, n_keys)
    load_rows(v_tiles, 0, keys, v, head, 0, n_keys)
    cp_async_commit()
    now = 0
    for key0 in range(0, end, keys):
        cp_async_wait(0)  # my part of the tiles `now` is there
        cuda.syncthreads()  # everybody's part is, and all have left the others
        load_rows(k_tiles, keys - now, keys, k, head, key0 + keys, n_keys)
        load_rows(v_tiles, keys - now, keys, v, head, key0 + keys, n_keys)
        cp_async_commit()
        multiply_keys(q_pairs, k_tiles, now, scores)
        if key0 + keys > unmasked:
            mask_scores(scores, start + query0 + warp_row, key0, n_keys, causal)
        softmax_step(scores, factor, largest, total, acc, p_pairs)
        add_values(p_pairs, v_tiles, now, acc)
        now = keys - now
    cp_async_wait(0)  # the tiles after the last, which nobody reads
    store_rows(acc, largest, total, out, lse, head, q.shape[2], query0 + warp_row, n_tokens)


# --- kernels ---------------------------------------------------------------------------------------------------------


@cuda.jit(launch_bounds=TWO_BLOCKS)
def flash_v4_64(q, k, v, out, lse, n_tokens, start, scale, causal):
    """out[t, head * head_dim + i] = sum over keys j of softmax(scale * q[head, t] · k[head])[j] * v[head, j, i].

    q: (n_head, n_tokens, head_dim) float16, head_dim a multiple of 8 up to 64; a smaller one than 64 costs as much, the
    rest of a tile's row being zeros. k, v: (n_head, start + n_tokens or more, head_dim) float16: a cache may be longer
    than its text, and what lies behind is not read. out: (n_tokens, n_head * head_dim) float16. lse: (n_head, n_tokens)
    float32, a row's logarithm of its sum of exponentials. All C-contiguous, from a multiple of 16 bytes on. Texts of
    one length are so many more heads. n_tokens, start: int32; query t stands at position start + t, so with start above
    0 this is the later part of a prompt whose first is in the cache. scale: float32, above 0. causal: int32; 1: only
    keys j <= start + t count, 0: all start + n_tokens.
    Launch: ``flash_v4_64[flash_v4_launch(n_tokens, n_head, head_dim)](…)``, 128 threads; sm_75 or later.
    """
    k_tiles = cuda.shared.array((128, 64), float16, alignment=16)  # two of 64 keys
    v_tiles = cuda.shared.array((128, 64), float16, alignment=16)
    q_pairs = cuda.local.array((2, 4, 4), uint32)  # 32 queries x 64 elements
    scores = cuda.local.array((2, 8, 4), float32)  # 32 queries x 64 keys
    p_pairs = cuda.local.array((2, 4, 4), uint32)
    acc = cuda.local.array((2, 8, 4), float32)  # 32 queries x 64 elements
    largest = cuda.local.array((2, 2), float32)
    total = cuda.local.array((2, 2), float32)
    attend(
        q, k, v, out, lse, n_tokens, start, scale, causal,
        k_tiles, v_tiles, q_pairs, scores, p_pairs, acc, largest, total,
    )  # fmt: skip


@cuda.jit(launch_bounds=TWO_BLOCKS)
def flash_v4_128(q, k, v, out, lse, n_tokens, start, scale, causal):
    """Attention as :func:`flash_v4_64` with a head_dim of up to 128.

    A warp has 16 queries: for 32, its part of the output alone would be 128 numbers a thread. So a fragment of k or v
    that is read serves one product instead of two.
    Launch: ``flash_v4_128[flash_v4_launch(n_tokens, n_head, head_dim)](…)``, 128 threads; sm_75 or later.
    """
    k_tiles = cuda.shared.array((96, 128), float16, alignment=16)  # two of 48 keys: k and v fill 48 KiB
    v_tiles = cuda.shared.array((96, 128), float16, alignment=16)
    q_pairs = cuda.local.array((1, 8, 4), uint32)  # 16 queries x 128 elements
    scores = cuda.local.array((1, 6, 4), float32)  # 16 queries x 48 keys
    p_pairs = cuda.local.array((1, 3, 4), uint32)
    acc = cuda.local.array((1, 16, 4), float32)  # 16 queries x 128 elements
    largest = cuda.local.array((1, 2), float32)
    total = cuda.local.array((1, 2), float32)
    attend(
        q, k, v, out, lse, n_tokens, start, scale, causal,
        k_tiles, v_tiles, q_pairs, scores, p_pairs, acc, largest, total,
    )  # fmt: skip


def flash_v4(head_dim):
    """The kernel for heads of ``head_dim`` elements. Raises ValueError as :func:`flash_v4_launch`."""
    check_head_dim(head_dim)
    return flash_v4_64 if head_dim <= 64 else flash_v4_128


def flash_half(q, k, v, out, lse, n_tokens, scale, causal, start=0):
    """Attention by the kernel for q's head_dim; device arrays and numbers as in :func:`flash_v4_64`.

    A host function: it returns when the kernel is launched, not when it is done. Raises ValueError as
    :func:`flash_v4_launch`, and if k or v has fewer than start + n_tokens tokens.
    """
    n_head, _, head_dim = q.shape
    launch = flash_v4_launch(n_tokens, n_head, head_dim)
    held = min(k.shape[1], v.shape[1])
    if start < 0 or start + n_tokens > held:
        raise ValueError(f"start = {start}, {n_tokens} tokens: k and v hold {held}; start + n_tokens must not be more")
    flash_v4(head_dim)[launch](q, k, v, out, lse, n_tokens, start, np.float32(scale), causal)


# --- reference -------------------------------------------------------------------------------------------------------


def flash_half_reference(q, k, v, scale, causal, start=0):
    """NumPy reference of v4: q (n_head, n_tokens, head_dim), k, v (n_head, start + n_tokens, head_dim), in float64.

    Returns ``out`` (n_tokens, n_head * head_dim) and ``lse`` (n_head, n_tokens), both float64.
    """
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    scores = q @ k.swapaxes(1, 2) * scale
    if causal:
        scores = np.where(np.tri(*scores.shape[1:], start, dtype=bool), scores, -np.inf)
    largest = scores.max(axis=2, keepdims=True)
    e = np.exp(scores - largest)
    total = e.sum(axis=2, keepdims=True)
    out = (e @ v / total).swapaxes(0, 1)
    return out.reshape(len(out), -1), (largest + np.log(total))[:, :, 0]
