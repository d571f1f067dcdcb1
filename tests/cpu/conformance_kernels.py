"""Kernels of the conformance suite: each shows one thing that the backends must do alike. All are race-free."""

import math

import numpy as np
from numba import cuda, float32, float64, int32, int64, uint32

FULL = 0xFFFFFFFF
TILE = 8
PADDED = TILE + 1
TABLE = np.array([3, 1, 4, 1, 5, 9, 2, 6], np.int32)
WEIGHTS = (2, 3, 5, 7)
HALF = np.float32(0.5)


@cuda.jit
def grid_1d(out):
    i = cuda.grid(1)
    if i < out.size:
        out[i] = i * 10 + cuda.threadIdx.x


@cuda.jit
def grid_2d(out):
    x, y = cuda.grid(2)
    if x < out.shape[1] and y < out.shape[0]:
        out[y, x] = y * 1000 + x + cuda.blockIdx.x * 100000


@cuda.jit
def grid_3d(out):
    x, y, z = cuda.grid(3)
    if x < out.shape[2] and y < out.shape[1] and z < out.shape[0]:
        out[z, y, x] = x + 10 * y + 100 * z + 1000 * cuda.threadIdx.z + 10000 * cuda.blockIdx.z


@cuda.jit
def positions(out):
    i = cuda.grid(1)
    out[i, 0] = cuda.threadIdx.x
    out[i, 1] = cuda.blockIdx.x
    out[i, 2] = cuda.blockDim.x
    out[i, 3] = cuda.gridDim.x
    out[i, 4] = cuda.laneid
    out[i, 5] = cuda.warpsize
    out[i, 6] = cuda.gridsize(1)


@cuda.jit
def grid_stride(x, out, n):
    for i in range(cuda.grid(1), n, cuda.gridsize(1)):
        out[i] = x[i] * 2 + 1


@cuda.jit
def grid_stride_while(x, out, n):
    i = cuda.grid(1)
    step = cuda.gridDim.x * cuda.blockDim.x
    while i < n:
        out[i] = x[i] - i
        i += step


@cuda.jit
def early_return(x, out, n):
    i = cuda.grid(1)
    if i >= n:
        return
    if x[i] < 0:
        out[i] = -1
        return
    out[i] = x[i] * 3


@cuda.jit
def return_in_loop(x, out, n):
    i = cuda.grid(1)
    out[i] = -1
    for k in range(n):
        if x[k] == i:
            out[i] = k
            return
    out[i] = -2


@cuda.jit
def exit_before_barrier(x, out, n):
    tile = cuda.shared.array(64, int32)
    i = cuda.grid(1)
    tid = cuda.threadIdx.x
    if i >= n:
        return  # threads that have exited do not count at the barrier
    tile[tid] = x[i]
    cuda.syncthreads()
    left = tid - 1 if tid > 0 else 0
    out[i] = tile[tid] * 100 + tile[left]


@cuda.jit
def loop_after_all_have_returned(x, out, n):
    tile = cuda.shared.array(64, int32)
    i = cuda.grid(1)
    tid = cuda.threadIdx.x
    if i >= n:
        return  # in the last blocks all threads: then nobody is left to end the loop
    value = x[n - 1]
    tile[tid] = x[i]
    while True:
        value = value // 2 + tile[0] % 1  # each thread has its own, and yet they all leave together
        if value <= 0:
            break
        cuda.syncthreads()
        out[i] += value
        cuda.syncthreads()
    while cuda.syncthreads_count(1 if out[i] > 0 else 0) == 5:
        out[i] = -out[i]


@cuda.jit
def same_rounds_in_all_threads(x, out, n):
    i = cuda.grid(1)
    left = n
    while left > 0 and x[left % 8] > -100:  # no thread's own: and yet each thread goes round for itself
        left -= 3
        if n % 2 == 1:
            break
    out[i] = left


@cuda.jit
def collatz(x, out):
    i = cuda.grid(1)
    value = x[i]
    steps = 0
    while value != 1:
        if value % 2 == 0:
            value //= 2
        else:
            value = 3 * value + 1
        steps += 1
        if steps > 200:
            break
    out[i] = steps


@cuda.jit
def continue_and_break(out, n):
    i = cuda.grid(1)
    total = 0
    for k in range(n):
        if (k + i) % 3 == 0:
            continue
        if k > 5 + i:
            break
        total += k
    out[i] = total


@cuda.jit(device=True)
def square_plus(x, y):
    if x < 0:
        return y
    return x * x + y


@cuda.jit(device=True)
def factorial(n):
    product = 1
    for k in range(2, n + 1):
        product *= k
    return product


@cuda.jit(device=True)
def own_index():
    return cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x


@cuda.jit(device=True)
def both(a, b):
    return a + b, a - b


@cuda.jit
def device_functions(x, out):
    i = own_index()
    total, difference = both(x[i], i)
    out[i, 0] = square_plus(x[i], 7)
    out[i, 1] = factorial(i % 6)
    out[i, 2] = total
    out[i, 3] = difference


@cuda.jit(device=True)
def block_sum_of(value, partial):
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
def device_function_with_barriers(x, out):
    partial = cuda.shared.array(64, int32)
    i = cuda.grid(1)
    once = block_sum_of(x[i], partial)
    out[i] = once + block_sum_of(x[i] * 2, partial) * 1000


@cuda.jit(device=True)
def sign_by_warp(value):
    positive = cuda.ballot_sync(FULL, value > 0)
    if positive == 0:
        return -1
    return cuda.popc(positive)


@cuda.jit
def device_function_with_votes(x, out):
    i = cuda.grid(1)
    out[i] = sign_by_warp(x[i])


@cuda.jit
def transpose_tile(x, out):
    tile = cuda.shared.array((TILE, PADDED), float32)
    tx, ty = cuda.threadIdx.x, cuda.threadIdx.y
    row, col = cuda.blockIdx.y * TILE + ty, cuda.blockIdx.x * TILE + tx
    if row < x.shape[0] and col < x.shape[1]:
        tile[ty, tx] = x[row, col]
    cuda.syncthreads()
    row, col = cuda.blockIdx.x * TILE + ty, cuda.blockIdx.y * TILE + tx
    if row < out.shape[0] and col < out.shape[1]:
        out[row, col] = tile[tx, ty]


@cuda.jit
def matmul_tile(a, b, c):
    ta = cuda.shared.array((TILE, TILE), float32)
    tb = cuda.shared.array((TILE, TILE), float32)
    tx, ty = cuda.threadIdx.x, cuda.threadIdx.y
    row, col = cuda.blockIdx.y * TILE + ty, cuda.blockIdx.x * TILE + tx
    total = float32(0)
    for t in range((a.shape[1] + TILE - 1) // TILE):
        k0 = t * TILE
        ta[ty, tx] = a[row, k0 + tx] if row < a.shape[0] and k0 + tx < a.shape[1] else float32(0)
        tb[ty, tx] = b[k0 + ty, col] if k0 + ty < a.shape[1] and col < b.shape[1] else float32(0)
        cuda.syncthreads()
        for k in range(TILE):
            total += ta[ty, k] * tb[k, tx]
        cuda.syncthreads()
    if row < c.shape[0] and col < c.shape[1]:
        c[row, col] = total


@cuda.jit
def dynamic_shared(x, out, n):
    ints = cuda.shared.array(0, int32)
    tid = cuda.threadIdx.x
    ints[tid] = x[tid]
    cuda.syncthreads()
    out[tid] = ints[n - 1 - tid]


@cuda.jit
def local_arrays(x, out):
    history = cuda.local.array((2, 3), int64)
    i = cuda.grid(1)
    for r in range(2):
        for c in range(3):
            history[r, c] = x[i] * (r + 1) + c
    total = 0
    for k in range(6):
        total += history[k % 2, k // 2] * (k + 1)
    out[i] = total


@cuda.jit
def constant_arrays(out):
    table = cuda.const.array_like(TABLE)
    i = cuda.grid(1)
    out[i] = table[i % 8] * WEIGHTS[1] + WEIGHTS[i % 4] + len(TABLE)


@cuda.jit
def barrier_votes(x, out):
    tid = cuda.threadIdx.x
    i = cuda.grid(1)
    out[i, 0] = cuda.syncthreads_count(int32(x[i] > 3))
    out[i, 1] = cuda.syncthreads_and(int32(x[i] > -100))
    out[i, 2] = cuda.syncthreads_or(int32(x[i] == 1000 + tid))


@cuda.jit
def barrier_in_loops(x, out, rounds):
    buffer = cuda.shared.array((2, 64), int32)
    tid = cuda.threadIdx.x
    n = cuda.blockDim.x
    buffer[0, tid] = x[cuda.grid(1)]
    cuda.syncthreads()
    now = 0
    for r in range(rounds):
        if r % 2 == 0:
            buffer[1 - now, tid] = buffer[now, (tid + 1) % n] + r
        else:
            buffer[1 - now, tid] = buffer[now, (tid + n - 1) % n] * 2
        cuda.syncthreads()
        now = 1 - now
        if r == 6:
            break
    out[cuda.grid(1)] = buffer[now, tid]


@cuda.jit
def barrier_in_uniform_branch(x, out, flag):
    tile = cuda.shared.array(64, int32)
    tid = cuda.threadIdx.x
    value = x[cuda.grid(1)]
    if flag > 0:
        tile[tid] = value
        cuda.syncthreads()
        value = tile[cuda.blockDim.x - 1 - tid]
    elif cuda.blockIdx.x == 1:
        value = -value
        cuda.syncthreads()
    out[cuda.grid(1)] = value


@cuda.jit
def hillis_steele(x, out):
    buffer = cuda.shared.array(64, int64)
    tid = cuda.threadIdx.x
    buffer[tid] = x[cuda.grid(1)]
    cuda.syncthreads()
    step = 1
    while step < cuda.blockDim.x:
        add = 0
        if tid >= step:
            add = buffer[tid - step]
        cuda.syncthreads()
        buffer[tid] += add
        cuda.syncthreads()
        step *= 2
    out[cuda.grid(1)] = buffer[tid]


@cuda.jit
def shuffles(x, out):
    i = cuda.grid(1)
    lane = cuda.laneid
    out[i, 0] = cuda.shfl_sync(FULL, x[i], 3)
    out[i, 1] = cuda.shfl_sync(FULL, x[i], (lane * 7 + 1) % 32)
    out[i, 2] = cuda.shfl_up_sync(FULL, x[i], 2)
    out[i, 3] = cuda.shfl_down_sync(FULL, x[i], 5)
    out[i, 4] = cuda.shfl_xor_sync(FULL, x[i], 9)
    out[i, 5] = cuda.shfl_down_sync(-1, x[i], 1) + cuda.shfl_up_sync(-1, x[i] * 2, 1)


@cuda.jit
def warp_sum_loop(x, out):
    i = cuda.grid(1)
    value = x[i]
    offset = 16
    while offset > 0:
        value += cuda.shfl_down_sync(FULL, value, offset)
        offset //= 2
    if cuda.laneid == 0:
        out[i // 32] = value


@cuda.jit
def warp_sum_tuple(x, out):
    i = cuda.grid(1)
    value = x[i]
    for offset in (16, 8, 4, 2, 1):
        value += cuda.shfl_xor_sync(FULL, value, offset)
    out[i] = value


@cuda.jit
def shuffle_in_warp_branch(x, out):
    partial = cuda.shared.array(32, int32)
    tid = cuda.threadIdx.x
    i = cuda.grid(1)
    value = x[i]
    for offset in (16, 8, 4, 2, 1):
        value += cuda.shfl_down_sync(FULL, value, offset)
    if tid % 32 == 0:
        partial[tid // 32] = value
    cuda.syncthreads()
    if tid < 32:
        value = partial[tid] if tid < cuda.blockDim.x // 32 else 0
        for offset in (16, 8, 4, 2, 1):
            value += cuda.shfl_down_sync(FULL, value, offset)
        if tid == 0:
            out[cuda.blockIdx.x] = value


@cuda.jit
def shuffle_half_warps(x, out):
    i = cuda.grid(1)
    value = x[i]
    if cuda.laneid < 16:
        value = cuda.shfl_xor_sync(0xFFFF, value, 1)
    else:
        value = cuda.shfl_xor_sync(0xFFFF0000, value, 2) * 10
    out[i] = value


@cuda.jit
def shuffle_in_divergent_loop(x, out):
    i = cuda.grid(1)
    warp = cuda.threadIdx.x // 32
    value = x[i]
    for r in range(warp + 1):
        value += cuda.shfl_xor_sync(FULL, value, 1 << r)
    out[i] = value


@cuda.jit
def vote_loop(x, out):
    i = cuda.grid(1)
    left = x[i]
    rounds = 0
    while cuda.any_sync(FULL, left > 0):
        left -= 1
        rounds += 1
        cuda.syncwarp()  # when the last lane has left the loop, nobody is there to be missed
    out[i] = rounds * 100 + left


@cuda.jit
def votes(x, out):
    i = cuda.grid(1)
    out[i, 0] = cuda.ballot_sync(FULL, x[i] % 3 == 0)
    out[i, 1] = cuda.all_sync(FULL, x[i] > -5)
    out[i, 2] = cuda.any_sync(FULL, x[i] == 7)
    out[i, 3] = cuda.eq_sync(FULL, x[i] > 2)
    out[i, 4] = cuda.match_any_sync(FULL, x[i] % 5)
    mask, same = cuda.match_all_sync(FULL, x[i] // 100)
    out[i, 5] = mask
    out[i, 6] = same
    out[i, 7] = cuda.popc(cuda.activemask())
    out[i, 8] = cuda.lanemask_lt()


@cuda.jit
def masked_ballot(x, out):
    i = cuda.grid(1)
    mask = cuda.ballot_sync(FULL, x[i] > 2)
    out[i] = -1
    if x[i] > 2:
        out[i] = cuda.popc(cuda.ballot_sync(mask, x[i] % 2 == 0))
        cuda.syncwarp(mask)


@cuda.jit
def warp_exchange_through_shared(x, out):
    buffer = cuda.shared.array(64, int32)
    tid = cuda.threadIdx.x
    buffer[tid] = x[cuda.grid(1)]
    cuda.syncwarp()
    value = buffer[tid ^ 1]
    cuda.syncwarp()
    buffer[tid] = value * 2
    cuda.syncwarp()
    out[cuda.grid(1)] = buffer[tid ^ 3]


@cuda.jit
def global_atomics(x, counts, n):
    i = cuda.grid(1)
    if i < n:
        cuda.atomic.add(counts, 0, x[i])
        cuda.atomic.sub(counts, 1, x[i])
        cuda.atomic.max(counts, 2, x[i])
        cuda.atomic.min(counts, 3, x[i])
        cuda.atomic.and_(counts, 4, x[i] | 0xF0)
        cuda.atomic.or_(counts, 5, x[i] & 0xFF)
        cuda.atomic.xor(counts, 6, x[i])
        cuda.atomic.exch(counts, 7, 42)
        cuda.atomic.cas(counts, 8, 0, 17)


@cuda.jit
def unsigned_atomics(counts):
    cuda.atomic.inc(counts, 0, 6)
    cuda.atomic.dec(counts, 1, 6)


@cuda.jit
def histogram(x, bins, n):
    local = cuda.shared.array(16, int32)
    tid = cuda.threadIdx.x
    if tid < 16:
        local[tid] = 0
    cuda.syncthreads()
    for i in range(cuda.grid(1), n, cuda.gridsize(1)):
        cuda.atomic.add(local, x[i] % 16, 1)
    cuda.syncthreads()
    if tid < 16:
        cuda.atomic.add(bins, (0, tid), local[tid])


@cuda.jit
def float_atomics(x, out):
    i = cuda.grid(1)
    cuda.atomic.add(out, 0, x[i])
    cuda.atomic.max(out, 1, x[i])
    cuda.atomic.min(out, 2, x[i])


@cuda.jit
def compact(x, out, counter, n):
    i = cuda.grid(1)
    if i < n and x[i] > 0:
        place = cuda.atomic.add(counter, 0, 1)
        out[place] = 1


@cuda.jit
def scalar_intrinsics(x, f, out, fout):
    i = cuda.grid(1)
    u = uint32(x[i])
    out[i, 0] = cuda.popc(u)
    out[i, 1] = cuda.clz(u)
    out[i, 2] = cuda.ffs(u)
    out[i, 3] = cuda.brev(u)
    out[i, 4] = cuda.selp(x[i] > 3, x[i], x[i // 2])
    fout[i] = cuda.fma(f[i], float32(2), float32(1))


@cuda.jit
def math_functions(x, out):
    i = cuda.grid(1)
    v = x[i]
    out[i, 0] = math.exp(v)
    out[i, 1] = math.log(abs(v) + float32(1))
    out[i, 2] = math.sqrt(abs(v))
    out[i, 3] = math.tanh(v)
    out[i, 4] = math.erf(v)
    out[i, 5] = math.sin(v)
    out[i, 6] = math.cos(v)
    out[i, 7] = math.floor(v)
    out[i, 8] = math.pow(abs(v), float32(1.5))
    out[i, 9] = max(v, -v, float32(0.25))
    out[i, 10] = min(v, HALF)
    out[i, 11] = math.inf if v > 1 else -v


@cuda.jit
def reused_names(x, out):
    i = cuda.grid(1)
    value = 3
    index = (i * value) % x.size
    value = x[index] * 0.5
    for k in range(3):
        value += k
    k = 2.5
    out[i] = value * k


@cuda.jit
def keeps_old_value(x, out):
    tile = cuda.shared.array(64, int32)
    tid = cuda.threadIdx.x
    value = -1
    if x[cuda.grid(1)] > 3:
        value = x[cuda.grid(1)]
    tile[tid] = value
    cuda.syncthreads()
    if tid % 2 == 0:
        value = tile[tid] + 100
    cuda.syncthreads()
    out[cuda.grid(1)] = value


@cuda.jit
def python_integers(x, y, out):
    i = cuda.grid(1)
    a, b = x[i], y[i]
    out[i, 0] = a // b
    out[i, 1] = a % b
    out[i, 2] = a * b + (a << 3) - (b >> 1)
    out[i, 3] = a & b | a ^ 5
    out[i, 4] = ~a
    out[i, 5] = -a if a < b else a
    out[i, 6] = (a < b) + (a == b) * 2
    out[i, 7] = int(a / b)
    out[i, 8] = a**2
    out[i, 9] = 1 if 0 <= a < b else 0
    out[i, 10] = abs(a) if not a > 0 and b else 9


@cuda.jit
def negative_index(x, out):
    i = cuda.grid(1)
    out[i] = x[i - 3] + x[-1]


@cuda.jit
def wraps_around(x, out):
    i = cuda.grid(1)
    a = int32(x[i])
    out[i] = int32(a * int32(2147483647)) + uint32(a)


@cuda.jit
def hashes_its_index(out):
    """What an index that is known to be positive may not be taken to make: a product that overflows has any sign."""
    i = cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x
    out[i] = (int64(i) * 6364136223846793005 + 1442695040888963407 >> 40) % 13


@cuda.jit
def mixed_types(b, i8, u8, i64, f64, out):
    i = cuda.grid(1)
    flag = b[i]
    out[i, 0] = i8[i] + u8[i]
    out[i, 1] = f64[i] * i64[i] if flag else i64[i] / 4
    out[i, 2] = float32(f64[i]) + float32(0.1)
    out[i, 3] = float64(i8[i]) / 3
    out[i, 4] = u8[i] > i8[i]


@cuda.jit
def half_precision(x, y, out, wide):
    i = cuda.grid(1)
    out[i] = x[i] * y[i] + x[i]
    wide[i] = float32(x[i]) * float32(y[i])


@cuda.jit
def collective_inside_expression(x, out):
    i = cuda.grid(1)
    out[i] = x[i] * 2 + cuda.shfl_xor_sync(FULL, x[i] + 1, 1) * cuda.popc(cuda.ballot_sync(FULL, x[i] > 0))


@cuda.jit
def register_tile(a, b, out, n):
    acc = cuda.local.array((2, 2), float32)
    row, col = cuda.blockIdx.y * 16 + 2 * cuda.threadIdx.y, cuda.blockIdx.x * 16 + 2 * cuda.threadIdx.x
    for i in range(2):
        for j in range(2):
            acc[i, j] = 0
    for k in range(n):
        for i in range(2):
            for j in range(2):
                acc[i, j] += a[row + i, k] * b[k, col + j]
    for i in range(2):
        for j in range(2):
            out[row + i, col + j] = acc[i, j]


@cuda.jit
def uniform_while(x, out, n):
    tile = cuda.shared.array(64, int32)
    tid = cuda.threadIdx.x
    half, rounds = n, 0
    while half > 1:
        half = half // 2 if half % 2 == 0 else 3 * half + 1
        rounds += 1
    tile[tid] = x[cuda.grid(1)]
    while rounds > 5:
        rounds -= 2
        tile[tid] += rounds
    cuda.syncthreads()
    first = tile[0]
    total = 0
    k = 0
    while k < rounds:
        total += tile[k]
        k += 1
    out[cuda.grid(1)] = first * 1000 + total + tile[tid] + rounds


@cuda.jit
def one_thread_a_block(x, out, n):
    b = cuda.blockIdx.x
    seen = 0
    for k in range(n):
        if x[k] % (b + 2) == 0:
            out[b] += x[k]
            seen = out[b]
        elif x[k] > 7:
            break
    out[b] = out[b] * 10 + seen


@cuda.jit
def warp_per_row(x, out, rows, cols):
    row = cuda.grid(1) // 32
    lane = cuda.threadIdx.x % 32
    if row >= rows:
        return
    total = 0
    for j in range(lane, cols, 32):
        total += x[row, j] * (j + 1)
    for offset in (16, 8, 4, 2, 1):
        total += cuda.shfl_down_sync(FULL, total, offset)
    if lane == 0:
        out[row] = total


@cuda.jit
def stencil(x, out, n):
    i = cuda.grid(1)
    if 0 < i < n - 1:
        out[i] = x[i - 1] + 2 * x[i] + x[i + 1]
    elif i < n:
        out[i] = x[i]


@cuda.jit
def lower_triangle(x, out, n):
    row = cuda.blockIdx.x
    for j in range(cuda.threadIdx.x, row + 1, cuda.blockDim.x):
        total = 0
        for k in range(j + 1):
            total += x[row, k]
        out[row, j] = total


@cuda.jit
def row_of_view(x, out):
    i = cuda.grid(1)
    row = x[i]
    out[i] = row[0] + row[row.size - 1]


@cuda.jit
def ticket_lock(lock, out):
    while cuda.atomic.cas(lock, 0, 0, 1) != 0:
        pass
    out[0] += 1
    cuda.threadfence()
    cuda.atomic.exch(lock, 0, 0)


@cuda.jit
def last_block(x, out, counter, n):
    is_last = cuda.shared.array(1, int32)
    i = cuda.grid(1)
    if i < n:
        cuda.atomic.add(out, 0, x[i])
    cuda.threadfence()
    cuda.syncthreads()
    if cuda.threadIdx.x == 0:
        done = cuda.atomic.add(counter, 0, 1)
        is_last[0] = 1 if done == cuda.gridDim.x - 1 else 0
    cuda.syncthreads()
    if is_last[0] == 1:
        if cuda.threadIdx.x == 0:
            out[1] = out[0] * 2
        cuda.syncthreads()


@cuda.jit
def place_in_loops_of_half_a_warp(out, n, width):
    """A place made of loop variables and the thread, in a branch that half of a warp takes."""
    for r in range(2):
        row = 2 * (cuda.threadIdx.x // 16) + r
        votes = cuda.popc(cuda.ballot_sync(0xFFFFFFFF, row >= 0))
        if row < n:
            for h in range(2):
                for c in range(4):
                    place = h * 64 + 4 * (cuda.threadIdx.x % 16) + c
                    if place < width:
                        out[row, place] = votes


@cuda.jit
def loop_variable_changed_by_some(x, out, n):
    """All threads go round a loop with a barrier together; what it leaves, some threads then change."""
    tile = cuda.shared.array(64, int64)
    tid = cuda.threadIdx.x
    for j in range(1, n):
        tile[tid] = x[tid] * j
        cuda.syncthreads()
    if tid < 5:
        j = 9
    out[tid] = j + tile[63 - tid]


@cuda.jit
def loop_variable_left_in_a_branch(x, out, n):
    """A loop in a branch that may hold for some only: what a thread that did not go there holds must not be lost."""
    tid = cuda.threadIdx.x
    total = 0
    if cuda.all_sync(FULL, x[tid] < n):
        half = 8
        while True:
            half //= 2
            if half < 1:
                break
            for j in range(1, half):  # noqa: B007 (read after the loop)
                total += x[tid]
            if j == 3:
                total += 100
    out[tid] = total


@cuda.jit
def loop_variable_of_a_uniform_tree(out, n):
    """Nothing in the loop differs between threads, but its variable does afterwards."""
    total = 0
    for j in range(n):
        total += j
    cuda.syncthreads()
    if cuda.threadIdx.x % 3 == 0:
        j = 50
    out[cuda.threadIdx.x] = total * 100 + j


@cuda.jit(device=True)
def total(row):
    found = 0.0
    for value in row:
        found += value
    return found


@cuda.jit
def loops_over_arrays(x, m, out):
    """The row is taken once; a barrier may stand in the loop; a row of a local, a shared and a global array."""
    tid, i = cuda.threadIdx.x, cuda.grid(1)
    own = cuda.local.array((3, 4), float32)
    tile = cuda.shared.array((2, 32), float32)
    tile[0, tid], tile[1, tid] = tid, 2 * tid
    for a in range(3):
        for b in range(4):
            own[a, b] = 10 * a + b + i
    cuda.syncthreads()
    found, r = 0.0, 1
    for value in own[r]:
        r = 2
        found += value
    for value in tile[tid % 2]:
        found += value
    for value in x:
        if value > 3:
            break
        found += value
    row = m[i % 5]
    for value in row:
        found += value
        cuda.syncthreads()
        tile[0, tid] = value
    for value in (1.5, 2.0):
        found += value
    out[i] = found + total(m[0]) + total(x)


@cuda.jit(device=True)
def left_in_a_branch(x, least, tid, n):
    shared = cuda.shared.array(64, int32)
    shared[tid] = x
    cuda.syncthreads()
    if least <= n <= 0:  # constants decide it, once the launch is known
        half = n * 0.5
        cuda.all_sync(0xFFFFFFFF, half > x)
        result = int(half)
        cuda.syncthreads()
        return result
    result = shared[5] + 1
    cuda.syncthreads()
    return result


@cuda.jit
def branch_that_no_block_takes(x, out):
    out[cuda.grid(1)] = left_in_a_branch(x[cuda.threadIdx.x], 8 % 8, cuda.threadIdx.x, cuda.blockDim.x)


@cuda.jit
def views_chosen_by_lane(x, out, least):
    tid, lane = cuda.threadIdx.x, cuda.threadIdx.x & 31
    own = cuda.shared.array((64, 3), int64)
    for k in range(3):
        own[tid, k] = 3 * tid + k
    row = own[tid][:]
    if least < lane:  # most warps agree
        row = own[tid][::-1]
    row[x[tid] % 3] = 100
    if x[tid] < 4:
        part = own[tid][1:]
    else:
        part = own[tid]
    for k in range(2):  # the same rounds for all, over what differs
        step = k + 5
        part[k] += step
        if x[k] == 7:
            break
    for k in range(3):
        out[cuda.grid(1), k] = own[tid, k] + step
