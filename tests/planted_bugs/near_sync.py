"""Near misses: barriers, shuffles and votes in branches and loops that all the threads concerned take. All correct."""

import numpy as np
from numba import cuda, int32

from .near_memory import host
from .registry import ints, near_miss, zeros

WARP = 32
BLOCK = 64
FULL = 0xFFFFFFFF

# --- barriers -------------------------------------------------------------------------------------------------------


@cuda.jit
def barrier_in_a_uniform_loop(x, out):
    tile = cuda.shared.array(BLOCK, int32)
    tid, i = cuda.threadIdx.x, cuda.grid(1)
    value = x[i]
    for r in range(cuda.blockIdx.x + 1):
        tile[tid] = value + r
        cuda.syncthreads()
        value = tile[(tid + 1) % BLOCK]
        cuda.syncthreads()
    out[i] = value


def run_barrier_in_a_uniform_loop():
    out, x = zeros(3 * BLOCK), host(3, BLOCK)
    barrier_in_a_uniform_loop[3, BLOCK](ints(3 * BLOCK), out)
    rows = [np.roll(x[b], -b - 1) + sum(range(b + 1)) for b in range(3)]
    return out.copy_to_host(), np.concatenate(rows)


near_miss(barrier_in_a_uniform_loop, "divergent-barrier", run_barrier_in_a_uniform_loop,
          "Blocks go round a different number of times, the threads of one block do not.")  # fmt: skip


@cuda.jit
def whole_blocks_return(x, out, n):
    tile = cuda.shared.array(BLOCK, int32)
    tid, first = cuda.threadIdx.x, cuda.blockIdx.x * BLOCK
    if first >= n:
        return
    tile[tid] = x[first + tid]
    cuda.syncthreads()
    out[first + tid] = tile[BLOCK - 1 - tid]


def run_whole_blocks_return():
    out = zeros(2 * BLOCK)
    whole_blocks_return[5, BLOCK](ints(2 * BLOCK), out, 2 * BLOCK)
    return out.copy_to_host(), host(2, BLOCK)[:, ::-1].ravel()


near_miss(whole_blocks_return, "exited-barrier", run_whole_blocks_return,
          "The blocks beyond the end return as a whole, before their barrier.")  # fmt: skip


@cuda.jit
def return_after_the_barrier(x, out, n):
    tile = cuda.shared.array(BLOCK, int32)
    tid, i = cuda.threadIdx.x, cuda.grid(1)
    tile[tid] = x[i] if i < n else 0
    cuda.syncthreads()
    if i >= n:
        return
    out[i] = tile[tid] + tile[(tid + 1) % BLOCK]


def run_return_after_the_barrier():
    out = zeros(100)
    return_after_the_barrier[2, BLOCK](ints(100), out, 100)
    tiles = np.concatenate([host(100), np.zeros(28, np.int32)]).reshape(2, BLOCK)
    return out.copy_to_host(), (tiles + np.roll(tiles, -1, axis=1)).ravel()[:100]


near_miss(return_after_the_barrier, "exited-barrier", run_return_after_the_barrier,
          "The threads without an element return when the last barrier is behind them.")  # fmt: skip


@cuda.jit
def barrier_under_a_flag(x, out, smooth):
    tile = cuda.shared.array(BLOCK, int32)
    tid = cuda.threadIdx.x
    value = x[tid]
    if smooth > 0:
        tile[tid] = value
        cuda.syncthreads()
        value += tile[(tid + 1) % BLOCK]
    out[tid] = value


def run_barrier_under_a_flag():
    with_it, without, x = zeros(BLOCK), zeros(BLOCK), host(BLOCK)
    barrier_under_a_flag[1, BLOCK](ints(BLOCK), with_it, 1)
    barrier_under_a_flag[1, BLOCK](ints(BLOCK), without, 0)
    return np.stack([with_it.copy_to_host(), without.copy_to_host()]), np.stack([x + np.roll(x, -1), x])


near_miss(barrier_under_a_flag, "divergent-barrier", run_barrier_under_a_flag,
          "The branch depends on an argument, which is the same for all threads.")  # fmt: skip


@cuda.jit
def until_all_have_converged(x, out):
    tile = cuda.shared.array(BLOCK, int32)
    tid = cuda.threadIdx.x
    tile[tid] = x[tid]
    rounds = 0
    while cuda.syncthreads_or(int32(tile[tid] > 1)):
        tile[tid] //= 2
        rounds += 1
    out[tid] = 100 * rounds + tile[BLOCK - 1 - tid]


def run_until_all_have_converged():
    out = zeros(BLOCK)
    until_all_have_converged[1, BLOCK](ints(BLOCK), out)
    return out.copy_to_host(), 500 + (host(BLOCK)[::-1] >> 5)


near_miss(until_all_have_converged, "divergent-barrier", run_until_all_have_converged,
          "The barrier itself decides for all threads whether there is one more round.")  # fmt: skip


@cuda.jit
def same_way_by_shared_memory(x, out):
    first = cuda.shared.array(1, int32)
    tile = cuda.shared.array(BLOCK, int32)
    tid, i = cuda.threadIdx.x, cuda.grid(1)
    if tid == 0:
        first[0] = x[i]
    cuda.syncthreads()
    value = x[i]
    if first[0] % 3 != 0:
        tile[tid] = value
        cuda.syncthreads()
        value = tile[BLOCK - 1 - tid]
    out[i] = value


def run_same_way_by_shared_memory():
    out, x = zeros(3 * BLOCK), host(3, BLOCK)
    same_way_by_shared_memory[3, BLOCK](ints(3 * BLOCK), out)
    return out.copy_to_host(), np.concatenate([x[0], x[1, ::-1], x[2, ::-1]])


near_miss(same_way_by_shared_memory, "divergent-barrier", run_same_way_by_shared_memory,
          "The branch depends on data, but all threads of the block look at the same element.")  # fmt: skip


@cuda.jit
def guard_around_the_loads(x, out, n):
    tile = cuda.shared.array(BLOCK, int32)
    tid = cuda.threadIdx.x
    total = 0
    for first in range(0, n, BLOCK):
        if first + tid < n:
            tile[tid] = x[first + tid]
        cuda.syncthreads()
        for k in range(min(BLOCK, n - first)):
            total += tile[k]
        cuda.syncthreads()
    out[tid] = total


def run_guard_around_the_loads():
    out = zeros(BLOCK)
    guard_around_the_loads[1, BLOCK](ints(150), out, 150)
    return out.copy_to_host(), np.full(BLOCK, host(150).sum())


near_miss(guard_around_the_loads, "divergent-barrier", run_guard_around_the_loads,
          "The guard is around the load alone; all threads go through the loop and its barriers.")  # fmt: skip


@cuda.jit
def leave_together(x, out, limit):
    total = cuda.shared.array(1, int32)
    tid = cuda.threadIdx.x
    if tid == 0:
        total[0] = 0
    for r in range(8):
        cuda.syncthreads()
        seen = total[0]
        cuda.syncthreads()
        if seen > limit:
            break
        cuda.atomic.add(total, 0, x[tid] + r)
    out[tid] = seen


def run_leave_together():
    out = zeros(BLOCK)
    leave_together[1, BLOCK](ints(BLOCK), out, 5000)
    once = host(BLOCK).sum()
    return out.copy_to_host(), np.full(BLOCK, 3 * once + 3 * BLOCK)


near_miss(leave_together, "divergent-barrier", run_leave_together,
          "All threads have read the same sum when they decide to leave the loop.")  # fmt: skip


# --- shuffles and votes ---------------------------------------------------------------------------------------------


@cuda.jit
def first_warp_shuffles(x, out):
    partial = cuda.shared.array(2, int32)
    tid = cuda.threadIdx.x
    value = x[tid]
    for offset in (16, 8, 4, 2, 1):
        value += cuda.shfl_down_sync(FULL, value, offset)
    if tid % WARP == 0:
        partial[tid // WARP] = value
    cuda.syncthreads()
    if tid < WARP:
        value = partial[tid] if tid < 2 else 0
        value += cuda.shfl_xor_sync(FULL, value, 1)
        if tid == 0:
            out[0] = value


def run_first_warp_shuffles():
    out = zeros(1)
    first_warp_shuffles[1, BLOCK](ints(BLOCK), out)
    return out.copy_to_host(), host(BLOCK).sum(keepdims=True)


near_miss(first_warp_shuffles, "shuffle-mask", run_first_warp_shuffles,
          "A whole warp takes the branch: the full mask names lanes of one warp only.")  # fmt: skip


@cuda.jit
def a_mask_for_each_half(x, out):
    tid = cuda.threadIdx.x
    if tid % WARP < 16:
        out[tid] = cuda.shfl_xor_sync(0xFFFF, x[tid], 1)
    else:
        out[tid] = cuda.shfl_sync(0xFFFF0000, x[tid], 20)


def run_a_mask_for_each_half():
    out, x = zeros(BLOCK), host(BLOCK)
    a_mask_for_each_half[1, BLOCK](ints(BLOCK), out)
    return out.copy_to_host(), np.where(x % WARP < 16, x ^ 1, x // WARP * WARP + 20)


near_miss(a_mask_for_each_half, "shuffle-mask", run_a_mask_for_each_half,
          "Each branch names just the lanes that take it.")  # fmt: skip


@cuda.jit
def mask_by_ballot(x, out):
    tid = cuda.threadIdx.x
    mask = cuda.ballot_sync(FULL, x[tid] % 3 == 0)
    if x[tid] % 3 == 0:
        out[tid] = cuda.popc(cuda.ballot_sync(mask, x[tid] % 2 == 0))
        cuda.syncwarp(mask)


def run_mask_by_ballot():
    out, x = zeros(WARP), host(WARP)
    mask_by_ballot[1, WARP](ints(WARP), out)
    return out.copy_to_host(), np.where(x % 3 == 0, (x % 6 == 0).sum(), 0)


near_miss(mask_by_ballot, "shuffle-mask", run_mask_by_ballot,
          "The lanes vote who will take the branch, and then take just that one.")  # fmt: skip


@cuda.jit
def guard_around_the_value(x, out, n):
    i = cuda.grid(1)
    value = x[i] if i < n else 0
    for offset in (16, 8, 4, 2, 1):
        value += cuda.shfl_xor_sync(FULL, value, offset)
    if i < n:
        out[i] = value


def run_guard_around_the_value():
    out, x = zeros(50), host(50)
    guard_around_the_value[2, WARP](ints(50), out, 50)
    return out.copy_to_host(), np.r_[[x[:32].sum()] * 32, [x[32:].sum()] * 18]


near_miss(guard_around_the_value, "shuffle-mask", run_guard_around_the_value,
          "Lanes without an element bring a zero and shuffle along.")  # fmt: skip


@cuda.jit
def rows_by_warps(x, out):
    row, lane = cuda.grid(1) // WARP, cuda.threadIdx.x % WARP
    if row >= x.shape[0]:
        return
    total = 0
    for col in range(lane, x.shape[1], WARP):
        total += x[row, col]
    for offset in (16, 8, 4, 2, 1):
        total += cuda.shfl_down_sync(FULL, total, offset)
    if lane == 0:
        out[row] = total


def run_rows_by_warps():
    out = zeros(3)
    rows_by_warps[2, BLOCK](ints(3, 40), out)
    return out.copy_to_host(), host(3, 40).sum(axis=1)


near_miss(rows_by_warps, "shuffle-mask", run_rows_by_warps,
          "The warp without a row returns as a whole; only the loop before the shuffles differs by lane.")  # fmt: skip


@cuda.jit
def while_any_lane_has_work(x, out):
    i = cuda.grid(1)
    left, rounds = x[i] % 7, 0
    while cuda.any_sync(FULL, left > 0):
        left -= cuda.shfl_sync(FULL, 1, 0)
        rounds += 1
    out[i] = 10 * rounds + left


def run_while_any_lane_has_work():
    out, x = zeros(BLOCK), host(BLOCK)
    while_any_lane_has_work[1, BLOCK](ints(BLOCK), out)
    return out.copy_to_host(), 60 + x % 7 - 6


near_miss(while_any_lane_has_work, "shuffle-mask", run_while_any_lane_has_work,
          "The vote keeps the lanes of a warp together in the loop.")  # fmt: skip


@cuda.jit
def warps_in_a_loop_of_their_own(x, out):
    i, warp = cuda.grid(1), cuda.threadIdx.x // WARP
    value = x[i]
    for r in range(warp + 1):
        value += cuda.shfl_xor_sync(FULL, value, 1 << r)
        cuda.syncwarp()
    out[i] = value


def run_warps_in_a_loop_of_their_own():
    out, x = zeros(BLOCK), host(BLOCK)
    warps_in_a_loop_of_their_own[1, BLOCK](ints(BLOCK), out)
    once = x + x[x ^ 1]
    return out.copy_to_host(), np.where(x < WARP, once, once + once[x ^ 2])


near_miss(warps_in_a_loop_of_their_own, "shuffle-mask", run_warps_in_a_loop_of_their_own,
          "The second warp goes round once more than the first, and shuffles belong to a warp.")  # fmt: skip
