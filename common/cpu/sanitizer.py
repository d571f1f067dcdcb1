"""Sanitized launches: shadows laid out for the arrays of a launch, and what was found turned into `Finding`s.

A launch of some size runs on all cores first, each with shadows of its own. If no core has anything to report, and no
element was written by one and touched by another, all is well. Otherwise the arrays get back what they held, and the
launch runs on one core, block after block: so what is reported does not depend on how many cores there are.

See `shadow` for what is recorded at each access, and ``common.sanitize`` for how it is used.
"""

import linecache
import math
import queue
import time
from dataclasses import dataclass, field

import numba
import numpy as np

from . import fresh, launch, shadow
from .errors import DivergenceError, HangError

FIX = {
    "out-of-bounds": "guard the access (if i < n: …), or make the array larger",
    "negative-index": "guard the access (if i > 0: …): a negative index counts from the end, also on a GPU",
    "global-race": "let each thread have elements of its own, use cuda.atomic, or end the kernel and launch another "
    "between the two: a barrier orders the threads of one block only",
    "uninitialized-shared": "write it first, and let all threads wait: shared memory holds anything at the start",
    "uninitialized-local": "fill the array before it is read: it holds anything at the start",
    "uninitialized-global": "fill it before the launch, as with cuda.to_device(np.zeros(…)): cuda.device_array "
    "holds anything at the start",
    "exited-barrier": "do not return before a barrier: put the work under if i < n: … and let all threads come to it",
    "int-overflow": "do not cast, or cast to int64: Numba's index arithmetic is 64 bits wide",
}
SMALL, SPARSE = 4096, 256  # fewer threads, or more elements a thread, are not worth a second core
MOST_CELLS = 1 << 26  # of all cores together: more memory (2.5 GiB) is not spent on speed
ACCESS = ("read", "write", "atomic", "update", "atomic")
DONE = {"read": "read", "write": "written", "atomic": "changed by an atomic", "update": "updated"}


@dataclass
class Finding:
    """One mistake, wherever it was met: ``count`` times, and here is the first.

    kind: a key of `FIX`, or "shared-race", "divergent-barrier", "shuffle-mask" or "hang". file, line, array, index,
    access, block, thread: the access (or barrier) at which it was seen; index is a tuple of ints, block and thread are
    (x, y, z).
    other_…: the earlier access it collides with, None where there is none. message: all of it, to read.
    """

    kind: str
    kernel: str
    file: str
    line: int
    array: str | None = None
    index: tuple | None = None
    access: str | None = None
    block: tuple | None = None
    thread: tuple | None = None
    other_file: str | None = None
    other_line: int | None = None
    other_access: str | None = None
    other_block: tuple | None = None
    other_thread: tuple | None = None
    count: int = 1
    what: str = ""
    fix: str = ""

    @property
    def key(self):
        """What two findings have in common if they are the same mistake."""
        places = sorted([(self.file, self.line, self.access), (self.other_file or "", self.other_line or 0,
                                                               self.other_access or "")])  # fmt: skip
        return self.kind, self.kernel, self.array, *places

    @property
    def message(self):
        times = f"; {self.count} times" if self.count > 1 else ""
        lines = [f"{self.kind} in {self.kernel}: {self.what}{times}"]
        for file, line in dict.fromkeys([(self.file, self.line), (self.other_file, self.other_line)]):
            if file:
                lines.append(f"    {file}:{line} | {linecache.getline(file, line).strip()}")
        return "\n".join([*lines, f"  To fix it: {self.fix}"])


@dataclass
class Session:
    """What one ``with sanitize()`` has seen: findings (first met first), notices, and how much was looked at."""

    findings: list = field(default_factory=list)
    notices: list = field(default_factory=list)
    launches: int = 0
    accesses: int = 0
    lost: int = 0  # findings that were too many to keep
    epoch: int = 0  # where the epochs of the next launch go on
    memory: list = field(default_factory=list, repr=False)

    def add(self, finding):
        for known in self.findings:
            if known.key == finding.key:
                known.count += finding.count
                return
        self.findings.append(finding)

    def cells(self, count, cores):
        """Cells for each core, (at least count, 5) int64: those of the launch before, if they are enough."""
        if self.epoch > shadow.EPOCH_MAX // 2:
            self.memory, self.epoch = [], 0
        self.memory += [np.zeros((0, shadow.CELL // 8), np.int64)] * (cores - len(self.memory))
        for core in range(cores):
            if len(self.memory[core]) < count:
                self.memory[core] = np.zeros((count, shadow.CELL // 8), np.int64)
        return self.memory[:cores]

    def note(self, text):
        if text not in self.notices:
            self.notices.append(text)

    def launch(self, kernel, grid, block, shared_bytes, values):
        """Run a launch with every access looked at."""
        _, compiled, values = kernel._prepare(block, values, "accesses")
        run = _Run(self, kernel, compiled, grid, block, shared_bytes, values)
        start = time.perf_counter()
        try:
            run.go()
        except BaseException:  # such as Ctrl-C: the next launch must not meet what this one has left
            self.memory = []
            for array in run.arrays:
                fresh.written(array)  # some of it
            raise
        self.launches += 1
        if launch._trace is not None:
            launch._trace.append((kernel, grid, block, time.perf_counter() - start, values))
        for file, line, what in compiled.notices:
            self.note(f"{file}:{line}: not looked at: {what}")
        if compiled.fences:
            self.note(f"{kernel.__name__}: races between blocks are not looked for, since it uses cuda.threadfence()")


def address(array):
    return array.__array_interface__["data"][0]


# --- one launch ------------------------------------------------------------------------------------------------------


class _Look:
    """All that one core needs to run blocks of a launch and look at their accesses; ``cells`` are its shadows."""

    def __init__(self, run, regions, cells):
        compiled, self.cells, self.launched = run.compiled, cells, run
        self.floor = run.session.epoch + 1 << shadow.EPOCH
        for _, granule, first, size, written in regions:
            if written is not None:
                cells[first : first + size, 0] = written[::granule][:size]
        static, smallest = compiled.shared_cells
        shared = static + (run.shared_bytes // smallest if smallest else 0)
        self.shared, self.stamps = np.zeros((shared, shadow.CELL // 8), np.int64), np.zeros(compiled.stamps, np.int64)
        self.state = np.zeros(64, np.int64)  # more than it needs: two cores must not write to one cache line
        self.found = np.zeros((shadow.ROWS, shadow.COLUMNS), np.int64)
        self.queue = np.zeros((shadow.QUEUE_ROWS, shadow.QUEUE_COLUMNS), np.int64)
        self.clocks, self.known = np.zeros(compiled.lanes, np.int64), np.full((compiled.lanes, 32), -1, np.int64)
        self.starts, self.err = np.zeros(math.prod(run.grid), np.int64), np.zeros(9, np.int64)
        self.state[shadow.NOW], self.state[shadow.FLOOR] = run.session.epoch, self.floor
        self.state[shadow.FENCES], self.state[shadow.LANES] = compiled.fences, compiled.lanes
        for slot, array in ((shadow.TABLE, self.found), (shadow.QUEUE, self.queue), (shadow.CLOCKS, self.clocks),
                            (shadow.KNOWN, self.known), (shadow.STARTS, self.starts)):  # fmt: skip
            self.state[slot] = address(array)
        self.dynamic = np.empty(run.shared_bytes, np.uint8)
        self.places = [address(array) for array in (self.state, self.cells, self.shared, self.stamps)]

    @property
    def epoch(self):
        return int(self.state[shadow.NOW])

    def has_news(self):
        """Is there anything to report?"""
        return bool(self.state[[shadow.FOUND, shadow.FULL, shadow.COARSE]].any() or self.err[0])

    def run(self, first, last):
        """Run the blocks first … last - 1."""
        run = self.launched
        run.compiled.run(first, last, *run.grid, self.dynamic, self.err, *run.values, *self.places, run.meta)


@numba.njit(nogil=True, cache=True)
def _met(cores, count, floor):
    """Is there an element that one core has written and another has touched, since ``floor``? No atomics."""
    for place in range(count):
        touched, written = 0, False
        for core in range(len(cores)):
            wrote = cores[core][place, shadow.W] >= floor
            read = cores[core][place, shadow.R] >= floor or cores[core][place, shadow.R + 1] >= floor
            written |= wrote
            touched += wrote or read
        if written and touched > 1:
            return True
    return False


class _Run:
    def __init__(self, session, kernel, compiled, grid, block, shared_bytes, values):
        self.session, self.kernel, self.compiled = session, kernel, compiled
        self.grid, self.block, self.shared_bytes, self.values = grid, block, shared_bytes, values
        self.arrays = [v for v in values if isinstance(v, np.ndarray)]

    def go(self):
        regions, self.meta, n_cells = self.lay_out()
        cores = self.cores(n_cells)
        if cores > 1 and self.all_well(regions, n_cells, cores):
            return
        look = _Look(self, regions, *self.session.cells(n_cells, 1))
        try:
            look.run(0, math.prod(self.grid))
        except IndexError:
            if not look.state[shadow.FOUND]:
                raise
        self.starts = look.starts[: np.count_nonzero(look.starts)]
        self.end([look], regions)
        for row in look.found[: look.state[shadow.FOUND]]:
            if not self.maybe_written(row):
                self.session.add(self.finding(row))
        if look.err[0]:
            self.failure(look.err)
        self.session.lost += int(look.state[shadow.LOST])
        if look.state[shadow.FULL]:
            self.session.note(f"{self.kernel.__name__}: more than {shadow.QUEUE_ROWS} elements were read between two "
                              "barriers that nothing had written; what became of the others is not known")  # fmt: skip
        if look.state[shadow.COARSE]:
            self.session.note(f"{self.kernel.__name__}: more than {shadow.CLOCK_MAX} syncwarps between two barriers")

    def cores(self, n_cells):
        """How many cores run this launch: 1 where it is small, or where one could see in which order blocks run."""
        blocks = math.prod(self.grid)
        threads = blocks * math.prod(self.block)
        if self.compiled.in_order or threads < SMALL or n_cells > SPARSE * threads:
            return 1
        return max(1, min(launch.workers(), blocks, MOST_CELLS // max(1, n_cells)))

    def all_well(self, regions, n_cells, cores):
        """Run the launch on several cores: True if there is nothing to report, else all is as it was before."""
        before = [(array, array.copy()) for array in self.arrays if array.flags.writeable]
        looks = [_Look(self, regions, cells) for cells in self.session.cells(n_cells, cores)]
        free = queue.SimpleQueue()
        for look in looks:
            free.put(look)

        def work(first, last):
            look = free.get()
            try:
                if not any(one.has_news() for one in looks):
                    look.run(first, last)
            except IndexError:
                if not look.has_news():
                    raise
            finally:
                free.put(look)

        launch._run_parallel(work, math.prod(self.grid))
        well = not any(look.has_news() for look in looks)
        if well and not _met(tuple(look.cells for look in looks), n_cells, looks[0].floor):
            self.end(looks, regions)
            return True
        for array, held in before:
            array[...] = held
        self.session.epoch = max(look.epoch for look in looks)
        return False

    def end(self, looks, regions):
        """What the session, and device memory that was new, keep of a launch."""
        self.session.epoch = max(look.epoch for look in looks)
        for look in looks:
            self.session.accesses += int(look.state[shadow.ACCESSES])
            for _, granule, first, size, written in regions:
                if written is not None:
                    changed = (look.cells[first : first + size, [shadow.W, shadow.A]] >= look.floor).any(axis=1)
                    written |= np.repeat(changed, granule)[: len(written)]
        for number, (name, space, *_) in enumerate(self.compiled.arrays):
            if space == "global" and name in self.compiled.parts_taken:  # perhaps written where nobody looked
                fresh.written(self.arrays[number])

    def lay_out(self):
        """Cells for the arrays: those that share memory share cells.

        Returns ``(regions, meta, number of cells)``; a region is (first byte, bytes a cell, first cell, cells, map of
        what was written or None), a row of meta (first cell, cells an element, shift, may it be read unwritten?).
        """
        bounds = [np.lib.array_utils.byte_bounds(v) if v.size else (0, 0) for v in self.arrays]
        starts = [address(v) for v in self.arrays]
        meta = np.zeros((max(1, len(self.arrays)), 4), np.int64)
        regions, total, open_region = [], 0, []

        def close():
            nonlocal total
            low = min(bounds[i][0] for i in open_region)
            high = max(bounds[i][1] for i in open_region)
            granule = math.gcd(*(self.arrays[i].itemsize for i in open_region), *(starts[i] - low for i in open_region))
            granule &= -granule
            entry = fresh.written_map(low, high)
            written = entry[1][low - entry[0] : high - entry[0]] if entry else None
            size = -(-(high - low) // granule)
            regions.append((low, granule, total, size, written))
            for i in open_region:
                per = self.arrays[i].itemsize // granule
                meta[i] = total + (starts[i] - low) // granule, per, granule.bit_length() - 1, written is None
            total += size

        end = -1
        for i in sorted((i for i in range(len(bounds)) if self.arrays[i].size), key=lambda i: bounds[i]):
            if open_region and bounds[i][0] >= end:
                close()
                open_region = []
            open_region.append(i)
            end = max(end, bounds[i][1])
        if open_region:
            close()
        return regions, meta, total

    # -- what was found
    def place(self, record):
        """(site, block, thread) of a record."""
        site = int(record) >> shadow.SITE & (shadow.SITE_MAX - 1)
        b = int(np.searchsorted(self.starts, int(record) >> shadow.EPOCH, "right")) - 1
        gx, gy, _ = self.grid
        return self.compiled.sites[site], (b % gx, b // gx % gy, b // (gx * gy)), self.coordinates(record)

    def coordinates(self, record):
        thread = int(record) >> 1 & 1023
        bx, by, _ = self.block
        return thread % bx, thread // bx % by, thread // (bx * by)

    def index(self, number, place):
        """Index of an element, from its position in cells (of a local array: in elements)."""
        name, space, shape, size = self.compiled.arrays[number]
        if space == "global":
            view = self.arrays[number]
            offset = int(place) << int(self.meta[number, 2])
            index = [0] * view.ndim
            for axis in sorted(range(view.ndim), key=lambda a: -abs(view.strides[a])):
                if view.strides[axis] and view.shape[axis] > 1:
                    index[axis], offset = divmod(offset, view.strides[axis])
            return tuple(index)
        return tuple(int(i) for i in np.unravel_index(int(place), shape)) if shape else (int(place),)

    def maybe_written(self, row):
        """Is it about an unwritten element of an array that was also written where it is not looked at?"""
        kind, number = int(row[0]), int(row[3])
        unwritten = kind in (shadow.UNWRITTEN, shadow.UNWRITTEN_LOCAL)
        return unwritten and self.compiled.arrays[number][0] in self.compiled.parts_taken

    def finding(self, row):
        kind, now, old, number, place, access, other, extra, count = (int(v) for v in row[:9])
        site, block, thread = self.place(now)
        file, line, _, _ = site
        made = Finding("", self.kernel.__name__, file, line, block=block, thread=thread, count=count)
        if kind == shadow.EXITED:
            made.kind, made.access = "exited-barrier", "barrier"
            made.other_thread = self.coordinates(old)
            made.what = (
                f"thread {made.other_thread} of block {block} has returned, and thread {thread} comes to a barrier"
            )
        elif kind == shadow.OVERFLOW:
            made.kind, made.access, made.array = "int-overflow", "cast", None
            made.what = f"{place} does not fit into {site[2]}; block {block}, thread {thread}"
        else:
            self.describe_access(made, kind, row)
        made.fix = made.fix or FIX[made.kind]
        return made

    def describe_access(self, made, kind, row):
        _, now, old, number, place, access, other, extra, _ = (int(v) for v in row[:9])
        name, space, shape, _ = self.compiled.arrays[number]
        made.array, made.access = name, ACCESS[access]
        who = f"thread {made.thread} of block {made.block}"
        if kind in (shadow.OUT_OF_BOUNDS, shadow.NEGATIVE):
            made.kind = "negative-index" if kind == shadow.NEGATIVE else "out-of-bounds"
            made.index = (place,)
            axis = f" on axis {old}" if old or len(shape or self.global_shape(number)) > 1 else ""
            made.what = f"{name}[{place}] is {DONE[made.access]}{axis}, but there are {extra} elements; {who}"
            if not place < 0 and place < extra:
                made.what = f"{name}: several elements from before {place}{axis} on, but there are {extra}; {who}"
            return
        made.index = self.index(number, place)
        element = f"{name}[{', '.join(map(str, made.index))}]"
        if kind in (shadow.UNWRITTEN, shadow.UNWRITTEN_LOCAL):
            made.kind = f"uninitialized-{space}"
            made.what = f"{element} is {DONE[made.access]}, and nothing has written it; {who}"
            return
        made.kind = "shared-race" if kind == shadow.SHARED_RACE else "global-race"
        barrier = "cuda.syncthreads()"
        (made.other_file, made.other_line, _, _), made.other_block, made.other_thread = self.place(old)
        made.other_access = ACCESS[other]
        if made.other_block == made.block:
            missing = "barrier"
            if self.same_warp(now, old):
                missing, barrier = "syncwarp or barrier", "cuda.syncwarp(), or cuda.syncthreads(),"
            both = f"thread {made.thread} and thread {made.other_thread}"
            where = f"{both} of block {made.block}, with no {missing} between"
            made.fix = f"put {barrier} between the two, or let each thread have elements of its own"
        else:
            where = f"{who} and thread {made.other_thread} of block {made.other_block}, which nothing orders"
        done, before = DONE[made.access], DONE[made.other_access]
        done = f"{done} by both" if done == before else f"{done} and {before} by"
        made.what = f"{element} is {done} {where}"

    def global_shape(self, number):
        return self.arrays[number].shape if number < len(self.arrays) else (0,)

    @staticmethod
    def same_warp(now, old):
        return (now >> 1 & 1023) >> 5 == (old >> 1 & 1023) >> 5

    def failure(self, err):
        """What ends a launch on the CPU backend anyway becomes a finding."""
        try:
            self.kernel._raise(self.compiled.sites[err[1]], err, self.block)
        except (DivergenceError, HangError) as error:
            kind = "divergent-barrier"
            if isinstance(error, HangError):
                kind = "hang"
            elif "mask of cuda." in error.what or "must take part" in error.what:
                kind = "shuffle-mask"
            thread = int(err[5])
            self.session.add(
                Finding(
                    kind, self.kernel.__name__, error.filename, error.lineno, access="barrier",
                    block=tuple(int(v) for v in err[2:5]),
                    thread=self.coordinates(thread << 1) if thread >= 0 else None,
                    what=error.what, fix=error.fix or "",
                )  # fmt: skip
            )
