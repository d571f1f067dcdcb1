"""Near misses: threads that share memory and are ordered, or never meet at an element, or use atomics. All correct."""

import numpy as np
from numba import cuda, int32

from .near_memory import host
from .registry import ints, near_miss, zeros

WARP = 32
BLOCK = 64
FULL = 0xFFFFFFFF
BINS = 8

# --- shared memory --------------------------------------------------------------------------------------------------


@cuda.jit
def double_buffer(x, out):
    buffer = cuda.shared.array((2, BLOCK), int32)
    tid = cuda.threadIdx.x
    buffer[0, tid] = x[tid]
    cuda.syncthreads()
    for r in range(5):
        buffer[(r + 1) % 2, tid] = buffer[r % 2, tid] + buffer[r % 2, (tid + 1) % BLOCK]
        cuda.syncthreads()
    out[tid] = buffer[1, tid]


def run_double_buffer():
    out, x = zeros(BLOCK), host(BLOCK)
    double_buffer[1, BLOCK](ints(BLOCK), out)
    for _ in range(5):
        x = x + np.roll(x, -1)
    return out.copy_to_host(), x


near_miss(double_buffer, "shared-race", run_double_buffer,
          "With two buffers one barrier a round is enough: who still reads, reads the other one.")  # fmt: skip


@cuda.jit
def warp_sum_with_syncwarp(x, out):
    partial = cuda.shared.array(BLOCK, int32)
    tid = cuda.threadIdx.x
    lane = tid % WARP
    partial[tid] = x[cuda.grid(1)]
    cuda.syncwarp()
    stride = WARP // 2
    while stride > 0:
        if lane < stride:
            partial[tid] += partial[tid + stride]
        cuda.syncwarp()
        stride //= 2
    if lane == 0:
        out[cuda.grid(1) // WARP] = partial[tid]


def run_warp_sum_with_syncwarp():
    out = zeros(4)
    warp_sum_with_syncwarp[2, BLOCK](ints(2 * BLOCK), out)
    return out.copy_to_host(), host(4, WARP).sum(axis=1)


near_miss(warp_sum_with_syncwarp, "shared-race", run_warp_sum_with_syncwarp,
          "Each warp keeps to its own half of the array, and a syncwarp orders its lanes.")  # fmt: skip


@cuda.jit
def quarter_warps(x, out):
    tile = cuda.shared.array(WARP, int32)
    tid = cuda.threadIdx.x
    mask = 0xFF << (tid // 8 * 8)
    tile[tid] = x[tid]
    cuda.syncwarp(mask)
    out[tid] = tile[tid // 8 * 8 + (tid + 3) % 8]


def run_quarter_warps():
    out = zeros(WARP)
    quarter_warps[1, WARP](ints(WARP), out)
    return out.copy_to_host(), np.roll(host(4, 8), -3, axis=1).ravel()


near_miss(quarter_warps, "shared-race", run_quarter_warps,
          "Eight lanes each exchange values among themselves and wait for just these eight.")  # fmt: skip


@cuda.jit
def own_element_only(x, out):
    tile = cuda.shared.array(BLOCK, int32)
    tid = cuda.threadIdx.x
    tile[tid] = x[tid]
    for k in range(3):
        tile[tid] = tile[tid] * 2 + k
        tile[tid] -= x[tid]
    out[tid] = tile[tid]


def run_own_element_only():
    out, x = zeros(BLOCK), host(BLOCK)
    own_element_only[1, BLOCK](ints(BLOCK), out)
    return out.copy_to_host(), ((x * 2 - x) * 2 + 1 - x) * 2 + 2 - x


near_miss(own_element_only, "shared-race", run_own_element_only,
          "A thread that rereads and rewrites its own element needs no barrier.")  # fmt: skip


@cuda.jit
def read_in_one_epoch_written_in_the_next(x, out):
    tile = cuda.shared.array(BLOCK, int32)
    tid = cuda.threadIdx.x
    tile[tid] = x[tid]
    cuda.syncthreads()
    left, right = tile[(tid - 1) % BLOCK], tile[(tid + 1) % BLOCK]
    cuda.syncthreads()
    tile[tid] = left + right
    cuda.syncthreads()
    out[tid] = tile[BLOCK - 1 - tid]


def run_read_in_one_epoch_written_in_the_next():
    out, x = zeros(BLOCK), host(BLOCK)
    read_in_one_epoch_written_in_the_next[1, BLOCK](ints(BLOCK), out)
    return out.copy_to_host(), (np.roll(x, 1) + np.roll(x, -1))[::-1]


near_miss(read_in_one_epoch_written_in_the_next, "shared-race", run_read_in_one_epoch_written_in_the_next,
          "Neighbours are read before one barrier and overwritten behind it.")  # fmt: skip


@cuda.jit
def same_memory_for_another_purpose(x, out):
    memory = cuda.shared.array(BLOCK, int32)
    tid = cuda.threadIdx.x
    memory[BLOCK - 1 - tid] = x[tid]
    cuda.syncthreads()
    value = memory[tid]
    cuda.syncthreads()
    if tid < BINS:
        memory[tid] = 0
    cuda.syncthreads()
    cuda.atomic.add(memory, value % BINS, value)
    cuda.syncthreads()
    out[tid] = memory[tid % BINS]


def run_same_memory_for_another_purpose():
    out = zeros(BLOCK)
    same_memory_for_another_purpose[1, BLOCK](ints(BLOCK), out)
    return out.copy_to_host(), np.tile(host(BLOCK // BINS, BINS).sum(axis=0), BLOCK // BINS)


near_miss(same_memory_for_another_purpose, "shared-race", run_same_memory_for_another_purpose,
          "First a tile, then a histogram in the same memory, with a barrier between.")  # fmt: skip


@cuda.jit
def histogram_of_the_block(x, bins):
    mine = cuda.shared.array(BINS, int32)
    tid, i = cuda.threadIdx.x, cuda.grid(1)
    if tid < BINS:
        mine[tid] = 0
    cuda.syncthreads()
    if i < x.size:
        cuda.atomic.add(mine, x[i] % BINS, 1)
    cuda.syncthreads()
    if tid < BINS:
        cuda.atomic.add(bins, tid, mine[tid])


def run_histogram_of_the_block():
    bins = zeros(BINS)
    histogram_of_the_block[3, BLOCK](ints(150), bins)
    return bins.copy_to_host(), np.bincount(host(150) % BINS, minlength=BINS)


near_miss(histogram_of_the_block, "shared-race", run_histogram_of_the_block,
          "Zeroed, counted and read in three epochs; all that threads do to the same bin is atomic.")  # fmt: skip


@cuda.jit(device=True)
def sum_of_the_block(value, partial):
    tid = cuda.threadIdx.x
    partial[tid] = value
    cuda.syncthreads()
    stride = cuda.blockDim.x // 2
    while stride > 0:
        if tid < stride:
            partial[tid] += partial[tid + stride]
        cuda.syncthreads()
        stride //= 2
    total = partial[0]
    cuda.syncthreads()
    return total


@cuda.jit
def two_sums_of_the_block(x, out):
    partial = cuda.shared.array(BLOCK, int32)
    i = cuda.grid(1)
    total = sum_of_the_block(x[i], partial)
    out[i] = sum_of_the_block(x[i] * x[i], partial) - total


def run_two_sums_of_the_block():
    out, x = zeros(2 * BLOCK), host(2, BLOCK)
    two_sums_of_the_block[2, BLOCK](ints(2 * BLOCK), out)
    return out.copy_to_host(), np.repeat((x * x - x).sum(axis=1), BLOCK)


near_miss(two_sums_of_the_block, "shared-race", run_two_sums_of_the_block,
          "A second barrier, after all have read partial[0], lets the array be used again.")  # fmt: skip


@cuda.jit
def halves_that_never_meet(x, out):
    tile = cuda.shared.array(BLOCK, int32)
    tid = cuda.threadIdx.x
    if tid < WARP:
        tile[tid] = x[tid]
        cuda.syncwarp()
        out[tid] = tile[WARP - 1 - tid]
    else:
        tile[tid] = -x[tid]
        cuda.syncwarp()
        out[tid] = tile[tid // WARP * WARP + (tid + 1) % WARP]


def run_halves_that_never_meet():
    out, x = zeros(BLOCK), host(2, WARP)
    halves_that_never_meet[1, BLOCK](ints(BLOCK), out)
    return out.copy_to_host(), np.concatenate([x[0, ::-1], -np.roll(x[1], -1)])


near_miss(halves_that_never_meet, "shared-race", run_halves_that_never_meet,
          "Two warps do different things without a barrier of the block, each in its own half.")  # fmt: skip


@cuda.jit
def all_read_one_element(x, out):
    first = cuda.shared.array(1, int32)
    i = cuda.grid(1)
    if cuda.threadIdx.x == 0:
        first[0] = x[i]
    cuda.syncthreads()
    out[i] = x[i] - first[0] + first[0] * x[0]


def run_all_read_one_element():
    out, x = zeros(3 * BLOCK), host(3 * BLOCK)
    all_read_one_element[3, BLOCK](ints(3 * BLOCK), out)
    return out.copy_to_host(), x % BLOCK


near_miss(all_read_one_element, "shared-race", run_all_read_one_element,
          "Any number of threads may read an element that nobody writes meanwhile.")  # fmt: skip


@cuda.jit
def counting_barriers(x, out):
    tile = cuda.shared.array(BLOCK, int32)
    tid = cuda.threadIdx.x
    tile[tid] = x[tid]
    large = cuda.syncthreads_count(int32(x[tid] > 50))
    right = tile[(tid + 1) % BLOCK]
    if cuda.syncthreads_or(int32(right > 60)):
        tile[tid] = right + large
    cuda.syncthreads()
    out[tid] = tile[BLOCK - 1 - tid]


def run_counting_barriers():
    out, x = zeros(BLOCK), host(BLOCK)
    counting_barriers[1, BLOCK](ints(BLOCK), out)
    return out.copy_to_host(), (np.roll(x, -1) + (x > 50).sum())[::-1]


near_miss(counting_barriers, "shared-race", run_counting_barriers,
          "syncthreads_count and syncthreads_or are barriers as well as votes.")  # fmt: skip


@cuda.jit
def tree_for_any_size(x, out):
    partial = cuda.shared.array(BLOCK, int32)
    tid, n = cuda.threadIdx.x, cuda.blockDim.x
    partial[tid] = x[tid]
    cuda.syncthreads()
    while n > 1:
        half = (n + 1) // 2
        if tid + half < n:
            partial[tid] += partial[tid + half]
        cuda.syncthreads()
        n = half
    if tid == 0:
        out[0] = partial[0]


def run_tree_for_any_size():
    out = zeros(1)
    tree_for_any_size[1, 45](ints(45), out)
    return out.copy_to_host(), host(45).sum(keepdims=True)


near_miss(tree_for_any_size, "shared-race", run_tree_for_any_size,
          "For an odd size the middle element is left alone until the next step.")  # fmt: skip


@cuda.jit
def handed_on(x, out):
    box = cuda.shared.array(1, int32)
    tid = cuda.threadIdx.x
    if tid == 0:
        box[0] = x[7]
    if tid < 2:
        cuda.syncwarp(0b011)
    if tid == 1 or tid == 2:
        cuda.syncwarp(0b110)
    if tid == 2:
        out[0] = box[0]


def run_handed_on():
    out = zeros(1)
    handed_on[1, WARP](ints(WARP), out)
    return out.copy_to_host(), np.array([7])


near_miss(handed_on, "shared-race", run_handed_on,
          "Lane 0 waits with lane 1, then lane 1 with lane 2: so lane 2 reads what lane 0 has written.")  # fmt: skip


# --- global memory --------------------------------------------------------------------------------------------------


@cuda.jit
def global_histogram(x, bins, places, out):
    i = cuda.grid(1)
    if i < x.size:
        cuda.atomic.add(bins, x[i] % BINS, 1)
        cuda.atomic.max(bins, BINS, x[i])
        place = cuda.atomic.add(places, 0, 1)
        out[place] = 1


def run_global_histogram():
    bins, out = zeros(BINS + 1), zeros(100)
    global_histogram[2, BLOCK](ints(100), bins, zeros(1), out)
    got = np.concatenate([bins.copy_to_host(), out.copy_to_host()])
    return got, np.concatenate([np.bincount(host(100) % BINS, minlength=BINS), [99], np.ones(100)])


near_miss(global_histogram, "global-race", run_global_histogram,
          "Atomics against atomics, and each thread writes at the place that an atomic gave to it alone.")  # fmt: skip


@cuda.jit
def own_part_of_scratch(x, scratch, out):
    tid, first = cuda.threadIdx.x, cuda.blockIdx.x * BLOCK
    scratch[first + tid] = 2 * x[first + tid]
    cuda.syncthreads()
    out[first + tid] = scratch[first + BLOCK - 1 - tid]


def run_own_part_of_scratch():
    out = zeros(3 * BLOCK)
    own_part_of_scratch[3, BLOCK](ints(3 * BLOCK), zeros(3 * BLOCK), out)
    return out.copy_to_host(), 2 * host(3, BLOCK)[:, ::-1].ravel()


near_miss(own_part_of_scratch, "global-race", run_own_part_of_scratch,
          "Each block keeps to its own part of the array, and a barrier orders its threads.")  # fmt: skip


@cuda.jit
def step_out_of_place(x, out, n):
    i = cuda.grid(1)
    if i < n:
        out[i] = x[(i - 1) % n] + x[(i + 1) % n]


def run_step_out_of_place():
    a, b, x = ints(100), zeros(100), host(100)
    for _ in range(3):
        step_out_of_place[2, BLOCK](a, b, 100)
        a, b, x = b, a, np.roll(x, 1) + np.roll(x, -1)
    return a.copy_to_host(), x


near_miss(step_out_of_place, "global-race", run_step_out_of_place,
          "Two arrays in turn: between one launch and the next everything is ordered.")  # fmt: skip


@cuda.jit
def differences(left, right, out):
    i = cuda.grid(1)
    if i < out.size:
        out[i] = right[i] - 2 * left[i]


def run_differences():
    x, out, odd = ints(101), zeros(100), ints(60)
    differences[2, BLOCK](x[:100], x[1:], out)
    differences[1, BLOCK](odd[::2], odd[::2], odd[1::2])
    got = np.concatenate([out.copy_to_host(), odd.copy_to_host()])
    return got, np.concatenate([1 - host(100), np.stack([2 * host(30), -2 * host(30)], axis=1).ravel()])


near_miss(differences, "global-race", run_differences,
          "Views that overlap are only read, and a view that is written shares no element with the other.")  # fmt: skip


@cuda.jit
def reverse_in_place(x, n):
    i = cuda.grid(1)
    if i < n // 2:
        x[i], x[n - 1 - i] = x[n - 1 - i], x[i]


def run_reverse_in_place():
    x = ints(101)
    reverse_in_place[2, BLOCK](x, 101)
    return x.copy_to_host(), host(101)[::-1]


near_miss(reverse_in_place, "global-race", run_reverse_in_place,
          "One thread swaps one pair, and nobody else touches it.")  # fmt: skip


@cuda.jit
def one_sum_a_block(x, sums):
    value = x[cuda.grid(1)]
    for offset in (16, 8, 4, 2, 1):
        value += cuda.shfl_down_sync(FULL, value, offset)
    if cuda.threadIdx.x == 0:
        sums[cuda.blockIdx.x] = value


@cuda.jit
def sum_of_sums(sums, out):
    total = 0
    for k in range(sums.size):
        total += sums[k]
    out[cuda.threadIdx.x] = total


def run_one_sum_a_block():
    sums, out = zeros(4), zeros(8)
    one_sum_a_block[4, WARP](ints(4 * WARP), sums)
    sum_of_sums[1, 8](sums, out)
    return out.copy_to_host(), np.full(8, host(4 * WARP).sum())


near_miss(one_sum_a_block, "global-race", run_one_sum_a_block,
          "Each block writes an element of its own; all threads of the next launch read them.")  # fmt: skip


@cuda.jit
def last_block_adds_up(x, sums, counter, out):
    is_last = cuda.shared.array(1, int32)
    tid, b = cuda.threadIdx.x, cuda.blockIdx.x
    cuda.atomic.add(sums, b, x[cuda.grid(1)])
    cuda.threadfence()
    cuda.syncthreads()
    if tid == 0:
        is_last[0] = cuda.atomic.add(counter, 0, 1) == cuda.gridDim.x - 1
    cuda.syncthreads()
    if is_last[0] == 1 and tid == 0:
        total = 0
        for k in range(cuda.gridDim.x):
            total += sums[k]
        out[0] = total


def run_last_block_adds_up():
    out = zeros(1)
    last_block_adds_up[4, BLOCK](ints(4 * BLOCK), zeros(4), zeros(1), out)
    return out.copy_to_host(), host(4 * BLOCK).sum(keepdims=True)


near_miss(last_block_adds_up, "global-race", run_last_block_adds_up,
          "A fence and a counter tell the last block that the others' sums are there.", unchecked=True)  # fmt: skip
