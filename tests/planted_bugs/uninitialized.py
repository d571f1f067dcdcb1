"""Reads of memory that nothing has written: shared, local, and device arrays fresh from cuda.device_array."""

import numpy as np
from numba import cuda, int32

from .registry import bug, ints, zeros

BLOCK = 32
TWO_WARPS = 64
THREE_HALVES = 48
BINS = 8
TILE = 8
PADDED = TILE + 1

# --- shared memory --------------------------------------------------------------------------------------------------


@cuda.jit
def bins_not_zeroed(x, out):
    bins = cuda.shared.array(BINS, int32)
    tid = cuda.threadIdx.x
    cuda.atomic.add(bins, x[tid] % BINS, 1)  # BUG
    cuda.syncthreads()
    if tid < BINS:
        out[tid] = bins[tid]


bug(bins_not_zeroed, "uninitialized-shared", "bins", lambda: bins_not_zeroed[1, BLOCK](ints(BLOCK), zeros(BINS)),
    "Shared memory does not begin as zeros: the counts are added to whatever was there.")  # fmt: skip


@cuda.jit
def tile_of_the_last_block(x, out, n):
    tile = cuda.shared.array(BLOCK, int32)
    tid, i = cuda.threadIdx.x, cuda.grid(1)
    if i < n:
        tile[tid] = x[i]
    cuda.syncthreads()
    if i < n:
        out[i] = tile[tid] + tile[(tid + 1) % BLOCK]  # BUG


bug(tile_of_the_last_block, "uninitialized-shared", "tile",
    lambda: tile_of_the_last_block[2, BLOCK](ints(51), zeros(51), 51),
    "In the last block a part of the tile stays empty, and the last element's neighbour lies in it.",
    index=(19,))  # fmt: skip


@cuda.jit
def partials_of_absent_warps(x, out):
    partial = cuda.shared.array(32, int32)
    tid = cuda.threadIdx.x
    if tid % 32 == 0:
        partial[tid // 32] = x[tid]
    cuda.syncthreads()
    if tid < 32:
        value = partial[tid]  # BUG
        out[tid] = value


bug(partials_of_absent_warps, "uninitialized-shared", "partial",
    lambda: partials_of_absent_warps[1, TWO_WARPS](ints(TWO_WARPS), zeros(32)),
    "There is a place for 32 warps, two of them exist, and the first warp reads all 32 places.")  # fmt: skip


@cuda.jit
def table_of_the_first_block(x, out):
    table = cuda.shared.array(BLOCK, int32)
    tid, i = cuda.threadIdx.x, cuda.grid(1)
    if cuda.blockIdx.x == 0:
        table[tid] = tid * tid
    cuda.syncthreads()
    out[i] = x[i] + table[BLOCK - 1 - tid]  # BUG


bug(table_of_the_first_block, "uninitialized-shared", "table",
    lambda: table_of_the_first_block[2, BLOCK](ints(64), zeros(64)),
    "Every block has shared memory of its own: what the first block fills, the second never sees.")  # fmt: skip


@cuda.jit(device=True)
def sum_of_64(partial):
    tid = cuda.threadIdx.x
    stride = TWO_WARPS // 2
    while stride > 0:
        if tid < stride:
            partial[tid] += partial[tid + stride]  # BUG
        cuda.syncthreads()
        stride //= 2
    return partial[0]


@cuda.jit
def block_of_48(x, out):
    partial = cuda.shared.array(TWO_WARPS, int32)
    partial[cuda.threadIdx.x] = x[cuda.threadIdx.x]
    cuda.syncthreads()
    out[cuda.threadIdx.x] = sum_of_64(partial)


bug(block_of_48, "uninitialized-shared", "partial",
    lambda: block_of_48[1, THREE_HALVES](ints(THREE_HALVES), zeros(THREE_HALVES)),
    "The tree is for 64 threads; with 48, a quarter of what it adds was never written.")  # fmt: skip


@cuda.jit
def padding_is_read(x, out):
    tile = cuda.shared.array((TILE, PADDED), int32)
    tx, ty = cuda.threadIdx.x, cuda.threadIdx.y
    tile[ty, tx] = x[ty, tx]
    cuda.syncthreads()
    if tx == 0:
        total = 0
        for k in range(PADDED):
            total += tile[ty, k]  # BUG
        out[ty] = total


bug(padding_is_read, "uninitialized-shared", "tile",
    lambda: padding_is_read[1, (TILE, TILE)](ints(TILE, TILE), zeros(TILE)),
    "The ninth column only pads the tile against bank conflicts; nothing is in it.")  # fmt: skip


@cuda.jit
def running_totals(x, out):
    total = cuda.shared.array(BLOCK, int32)
    tid = cuda.threadIdx.x
    for k in range(3):
        total[tid] += x[k * BLOCK + tid]  # BUG
    cuda.syncthreads()
    out[tid] = total[BLOCK - 1 - tid]


bug(running_totals, "uninitialized-shared", "total",
    lambda: running_totals[1, BLOCK](ints(3 * BLOCK), zeros(BLOCK)),
    "Each thread adds to its own element, and the first round finds whatever was there.")  # fmt: skip


@cuda.jit
def read_before_written(x, out):
    tile = cuda.shared.array(BLOCK, int32)
    tid = cuda.threadIdx.x
    before = tile[tid]  # BUG
    tile[tid] = x[tid]
    cuda.syncthreads()
    out[tid] = before + tile[BLOCK - 1 - tid]


bug(read_before_written, "uninitialized-shared", "tile",
    lambda: read_before_written[1, BLOCK](ints(BLOCK), zeros(BLOCK)),
    "The two lines are in the wrong order; that the element is written later does not help.")  # fmt: skip


# --- local memory ---------------------------------------------------------------------------------------------------


@cuda.jit
def accumulator_not_zeroed(x, out):
    acc = cuda.local.array(2, int32)
    i = cuda.grid(1)
    for k in range(4):
        acc[k % 2] += x[4 * i + k]  # BUG
    out[i] = acc[0] - acc[1]


bug(accumulator_not_zeroed, "uninitialized-local", "acc",
    lambda: accumulator_not_zeroed[1, BLOCK](ints(4 * BLOCK), zeros(BLOCK)),
    "A local array does not begin as zeros.")  # fmt: skip


@cuda.jit
def window_partly_filled(x, out):
    window = cuda.local.array(4, int32)
    i = cuda.grid(1)
    for k in range(3):
        window[k] = x[i + k]
    total = 0
    for k in range(4):
        total += window[k]  # BUG
    out[i] = total


bug(window_partly_filled, "uninitialized-local", "window",
    lambda: window_partly_filled[1, BLOCK](ints(BLOCK + 3), zeros(BLOCK)),
    "Three of four elements are filled, and all four are read.", index=(3,))  # fmt: skip


@cuda.jit
def tail_not_filled(x, out, n):
    window = cuda.local.array(4, int32)
    i = cuda.grid(1)
    for k in range(4):
        if i + k < n:
            window[k] = x[i + k]
    if i < n:
        out[i] = window[0] + window[1] + window[2] + window[3]  # BUG


bug(tail_not_filled, "uninitialized-local", "window",
    lambda: tail_not_filled[2, BLOCK](ints(60), zeros(60), 60),
    "For the last three elements the guard skips the loads, and nothing puts zeros there.")  # fmt: skip


@cuda.jit(device=True)
def largest_of_four(values):
    best = values[0]
    for k in range(1, 4):
        best = max(best, values[k])  # BUG
    return best


@cuda.jit
def odd_places_only(x, out):
    four = cuda.local.array(4, int32)
    i = cuda.grid(1)
    four[0] = x[i]
    for k in range(1, 4, 2):
        four[k] = x[i + k]
    out[i] = largest_of_four(four)


bug(odd_places_only, "uninitialized-local", ("four", "values"),
    lambda: odd_places_only[1, BLOCK](ints(BLOCK + 4), zeros(BLOCK)),
    "Element 2 is left out where the array is filled, and read in a device function.", index=(2,))  # fmt: skip


@cuda.jit(device=True)
def sum_of_digits(value):
    digits = cuda.local.array(4, int32)
    for k in range(3):
        digits[k] = value % 10
        value //= 10
    total = 0
    for k in range(4):
        total += digits[k]  # BUG
    return total


@cuda.jit
def local_in_a_device_function(x, out):
    i = cuda.grid(1)
    if i < x.size:
        out[i] = sum_of_digits(x[i])


bug(local_in_a_device_function, "uninitialized-local", "digits",
    lambda: local_in_a_device_function[1, BLOCK](ints(20), zeros(20)),
    "The device function fills three digits of its local array and adds four.", index=(3,))  # fmt: skip


@cuda.jit
def table_in_the_first_block(x, out):
    table = cuda.local.array(2, int32)
    i = cuda.grid(1)
    if cuda.blockIdx.x == 0:
        table[0] = 1
        table[1] = 3
    out[i] = table[x[i] % 2]  # BUG


bug(table_in_the_first_block, "uninitialized-local", "table",
    lambda: table_in_the_first_block[2, BLOCK](ints(64), zeros(64)),
    "A thread of the second block has a table of its own, which it does not fill.")  # fmt: skip


# --- device arrays --------------------------------------------------------------------------------------------------


@cuda.jit
def sum_into_a_fresh_array(x, total):
    i = cuda.grid(1)
    if i < x.size:
        cuda.atomic.add(total, 0, x[i])  # BUG


bug(sum_into_a_fresh_array, "uninitialized-global", "total",
    lambda: sum_into_a_fresh_array[2, BLOCK](ints(50), cuda.device_array(1, np.int32)),
    "cuda.device_array is not filled with zeros: the sum begins at whatever was there.", index=(0,))  # fmt: skip


@cuda.jit
def add_to_a_fresh_array(x, out):
    i = cuda.grid(1)
    if i < x.size:
        out[i] += x[i]  # BUG


bug(add_to_a_fresh_array, "uninitialized-global", "out",
    lambda: add_to_a_fresh_array[2, BLOCK](ints(50), cuda.device_array_like(ints(50))),
    "The first += needs something to add to: cuda.to_device(np.zeros(n)).")  # fmt: skip


@cuda.jit
def pairwise_maximum(x, out, n):
    i = cuda.grid(1)
    if 2 * i + 1 < n:
        out[i] = max(x[2 * i], x[2 * i + 1])


@cuda.jit
def maximum_of_the_rest(x, out):
    i = cuda.grid(1)
    if 2 * i < x.size:
        right = x[2 * i + 1] if 2 * i + 1 < x.size else 0
        out[i] = max(x[2 * i], right)  # BUG


def two_launches():
    half = cuda.device_array(17, np.int32)
    pairwise_maximum[1, BLOCK](ints(33), half, 33)
    maximum_of_the_rest[1, BLOCK](half, zeros(9))


bug(maximum_of_the_rest, "uninitialized-global", "x", two_launches,
    "The launch before leaves out the odd element at the end, and this one reads it.", index=(16,))  # fmt: skip


@cuda.jit
def double_all(x, out):
    i = cuda.grid(1)
    if i < x.size:
        out[i] = 2 * x[i]  # BUG


def filled_by_half():
    x = cuda.device_array(64, np.int32)
    x[:BLOCK].copy_to_device(np.arange(BLOCK, dtype=np.int32))
    double_all[2, BLOCK](x, zeros(64))


bug(double_all, "uninitialized-global", "x", filled_by_half,
    "The host fills a view of the first half, and the kernel reads the second half, too.")  # fmt: skip


@cuda.jit
def fill_columns(x, out):
    col, row = cuda.grid(2)
    if row < x.shape[0] and col < x.shape[1]:
        out[row, col] = x[row, col]


@cuda.jit
def sum_rows(x, out):
    row = cuda.grid(1)
    if row < x.shape[0]:
        total = 0
        for col in range(x.shape[1]):
            total += x[row, col]  # BUG
        out[row] = total


def padded_rows():
    padded = cuda.device_array((6, 8), np.int32)
    fill_columns[1, (8, 8)](ints(6, 7), padded)
    sum_rows[1, 8](padded, zeros(6))


bug(sum_rows, "uninitialized-global", "x", padded_rows,
    "The rows were made longer than the data, and the sum goes over the padding as well.")  # fmt: skip
