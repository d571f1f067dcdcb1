"""Index arithmetic that is cut to 32 bits and does not fit. Each result is brought into range: it is only wrong."""

from numba import cuda, int32

from .registry import bug, ints, zeros

BLOCK = 32


@cuda.jit
def stride_wraps(x, out, stride):
    i = cuda.grid(1)
    out[i] = x[int32(i * stride) % x.size]  # BUG


bug(stride_wraps, "int-overflow", None, lambda: stride_wraps[1, BLOCK](ints(1000), zeros(BLOCK), 1 << 27),
    "i * stride reaches 2**31 at i = 16: the cast makes a negative number of it.")  # fmt: skip


@cuda.jit(device=True)
def cell(row, col, pitch):
    return int32(row * pitch + col)  # BUG


@cuda.jit
def pitch_wraps(x, out, pitch):
    i = cuda.grid(1)
    out[i] = x[cell(i, i % 7, pitch) % x.size]


bug(pitch_wraps, "int-overflow", None, lambda: pitch_wraps[2, BLOCK](ints(1000), zeros(64), 50_000_000),
    "The device function returns the place in a large matrix as an int32.")  # fmt: skip


@cuda.jit
def only_far_behind(x, out, chunk):
    i = cuda.grid(1)
    place = int32(i * chunk)  # BUG
    out[i] = x[place % x.size]


bug(only_far_behind, "int-overflow", None, lambda: only_far_behind[4, BLOCK](ints(1000), zeros(128), 22_369_622),
    "The product fits for all blocks but the last one.")  # fmt: skip


@cuda.jit
def second_chunk_wraps(x, out, start):
    i = cuda.grid(1)
    total = 0
    for k in range(2):
        place = int32(i + (k + 1) * start)  # BUG
        total += x[place % x.size]
    out[i] = total


bug(second_chunk_wraps, "int-overflow", None,
    lambda: second_chunk_wraps[1, BLOCK](ints(1000), zeros(BLOCK), 2_000_000_000),
    "The first chunk begins below 2**31, the second beyond it.")  # fmt: skip


@cuda.jit
def middle_wraps(x, out, low, high):
    i = cuda.grid(1)
    middle = int32(low + high + 2 * i) // 2  # BUG
    out[i] = x[middle % x.size]


bug(middle_wraps, "int-overflow", None,
    lambda: middle_wraps[1, BLOCK](ints(1000), zeros(BLOCK), 1_000_000_000, 1_500_000_000),
    "The middle fits, the sum that is halved does not: low + (high - low) // 2.")  # fmt: skip
