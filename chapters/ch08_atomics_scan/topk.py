"""Chapter 8, radix select: the k-th largest of n floats without sorting them, from a histogram and a scan.

Write the numbers as integers that sort alike (``float_key``) and look at the highest 8 bits of each. A histogram of
these 256 digits, scanned from the top, says in which bin the k-th largest lies and how many numbers lie above that bin.
Then the next 8 bits of the numbers in that bin, and so on: four passes over x settle 32 bits, whatever k is.

==========================  =====================================================  ===============================
kernel                      what it does                                           passes over x, one block
==========================  =====================================================  ===============================
``radix_select_kernel``     the k-th largest value                                 4
``top_k_v1_radix_select``   the k largest, sorted, with their places; k <= 1024    6, and 1/256 of one
==========================  =====================================================  ===============================

It loses where one block is not enough to read x fast (some 100 000 elements: one multiprocessor moves a hundredth of
what all of them can), and for k = 1, which takes one pass (chapter 7's ``greedy_argmax``).

Equal numbers: the k-th largest value may occur several times, and not all of them need belong to the k largest. So
with the value, ``block_kth_largest`` returns how many numbers are greater; of those that are equal, the first
k - greater belong, and ``block_nth_equal`` finds the last of them. -0.0 and +0.0 are equal. NaN counts as -inf, so that
it is selected last of all; no NaN is ever returned. Only integers are added: every run gives the same.
"""

import numpy as np
from numba import cuda, float32, int32, int64

from .scan import PARTIAL, block_exclusive_scan

DIGIT_BITS = 8
DIGITS = 1 << DIGIT_BITS
DIGIT_COPIES = 4  # of each bin, as in histogram_v4_copies: floats of one size have their highest digit in common
DIGIT_BINS = DIGITS * DIGIT_COPIES  # length of the array ``bins`` of the functions below
KEY_OFFSET = 1 << 31  # makes every key positive
SELECT_THREADS = 1024
TOP_K_THREADS = 512  # some GPUs need more than the 64 registers that 1024 threads would leave to each
READS_AT_ONCE = 4
TOP_K_MAX = 1024
PLACE_BITS = 31
LAST_PLACE = (1 << PLACE_BITS) - 1
NO_PLACE = -(1 << 63)  # below everything that is there


# --- floats as integers ----------------------------------------------------------------------------------------------


@cuda.jit(device=True)
def float_key(value):
    """An int64 that sorts as the float32 ``value`` does: a < b gives float_key(a) < float_key(b). Not for NaN.

    A float is a sign and a magnitude, and the bits of a magnitude, read as an integer, grow with it.
    """
    magnitude = int64(cuda.libdevice.float_as_int(abs(value)))
    return -magnitude if value < 0 else magnitude


@cuda.jit(device=True)
def key_float(key):
    """The float32 whose ``float_key`` is ``key`` (0.0 for 0)."""
    magnitude = cuda.libdevice.int_as_float(int32(abs(key)))
    return -magnitude if key < 0 else magnitude


# --- device functions of one block -----------------------------------------------------------------------------------


@cuda.jit(device=True)
def clear_digits(bins):
    """Empties all bins, with a barrier behind it."""
    for b in range(cuda.threadIdx.x, DIGIT_BINS, cuda.blockDim.x):
        bins[b] = 0
    cuda.syncthreads()


@cuda.jit(device=True)
def count_in_bin(bins, b):
    """Adds 1 to bin ``b``: to the copy that is this lane's."""
    cuda.atomic.add(bins, b * DIGIT_COPIES + cuda.threadIdx.x % DIGIT_COPIES, 1)


@cuda.jit(device=True)
def block_find_bin(bins, need, partial):
    """The first of 256 bins up to which at least ``need`` were counted, and how many lie in the bins before it.

    bins: (DIGIT_BINS,) int32, shared, counted to the end by all threads (a barrier stands at the beginning). need:
    integer, at least 1. partial: (PARTIAL,) int32, shared. Returns ``(bin, before)``, in every thread; bin is 256 if
    there are fewer than ``need`` in all. The block must be a multiple of 32 threads, 256 at least; all must call it.
    """
    b = cuda.threadIdx.x
    cuda.syncthreads()
    count = int32(0)
    if b < DIGITS:
        for copy in range(DIGIT_COPIES):
            count += bins[b * DIGIT_COPIES + copy]
    count = int32(count)
    before, total = block_exclusive_scan(count, partial)  # its barriers: all have read bins, which may be written now
    if b < DIGITS and before < need and need <= before + count:
        bins[0] = b
        bins[1] = before
    if b == 0 and total < need:
        bins[0] = DIGITS
        bins[1] = total
    cuda.syncthreads()
    found = bins[0]
    before = bins[1]
    cuda.syncthreads()
    return found, before


@cuda.jit(device=True)
def read_or_lowest(x, i, n):
    """x[i], or -inf for NaN and past the end. More of the lowest change no k-th largest."""
    value = float32(-np.inf)
    if i < n and x[i] > value:
        value = x[i]
    return value


@cuda.jit(device=True)
def count_digit(bins, value, prefix, shift):
    """Counts the 8 bits of value's key from bit ``shift`` on, if the bits above are ``prefix``; high digits first."""
    key = float_key(value) + KEY_OFFSET
    if key >> (shift + DIGIT_BITS) == prefix:
        count_in_bin(bins, DIGITS - 1 - ((key >> shift) & (DIGITS - 1)))


@cuda.jit(device=True)
def block_kth_largest(x, n, k, bins, partial):
    """The k-th largest of x and how many are greater than it, in every thread of a block: ``(value, greater)``.

    x: (n,) float32; NaN counts as -inf. k: integer, 1 … n. bins: (DIGIT_BINS,) int32 and partial: (PARTIAL,) int32 in
    shared memory, declared by the kernel; their contents do not matter, and they may be used again after the call.
    The block must be one-dimensional, a multiple of 32 threads, 256 at least, and all must call it.
    Of the elements equal to ``value``, k - greater belong to the k largest. If x has fewer than k elements above -inf,
    value is -inf, and greater is how many there are. Source: Alabi, Blanchard, Gordon, Steinbach 2012, "Fast
    k-Selection Algorithms for Graphics Processing Units".
    """
    ahead = cuda.local.array(READS_AT_ONCE, float32)
    threads = cuda.blockDim.x
    prefix = int64(0)
    greater = int64(0)
    for turn in range(32 // DIGIT_BITS):
        shift = 32 - DIGIT_BITS - DIGIT_BITS * turn
        clear_digits(bins)
        for i in range(cuda.threadIdx.x, n, READS_AT_ONCE * threads):
            for j in range(READS_AT_ONCE):  # all reads are under way before the first is counted
                ahead[j] = read_or_lowest(x, i + j * threads, n)
            for j in range(READS_AT_ONCE):
                count_digit(bins, ahead[j], prefix, shift)
        digit, above = block_find_bin(bins, k - greater, partial)
        greater += above
        prefix = (prefix << DIGIT_BITS) + (DIGITS - 1 - digit)
    return key_float(prefix - KEY_OFFSET), greater


@cuda.jit(device=True)
def block_nth_equal(x, n, value, nth, bins, partial):
    """The place of the nth element of x that equals ``value``, in every thread; n or more if there are fewer.

    x: (n,) float32. nth: integer, 1 for the first. bins, partial and the block as for :func:`block_kth_largest`.
    It is a radix select again, of places: which of 256 stretches of x, then which 256th of that stretch, …
    """
    begin = int64(0)
    end = int64(n)
    while end - begin > 1:
        stretch = (end - begin + DIGITS - 1) // DIGITS
        clear_digits(bins)
        for i in range(begin + cuda.threadIdx.x, end, cuda.blockDim.x):
            if x[i] == value:
                count_in_bin(bins, (i - begin) // stretch)
        chosen, before = block_find_bin(bins, nth, partial)
        nth -= before
        begin += chosen * stretch
        end = min(begin + stretch, end)
    return begin


# --- the k-th largest ------------------------------------------------------------------------------------------------


def radix_select_launch(n, k):
    """Launch configuration of :func:`radix_select_kernel`: ``(grid, block)``, one block.

    Raises ValueError if ``n`` is not positive or ``k`` is not in 1 … n.
    """
    if n <= 0:
        raise ValueError(f"n = {n}: a launch needs at least 1 element; none has no largest")
    if not 1 <= k <= n:
        raise ValueError(f"k = {k}: the k-th largest of {n} elements needs a k from 1 to {n}")
    return 1, SELECT_THREADS


@cuda.jit
def radix_select_kernel(x, value, greater, n, k):
    """value[0] = the k-th largest element of x, greater[0] = how many are greater than it.

    x: (n,) float32; NaN counts as -inf. value: (1,) float32. greater: (1,) int32. n, k: int32, 1 <= k <= n.
    Launch: ``radix_select_kernel[radix_select_launch(n, k)](…)``, one block of any multiple of 32 threads from 256 on.
    """
    bins = cuda.shared.array(DIGIT_BINS, int32)
    partial = cuda.shared.array(PARTIAL, int32)
    kth, above = block_kth_largest(x, n, k, bins, partial)
    if cuda.threadIdx.x == 0:
        value[0] = kth
        greater[0] = above


def radix_select_reference(x, k):
    """NumPy reference of :func:`radix_select_kernel`: (n,) float32; returns (float32, int)."""
    x = np.where(np.isnan(x), np.float32(-np.inf), x)
    kth = np.partition(x, len(x) - k)[len(x) - k]
    return kth, int(np.count_nonzero(x > kth))


# --- the k largest ---------------------------------------------------------------------------------------------------


def top_k_launch(n, k):
    """Launch configuration of :func:`top_k_v1_radix_select`: ``(grid, block)``, one block.

    Raises ValueError if ``n`` is not positive or ``k`` is not in 1 … n or more than TOP_K_MAX.
    """
    if k > TOP_K_MAX:
        raise ValueError(
            f"k = {k}: {TOP_K_MAX} elements are what the block sorts in shared memory; take fewer, or let "
            "radix_select_kernel find the k-th largest and keep what is above it"
        )
    grid, _ = radix_select_launch(n, k)
    return grid, TOP_K_THREADS


@cuda.jit(device=True)
def block_sort_descending(places, size):
    """Sorts places[0 … size - 1], int64 in shared memory, by a bitonic network. size: a power of two.

    A barrier must stand before the call; one stands behind each step. All threads of the block call it.
    Source: Batcher 1968, "Sorting Networks and Their Applications".
    """
    length = 2  # of the runs that this round makes, falling and rising in turn
    while length <= size:
        stride = length // 2
        while stride > 0:
            pair = cuda.threadIdx.x
            while pair < size // 2:  # a range would divide, to know how often: that takes longer than the rest
                low = 2 * pair - (pair & (stride - 1))  # pairs are ``stride`` apart: (pair // stride) * 2 * stride + …
                first = places[low]
                second = places[low + stride]
                if (first < second) == (low & length == 0):  # the wrong way round for a falling, or a rising, run
                    places[low] = second
                    places[low + stride] = first
                pair += cuda.blockDim.x
            cuda.syncthreads()
            stride //= 2
        length *= 2


@cuda.jit
def top_k_v1_radix_select(x, values, indices, n, k):
    """values = the k largest elements of x, largest first, indices = where they are; equal ones: lowest index first.

    x: (n,) float32. values: (k,) float32. indices: (k,) int32. n, k: int32, 1 <= k <= n, k <= TOP_K_MAX. NaN is never
    selected: if there are fewer than k numbers, the rest is filled with -inf and index -1.
    Three steps: radix select draws the line; what lies above it is collected in any order, by a counter; and a bitonic
    sort of the k finds, by (value, index), makes that one order.
    Launch: ``top_k_v1_radix_select[top_k_launch(n, k)](…)``.
    """
    bins = cuda.shared.array(DIGIT_BINS, int32)
    partial = cuda.shared.array(PARTIAL, int32)
    places = cuda.shared.array(TOP_K_MAX, int64)
    filled = cuda.shared.array(1, int32)
    tid = cuda.threadIdx.x
    line, greater = block_kth_largest(x, n, k, bins, partial)
    last = block_nth_equal(x, n, line, k - greater, bins, partial)
    size = 1
    while size < k:
        size *= 2
    for j in range(tid, size, cuda.blockDim.x):
        places[j] = NO_PLACE
    if tid == 0:
        filled[0] = 0
    cuda.syncthreads()
    for i in range(tid, n, cuda.blockDim.x):
        value = x[i]
        if value > line or (value == line and i <= last):
            slot = cuda.atomic.add(filled, 0, 1)
            places[slot] = (float_key(value) << PLACE_BITS) + (LAST_PLACE - i)  # a lower index makes a higher place
    cuda.syncthreads()
    block_sort_descending(places, size)
    for j in range(tid, k, cuda.blockDim.x):
        if places[j] == NO_PLACE:
            values[j] = float32(-np.inf)
            indices[j] = -1
        else:
            i = LAST_PLACE - (places[j] & LAST_PLACE)
            values[j] = x[i]  # not key_float, which has one zero only
            indices[j] = i


top_k = top_k_v1_radix_select


def top_k_reference(x, k):
    """NumPy reference of :func:`top_k_v1_radix_select`, by sorting: (n,) float32; returns float32 and int32, (k,)."""
    numbers = np.flatnonzero(~np.isnan(x))
    chosen = numbers[np.argsort(-x[numbers], kind="stable")[:k]]
    values, indices = np.full(k, -np.inf, np.float32), np.full(k, -1, np.int32)
    values[: len(chosen)], indices[: len(chosen)] = x[chosen], chosen
    return values, indices
