"""Chapter 13, sampling by many blocks: the same draw as ``draw_rows``, without waiting for one multiprocessor.

``draw_rows`` moves its line by halves: a block passes over 50257 logits thirty times, while the rest of the GPU looks
on. All of what it adds up are integers, so it does not matter who adds them, or when. That leaves every block free to
share the work, and the token is the same, bit for bit:

===============  ====================================================================  =================================
kernel           what it does                                                          blocks
===============  ====================================================================  =================================
``best_slices``  the largest logit of each slice, where no product has left it         one for 2048 tokens of a row
``bin_rows``     tokens and their weights, counted in 2048 bins of equal width         one for 2048 tokens of a row
``line_rows``    where top-k and top-p draw their line                                 one a row, a pass for each filter
``slice_rows``   the weight of each slice's tokens above the line                      one for 2048 tokens of a row
``pick_rows``    the slice, then the token in it, that the random number falls on      one a row
===============  ====================================================================  =================================

**A line, in two steps.** The bins say in which of them the line lies: counts or weights from the top, until there is
enough. Only that bin's tokens have to be told apart. There are some hundred, they fit in shared memory, and each finds
its own rank by looking at all others. (Where a bin has more than 2048, as with equal logits, the line is moved by
halves as before.)

**Waiting once.** A thread that asks for a logit, looks at it, and asks for the next waits for memory each time. All
that it will look at, it asks for at the beginning (:func:`load_logits`). And the five follow one another as dependent
launches, see chapter 9's ``gemv_half.py``.

**Bins of logits, not of bits.** A bin is (largest - logit) in units of temperature: weights of less than 2^-41 are 0,
so 30 temperatures below the largest nothing matters. Rounding is monotonic, so no token is in the wrong bin's order.

When it loses: for one row of a few thousand tokens, where five launches take longer than the passes that they save.
Sources: as ``sampling.py``; Merrill and Grimshaw 2011 (digits and bins).
"""

import math

import numpy as np
from numba import cuda, float32, float64, int32, int64, uint64

from chapters.ch07_warp_reduce.argmax import block_argmax
from chapters.ch07_warp_reduce.kernels import FULL_WARP, WARP, block_max
from chapters.ch08_atomics_scan.topk import NO_PLACE, float_key
from chapters.ch13_llm_ops.sampling import INDEX_BITS, LAST_INDEX, UNIT, block_sum_int64, uniform, weight_of
from common.ptx import griddep_launch, griddep_wait

SLICE = 2048  # tokens of a row that a block takes
SLICE_THREADS = 256
THREADS = 512  # of a block that takes a row
LINE_THREADS = 1024  # of the one that looks through all of it
ONE_BLOCK = (LINE_THREADS, 1)  # a multiprocessor has registers for 64 a thread then, which the compiler has to know
BINS = 2048
EACH = SLICE // THREADS  # tokens of a slice, of a thread
BINS_EACH = BINS // LINE_THREADS
SLICE_EACH = SLICE // SLICE_THREADS
RANGE = 30.0  # temperatures that the bins go down: exp(-28.4) is 2^-41
CANDIDATES = 2048  # tokens of a bin that are ranked in shared memory
AT_ONCE = 16  # logits that a thread asks for together


def slices_of(vocab_size):
    """Slices of a row. Raises ValueError if vocab_size is not positive."""
    if vocab_size <= 0:
        raise ValueError(f"vocab_size = {vocab_size}: a launch needs at least 1")
    return -(-vocab_size // SLICE)


def slices_launch(n_rows, vocab_size):
    """Launch configuration of ``best_slices``, ``bin_rows`` and ``slice_rows``: ``(grid, block)``.

    Raises ValueError if a size is not positive or n_rows above 65535.
    """
    if not 1 <= n_rows <= 65535:
        raise ValueError(f"n_rows = {n_rows}: a launch takes 1 to 65535")
    return (slices_of(vocab_size), n_rows), SLICE_THREADS


def row_blocks_launch(n_rows):
    """Launch configuration of ``pick_rows``: ``(grid, block)``. Raises ValueError without a row."""
    if n_rows <= 0:
        raise ValueError(f"n_rows = {n_rows}: a launch needs at least 1")
    return n_rows, THREADS


def line_rows_launch(n_rows):
    """Launch configuration of ``line_rows``: ``(grid, block)``. Raises ValueError without a row."""
    return row_blocks_launch(n_rows)[0], LINE_THREADS


def slices_workspace(max_rows, vocab_size):
    """The shapes and dtypes of counts, masses (both zeros at first), largest, line and slice_mass, in this order."""
    return (
        ((max_rows, BINS), np.int32), ((max_rows, BINS), np.int64), ((max_rows,), np.float32), ((max_rows,), np.int64),
        ((max_rows, slices_of(vocab_size)), np.int64),
    )  # fmt: skip


# --- device functions ------------------------------------------------------------------------------------------------


@cuda.jit(device=True, forceinline=True)
def load_logits(logits, first, step, end, x):
    """x[j] = logits[first + j * step], -inf from ``end`` on: asked for together, they come together. x: local."""
    for j in range(x.shape[0]):
        i = first + j * step
        x[j] = logits[i] if i < end else float32(-np.inf)


@cuda.jit(device=True, forceinline=True)
def bin_of(logit, largest, temperature):
    """The bin of a logit: 0 for the largest, the last one for all that are far below."""
    if logit == largest:  # inf - inf would be NaN
        return int32(0)
    distance = (float64(largest) - float64(logit)) * (BINS / RANGE / temperature)
    return int32(distance) if 0 <= distance < BINS - 1 else int32(BINS - 1)


@cuda.jit(device=True, forceinline=True)
def place_of(logit, i):
    """An int64 that sorts as the logits do, a lower index above a higher one: see ``keep_largest``."""
    return (float_key(logit) << INDEX_BITS) + (LAST_INDEX - i)


@cuda.jit(device=True)
def block_before(value, partial):
    """``(before, total)``: the sum of ``value`` over the threads before this one, and over all; int64, exact.

    partial: (32,) int64, shared, free for use again as soon as the call returns. All threads of full warps call it.
    """
    lane, warp = cuda.threadIdx.x % WARP, cuda.threadIdx.x // WARP
    through = value
    step = 1
    while step < WARP:
        lower = cuda.shfl_up_sync(FULL_WARP, through, step)
        if lane >= step:
            through += lower
        step *= 2
    if lane == WARP - 1:
        partial[warp] = through
    cuda.syncthreads()
    before = through - value
    total = int64(0)
    for w in range(cuda.blockDim.x // WARP):
        if w < warp:
            before += partial[w]
        total += partial[w]
    cuda.syncthreads()
    return before, total


@cuda.jit(device=True)
def find_bin(values, before, need, found):
    """found[0], found[1] = the bin in which the running sum reaches ``need``, and the sum before it.

    values: (BINS_EACH,) int64, local, those of this thread's bins; before: of the threads before it. Ends with a
    barrier.
    """
    for j in range(BINS_EACH):
        if before < need <= before + values[j]:  # in one bin of all
            found[0] = BINS_EACH * cuda.threadIdx.x + j
            found[1] = before
        before += values[j]
    cuda.syncthreads()


@cuda.jit(device=True)
def gather_bin(logits, n, wanted, largest, temperature, places, filled):
    """places = those of the tokens in bin ``wanted``, in any order, as far as there is room; returns how many it has.

    filled: (1,) int32, shared. Begins and ends with a barrier.
    """
    cuda.syncthreads()
    if cuda.threadIdx.x == 0:
        filled[0] = 0
    cuda.syncthreads()
    x = cuda.local.array(AT_ONCE, float32)
    for first in range(cuda.threadIdx.x, n, AT_ONCE * cuda.blockDim.x):
        load_logits(logits, first, cuda.blockDim.x, n, x)
        for j in range(AT_ONCE):
            if x[j] > float32(-np.inf) and bin_of(x[j], largest, temperature) == wanted:
                slot = cuda.atomic.add(filled, 0, 1)
                if slot < CANDIDATES:
                    places[slot] = place_of(x[j], first + j * cuda.blockDim.x)
    cuda.syncthreads()
    return filled[0]


@cuda.jit(device=True)
def rank_line(places, shares, n, need, found):
    """found[2] = the place of the token with which the shares, from the highest place down, reach ``need``.

    places, shares: (n,) int64, shared. Ends with a barrier.
    """
    for c in range(cuda.threadIdx.x, n, cuda.blockDim.x):
        place = places[c]
        before = int64(0)
        for d in range(n):
            if places[d] > place:
                before += shares[d]
        if before < need <= before + shares[c]:  # one of all
            found[2] = place
    cuda.syncthreads()


@cuda.jit(device=True)
def halve_line(logits, n, wanted, largest, temperature, by_weight, need, n_bin, partial):
    """What :func:`rank_line` finds, for a bin of any number of tokens, by passes over all logits; in every thread."""
    high = place_of(largest, 0) + 1
    low = place_of(float32(-3.4028234663852886e38), LAST_INDEX)
    count_low, count_high = int64(n_bin), int64(0)
    while count_low - count_high > 1 and high - low > 1:  # the second holds unless ``largest`` is wrong
        middle = low + (high - low) // 2
        mass, count = int64(0), int64(0)
        for i in range(cuda.threadIdx.x, n, cuda.blockDim.x):
            x = logits[i]
            if x > float32(-np.inf) and bin_of(x, largest, temperature) == wanted and place_of(x, i) >= middle:
                mass += weight_of(x, largest, temperature) if by_weight else int64(1)
                count += 1
        mass = block_sum_int64(mass, partial)
        count = block_sum_int64(count, partial)
        if mass >= need:
            low, count_low = middle, count
        else:
            high, count_high = middle, count
    return low


@cuda.jit(device=True)
def least_weight(min_p):
    """The least weight that min-p leaves, int64: the likeliest token weighs UNIT. 0: it leaves all."""
    return int64(math.ceil(min_p * UNIT))


@cuda.jit(device=True)
def share_of(logit, i, largest, temperature, line, least):
    """The weight of a token that is drawn from; 0 for one below the line, or that weighs less than ``least``."""
    if not logit > float32(-np.inf) or place_of(logit, i) < line:
        return int64(0)
    weight = weight_of(logit, largest, temperature)
    return weight if weight >= least else int64(0)


# --- kernels ---------------------------------------------------------------------------------------------------------


@cuda.jit
def best_slices(logits, best, best_token, vocab_size):
    """best[r, s], best_token[r, s] = the largest logit of slice s of row r, and its token; the lowest of equal ones.

    logits: (n_rows, vocab_size) float32. best: float32, best_token: int32, (n_rows or more, slices or more). NaN
    counts as nothing: a slice of nothing else has -inf and vocab_size. vocab_size: int32.
    Launch: ``best_slices[slices_launch(n_rows, vocab_size)](…)``.
    """
    partial = cuda.shared.array(WARP, float32)
    partial_token = cuda.shared.array(WARP, int32)
    griddep_launch()
    griddep_wait()
    row = cuda.blockIdx.y
    begin = cuda.blockIdx.x * SLICE
    largest = float32(-np.inf)
    token = int32(vocab_size)
    for i in range(begin + cuda.threadIdx.x, min(begin + SLICE, vocab_size), cuda.blockDim.x):
        if logits[row, i] > largest or (logits[row, i] == largest and token == vocab_size):
            largest = logits[row, i]
            token = int32(i)
    largest, token = block_argmax(largest, token, partial, partial_token)
    if cuda.threadIdx.x == 0:
        best[row, cuda.blockIdx.x] = largest
        best_token[row, cuda.blockIdx.x] = token


@cuda.jit
def bin_rows(logits, best, n_best, active, temperature, counts, masses, largest, vocab_size):
    """counts[r, b], masses[r, b] += the tokens of row r that bin b has, and their weights, for rows that draw.

    logits: (n_rows, vocab_size) float32. best: (n_rows, n_best or more) float32, parts' largest logits, which together
    are the row's. counts: (n_rows, BINS) int32, masses: int64, zeros before. largest: (n_rows,) float32, written. By
    row: active int32, temperature float64; a row that is not active, or has temperature 0, is left alone. n_best,
    vocab_size: int32. Tokens of -inf and NaN count nowhere.
    Launch: ``bin_rows[slices_launch(n_rows, vocab_size)](…)``.
    """
    here = cuda.shared.array(BINS, int32)
    mass_here = cuda.shared.array(BINS, int64)
    partial = cuda.shared.array(WARP, float32)
    x = cuda.local.array(SLICE_EACH, float32)
    row = cuda.blockIdx.y
    tid = cuda.threadIdx.x
    griddep_launch()
    griddep_wait()  # also in a block that has nothing to do: who waits for this kernel trusts that it has waited
    if active[row] == 0 or temperature[row] <= 0:
        return
    begin = cuda.blockIdx.x * SLICE
    load_logits(logits[row], begin + tid, SLICE_THREADS, vocab_size, x)
    top = float32(-np.inf)
    for i in range(tid, n_best, cuda.blockDim.x):
        top = max(top, best[row, i])
    for b in range(tid, BINS, cuda.blockDim.x):
        here[b] = 0
        mass_here[b] = 0
    top = block_max(top, partial)  # with a barrier
    for j in range(SLICE_EACH):
        if x[j] > float32(-np.inf):
            b = bin_of(x[j], top, temperature[row])
            cuda.atomic.add(here, b, 1)
            weight = weight_of(x[j], top, temperature[row])
            if weight > 0:
                cuda.atomic.add(mass_here, b, weight)
    cuda.syncthreads()
    for b in range(tid, BINS, cuda.blockDim.x):
        if here[b] > 0:
            cuda.atomic.add(counts, (row, b), here[b])
            cuda.atomic.add(masses, (row, b), mass_here[b])
    if tid == 0 and cuda.blockIdx.x == 0:
        largest[row] = top


@cuda.jit(launch_bounds=ONE_BLOCK)
def line_rows(logits, counts, masses, largest, active, temperature, top_k, top_p, line, vocab_size):
    """line[r] = the place of the last token that top-k and top-p leave of row r; NO_PLACE: they leave all.

    counts, masses, largest: of :func:`bin_rows`; counts and masses are 0 afterwards. By row: top_k int32, 0 for no
    filter; top_p float64 in (0, 1], of what top-k has left. line: (n_rows,) int64. All else as there. Kept are the
    tokens with ``place_of`` at the line or above.
    Launch: ``line_rows[line_rows_launch(n_rows)](…)``, 1024 threads exactly.
    """
    partial = cuda.shared.array(WARP, int64)
    places = cuda.shared.array(CANDIDATES, int64)
    shares = cuda.shared.array(CANDIDATES, int64)
    found = cuda.shared.array(3, int64)
    filled = cuda.shared.array(1, int32)
    n_here = cuda.local.array(BINS_EACH, int64)
    mass_here = cuda.local.array(BINS_EACH, int64)
    row = cuda.blockIdx.x
    tid = cuda.threadIdx.x
    griddep_launch()
    griddep_wait()
    if active[row] == 0 or temperature[row] <= 0:
        return
    top, heat = largest[row], temperature[row]
    n_mine, mass_mine = int64(0), int64(0)
    for j in range(BINS_EACH):
        b = BINS_EACH * tid + j
        n_here[j], mass_here[j] = int64(counts[row, b]), masses[row, b]
        counts[row, b], masses[row, b] = 0, 0
        n_mine += n_here[j]
        mass_mine += mass_here[j]
    n_before, n_tokens = block_before(n_mine, partial)
    mass_before, total = block_before(mass_mine, partial)
    edge = int64(NO_PLACE)
    if 0 < top_k[row] < n_tokens:
        find_bin(n_here, n_before, int64(top_k[row]), found)
        wanted, need = int32(found[0]), top_k[row] - found[1]
        n = gather_bin(logits[row], vocab_size, wanted, top, heat, places, filled)
        kept = int64(0)  # weight of the tokens above the edge: of this thread's bins, if they lie above, and its tokens
        for j in range(BINS_EACH):
            if BINS_EACH * tid + j < wanted:
                kept += mass_here[j]
        if n <= CANDIDATES:
            for c in range(tid, n, cuda.blockDim.x):
                shares[c] = 1
            cuda.syncthreads()
            rank_line(places, shares, n, need, found)
            edge = found[2]
            for c in range(tid, n, cuda.blockDim.x):
                if places[c] >= edge:
                    kept += weight_of(logits[row, LAST_INDEX - (places[c] & LAST_INDEX)], top, heat)
        else:
            edge = halve_line(logits[row], vocab_size, wanted, top, heat, 0, need, n, partial)
            for i in range(tid, vocab_size, cuda.blockDim.x):
                x = logits[row, i]
                if x > float32(-np.inf) and bin_of(x, top, heat) == wanted and place_of(x, i) >= edge:
                    kept += weight_of(x, top, heat)
        total = block_sum_int64(kept, partial)
    need = max(int64(top_p[row] * total), 1)
    if top_p[row] < 1 and need < total:
        find_bin(mass_here, mass_before, need, found)
        wanted, need = int32(found[0]), need - found[1]
        n = gather_bin(logits[row], vocab_size, wanted, top, heat, places, filled)
        if n <= CANDIDATES:
            for c in range(tid, n, cuda.blockDim.x):
                i = LAST_INDEX - (places[c] & LAST_INDEX)
                shares[c] = weight_of(logits[row, i], top, heat)
            cuda.syncthreads()
            rank_line(places, shares, n, need, found)
            edge = found[2]
        else:
            edge = halve_line(logits[row], vocab_size, wanted, top, heat, 1, need, n, partial)
    if tid == 0:
        line[row] = edge


@cuda.jit
def slice_rows(logits, largest, line, active, temperature, min_p, slice_mass, vocab_size):
    """slice_mass[r, s] = the weight of the tokens of slice s that row r is drawn from.

    By row: min_p float64 in [0, 1]: tokens less than min_p times as likely as the likeliest are dropped. slice_mass:
    (n_rows, slices) int64. All else as in :func:`line_rows`.
    Launch: ``slice_rows[slices_launch(n_rows, vocab_size)](…)``.
    """
    partial = cuda.shared.array(WARP, int64)
    x = cuda.local.array(SLICE_EACH, float32)
    row = cuda.blockIdx.y
    griddep_launch()
    griddep_wait()
    if active[row] == 0 or temperature[row] <= 0:
        return
    least = least_weight(min_p[row])
    first = cuda.blockIdx.x * SLICE + cuda.threadIdx.x
    load_logits(logits[row], first, SLICE_THREADS, vocab_size, x)
    mass = int64(0)
    for j in range(SLICE_EACH):
        mass += share_of(x[j], first + j * SLICE_THREADS, largest[row], temperature[row], line[row], least)
    mass = block_sum_int64(mass, partial)
    if cuda.threadIdx.x == 0:
        slice_mass[row, cuda.blockIdx.x] = mass


@cuda.jit
def pick_rows(
    logits, best, best_token, n_best, largest, line, slice_mass, chosen, active, temperature, min_p, seed, step,
    vocab_size,
):  # fmt: skip
    """chosen[r] = the token drawn from row r, or where temperature is 0 the likeliest; step[r] += 1 for active rows.

    best, best_token: (n_rows, n_best or more), of ``best_slices`` or of a product that leaves them. chosen: (n_rows,)
    int32; -1 if there is no token to take. By row: seed uint64; step int64, the number of the new token. All else as
    in :func:`slice_rows`. A row that is not active gets its likeliest token.
    Launch: ``pick_rows[row_blocks_launch(n_rows)](…)``, 512 threads exactly.
    """
    partial_max = cuda.shared.array(WARP, float32)
    partial_token = cuda.shared.array(WARP, int32)
    partial = cuda.shared.array(WARP, int64)
    found = cuda.shared.array(3, int64)
    mass_here = cuda.local.array(EACH, int64)
    row = cuda.blockIdx.x
    tid = cuda.threadIdx.x
    griddep_launch()
    griddep_wait()
    if active[row] == 0 or temperature[row] <= 0:
        top = float32(-np.inf)
        token = int32(vocab_size)
        for i in range(tid, n_best, cuda.blockDim.x):
            if best[row, i] > top or (best[row, i] == top and best_token[row, i] < token):
                top = best[row, i]
                token = best_token[row, i]
        top, token = block_argmax(top, token, partial_max, partial_token)
        if tid == 0:
            chosen[row] = token if token < vocab_size else int32(-1)
            if active[row] != 0:
                step[row] += 1
        return
    n_slices = slice_mass.shape[1]
    mass = int64(0)
    for s in range(tid, n_slices, cuda.blockDim.x):
        mass += slice_mass[row, s]
    total = block_sum_int64(mass, partial)
    target = int64(uniform(seed[row], uint64(step[row]), uint64(0)) * total)
    done = int64(0)
    for first in range(0, n_slices, cuda.blockDim.x):  # once, up to a million tokens
        mass = slice_mass[row, first + tid] if first + tid < n_slices else int64(0)
        before, here = block_before(mass, partial)
        if done + before <= target < done + before + mass:
            found[0] = first + tid
            found[1] = done + before
        done += here
    cuda.syncthreads()
    if total > 0:
        begin, target = found[0] * SLICE + EACH * tid, target - found[1]
        least = least_weight(min_p[row])
        mass = int64(0)
        for j in range(EACH):
            i = begin + j
            mass_here[j] = int64(0)
            if i < vocab_size:
                mass_here[j] = share_of(logits[row, i], i, largest[row], temperature[row], line[row], least)
            mass += mass_here[j]
        before, _ = block_before(mass, partial)
        for j in range(EACH):
            if before <= target < before + mass_here[j]:  # one token of all
                chosen[row] = begin + j
            before += mass_here[j]
    elif tid == 0:
        chosen[row] = -1
    if tid == 0:
        step[row] += 1  # all have read it: there are barriers behind that
