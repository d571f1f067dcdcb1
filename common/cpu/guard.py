"""Memory with guards round it, so that a kernel that leaves its arrays is caught without ``MINI_CHECK``.

Arrays of the device lie far apart in a large reserved region, the *arena*: each at the end of pages of its own, with
4 MiB before and behind it that nobody may touch. The first access there, read or write, ends the launch (see `crash`).
An array begins at a multiple of 64 bytes, so up to 63 bytes lie between its end and those pages; they and 64 bytes
before it are *canaries*: filled with a pattern, and looked at after each launch. A write there is reported. A read
there is not seen: ``MINI_CHECK=1`` and the sanitizer see it.

NumPy arrays given to a launch lie where NumPy has put them. `Staged` copies them into the arena, as a launch on a GPU
copies them to the device, and back after it; `launch` decides when.

Where there is no arena (not Linux; no room; very many arrays), arrays lie in ordinary memory, with canaries of 4096
bytes and some room behind them.
"""

import ctypes
import mmap
import weakref

import numpy as np

from . import crash

ALIGNMENT = 64  # bytes: one cache line, one AVX-512 register
PAGE = crash.PAGE
HUGE_PAGE = 2 << 20
GAP = 4 << 20  # bytes before and behind each array that nobody may touch
LARGEST, LEAST = 1 << 40, 1 << 32  # bytes of the arena: the first power of two that can be had. It takes no memory
MAX_PLACES = 16384  # each is two of the 65530 mappings that Linux gives a process
FRONT, BACK = 64, 4096  # bytes of the canaries; behind an array in the arena there are fewer than ALIGNMENT
SPARE = 256 << 10  # bytes behind the canaries, where there is no arena: memory that is never used is not there
KEEP_ONE, KEEP_ALL = 32 << 20, 128 << 20  # bytes of a freed array, and of all, that stay with the process for others
HUGE = 2 << 20  # bytes from which on we ask for huge pages
MAX_STAGED = 64 << 20  # bytes of a launch's NumPy arrays: more are not copied for safety
PATTERN = bytes((i * 167 + 91) % 251 + 1 for i in range(BACK))  # no byte is 0: kernels like to write zeros

_red = {}  # id of the memory of an array -> `Red`


class Red:
    """The canaries of one array's memory.

    ``pairs``: what reads them, and what must come out, for the launch to compare. ``parts``: (address, memoryview).
    """

    __slots__ = ("pairs", "parts", "high", "watch")

    def __init__(self, cells, address, first, end):
        """``cells``: a memoryview of bytes, from ``address`` on; the array's are first … end - 1 of it.

        It must not keep the array's memory alive.
        """
        self.high = address + end
        self.parts, front = [], max(0, first - FRONT)
        for begin, part in ((front, cells[front:first]), (end, cells[end : end + BACK])):
            if part:
                self.parts.append((address + begin, part))
        self.repair()
        self.pairs = tuple([(part.tobytes, PATTERN[: len(part)]) for _, part in self.parts])

    def repair(self):
        """Write the pattern again."""
        for _, part in self.parts:
            part[:] = PATTERN[: len(part)]

    def damage(self):
        """Address of the written canary byte nearest to the array; None if all are whole."""
        for address, part in self.parts:
            broken = [k for k, (byte, whole) in enumerate(zip(part, PATTERN)) if byte != whole]
            if broken:
                return address + broken[0 if address >= self.high else -1]
        return None


class Place:
    """Pages of the arena. ``memory``, ``cells``: all their bytes; ``warm``: they have not been given back."""

    __slots__ = ("address", "size", "memory", "cells", "warm")

    def __init__(self, address, size):
        self.address, self.size, self.warm = address, size, True
        self.memory = (ctypes.c_ubyte * size).from_address(address)
        self.cells = memoryview(self.memory).cast("B")


class Arena:
    """The reserved region, ``base`` … ``end`` - 1; ``base`` is 0 if there is none."""

    def __init__(self):
        self.libc = ctypes.CDLL(None, use_errno=True)
        self.libc.mmap.restype = ctypes.c_void_p
        self.libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
        self.libc.mprotect.argtypes = self.libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        self.free, self.kept, self.places, self.base, size = {}, 0, [], 0, LARGEST
        while size >= LEAST:
            base = self.libc.mmap(None, size, crash.NONE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
            if base not in (None, ctypes.c_void_p(-1).value):
                self.base, self.end = base, base + size
                self.next, self.last = base + size // 4, base + size // 4 * 3  # both sides are for what goes far away
                crash.words[crash.ARENA], crash.words[crash.ARENA_END] = base, self.end
                break
            size //= 2

    def take(self, nbytes):
        """A `Place` of at least so many bytes, or None. Lists change in one step, so that only new ones need a lock."""
        pages = max(1, -(-nbytes // PAGE))
        step = 1 << max(0, pages.bit_length() - 4)  # eight sizes between two powers of two
        size = -(-pages // step) * step * PAGE
        try:
            place = self.free[size].pop()
            self.kept -= size if place.warm else 0
            return place
        except (KeyError, IndexError):
            pass
        with crash._lock:
            address = self.next
            if size >= HUGE:
                address = -(-(address + size) // HUGE_PAGE) * HUGE_PAGE - size
            end = address + size + GAP
            if not self.base or len(self.places) >= MAX_PLACES or end > self.last:
                return None
            if self.libc.mprotect(address, size, crash.READ_WRITE):
                return None
            self.next = -(-end // PAGE) * PAGE
            self.places.append((address, size))
        if size >= HUGE:
            self.libc.madvise(address, size, 14)  # MADV_HUGEPAGE
        return Place(address, size)

    def give(self, place):
        """Take a place back; large ones lose their memory, the others keep it for the next array of this size."""
        place.warm = place.size <= KEEP_ONE and self.kept + place.size <= KEEP_ALL
        if place.warm:
            self.kept += place.size
        else:
            self.libc.madvise(place.address, place.size, 4)  # MADV_DONTNEED
        self.free.setdefault(place.size, []).append(place)

    def close_pages(self):
        """Take back the pages that were lent to kernels outside their arrays; gives their addresses."""
        pages = crash.lent_pages()
        for page in pages:
            if not any(address <= page < address + size for address, size in self.places):  # since then an array's
                self.libc.mmap(page, PAGE, crash.NONE, crash.NEW_PAGE, -1, 0)
        return pages


_arena = None


def arena():
    """The one `Arena`, or None where there is none: without room for it, or where access to it cannot be caught."""
    global _arena
    if _arena is None:
        crash.ensure()  # before there is memory that only its handler makes harmless
        with crash._lock:
            if _arena is None and crash.CAN_CATCH:
                _arena = Arena()
    return _arena if _arena is not None and _arena.base else None


def memory(nbytes, alignment=ALIGNMENT, low=0):
    """``(memory, first)``: a uint8 array with room for ``nbytes`` from byte ``first`` on, and guards round them.

    The address of ``first`` is ``low`` modulo ``alignment``. It is free again when nothing refers to ``memory``.
    """
    region, slack = arena(), -(low + nbytes) % alignment
    place = region.take(nbytes + slack) if region and nbytes else None
    if place is not None:
        raw, first = np.ndarray((place.size,), np.uint8, place.memory), place.size - slack - nbytes
        cells, address = place.cells, place.address
    else:
        raw = np.empty(FRONT + alignment + nbytes + BACK + (0 if region else SPARE), np.uint8)
        address = _address(raw)
        first, cells = FRONT + (low - address - FRONT) % alignment, memoryview(_bytes_at(address, len(raw)))
    if nbytes:
        red, key = Red(cells, address, first, first + nbytes), id(raw)

        def gone(_, key=key, place=place, red=_red, give=region and region.give):
            red.pop(key, None)
            if place is not None:
                give(place)

        red.watch = weakref.ref(raw, gone)
        _red[key] = red
    return raw, first


def red_of(host):
    """The `Red` of the memory that an array lies in, or None."""
    return _red.get(id(host.base))


def pairs_of(host):
    """The pairs (read, whole) of an array's canaries, to compare after a launch; () if it has none."""
    red = _red.get(id(host.base))
    return () if red is None else red.pairs


# --- NumPy arrays of a launch -----------------------------------------------------------------------------------------


class Staged:
    """A launch's arrays, copied to memory with guards. ``values``: what the kernel gets. ``pairs``: see `Red`.

    Arrays that share memory share it in the copy.
    """

    def __init__(self, values, everything=False):
        """Copy the arrays of ``values`` that have no guards, or ``everything``."""
        self.values, self.pairs, self.parts = list(values), [], []
        arrays = [
            (*np.lib.array_utils.byte_bounds(v), k)
            for k, v in enumerate(values)
            if isinstance(v, np.ndarray) and v.size and (everything or red_of(v) is None)
        ]
        groups = []
        for low, high, k in sorted(arrays):
            if groups and low < groups[-1][1]:
                groups[-1][1] = max(high, groups[-1][1])
                groups[-1][2].append(k)
            else:
                groups.append([low, high, [k]])
        for low, high, members in groups:
            raw, first = memory(high - low, max(values[k].itemsize for k in members), low)
            copy = raw[first : first + high - low]
            host = _bytes_at(low, high - low)
            copy[:] = host
            if any(values[k].flags.writeable for k in members):
                size = min(8, *[values[k].itemsize for k in members])
                word = np.dtype(f"u{size}" if (high - low) % size == 0 else "u1")
                self.parts.append([part.view(word) for part in (host, copy, copy.copy())])
            for k in members:
                v = values[k]
                view = np.ndarray(v.shape, v.dtype, raw, first + _address(v) - low, v.strides)
                view.flags.writeable = v.flags.writeable
                self.values[k] = view
            self.pairs += _red[id(raw)].pairs

    def copy_back(self):
        """Give the host arrays what the kernel has changed, element by element: other threads may change others."""
        for host, copy, before in self.parts:
            np.copyto(host, copy, where=copy != before)


def size_of(values):
    """Bytes of the arrays of a launch that have no guards."""
    return sum(v.nbytes for v in values if isinstance(v, np.ndarray) and red_of(v) is None)


# --- after a launch ---------------------------------------------------------------------------------------------------


def close_pages():
    """See `Arena.close_pages`."""
    return _arena.close_pages() if _arena is not None else []


def damaged(values):
    """Address of a canary byte next to one of the arrays that has been written, or None; the canaries are repaired."""
    first = None
    for value in values:
        red = red_of(value) if isinstance(value, np.ndarray) else None
        at = None if red is None else red.damage()
        if at is not None:
            first = at if first is None else first
            red.repair()
    return first


def nearest(values, at):
    """``(number of the argument, bytes, "behind" or "before")``: the array nearest to an address outside of it."""
    best = None
    for k, value in enumerate(values):
        if isinstance(value, np.ndarray) and value.size:
            low, high = np.lib.array_utils.byte_bounds(value)
            distance, side = (low - at, "before") if at < low else (at - high + 1, "behind")
            if distance > 0 and (best is None or distance < best[1]):
                best = k, distance, side
    return best


class _At:
    """Bytes at an address, for NumPy."""

    def __init__(self, address, nbytes):
        self.__array_interface__ = {"version": 3, "shape": (nbytes,), "typestr": "|u1", "data": (address, False)}


def _bytes_at(address, nbytes):
    return np.asarray(_At(address, nbytes))


def _address(array):
    return array.__array_interface__["data"][0]

