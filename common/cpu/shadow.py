"""What generated code calls in sanitized launches: each access looks at its element's *shadow* first.

The shadow of an element is five words: who wrote it last, two different threads that have read it, and two whose
atomics have changed it. A word is a *record* of one access::

    epoch << 37 | clock << 23 | site << 11 | thread << 1

epoch: counts the block barriers of a launch, over all blocks; so it also says in which block the access was. clock: of
a lane, counts its ``syncwarp``s within an epoch. site: the place in the source. Epochs go on from launch to launch, so
that cells can be used again as they are: what is below the launch's first epoch was before it. Two accesses, at least
one of them a write and not both atomic, are a race

- in one block, if they have the same epoch and different threads, unless both are lanes of one warp and the later one
  knows, through ``syncwarp``, the clock of the earlier one;
- in different blocks, for arrays in global memory, always: nothing orders the blocks of a launch.

So no race is missed because it was "won": what counts is what the barriers allow, not who came first.

All of this lies in int64 arrays that the launcher owns and generated code knows by address: an array that is handed
through costs a reference count at each call, many times what the look itself costs. ``z`` is the address of the
launch's state. ``m`` are an array's own facts: address of its first cell, cells an element, shift from bytes to cells,
number, is it shared, may it be read unwritten, does the kernel use ``syncwarp``, does it use atomics? Where an array
may not be read unwritten, the launcher has put 0 into the cells of elements that nothing has written, and 1 (`BEFORE`)
into the others.
"""

import functools

import llvmlite.binding as llvm
import numba
import numpy as np
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from . import machine_code

# kinds of findings, in the first column of the table
OUT_OF_BOUNDS, NEGATIVE, SHARED_RACE, GLOBAL_RACE, UNWRITTEN, UNWRITTEN_LOCAL, EXITED, OVERFLOW = range(1, 9)
READ, WRITE, ATOMIC, UPDATE, EXCHANGE = range(5)  # kinds of access; the last is an atomic that does not read
BEFORE = 1
EPOCH, CLOCK, SITE = 37, 23, 11  # positions in a record; the thread stands at 1
CLOCK_MAX, SITE_MAX, EPOCH_MAX = (1 << 14) - 1, 1 << 12, 1 << 26
NOW, LOW, FOUND, LOST, FENCES, COARSE, ACCESSES, WAITING = range(8)  # places in the state
TABLE, KNOWN, CLOCKS, LANES, QUEUE, STARTS, FLOOR, FULL = range(8, 16)
ROWS, COLUMNS = 512, 10  # of the table: different findings that are kept
QUEUE_ROWS, QUEUE_COLUMNS = 8192, 5  # elements read unwritten in an epoch
LEAVE_OUT, NOWHERE = -1, -2  # instead of an index: the access must not happen; there is nothing that could be read
CELL = 40  # bytes: W, then two each of R and A
W, R, A = 0, 1, 3

INLINE = {"forceinline": True}
APART = {}  # symbol: (function, signature)


def _apart(returns=types.void):
    """Decorator: a function that kernels call where it lies, instead of each being compiled with a copy of it.

    A kernel under the sanitizer is compiled in half the time for it. The function takes int64 only, and must not raise.
    """

    def register(function):
        symbol = "kernel_by_kernel" + function.__name__
        signature = returns(*[types.int64] * function.__code__.co_argcount)
        APART[symbol] = function, signature
        return types.ExternalFunction(symbol, signature)

    return register


@functools.cache
def prepare():
    """Compile the functions apart, or load them from disk, and tell LLVM where they lie. Returns what must be kept."""
    kept = []
    for symbol, (function, signature) in APART.items():  # none calls one that comes later
        kept.append(machine_code.callback(function, signature))
        llvm.add_symbol(symbol, kept[-1].address)
    return kept


@intrinsic
def _get(typingctx, address, place):
    """The int64 number ``place`` from ``address`` on."""

    def codegen(context, builder, sig, args):
        return builder.load(_pointer(builder, args))

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def _put(typingctx, address, place, value):
    """Store an int64 as number ``place`` from ``address`` on."""

    def codegen(context, builder, sig, args):
        builder.store(args[2], _pointer(builder, args))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen


def _pointer(builder, args):
    word = ir.IntType(64)
    return builder.gep(builder.inttoptr(args[0], word.as_pointer()), [args[1]])


def _thread(record):
    return record >> 1 & 1023


def _site(record):
    return record >> SITE & (SITE_MAX - 1)


_thread, _site = numba.njit()(_thread), numba.njit()(_site)


@machine_code.jit(**INLINE)
def _other_thread(old, now):
    return (old ^ now) & 2046 != 0


@_apart()
def _note(z, kind, now, old, number, place, access, other, extra):
    """Keep a finding; one that differs only in element and threads from an earlier one is counted there."""
    table = _get(z, TABLE)
    rows = _get(z, FOUND)
    for row in range(rows):
        f = table + row * COLUMNS * 8
        if _get(f, 0) == kind and _get(f, 3) == number and _site(_get(f, 1)) == _site(now):
            if _site(_get(f, 2)) == _site(old) and _get(f, 5) == access and _get(f, 6) == other:
                _put(f, 8, _get(f, 8) + 1)
                return
    if rows >= ROWS:
        _put(z, LOST, _get(z, LOST) + 1)
        return
    f = table + rows * COLUMNS * 8
    _put(z, FOUND, rows + 1)
    _put(f, 0, kind)
    _put(f, 1, now)
    _put(f, 2, old)
    _put(f, 3, number)
    _put(f, 4, place)
    _put(f, 5, access)
    _put(f, 6, other)
    _put(f, 7, extra)
    _put(f, 8, 1)


@machine_code.jit()
def _knows(z, thread, old):
    """Has a lane met the one that ``old`` is a record of, at a ``syncwarp`` since?"""
    return _get(_get(z, KNOWN), thread * 32 + (_thread(old) & 31)) >= old >> CLOCK & CLOCK_MAX


@machine_code.jit()
def _clash(z, first, number, shared, syncs, k, now, old, access, other):
    """A finding if the earlier access ``old`` and the present one may come in either order."""
    if old < _get(z, FLOOR):
        return
    if old >> EPOCH < _get(z, LOW):  # another block
        if not shared and _get(z, FENCES) == 0:
            _note(z, GLOBAL_RACE, now, old, number, (k - first) // CELL, access, other, 0)
        return
    thread, other_thread = _thread(now), _thread(old)
    if old >> EPOCH != now >> EPOCH or thread == other_thread:
        return
    if syncs and thread >> 5 == other_thread >> 5 and _knows(z, thread, old):
        return
    _note(z, SHARED_RACE if shared else GLOBAL_RACE, now, old, number, (k - first) // CELL, access, other, 0)


@machine_code.jit()
def _unwritten(z, first, number, k, now, access):
    """An element is read that nothing has written: kept until the epoch ends. Written by then, it is a race."""
    row = _get(z, WAITING)
    if row == QUEUE_ROWS:
        _put(z, FULL, 1)
        return
    w = _get(z, QUEUE) + row * QUEUE_COLUMNS * 8
    _put(z, WAITING, row + 1)
    _put(w, 0, k)
    _put(w, 1, now)
    _put(w, 2, number)
    _put(w, 3, (k - first) // CELL)
    _put(w, 4, access)


@_apart()
def _flush(z):
    """Tell of the elements that were read unwritten, and that no other thread has written since (that is a race)."""
    for row in range(_get(z, WAITING)):
        w = _get(z, QUEUE) + row * QUEUE_COLUMNS * 8
        now, written = _get(w, 1), _get(_get(w, 0), W)
        if written >> EPOCH != now >> EPOCH or not _other_thread(written, now):
            _note(z, UNWRITTEN, now, 0, _get(w, 2), _get(w, 3), _get(w, 4), 0, 0)
    _put(z, WAITING, 0)


# --- one cell --------------------------------------------------------------------------------------------------------
# Functions marked INLINE decide the ordinary cases where they are called; the rest is in the functions apart.


@machine_code.jit(**INLINE)
def _safe(old, now, low, floor):
    """Is the access that ``old`` tells of surely ordered before ``now``, or the same thread's?"""
    epoch = old >> EPOCH
    same = epoch == now >> EPOCH
    return old < floor or epoch >= low and not (same and _other_thread(old, now))


@_apart()
def _read_slow(z, first, number, shared, syncs, atomics, k, now, access):
    old = _get(k, W)
    if old == 0 or shared and old >> EPOCH < _get(z, LOW):
        if not atomics or _get(k, A) < _get(z, FLOOR) or shared and _get(k, A) >> EPOCH < _get(z, LOW):
            _unwritten(z, first, number, k, now, access)  # no atomic has changed it either: that would have been told
    else:
        _clash(z, first, number, shared, syncs, k, now, old, access, WRITE)


@machine_code.jit()
def _mark(z, shared, syncs, k, word, now):
    """Mark a reader, or an atomic, in the first of its two words or, if somebody there must stay, in the second."""
    old = _get(k, word)
    if old >> EPOCH == now >> EPOCH:
        thread = _thread(now)
        if _thread(old) == thread or syncs and thread >> 5 == _thread(old) >> 5 and _knows(z, thread, old):
            _put(k, word, now)
        else:
            _put(k, word + 1, now)
    elif shared or old < _get(z, FLOOR) or old >> EPOCH >= _get(z, LOW):
        _put(k, word, now)
    else:
        _put(k, word + 1, now)  # the first stays: it is of another block, and nothing orders the two


@_apart()
def _mark_slow(z, shared, syncs, k, word, now):
    _mark(z, shared, syncs, k, word, now)


@_apart()
def _write_slow(z, first, number, shared, syncs, k, now, access):
    _clash(z, first, number, shared, syncs, k, now, _get(k, W), access, WRITE)
    for word in range(2):
        _clash(z, first, number, shared, syncs, k, now, _get(k, R + word), access, READ)
        _clash(z, first, number, shared, syncs, k, now, _get(k, A + word), access, ATOMIC)


@_apart()
def _clash_with_atomics(z, first, number, shared, syncs, k, now, access):
    _clash(z, first, number, shared, syncs, k, now, _get(k, A), access, ATOMIC)
    _clash(z, first, number, shared, syncs, k, now, _get(k, A + 1), access, ATOMIC)


@_apart()
def _atomic(z, first, number, shared, decided, syncs, k, now, low, floor, reads):
    old = _get(k, W)
    if reads and (old == 0 and not decided or shared and old >> EPOCH < low):
        changed = _get(k, A)
        if changed < floor or shared and changed >> EPOCH < low:
            _unwritten(z, first, number, k, now, ATOMIC)
    if not _safe(old, now, low, floor):
        _clash(z, first, number, shared, syncs, k, now, old, ATOMIC, WRITE)
    for word in range(R, R + 2):
        if not _safe(_get(k, word), now, low, floor):
            _clash(z, first, number, shared, syncs, k, now, _get(k, word), ATOMIC, READ)
    _mark(z, shared, syncs, k, A, now)


@machine_code.jit(**INLINE)
def _read(z, m, k, now, low, floor, access):
    first, per, shift, number, shared, decided, syncs, atomics = m
    old, reader, epoch = _get(k, W), _get(k, R), now >> EPOCH
    written = old >> EPOCH
    if shared:  # the same as below, with less to ask: what is there from another block, or launch, counts for nothing
        if written < low or written == epoch and _other_thread(old, now):
            _read_slow(z, first, number, shared, syncs, atomics, k, now, access)
    elif not _safe(old, now, low, floor) or old < floor and not decided and old != BEFORE:
        _read_slow(z, first, number, shared, syncs, atomics, k, now, access)
    if atomics and not (_safe(_get(k, A), now, low, floor) and _safe(_get(k, A + 1), now, low, floor)):
        _clash_with_atomics(z, first, number, shared, syncs, k, now, access)
    if shared and reader >> EPOCH != epoch:
        _put(k, R, now)
    elif not shared and (reader < floor or reader >> EPOCH >= low and reader >> EPOCH != epoch):
        _put(k, R, now)
    elif reader >> EPOCH < low or syncs:
        _mark_slow(z, shared, syncs, k, R, now)
    elif _other_thread(reader, now):
        _put(k, R + 1, now)


@machine_code.jit(**INLINE)
def _write(z, m, k, now, low, floor, access):
    first, per, shift, number, shared, decided, syncs, atomics = m
    safe = _safe(_get(k, W), now, low, floor) and _safe(_get(k, R), now, low, floor)
    safe = safe and _safe(_get(k, R + 1), now, low, floor)
    if atomics:
        safe = safe and _safe(_get(k, A), now, low, floor) and _safe(_get(k, A + 1), now, low, floor)
    if not safe:
        _write_slow(z, first, number, shared, syncs, k, now, access)
    _put(k, W, now)


@machine_code.jit(**INLINE)
def _touch(z, m, k, now, low, floor, access):
    if access == READ:
        _read(z, m, k, now, low, floor, READ)
    elif access == ATOMIC or access == EXCHANGE:
        first, per, shift, number, shared, decided, syncs, atomics = m
        _atomic(z, first, number, shared, decided, syncs, k, now, low, floor, access == ATOMIC)
    else:
        if access == UPDATE:
            _read(z, m, k, now, low, floor, UPDATE)
        _write(z, m, k, now, low, floor, access)


@_apart()
def _read_cells(z, first, number, shared, decided, syncs, atomics, k, now, low, floor, count):
    for _ in range(count):
        _read(z, (first, 1, 0, number, shared, decided, syncs, atomics), k, now, low, floor, READ)
        k += CELL


@_apart()
def _cells_apart(z, first, number, shared, decided, syncs, atomics, k, now, low, floor, access, count):
    for _ in range(count):
        _touch(z, (first, 1, 0, number, shared, decided, syncs, atomics), k, now, low, floor, access)
        k += CELL


@machine_code.jit(**INLINE)
def _touch_cells(z, m, k, now, low, floor, access, count):
    first, per, shift, number, shared, decided, syncs, atomics = m
    if access == READ:  # the most frequent one has its own
        _read_cells(z, first, number, shared, decided, syncs, atomics, k, now, low, floor, count)
    else:
        _cells_apart(z, first, number, shared, decided, syncs, atomics, k, now, low, floor, access, count)


# --- an access -------------------------------------------------------------------------------------------------------


@machine_code.jit(**INLINE)
def _record(z, syncs, ep, tid, site):
    now = np.int64(ep) << EPOCH | np.int64(site) << SITE | np.int64(tid) << 1
    if syncs:
        now |= _get(_get(z, CLOCKS), np.int64(tid)) << CLOCK
    return now


@machine_code.jit()
def _outside(z, number, now, access, index, axis, extent):
    """Note an index that is out of bounds, or negative; returns one that is inside, or -1 if there is none."""
    if -extent <= index < 0:
        _note(z, NEGATIVE, now, axis, number, index, access, 0, extent)
        return index + extent
    _note(z, OUT_OF_BOUNDS, now, axis, number, index, access, 0, extent)
    return np.int64(-1)


@_apart(types.int64)
def _settle(z, number, now, access, index, axis, extent, elements):
    """The index to go on with where ``index`` is not inside: from the end, 0 for a read, `LEAVE_OUT`, or `NOWHERE`."""
    last = extent - elements
    i = _outside(z, number, now, access, index if index < 0 or index >= extent else index + elements - 1, axis, extent)
    if 0 <= i <= last:
        return i
    if access != READ:
        return LEAVE_OUT
    return 0 if last >= 0 else NOWHERE


@machine_code.jit()
def _unless_nowhere(index):
    """``index``; a read from an array that has no element ends the launch: its finding is kept."""
    if index == NOWHERE:
        raise IndexError
    return index


@machine_code.jit(**INLINE)
def _access1(extent, stride, index, m, z, ep, low, floor, tid, site, access, elements):
    """The index of an access to a 1-D array, looked at; -1 if it must not happen, 0 for a read that must not.

    extent, stride (in bytes): of the array, which is not handed in itself: so one compiled function serves all dtypes.
    """
    first, per, shift, number, shared, decided, syncs, atomics = m
    now = _record(z, syncs, ep, tid, site)
    _put(z, ACCESSES, _get(z, ACCESSES) + 1)
    i = index
    if i < 0 or i > extent - elements:
        i = _unless_nowhere(_settle(z, number, now, access, i, 0, extent, elements))
        if i < 0 or index >= 0:
            return i
    k = first + (i * stride >> shift) * CELL
    if elements == 1 and per == 1:
        _touch(z, m, k, now, low, floor, access)
    else:
        _touch_cells(z, m, k, now, low, floor, access, per * elements)
    return i


@machine_code.jit(**INLINE)
def _accessn(extents, strides, index, m, z, ep, low, floor, tid, site, access, elements):
    """As `_access1` for several axes: tuples of int64, the result too, all -1 for "must not happen"."""
    first, per, shift, number, shared, decided, syncs, atomics = m
    now = _record(z, syncs, ep, tid, site)
    _put(z, ACCESSES, _get(z, ACCESSES) + 1)
    offset, inside = np.int64(0), True
    for axis in range(len(index)):
        last = extents[axis] - (elements if axis == len(index) - 1 else 1)
        inside &= 0 <= index[axis] <= last
        offset += index[axis] * strides[axis]
    if not inside:
        return _settle_all(extents, strides, index, m, z, now, low, floor, access, elements)
    k = first + (offset >> shift) * CELL
    if elements == 1 and per == 1:
        _touch(z, m, k, now, low, floor, access)
    else:
        _touch_cells(z, m, k, now, low, floor, access, per * elements)
    return index


@machine_code.jit()
def _settle_all(extents, strides, index, m, z, now, low, floor, access, elements):
    first, per, shift, number, shared, decided, syncs, atomics = m
    offset, out, outside = np.int64(0), index, False
    for axis in range(len(index)):
        i = index[axis]
        wide = elements if axis == len(index) - 1 else 1
        if i < 0 or i > extents[axis] - wide:
            i = _unless_nowhere(_settle(z, number, now, access, i, axis, extents[axis], wide))
            out = _set(out, axis, i)
            if i < 0:
                return _filled(index, np.int64(-1))
            outside |= index[axis] >= 0
        offset += i * strides[axis]
    if not outside:
        _touch_cells(z, m, first + (offset >> shift) * CELL, now, low, floor, access, per * elements)
    return out


@machine_code.jit()
def _must1(index):
    """``index``; an access that cannot be left out, and has no element, ends the launch: its finding is kept."""
    if index < 0:
        raise IndexError
    return index


@machine_code.jit()
def _mustn(index):
    _must1(index[0])
    return index


@machine_code.jit()
def _filled(index, value):
    out = index
    for axis in range(len(index)):
        out = _set(out, axis, value)
    return out


@machine_code.jit()
def _set(index, axis, value):
    return numba.cpython.unsafe.tuple.tuple_setitem(index, axis, value)


# --- local arrays: they belong to one thread, so only what was never written matters ---------------------------------
# m: address of the stamps (an int64 for each element and thread: the epoch of the last write), number, threads


@_apart()
def _local_touch(stamps, number, threads, z, place, now, access):
    at = place * threads + _thread(now)
    if access != WRITE and _get(stamps, at) < _get(z, LOW):
        _note(z, UNWRITTEN_LOCAL, now, 0, number, place, access, 0, 0)
    _put(stamps, at, now >> EPOCH)


@_apart(types.int64)
def _local1_slow(extent, index, stamps, number, threads, z, ep, tid, site, access):
    now, i = _record(z, False, ep, tid, site), index
    if i < 0 or i >= extent:
        i = _settle(z, number, now, access, i, 0, extent, 1)
        if i < 0 or index >= 0:
            return i
    _local_touch(stamps, number, threads, z, i, now, access)
    return i


@machine_code.jit(**INLINE)
def _local1(extents, index, m, z, ep, low, floor, tid, site, access):
    """As `_access1`, for an array of each thread's own."""
    at = m[0] + (index * m[2] + np.int64(tid)) * 8
    _put(z, ACCESSES, _get(z, ACCESSES) + 1)
    if 0 <= index < extents[0] and (access == WRITE or _get(at, 0) >= low):
        if access != READ:
            _put(at, 0, np.int64(ep))
        return index
    return _unless_nowhere(_local1_slow(extents[0], index, m[0], m[1], m[2], z, ep, tid, site, access))


@machine_code.jit(**INLINE)
def _localn(extents, index, m, z, ep, low, floor, tid, site, access):
    """As `_local1` for several axes."""
    place, inside = np.int64(0), True
    for axis in range(len(index)):
        inside &= 0 <= index[axis] < extents[axis]
        place = place * extents[axis] + index[axis]
    at = m[0] + (place * m[2] + np.int64(tid)) * 8
    _put(z, ACCESSES, _get(z, ACCESSES) + 1)
    if inside and (access == WRITE or _get(at, 0) >= low):
        if access != READ:
            _put(at, 0, np.int64(ep))
        return index
    return _localn_slow(extents, index, m, z, ep, tid, site, access)


@machine_code.jit()
def _localn_slow(extents, index, m, z, ep, tid, site, access):
    now = _record(z, False, ep, tid, site)
    place, out, outside = np.int64(0), index, False
    for axis in range(len(index)):
        i = index[axis]
        if i < 0 or i >= extents[axis]:
            i = _unless_nowhere(_settle(z, m[1], now, access, i, axis, extents[axis], 1))
            out = _set(out, axis, i)
            if i < 0:
                return _filled(index, np.int64(-1))
            outside |= index[axis] >= 0
        place = place * extents[axis] + i
    if not outside:
        _local_touch(m[0], m[1], m[2], z, place, now, access)
    return out


# --- barriers --------------------------------------------------------------------------------------------------------


@_apart(types.int64)
def _next_epoch(z):
    """Begin the next epoch; returns it, or -1 if there are no more."""
    _flush(z)
    epoch = _get(z, NOW) + 1
    if epoch >= EPOCH_MAX:
        return -1
    _put(z, NOW, epoch)
    for thread in range(_get(z, LANES)):
        _put(_get(z, CLOCKS), thread, 0)
        for lane in range(32):
            _put(_get(z, KNOWN), thread * 32 + lane, -1)
    return epoch


@machine_code.jit()
def _epoch(z):
    """Begin the next epoch; returns it."""
    epoch = _next_epoch(z)
    if epoch < 0:
        raise OverflowError
    return epoch


@machine_code.jit()
def _block_starts(z, block):
    """Begin a block: what shared and local arrays hold from the block before counts as never written."""
    epoch = _epoch(z)
    _put(z, LOW, epoch)
    _put(_get(z, STARTS), block, epoch)
    return epoch


@machine_code.jit()
def _floor(z):
    return _get(z, FLOOR)


@machine_code.jit()
def _exited(z, alive, ep, site):
    """A barrier that some threads will not come to, since they have returned."""
    gone, left = -1, -1
    for thread in range(len(alive)):
        if alive[thread]:
            left = thread
        elif gone < 0:
            gone = thread
    if gone >= 0 and left >= 0:
        _note(z, EXITED, _record(z, False, ep, left, site), _record(z, False, ep, gone, site), 0, 0, 0, 0, 0)


@_apart()
def _syncwarp(z, warp, bits):
    """Lanes ``bits`` of a warp meet: each then knows all that any of them knew, and what each of them has done."""
    known, clocks = _get(z, KNOWN), _get(z, CLOCKS)
    base = np.int64(warp) * 32
    for other in range(32):
        top = np.int64(-1)
        for lane in range(32):
            if bits >> lane & 1:
                top = max(top, _get(known, (base + lane) * 32 + other))
                if lane == other:
                    top = max(top, _get(clocks, base + lane))
        for lane in range(32):
            if bits >> lane & 1:
                _put(known, (base + lane) * 32 + other, top)
    for lane in range(32):
        if bits >> lane & 1:
            if _get(clocks, base + lane) < CLOCK_MAX:
                _put(clocks, base + lane, _get(clocks, base + lane) + 1)
            else:
                _put(z, COARSE, 1)


@machine_code.jit()
def _narrow(value, lowest, highest, z, ep, tid, site):
    """``value``, noted if it does not fit where it is cast to."""
    if value < lowest or value > highest:
        _note(z, OVERFLOW, _record(z, False, ep, tid, site), 0, 0, np.int64(value), READ, 0, 0)
    return value


__all__ = [
    "_access1", "_accessn", "_block_starts", "_epoch", "_exited", "_floor", "_flush", "_local1", "_localn",
    "_must1", "_mustn", "_narrow", "_syncwarp",
]  # fmt: skip
