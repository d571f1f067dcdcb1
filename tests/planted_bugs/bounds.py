"""Indices outside of an array: beyond its end, and before its start, where Numba silently counts from the end."""

import numpy as np
from numba import cuda, int32

from common import ptx

from .registry import bug, given, ints, zeros

BLOCK = 32
BINS = 8

# --- beyond the end -------------------------------------------------------------------------------------------------


@cuda.jit
def no_guard(x, out):
    i = cuda.grid(1)
    out[i] = 2 * x[i]  # BUG


bug(no_guard, "out-of-bounds", "x", lambda: no_guard[2, 8](ints(10), zeros(16)),
    "The last block has more threads than elements are left, and no guard sends them away.")  # fmt: skip


@cuda.jit
def inclusive_guard(out, n):
    i = cuda.grid(1)
    if i <= n:
        out[i] = i * i  # BUG


bug(inclusive_guard, "out-of-bounds", "out", lambda: inclusive_guard[4, BLOCK](zeros(100), 100),
    "The guard says <= where the last element is n - 1.", index=(100,))  # fmt: skip


@cuda.jit
def right_neighbour(x, out, n):
    i = cuda.grid(1)
    if i < n:
        out[i] = x[i + 1] - x[i]  # BUG


bug(right_neighbour, "out-of-bounds", "x", lambda: right_neighbour[2, BLOCK](ints(64), zeros(64), 64),
    "The guard is for i, but the element read is i + 1: the last thread of the last block is wrong.",
    index=(64,))  # fmt: skip


@cuda.jit(device=True)
def sum_of_three(values, i):
    return values[i - 1] + values[i] + values[i + 1]  # BUG


@cuda.jit
def smooth(x, out, n):
    i = cuda.grid(1)
    if 0 < i < n:
        out[i] = sum_of_three(x, i)


bug(smooth, "out-of-bounds", ("x", "values"), lambda: smooth[2, BLOCK](ints(50), zeros(50), 50),
    "The guard lets the last element through, and the device function reads its right neighbour.",
    index=(50,))  # fmt: skip


@cuda.jit
def second_round(x, out):
    i = cuda.grid(1)
    for r in range(2):
        out[i] += x[r * cuda.gridsize(1) + i]  # BUG


bug(second_round, "out-of-bounds", "x", lambda: second_round[1, BLOCK](ints(56), zeros(BLOCK)),
    "Each thread takes two elements, and nothing asks whether the second one is still there.")  # fmt: skip


@cuda.jit
def pairs_of_an_odd_size(x, out, n):
    i = cuda.grid(1)
    if 2 * i < n:
        out[i] = x[2 * i] + x[2 * i + 1]  # BUG


bug(pairs_of_an_odd_size, "out-of-bounds", "x", lambda: pairs_of_an_odd_size[1, BLOCK](ints(33), zeros(17), 33),
    "The guard looks at the first of a pair: for an odd size the last pair has no second.", index=(33,))  # fmt: skip


@cuda.jit
def swapped_axes(x, out):
    col, row = cuda.grid(2)
    if row < out.shape[0] and col < out.shape[1]:
        out[row, col] = x[col, row]  # BUG


bug(swapped_axes, "out-of-bounds", "x", lambda: swapped_axes[1, (16, 8)](ints(8, 12), zeros(8, 12)),
    "Row and column are swapped in an array that is not square: in range in one axis, not in the other.")  # fmt: skip


@cuda.jit
def on_to_the_next_row(x, out):
    col, row = cuda.grid(2)
    if row < x.shape[0] - 1 and col < x.shape[1]:
        out[row, col] = x[row, col + 1] - x[row, col]  # BUG


bug(on_to_the_next_row, "out-of-bounds", "x", lambda: on_to_the_next_row[1, (16, 8)](ints(8, 12), zeros(8, 12)),
    "Past the end of a row begins the next one: the address is in the array, the column is not.")  # fmt: skip


@cuda.jit
def edge_of_the_tile(x, out):
    tile = cuda.shared.array(BLOCK, int32)
    tid, i = cuda.threadIdx.x, cuda.grid(1)
    tile[tid] = x[i]
    cuda.syncthreads()
    out[i] = tile[tid + 1] - tile[tid]  # BUG


bug(edge_of_the_tile, "out-of-bounds", "tile", lambda: edge_of_the_tile[2, BLOCK](ints(64), zeros(64)),
    "The tile has no place for the right neighbour of the last thread.", index=(BLOCK,))  # fmt: skip


@cuda.jit
def bytes_for_elements(x, out):
    buffer = cuda.shared.array(0, int32)
    tid = cuda.threadIdx.x
    buffer[tid] = x[tid]  # BUG
    cuda.syncthreads()
    out[tid] = buffer[cuda.blockDim.x - 1 - tid]  # OTHER


bug(bytes_for_elements, "out-of-bounds", "buffer",
    lambda: bytes_for_elements[1, BLOCK, 0, BLOCK](ints(BLOCK), zeros(BLOCK)),
    "The launch asks for as many bytes of dynamic shared memory as there are elements of 4 bytes.")  # fmt: skip


@cuda.jit
def window_of_four(x, out, width):
    window = cuda.local.array(4, int32)
    i = cuda.grid(1)
    for k in range(width):
        window[k] = x[i + k]  # BUG
    out[i] = window[0] + window[1] + window[2] + window[3]


bug(window_of_four, "out-of-bounds", "window",
    lambda: window_of_four[1, BLOCK](ints(BLOCK + 4), zeros(BLOCK), 5),
    "The local array holds four values and the loop, whose bound comes from the caller, fills five.",
    index=(4,))  # fmt: skip


@cuda.jit
def one_bin_too_few(x, bins):
    i = cuda.grid(1)
    if i < x.size:
        cuda.atomic.add(bins, x[i] // 10, 1)  # BUG


bug(one_bin_too_few, "out-of-bounds", "bins", lambda: one_bin_too_few[3, BLOCK](ints(81), zeros(BINS)),
    "The values go up to 80, which belongs to a ninth bin: an atomic outside of the array.", index=(BINS,))  # fmt: skip


@cuda.jit
def past_the_view(x, out, n):
    i = cuda.grid(1)
    if i < n:
        out[i] = x[i] + x[i + 1]  # BUG


bug(past_the_view, "out-of-bounds", "x", lambda: past_the_view[1, BLOCK](ints(64)[:BLOCK], zeros(BLOCK), BLOCK),
    "The argument is the first half of an array: the element behind it exists and belongs to somebody else.",
    index=(BLOCK,))  # fmt: skip


@cuda.jit
def search_falls_off(values, keys, out):
    i = cuda.grid(1)
    low, high = 0, values.size
    while low < high:
        middle = (low + high) // 2
        if values[middle] < keys[i]:
            low = middle + 1
        else:
            high = middle
    out[i] = 1 if values[low] == keys[i] else 0  # BUG


bug(search_falls_off, "out-of-bounds", "values",
    lambda: search_falls_off[1, 4](ints(40), given(3, 39, 99, 0), zeros(4)),
    "For a key above all values the binary search ends behind the last element, and reads there.",
    index=(40,))  # fmt: skip


@cuda.jit(device=True)
def first_not_below(values, limit):
    for k in range(values.size + 1):
        if values[k] >= limit:  # BUG
            return k
    return -1


@cuda.jit
def search_one_too_far(values, limits, out):
    i = cuda.grid(1)
    if i < limits.size:
        out[i] = first_not_below(values, limits[i])


bug(search_one_too_far, "out-of-bounds", "values",
    lambda: search_one_too_far[1, BLOCK](ints(40), given(5, 0, 99), zeros(3)),
    "The loop of the device function has one round too many, which only a limit above all values reaches.",
    index=(40,), unchecked=True)  # fmt: skip


@cuda.jit
def row_as_a_view(x, out):
    i = cuda.grid(1)
    if i < x.shape[0]:
        row = x[i]
        out[i] = row[0] + row[row.size]  # BUG


bug(row_as_a_view, "out-of-bounds", ("row", "x"), lambda: row_as_a_view[1, BLOCK](ints(6, 5), zeros(6)),
    "row.size is one too far; in the whole array there is an element, but it is the next row's.",
    unchecked=True)  # fmt: skip


@cuda.jit
def four_at_once(x, out, n):
    i = 4 * cuda.grid(1)
    if i < n:
        a, b, c, d = ptx.load_float4(x, i)  # BUG
        out[i // 4] = a + b + c + d


bug(four_at_once, "out-of-bounds", "x",
    lambda: four_at_once[1, BLOCK](zeros(42, dtype=np.float32), zeros(11, dtype=np.float32), 42),
    "A load of 16 bytes reads four elements, and for a size of 42 the last one has two.")  # fmt: skip


# --- before the start -----------------------------------------------------------------------------------------------


@cuda.jit
def left_neighbour(x, out, n):
    i = cuda.grid(1)
    if i < n:
        out[i] = x[i] - x[i - 1]  # BUG


bug(left_neighbour, "negative-index", "x", lambda: left_neighbour[2, BLOCK](ints(50), zeros(50), 50),
    "The first thread has no left neighbour: index -1 is the last element, without a word.", index=(-1,))  # fmt: skip


@cuda.jit
def row_above(x, out):
    col, row = cuda.grid(2)
    if row < x.shape[0] and col < x.shape[1]:
        out[row, col] = x[row, col] - x[row - 1, col]  # BUG


bug(row_above, "negative-index", "x", lambda: row_above[1, (8, 8)](ints(7, 5), zeros(7, 5)),
    "The top row has no row above it: row -1 is the bottom row.")  # fmt: skip


@cuda.jit
def left_of_the_tile(x, out):
    tile = cuda.shared.array(BLOCK, int32)
    tid, i = cuda.threadIdx.x, cuda.grid(1)
    tile[tid] = x[i]
    cuda.syncthreads()
    out[i] = tile[tid] - tile[tid - 1]  # BUG


bug(left_of_the_tile, "negative-index", "tile", lambda: left_of_the_tile[2, BLOCK](ints(64), zeros(64)),
    "The left neighbour of the block's first element is in another block, not at tile[-1].", index=(-1,))  # fmt: skip


@cuda.jit
def causal_filter(x, out, n):
    i = cuda.grid(1)
    if i < n:
        total = 0
        for k in range(3):
            total += x[i - k] * (k + 1)  # BUG
        out[i] = total


bug(causal_filter, "negative-index", "x", lambda: causal_filter[2, BLOCK](ints(60), zeros(60), 60),
    "From its second round on, the loop looks before the start for the first elements.")  # fmt: skip


@cuda.jit
def last_by_minus_one(x, out):
    i = cuda.grid(1)
    if i < out.size:
        out[i] = x[i] - x[-1]  # BUG


bug(last_by_minus_one, "negative-index", "x", lambda: last_by_minus_one[1, BLOCK](ints(20), zeros(20)),
    "Python's -1 for the last element is not an index in CUDA C: write x[x.size - 1].", index=(-1,))  # fmt: skip


@cuda.jit
def parent_of_the_root(parent, depth, out):
    i = cuda.grid(1)
    if i < parent.size:
        out[i] = depth[parent[i]] + 1  # BUG


bug(parent_of_the_root, "negative-index", "depth",
    lambda: parent_of_the_root[1, BLOCK](given(-1, 0, 0, 1, 1, 2), ints(6), zeros(6)),
    "The root's parent is marked by -1, and nothing asks before that becomes an index.", index=(-1,))  # fmt: skip


@cuda.jit
def ring_of_four(x, out):
    ring = cuda.local.array(4, int32)
    i = cuda.grid(1)
    for k in range(4):
        ring[k] = x[4 * i + k]
    total = 0
    for k in range(4):
        total += ring[k] * ring[k - 1]  # BUG
    out[i] = total


bug(ring_of_four, "negative-index", "ring", lambda: ring_of_four[1, 8](ints(32), zeros(8)),
    "A ring needs (k - 1) % 4: that -1 finds the last element is luck.", index=(-1,))  # fmt: skip


@cuda.jit(device=True)
def count_one(bins, value, low):
    cuda.atomic.add(bins, value - low, 1)  # BUG


@cuda.jit
def below_the_first_bin(x, bins, low):
    i = cuda.grid(1)
    if i < x.size and x[i] < low + BINS:
        count_one(bins, x[i], low)


bug(below_the_first_bin, "negative-index", "bins",
    lambda: below_the_first_bin[1, BLOCK](given(5, 4, 9, 12, 30), zeros(BINS), 5),
    "Values above the last bin are left out, the value below the first bin is counted in the last.",
    index=(-1,))  # fmt: skip
