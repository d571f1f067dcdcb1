"""Launches under a memory report: what generated code has counted, brought back to the lines of the source.

See `memlog` for what is counted, and ``common.memory`` for how it is used.
"""

import math
from dataclasses import dataclass

import numpy as np

from . import crash, fresh, memlog
from .errors import OutOfBoundsError

SPACES = ("global", "shared", "local")
ACCESS = ("read", "write", "atomic")
ALIGNMENT = 256  # bytes: where memory for an array begins on a GPU


@dataclass
class Line:
    """What one line does to one array in one way, in all launches of a kernel.

    kernel, file, line, array (its name in the source). space: "global", "shared" or "local". access: "read", "write" or
    "atomic"; ``x[i] += 1`` is a read and a write. All else are numbers of

    requests: instructions of a warp, with at least one lane that takes part;
    threads: accesses of single threads; bytes: what they ask for; used: the same, an address that several lanes of a
    request share counted once;
    sectors: of 32 bytes, moved for these requests (global and local memory); ideal_sectors: as few as would hold
    ``used``; lines: of 128 bytes;
    wavefronts: turns that shared memory takes; ideal_wavefronts: turns without bank conflicts.
    """

    kernel: str
    file: str
    line: int
    array: str
    space: str
    access: str
    requests: int = 0
    threads: int = 0
    bytes: int = 0
    used: int = 0
    sectors: int = 0
    ideal_sectors: int = 0
    lines: int = 0
    wavefronts: int = 0
    ideal_wavefronts: int = 0

    @property
    def conflicts(self):
        """Turns that shared memory takes more than without bank conflicts."""
        return self.wavefronts - self.ideal_wavefronts

    @property
    def ways(self):
        """Mean turns for what could be done in one: 1.0 without bank conflicts, 32.0 at worst; None if not shared."""
        return self.wavefronts / self.ideal_wavefronts if self.ideal_wavefronts else None

    @property
    def sectors_per_request(self):
        """Mean sectors that a warp's request moves; None for shared memory."""
        return self.sectors / self.requests if self.space != "shared" and self.requests else None

    @property
    def efficiency(self):
        """Share of the bytes moved that a thread asked for, from 0 to 1 (coalescing); None for shared memory."""
        return self.used / (32 * self.sectors) if self.sectors else None


@dataclass
class Branch:
    """An ``if`` or a loop whose condition may differ between lanes.

    executions: how often a warp came to the condition. diverged: how often its lanes disagreed.
    """

    kernel: str
    file: str
    line: int
    executions: int = 0
    diverged: int = 0


@dataclass
class Request:
    """The addresses of one request, kept for a picture: ``lanes`` that take part, their ``addresses`` in bytes."""

    warp: int
    number: int
    lanes: list
    addresses: list
    size: int  # bytes a lane


class Session:
    """What a ``with memory_report()`` has seen."""

    def __init__(self, blocks=None):
        self.blocks = blocks
        self.lines, self.branches = {}, {}  # key -> Line, Branch
        self.counters = {}  # (kernel, file, line, what) -> number
        self.requests = {}  # key of a line -> [Request]
        self.notices = []
        self.launches = 0
        self.read_sectors = self.written_sectors = 0  # different ones, a launch
        self.kernels = {}  # name -> [launches, grid, block of the latest]

    def note(self, text):
        if text not in self.notices:
            self.notices.append(text)

    def launch(self, kernel, grid, block, shared_bytes, values):
        """Run a launch with every access logged."""
        fresh.unwatched_launch()
        _, compiled, values = kernel._prepare(block, values, "memory")
        run = _Run(self, kernel, compiled, grid, block, shared_bytes, values)
        run.go()
        self.launches += 1
        known = self.kernels.setdefault(kernel.__name__, [0, grid, block])
        known[:] = known[0] + 1, grid, block
        for file, line, what in compiled.notices:
            self.note(f"{file}:{line}: not looked at: {what}")


class _Run:
    def __init__(self, session, kernel, compiled, grid, block, shared_bytes, values):
        self.session, self.kernel, self.compiled = session, kernel, compiled
        self.grid, self.block, self.shared_bytes, self.values = grid, block, shared_bytes, values
        self.arrays = [v for v in values if isinstance(v, np.ndarray)]

    def go(self):
        self.first, sectors = self.addresses()
        w, self.parts = memlog.lay_out(self.info())
        self.head, self.touched = self.parts["head"], np.zeros(sectors, np.uint8)
        self.ops = np.zeros(max(1, len(self.compiled.counters)), np.int64)
        self.run_blocks([w, self.touched, np.array(self.first or [0], np.int64).reshape(-1, 1), self.ops])
        self.collect()

    def run_blocks(self, given):
        """All blocks, or some of them, evenly spread, with the others run as always."""
        blocks = math.prod(self.grid)
        wanted = blocks if self.session.blocks is None else min(blocks, self.session.blocks)
        chosen = [k * blocks // wanted for k in range(wanted)]
        self.factor = blocks / wanted
        err = np.zeros(crash.ERR_WORDS, np.int64)
        dynamic = np.empty(self.shared_bytes, np.uint8)
        plain = self.kernel._prepare(self.block, self.values)[1] if wanted < blocks else self.compiled

        def run(compiled, first, last, *more):
            if first < last and not err[0]:
                compiled.run(first, last, *self.grid, dynamic, err, *self.values, *more)
                if err[0]:
                    self.kernel._raise(compiled.sites[err[1]], err, self.block)

        try:
            if wanted == blocks:
                run(self.compiled, 0, blocks, *given)
            else:
                for block, following in zip(chosen, [*chosen[1:], blocks]):
                    run(self.compiled, block, block + 1, *given)
                    run(plain, block + 1, following)
                self.session.note(f"{self.kernel.__name__}: {wanted} of {blocks} blocks were looked at, and scaled up")
        except IndexError:
            if not self.head[memlog.OUTSIDE]:
                raise
            self.outside()

    def outside(self):
        file, line, array, *_ = self.compiled.points[self.head[memlog.OUTSIDE] - 1]
        index, extent = self.head[memlog.WHERE], self.head[memlog.EXTENT]
        raise OutOfBoundsError(
            f"{array[0]}: index {index} is outside 0 … {extent - 1}",
            file,
            line,
            "run it under common.sanitize(), which tells block and thread; a memory report wants a correct kernel",
        ) from None

    def addresses(self):
        """``(address of each array's first element, sectors in all)`` if each allocation began at multiples of 256."""
        owners = []
        for v in self.arrays:
            owner = v
            while isinstance(owner.base, np.ndarray):
                owner = owner.base
            low, high = np.lib.array_utils.byte_bounds(owner) if owner.size else (0, 0)
            start = v.__array_interface__["data"][0]
            if owner is not v and owner.dtype == np.uint8:  # raw memory of a device array: see arrays.allocate
                low = min(low + -low % 64, start)
            owners.append((low, max(high, low)))
        places, total = {}, 0
        end = base = 0
        for low, high in sorted(set(owners)):  # those that share memory share addresses
            if low >= end or not places:
                base = total - low
                end = high
            end = max(end, high)
            places[low, high] = base
            total = max(total, -(-(base + end) // ALIGNMENT) * ALIGNMENT)
        first = [v.__array_interface__["data"][0] + places[o] if v.size else 0 for v, o in zip(self.arrays, owners)]
        return first, total // 32 + 1

    def item_size(self, array):
        return array[3] or self.arrays[array[2]].itemsize

    def info(self):
        rows = [
            (kind, self.item_size(array) * elements if array else 0, access)
            for _, _, array, kind, access, elements in self.compiled.points
        ]
        return np.array(rows, np.int64).reshape(-1, 3)

    def collect(self):
        """Add what was counted to the session's."""
        session, kernel = self.session, self.kernel.__name__
        scaled = lambda value: int(round(int(value) * self.factor))
        for number, (point, c) in enumerate(zip(self.compiled.points, self.parts["counts"])):
            file, line, array, kind, access, elements = point
            if kind in (memlog.BRANCH, memlog.LOOP):
                self.branch(file, line, scaled(c[memlog.REQUESTS]), scaled(c[memlog.DIVERGED]))
                continue
            key = kernel, file, line, array[0], SPACES[kind], ACCESS[access]
            made = session.lines.setdefault(key, Line(*key))
            for name, column in COLUMNS.items():
                setattr(made, name, getattr(made, name) + scaled(c[column]))
            self.keep(key, number, array, kind, elements)
        for (file, line, what), count in zip(self.compiled.counters, self.ops):
            if what == "branch":
                self.branch(file, line, scaled(count), 0)
            else:
                key = kernel, file, line, what
                session.counters[key] = session.counters.get(key, 0) + scaled(count)
        session.read_sectors += scaled(np.count_nonzero(self.touched & 1))
        session.written_sectors += scaled(np.count_nonzero(self.touched & 2))
        if self.head[memlog.SAMPLED]:
            session.note(f"{kernel}: loops were too long to keep all of their rounds; some of them stand for all")

    def branch(self, file, line, executions, diverged):
        key = self.kernel.__name__, file, line
        made = self.session.branches.setdefault(key, Branch(*key))
        made.executions += executions
        made.diverged += diverged

    def keep(self, key, number, array, kind, elements):
        kept = self.session.requests.setdefault(key, {})
        origin = self.first[array[2]] & -ALIGNMENT if kind == memlog.GLOBAL else 0
        for warp in range(memlog.KEPT_WARPS):
            for request in range(min(memlog.KEPT_REQUESTS, self.parts["numbers"][number, warp])):
                lanes, *addresses = self.parts["samples"][number, warp, request]
                lanes = [lane for lane in range(32) if lanes >> lane & 1]
                order = self.session.launches, request, number
                kept.setdefault(warp, {})[order] = Request(
                    warp, request, lanes, [int(addresses[lane] - origin) for lane in lanes],
                    self.item_size(array) * elements,
                )  # fmt: skip


COLUMNS = {
    "requests": memlog.REQUESTS, "threads": memlog.THREADS, "bytes": memlog.BYTES, "used": memlog.USED,
    "sectors": memlog.SECTORS, "ideal_sectors": memlog.IDEAL, "lines": memlog.LINES, "wavefronts": memlog.WAVES,
    "ideal_wavefronts": memlog.IDEAL_WAVES,
}  # fmt: skip
