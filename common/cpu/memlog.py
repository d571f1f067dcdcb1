"""What generated code calls in launches under a memory report: each access is logged, and warp by warp summed up.

The functions have the names and places of those in `shadow`, but they check nothing. The code walks a block warp by
warp, the lanes of a warp one after the other; what the 32 lanes do at one *point* of the code in one round of the loops
around it is one *request*. So a lane notes (point, key, address), where the key stands for the round (0 outside of the
loops of one lane; `_inner` makes that of a round from that of the loop), and the lanes' notes with the same point and
key are one row. `_close`, behind each loop over the lanes, takes the rows apart into counts:

- global memory: distinct sectors of 32 bytes, distinct lines of 128 bytes, distinct bytes;
- shared memory: *wavefronts*: a bank (4 bytes wide, 32 of them) gives one word at a time, however many lanes want it.
  Accesses of 8 bytes go by half warps, of 16 bytes by quarter warps. Atomics on one word come one after the other;
- local memory: sectors, where word w of lane l lies at 128 * w + 4 * l;
- branches: did the lanes that came here go both ways; loops: how often some lanes left and others went on.

When a lane's loops are so long that the table is full, half of the rounds are dropped (the same ones in all lanes, by
a hash of the key) and the others count twice.

All that is kept stands in one array of int64, ``w`` (several arrays would cost more to hand on than to fill)::

    HEAD numbers | a row a point, for key 0 | rows for other keys | their hash | counts | … see `lay_out`
"""

import numba
import numpy as np
from numba.core import types

from . import machine_code

GLOBAL, SHARED, LOCAL, BRANCH, LOOP = range(5)  # kinds of points
READ, WRITE, ATOMIC, UPDATE = range(4)  # kinds of access, as in `shadow`
KEY, POINT, LANES, SLOT, WARP, ADDRESS = range(6)  # of a row; from the last on, one address a lane
WIDTH = ADDRESS + 32
ROWS = 1 << 15  # for keys other than 0
REQUESTS, THREADS, BYTES, USED, SECTORS, IDEAL, LINES, WAVES, IDEAL_WAVES, DIVERGED, COLUMNS = range(11)  # counts
# numbers in the head: rows in use of both kinds, times that rounds were halved, …; then where the parts of w begin
HASHED, DIRECT, LEVEL, SAMPLED, WARPS, FIRST_WARP, OUTSIDE, WHERE, EXTENT = range(9)
TABLE, SLOTS, ORDER, COUNTS, INFO, SAMPLES, NUMBERS, SCRATCH = range(9, 17)
HEAD = 32
KEPT_WARPS, KEPT_REQUESTS, KEPT = 8, 16, 33  # requests of a point whose lanes and addresses are kept, for pictures

PARAMETERS = {  # of the generated function, behind the kernel's own
    "_z": types.int64[::1],  # w
    "_touched": types.uint8[::1],  # a byte a sector of global memory: 1 read, 2 written
    "_meta": types.int64[:, ::1],  # a row an array argument: the address of its first element
    "_ops": types.int64[::1],  # the counters that generated code adds to itself
}

_A, _B = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xC2B2AE3D27D4EB4F)


def lay_out(info):
    """``(w, parts)`` for points with ``info``: rows of (kind, bytes a lane, access). parts: views of w, by name."""
    n = max(1, len(info))
    sizes = {
        "rows": n * WIDTH, "table": ROWS * WIDTH, "slots": 2 * ROWS, "order": n, "counts": n * COLUMNS, "info": n * 3,
        "samples": n * KEPT_WARPS * KEPT_REQUESTS * KEPT, "numbers": n * KEPT_WARPS, "scratch": 64 + 32 * 32,
    }  # fmt: skip
    w = np.empty(HEAD + sum(sizes.values()), np.int64)
    parts, first = {"head": w[:HEAD]}, HEAD
    w[:HEAD] = 0
    for place, (name, size) in zip([HEAD - 1, *range(TABLE, SCRATCH + 1)], sizes.items()):
        parts[name] = w[first : first + size]
        w[place] = first
        first += size
        if name not in ("table", "samples"):
            parts[name][:] = 0
    parts["rows"].reshape(n, WIDTH)[:, POINT] = np.arange(n)
    parts["info"].reshape(n, 3)[: len(info)] = info
    parts["counts"], parts["numbers"] = parts["counts"].reshape(n, COLUMNS), parts["numbers"].reshape(n, KEPT_WARPS)
    parts["samples"] = parts["samples"].reshape(n, KEPT_WARPS, KEPT_REQUESTS, KEPT)
    return w, parts


def prepare():
    """Compile what is the same for all kernels: once, not in each process that a kernel is compiled in."""
    _close.compile((PARAMETERS["_z"], PARAMETERS["_touched"]))
    _log_loop.compile((PARAMETERS["_z"], types.int64, types.int64, types.int64, types.int64))


@machine_code.jit()
def _mix(a, b):
    h = np.uint64(a) * _A + np.uint64(b) * _B
    h ^= h >> np.uint64(29)
    h *= _B
    return h ^ (h >> np.uint64(32))


@machine_code.jit()
def _inner(key, round):
    """The key of a round of a loop, from that of the loop."""
    return np.int64(_mix(key, round) | np.uint64(1))  # never 0


@machine_code.jit()
def _dropped(key, level):
    return (np.uint64(key) >> np.uint64(40)) & ((np.uint64(1) << np.uint64(level)) - np.uint64(1)) != 0


@machine_code.jit()
def _thin(w):
    """Drop half of the rounds."""
    for row in range(w[HASHED]):
        w[w[w[TABLE] + row * WIDTH + SLOT]] = 0
    w[LEVEL] += 1
    kept = 0
    for row in range(w[HASHED]):
        old, new = w[TABLE] + row * WIDTH, w[TABLE] + kept * WIDTH
        if not _dropped(w[old + KEY], w[LEVEL]):
            w[new : new + WIDTH] = w[old : old + WIDTH].copy()
            slot = np.int64(_mix(w[new + KEY], w[new + POINT])) & (2 * ROWS - 1)
            while w[w[SLOTS] + slot]:
                slot = (slot + 1) & (2 * ROWS - 1)
            kept += 1
            w[w[SLOTS] + slot] = kept
            w[new + SLOT] = w[SLOTS] + slot
    w[HASHED] = kept


@machine_code.jit()
def _log_loop(w, key, tid, point, address):
    """As `_log`, for a lane that is in a loop of its own, or comes here for the second time."""
    lane = tid & 31
    if key == 0:
        key = _inner(key, 1 << 40)
    while True:
        if w[LEVEL] and _dropped(key, w[LEVEL]):
            return
        slot = np.int64(_mix(key, point)) & (2 * ROWS - 1)
        row = w[w[SLOTS] + slot] - 1
        t = w[TABLE] + row * WIDTH
        while row >= 0 and (w[t + KEY] != key or w[t + POINT] != point):
            slot = (slot + 1) & (2 * ROWS - 1)
            row = w[w[SLOTS] + slot] - 1
            t = w[TABLE] + row * WIDTH
        if row < 0:
            row = w[HASHED]
            if row == ROWS - 1:
                _thin(w)
                continue
            w[HASHED] += 1
            w[w[SLOTS] + slot] = row + 1
            t = w[TABLE] + row * WIDTH
            w[t + KEY], w[t + POINT], w[t + LANES], w[t + SLOT] = key, point, 0, w[SLOTS] + slot
            w[t + WARP] = tid >> 5
        if w[t + LANES] >> lane & 1 == 0:
            w[t + LANES] |= 1 << lane
            w[t + ADDRESS + lane] = address
            return
        key = _inner(key, 1 << 40)  # the lane has been here in this round: it counts as another


@machine_code.jit(forceinline=True)
def _log(w, key, tid, point, address):
    """What lane ``tid`` does at ``point`` in round ``key``: an access to ``address``, or another number to keep."""
    lane, t = tid & 31, HEAD + np.int64(point) * WIDTH
    lanes = w[t + LANES]
    if key != 0 or lanes >> lane & 1:
        _log_loop(w, np.int64(key), np.int64(tid), np.int64(point), np.int64(address))
        return
    if lanes == 0:
        w[t + WARP] = tid >> 5
        w[w[ORDER] + w[DIRECT]] = t
        w[DIRECT] += 1
    w[t + LANES] = lanes | 1 << lane
    w[t + ADDRESS + lane] = address


@machine_code.jit()
def _close(w, touched):
    """The lanes of a warp are done with a piece of code: sum up their requests."""
    for k in range(w[DIRECT]):
        t = w[w[ORDER] + k]
        _request(w, touched, t, 1)
        w[t + LANES] = 0
    w[DIRECT] = 0
    if w[HASHED]:
        for row in range(w[HASHED]):
            t = w[TABLE] + row * WIDTH
            w[w[t + SLOT]] = 0
            _request(w, touched, t, 1 << w[LEVEL])
        if w[LEVEL]:
            w[SAMPLED], w[LEVEL] = 1, 0
        w[HASHED] = 0


@machine_code.jit()
def _request(w, touched, t, weight):
    """Sum up the row at ``t``, which stands for ``weight`` requests."""
    point, lanes = w[t + POINT], w[t + LANES]
    c, info = w[COUNTS] + point * COLUMNS, w[INFO] + point * 3
    kind, size, access = w[info], w[info + 1], w[info + 2]
    if kind == LOOP:
        _loop(w, c, t, weight)
        return
    w[c + REQUESTS] += weight
    if kind == BRANCH:
        taken = 0
        for lane in range(32):
            if lanes >> lane & 1 and w[t + ADDRESS + lane]:
                taken |= 1 << lane
        if taken and taken != lanes:
            w[c + DIVERGED] += weight
        return
    threads = 0
    for lane in range(32):
        threads += lanes >> lane & 1
    w[c + THREADS] += weight * threads
    w[c + BYTES] += weight * threads * size
    if kind == GLOBAL:
        _global(w, touched, c, t, size, 1 if access == READ else 2 if access == WRITE else 3, weight)
    elif kind == SHARED:
        _shared(w, c, t, size, access == ATOMIC, weight)
    else:
        _local(w, c, t, size, weight)
    warp = w[FIRST_WARP] + w[t + WARP]
    if warp < KEPT_WARPS:
        number = w[NUMBERS] + point * KEPT_WARPS + warp
        if w[number] < KEPT_REQUESTS:
            s = w[SAMPLES] + ((point * KEPT_WARPS + warp) * KEPT_REQUESTS + w[number]) * KEPT
            w[s] = lanes
            for lane in range(32):
                w[s + 1 + lane] = w[t + ADDRESS + lane]
        w[number] += 1


@machine_code.jit()
def _loop(w, c, t, weight):
    """Rounds that the lanes went: each time that some leave and others stay, they disagree."""
    lanes, longest, different = w[t + LANES], 0, 0
    for lane in range(32):
        if lanes >> lane & 1:
            rounds, known = w[t + ADDRESS + lane], False
            longest = max(longest, rounds)
            for other in range(lane):
                if lanes >> other & 1 and w[t + ADDRESS + other] == rounds:
                    known = True
                    break
            different += not known
    w[c + REQUESTS] += weight * (longest + 1)
    w[c + DIVERGED] += weight * (different - 1)


@machine_code.jit()
def _add(w, found, count, high, value):
    """Put ``value`` behind the ``count`` numbers at ``found``, the largest of which is ``high``; 0 if it is there."""
    if value <= high:
        for k in range(found + count - 1, found - 1, -1):
            if w[k] == value:
                return 0
    w[found + count] = value
    return 1


@machine_code.jit()
def _global(w, touched, c, t, size, how, weight):
    lanes, found = w[t + LANES], w[SCRATCH]
    sectors = lines = used = 0
    high = high_line = high_address = np.int64(-1)
    for lane in range(32):
        if lanes >> lane & 1 == 0:
            continue
        first = w[t + ADDRESS + lane]
        if _add(w, found, used, high_address, first):
            used += 1
            high_address = max(high_address, first)
        for sector in range(first >> 5, (first + size - 1 >> 5) + 1):
            if _add(w, found + 64, sectors, high, sector):
                sectors += 1
                high = max(high, sector)
                touched[sector] |= how
                if _add(w, found + 256, lines, high_line, sector >> 2):
                    lines += 1
                    high_line = max(high_line, sector >> 2)
    w[c + USED] += weight * used * size
    w[c + SECTORS] += weight * sectors
    w[c + IDEAL] += weight * (used * size + 31 >> 5)
    w[c + LINES] += weight * lines


@machine_code.jit()
def _shared(w, c, t, size, atomic, weight):
    lanes = w[t + LANES]
    filled, words = w[SCRATCH], w[SCRATCH] + 64
    step = 32 if size <= 4 else 16 if size == 8 else 8
    part = (1 << step) - 1
    waves, ideal = 0, 0
    for start in range(0, 32, step):
        if lanes >> start & part == 0:
            continue
        seen, deepest = 0, 1
        for lane in range(start, start + step):
            if lanes >> lane & 1 == 0:
                continue
            first = w[t + ADDRESS + lane]
            for word in range(first >> 2, (first + size - 1 >> 2) + 1):
                bank = word & 31
                if seen >> bank & 1 == 0:
                    seen |= 1 << bank
                    w[filled + bank] = 1
                    w[words + bank * 32] = word
                    continue
                depth = w[filled + bank]
                known = False
                if not atomic:
                    for k in range(words + bank * 32 + depth - 1, words + bank * 32 - 1, -1):
                        if w[k] == word:
                            known = True
                            break
                if not known and depth < 32:
                    w[words + bank * 32 + depth] = word
                    w[filled + bank] = depth + 1
                    deepest = max(deepest, depth + 1)
        waves += deepest
        ideal += 1
    w[c + WAVES] += weight * waves
    w[c + IDEAL_WAVES] += weight * ideal


@machine_code.jit()
def _local(w, c, t, size, weight):
    lanes, found = w[t + LANES], w[SCRATCH]
    sectors, words = 0, 0
    for k in range(max(1, size >> 2)):
        count, high = 0, np.int64(-1)
        for lane in range(32):
            if lanes >> lane & 1:
                words += 1
                sector = w[t + ADDRESS + lane] + 128 * k >> 5
                if _add(w, found, count, high, sector):
                    count += 1
                    high = max(high, sector)
        sectors += count
    w[c + USED] += weight * words * min(size, 4)
    w[c + SECTORS] += weight * sectors
    w[c + IDEAL] += weight * (words * 4 + 31 >> 5)


# --- what stands in generated code -----------------------------------------------------------------------------------


@machine_code.jit()
def _outside(w, point, index, extent):
    w[OUTSIDE], w[WHERE], w[EXTENT] = np.int64(point) + 1, index, extent
    raise IndexError


@machine_code.jit(forceinline=True)
def _access1(x, index, m, w, key, tid, point, access, elements):
    """The index of an access to a 1-D array, logged. ``m``: the address of the array's first element, in a tuple."""
    i, extent = np.int64(index), x.shape[0]
    if i < 0:
        i += extent
    if i < 0 or i + np.int64(elements) > extent:
        _outside(w, point, np.int64(index), extent)
    _log(w, key, tid, point, m[0] + i * x.strides[0])
    return i


@machine_code.jit(forceinline=True)
def _accessn(x, index, m, w, key, tid, point, access, elements):
    """As `_access1` for any number of axes: ``index`` is a tuple of int64, and so is the result."""
    address, out, last = m[0], index, len(index) - 1
    for axis in range(len(index)):
        i, extent = index[axis], x.shape[axis]
        if i < 0:
            i += extent
            out = numba.cpython.unsafe.tuple.tuple_setitem(out, axis, i)
        if i < 0 or i + (np.int64(elements) - 1 if axis == last else 0) >= extent:
            _outside(w, point, index[axis], extent)
        address += i * x.strides[axis]
    _log(w, key, tid, point, address)
    return out


@machine_code.jit(forceinline=True)
def _local1(_, index, m, w, key, tid, point, access):
    """As `_access1` for a local array. ``m``: (bytes an element, extents)."""
    i, extent = np.int64(index), m[1][0]
    if i < 0:
        i += extent
    if i < 0 or i >= extent:
        _outside(w, point, np.int64(index), extent)
    _log(w, key, tid, point, _local_address(i * m[0], tid))
    return i


@machine_code.jit(forceinline=True)
def _localn(_, index, m, w, key, tid, point, access):
    place, out = np.int64(0), index
    for axis in range(len(index)):
        i, extent = index[axis], m[1][axis]
        if i < 0:
            i += extent
            out = numba.cpython.unsafe.tuple.tuple_setitem(out, axis, i)
        if i < 0 or i >= extent:
            _outside(w, point, index[axis], extent)
        place = place * extent + i
    _log(w, key, tid, point, _local_address(place * m[0], tid))
    return out


@machine_code.jit()
def _local_address(byte, tid):
    """Where a byte of a lane's local memory lies in that of its warp: words of 4 bytes, lane beside lane."""
    return (byte >> 2) * 128 + (tid & 31) * 4 + (byte & 3)


@machine_code.jit()
def _must1(index):
    return index


@machine_code.jit()
def _mustn(index):
    return index


@machine_code.jit(forceinline=True)
def _branch(test, w, key, tid, point):
    """``test``, logged."""
    _log(w, key, tid, point, 1 if test else 0)
    return test


@machine_code.jit()
def _rounds(w, key, tid, point, rounds):
    """A lane has left a loop after so many rounds."""
    _log(w, key, tid, point, rounds)


@machine_code.jit()
def _block_starts(w, warps):
    """Begin a block of so many warps."""
    w[FIRST_WARP] = w[WARPS]
    w[WARPS] += warps


__all__ = [
    "_access1", "_accessn", "_block_starts", "_branch", "_close", "_inner", "_local1", "_localn", "_must1", "_mustn",
    "_rounds"
]  # fmt: skip
