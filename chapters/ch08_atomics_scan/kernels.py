"""Chapter 8, histograms: counts[b] += how many keys equal b. Many threads, one counter: it takes an atomic.

``counts[b] += 1`` is a read, an addition and a write, and a second thread may write in between. An *atomic* does all
three as one, so nothing is lost; but atomics on one address wait for each other. The ladder is about where they wait:

===========================  ================================  =====================  ================================
kernel                       what it changes                   global atomics         when it loses
===========================  ================================  =====================  ================================
``histogram_v1_global``      an atomic a key, global memory    n                      few bins; all keys alike: then
                                                                                      all n queue at one address
``histogram_v2_privatised``  an atomic a key, in bins of the   n_bins a block at      many bins (at most 4096 fit);
                             block's own in shared memory      most                   few keys a bin: to merge the
                                                                                      blocks costs more than v1
``histogram_v3_coarsened``   eight keys are read before the    as v2                  keys alike, where the 32 lanes of
                             first is counted                                         a warp queue at one bin
``histogram_v4_copies``      up to 32 copies of each bin: a    as v2                  where they do not: there are more
                             lane counts in one of them                               bins to clear and to add up. Above
                                                                                      2048 bins it is v3 again
===========================  ================================  =====================  ================================

Whether lanes queue in shared memory is up to the GPU. From sm_80 on, NVIDIA's assembler makes one instruction
(``ATOMS.POPC.INC``) of an addition of the constant 1 whose old value is not used; on an H100, lanes with one address do
not slow it down, and v3 is the fastest, whatever the keys. It is not used for other additions (weights, say), nor on
sm_75. ``histogram_kernel`` is v3.

A key outside 0 … n_bins - 1 is not counted: that is the caller's way to leave elements out. Counts are integers, so the
order of the atomics does not matter: every run gives the same. Other files here: ``scan.py``, ``scan_array.py``,
``compact.py``, ``topk.py``.
"""

import numpy as np
from numba import cuda, int32

HISTOGRAM_THREADS = 256
HISTOGRAM_BLOCKS = 512  # four for each multiprocessor of a large GPU, all at a time; more would only add merges
MAX_SHARED_BINS = 4096  # 16 KB a block: with eight blocks on a multiprocessor, what most GPUs have
KEYS_AT_ONCE = 8


# --- launch configurations -------------------------------------------------------------------------------------------


def histogram_v1_launch(n):
    """Launch configuration of :func:`histogram_v1_global` for ``n`` keys: ``(grid, block)``; any number of bins.

    Raises ValueError if ``n`` is not positive.
    """
    if n <= 0:
        raise ValueError(f"n = {n}: a launch needs at least 1 key; the counts of none stay as they are")
    keys = 32 * HISTOGRAM_THREADS  # a block's share, at least: 32 keys a thread pay for the merge
    return min((n + keys - 1) // keys, HISTOGRAM_BLOCKS), HISTOGRAM_THREADS


def histogram_launch(n, n_bins):
    """Launch configuration of the versions with bins in shared memory: ``(grid, block)``.

    Raises ValueError if ``n`` is not positive or ``n_bins`` is not in 1 … MAX_SHARED_BINS.
    """
    if not 1 <= n_bins <= MAX_SHARED_BINS:
        raise ValueError(
            f"n_bins = {n_bins}: 1 to {MAX_SHARED_BINS} bins fit in a block's shared memory; "
            "use histogram_v1_global for more"
        )
    return histogram_v1_launch(n)


# --- device functions ------------------------------------------------------------------------------------------------


@cuda.jit(device=True)
def read_key(keys, i, n):
    """keys[i] as int32, or -1, which counts nowhere, if i is n or more."""
    return int32(keys[i]) if i < n else int32(-1)


@cuda.jit(device=True)
def count_key(bins, key, n_bins):
    """bins[key] += 1, unless ``key`` has no bin."""
    if key >= 0 and key < n_bins:
        cuda.atomic.add(bins, key, 1)


@cuda.jit(device=True)
def clear_bins(bins, size):
    """bins[0 … size - 1] = 0 by the threads of a block, with a barrier behind it."""
    for b in range(cuda.threadIdx.x, size, cuda.blockDim.x):
        bins[b] = 0
    cuda.syncthreads()


@cuda.jit(device=True)
def merge_bins(bins, counts, n_bins):
    """counts += bins, with a barrier before it: all threads of the block have counted. Empty bins cost no atomic."""
    cuda.syncthreads()
    for b in range(cuda.threadIdx.x, n_bins, cuda.blockDim.x):
        if bins[b] > 0:
            cuda.atomic.add(counts, b, bins[b])


# --- the ladder ------------------------------------------------------------------------------------------------------


@cuda.jit
def histogram_v1_global(keys, counts, n, n_bins):
    """counts[b] += number of keys equal to b, rung 1: one atomic on global memory for each key.

    keys: (n,) uint8 or int32; those outside 0 … n_bins - 1 are left out. counts: (n_bins,) int32, set to 0 before the
    launch. n, n_bins: int32, any number of bins. The atomics are carried out in the L2 cache, which all blocks share.
    Launch: ``histogram_v1_global[histogram_v1_launch(n)](…)``.
    """
    for i in range(cuda.grid(1), n, cuda.gridsize(1)):
        count_key(counts, int32(keys[i]), n_bins)


@cuda.jit
def histogram_v2_privatised(keys, counts, n, n_bins):
    """counts[b] += number of keys equal to b, rung 2: each block counts in its own shared memory first.

    Arguments as :func:`histogram_v1_global`, but n_bins is at most MAX_SHARED_BINS: the kernel does not look.
    Launch: ``histogram_v2_privatised[histogram_launch(n, n_bins)](…)``. Source: Sakharnykh 2015, "GPU Pro Tip: Fast
    Histograms Using Shared Atomics on Maxwell".
    """
    bins = cuda.shared.array(MAX_SHARED_BINS, int32)
    clear_bins(bins, n_bins)
    for i in range(cuda.grid(1), n, cuda.gridsize(1)):
        count_key(bins, int32(keys[i]), n_bins)
    merge_bins(bins, counts, n_bins)


@cuda.jit
def histogram_v3_coarsened(keys, counts, n, n_bins):
    """counts[b] += number of keys equal to b, rung 3: a thread has eight reads under way before it counts.

    The compiler cannot do this by itself: as far as it knows, an atomic may change the next key, so it reads that only
    afterwards, and each round waits for memory once. Eight reads together wait as long as one.
    Arguments and launch as :func:`histogram_v2_privatised`. Source: Hwu, Kirk, El Hajj 2022, "Programming Massively
    Parallel Processors", section 9.5.
    """
    bins = cuda.shared.array(MAX_SHARED_BINS, int32)
    ahead = cuda.local.array(KEYS_AT_ONCE, int32)  # in registers: loops of known length are unrolled
    clear_bins(bins, n_bins)
    stride = cuda.gridsize(1)
    for i in range(cuda.grid(1), n, KEYS_AT_ONCE * stride):
        for j in range(KEYS_AT_ONCE):  # all reads are under way before the first key is needed
            ahead[j] = read_key(keys, i + j * stride, n)
        for j in range(KEYS_AT_ONCE):
            count_key(bins, ahead[j], n_bins)
    merge_bins(bins, counts, n_bins)


@cuda.jit(device=True)
def count_copy(bins, key, n_bins, log_copies, copy):
    """Adds 1 to copy number ``copy`` of bin ``key``, unless ``key`` has no bin. A bin's copies lie side by side."""
    if key >= 0 and key < n_bins:
        cuda.atomic.add(bins, (key << log_copies) + copy, 1)


@cuda.jit
def histogram_v4_copies(keys, counts, n, n_bins):
    """counts[b] += number of keys equal to b, rung 4: as many copies of the bins as fit, so that lanes do not meet.

    A warp whose keys are all alike makes 32 atomics on one address. With 16 copies of each bin (at 256 bins), at most
    two lanes meet, and the copies of a bin lie in different banks. With 128 bins or fewer, each lane has a copy, and a
    bank, of its own. Above 2048 bins one copy is left. Where lanes with one address do not queue, v3 does the same
    with less.
    Arguments and launch as :func:`histogram_v2_privatised`. Source: Gómez-Luna et al. 2013, "An Optimized Approach to
    Histogram Computation on GPU".
    """
    bins = cuda.shared.array(MAX_SHARED_BINS, int32)
    ahead = cuda.local.array(KEYS_AT_ONCE, int32)
    log_copies = 5
    while n_bins << log_copies > MAX_SHARED_BINS:
        log_copies -= 1
    copies = 1 << log_copies
    copy = cuda.threadIdx.x & (copies - 1)  # the same as % copies, a power of two, without a division
    clear_bins(bins, n_bins << log_copies)
    stride = cuda.gridsize(1)
    for i in range(cuda.grid(1), n, KEYS_AT_ONCE * stride):
        for j in range(KEYS_AT_ONCE):
            ahead[j] = read_key(keys, i + j * stride, n)
        for j in range(KEYS_AT_ONCE):
            count_copy(bins, ahead[j], n_bins, log_copies, copy)
    cuda.syncthreads()
    for b in range(cuda.threadIdx.x, n_bins, cuda.blockDim.x):
        total = int32(0)
        for c in range(copies):
            total += bins[(b << log_copies) + ((b + c) & (copies - 1))]  # each lane starts at another copy: other banks
        if total > 0:
            cuda.atomic.add(counts, b, total)


histogram_kernel = histogram_v3_coarsened


def histogram_reference(keys, n_bins):
    """NumPy reference of all versions: (n,) uint8 or int32, returns (n_bins,) int32."""
    keys = keys.astype(np.int64)
    return np.bincount(keys[(keys >= 0) & (keys < n_bins)], minlength=n_bins).astype(np.int32)
