"""Two threads of a block at one element of shared memory with no barrier between them, and at least one writes."""

import numpy as np
from numba import cuda, float64, int32

from .registry import bug, ints, zeros

WARP = 32
BLOCK = 64
WITH_HALO = BLOCK + 2
FULL = 0xFFFFFFFF
BINS = 8


@cuda.jit
def reverse_without_barrier(x, out):
    tile = cuda.shared.array(BLOCK, int32)
    tid = cuda.threadIdx.x
    tile[tid] = x[tid]  # OTHER
    out[tid] = tile[BLOCK - 1 - tid]  # BUG


bug(reverse_without_barrier, "shared-race", "tile",
    lambda: reverse_without_barrier[1, BLOCK](ints(BLOCK), zeros(BLOCK)),
    "The barrier between writing the tile and reading another thread's element is missing.")  # fmt: skip


@cuda.jit
def one_barrier_a_tile(x, out):
    tile = cuda.shared.array(BLOCK, int32)
    tid = cuda.threadIdx.x
    total = 0
    for t in range(2):
        tile[tid] = x[t * BLOCK + tid]  # BUG
        cuda.syncthreads()
        for k in range(BLOCK):
            total += tile[k] * (k + 1)  # OTHER
    out[tid] = total


bug(one_barrier_a_tile, "shared-race", "tile",
    lambda: one_barrier_a_tile[1, BLOCK](ints(2 * BLOCK), zeros(BLOCK)),
    "In the second round a fast thread loads the next tile while a slow one still reads this one.")  # fmt: skip


@cuda.jit(device=True)
def block_sum(value, partial):
    tid = cuda.threadIdx.x
    partial[tid] = value  # BUG
    cuda.syncthreads()
    stride = BLOCK // 2
    while stride > 0:
        if tid < stride:
            partial[tid] += partial[tid + stride]
        cuda.syncthreads()
        stride //= 2
    return partial[0]  # OTHER


@cuda.jit
def partial_0_reread(x, out):
    partial = cuda.shared.array(BLOCK, int32)
    tid = cuda.threadIdx.x
    total = block_sum(x[tid], partial)
    squares = block_sum(x[tid] * x[tid], partial)
    out[tid] = squares - total


bug(partial_0_reread, "shared-race", "partial", lambda: partial_0_reread[1, BLOCK](ints(BLOCK), zeros(BLOCK)),
    "The second sum of the block overwrites partial[0] while some threads still read the first sum.")  # fmt: skip


@cuda.jit
def double_buffer_one_barrier_short(x, out):
    buffer = cuda.shared.array((2, BLOCK), int32)
    tid = cuda.threadIdx.x
    buffer[0, tid] = x[tid]
    cuda.syncthreads()
    for r in range(4):
        buffer[(r + 1) % 2, tid] = buffer[r % 2, (tid + 1) % BLOCK] + r  # BUG
        if r % 2 == 1:
            cuda.syncthreads()
    out[tid] = buffer[0, tid]


bug(double_buffer_one_barrier_short, "shared-race", "buffer",
    lambda: double_buffer_one_barrier_short[1, BLOCK](ints(BLOCK), zeros(BLOCK)),
    "Two buffers save one of two barriers a round, not three of four: every round needs one.")  # fmt: skip


@cuda.jit
def scan_in_place(x, out):
    buffer = cuda.shared.array(BLOCK, int32)
    tid = cuda.threadIdx.x
    buffer[tid] = x[tid]
    cuda.syncthreads()
    step = 1
    while step < BLOCK:
        if tid >= step:
            buffer[tid] += buffer[tid - step]  # BUG
        cuda.syncthreads()
        step *= 2
    out[tid] = buffer[tid]


bug(scan_in_place, "shared-race", "buffer", lambda: scan_in_place[1, BLOCK](ints(BLOCK), zeros(BLOCK)),
    "Within one step, one thread adds to an element that another one reads.")  # fmt: skip


@cuda.jit
def warp_sum_without_syncwarp(x, out):
    partial = cuda.shared.array(WARP, int32)
    tid = cuda.threadIdx.x
    partial[tid] = x[tid]
    cuda.syncwarp()
    stride = WARP // 2
    while stride > 0:
        if tid < stride:
            partial[tid] += partial[tid + stride]  # BUG
        stride //= 2
    if tid == 0:
        out[0] = partial[0]


bug(warp_sum_without_syncwarp, "shared-race", "partial",
    lambda: warp_sum_without_syncwarp[1, WARP](ints(WARP), zeros(1)),
    "Lanes of a warp have not run in lockstep since Volta: each step needs a syncwarp.")  # fmt: skip


@cuda.jit
def syncwarp_for_two_warps(x, out):
    tile = cuda.shared.array(BLOCK, int32)
    tid = cuda.threadIdx.x
    tile[tid] = x[tid]  # OTHER
    cuda.syncwarp()
    out[tid] = tile[(tid + 1) % BLOCK]  # BUG


bug(syncwarp_for_two_warps, "shared-race", "tile",
    lambda: syncwarp_for_two_warps[1, BLOCK](ints(BLOCK), zeros(BLOCK)),
    "A syncwarp orders the lanes of one warp; lane 31 reads what the next warp writes.")  # fmt: skip


@cuda.jit
def shuffle_for_barrier(x, out):
    tile = cuda.shared.array(WARP, int32)
    tid = cuda.threadIdx.x
    tile[tid] = x[tid]  # OTHER
    right = cuda.shfl_xor_sync(FULL, x[tid], 1)
    out[tid] = tile[tid ^ 1] - right  # BUG


bug(shuffle_for_barrier, "shared-race", "tile", lambda: shuffle_for_barrier[1, WARP](ints(WARP), zeros(WARP)),
    "A shuffle exchanges registers and does not order memory.")  # fmt: skip


@cuda.jit
def syncwarp_of_half_a_warp(x, out):
    tile = cuda.shared.array(WARP, int32)
    tid = cuda.threadIdx.x
    tile[tid] = x[tid]  # OTHER
    if tid < 16:
        cuda.syncwarp(0xFFFF)
    else:
        cuda.syncwarp(0xFFFF0000)
    out[tid] = tile[WARP - 1 - tid]  # BUG


bug(syncwarp_of_half_a_warp, "shared-race", "tile",
    lambda: syncwarp_of_half_a_warp[1, WARP](ints(WARP), zeros(WARP)),
    "The halves of the warp wait each for itself, and then read each other's elements.")  # fmt: skip


@cuda.jit
def all_winners_write(x, out, limit):
    winner = cuda.shared.array(1, int32)
    tid = cuda.threadIdx.x
    if tid == 0:
        winner[0] = -1
    cuda.syncthreads()
    if x[tid] > limit:
        winner[0] = tid  # BUG
    cuda.syncthreads()
    out[tid] = winner[0]


bug(all_winners_write, "shared-race", "winner",
    lambda: all_winners_write[1, BLOCK](ints(BLOCK), zeros(BLOCK), 60),
    "Several threads write different values to one element: which one stays is chance.", index=(0,))  # fmt: skip


@cuda.jit
def shared_histogram(x, out):
    bins = cuda.shared.array(BINS, int32)
    tid = cuda.threadIdx.x
    if tid < BINS:
        bins[tid] = 0
    cuda.syncthreads()
    bins[x[tid] % BINS] += 1  # BUG
    cuda.syncthreads()
    if tid < BINS:
        out[tid] = bins[tid]


bug(shared_histogram, "shared-race", "bins", lambda: shared_histogram[1, BLOCK](ints(BLOCK), zeros(BINS)),
    "Counting with += loses counts where two threads meet in a bin: cuda.atomic.add does not.")  # fmt: skip


@cuda.jit
def zeroed_too_late(x, out):
    bins = cuda.shared.array(BINS, int32)
    tid = cuda.threadIdx.x
    if tid < BINS:
        bins[tid] = 0  # OTHER
    cuda.atomic.add(bins, (x[tid] + 1) % BINS, 1)  # BUG
    cuda.syncthreads()
    if tid < BINS:
        out[tid] = bins[tid]


bug(zeroed_too_late, "shared-race", "bins", lambda: zeroed_too_late[1, BLOCK](ints(BLOCK), zeros(BINS)),
    "No barrier between zeroing and counting: an atomic does not protect from a plain write.")  # fmt: skip


@cuda.jit
def sum_read_too_early(x, out):
    total = cuda.shared.array(1, int32)
    tid = cuda.threadIdx.x
    if tid == 0:
        total[0] = 0
    cuda.syncthreads()
    cuda.atomic.add(total, 0, x[tid])  # OTHER
    out[tid] = total[0]  # BUG


bug(sum_read_too_early, "shared-race", "total", lambda: sum_read_too_early[1, BLOCK](ints(BLOCK), zeros(BLOCK)),
    "A plain read next to the atomics of other threads gives a sum that is not finished.", index=(0,))  # fmt: skip


@cuda.jit
def last_thread_reads_the_sum(x, out):
    total = cuda.shared.array(1, int32)
    tid = cuda.threadIdx.x
    if tid == 0:
        total[0] = 0
    cuda.syncthreads()
    cuda.atomic.add(total, 0, x[tid])  # OTHER
    if tid == cuda.blockDim.x - 1:
        out[0] = total[0]  # BUG


bug(last_thread_reads_the_sum, "shared-race", "total",
    lambda: last_thread_reads_the_sum[1, BLOCK](ints(BLOCK), zeros(1)),
    "The thread with the highest number is not the last one to add.", index=(0,))  # fmt: skip


@cuda.jit
def first_to_count(x, out):
    bins = cuda.shared.array(BINS, int32)
    tid = cuda.threadIdx.x
    if tid < BINS:
        bins[tid] = 0  # OTHER
    cuda.atomic.add(bins, tid % BINS, x[tid])  # BUG
    cuda.syncthreads()
    if tid < BINS:
        out[tid] = bins[tid]


bug(first_to_count, "shared-race", "bins", lambda: first_to_count[1, BLOCK](ints(BLOCK), zeros(BINS)),
    "Who zeroes a bin is the first to count in it here, but the others need not wait for that.")  # fmt: skip


@cuda.jit
def mailbox_emptied_twice(x, out):
    box = cuda.shared.array(1, int32)
    tid = cuda.threadIdx.x
    if tid == 1:
        box[0] = x[0]
    cuda.syncwarp()
    if tid == 0:
        out[0] = box[0]
    cuda.syncwarp()
    if tid == 0:
        out[1] = 2 * box[0]  # OTHER
    if tid == 1:
        box[0] = x[1]  # BUG


bug(mailbox_emptied_twice, "shared-race", "box", lambda: mailbox_emptied_twice[1, WARP](ints(WARP), zeros(2)),
    "The first read is over when lane 1 writes again; the second one, after the syncwarp, may not be.",
    index=(0,))  # fmt: skip


@cuda.jit
def broadcast_to_two_warps(x, out):
    shared = cuda.shared.array(1, int32)
    tid = cuda.threadIdx.x
    if tid == 0:
        shared[0] = x[5]
    cuda.syncthreads()
    value = shared[0]  # OTHER
    value += cuda.shfl_xor_sync(FULL, value, 1) * shared[0]  # OTHER
    cuda.syncwarp()
    if tid == 0:
        shared[0] = x[6]  # BUG
    cuda.syncthreads()
    out[tid] = value + shared[0]


bug(broadcast_to_two_warps, "shared-race", "shared",
    lambda: broadcast_to_two_warps[1, BLOCK](ints(BLOCK), zeros(BLOCK)),
    "A syncwarp waits for the readers of the first warp, and not for those of the second.", index=(0,))  # fmt: skip


@cuda.jit
def two_types_one_memory(x, out):
    sums = cuda.shared.array(0, float64)
    counts = cuda.shared.array(0, int32)
    tid = cuda.threadIdx.x
    sums[tid] = x[tid]  # OTHER
    counts[tid] = tid  # BUG
    cuda.syncthreads()
    out[tid] = sums[tid] + counts[tid]


bug(two_types_one_memory, "shared-race", ("counts", "sums"),
    lambda: two_types_one_memory[1, WARP, 0, 12 * WARP](ints(WARP), zeros(WARP, dtype=np.float64)),
    "Every dynamic shared array begins at byte 0: counts lies on top of sums, not behind it.")  # fmt: skip


@cuda.jit
def halving_an_odd_size(x, out):
    partial = cuda.shared.array(BLOCK, int32)
    tid, n = cuda.threadIdx.x, cuda.blockDim.x
    partial[tid] = x[tid]
    cuda.syncthreads()
    while n > 1:
        half = n // 2
        if tid < n - half:
            partial[tid] += partial[tid + half]  # BUG
        cuda.syncthreads()
        n -= half
    if tid == 0:
        out[0] = partial[0]


bug(halving_an_odd_size, "shared-race", "partial", lambda: halving_an_odd_size[1, 33](ints(33), zeros(1)),
    "For an odd size the middle element is read by thread 0 and written by the middle thread.")  # fmt: skip


@cuda.jit
def no_barrier_in_the_last_block(x, out):
    tile = cuda.shared.array(BLOCK, int32)
    tid, i = cuda.threadIdx.x, cuda.grid(1)
    tile[tid] = x[i]  # OTHER
    if cuda.blockIdx.x + 1 < cuda.gridDim.x:
        cuda.syncthreads()
    out[i] = tile[BLOCK - 1 - tid]  # BUG


bug(no_barrier_in_the_last_block, "shared-race", "tile",
    lambda: no_barrier_in_the_last_block[3, BLOCK](ints(3 * BLOCK), zeros(3 * BLOCK)),
    "The last block skips the barrier as if it were for the blocks behind it.")  # fmt: skip


@cuda.jit
def halo_loaded_late(x, out):
    tile = cuda.shared.array(WITH_HALO, int32)
    tid, i = cuda.threadIdx.x, cuda.grid(1)
    tile[tid + 2] = x[i]
    cuda.syncthreads()
    if tid < 2:
        tile[tid] = x[i - 2] if i >= 2 else 0  # OTHER
    out[i] = tile[tid] + tile[tid + 1] + tile[tid + 2]  # BUG


bug(halo_loaded_late, "shared-race", "tile",
    lambda: halo_loaded_late[2, BLOCK](ints(2 * BLOCK), zeros(2 * BLOCK)),
    "The two elements before the block are loaded after the barrier: thread 0 reads the one of thread 1.")  # fmt: skip


@cuda.jit
def neighbour_in_place(x, out):
    tile = cuda.shared.array(BLOCK, int32)
    tid = cuda.threadIdx.x
    tile[tid] = x[tid]
    cuda.syncthreads()
    right = tile[(tid + 1) % BLOCK]  # OTHER
    tile[tid] = 2 * right  # BUG
    cuda.syncthreads()
    out[tid] = tile[tid]


bug(neighbour_in_place, "shared-race", "tile",
    lambda: neighbour_in_place[1, BLOCK](ints(BLOCK), zeros(BLOCK)),
    "Reading and overwriting need a barrier between them as well: the neighbour may not have read yet.")  # fmt: skip
