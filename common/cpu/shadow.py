"""What generated code calls in sanitized launches: each access looks at its element's *shadow* first.

The shadow of an element is three words: who wrote it last, and two different threads that have read it since. A word is
a *record* of one access::

    epoch << 37 | clock << 23 | site << 11 | thread << 1 | atomic

epoch: counts the block barriers of a launch, over all blocks; so it also says in which block the access was. clock: of
a lane, counts its ``syncwarp``s within an epoch. site: the place in the source. Record 0 means never, 1 (`BEFORE`)
before this launch. Two accesses, at least one of them a write and not both atomic, are a race

- in one block, if they have the same epoch and different threads, unless both are lanes of one warp and the later one
  knows, through ``syncwarp``, the clock of the earlier one;
- in different blocks, for arrays in global memory, always: nothing orders the blocks of a launch.

So no race is missed because it was "won": what counts is what the barriers allow, not who came first.

State that is handed through (``z``, a tuple of arrays): cells of global memory, state, found, known, clocks, cells of
shared memory, waiting. An array's own facts (``m``): its cells, first cell, cells an element, shift from bytes to
cells, number, whether it is shared, whether it may be read without having been written in this launch.
"""

import numba
import numpy as np

# kinds of findings, in found[:, 0]
OUT_OF_BOUNDS, NEGATIVE, SHARED_RACE, GLOBAL_RACE, UNWRITTEN, UNWRITTEN_LOCAL, EXITED, OVERFLOW = range(1, 9)
READ, WRITE, ATOMIC, UPDATE = range(4)  # kinds of access
BEFORE = 1
EPOCH, CLOCK, SITE, THREAD = 37, 23, 11, 1  # positions in a record
CLOCK_MAX, SITE_MAX, EPOCH_MAX = (1 << 14) - 1, 1 << 12, 1 << 26
NOW, LOW, FOUND, LOST, FENCES, COARSE, ACCESSES, WAITING = range(8)  # places in state
ROWS, COLUMNS = 512, 10  # of found: different findings that are kept

JIT = dict(nogil=True, error_model="numpy")


@numba.njit(**JIT)
def _note(z, kind, now, old, number, place, access, other, extra):
    """Keep a finding; one that differs only in element and threads from an earlier one is counted there."""
    state, found, known = z[1], z[2], z[3]
    site, old_site = now >> SITE & (SITE_MAX - 1), old >> SITE & (SITE_MAX - 1)
    for row in range(state[FOUND]):
        f = found[row]
        if f[0] == kind and f[3] == number and f[1] >> SITE & (SITE_MAX - 1) == site:
            if f[2] >> SITE & (SITE_MAX - 1) == old_site and f[5] == access and f[6] == other:
                f[8] += 1
                return
    row = state[FOUND]
    if row >= ROWS:
        state[LOST] += 1
        return
    state[FOUND] += 1
    f = found[row]
    f[0], f[1], f[2], f[3], f[4], f[5], f[6], f[7], f[8] = kind, now, old, number, place, access, other, extra, 1


@numba.njit(**JIT)
def _clash(z, now, old, number, place, access, other, shared):
    """A finding if the earlier access ``old`` and the present one may come in either order."""
    state, found, known = z[1], z[2], z[3]
    if old <= BEFORE:
        return
    if old >> EPOCH < state[LOW]:  # another block
        if not shared and not state[FENCES]:
            _note(z, GLOBAL_RACE, now, old, number, place, access, other, 0)
        return
    if old >> EPOCH != now >> EPOCH:
        return
    thread, other_thread = now >> THREAD & 1023, old >> THREAD & 1023
    if thread == other_thread:
        return
    if len(known) and thread >> 5 == other_thread >> 5:
        if known[thread, other_thread & 31] >= old >> CLOCK & CLOCK_MAX:
            return
    _note(z, SHARED_RACE if shared else GLOBAL_RACE, now, old, number, place, access, other, 0)


@numba.njit(**JIT)
def _unwritten(z, m, k, now, access):
    """An element is read that nothing has written: kept until the epoch ends. If it is written by then, it is a race."""
    first, number, shared = m[1], m[4], m[5]
    state, waiting = z[1], z[6]
    row = state[WAITING]
    if row == len(waiting):
        _note(z, UNWRITTEN, now, 0, number, k - first, access, 0, 0)
        return
    state[WAITING] += 1
    w = waiting[row]
    w[0], w[1], w[2], w[3], w[4], w[5] = k, now, number, k - first, access, shared


@numba.njit(**JIT)
def _flush(z):
    """Tell of the elements that were read unwritten, and that nothing has written since."""
    cells, state, scells, waiting = z[0], z[1], z[5], z[6]
    for row in range(state[WAITING]):
        k, now, number, place, access, shared = waiting[row]
        written = scells[k, 0] if shared else cells[k, 0]
        if written >> EPOCH != now >> EPOCH:
            _note(z, UNWRITTEN, now, 0, number, place, access, 0, 0)
    state[WAITING] = 0


@numba.njit(**JIT)
def _read_slow(z, m, k, now, access):
    cells, first, per, shift, number, shared, decided = m
    state = z[1]
    old = cells[k, 0]
    if old == 0 or shared and old >> EPOCH < state[LOW]:
        if not decided:
            _unwritten(z, m, k, now, access)
        return
    _clash(z, now, old, number, k - first, access, ATOMIC if old & 1 else WRITE, shared)


@numba.njit(**JIT)
def _mark_read(z, m, k, now):
    cells, first, per, shift, number, shared, decided = m
    state, known = z[1], z[3]
    old = cells[k, 1]
    epoch = old >> EPOCH
    if epoch >= state[LOW]:
        if epoch == now >> EPOCH:
            if (old ^ now) >> THREAD & 1023 == 0:
                return
            if len(known):
                thread, other = now >> THREAD & 1023, old >> THREAD & 1023
                if thread >> 5 == other >> 5 and known[thread, other & 31] >= old >> CLOCK & CLOCK_MAX:
                    cells[k, 1] = now
                    return
            cells[k, 2] = now
        else:
            cells[k, 1] = now
    elif shared or old == 0:
        cells[k, 1] = now
    else:
        cells[k, 2] = now  # the first reader stays: it is of another block, and nothing orders the two


@numba.njit(**JIT)
def _read_cells(z, m, k, count, now, access):
    state = z[1]
    cells = m[0]
    for c in range(k, k + count):
        old = cells[c, 0]
        if old != BEFORE and (old >> EPOCH >= now >> EPOCH or old >> EPOCH < state[LOW]):
            if old >> EPOCH != now >> EPOCH or (old ^ now) >> THREAD & 1023 != 0:
                _read_slow(z, m, c, now, access)
        _mark_read(z, m, c, now)


@numba.njit(**JIT)
def _write_cells(z, m, k, count, now, access):
    cells, first, per, shift, number, shared, decided = m
    state = z[1]
    for c in range(k, k + count):
        for word in range(3):
            old = cells[c, word]
            if old > BEFORE and (old >> EPOCH >= now >> EPOCH or old >> EPOCH < state[LOW]):
                other = READ if word else ATOMIC if old & 1 else WRITE
                _clash(z, now, old, number, c - first, access, other, shared)
        cells[c, 0] = now


@numba.njit(**JIT)
def _atomic_cells(z, m, k, count, now, reads):
    cells, first, per, shift, number, shared, decided = m
    state = z[1]
    for c in range(k, k + count):
        old = cells[c, 0]
        if reads and (old == 0 or shared and old >> EPOCH < state[LOW]) and not decided:
            _note(z, UNWRITTEN, now, 0, number, c - first, ATOMIC, 0, 0)  # and others' atomics will not mend it
        if not old & 1:
            _clash(z, now, old, number, c - first, ATOMIC, WRITE, shared)
        for word in range(1, 3):
            _clash(z, now, cells[c, word], number, c - first, ATOMIC, READ, shared)
        cells[c, 0] = now | 1


@numba.njit(**JIT)
def _outside(z, m, now, access, index, axis, extent):
    """Note an index that is out of bounds, or negative; returns one that is inside, or -1 if there is none."""
    number = m[4]
    if -extent <= index < 0:
        _note(z, NEGATIVE, now, axis, number, index, access, 0, extent)
        return index + extent
    _note(z, OUT_OF_BOUNDS, now, axis, number, index, access, 0, extent)
    return -1


@numba.njit(**JIT)
def _record(z, ep, tid, site):
    clocks = z[4]
    clock = np.int64(clocks[tid]) if len(clocks) else np.int64(0)
    return np.int64(ep) << EPOCH | clock << CLOCK | np.int64(site) << SITE | np.int64(tid) << THREAD


@numba.njit(**JIT)
def _touch(z, m, k, count, now, access):
    if access == READ:
        _read_cells(z, m, k, count, now, READ)
    elif access == ATOMIC:
        _atomic_cells(z, m, k, count, now, True)
    else:
        if access == UPDATE:
            _read_cells(z, m, k, count, now, UPDATE)
        _write_cells(z, m, k, count, now, access)
    z[1][ACCESSES] += 1


@numba.njit(**JIT)
def _at1(x, index, m, z, ep, tid, site, access, elements):
    """The index of an access to a 1-D array, checked; -1 if it must not happen. For reads 0 in its place."""
    cells, first, per, shift, number, shared, decided = m
    now = _record(z, ep, tid, site)
    i = np.int64(index)
    extent = x.shape[0] - np.int64(elements) + 1
    if i < 0 or i >= extent:
        bad = i if i < 0 or i >= x.shape[0] else i + np.int64(elements) - 1
        i = _outside(z, m, now, access, bad, 0, x.shape[0])
        if i < 0 or i >= extent:
            if access == READ and extent > 0:
                return np.int64(0)
            return _must1(np.int64(-1)) if access == READ else np.int64(-1)
    _touch(z, m, first + ((i * x.strides[0]) >> shift), per * np.int64(elements), now, access)
    return i


@numba.njit(**JIT)
def _atn(x, index, m, z, ep, tid, site, access, elements):
    """As `_at1` for any number of axes: ``index`` and the result are tuples of int64, (-1, …) for "must not happen"."""
    cells, first, per, shift, number, shared, decided = m
    now = _record(z, ep, tid, site)
    offset, inside, last = np.int64(0), True, len(index) - 1
    for axis in range(len(index)):
        i, extent = index[axis], x.shape[axis]
        if axis == last:
            extent -= np.int64(elements) - 1
        if i < 0 or i >= extent:
            bad = i if i < 0 or i >= x.shape[axis] else i + np.int64(elements) - 1
            i = _outside(z, m, now, access, bad, axis, x.shape[axis])
            if i < 0 or i >= extent:
                inside = False
        offset += i * x.strides[axis]
    if inside:
        _touch(z, m, first + (offset >> shift), per * np.int64(elements), now, access)
    elif access == READ and x.size >= elements:
        return _filled(index, np.int64(0))
    else:
        if access == READ:
            _must1(np.int64(-1))
        return _filled(index, np.int64(-1))
    return _wrapped(x, index)


@numba.njit(**JIT)
def _must1(index):
    """``index``; an access that cannot be left out, and has no element, ends the launch: its finding is kept."""
    if index < 0:
        raise IndexError
    return index


@numba.njit(**JIT)
def _mustn(index):
    _must1(index[0])
    return index


@numba.njit(**JIT)
def _filled(index, value):
    out = index
    for axis in range(len(index)):
        out = _set(out, axis, value)
    return out


@numba.njit(**JIT)
def _wrapped(x, index):
    out = index
    for axis in range(len(index)):
        if index[axis] < 0:
            out = _set(out, axis, index[axis] + x.shape[axis])
    return out


@numba.njit(**JIT)
def _set(index, axis, value):
    return numba.cpython.unsafe.tuple.tuple_setitem(index, axis, value)


# --- local arrays: they belong to one thread, so only what was never written matters ---------------------------------


@numba.njit(**JIT)
def _local1(stamps, index, m, z, ep, tid, site, access):
    cells, extents, number = m
    now = _record(z, ep, tid, site)
    i = np.int64(index)
    if i < 0 or i >= extents[0]:
        i = _outside(z, (cells, 0, 1, 0, number, True, True), now, access, i, 0, extents[0])
        if i < 0:
            return np.int64(0) if access == READ else np.int64(-1)
    _local_touch(stamps, i, m, z, now, tid, access)
    return i


@numba.njit(**JIT)
def _localn(stamps, index, m, z, ep, tid, site, access):
    cells, extents, number = m
    now = _record(z, ep, tid, site)
    place, inside = np.int64(0), True
    for axis in range(len(index)):
        i = index[axis]
        if i < 0 or i >= extents[axis]:
            i = _outside(z, (cells, 0, 1, 0, number, True, True), now, access, i, axis, extents[axis])
            if i < 0:
                inside = False
        place = place * extents[axis] + i
    if not inside:
        return _filled(index, np.int64(0) if access == READ else np.int64(-1))
    _local_touch(stamps, place, m, z, now, tid, access)
    out = index
    for axis in range(len(index)):
        if index[axis] < 0:
            out = _set(out, axis, index[axis] + extents[axis])
    return out


@numba.njit(**JIT)
def _local_touch(stamps, place, m, z, now, tid, access):
    state = z[1]
    if access != WRITE and stamps[place, tid] < state[LOW]:
        _note(z, UNWRITTEN_LOCAL, now, 0, m[2], place, access, 0, 0)
    stamps[place, tid] = state[NOW]
    state[ACCESSES] += 1


# --- barriers --------------------------------------------------------------------------------------------------------


@numba.njit(**JIT)
def _epoch(z):
    """Begin the next epoch; returns it."""
    state, clocks = z[1], z[4]
    _flush(z)
    if state[NOW] + 1 >= EPOCH_MAX:
        raise OverflowError
    state[NOW] += 1
    clocks[:] = 0
    z[3][:] = -1
    return state[NOW]


@numba.njit(**JIT)
def _block_starts(z, starts, block):
    """Begin a block: what shared and local arrays hold from the block before counts as never written."""
    epoch = _epoch(z)
    z[1][LOW] = epoch
    starts[block] = epoch
    return epoch


@numba.njit(**JIT)
def _exited(z, alive, ep, site):
    """A barrier that some threads will not come to, since they have returned."""
    gone, left = -1, -1
    for thread in range(len(alive)):
        if alive[thread]:
            left = thread
        elif gone < 0:
            gone = thread
    if gone >= 0 and left >= 0:
        _note(z, EXITED, _record(z, ep, left, site), _record(z, ep, gone, site), 0, 0, 0, 0, 0)


@numba.njit(**JIT)
def _syncwarp(z, warp, bits):
    """Lanes ``bits`` of a warp meet: each then knows all that any of them knew, and what each of them has done."""
    known, clocks, state = z[3], z[4], z[1]
    base = warp * 32
    top = np.empty(32, np.int64)
    top[:] = -1
    for lane in range(32):
        if bits >> lane & 1:
            for other in range(32):
                top[other] = max(top[other], known[base + lane, other])
            top[lane] = max(top[lane], clocks[base + lane])
    for lane in range(32):
        if bits >> lane & 1:
            known[base + lane] = top
            if clocks[base + lane] < CLOCK_MAX:
                clocks[base + lane] += 1
            else:
                state[COARSE] = 1


@numba.njit(**JIT)
def _narrow(value, lowest, highest, z, ep, tid, site):
    """``value``, noted if an integer does not fit where it is cast to."""
    if value < lowest or value > highest:
        _note(z, OVERFLOW, _record(z, ep, tid, site), 0, 0, np.int64(value), READ, 0, 0)
    return value


__all__ = [
    "_at1", "_atn", "_block_starts", "_epoch", "_exited", "_flush", "_local1", "_localn", "_must1", "_mustn", "_narrow", "_syncwarp",
]  # fmt: skip
