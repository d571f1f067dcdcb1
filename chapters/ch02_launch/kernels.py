"""Chapter 2, the launch: one function, run by many threads at once, each of which knows who it is.

A launch ``kernel[grid, block](arguments)`` starts ``grid`` blocks of ``block`` threads. Hardware runs the threads of a
block in *warps* of 32; a thread's place in its warp is its *lane*.

=======================  ===============================================  ==========================================
kernel                   what it shows                                    what goes wrong
=======================  ===============================================  ==========================================
``hello_kernel``         every thread says which one it is                nothing: it is guarded
``double_v1_unguarded``  one thread an element, and no questions asked    a grid that is larger than the array makes
                                                                          threads read and write past its end
``double_v2_guarded``    ``if i < n``: threads past the end do nothing    nothing
=======================  ===============================================  ==========================================

``blocks_for`` is the arithmetic behind every launch; ``check_launch`` names the limits.
"""

import numpy as np
from numba import cuda

WARP = 32
MAX_THREADS = 1024  # in a block
MAX_BLOCK = (1024, 1024, 64)  # threads along x, y and z
MAX_GRID = (2**31 - 1, 65535, 65535)  # blocks along x, y and z


def blocks_for(n, threads):
    """How many blocks of ``threads`` threads give every one of ``n`` elements a thread: n / threads, rounded up.

    Raises ValueError if ``n`` or ``threads`` is not positive, or if ``threads`` is more than a block can have.
    """
    if n <= 0:
        raise ValueError(f"n = {n}: a launch needs at least 1 element; skip the launch for empty input")
    if not 1 <= threads <= MAX_THREADS:
        raise ValueError(f"threads = {threads}: a block has 1 to {MAX_THREADS} threads; use more blocks instead")
    return (n + threads - 1) // threads


def check_launch(grid, block):
    """Raises ValueError, naming the limit, unless ``kernel[grid, block]`` is a launch that a GPU accepts.

    grid, block: an int or a tuple of 1 to 3 ints, along x, y, z. Source: CUDA C++ Programming Guide, "Technical
    Specifications per Compute Capability" (the same limits since compute capability 3.0).
    """
    for what, given, limits in (("grid", grid, MAX_GRID), ("block", block, MAX_BLOCK)):
        sizes = given if isinstance(given, tuple) else (given,)
        if not 1 <= len(sizes) <= 3:
            raise ValueError(f"{what} = {given}: it has {len(sizes)} axes; 1 to 3 are possible, x, y and z")
        for axis, size, limit in zip("xyz", sizes, limits):
            if not 1 <= size <= limit:
                raise ValueError(f"{what} = {given}: {size} along {axis}; 1 to {limit} are possible")
    threads = int(np.prod(block))
    if threads > MAX_THREADS:
        raise ValueError(f"block = {block}: {threads} threads; a block has at most {MAX_THREADS}, so use more blocks")


@cuda.jit
def hello_kernel(who, n):
    """who[i] = (block, thread, warp, lane) of the thread with number i: the first kernel of the book.

    who: (n, 4) int32. n: int32. Launch: ``hello_kernel[blocks_for(n, threads), threads](…)``, any ``threads``.
    """
    block = cuda.blockIdx.x  # which block this thread belongs to
    thread = cuda.threadIdx.x  # its number in the block
    i = block * cuda.blockDim.x + thread  # its number among all: cuda.grid(1) is short for this line
    if i < n:
        who[i, 0] = block
        who[i, 1] = thread
        who[i, 2] = thread // WARP  # which warp of its block
        who[i, 3] = thread % WARP  # which lane of its warp


def hello_reference(n, threads):
    """NumPy reference of :func:`hello_kernel`: (n, 4) int32."""
    i = np.arange(n)
    thread = i % threads
    return np.stack([i // threads, thread, thread // WARP, thread % WARP], axis=1).astype(np.int32)


@cuda.jit
def double_v1_unguarded(x):
    """x[i] = 2 * x[i], and the launch must have exactly as many threads as x has elements.

    x: (n,) float32. A thread past the end doubles whatever lies behind x: another array, most likely. Nothing
    tells you.
    Launch: ``double_v1_unguarded[n // threads, threads](…)``, threads a divisor of n.
    """
    i = cuda.grid(1)
    x[i] = 2 * x[i]


@cuda.jit
def double_v2_guarded(x, n):
    """x[i] = 2 * x[i] for i < n; threads past the end do nothing. All kernels of this book begin like this one.

    x: (n,) float32. n: int32. Launch: ``double_v2_guarded[blocks_for(n, threads), threads](…)``, any ``threads``.
    """
    i = cuda.grid(1)
    if i < n:
        x[i] = 2 * x[i]


double_kernel = double_v2_guarded


def double_reference(x):
    """NumPy reference of both versions: (n,) float32, returns a new array."""
    return 2 * x
