"""Chapter 9, products of any number of rows in panels: y = x @ W + bias, three rungs that give a row the same bits.

A network reads each of its weights once for each token. With one row of x nothing is read twice, and the bytes of W
decide; with hundreds the arithmetic does. Between them the rows share what is read of W. All rungs have a thread for
each column, and it adds over k = 0, 1, 2 … in this order. So it makes no difference to a row how many come with it.

====================  ======================================================  ==========================================
kernel                what is new                                             when it loses
====================  ======================================================  ==========================================
``linear_v1_column``  a thread a column of W, (K, N) as it is stored          a warp's 128 bytes of a row lie 4 N bytes
                                                                              before those of the next: nothing fetches
                                                                              them in advance
``linear_v2_panels``  W in panels of 32 columns: what a warp reads lies in    each row of x reads all of W
                      one piece
``linear_v3_rows``    16 rows share what is read of W, four weights at once   one row; where there are tensor cores
====================  ======================================================  ==========================================

A panel is ``panels[p, k, t] = W[k, 32 * p + t]``, zeros behind the last column: the packing that BLAS libraries do
inside each product, done once, for weights do not change. W may be float32 or float16; products and sums are float32.
Without a GPU, where a warp is a loop over vectors, a panel is what the processor's prefetcher likes best: a stream.

Sources: Goto and van de Geijn 2008, "Anatomy of High-Performance Matrix Multiplication" (packing, and rows that stay in
registers); the row-by-row sums are chapter 6's.
"""

import numpy as np
from numba import cuda, float32

from ..ch07_warp_reduce.kernels import WARP

PANEL = WARP  # columns
ROWS = 16  # of x, for which a block of rung 3 reads its panel once
GRID_ROWS = 65535  # blocks along y


def panels_shape(K, N):
    """The shape of a (K, N) matrix in panels. Raises ValueError if a size is not positive."""
    if K <= 0 or N <= 0:
        raise ValueError(f"K = {K}, N = {N}: a matrix has at least 1 row and 1 column")
    return (N + PANEL - 1) // PANEL, K, PANEL


def pack_columns_launch(K, N):
    """Launch configuration of :func:`pack_columns`: ``(grid, block)``, a block a row. ValueError as `panels_shape`."""
    return panels_shape(K, N)[1], PANEL


def pack_rows_launch(K, N):
    """Launch configuration of :func:`pack_rows`: ``(grid, block)``, a block a panel. ValueError as `panels_shape`."""
    return panels_shape(K, N)[0], (PANEL, 8)


def linear_launch(M, N, rows=1):
    """Launch configuration of a product: ``(grid, block)``, a warp for a panel and ``rows`` rows of x (rung 3: `ROWS`).

    Raises ValueError if a size is not positive or there are more than 65535 panels.
    """
    n_panels = panels_shape(1, N)[0]
    if M <= 0 or n_panels > GRID_ROWS:
        raise ValueError(f"M = {M}, N = {N}: a launch takes at least 1 row and up to {GRID_ROWS * PANEL} columns")
    return ((M + rows - 1) // rows, n_panels), PANEL


def linear(M, N):
    """The fastest rung for M rows of x, with its launch configuration: ``kernel, (grid, block)``."""
    return (linear_v2_panels, linear_launch(M, N)) if M == 1 else (linear_v3_rows, linear_launch(M, N, ROWS))


# --- packing ---------------------------------------------------------------------------------------------------------


@cuda.jit
def pack_columns(W, panels, K, N):
    """panels[p, k, t] = W[k, 32 * p + t], 0 behind column N.

    W: (K, N), panels: ``panels_shape(K, N)``, each float32 or float16, as it is to be kept. K, N: int32. A block reads
    a row from end to end, and leaves a line in each panel. Launch: ``pack_columns[pack_columns_launch(K, N)](…)``.
    """
    k, t = cuda.blockIdx.x, cuda.threadIdx.x
    for p in range(panels.shape[0]):
        col = p * PANEL + t
        panels[p, k, t] = float32(W[k, col]) if col < N else float32(0)


@cuda.jit
def pack_rows(W, panels, K, N):
    """:func:`pack_columns` of W.T: W is (N, K), as embeddings and checkpoints of other libraries have it.

    Launch: ``pack_rows[pack_rows_launch(K, N)](…)``.
    """
    p, t = cuda.blockIdx.x, cuda.threadIdx.x
    row = p * PANEL + t
    for k in range(cuda.threadIdx.y, K, cuda.blockDim.y):
        panels[p, k, t] = float32(W[row, k]) if row < N else float32(0)


# --- products --------------------------------------------------------------------------------------------------------


@cuda.jit
def linear_v1_column(x, W, bias, y, M, N, K, add):
    """y = x @ W + bias, rung 1: a thread a column of W, as it is stored.

    x: (M, K) float32. W: (K, N) float32 or float16. bias: (N,) float32. y: (M, N) float32; with add = 1 the product is
    added to what is there, as to a residual stream, with 0 it replaces it. M, N, K, add: int32. All C-contiguous.
    Launch: ``linear_v1_column[linear_launch(M, N)](…)``.
    """
    row = cuda.blockIdx.x
    col = cuda.blockIdx.y * PANEL + cuda.threadIdx.x
    if col < N:
        total = float32(0)
        for k in range(K):
            total = cuda.fma(x[row, k], float32(W[k, col]), total)
        total += bias[col]
        y[row, col] = y[row, col] + total if add else total


@cuda.jit
def linear_v2_panels(x, panels, bias, y, M, N, K, add):
    """y = x @ W + bias, rung 2: W in panels, so that a warp reads it in one piece, 128 bytes after 128 bytes.

    panels: of :func:`pack_columns` or :func:`pack_rows`, float32 or float16. The others as in :func:`linear_v1_column`.
    Launch: ``linear_v2_panels[linear_launch(M, N)](…)``.
    """
    row, p, t = cuda.blockIdx.x, cuda.blockIdx.y, cuda.threadIdx.x
    col = p * PANEL + t
    total = float32(0)
    for k in range(K):
        total = cuda.fma(x[row, k], float32(panels[p, k, t]), total)
    if col < N:
        total += bias[col]
        y[row, col] = y[row, col] + total if add else total


@cuda.jit
def linear_v3_rows(x, panels, bias, y, M, N, K, add):
    """y = x @ W + bias, rung 3: 16 rows share what is read of W, and four weights wait in registers for all of them.

    Arguments as in :func:`linear_v2_panels`. Launch: ``linear_v3_rows[linear_launch(M, N, ROWS)](…)``.
    """
    totals = cuda.local.array(ROWS, float32)
    row0, p, t = cuda.blockIdx.x * ROWS, cuda.blockIdx.y, cuda.threadIdx.x
    col = p * PANEL + t
    n_rows = min(M - row0, ROWS)
    for r in range(ROWS):
        totals[r] = float32(0)
    whole = K - K % 4
    for k in range(0, whole, 4):
        w0, w1 = float32(panels[p, k, t]), float32(panels[p, k + 1, t])
        w2, w3 = float32(panels[p, k + 2, t]), float32(panels[p, k + 3, t])
        for r in range(ROWS):
            if r < n_rows:
                total = totals[r]
                total = cuda.fma(x[row0 + r, k], w0, total)
                total = cuda.fma(x[row0 + r, k + 1], w1, total)
                total = cuda.fma(x[row0 + r, k + 2], w2, total)
                total = cuda.fma(x[row0 + r, k + 3], w3, total)
                totals[r] = total
    for k in range(whole, K):
        for r in range(ROWS):
            if r < n_rows:
                totals[r] = cuda.fma(x[row0 + r, k], float32(panels[p, k, t]), totals[r])
    if col < N:
        for r in range(ROWS):
            if r < n_rows:
                total = totals[r] + bias[col]
                y[row0 + r, col] = y[row0 + r, col] + total if add else total


# --- references ------------------------------------------------------------------------------------------------------


def pack_reference(W):
    """NumPy reference of :func:`pack_columns`: (K, N) -> panels."""
    K, N = W.shape
    n_panels = panels_shape(K, N)[0]
    padded = np.zeros((K, n_panels * PANEL), W.dtype)
    padded[:, :N] = W
    return np.ascontiguousarray(padded.reshape(K, n_panels, PANEL).transpose(1, 0, 2))


def linear_reference(x, W, bias):
    """NumPy reference of all versions: x (M, K), W (K, N), summed in float64; returns (M, N) float32."""
    return (x.astype(np.float64) @ W.astype(np.float64) + bias).astype(np.float32)
