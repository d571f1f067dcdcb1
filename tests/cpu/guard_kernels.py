"""Kernels that leave their arrays, each as beginners write it, and a right one. For test_guard.py and test_crash.py."""

from numba import cuda, float32


@cuda.jit
def scale(a, f):
    i = cuda.grid(1)
    a[i] = a[i] * f


@cuda.jit
def guarded(a, f):
    i = cuda.grid(1)
    if i < a.size:
        a[i] = a[i] * f


@cuda.jit
def matmul(a, b, c):
    row, column = cuda.grid(2)
    total = float32(0)
    for k in range(a.shape[1]):
        total += a[row, k] * b[k, column]
    c[row, column] = total


@cuda.jit
def write_next(out, n):
    i = cuda.grid(1)
    if i < n:
        out[i + 1] = 1


@cuda.jit
def read_next(a, out, n):
    i = cuda.grid(1)
    if i < n:
        out[i] = a[i + 1]


@cuda.jit
def write_before(out, distance):
    i = cuda.grid(1)
    if i < out.size:
        out[i - distance] = 1


@cuda.jit
def write_far(out, step):
    i = cuda.grid(1)
    if i < out.size:
        out[i * step] = 1


@cuda.jit
def scatter(places, out):
    i = cuda.grid(1)
    if i < places.size:
        out[places[i]] = 1


@cuda.jit
def scatter_once(places, out):
    i = cuda.grid(1)
    if i < places.size:
        out[places[i]] = 1
        places[i] = 0


@cuda.jit
def add_atomic(bins, h):
    i = cuda.grid(1)
    if i < bins.size:
        cuda.atomic.add(h, bins[i], 1)


@cuda.jit
def tile_reversed(a, out):
    tile = cuda.shared.array(32, float32)
    t, i = cuda.threadIdx.x, cuda.grid(1)
    tile[t] = a[i]
    cuda.syncthreads()
    out[i] = tile[31 - t]


@cuda.jit
def add_both(a, b):
    i = cuda.grid(1)
    if i < b.size:
        b[i] = a[i] + b[i]


@cuda.jit
def slow(out, rounds):
    i = cuda.grid(1)
    s = 0.0
    for k in range(rounds):
        s = s * 0.5 + k
    if i < out.size:
        out[i] = s
