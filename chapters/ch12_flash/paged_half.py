"""Chapter 12, attention over pages in float16: steps by chunks, prompts by tiles, many sequences in one launch.

``decode_v4_parts`` and ``flash_v4`` are as fast as a GPU lets them, for one text in one piece of memory. Here are both
for the rows of ``ragged.py``, with keys and values in pages:

======================  ==============================================  ================================================
kernel                  what it changes                                 what it costs
======================  ==============================================  ================================================
``paged_v4_parts``      ``decode_v4_parts`` with rows along z of the    a look into the table for every 8 numbers of a
                        grid, whose tokens lie in pages                 token; blocks for the longest text, for each row
``flash_v5_pages``      ``flash_v4`` for parts of several prompts: a    the same for every 16 bytes of a tile; a part of
                        block takes a *tile* of queries of one text,    one row has a tile of 128 all the same
                        or of it one segment of keys
``combine_parts``       puts chunks together where no product does      a launch
``combine_segments``    the same for segments                           a launch; parts written and read
======================  ==============================================  ================================================

**Which one?** v4 reads all keys of a text again for every row, and is busy with few rows: for steps. v5 reads them once
for 128 queries: for prompts. A step's only row may be a tile too, so both can run any batch, and whoever mixes steps
and prompts in one launch takes v5.

**Look all pages up, then load.** A page is found by a shift, as ``block_size`` is a power of two; but its address is a
read away, some 300 ns. A thread that goes from look-up to load to look-up waits for each; one that first looks up all
that it needs waits once. v5 looks up a tile's pages while it multiplies the tile before, and does not wait at all. The
caches are passed flat, and a token's *place* there (:func:`place_in`) is a number of 32 bits: an index of four axes
would be several 64-bit multiplications at each load, where a block has nothing else to do but wait for it.

**A prompt's last piece is the longest.** It has few queries, and sees all keys: 256 rows behind 700 others are two
tiles, 24 blocks in a model of 12 heads, and each walks over a thousand keys while the other multiprocessors look on.
Cut into segments of 384 keys it is three times as many blocks, a third as long. Every row's segments begin at the same
keys, so its bits do not depend on how the prompt was cut.

**A row's bits are its own.** Chunks and tiles of keys begin at the same tokens whoever else is in the launch, and a key
that a row may not see adds an exact 0. So a prompt gives the same numbers in one piece or in many. v4 and v5 round
differently, though: who needs the same bits in steps and prompts takes one of them for both.

``n_kv_head`` key heads may serve more query heads, as in ``ragged.py``. A row at position -1 is padding: v4 writes
nothing for it, and v5 has no tile for it.
Sources: as ``decode_half.py``, ``tensor_core.py``; Kwon et al. 2023 (pages); Ye et al. 2025, "FlashInfer" (tiles of
queries as a list of work).
"""

import math

import numpy as np
from numba import cuda, float32, int32, int64, uint32
from numba.types import float16

from chapters.ch12_flash.decode import decode_reference
from chapters.ch12_flash.decode_half import (
    HEAD_DIM_MAX,
    PIECES,
    WARPS,
    active_chunks,
    chunk_share,
    chunks_launch,
    load_combined,
    lse_stride_of,
    weigh_chunk,
    whole_fours,
)
from chapters.ch12_flash.decode_half import THREADS as PARTS_THREADS
from chapters.ch12_flash.tensor_core import (
    GRID_Y_MAX,
    LOG2_E,
    MMA_M,
    THREADS,
    TWO_BLOCKS,
    add_values,
    begin_rows,
    check_head_dim,
    mask_scores,
    multiply_keys,
    queries_of,
    read_queries,
    softmax_step,
    store_rows,
    swizzle,
)
from chapters.ch12_flash.tensor_core import WARP as LANES
from common.ptx import (
    cp_async_commit,
    cp_async_half8,
    cp_async_wait,
    exp2_approx,
    griddep_launch,
    griddep_wait,
    load_half8,
    pack_half2,
    store_half8,
    unpack_half2,
)

BLOCK_SIZES = (4, 8, 16, 32, 64, 128, 256)
COMBINE_THREADS = 128
PARTS_BLOCKS = (PARTS_THREADS, 2)  # four, as decode_v4_parts has them, leave no registers for the tokens' places
TILE_FIELDS = 7  # of a tile of queries: first row, rows, sequence, position of the first row; keys from … to …; part
SEGMENT, SEGMENTS_MAX = 384, 16  # keys of a segment, a multiple of both kernels' tiles; more, if there were too many


def check_block_size(block_size):
    """Raises ValueError unless ``block_size`` is a power of two from 4 to 256."""
    if block_size not in BLOCK_SIZES:
        sizes = ", ".join(map(str, BLOCK_SIZES))
        raise ValueError(f"block_size = {block_size}: a page is found by a shift, so it must be one of {sizes}")


@cuda.jit(device=True, forceinline=True)
def kv_head_of(head, n_kv_head, n_head):
    """The key head that a head reads. Signed and of 64 bits, the division would take a hundred instructions."""
    return int32(uint32(head * n_kv_head) // uint32(n_head))


@cuda.jit(device=True, forceinline=True)
def place_in(page, token, kv_head, n_kv_head, page_bits):
    """Where a token's key of head ``kv_head`` is: so many times head_dim from the beginning of the cache on."""
    return int32((page * n_kv_head + kv_head << page_bits) + (token & (1 << page_bits) - 1))


# --- steps -----------------------------------------------------------------------------------------------------------


def paged_parts_launch(n_rows, max_tokens, n_head, head_dim, block_size):
    """Launch configuration of :func:`paged_v4_parts`: chunks along x, heads along y, rows along z: ``(grid, block)``.

    max_tokens: of the longest text. Raises ValueError as ``chunks_launch`` and :func:`check_block_size`, and if n_rows
    is not from 1 to 65535.
    """
    check_block_size(block_size)
    if not 1 <= n_rows <= GRID_Y_MAX:
        raise ValueError(f"{n_rows} rows: a launch takes 1 to {GRID_Y_MAX}")
    (n_chunks, _), threads = chunks_launch(max_tokens, n_head, head_dim)
    return (n_chunks, n_head, n_rows), threads


def paged_parts_workspace(n_rows, max_tokens, n_head, head_dim):
    """Lengths of ``parts`` (float16) and ``lse`` (float32, filled with anything) of :func:`paged_v4_parts`."""
    (n_chunks, _), _ = chunks_launch(max_tokens, n_head, head_dim)
    return n_rows * n_chunks * n_head * head_dim, n_rows * n_head * lse_stride_of(n_chunks)


@cuda.jit(launch_bounds=PARTS_BLOCKS)
def paged_v4_parts(
    q, k_cache, v_cache, block_table, row_seq, positions, parts, lse, n_kv_head, head_dim, block_size, scale, single
):
    """Attention of row blockIdx.z over each chunk of its sequence by itself, as ``decode_v4_parts`` leaves it.

    q: (n_rows * n_head * head_dim,) float16, flat. k_cache, v_cache: (num_blocks, n_kv_head, block_size, head_dim)
    float16, but flat; the first three below 2**31 in product. block_table: (num_seqs, max_blocks), row_seq, positions:
    (n_rows,) int32, as ``paged_v3_rows`` has them; -1 in positions is padding. parts, lse: of
    :func:`paged_parts_workspace`; row r's chunks are those from r * n_chunks on, and its heads in lse those from r *
    n_head on: what ``load_combined`` wants. All C-contiguous, q and the caches from a multiple of 16 bytes on.
    head_dim: one of HEAD_DIMS; block_size: a power of two; n_kv_head: all int32. scale: float32. single: int32; 1 says
    that row r is the only one of sequence r, so that tokens before its own can be asked for before the kernel in front
    has ended. In a graph of dependent launches none in front writes the int32 arrays.
    Launch: ``paged_v4_parts[paged_parts_launch(n_rows, max_tokens, n_head, head_dim, block_size)](…)``, 256 threads.
    """
    warp_pairs = cuda.shared.array((WARPS, 2), float32)
    warp_sums = cuda.shared.array((WARPS, HEAD_DIM_MAX), float32, alignment=16)
    k = cuda.local.array((PIECES, 4), uint32)
    v = cuda.local.array((PIECES, 4), uint32)
    places = cuda.local.array(PIECES, int32)
    tid = cuda.threadIdx.x
    head = cuda.blockIdx.y
    row = cuda.blockIdx.z
    before = positions[row]
    seq = row if single else row_seq[row]
    page_bits = 31 - cuda.clz(int32(block_size))
    first, together, dim = chunk_share(head_dim)
    for j in range(PIECES):  # the pages, asked for together with the position
        places[j] = block_table[seq, min(first + j * together >> page_bits, block_table.shape[1] - 1)]
    griddep_launch()  # which no load moves across: the compiler would ask for pages once the position is there
    kv_head = kv_head_of(head, n_kv_head, cuda.gridDim.y)  # while they are on their way
    for j in range(PIECES):
        places[j] = place_in(places[j], first + j * together, kv_head, n_kv_head, page_bits)
    if cuda.blockIdx.x >= active_chunks(before, head_dim):
        return
    early = before if single else 0  # tokens that are there already
    for j in range(PIECES):
        token = first + j * together
        if token < early:
            at = int64(places[j]) * head_dim + dim
            k[j, 0], k[j, 1], k[j, 2], k[j, 3] = load_half8(k_cache, at)
            v[j, 0], v[j, 1], v[j, 2], v[j, 3] = load_half8(v_cache, at)
        else:
            k[j, 0] = k[j, 1] = k[j, 2] = k[j, 3] = v[j, 0] = v[j, 1] = v[j, 2] = v[j, 3] = uint32(0)
    griddep_wait()
    q0, q1, q2, q3 = load_half8(q, (row * cuda.gridDim.y + head) * head_dim + dim)
    for j in range(PIECES):
        token = first + j * together
        if early <= token <= before:
            at = int64(places[j]) * head_dim + dim
            k[j, 0], k[j, 1], k[j, 2], k[j, 3] = load_half8(k_cache, at)
            v[j, 0], v[j, 1], v[j, 2], v[j, 3] = load_half8(v_cache, at)
    largest, total, share = weigh_chunk(
        k, v, q0, q1, q2, q3, first, before, head_dim, scale, warp_pairs, warp_sums
    )
    part = row * cuda.gridDim.x + cuda.blockIdx.x
    if tid < head_dim:
        parts[(part * cuda.gridDim.y + head) * head_dim + tid] = share / total
    if tid == 0:
        first_of_head = (row * cuda.gridDim.y + head) * whole_fours(cuda.gridDim.x)
        lse[first_of_head + cuda.blockIdx.x] = largest + math.log2(total)


def combine_parts_launch(n_rows, n_head, head_dim):
    """Launch configuration of :func:`combine_parts`: 8 numbers a thread along x, rows along y: ``(grid, block)``.

    Raises ValueError if n_rows is not from 1 to 65535, or head_dim none of HEAD_DIMS.
    """
    if not 1 <= n_rows <= GRID_Y_MAX:
        raise ValueError(f"{n_rows} rows: a launch takes 1 to {GRID_Y_MAX}")
    chunks_launch(1, n_head, head_dim)
    return (-(-n_head * head_dim // (8 * COMBINE_THREADS)), n_rows), COMBINE_THREADS


@cuda.jit
def combine_parts(parts, lse, positions, out, n_head, head_dim, n_chunks, lse_stride):
    """out[r] = the attention of row r, of which :func:`paged_v4_parts` has left the chunks.

    For products of many rows of W: there each block would combine all of it for itself. parts, lse, positions: as
    there, with n_chunks: gridDim.x there; lse_stride: ``lse_stride_of(n_chunks)``. out: (n_rows * n_head * head_dim,)
    float16, flat. Sizes: int32. A row at position -1 gets numbers that say nothing.
    Launch: ``combine_parts[combine_parts_launch(n_rows, n_head, head_dim)](…)``.
    """
    row, col, width = cuda.blockIdx.y, 8 * cuda.grid(1), n_head * head_dim
    griddep_launch()
    n_active = active_chunks(positions[row], head_dim)
    griddep_wait()
    if col < width:
        head = row * n_head + int32(uint32(col) // uint32(head_dim))
        p0, p1, p2, p3 = load_combined(parts, lse, n_active, row * n_chunks, col, head, lse_stride, width)
        store_half8(out, row * width + col, p0, p1, p2, p3)


# --- prompts ---------------------------------------------------------------------------------------------------------


def segment_keys(max_tokens):
    """Keys of a segment of texts of up to so many tokens, of which there are 16 at most."""
    return SEGMENT * -(-max_tokens // (SEGMENT * SEGMENTS_MAX))


def query_tiles(starts, counts, head_dim, keys=None):
    """Work for :func:`flash_v5_pages`, (n_tiles, 7) int32: first row, rows, sequence, first position, keys, part.

    starts, counts: of each sequence, the position of its first row and how many it has, rows being laid one sequence
    after the other. keys: of a segment; then a tile with more keys is so many pieces of work, each a part of the result
    that ``combine_segments`` puts together. None: one piece. The largest come first, so that the last to start are
    small.
    """
    queries = queries_of(head_dim)
    tiles, row0 = [], 0
    for seq, (start, count) in enumerate(zip(starts, counts)):
        for first in range(0, count, queries):
            rows = min(queries, count - first)
            end = start + first + rows
            for part, key in enumerate(range(0, end, keys or end)):
                tiles.append((row0 + first, rows, seq, start + first, key, min(end, key + (keys or end)), part))
        row0 += count
    tiles.sort(key=lambda tile: tile[4] - tile[5])
    return np.array(tiles, np.int32).reshape(len(tiles), TILE_FIELDS)


def flash_v5_launch(n_tiles, n_head, head_dim, block_size):
    """Launch configuration of ``flash_v5_pages(head_dim)``: heads along x, tiles along y: ``(grid, block)``.

    Raises ValueError if n_tiles is not from 1 to 65535, and as ``check_head_dim`` and :func:`check_block_size`.
    """
    check_head_dim(head_dim)
    check_block_size(block_size)
    if not 1 <= n_tiles <= GRID_Y_MAX:
        raise ValueError(f"{n_tiles} tiles: a launch takes 1 to {GRID_Y_MAX}; launch parts of the list")
    return (n_head, n_tiles), THREADS


@cuda.jit(device=True, forceinline=True)
def load_queries(tile, count, q, head, row0, rows):
    """``load_rows`` of queries, (n_rows, n_head, head_dim): rows row0 … row0 + rows - 1, 0 behind them."""
    pieces = tile.shape[1] // 8
    piece = cuda.threadIdx.x % pieces
    first = cuda.threadIdx.x // pieces
    place = swizzle(first, piece)
    end = rows if 8 * piece < q.shape[2] else 0
    for i in range(0, count, THREADS // pieces):
        row = first + i
        cp_async_half8(tile, (row, place), q, (row0 + min(row, rows - 1), head, 8 * piece), row < end)


@cuda.jit(device=True, forceinline=True)
def look_up(pages, tile, count, block_table, seq, token0, n_tokens, page_bits):
    """pages[i] = the page of the i-th token that this thread loads of token0 … token0 + count - 1; (8,) int32.

    Behind the text it is the last token's: a branch would wait for each page before it asks for the next.
    """
    pieces = tile.shape[1] // 8
    step = THREADS // pieces
    for i in range(count // step):
        token = min(token0 + cuda.threadIdx.x // pieces + i * step, n_tokens - 1)
        pages[i] = block_table[seq, token >> page_bits]


@cuda.jit(device=True, forceinline=True)
def load_pages(
    k_tiles, v_tiles, tile_row, count, k_cache, v_cache, head_dim, pages, token0, n_tokens,
    kv_head, n_kv_head, page_bits,
):  # fmt: skip
    """``load_rows`` of a sequence's tokens token0 … token0 + count - 1 from pages; 0 from token ``n_tokens`` on."""
    pieces = k_tiles.shape[1] // 8
    piece = cuda.threadIdx.x % pieces
    first = cuda.threadIdx.x // pieces
    step = THREADS // pieces
    place = swizzle(first, piece)
    end = n_tokens if 8 * piece < head_dim else 0
    for i in range(count // step):
        row = first + i * step
        at = int64(place_in(pages[i], token0 + row, kv_head, n_kv_head, page_bits)) * head_dim + 8 * piece
        cp_async_half8(k_tiles, (tile_row + row, place), k_cache, at, token0 + row < end)
        cp_async_half8(v_tiles, (tile_row + row, place), v_cache, at, token0 + row < end)


@cuda.jit(device=True, forceinline=True)
def attend_tile(
    q, k_cache, v_cache, block_table, tiles, out, lse, n_kv_head, block_size, scale,
    k_tiles, v_tiles, q_pairs, scores, p_pairs, acc, largest, total, pages,
):  # fmt: skip
    """The whole of v5, as ``attend`` in ``tensor_core.py`` is of v4: the tile of queries is number blockIdx.y."""
    keys = k_tiles.shape[0] // 2
    warp_queries = MMA_M * q_pairs.shape[0]
    queries = (THREADS // LANES) * warp_queries
    head = cuda.blockIdx.x
    kv_head = kv_head_of(head, n_kv_head, cuda.gridDim.x)
    work = cuda.blockIdx.y
    row0, rows, seq, position0 = tiles[work, 0], tiles[work, 1], tiles[work, 2], tiles[work, 3]
    first_key, n_keys, part = tiles[work, 4], tiles[work, 5], tiles[work, 6]
    if rows == 0:  # a list of work may end in nothing
        return
    page_bits = 31 - cuda.clz(int32(block_size))
    warp_row = cuda.threadIdx.x // LANES * warp_queries
    n_kv_head, head_dim = int32(n_kv_head), int32(q.shape[2])
    factor = scale * LOG2_E
    look_up(pages, k_tiles, keys, block_table, seq, first_key, n_keys, page_bits)  # there by the time the queries are
    load_queries(k_tiles, queries, q, head, row0, rows)
    cp_async_commit()
    begin_rows(acc, largest, total)
    cp_async_wait(0)
    cuda.syncthreads()
    read_queries(k_tiles, warp_row, q_pairs)
    cuda.syncthreads()  # all have read their queries
    load_pages(
        k_tiles, v_tiles, 0, keys, k_cache, v_cache, head_dim, pages, first_key, n_keys, kv_head, n_kv_head, page_bits
    )
    cp_async_commit()
    look_up(pages, k_tiles, keys, block_table, seq, first_key + keys, n_keys, page_bits)
    now = 0
    for key0 in range(first_key, n_keys, keys):
        cp_async_wait(0)  # my part of the tiles `now` is there
        cuda.syncthreads()  # everybody's part is, and all have left the others
        load_pages(
            k_tiles, v_tiles, keys - now, keys, k_cache, v_cache, head_dim, pages, key0 + keys, n_keys,
            kv_head, n_kv_head, page_bits,
        )  # fmt: skip
        cp_async_commit()
        look_up(pages, k_tiles, keys, block_table, seq, key0 + 2 * keys, n_keys, page_bits)  # there by the next tile
        multiply_keys(q_pairs, k_tiles, now, scores)
        if key0 + keys > position0 + 1:
            mask_scores(scores, position0 + warp_row, key0, n_keys, 1)
        softmax_step(scores, factor, largest, total, acc, p_pairs)
        add_values(p_pairs, v_tiles, now, acc)
        now = keys - now
    cp_async_wait(0)  # the tiles after the last, which are not read
    store_rows(acc, largest, total, out[part], lse[part], head, head_dim, row0 + warp_row, row0 + rows)


@cuda.jit(launch_bounds=TWO_BLOCKS)
def flash_v5_pages_64(q, k_cache, v_cache, block_table, tiles, out, lse, n_kv_head, block_size, scale):
    """out[part, r] = attention of row r over a segment of its own sequence up to its own position, for all tiles.

    q: (n_rows, n_head, head_dim) float16, head_dim a multiple of 8 up to 64. k_cache, v_cache: as ``paged_v4_parts``
    has them; the keys of all rows have been written. block_table: (num_seqs, max_blocks) int32. tiles: (n_tiles, 7)
    int32, of :func:`query_tiles`; one with 0 rows does nothing. out: (n_parts, n_rows, n_head * head_dim) float16. lse:
    (n_parts, n_head, n_rows) float32, as v4's. What a row without a key in a segment has there says nothing. All
    C-contiguous, q and the caches from a multiple of 16 bytes on. n_kv_head, block_size: int32, block_size a power of
    two. scale: float32, above 0.
    Launch: ``flash_v5_pages_64[flash_v5_launch(n_tiles, n_head, head_dim, block_size)](…)``, 128 threads; sm_75 or
    later.
    """
    k_tiles = cuda.shared.array((128, 64), float16, alignment=16)  # two of 64 keys
    v_tiles = cuda.shared.array((128, 64), float16, alignment=16)
    q_pairs = cuda.local.array((2, 4, 4), uint32)  # 32 queries x 64 elements
    scores = cuda.local.array((2, 8, 4), float32)  # 32 queries x 64 keys
    p_pairs = cuda.local.array((2, 4, 4), uint32)
    acc = cuda.local.array((2, 8, 4), float32)  # 32 queries x 64 elements
    largest = cuda.local.array((2, 2), float32)
    total = cuda.local.array((2, 2), float32)
    pages = cuda.local.array(8, int32)
    attend_tile(
        q, k_cache, v_cache, block_table, tiles, out, lse, n_kv_head, block_size, scale,
        k_tiles, v_tiles, q_pairs, scores, p_pairs, acc, largest, total, pages,
    )  # fmt: skip


@cuda.jit(launch_bounds=TWO_BLOCKS)
def flash_v5_pages_128(q, k_cache, v_cache, block_table, tiles, out, lse, n_kv_head, block_size, scale):
    """Attention as :func:`flash_v5_pages_64` with a head_dim of up to 128, as ``flash_v4_128`` has it.

    Launch: ``flash_v5_pages_128[flash_v5_launch(n_tiles, n_head, head_dim, block_size)](…)``, 128 threads; sm_75 or
    later.
    """
    k_tiles = cuda.shared.array((96, 128), float16, alignment=16)  # two of 48 keys
    v_tiles = cuda.shared.array((96, 128), float16, alignment=16)
    q_pairs = cuda.local.array((1, 8, 4), uint32)  # 16 queries x 128 elements
    scores = cuda.local.array((1, 6, 4), float32)  # 16 queries x 48 keys
    p_pairs = cuda.local.array((1, 3, 4), uint32)
    acc = cuda.local.array((1, 16, 4), float32)  # 16 queries x 128 elements
    largest = cuda.local.array((1, 2), float32)
    total = cuda.local.array((1, 2), float32)
    pages = cuda.local.array(8, int32)
    attend_tile(
        q, k_cache, v_cache, block_table, tiles, out, lse, n_kv_head, block_size, scale,
        k_tiles, v_tiles, q_pairs, scores, p_pairs, acc, largest, total, pages,
    )  # fmt: skip


def combine_segments_launch(n_rows, n_head, head_dim):
    """Launch configuration of :func:`combine_segments`: 8 numbers a thread along x, rows along y: ``(grid, block)``.

    Raises ValueError if n_rows is not from 1 to 65535, and as ``check_head_dim``.
    """
    check_head_dim(head_dim)
    if not 1 <= n_rows <= GRID_Y_MAX:
        raise ValueError(f"{n_rows} rows: a launch takes 1 to {GRID_Y_MAX}")
    return (-(-n_head * head_dim // (8 * COMBINE_THREADS)), n_rows), COMBINE_THREADS


@cuda.jit
def combine_segments(parts, lse, positions, n_steps, out, head_dim, keys):
    """out[r] = the attention of row r, of which :func:`flash_v5_pages` has left segments of ``keys`` keys in parts.

    parts: (n_parts, n_rows, n_head * head_dim), out: (n_rows, n_head * head_dim) float16. lse: (n_parts, n_head,
    n_rows) float32. positions: (n_rows,), n_steps: (1,) int32: rows in front of that number are left alone, as are rows
    at position -1. head_dim, keys: int32. Segments are taken in order: the same bits, however rows lie in tiles.
    Launch: ``combine_segments[combine_segments_launch(n_rows, n_head, head_dim)](…)``.
    """
    acc = cuda.local.array(8, float32)
    words = cuda.local.array(4, uint32)
    row, col = cuda.blockIdx.y, 8 * cuda.grid(1)
    position = positions[row]
    if row >= n_steps[0] and position >= 0 and col < parts.shape[2]:
        head = int32(uint32(col) // uint32(head_dim))
        n_segments = position // keys + 1
        largest = lse[0, head, row]
        for segment in range(1, n_segments):
            largest = max(largest, lse[segment, head, row])
        total = float32(0)
        for e in range(8):
            acc[e] = float32(0)
        for segment in range(n_segments):
            weight = exp2_approx((lse[segment, head, row] - largest) * LOG2_E)
            total += weight
            words[0], words[1], words[2], words[3] = load_half8(parts, (segment, row, col))
            for pair in range(4):
                low, high = unpack_half2(words[pair])
                acc[2 * pair] += weight * low
                acc[2 * pair + 1] += weight * high
        share = float32(1) / total
        for pair in range(4):
            words[pair] = pack_half2(acc[2 * pair] * share, acc[2 * pair + 1] * share)
        store_half8(out, (row, col), words[0], words[1], words[2], words[3])


def flash_v5_pages(head_dim):
    """The kernel for heads of ``head_dim`` elements. Raises ValueError as ``check_head_dim``."""
    check_head_dim(head_dim)
    return flash_v5_pages_64 if head_dim <= 64 else flash_v5_pages_128


# --- reference -------------------------------------------------------------------------------------------------------


def paged_half_reference(q, k_cache, v_cache, block_table, row_seq, positions, scale):
    """NumPy reference of both: q (n_rows, n_head, head_dim) float16; returns the same shape, float64."""
    out, n_head, block_size = np.zeros(q.shape), q.shape[1], k_cache.shape[2]
    for row, (seq, position) in enumerate(zip(row_seq, positions)):
        pages = block_table[seq, : position // block_size + 1]
        k, v = (np.concatenate(cache[pages], axis=1)[:, : position + 1] for cache in (k_cache, v_cache))
        groups = np.arange(n_head) * k.shape[0] // n_head
        out[row] = decode_reference(q[row], k[groups].astype(np.float64), v[groups].astype(np.float64), scale)
    return out
