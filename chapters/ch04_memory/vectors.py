"""Chapter 4, 16 bytes at a time in rows of any length: device functions for kernels of later chapters.

A row-major matrix whose rows are a multiple of 4 floats long has every row, and every fourth element of it, at a
multiple of 16 bytes: four elements are one load, and all four are inside or all outside. In other matrices the rows
begin anywhere, and elements are read one by one: correct, slower. The test costs next to nothing, since it comes out
alike for all threads.
"""

from numba import cuda

from common.ptx import load_float4, store_float4


@cuda.jit(device=True)
def element_or(x, row, col, cols, fill):
    """x[row, col], or ``fill`` if col is outside of 0 … cols - 1 (the row is inside). x: (rows, cols)."""
    if col < cols:
        return x[row, col]
    return fill


@cuda.jit(device=True)
def load_row4(x, row, col, cols, fill):
    """x[row, col : col + 4] as four float32, ``fill`` for what lies behind the row's end.

    x: (rows, cols) float32, C-contiguous, beginning at a multiple of 16 bytes; the row is inside. col: a multiple of 4.
    fill: float32.
    """
    if cols % 4 == 0:
        if col < cols:
            return load_float4(x, (row, col))
        return fill, fill, fill, fill
    return (
        element_or(x, row, col, cols, fill),
        element_or(x, row, col + 1, cols, fill),
        element_or(x, row, col + 2, cols, fill),
        element_or(x, row, col + 3, cols, fill),
    )


@cuda.jit(device=True)
def store_row4(x, row, col, cols, a, b, c, d):
    """x[row, col : col + 4] = a, b, c, d; what lies behind the row's end is not written. Otherwise as load_row4."""
    if cols % 4 == 0:
        if col < cols:
            store_float4(x, (row, col), a, b, c, d)
    else:
        if col < cols:
            x[row, col] = a
        if col + 1 < cols:
            x[row, col + 1] = b
        if col + 2 < cols:
            x[row, col + 2] = c
        if col + 3 < cols:
            x[row, col + 3] = d


@cuda.jit(device=True)
def load_vector4(x, i, n, fill):
    """x[i : i + 4] of an (n,) float32 array as four float32, ``fill`` behind its end. i: a multiple of 4.

    x begins at a multiple of 16 bytes, so that only the last four may have to be read one by one.
    """
    if i + 3 < n:
        return load_float4(x, i)
    a = x[i] if i < n else fill
    b = x[i + 1] if i + 1 < n else fill
    c = x[i + 2] if i + 2 < n else fill
    return a, b, c, fill
