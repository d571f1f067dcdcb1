"""Shuffles, votes and syncwarp whose mask names lanes that do not take part, or leaves out the calling lane."""

from numba import cuda, int32

from .registry import bug, ints, zeros

WARP = 32
FULL = 0xFFFFFFFF


@cuda.jit
def shuffle_inside_the_guard(x, out, n):
    i = cuda.grid(1)
    if i < n:  # OTHER
        out[i] = cuda.shfl_down_sync(FULL, x[i], 1)  # BUG


bug(shuffle_inside_the_guard, "shuffle-mask", None,
    lambda: shuffle_inside_the_guard[2, WARP](ints(50), zeros(50), 50),
    "In the last warp, the full mask names lanes without an element, which skip the shuffle.",
    hangs_gpu=True)  # fmt: skip


@cuda.jit
def shuffle_after_return(x, out, n):
    i = cuda.grid(1)
    if i >= n:  # OTHER
        return  # OTHER
    value = x[i]
    for offset in (16, 8, 4, 2, 1):
        value += cuda.shfl_xor_sync(FULL, value, offset)  # BUG
    out[i] = value


bug(shuffle_after_return, "shuffle-mask", None,
    lambda: shuffle_after_return[2, WARP](ints(50), zeros(50), 50),
    "The full mask names lanes that have returned: what comes from them is undefined.", hangs_gpu=True)  # fmt: skip


@cuda.jit
def mask_without_the_caller(x, out):
    i = cuda.grid(1)
    out[i] = cuda.shfl_sync(0xFFFF, x[i], 0)  # BUG


bug(mask_without_the_caller, "shuffle-mask", None,
    lambda: mask_without_the_caller[1, WARP](ints(WARP), zeros(WARP)),
    "The mask names the lower half of the warp, and the upper half shuffles as well.", hangs_gpu=True)  # fmt: skip


@cuda.jit
def shuffle_in_a_divergent_loop(x, out):
    i = cuda.grid(1)
    value = x[i]
    for _ in range(1 + i % 3):  # OTHER
        value += cuda.shfl_xor_sync(FULL, value, 1)  # BUG
    out[i] = value


bug(shuffle_in_a_divergent_loop, "shuffle-mask", None,
    lambda: shuffle_in_a_divergent_loop[1, WARP](ints(WARP), zeros(WARP)),
    "The lanes go round a different number of times: from the second round on, some are missing.",
    hangs_gpu=True)  # fmt: skip


@cuda.jit(device=True)
def warp_sum(value):
    for offset in (16, 8, 4, 2, 1):
        value += cuda.shfl_down_sync(FULL, value, offset)  # BUG
    return value


@cuda.jit
def sum_of_half_a_warp(x, out):
    tid = cuda.threadIdx.x
    if tid < 16:  # OTHER
        total = warp_sum(x[tid])  # OTHER
        if tid == 0:
            out[0] = total


bug(sum_of_half_a_warp, "shuffle-mask", None, lambda: sum_of_half_a_warp[1, WARP](ints(WARP), zeros(1)),
    "The device function is for whole warps, and half a warp calls it.", hangs_gpu=True)  # fmt: skip


@cuda.jit
def syncwarp_in_a_branch(x, out):
    tile = cuda.shared.array(WARP, int32)
    tid = cuda.threadIdx.x
    tile[tid] = x[tid]
    if tid < 16:  # OTHER
        cuda.syncwarp()  # BUG
    out[tid] = tile[tid]


bug(syncwarp_in_a_branch, "shuffle-mask", None, lambda: syncwarp_in_a_branch[1, WARP](ints(WARP), zeros(WARP)),
    "syncwarp() without a mask waits for all 32 lanes, and half of them do not come.", hangs_gpu=True)  # fmt: skip


@cuda.jit
def mask_from_too_early(x, out):
    tid = cuda.threadIdx.x
    mask = cuda.ballot_sync(FULL, x[tid] > 10)
    if x[tid] > 20:  # OTHER
        out[tid] = cuda.shfl_sync(mask, x[tid], 31)  # BUG


bug(mask_from_too_early, "shuffle-mask", None, lambda: mask_from_too_early[1, WARP](ints(WARP), zeros(WARP)),
    "The mask was voted for one condition, and the branch has a narrower one.", hangs_gpu=True)  # fmt: skip


@cuda.jit
def ballot_of_the_few(x, out):
    i = cuda.grid(1)
    if x[i] > 40:  # OTHER
        out[i] = cuda.popc(cuda.ballot_sync(FULL, x[i] % 2 == 0))  # BUG


bug(ballot_of_the_few, "shuffle-mask", None, lambda: ballot_of_the_few[2, WARP](ints(64), zeros(64)),
    "A vote of all lanes in a branch that some lanes skip; the first warp skips it as a whole.",
    hangs_gpu=True)  # fmt: skip


@cuda.jit
def full_mask_in_both_branches(x, out):
    tid = cuda.threadIdx.x
    if tid % 2 == 0:  # OTHER
        out[tid] = cuda.shfl_xor_sync(FULL, x[tid], 2)  # BUG
    else:
        out[tid] = cuda.shfl_xor_sync(FULL, x[tid], 4)  # OTHER


bug(full_mask_in_both_branches, "shuffle-mask", None,
    lambda: full_mask_in_both_branches[1, WARP](ints(WARP), zeros(WARP)),
    "All lanes shuffle, but half of them at another line: each branch needs its own mask.",
    hangs_gpu=True)  # fmt: skip
