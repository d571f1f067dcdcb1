"""Chapter 9, matrix times vector: y = W @ x, three rungs to the speed of memory.

Each element of W is used once, so nothing that makes a matrix product fast helps here: 2 flops for 4 bytes. What counts
is how the 4 * rows * d_model bytes of W come in. x is small and read by every row: it stays in the L1 cache.

==========================  =====================================  ====================================================
kernel                      a warp's load of W                     when it loses
==========================  =====================================  ====================================================
``gemv_v1_thread_per_row``  32 rows, 4 bytes of each: 32 sectors   always: the cache has to keep 32 lines a warp until
                            of 32 bytes, an eighth of them used    their other bytes are asked for
``gemv_v2_warp_per_row``    128 neighbouring bytes                 few bytes in flight for each instruction
``gemv_v3_vector``          512 neighbouring bytes                 d_model below 128: some lanes have nothing to load
==========================  =====================================  ====================================================

``gemv_logits`` is the last one. A row's result depends on that row and x alone, and is the same in every run. For
several vectors at once, such as the last rows of several texts, there is ``gemv_rows``, which adds up in another way.
"""

import numpy as np
from numba import cuda, float32

from common.ptx import load_float4

from ..ch07_warp_reduce.kernels import WARP, warp_sum

GEMV_THREADS = 256


def gemv_v1_launch(rows):
    """Launch configuration of :func:`gemv_v1_thread_per_row`: ``(grid, block)``, one thread a row.

    Raises ValueError if ``rows`` is not positive.
    """
    if rows <= 0:
        raise ValueError(f"rows = {rows}: a launch needs at least 1 row")
    return (rows + GEMV_THREADS - 1) // GEMV_THREADS, GEMV_THREADS


def gemv_logits_launch(vocab_size):
    """Launch configuration of the other versions: ``(grid, block)``, one warp a row, 8 rows a block.

    Raises ValueError if ``vocab_size`` is not positive.
    """
    if vocab_size <= 0:
        raise ValueError(f"vocab_size = {vocab_size}: a launch needs at least 1 row")
    rows = GEMV_THREADS // WARP
    return (vocab_size + rows - 1) // rows, GEMV_THREADS


@cuda.jit
def gemv_v1_thread_per_row(x, wte, logits, vocab_size, d_model):
    """logits[v] = wte[v] · x, rung 1: one thread a row, so that neighbours read d_model elements apart.

    x: (d_model,) float32. wte: (vocab_size, d_model) float32, C-contiguous. logits: (vocab_size,) float32.
    vocab_size, d_model: int32. Launch: ``gemv_v1_thread_per_row[gemv_v1_launch(vocab_size)](…)``.
    """
    row = cuda.grid(1)
    if row < vocab_size:
        total = float32(0)
        for c in range(d_model):
            total += wte[row, c] * x[c]
        logits[row] = total


@cuda.jit
def gemv_v2_warp_per_row(x, wte, logits, vocab_size, d_model):
    """logits[v] = wte[v] · x, rung 2: one warp a row; its lanes read 32 neighbours of the row at a time.

    x: (d_model,) float32. wte: (vocab_size, d_model) float32, C-contiguous. logits: (vocab_size,) float32.
    vocab_size, d_model: int32. Launch: ``gemv_v2_warp_per_row[gemv_logits_launch(vocab_size)](…)``.
    Source: Bell and Garland 2008 (their "vector" kernel).
    """
    lane = cuda.threadIdx.x % WARP
    row = cuda.grid(1) // WARP
    if row < vocab_size:  # alike for all lanes of a warp: warps stay or go as a whole, so no shuffle misses one
        total = float32(0)
        for c in range(lane, d_model, WARP):
            total += wte[row, c] * x[c]
        total = warp_sum(total)
        if lane == 0:
            logits[row] = total


@cuda.jit
def gemv_v3_vector(x, wte, logits, vocab_size, d_model):
    """logits[v] = wte[v] · x, rung 3: a lane loads 16 bytes at once. GPT-2's head: wte is its embedding as well.

    x: (d_model,) float32. wte: (vocab_size, d_model) float32, C-contiguous. logits: (vocab_size,) float32.
    vocab_size, d_model: int32. x and wte begin at a multiple of 16 bytes, as every array does that is not a slice of
    another. Only rows of a multiple of 4 elements all begin so too; with another d_model the kernel reads as rung 2
    does. Launch: ``gemv_v3_vector[gemv_logits_launch(vocab_size)](…)``. Source: Luitjens 2013, "Increase Performance
    with Vectorized Memory Access"; the tied head is Press and Wolf 2017.
    """
    lane = cuda.threadIdx.x % WARP
    row = cuda.grid(1) // WARP
    if row < vocab_size:
        total = float32(0)
        if d_model % 4 == 0:
            for c in range(4 * lane, d_model, 4 * WARP):
                w0, w1, w2, w3 = load_float4(wte, (row, c))
                x0, x1, x2, x3 = load_float4(x, c)
                total += (w0 * x0 + w1 * x1) + (w2 * x2 + w3 * x3)
        else:
            for c in range(lane, d_model, WARP):
                total += wte[row, c] * x[c]
        total = warp_sum(total)
        if lane == 0:
            logits[row] = total


gemv_logits = gemv_v3_vector


def gemv_logits_reference(x, wte):
    """NumPy reference of all versions: (d_model,) and (vocab_size, d_model) float32, summed in float64."""
    return (wte.astype(np.float64) @ x.astype(np.float64)).astype(np.float32)


# --- several vectors -------------------------------------------------------------------------------------------------

ROWS_AT_ONCE = 8  # vectors that share a read of the matrix
SQUARE = 32  # rows and columns of the matrix that a warp has in shared memory
PADDED = SQUARE + 1


def gemv_rows_launch(n_rows, vocab_size):
    """Launch configuration of :func:`gemv_rows`: a warp for 32 rows of the matrix, along x, and 8 vectors, along y.

    Raises ValueError if a size is not positive.
    """
    if n_rows <= 0 or vocab_size <= 0:
        raise ValueError(f"{n_rows} vectors, {vocab_size} rows of the matrix: a product needs at least 1 of each")
    return ((vocab_size + SQUARE - 1) // SQUARE, (n_rows + ROWS_AT_ONCE - 1) // ROWS_AT_ONCE), WARP


@cuda.jit
def gemv_rows(x, rows, wte, logits, n_rows, vocab_size, d_model):
    """logits[i, v] = wte[v] · x[rows[i]] for several vectors, which share what is read of the matrix.

    With a warp a row, as in rung 3, each vector would take five shuffles a row to add up its lanes. Here a lane has a
    row of the matrix to itself and adds it up alone, for 8 vectors at once: the warp reads a square of the matrix, row
    by row, 32 neighbours at a time, into shared memory, where each lane finds its row. (Chapter 4's transpose: the odd
    column keeps lanes apart.) A vector's sum has one order, however many there are. x: (n, d_model) float32. rows:
    (n_rows,) int32, which rows of x. wte: (vocab_size, d_model) float32. logits: (n_rows, vocab_size) float32. Sizes:
    int32. All C-contiguous. Launch: ``gemv_rows[gemv_rows_launch(n_rows, vocab_size)](…)``, 32 threads exactly. From
    some 16 vectors on a tiled product is faster.
    """
    square = cuda.shared.array((SQUARE, PADDED), float32)
    part = cuda.shared.array((ROWS_AT_ONCE, SQUARE), float32)  # of the vectors, the same columns
    totals = cuda.local.array(ROWS_AT_ONCE, float32)
    lane = cuda.threadIdx.x
    v0 = cuda.blockIdx.x * SQUARE
    first = cuda.blockIdx.y * ROWS_AT_ONCE
    count = min(n_rows - first, ROWS_AT_ONCE)
    for j in range(ROWS_AT_ONCE):
        totals[j] = float32(0)
    for col0 in range(0, d_model, SQUARE):
        col = col0 + lane
        for r in range(SQUARE):
            square[r, lane] = wte[v0 + r, col] if v0 + r < vocab_size and col < d_model else float32(0)
        for j in range(count):
            part[j, lane] = x[rows[first + j], col] if col < d_model else float32(0)
        cuda.syncthreads()
        for c in range(SQUARE):
            w = square[lane, c]
            for j in range(count):
                totals[j] += w * part[j, c]
        cuda.syncthreads()
    if v0 + lane < vocab_size:
        for j in range(count):
            logits[first + j, v0 + lane] = totals[j]


def gemv_rows_reference(x, rows, wte):
    """NumPy reference of :func:`gemv_rows`, summed in float64; returns (n_rows, vocab_size) float32."""
    return (x[rows].astype(np.float64) @ wte.astype(np.float64).T).astype(np.float32)
