"""Two threads of one launch at one element of global memory, unordered, and at least one writes without an atomic."""

import numpy as np
from numba import cuda, int32

from .registry import bug, given, ints, zeros

BLOCK = 32
BINS = 8


@cuda.jit
def histogram(x, bins):
    i = cuda.grid(1)
    if i < x.size:
        bins[x[i] % BINS] += 1  # BUG


bug(histogram, "global-race", "bins", lambda: histogram[4, BLOCK](ints(100), zeros(BINS)),
    "Counting with += loses counts where two threads meet in a bin: cuda.atomic.add does not.")  # fmt: skip


@cuda.jit
def one_sum_for_all_blocks(x, out):
    partial = cuda.shared.array(BLOCK, int32)
    tid = cuda.threadIdx.x
    partial[tid] = x[cuda.grid(1)]
    cuda.syncthreads()
    if tid == 0:
        total = 0
        for k in range(BLOCK):
            total += partial[k]
        out[0] += total  # BUG


bug(one_sum_for_all_blocks, "global-race", "out", lambda: one_sum_for_all_blocks[4, BLOCK](ints(128), zeros(1)),
    "One thread a block, but several blocks, add to out[0] without an atomic.", index=(0,))  # fmt: skip


@cuda.jit
def stencil_in_place(x, n):
    i = cuda.grid(1)
    if 0 < i < n - 1:
        x[i] = (x[i - 1] + x[i + 1]) // 2  # BUG


bug(stencil_in_place, "global-race", "x", lambda: stencil_in_place[2, BLOCK](ints(50), 50),
    "The result replaces what the neighbours still have to read: write to a second array.")  # fmt: skip


@cuda.jit
def shift(source, target, n):
    i = cuda.grid(1)
    if i < n:
        target[i] = source[i]  # BUG


def shift_within_one_array():
    x = ints(65)
    shift[2, BLOCK](x[:64], x[1:], 64)


bug(shift, "global-race", ("source", "target"), shift_within_one_array,
    "The two arguments are views of one array, x[:64] and x[1:]: the kernel alone looks right.")  # fmt: skip


@cuda.jit
def in_place_with_a_barrier(x):
    i = cuda.grid(1)
    left = x[i - 1] if i > 0 else 0  # OTHER
    cuda.syncthreads()
    x[i] += left  # BUG


bug(in_place_with_a_barrier, "global-race", "x", lambda: in_place_with_a_barrier[3, BLOCK](ints(96)),
    "The barrier orders the threads of a block; the first thread's left neighbour is in another block.")  # fmt: skip


@cuda.jit
def place_read_beside_the_atomic(x, out, counter):
    i = cuda.grid(1)
    if x[i] % 3 == 0:
        cuda.atomic.add(counter, 0, 1)  # OTHER
        out[i] = counter[0]  # BUG


bug(place_read_beside_the_atomic, "global-race", "counter",
    lambda: place_read_beside_the_atomic[2, BLOCK](ints(64), zeros(64), zeros(1)),
    "The place is what the atomic returns; reading the counter again sees the others' counts.", index=(0,))  # fmt: skip


@cuda.jit
def last_block_reads_the_total(x, total, out):
    b = cuda.blockIdx.x
    cuda.atomic.add(total, 0, x[b])  # OTHER
    if b == cuda.gridDim.x - 1:
        out[0] = total[0]  # BUG


bug(last_block_reads_the_total, "global-race", "total",
    lambda: last_block_reads_the_total[8, 1](ints(8), zeros(1), zeros(1)),
    "The block with the highest number is not the last one to add.", index=(0,))  # fmt: skip


@cuda.jit
def maximum_by_comparing(x, best):
    i = cuda.grid(1)
    if x[i] > best[0]:  # OTHER
        best[0] = x[i]  # BUG


bug(maximum_by_comparing, "global-race", "best", lambda: maximum_by_comparing[2, BLOCK](ints(64), zeros(1)),
    "Between comparing and storing another thread may store a larger value: cuda.atomic.max.", index=(0,))  # fmt: skip


@cuda.jit
def pairs_that_wrap_round(x, n):
    i = cuda.grid(1)
    if 2 * i < n:
        a, b = 2 * i, (2 * i + 1) % n
        x[a] += 1  # OTHER
        x[b] += 2  # BUG


bug(pairs_that_wrap_round, "global-race", "x", lambda: pairs_that_wrap_round[1, BLOCK](ints(33), 33),
    "For an odd size the last pair wraps round to element 0, which belongs to the first.", index=(0,))  # fmt: skip


@cuda.jit
def clamped_in_the_last_block(x, out, n):
    i = min(cuda.grid(1), n - 1)
    out[i] = x[i]  # BUG


bug(clamped_in_the_last_block, "global-race", "out",
    lambda: clamped_in_the_last_block[3, BLOCK](ints(90), zeros(90), 90),
    "Clamping the index in the place of a guard: all spare threads of the last block write one element.",
    index=(89,))  # fmt: skip


@cuda.jit
def one_element_too_many_a_block(x, out):
    i = cuda.grid(1)
    out[i] = x[i]  # OTHER
    if cuda.threadIdx.x == 0 and i > 0:
        out[i - 1] = x[i] - x[i - 1]  # BUG


bug(one_element_too_many_a_block, "global-race", "out",
    lambda: one_element_too_many_a_block[3, BLOCK](ints(96), zeros(96)),
    "Each block also writes the last element of the block before it.")  # fmt: skip


@cuda.jit
def scratch_without_barrier(x, scratch, out):
    tid, first = cuda.threadIdx.x, cuda.blockIdx.x * BLOCK
    scratch[first + tid] = 2 * x[first + tid]  # OTHER
    out[first + tid] = scratch[first + (tid + 1) % BLOCK]  # BUG


bug(scratch_without_barrier, "global-race", "scratch",
    lambda: scratch_without_barrier[2, BLOCK](ints(64), zeros(64), zeros(64)),
    "Each block has its own part of the scratch array, but its threads exchange values without a barrier.")  # fmt: skip


@cuda.jit(device=True)
def add_to_segment(sums, segment, value):
    sums[segment] += value  # BUG


@cuda.jit
def segment_sums(x, segment, sums):
    i = cuda.grid(1)
    if i < x.size:
        add_to_segment(sums, segment[i], x[i])


bug(segment_sums, "global-race", "sums",
    lambda: segment_sums[1, BLOCK](ints(6), given(0, 1, 2, 3, 3, 4), zeros(5)),
    "The device function adds without an atomic, and two elements belong to one segment.", index=(3,))  # fmt: skip


@cuda.jit
def two_steps_in_one_launch(a, b, n):
    i = cuda.grid(1)
    for step in range(2):
        if 0 < i < n - 1 and step == 0:
            b[i] = a[i - 1] + a[i + 1]  # OTHER
        elif 0 < i < n - 1:
            a[i] = b[i - 1] + b[i + 1]  # BUG
        cuda.syncthreads()


bug(two_steps_in_one_launch, "global-race", ("a", "b"),
    lambda: two_steps_in_one_launch[3, BLOCK](ints(96), zeros(96), 96),
    "The second step needs what other blocks did in the first: syncthreads waits for one block only.")  # fmt: skip


@cuda.jit
def bytes_of_another_view(wide, narrow, out):
    i = cuda.grid(1)
    if i < wide.size:
        wide[i] = i  # OTHER
    out[i] = narrow[i]  # BUG


def one_array_as_two_types():
    x = ints(2 * BLOCK)
    bytes_of_another_view[1, 2 * BLOCK](x.view(np.int64), x, zeros(2 * BLOCK))


bug(bytes_of_another_view, "global-race", ("narrow", "wide"), one_array_as_two_types,
    "The arguments are one array, as int64 and as int32: element i of one is not element i of the other.")  # fmt: skip


@cuda.jit
def row_sums(x, sums):
    col, row = cuda.grid(2)
    if row < x.shape[0] and col < x.shape[1]:
        sums[row] += x[row, col]  # BUG


bug(row_sums, "global-race", "sums", lambda: row_sums[(2, 1), (8, 4)](ints(4, 12), zeros(4)),
    "One thread an element adds to one sum a row, within a block and from block to block.")  # fmt: skip
