"""Chapter 13, sampling by many blocks: the same draw as ``draw_rows``, without waiting for one multiprocessor.

``draw_rows`` moves its line by halves: a block passes over 50257 logits thirty times, while the rest of the GPU looks
on. All of what it adds up are integers, so it does not matter who adds them, or when. That leaves every block free to
share the work, and the token is the same, bit for bit:

===============  ====================================================================  =================================
kernel           what it does                                                          blocks
===============  ====================================================================  =================================
``best_slices``  the largest logit of each slice, where no product has left it         one a slice, of 2048 tokens
``bin_rows``     tokens, and for top-p their weights, in 2048 bins of equal width      up to one a slice
``cut_rows``     which bins stay for sure, and the tokens of those that a line cuts    up to one a slice
``pick_rows``    the line; the slice, then the token, that the random number falls on  one a row
===============  ====================================================================  =================================

**A line, in two steps.** The bins say in which of them the line lies: counts or weights from the top, until there is
enough. Only that bin's tokens have to be told apart: the candidates. There are some hundred; sorted in shared memory,
with a running sum, they say where the line is. (Where there are more than 2048, as with equal logits, the line is moved
by halves as before.) With both filters the second takes a share of what the first has left, which is known only when
its line is drawn: then the candidates are of all bins in which the second line can lie.

**The same work, in every block.** Each block of ``cut_rows`` finds the row's bins by itself: what one does, all could
do meanwhile, instead of waiting for it, and for another launch. So with many rows a block takes several slices: the
blocks are to be on the card together.

**Halves of a sum.** An atomic add of 64 bits in shared memory is a loop that tries until nobody has come between; one
of 32 bits is an instruction. A weight is at most 2^40, so its lower 20 bits and the others are added apart.

**Waiting once.** A thread that asks for a logit, looks at it, and asks for the next waits for memory each time. All
that it will look at, it asks for at the beginning (:func:`load_logits`). And the kernels follow one another as
dependent launches, see chapter 9's ``gemv_half.py``.

**Bins of logits, not of bits.** A bin is (largest - logit) in units of temperature: weights of less than 2^-41 are 0,
so 30 temperatures below the largest nothing matters. Rounding is monotonic, so no token is in the wrong bin's order.

When it loses: for one row of a few thousand tokens, where the launches take longer than the passes that they save.
Sources: as ``sampling.py``; Merrill and Grimshaw 2011 (digits and bins).
"""

import math

import numpy as np
from numba import cuda, float32, int32, int64, uint32, uint64

from chapters.ch07_warp_reduce.argmax import block_argmax
from chapters.ch07_warp_reduce.kernels import FULL_WARP, WARP, block_max
from chapters.ch08_atomics_scan.topk import NO_PLACE, block_sort_descending, float_key, key_float
from chapters.ch13_llm_ops.sampling import INDEX_BITS, LAST_INDEX, MAX_VOCAB, UNIT, block_sum_int64, uniform, weight_of
from common.ptx import griddep_launch, griddep_wait

SLICE = 2048  # tokens of a row that a block takes
THREADS = 512
EACH = SLICE // THREADS  # tokens of a slice, of a thread
BINS = 2048
BINS_EACH = BINS // THREADS
RANGE = 30.0  # temperatures that the bins go down: exp(-28.4) is 2^-41
BLOCKS = 256  # two for each multiprocessor of a large card: more would wait for others to end
CANDIDATES = 2048  # of a row, that are sorted in shared memory: a power of two
SLICES_EACH = -(-MAX_VOCAB // SLICE) // THREADS  # of a thread, of the longest row
HALF = 20  # bits of a weight that are added apart from the others
AT_ONCE = 4  # values that a thread asks for together


def slices_of(vocab_size):
    """Slices of a row. Raises ValueError if vocab_size is not positive."""
    if vocab_size <= 0:
        raise ValueError(f"vocab_size = {vocab_size}: a launch needs at least 1")
    return -(-vocab_size // SLICE)


def slices_launch(n_rows, vocab_size):
    """Launch configuration of ``best_slices``, a block a slice: ``(grid, block)``.

    Raises ValueError if a size is not positive or n_rows above 65535.
    """
    if not 1 <= n_rows <= 65535:
        raise ValueError(f"n_rows = {n_rows}: a launch takes 1 to 65535")
    return (slices_of(vocab_size), n_rows), THREADS


def shared_slices_launch(n_rows, vocab_size):
    """Launch configuration of ``bin_rows`` and ``cut_rows``, whose blocks take several slices each if there are many:
    ``(grid, block)``. Raises ValueError as :func:`slices_launch`.
    """
    (n_slices, _), _ = slices_launch(n_rows, vocab_size)
    return (-(-n_slices // -(-n_slices * n_rows // BLOCKS)), n_rows), THREADS


def pick_rows_launch(n_rows):
    """Launch configuration of ``pick_rows``: ``(grid, block)``. Raises ValueError without a row."""
    if n_rows <= 0:
        raise ValueError(f"n_rows = {n_rows}: a launch needs at least 1")
    return n_rows, THREADS


def slices_workspace(max_rows, vocab_size):
    """The shapes and dtypes of what the kernels leave for one another, zeros at first: counts, masses, largest, sure,
    filled, places, slice_mass, in this order."""
    return (
        ((max_rows, BINS), np.int32), ((max_rows, BINS), np.int64), ((max_rows,), np.float32),
        ((max_rows, 3), np.int64), ((max_rows, 3), np.int32), ((max_rows, CANDIDATES), np.int64),
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
def bin_of(logit, largest, scale):
    """The bin of a logit: 0 for the largest, the last one for all that are far below. scale: float32, bins a logit."""
    if logit == largest:  # inf - inf would be NaN
        return int32(0)
    distance = (largest - logit) * scale
    return int32(distance) if 0 <= distance < BINS - 1 else int32(BINS - 1)


@cuda.jit(device=True, forceinline=True)
def bins_a_logit(temperature):
    """How many bins lie between two logits that differ by 1, float32."""
    return float32(BINS / RANGE / temperature)


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


@cuda.jit(device=True, forceinline=True)
def find_bin(values, before, need, none, found, at):
    """found[at] = the bin in which the running sum of all threads' ``values`` reaches ``need``; ``none`` if in none.

    values: (BINS_EACH,) int64, local, of this thread's bins; before: the sum of the threads' before it. found: int32,
    shared. Begins and ends with a barrier.
    """
    if cuda.threadIdx.x == 0:
        found[at] = none
    cuda.syncthreads()
    for j in range(BINS_EACH):
        if before < need <= before + values[j]:  # in one bin of all
            found[at] = BINS_EACH * cuda.threadIdx.x + j
        before += values[j]
    cuda.syncthreads()
    return found[at]


@cuda.jit(device=True, forceinline=True)
def sum_before(values, before, wanted, sums, at):
    """sums[at] = the running sum in front of bin ``wanted``, if that is this thread's. Others as in find_bin."""
    for j in range(BINS_EACH):
        if BINS_EACH * cuda.threadIdx.x + j == wanted:
            sums[at] = before
        before += values[j]


@cuda.jit(device=True)
def halve_line(logits, n, bins, largest, temperature, by_weight, need, partial):
    """The place of the token with which the tokens of bins[0] … bins[1], of which there are bins[2], reach ``need``,
    from the highest on: in number, or by weight. In passes over all logits; in every thread."""
    scale = bins_a_logit(temperature)
    high = place_of(largest, 0) + 1
    low = place_of(float32(-3.4028234663852886e38), LAST_INDEX)
    count_low, count_high = int64(bins[2]), int64(0)
    while count_low - count_high > 1 and high - low > 1:  # the second holds unless ``largest`` is wrong
        middle = low + (high - low) // 2
        mass, count = int64(0), int64(0)
        for i in range(cuda.threadIdx.x, n, cuda.blockDim.x):
            x = logits[i]
            if x > float32(-np.inf) and bins[0] <= bin_of(x, largest, scale) <= bins[1] and place_of(x, i) >= middle:
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


@cuda.jit(device=True)
def sorted_line(places, shares, n, largest, temperature, k, p, sure, least, slice_mass, partial, found):
    """The line among ``n`` candidates: the lowest place that top-k and top-p leave; NO_PLACE without a candidate.

    places, shares: (CANDIDATES,) int64, shared; the candidates' places, in any order, and room for their weights. k, p:
    of the filters, k = 0 and p = 1 for none. sure: (3,) int64, how many tokens are above all candidates, their weight,
    and that of all tokens that top-k leaves, or -1 if that depends on the line. slice_mass: the candidates' slices get
    what they weigh, from ``least`` on. found: int64, shared. Begins and ends with a barrier.
    """
    size = 1
    while size < n:
        size *= 2
    for c in range(n + cuda.threadIdx.x, size, THREADS):
        places[c] = NO_PLACE
    if cuda.threadIdx.x == 0:
        found[0] = NO_PLACE
    cuda.syncthreads()
    block_sort_descending(places, size)
    each = -(-n // THREADS)
    begin = each * cuda.threadIdx.x
    end = min(begin + each, n)
    left = end if k == 0 else min(end, k - sure[0])  # of this thread's, by top-k
    mass = int64(0)
    for c in range(begin, left):
        shares[c] = weight_of(key_float(places[c] >> INDEX_BITS), largest, temperature)
        mass += shares[c]
    mass, total = block_before(mass, partial)
    mass += sure[1]
    total = sure[1] + total if sure[2] < 0 else sure[2]
    need = max(int64(p * total), 1) if p < 1 else total + 1
    for c in range(begin, left):
        if mass < need:
            if shares[c] >= least:
                cuda.atomic.add(slice_mass, (LAST_INDEX - (places[c] & LAST_INDEX)) // SLICE, shares[c])
            mass += shares[c]
            last = c + 1 == n or (k > 0 and sure[0] + c + 1 == k)
            if last or mass >= need:
                found[0] = places[c]
    cuda.syncthreads()
    return found[0]


@cuda.jit(device=True)
def halved_line(logits, n, bins, largest, temperature, k, p, sure, least, slice_mass, partial):
    """What :func:`sorted_line` does, for more candidates than there is room for."""
    line, scale, total = int64(NO_PLACE), bins_a_logit(temperature), sure[2]
    if 0 < k < sure[0] + bins[2]:
        line = halve_line(logits, n, bins, largest, temperature, 0, k - sure[0], partial)
    if p < 1:
        if total < 0:
            kept = int64(0)
            for i in range(cuda.threadIdx.x, n, cuda.blockDim.x):
                x = logits[i]
                if x > float32(-np.inf) and bins[0] <= bin_of(x, largest, scale) <= bins[1] and place_of(x, i) >= line:
                    kept += weight_of(x, largest, temperature)
            total = sure[1] + block_sum_int64(kept, partial)
        need = max(int64(p * total), 1)
        if need < total:
            line = halve_line(logits, n, bins, largest, temperature, 1, need - sure[1], partial)
    for i in range(cuda.threadIdx.x, n, cuda.blockDim.x):
        x = logits[i]
        if x > float32(-np.inf) and bins[0] <= bin_of(x, largest, scale) <= bins[1]:
            share = share_of(x, i, largest, temperature, line, least)
            if share > 0:
                cuda.atomic.add(slice_mass, i // SLICE, share)
    return line


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
def bin_rows(logits, best, n_best, active, temperature, top_p, counts, masses, largest, vocab_size):
    """counts[r, b] += the tokens of row r in bin b, and with top-p masses[r, b] += their weights, of rows that draw.

    logits: (n_rows, vocab_size) float32. best: (n_rows, n_best or more) float32, parts' largest logits, which together
    are the row's. counts: (n_rows, BINS) int32, masses: int64, zeros before. largest: (n_rows,) float32, written. By
    row: active int32, temperature float64, top_p float64 in (0, 1]; a row that is not active, or has temperature 0, is
    left alone. n_best, vocab_size: int32. Tokens of -inf and NaN count nowhere.
    Launch: ``bin_rows[shared_slices_launch(n_rows, vocab_size)](…)``.
    """
    here = cuda.shared.array(BINS, int32)
    low_here = cuda.shared.array(BINS, uint32)
    high_here = cuda.shared.array(BINS, uint32)
    partial = cuda.shared.array(WARP, float32)
    x = cuda.local.array(EACH, float32)
    tops = cuda.local.array(AT_ONCE, float32)
    mass_here = cuda.local.array(BINS_EACH, int64)
    row, tid = cuda.blockIdx.y, cuda.threadIdx.x
    griddep_launch()
    for j in range(BINS_EACH):
        b = tid + j * THREADS
        here[b], low_here[b], high_here[b], mass_here[j] = 0, 0, 0, 0
    griddep_wait()  # also in a block that has nothing to do: who waits for this kernel trusts that it has waited
    heat = temperature[row]
    if active[row] == 0 or heat <= 0:
        return
    by_weight = top_p[row] < 1
    load_logits(logits[row], cuda.blockIdx.x * SLICE + tid, THREADS, vocab_size, x)
    top = float32(-np.inf)
    for first in range(tid, n_best, AT_ONCE * THREADS):
        load_logits(best[row], first, THREADS, n_best, tops)
        for j in range(AT_ONCE):
            top = max(top, tops[j])
    top = block_max(top, partial)  # with a barrier
    scale = bins_a_logit(heat)
    begin = cuda.blockIdx.x * SLICE
    while begin < vocab_size:
        for j in range(EACH):
            if x[j] > float32(-np.inf):
                b = bin_of(x[j], top, scale)
                cuda.atomic.add(here, b, 1)
                if by_weight:
                    weight = weight_of(x[j], top, heat)
                    cuda.atomic.add(low_here, b, uint32(weight & ((1 << HALF) - 1)))
                    cuda.atomic.add(high_here, b, uint32(weight >> HALF))
        begin += cuda.gridDim.x * SLICE
        load_logits(logits[row], begin + tid, THREADS, vocab_size, x)
        cuda.syncthreads()
        if by_weight:  # the halves have room for one slice's
            for j in range(BINS_EACH):
                b = tid + j * THREADS
                mass_here[j] += (int64(high_here[b]) << HALF) + int64(low_here[b])
                low_here[b], high_here[b] = 0, 0
            cuda.syncthreads()
    for j in range(BINS_EACH):
        b = tid + j * THREADS
        if here[b] > 0:
            cuda.atomic.add(counts, (row, b), here[b])
        if mass_here[j] > 0:
            cuda.atomic.add(masses, (row, b), mass_here[j])
    if tid == 0 and cuda.blockIdx.x == 0:
        largest[row] = top


@cuda.jit(launch_bounds=(THREADS, 2))  # a register more than 64 a thread, and a second block would have to wait
def cut_rows(
    logits, counts, masses, largest, active, temperature, top_k, top_p, min_p, sure, filled, places, slice_mass,
    vocab_size,
):  # fmt: skip
    """slice_mass[r, s] = the weight of the tokens of slice s of row r that the filters leave for sure; the others that
    they may leave, the candidates, are listed.

    counts, masses, largest: of :func:`bin_rows`. By row: top_k int32, 0 for no filter; top_p of what top-k has left;
    min_p float64 in [0, 1]: tokens less than min_p times as likely as the likeliest weigh nothing. sure: (n_rows, 3)
    int64: how many tokens are left for sure, their weight, and that of all that top-k leaves, or -1 if that is not
    known. filled: (n_rows, 3) int32: the bins of the candidates, first and last, and how many there are, 0 before.
    places: (n_rows, CANDIDATES) int64, ``place_of`` candidates, in any order, as far as there is room. slice_mass:
    (n_rows, slices) int64. Others as there.
    Launch: ``cut_rows[shared_slices_launch(n_rows, vocab_size)](…)``.
    """
    partial = cuda.shared.array(WARP, int64)
    sums = cuda.shared.array(2, int64)
    found = cuda.shared.array(4, int32)
    x = cuda.local.array(EACH, float32)
    n_here = cuda.local.array(BINS_EACH, int64)
    mass_here = cuda.local.array(BINS_EACH, int64)
    row, tid = cuda.blockIdx.y, cuda.threadIdx.x
    griddep_launch()
    griddep_wait()
    heat, k, p, top = temperature[row], int64(top_k[row]), top_p[row], largest[row]
    if active[row] == 0 or heat <= 0:
        return
    load_logits(logits[row], cuda.blockIdx.x * SLICE + tid, THREADS, vocab_size, x)
    n_mine, mass_mine = int64(0), int64(0)
    for j in range(BINS_EACH):
        n_here[j], mass_here[j] = int64(counts[row, BINS_EACH * tid + j]), int64(0)
        n_mine += n_here[j]
    if p < 1:
        for j in range(BINS_EACH):
            mass_here[j] = masses[row, BINS_EACH * tid + j]
            mass_mine += mass_here[j]
    n_before, n_tokens = block_before(n_mine, partial)
    mass_before, total = int64(0), int64(0)
    if p < 1:
        mass_before, total = block_before(mass_mine, partial)
    if tid < 2:
        sums[tid] = n_tokens if tid == 0 else total  # in front of bin BINS
    cuda.syncthreads()
    last = int32(BINS)
    if 0 < k < n_tokens:
        last = find_bin(n_here, n_before, k, BINS, found, 0)
        sum_before(mass_here, mass_before, last, sums, 1)
        cuda.syncthreads()
    first = last
    if p < 1:
        first = find_bin(mass_here, mass_before, max(int64(p * sums[1]), 1), BINS, found, 1)
        if last == BINS:
            last = first
        first = min(first, last)
    sum_before(n_here, n_before, first, sums, 0)
    sum_before(mass_here, mass_before, first, sums, 1)
    scale, least = bins_a_logit(heat), least_weight(min_p[row])
    begin = cuda.blockIdx.x * SLICE
    while begin < vocab_size:
        if tid == 0:
            found[2] = 0
        cuda.syncthreads()
        mass, n_candidates = int64(0), 0
        for j in range(EACH):
            if x[j] > float32(-np.inf):
                b = bin_of(x[j], top, scale)
                if b < first:
                    mass += share_of(x[j], begin + tid + j * THREADS, top, heat, NO_PLACE, least)
                n_candidates += first <= b <= last
        slot = cuda.atomic.add(found, 2, int32(n_candidates)) if n_candidates else int32(0)
        mass = block_sum_int64(mass, partial)  # with barriers: found[2] is the block's
        if tid == 0:
            slice_mass[row, begin // SLICE] = mass
            found[3] = cuda.atomic.add(filled, (row, 2), found[2]) if found[2] else int32(0)
        cuda.syncthreads()
        slot += found[3]
        for j in range(EACH):
            if x[j] > float32(-np.inf) and first <= bin_of(x[j], top, scale) <= last:
                if slot < CANDIDATES:
                    places[row, slot] = place_of(x[j], begin + tid + j * THREADS)
                slot += 1
        begin += cuda.gridDim.x * SLICE
        load_logits(logits[row], begin + tid, THREADS, vocab_size, x)
    if tid == 0 and cuda.blockIdx.x == 0:
        filled[row, 0], filled[row, 1] = first, last
        sure[row, 0], sure[row, 1], sure[row, 2] = sums[0], sums[1], total if 0 == k or k >= n_tokens else -1


@cuda.jit
def pick_rows(
    logits, best, best_token, n_best, counts, masses, largest, sure, filled, places, slice_mass, chosen, active,
    temperature, top_k, top_p, min_p, seed, step, vocab_size,
):  # fmt: skip
    """chosen[r] = the token drawn from row r, or where temperature is 0 the likeliest; step[r] += 1 for active rows.

    best, best_token: (n_rows, n_best or more), of ``best_slices`` or of a product that leaves them. counts …
    slice_mass: of :func:`cut_rows`; counts, masses and the number of candidates are 0 afterwards. chosen: (n_rows,)
    int32; -1 if there is no token to take. By row: seed uint64; step int64, the number of the new token. Others as in
    :func:`cut_rows`. A row that is not active gets its likeliest token.
    Launch: ``pick_rows[pick_rows_launch(n_rows)](…)``, 512 threads exactly.
    """
    partial_max = cuda.shared.array(WARP, float32)
    partial_token = cuda.shared.array(WARP, int32)
    partial = cuda.shared.array(WARP, int64)
    sorted_places = cuda.shared.array(CANDIDATES, int64)
    shares = cuda.shared.array(CANDIDATES, int64)
    found = cuda.shared.array(2, int64)
    row, tid = cuda.blockIdx.x, cuda.threadIdx.x
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
    n, top, heat, least = filled[row, 2], largest[row], temperature[row], least_weight(min_p[row])
    k, p = int64(top_k[row]), top_p[row]
    for c in range(tid, min(n, CANDIDATES), THREADS):
        sorted_places[c] = places[row, c]
    for b in range(tid, BINS, THREADS):
        counts[row, b], masses[row, b] = 0, 0
    if n <= CANDIDATES:
        line = sorted_line(
            sorted_places, shares, n, top, heat, k, p, sure[row], least, slice_mass[row], partial, found
        )  # fmt: skip
    else:
        line = halved_line(
            logits[row], vocab_size, filled[row], top, heat, k, p, sure[row], least, slice_mass[row], partial
        )
        cuda.syncthreads()
    slice_here = cuda.local.array(SLICES_EACH, int64)
    first, mass = SLICES_EACH * tid, int64(0)
    for j in range(SLICES_EACH):
        slice_here[j] = slice_mass[row, first + j] if first + j < slice_mass.shape[1] else int64(0)
        mass += slice_here[j]
    before, total = block_before(mass, partial)
    target = int64(uniform(seed[row], uint64(step[row]), uint64(0)) * total)
    for j in range(SLICES_EACH):
        if before <= target < before + slice_here[j]:  # one slice of all
            found[0], found[1] = first + j, before
        before += slice_here[j]
    cuda.syncthreads()
    if total > 0:
        begin, target = found[0] * SLICE + EACH * tid, target - found[1]
        x = cuda.local.array(EACH, float32)
        mass_here = cuda.local.array(EACH, int64)
        load_logits(logits[row], begin, 1, vocab_size, x)
        mass = int64(0)
        for j in range(EACH):
            mass_here[j] = share_of(x[j], begin + j, top, heat, line, least)
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
        filled[row, 2] = 0
