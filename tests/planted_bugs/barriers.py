"""Barriers that not all threads of a block reach: some take another way, or have returned before.

Each thread reads back only what it has written itself, so that the barrier is all that is wrong.
"""

from numba import cuda, int32

from .registry import bug, ints, zeros

BLOCK = 32
TWO_WARPS = 64

# --- some threads take another way ----------------------------------------------------------------------------------


@cuda.jit
def barrier_inside_the_guard(x, out, n):
    tile = cuda.shared.array(BLOCK, int32)
    tid, i = cuda.threadIdx.x, cuda.grid(1)
    if i < n:  # OTHER
        tile[tid] = x[i]
        cuda.syncthreads()  # BUG
        out[i] = tile[tid]


bug(barrier_inside_the_guard, "divergent-barrier", None,
    lambda: barrier_inside_the_guard[3, BLOCK](ints(70), zeros(70), 70),
    "In the last block, the threads without an element never reach the barrier.", hangs_gpu=True)  # fmt: skip


@cuda.jit
def barrier_in_a_strided_loop(x, out, n):
    tile = cuda.shared.array(BLOCK, int32)
    tid = cuda.threadIdx.x
    for j in range(tid, n, BLOCK):  # OTHER
        tile[tid] = x[j]
        cuda.syncthreads()  # BUG
        out[j] = tile[tid]


bug(barrier_in_a_strided_loop, "divergent-barrier", None,
    lambda: barrier_in_a_strided_loop[1, BLOCK](ints(40), zeros(40), 40),
    "For a size that is no multiple of the block, some threads go round once more than others.",
    hangs_gpu=True)  # fmt: skip


@cuda.jit
def a_barrier_for_each_branch(x, out):
    tile = cuda.shared.array(BLOCK, int32)
    tid = cuda.threadIdx.x
    if tid % 2 == 0:  # OTHER
        tile[tid] = x[tid]
        cuda.syncthreads()  # BUG
    else:
        tile[tid] = -x[tid]
        cuda.syncthreads()  # OTHER
    out[tid] = tile[tid]


bug(a_barrier_for_each_branch, "divergent-barrier", None,
    lambda: a_barrier_for_each_branch[1, BLOCK](ints(BLOCK), zeros(BLOCK)),
    "Both branches have a barrier, but all threads have to wait at the same one.", hangs_gpu=True)  # fmt: skip


@cuda.jit(device=True)
def through_shared(value, tile):
    tile[cuda.threadIdx.x] = value
    cuda.syncthreads()  # BUG
    return tile[cuda.threadIdx.x]


@cuda.jit
def barrier_in_a_device_function(x, out):
    tile = cuda.shared.array(BLOCK, int32)
    tid = cuda.threadIdx.x
    if x[tid] > 5:  # OTHER
        out[tid] = through_shared(x[tid], tile)  # OTHER


bug(barrier_in_a_device_function, "divergent-barrier", None,
    lambda: barrier_in_a_device_function[1, BLOCK](ints(BLOCK), zeros(BLOCK)),
    "The barrier is in a device function that only some threads call.", hangs_gpu=True)  # fmt: skip


@cuda.jit
def barrier_of_the_first_warp(x, out):
    tile = cuda.shared.array(TWO_WARPS, int32)
    tid = cuda.threadIdx.x
    tile[tid] = x[tid]
    if tid < 32:  # OTHER
        cuda.syncthreads()  # BUG
    out[tid] = tile[tid]


bug(barrier_of_the_first_warp, "divergent-barrier", None,
    lambda: barrier_of_the_first_warp[1, TWO_WARPS](ints(TWO_WARPS), zeros(TWO_WARPS)),
    "Within each warp all lanes agree, but the second warp does not come: syncwarp is meant.",
    hangs_gpu=True)  # fmt: skip


@cuda.jit
def break_before_the_barrier(x, out, limit):
    tid = cuda.threadIdx.x
    total = 0
    for _ in range(3):
        total += x[tid]
        if total > limit:  # OTHER
            break  # OTHER
        cuda.syncthreads()  # BUG
    out[tid] = total


bug(break_before_the_barrier, "divergent-barrier", None,
    lambda: break_before_the_barrier[1, BLOCK](ints(BLOCK), zeros(BLOCK), 40),
    "From the second round on, threads with large values leave the loop while others wait in it.",
    hangs_gpu=True)  # fmt: skip


@cuda.jit
def barrier_until_converged(x, out):
    tid = cuda.threadIdx.x
    value = x[tid]
    while value > 1:  # OTHER
        value //= 2
        cuda.syncthreads()  # BUG
    out[tid] = value


bug(barrier_until_converged, "divergent-barrier", None,
    lambda: barrier_until_converged[1, BLOCK](ints(BLOCK), zeros(BLOCK)),
    "Each thread goes round as often as its own value needs: let syncthreads_or decide for all.",
    hangs_gpu=True)  # fmt: skip


@cuda.jit
def count_in_a_branch(x, out):
    tid = cuda.threadIdx.x
    if x[tid] > 7:  # OTHER
        out[tid] = cuda.syncthreads_count(int32(x[tid] > 20))  # BUG


bug(count_in_a_branch, "divergent-barrier", None,
    lambda: count_in_a_branch[1, BLOCK](ints(BLOCK), zeros(BLOCK)),
    "syncthreads_count is a barrier: those that do not count have to come as well.", hangs_gpu=True)  # fmt: skip


# --- some threads have returned -------------------------------------------------------------------------------------


@cuda.jit
def return_before_the_barrier(x, out, n):
    tile = cuda.shared.array(BLOCK, int32)
    tid, i = cuda.threadIdx.x, cuda.grid(1)
    if i >= n:  # OTHER
        return  # OTHER
    tile[tid] = x[i]
    cuda.syncthreads()  # BUG
    out[i] = tile[tid]


bug(return_before_the_barrier, "exited-barrier", None,
    lambda: return_before_the_barrier[3, BLOCK](ints(70), zeros(70), 70),
    "The usual early return, in the last block, before a barrier: guard the accesses instead.")  # fmt: skip


@cuda.jit
def return_from_the_second_round(x, out, key):
    tid = cuda.threadIdx.x
    for r in range(3):
        if x[r * BLOCK + tid] == key:  # OTHER
            out[0] = r * BLOCK + tid
            return  # OTHER
        cuda.syncthreads()  # BUG


bug(return_from_the_second_round, "exited-barrier", None,
    lambda: return_from_the_second_round[1, BLOCK](ints(3 * BLOCK), zeros(1), 40),
    "The thread that has found the key goes home in the second round, and the others wait.")  # fmt: skip


@cuda.jit
def second_warp_returns(x, out):
    tile = cuda.shared.array(TWO_WARPS, int32)
    tid = cuda.threadIdx.x
    tile[tid] = x[tid]
    if tid >= 32:  # OTHER
        return  # OTHER
    cuda.syncthreads()  # BUG
    out[tid] = tile[tid]


bug(second_warp_returns, "exited-barrier", None,
    lambda: second_warp_returns[1, TWO_WARPS](ints(TWO_WARPS), zeros(TWO_WARPS)),
    "The second warp returns as a whole, which the first warp's barrier does not know.")  # fmt: skip
