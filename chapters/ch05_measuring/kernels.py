"""Chapter 5, measuring: a kernel whose arithmetic can be turned up, and one that only keeps the GPU busy.

A kernel that does ``steps`` fused multiply-adds on every float it loads does ``2 * steps`` operations for 8 bytes moved
(one float read, one written): its *arithmetic intensity* is ``steps / 4`` operations a byte. With few steps the
memory sets the pace, with many the arithmetic units do, and the bend between lies where both take equally long.

The inner loops are written with ``while``, not ``for _ in range(steps)``: numba-cuda's range counts with three integer
instructions a turn, which would be more than the step itself. Where the body is long this does not matter.

==========================  ===============================================  ==========================================
kernel                      what it changes                                  when it loses
==========================  ===============================================  ==========================================
``fma_chain_v1_one``        one float a thread at a time: every step waits   few warps a multiprocessor: nothing else
                            for the one before (a *dependency chain*)        to do while a step is under way
``fma_chain_v2_four``       four floats a thread, four chains that do not    small arrays: a quarter of the threads;
                            wait for each other                              four times the registers
``fma_chain_v3_float4``     the four floats are neighbours: one load of 16   arrays that do not begin at a multiple of
                            bytes brings them                                16 bytes
``fma_chain_v4_unrolled``   eight steps an iteration: its counting and       on an H100, from 64 steps on: the compiler
                            jumping should take less of the time             unrolls v3's loop by itself
==========================  ===============================================  ==========================================

All four compute the same, take the same arguments and any launch; ``fma_chain_launch`` gives a good one, and
``fma_chain_few_launch`` one with as few warps as you like. ``fma_chain`` is the fastest of them on an H100.

``busy_kernel`` computes for as long as it is told and touches no memory but for one number: something to wait for.
"""

import numpy as np
from numba import cuda, float32

from chapters.ch02_launch.kernels import MAX_THREADS
from chapters.ch03_indexing.kernels import blocks_grid_stride
from common.ptx import load_float4, store_float4

CHAINS = 4  # floats a thread of v2 to v4 has in hand at a time
UNROLL = 8  # steps a turn of v4's loop
BYTES_PER_FLOAT = 8  # moved: 4 read, 4 written
FLOPS_PER_STEP = 2  # a multiplication and an addition, though one instruction does both


def fma_chain_launch(n, threads=256):
    """Launch configuration of all versions for ``n`` floats, enough to fill any GPU: ``(grid, block)``.

    Raises ValueError if ``n`` or ``threads`` is not positive, or if ``threads`` is more than a block can have.
    """
    return blocks_grid_stride((n + CHAINS - 1) // CHAINS if n > 0 else n, threads, max_blocks=1 << 14)


def fma_chain_few_launch(threads, blocks):
    """A launch of ``blocks`` blocks of ``threads`` threads, whatever the size of the arrays: ``(grid, block)``.

    With ``blocks`` = the number of multiprocessors, each of them gets ``threads / 32`` warps and no more.
    Raises ValueError if a number is not positive or ``threads`` is more than a block can have.
    """
    if not 1 <= threads <= MAX_THREADS:
        raise ValueError(f"threads = {threads}: a block has 1 to {MAX_THREADS} threads; use more blocks instead")
    if blocks <= 0:
        raise ValueError(f"blocks = {blocks}: a launch needs at least 1 block")
    return blocks, threads


def fma_chain_intensity(steps):
    """Arithmetic intensity of all versions in operations a byte. Raises ValueError if ``steps`` is negative."""
    if steps < 0:
        raise ValueError(f"steps = {steps}: a chain cannot have fewer than 0 steps")
    return FLOPS_PER_STEP * steps / BYTES_PER_FLOAT


@cuda.jit
def fma_chain_v1_one(x, out, a, b, steps, n):
    """out[i] = x[i] put through ``y = a * y + b``, ``steps`` times: one chain a thread.

    x, out: (n,) float32; ``out`` may be ``x`` itself. a, b: float32 (a Python float would make it a float64's, slow on
    most GPUs). steps, n: int32, steps at least 0. Launch: ``fma_chain_v1_one[fma_chain_launch(n)](…)`` or any other.
    """
    for i in range(cuda.grid(1), n, cuda.gridsize(1)):
        y = x[i]
        step = 0
        while step < steps:
            y = a * y + b  # needs the y of the step before: some cycles of waiting, unless other warps fill them
            step += 1
        out[i] = y


@cuda.jit
def fma_chain_v2_four(x, out, a, b, steps, n):
    """Like :func:`fma_chain_v1_one` with four chains a thread, on floats that lie a grid apart (all reads coalesced).

    Arguments and launch as there. Source: Volkov 2010, "Better Performance at Lower Occupancy": independent
    instructions of one thread hide latency as other threads do (*instruction-level parallelism*, ILP).
    """
    stride = cuda.gridsize(1)
    for i0 in range(cuda.grid(1), n, CHAINS * stride):
        i1, i2, i3 = i0 + stride, i0 + 2 * stride, i0 + 3 * stride
        y0, y1, y2, y3 = x[i0], float32(0), float32(0), float32(0)
        if i1 < n:
            y1 = x[i1]
        if i2 < n:
            y2 = x[i2]
        if i3 < n:
            y3 = x[i3]
        step = 0
        while step < steps:
            y0 = a * y0 + b  # four steps that need nothing from each other: the next begins before this one ends
            y1 = a * y1 + b
            y2 = a * y2 + b
            y3 = a * y3 + b
            step += 1
        out[i0] = y0
        if i1 < n:
            out[i1] = y1
        if i2 < n:
            out[i2] = y2
        if i3 < n:
            out[i3] = y3


@cuda.jit
def fma_chain_v3_float4(x, out, a, b, steps, n):
    """Like :func:`fma_chain_v2_four`, the four floats side by side: 16 bytes a load and a store (chapter 4).

    Arguments and launch as there; x and out begin at a multiple of 16 bytes, as every array of its own does.
    The last ``n % 4`` floats are taken one by one.
    """
    quads = n // CHAINS
    for quad in range(cuda.grid(1), quads, cuda.gridsize(1)):
        y0, y1, y2, y3 = load_float4(x, CHAINS * quad)
        step = 0
        while step < steps:
            y0 = a * y0 + b
            y1 = a * y1 + b
            y2 = a * y2 + b
            y3 = a * y3 + b
            step += 1
        store_float4(out, CHAINS * quad, y0, y1, y2, y3)
    for i in range(CHAINS * quads + cuda.grid(1), n, cuda.gridsize(1)):
        y = x[i]
        step = 0
        while step < steps:
            y = a * y + b
            step += 1
        out[i] = y


@cuda.jit
def fma_chain_v4_unrolled(x, out, a, b, steps, n):
    """Like :func:`fma_chain_v3_float4`, eight steps a turn of the loop: counting and jumping once for 32 steps.

    Arguments and launch as there.
    """
    quads = n // CHAINS
    for quad in range(cuda.grid(1), quads, cuda.gridsize(1)):
        y0, y1, y2, y3 = load_float4(x, CHAINS * quad)
        step = 0
        while step + UNROLL <= steps:
            for _ in range(UNROLL):  # a constant: the compiler writes the body eight times and no loop
                y0 = a * y0 + b
                y1 = a * y1 + b
                y2 = a * y2 + b
                y3 = a * y3 + b
            step += UNROLL
        while step < steps:
            y0 = a * y0 + b
            y1 = a * y1 + b
            y2 = a * y2 + b
            y3 = a * y3 + b
            step += 1
        store_float4(out, CHAINS * quad, y0, y1, y2, y3)
    for i in range(CHAINS * quads + cuda.grid(1), n, cuda.gridsize(1)):
        y = x[i]
        step = 0
        while step < steps:
            y = a * y + b
            step += 1
        out[i] = y


fma_chain = fma_chain_v3_float4


def fma_chain_reference(x, a, b, steps):
    """NumPy reference of all versions: (n,) float32 and three numbers; float64 inside, returns a new (n,) float32."""
    y = x.astype(np.float64)
    for _ in range(steps):
        y = np.float64(np.float32(a)) * y + np.float64(np.float32(b))
    return y.astype(np.float32)


# --- something to wait for -------------------------------------------------------------------------------------------


def busy_launch(blocks=1, threads=32):
    """Launch configuration of :func:`busy_kernel`: ``(grid, block)``; one warp occupies next to nothing of a GPU.

    Raises ValueError if a number is not positive or ``threads`` is more than a block can have.
    """
    return fma_chain_few_launch(threads, blocks)


@cuda.jit
def busy_kernel(out, rounds):
    """out[0] = where ``rounds`` steps of a pseudo-random sequence lead, one step after the other, from 1.

    The time is proportional to ``rounds`` and to nothing else: integer steps that no compiler can shorten, and no
    memory. For waiting on purpose: with ``rounds`` large, what is launched behind it queues up.
    out: (1,) uint32. rounds: int32, at least 0. Launch: ``busy_kernel[busy_launch()](…)``, any.
    Source: Marsaglia 2003, "Xorshift RNGs" (13, 17, 5).
    """
    state = np.uint32(1)
    for _ in range(rounds):
        state ^= np.uint32(state << np.uint32(13))
        state ^= np.uint32(state >> np.uint32(17))
        state ^= np.uint32(state << np.uint32(5))
    if cuda.grid(1) == 0:
        out[0] = state


def busy_reference(rounds):
    """NumPy-free reference of :func:`busy_kernel`: the number that it leaves in ``out[0]``, an int."""
    state = 1
    for _ in range(rounds):
        state ^= state << 13 & 0xFFFFFFFF
        state ^= state >> 17
        state ^= state << 5 & 0xFFFFFFFF
    return state
