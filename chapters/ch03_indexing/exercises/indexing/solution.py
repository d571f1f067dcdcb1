"""Exercise ch03/indexing: mirror a picture and roll an array, with any grid.

Edit between the marks only; the task is in README.md beside this file. Grade it: make grade EX=ch03/indexing
"""

import numpy as np
from numba import cuda


@cuda.jit
def mirror_kernel(image, out, rows, cols, channels):
    """out is the picture with left and right swapped: element (row, col, ch) is the one at (row, cols - 1 - col, ch).

    image, out: (rows * cols * channels,) float32, flat: element (row, col, ch) lies at (row * cols + col) * channels +
    ch. rows, cols, channels: int. Launched with a 1-D grid, of any size: a thread may have many elements, or none.
    """
    # --- your code begins ---
    for i in range(cuda.grid(1), rows * cols * channels, cuda.gridsize(1)):
        ch = i % channels
        col = i // channels % cols
        row = i // (channels * cols)
        out[i] = image[(row * cols + cols - 1 - col) * channels + ch]
    # --- your code ends ---


@cuda.jit
def roll_kernel(x, out, rows, cols, down, right):
    """out is x moved down and to the right; what leaves at one side comes in at the other: x[row, col] goes to
    out[(row + down) mod rows, (col + right) mod cols].

    x, out: (rows, cols) float32. rows, cols: int. down, right: int of any size; negative is up, and to the left.
    Launched with a 2-D grid, x along the columns, of any size along both axes.
    """
    # --- your code begins ---
    first_col, first_row = cuda.grid(2)
    step_col, step_row = cuda.gridsize(2)
    for row in range(first_row, rows, step_row):
        to_row = (row + down) % rows
        for col in range(first_col, cols, step_col):
            out[to_row, (col + right) % cols] = x[row, col]
    # --- your code ends ---


# What follows is given: it launches your kernels, with a grid that the grader chooses.


def mirror(image, blocks, threads):
    """The mirrored picture of ``image`` (rows, cols, channels) float32, by a launch of ``blocks`` times ``threads``."""
    rows, cols, channels = image.shape
    out = cuda.to_device(np.full(image.size, -7, np.float32))
    mirror_kernel[blocks, threads](cuda.to_device(image.reshape(-1)), out, rows, cols, channels)
    return out.copy_to_host().reshape(image.shape)


def roll(x, down, right, grid, block):
    """x (rows, cols) float32, rolled, by a launch of ``grid`` (blocks along x, along y) and ``block`` (threads)."""
    rows, cols = x.shape
    out = cuda.to_device(np.full(x.shape, -7, np.float32))
    roll_kernel[tuple(grid), tuple(block)](cuda.to_device(x), out, rows, cols, down, right)
    return out.copy_to_host()
