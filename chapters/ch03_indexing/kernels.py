"""Chapter 3, indexing: from a thread's coordinates to an array's element.

Each kernel here gives one thread one element, and differs only in how the index is made:

=================  ==========================================  =====================================
kernel             index                                       bytes a element moved (float32)
=================  ==========================================  =====================================
``residual_add``   1-D, one thread an element                  12 (two reads, one write)
``bias_add``       2-D, column = x, row = y                    8 + 4 / rows (the bias is read again and again)
``embed``          2-D, the row comes from another array       12 (two table rows, one write)
=================  ==========================================  =====================================

``blocks_1d`` and ``blocks_2d`` give the launch configuration, here and in every later chapter.
"""

import numpy as np
from numba import cuda

THREADS_1D = 256
THREADS_2D = (32, 8)


def blocks_1d(n, threads=THREADS_1D):
    """Launch configuration for ``n`` elements, one thread each: ``(grid, block)``.

    Raises ValueError if ``n`` is not positive: a grid of no blocks cannot be launched.
    """
    if n <= 0:
        raise ValueError(f"n = {n}: a launch needs at least 1 element; skip the launch for empty input")
    return (n + threads - 1) // threads, threads


def blocks_2d(rows, cols, threads=THREADS_2D):
    """Launch configuration for a ``(rows, cols)`` array, one thread an element, columns along x: ``(grid, block)``.

    Neighbouring threads (x) take neighbouring columns, which lie next to each other in memory (chapter 4 measures why).
    Raises ValueError if a size is not positive.
    """
    if rows <= 0 or cols <= 0:
        raise ValueError(f"shape ({rows}, {cols}): a launch needs at least 1 row and 1 column")
    return ((cols + threads[0] - 1) // threads[0], (rows + threads[1] - 1) // threads[1]), threads


@cuda.jit
def residual_add(x, branch, out, n):
    """out[i] = x[i] + branch[i]: the residual connection of a transformer block.

    x, branch, out: (n,) float32, C-contiguous; ``out`` may be ``x`` itself. n: int32.
    Launch: ``residual_add[blocks_1d(n)](…)``. Source: He et al. 2015, "Deep Residual Learning".
    """
    i = cuda.grid(1)
    if i < n:  # the last block has threads past the end
        out[i] = x[i] + branch[i]


def residual_add_reference(x, branch):
    """NumPy reference of :func:`residual_add`: (n,) float32 each, returns (n,) float32."""
    return (x + branch).astype(np.float32)


@cuda.jit
def bias_add(x, bias, out, rows, cols):
    """out[r, c] = x[r, c] + bias[c]: adds one vector to every row.

    x, out: (rows, cols) float32, C-contiguous; ``out`` may be ``x`` itself. bias: (cols,) float32. rows, cols: int32.
    Launch: ``bias_add[blocks_2d(rows, cols)](…)``.
    """
    col, row = cuda.grid(2)  # x is the fastest axis, so it runs along the columns
    if row < rows and col < cols:
        out[row, col] = x[row, col] + bias[col]


def bias_add_reference(x, bias):
    """NumPy reference of :func:`bias_add`: (rows, cols) and (cols,) float32, returns (rows, cols) float32."""
    return (x + bias[None, :]).astype(np.float32)


@cuda.jit
def embed(tokens, wte, wpe, out, n_tokens, d_model):
    """out[t, c] = wte[tokens[t], c] + wpe[t, c]: token and position embedding of GPT-2.

    tokens: (n_tokens,) int32, each in 0 … vocab_size - 1 (checked by the caller: a kernel that reads past the table
    reads whatever lies there). wte: (vocab_size, d_model) float32. wpe: (n_ctx, d_model) float32, n_ctx >= n_tokens.
    out: (n_tokens, d_model) float32. n_tokens, d_model: int32.
    Launch: ``embed[blocks_2d(n_tokens, d_model)](…)``. Source: Radford et al. 2019 (GPT-2).
    """
    col, t = cuda.grid(2)
    if t < n_tokens and col < d_model:
        row = tokens[t]  # an index that is itself data: a *gather*
        out[t, col] = wte[row, col] + wpe[t, col]


def embed_reference(tokens, wte, wpe):
    """NumPy reference of :func:`embed`: (n_tokens,) int, two tables; returns (n_tokens, d_model) float32."""
    return (wte[tokens] + wpe[: len(tokens)]).astype(np.float32)
