"""Chapter 3, indexing: from a thread's coordinates to an array's element.

Each kernel here does next to nothing with its elements; what differs is how a thread finds them:

===============================  =======================================  ==============================================
kernel                           index                                    bytes moved for an element (float32)
===============================  =======================================  ==============================================
``vector_add_v1_one_each``       1-D, one thread an element               12 (two reads, one write)
``vector_add_v2_grid_stride``    1-D, a thread takes every                12; the grid need not fit the array, but a
                                 ``gridsize``-th element                  thread needs a loop
``saxpy``                        1-D, grid-stride                         12, out is read and written
``residual_add``                 1-D, one thread an element               12
``bias_add``                     2-D, column = x, row = y                 8 + 4 / rows (the bias is read again)
``embed``                        2-D, the row comes from another array    12 (two table rows, one write)
``scale_heads``                  3-D, element = x, token = y, head = z    8 + 4 / (n_tokens * head_dim)
===============================  =======================================  ==============================================

``blocks_1d``, ``blocks_2d`` and ``blocks_3d`` give the launch configuration, here and in every later chapter.
"""

import numpy as np
from numba import cuda

from chapters.ch02_launch.kernels import MAX_GRID, blocks_for

THREADS_1D = 256
THREADS_2D = (32, 8)
MAX_BLOCKS = 1024  # of a grid-stride launch: enough to fill any GPU of today


def blocks_1d(n, threads=THREADS_1D):
    """Launch configuration for ``n`` elements, one thread each: ``(grid, block)``.

    Raises ValueError if ``n`` is not positive: a grid of no blocks cannot be launched.
    """
    return blocks_for(n, threads), threads


def blocks_grid_stride(n, threads=THREADS_1D, max_blocks=MAX_BLOCKS):
    """Launch configuration for a grid-stride loop over ``n`` elements: ``(grid, block)``, ``max_blocks`` at most.

    Raises ValueError if ``n`` is not positive.
    """
    return min(blocks_for(n, threads), max_blocks), threads


def blocks_2d(rows, cols, threads=THREADS_2D):
    """Launch configuration for a ``(rows, cols)`` array, one thread an element, columns along x: ``(grid, block)``.

    Neighbouring threads (x) take neighbouring columns, which lie next to each other in memory (chapter 4 measures why).
    Raises ValueError if a size is not positive.
    """
    if rows <= 0 or cols <= 0:
        raise ValueError(f"shape ({rows}, {cols}): a launch needs at least 1 row and 1 column")
    return ((cols + threads[0] - 1) // threads[0], (rows + threads[1] - 1) // threads[1]), threads


def blocks_3d(depth, rows, cols, threads=THREADS_2D):
    """Launch configuration for a ``(depth, rows, cols)`` array, depth along z: ``(grid, block)``.

    Raises ValueError if a size is not positive, or if depth or rows needs more blocks than a grid may have.
    """
    if depth > MAX_GRID[2]:
        raise ValueError(f"depth = {depth}: a grid has at most {MAX_GRID[2]} blocks along z; give z several each")
    if depth <= 0:
        raise ValueError(f"shape ({depth}, {rows}, {cols}): a launch needs at least 1 element along each axis")
    (grid_x, grid_y), _ = blocks_2d(rows, cols, threads)
    return (grid_x, grid_y, depth), (*threads, 1)


# --- one dimension ---------------------------------------------------------------------------------------------------


@cuda.jit
def vector_add_v1_one_each(x, y, out, n):
    """out[i] = x[i] + y[i], one thread an element.

    x, y, out: (n,) float32. n: int32. Launch: ``vector_add_v1_one_each[blocks_1d(n)](…)``.
    """
    i = cuda.grid(1)
    if i < n:  # the last block has threads past the end
        out[i] = x[i] + y[i]


@cuda.jit
def vector_add_v2_grid_stride(x, y, out, n):
    """out[i] = x[i] + y[i]; each thread takes elements one grid apart until the array ends.

    x, y, out: (n,) float32. n: int32. Any grid is right, one thread as well: the loop is the guard.
    Launch: ``vector_add_v2_grid_stride[blocks_grid_stride(n)](…)``. Source: Harris 2013, "CUDA Pro Tip: Write Flexible
    Kernels with Grid-Stride Loops".
    """
    for i in range(cuda.grid(1), n, cuda.gridsize(1)):
        out[i] = x[i] + y[i]


vector_add = vector_add_v2_grid_stride


def vector_add_reference(x, y):
    """NumPy reference of both versions: (n,) float32 each, returns (n,) float32."""
    return x + y


@cuda.jit
def saxpy(a, x, y, n):
    """y[i] = a * x[i] + y[i]: BLAS's "single-precision a times x plus y", in place.

    a: float32 (a Python float would make the sum a float64's, slow on most GPUs). x, y: (n,) float32. n: int32.
    Launch: ``saxpy[blocks_grid_stride(n)](…)``. Source: Lawson, Hanson, Kincaid, Krogh 1979 (BLAS).
    """
    for i in range(cuda.grid(1), n, cuda.gridsize(1)):
        y[i] = a * x[i] + y[i]


def saxpy_reference(a, x, y):
    """NumPy reference of :func:`saxpy`: float32 and two (n,) float32, returns a new (n,) float32."""
    return (np.float64(a) * x + y).astype(np.float32)


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


# --- two dimensions --------------------------------------------------------------------------------------------------


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


# --- three dimensions ------------------------------------------------------------------------------------------------


@cuda.jit
def scale_heads(x, scale, out, n_head, n_tokens, head_dim):
    """out[h, t, i] = x[h, t, i] * scale[h]: each attention head's numbers times a factor of its own.

    x, out: (n_head, n_tokens, head_dim) float32, C-contiguous; ``out`` may be ``x`` itself. scale: (n_head,) float32.
    n_head, n_tokens, head_dim: int32. Launch: ``scale_heads[blocks_3d(n_head, n_tokens, head_dim)](…)``.
    """
    i, t, h = cuda.grid(3)  # x, y, z: the last axis of the array is x, the first is z
    if h < n_head and t < n_tokens and i < head_dim:
        out[h, t, i] = x[h, t, i] * scale[h]


def scale_heads_reference(x, scale):
    """NumPy reference of :func:`scale_heads`: (n_head, n_tokens, head_dim) and (n_head,) float32."""
    return x * scale[:, None, None]
