"""Near misses: indices that just fit, memory that is written in time, and index arithmetic that holds. All correct."""

import numpy as np
from numba import cuda, float32, int32, uint32

from common import ptx

from .registry import given, ints, near_miss, zeros

BLOCK = 32
HALO = 2
WITH_HALO = BLOCK + 2 * HALO
BINS = 8


def host(*shape):
    """What `ints` makes, on the host."""
    return np.arange(np.prod(shape), dtype=np.int32).reshape(shape)


# --- indices --------------------------------------------------------------------------------------------------------


@cuda.jit
def guarded(x, out, n):
    i = cuda.grid(1)
    if i < n:
        out[i] = 2 * x[i]


def run_guarded():
    out, exact = zeros(100), zeros(96)
    guarded[4, BLOCK](ints(100), out, 100)
    guarded[3, BLOCK](ints(96), exact, 96)
    return np.concatenate([out.copy_to_host(), exact.copy_to_host()]), np.concatenate([2 * host(100), 2 * host(96)])


near_miss(guarded, "out-of-bounds", run_guarded, "The guard holds, for a multiple of the block and for the rest.")


@cuda.jit
def strided_to_the_end(x, out, n):
    for i in range(cuda.grid(1), n, cuda.gridsize(1)):
        out[i] = x[i] + 1


def run_strided_to_the_end():
    out = zeros(150)
    strided_to_the_end[2, BLOCK](ints(150), out, 150)
    return out.copy_to_host(), host(150) + 1


near_miss(strided_to_the_end, "out-of-bounds", run_strided_to_the_end,
          "A half-open range ends before n, also in the last and incomplete round.")  # fmt: skip


@cuda.jit
def inner_stencil(x, out, n):
    i = cuda.grid(1)
    if 0 < i < n - 1:
        out[i] = x[i - 1] - 2 * x[i] + x[i + 1]


def run_inner_stencil():
    out, x = zeros(60), given(*(k * k for k in range(60)))
    inner_stencil[2, BLOCK](x, out, 60)
    return out.copy_to_host(), np.array([0, *[2] * 58, 0])


near_miss(inner_stencil, "negative-index", run_inner_stencil, "Only elements with two neighbours are computed.")


@cuda.jit
def clamped_neighbours(x, out, n):
    i = cuda.grid(1)
    if i < n:
        out[i] = x[max(i - 1, 0)] + x[min(i + 1, n - 1)]


def run_clamped_neighbours():
    out, x = zeros(45), host(45)
    clamped_neighbours[2, BLOCK](ints(45), out, 45)
    return out.copy_to_host(), x[np.r_[0, :44]] + x[np.r_[1:45, 44]]


near_miss(clamped_neighbours, "negative-index", run_clamped_neighbours, "Both neighbours are clamped into the array.")


@cuda.jit
def periodic_neighbours(x, out, n):
    i = cuda.grid(1)
    if i < n:
        out[i] = x[(i - 1) % n] + x[(i + 1) % n]


def run_periodic_neighbours():
    out, x = zeros(45), host(45)
    periodic_neighbours[2, BLOCK](ints(45), out, 45)
    return out.copy_to_host(), np.roll(x, 1) + np.roll(x, -1)


near_miss(periodic_neighbours, "negative-index", run_periodic_neighbours,
          "Python's remainder of a negative number is not negative: -1 % n is n - 1.")  # fmt: skip


@cuda.jit
def tested_first(x, out, n):
    i = cuda.grid(1)
    if i < n and (i + 1 >= n or x[i + 1] > x[i]) and (i == 0 or x[i - 1] < x[i]):
        out[i] = 1


def run_tested_first():
    out = zeros(45)
    tested_first[2, BLOCK](ints(45), out, 45)
    return out.copy_to_host(), np.ones(45)


near_miss(tested_first, "negative-index", run_tested_first,
          "`and` and `or` stop early: the neighbour is only read where there is one.")  # fmt: skip


@cuda.jit
def transpose_of_a_rectangle(x, out):
    col, row = cuda.grid(2)
    if row < x.shape[0] and col < x.shape[1]:
        out[col, row] = x[row, col]


def run_transpose_of_a_rectangle():
    out = zeros(12, 7)
    transpose_of_a_rectangle[(2, 1), (8, 8)](ints(7, 12), out)
    return out.copy_to_host(), host(7, 12).T


near_miss(transpose_of_a_rectangle, "out-of-bounds", run_transpose_of_a_rectangle,
          "Row and column are swapped, and so are the sizes of the target.")  # fmt: skip


@cuda.jit
def tile_with_halo(x, out, n):
    tile = cuda.shared.array(WITH_HALO, int32)
    tid, i = cuda.threadIdx.x, cuda.grid(1)
    for k in range(tid, WITH_HALO, BLOCK):
        j = cuda.blockIdx.x * BLOCK + k - HALO
        tile[k] = x[j] if 0 <= j < n else 0
    cuda.syncthreads()
    if i < n:
        total = 0
        for k in range(2 * HALO + 1):
            total += tile[tid + k]
        out[i] = total


def run_tile_with_halo():
    out = zeros(75)
    tile_with_halo[3, BLOCK](ints(75), out, 75)
    return out.copy_to_host(), np.convolve(host(75), np.ones(5, np.int32), "same")


near_miss(tile_with_halo, "uninitialized-shared", run_tile_with_halo,
          "The tile is as wide as what is read, and all of it is filled, with zeros outside of the array.")  # fmt: skip


@cuda.jit
def one_memory_two_types(x, out):
    floats = cuda.shared.array(0, float32)
    counts = cuda.shared.array(0, int32)
    tid, n = cuda.threadIdx.x, cuda.blockDim.x
    floats[tid] = x[tid] / 2
    counts[n + tid] = tid
    cuda.syncthreads()
    out[tid] = floats[n - 1 - tid] + counts[n + (tid + 1) % n]


def run_one_memory_two_types():
    out = zeros(BLOCK, dtype=np.float32)
    one_memory_two_types[1, BLOCK, 0, 8 * BLOCK](ints(BLOCK), out)
    return out.copy_to_host(), host(BLOCK)[::-1] / 2 + np.roll(host(BLOCK), -1)


near_miss(one_memory_two_types, "shared-race", run_one_memory_two_types,
          "Both dynamic arrays begin at byte 0, and the second one is used behind the first.")  # fmt: skip


@cuda.jit
def half_open_search(values, keys, out):
    i = cuda.grid(1)
    low, high = 0, values.size
    while low < high:
        middle = (low + high) // 2
        if values[middle] < keys[i]:
            low = middle + 1
        else:
            high = middle
    out[i] = 1 if low < values.size and values[low] == keys[i] else 0


def run_half_open_search():
    out = zeros(4)
    half_open_search[1, 4](ints(40), given(3, 39, 99, -5), out)
    return out.copy_to_host(), np.array([1, 1, 0, 0])


near_miss(half_open_search, "out-of-bounds", run_half_open_search,
          "The search may end behind the last element, and asks before it reads there.")  # fmt: skip


@cuda.jit(device=True)
def first_not_below(values, limit):
    for k in range(values.size):
        if values[k] >= limit:
            return k
    return values.size


@cuda.jit(device=True)
def element(values, k):
    return values[k]


@cuda.jit
def guard_before_a_device_function(values, limits, out):
    i = cuda.grid(1)
    if i < limits.size:
        k = first_not_below(values, limits[i])
        found = k < values.size and element(values, k) == limits[i]
        left = element(values, k - 1) if k > 0 else -1
        out[i] = 100 * left + k if found else -k


def run_guard_before_a_device_function():
    out = zeros(4)
    guard_before_a_device_function[1, BLOCK](given(*range(0, 80, 2)), given(0, 10, 11, 99), out)
    return out.copy_to_host(), np.array([-100, 805, -6, -40])


near_miss(guard_before_a_device_function, "negative-index", run_guard_before_a_device_function,
          "The guard keeps the device function from being called for an element that is not there.",
          unchecked=True)  # fmt: skip


@cuda.jit
def rows_as_views(x, out):
    i = cuda.grid(1)
    if i < x.shape[0]:
        row, target = x[i], out[i]
        for k in range(row.size):
            target[row.size - 1 - k] = row[k]


def run_rows_as_views():
    out = zeros(6, 5)
    rows_as_views[1, BLOCK](ints(6, 5), out)
    return out.copy_to_host(), host(6, 5)[:, ::-1]


near_miss(rows_as_views, "out-of-bounds", run_rows_as_views,
          "Each thread reads and writes one row, through views of it.", unchecked=True)  # fmt: skip


@cuda.jit
def four_at_once_with_a_rest(x, out, n):
    i = 4 * cuda.grid(1)
    if i + 3 < n:
        a, b, c, d = ptx.load_float4(x, i)
        ptx.store_float4(out, i, d, c, b, a)
    elif i < n:
        for k in range(i, n):
            out[k] = x[k]


def run_four_at_once_with_a_rest():
    x, out = np.arange(42, dtype=np.float32), zeros(42, dtype=np.float32)
    four_at_once_with_a_rest[1, BLOCK](cuda.to_device(x), out, 42)
    return out.copy_to_host(), np.r_[x[:40].reshape(10, 4)[:, ::-1].ravel(), x[40:]]


near_miss(four_at_once_with_a_rest, "out-of-bounds", run_four_at_once_with_a_rest,
          "The two elements that are left over are copied one by one.")  # fmt: skip


# --- memory that is written in time ---------------------------------------------------------------------------------


@cuda.jit
def local_filled_by_a_loop(x, out):
    window = cuda.local.array(4, int32)
    i = cuda.grid(1)
    for k in range(4):
        window[k] = x[i + k]
    total = 0
    for k in range(3, -1, -1):
        total = total * 2 + window[k]
    out[i] = total


def run_local_filled_by_a_loop():
    out, x = zeros(BLOCK), host(BLOCK + 3)
    local_filled_by_a_loop[1, BLOCK](ints(BLOCK + 3), out)
    return out.copy_to_host(), sum(x[k : k + BLOCK] << k for k in range(4))


near_miss(local_filled_by_a_loop, "uninitialized-local", run_local_filled_by_a_loop,
          "One loop fills the local array and another one, backwards, reads it.")  # fmt: skip


@cuda.jit
def local_used_as_far_as_filled(x, out, n):
    found = cuda.local.array(8, int32)
    i = cuda.grid(1)
    count = 0
    for k in range(i, min(i + 8, n)):
        if x[k] % 2 == 1:
            found[count] = x[k]
            count += 1
    total = 0
    for k in range(count):
        total += found[k]
    if i < n:
        out[i] = total


def run_local_used_as_far_as_filled():
    out, x = zeros(50), host(50)
    local_used_as_far_as_filled[2, BLOCK](ints(50), out, 50)
    return out.copy_to_host(), np.array([sum(v for v in x[i : i + 8] if v % 2 == 1) for i in range(50)])


near_miss(local_used_as_far_as_filled, "uninitialized-local", run_local_used_as_far_as_filled,
          "How many places are filled depends on the data, and only so many are read.")  # fmt: skip


@cuda.jit
def rest_of_the_tile_zeroed(x, out, n):
    tile = cuda.shared.array(BLOCK, int32)
    tid, i = cuda.threadIdx.x, cuda.grid(1)
    if i < n:
        tile[tid] = x[i]
    else:
        tile[tid] = 0
    cuda.syncthreads()
    if i < n:
        out[i] = tile[tid] + tile[(tid + 1) % BLOCK]


def run_rest_of_the_tile_zeroed():
    out = zeros(51)
    rest_of_the_tile_zeroed[2, BLOCK](ints(51), out, 51)
    tiles = np.concatenate([host(51), np.zeros(13, np.int32)]).reshape(2, BLOCK)
    return out.copy_to_host(), (tiles + np.roll(tiles, -1, axis=1)).ravel()[:51]


near_miss(rest_of_the_tile_zeroed, "uninitialized-shared", run_rest_of_the_tile_zeroed,
          "In the last block, threads without an element fill their place with a zero.")  # fmt: skip


@cuda.jit
def rest_of_the_tile_not_read(x, out, n):
    tile = cuda.shared.array(BLOCK, int32)
    tid, i = cuda.threadIdx.x, cuda.grid(1)
    if i < n:
        tile[tid] = x[i]
    cuda.syncthreads()
    if i < n:
        right = tile[tid + 1] if tid + 1 < BLOCK and i + 1 < n else 0
        out[i] = tile[tid] + right


def run_rest_of_the_tile_not_read():
    out = zeros(51)
    rest_of_the_tile_not_read[2, BLOCK](ints(51), out, 51)
    tiles = np.concatenate([host(51), np.zeros(13, np.int32)]).reshape(2, BLOCK)
    right = np.concatenate([tiles[:, 1:], np.zeros((2, 1), np.int32)], axis=1)
    return out.copy_to_host(), (tiles + right).ravel()[:51]


near_miss(rest_of_the_tile_not_read, "uninitialized-shared", run_rest_of_the_tile_not_read,
          "A part of the last tile stays empty, and nobody reads it.")  # fmt: skip


@cuda.jit
def square(x, out):
    i = cuda.grid(1)
    if i < x.size:
        out[i] = x[i] * x[i]


def run_square():
    between, out = cuda.device_array(40, np.int32), cuda.device_array_like(ints(40))
    square[2, BLOCK](ints(40), between)
    square[2, BLOCK](between, out)
    return out.copy_to_host(), host(40) ** 4


near_miss(square, "uninitialized-global", run_square,
          "A fresh device array is written by one launch and read by the next.")  # fmt: skip


@cuda.jit
def add_into(x, out):
    i = cuda.grid(1)
    if i < x.size:
        out[i] += x[i]


def run_add_into():
    out = cuda.device_array(40, np.int32)
    out.copy_to_device(host(40))
    parts = cuda.device_array(40, np.int32)
    parts[:30] = 5
    parts[30:] = host(10)
    add_into[2, BLOCK](parts, out)
    return out.copy_to_host(), host(40) + np.r_[[5] * 30, 0:10]


near_miss(add_into, "uninitialized-global", run_add_into,
          "Both arrays come from device_array and are filled by the host, one of them in two pieces.")  # fmt: skip


@cuda.jit
def write_then_add(x, out):
    i = cuda.grid(1)
    out[i] = 0
    for k in range(3):
        out[i] += x[k, i]


def run_write_then_add():
    out = cuda.device_array(BLOCK, np.int32)
    write_then_add[1, BLOCK](ints(3, BLOCK), out)
    return out.copy_to_host(), host(3, BLOCK).sum(axis=0)


near_miss(write_then_add, "uninitialized-global", run_write_then_add,
          "Each thread zeroes its element of the fresh array before it adds to it.")  # fmt: skip


# --- index arithmetic -----------------------------------------------------------------------------------------------


@cuda.jit
def just_fits(x, out, stride):
    i = cuda.grid(1)
    out[i] = x[int32(i * stride + i) % x.size] + x[int32(-i * stride) % x.size]


def run_just_fits():
    stride, i = (2**31 - 1) // 63 - 1, np.arange(64, dtype=np.int64)
    out = zeros(64)
    just_fits[2, BLOCK](ints(1000), out, stride)
    return out.copy_to_host(), (i * stride + i) % 1000 + (-i * stride) % 1000


near_miss(just_fits, "int-overflow", run_just_fits,
          "The largest product is just below 2**31, the smallest just above -2**31.")  # fmt: skip


@cuda.jit
def hash_on_purpose(x, out):
    i = cuda.grid(1)
    out[i] = uint32(x[i] * 2654435761) % uint32(64)


def run_hash_on_purpose():
    out = zeros(BLOCK)
    hash_on_purpose[1, BLOCK](ints(BLOCK), out)
    return out.copy_to_host(), np.arange(BLOCK) * 2654435761 % 2**32 % 64


near_miss(hash_on_purpose, "int-overflow", run_hash_on_purpose,
          "Unsigned arithmetic is defined to wrap, and a hash wants that it does.")  # fmt: skip


@cuda.jit
def wide_index(x, out, pitch):
    i = cuda.grid(1)
    out[i] = x[(i * pitch + 1) % x.size]


def run_wide_index():
    out = zeros(64)
    wide_index[2, BLOCK](ints(1000), out, 2**40 + 1)
    return out.copy_to_host(), (np.arange(64) * (2**40 + 1) + 1) % 1000


near_miss(wide_index, "int-overflow", run_wide_index, "Without a cast, Numba computes indices in 64 bits.")
