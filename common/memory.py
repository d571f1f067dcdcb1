"""The memory report: what a kernel asks of memory, line by line, counted without a GPU.

    with common.memory_report() as report:
        kernel[grid, block](…)
    print(report)                                   # a table, and the position on the roofline
    report.picture("out[i] = x[i * stride]")        # in a notebook: the lanes of a warp against their addresses

    python -m common.memory script.py arguments…    # for a whole program

It is a mode of the CPU backend: kernels run compiled, give their results, and every access is counted by the rules of
the hardware. On a GPU, NVIDIA's Nsight Compute (``ncu``) reads the counters that we predict:

==============================  =====================================================================================
here                            metric of Nsight Compute
==============================  =====================================================================================
sectors of global reads         ``l1tex__t_sectors_pipe_lsu_mem_global_op_ld.sum``
sectors of global writes        ``l1tex__t_sectors_pipe_lsu_mem_global_op_st.sum``
requests of global reads        ``l1tex__t_requests_pipe_lsu_mem_global_op_ld.sum``
wavefronts of shared memory     ``l1tex__data_pipe_lsu_wavefronts_mem_shared_op_ld.sum``, ``…_op_st.sum``
conflicts                       ``l1tex__data_bank_conflicts_pipe_lsu_mem_shared_op_ld.sum``, ``…_op_st.sum``
==============================  =====================================================================================

What is counted: a warp's 32 lanes make one *request* with one load or store. Global memory moves *sectors* of 32 bytes:
a request needs as many as its lanes touch (4 if 32 lanes read 32 neighbouring floats). Shared memory has 32 *banks*, 4
bytes wide, and gives one word of each a turn (a *wavefront*): a request whose lanes want k different words of one bank
takes k turns, a k-way bank conflict; lanes that want the same word share it. 8 bytes a lane are served by half warps,
16 bytes by quarter warps.

What is not: caches (``sectors`` is what the first cache is asked for; ``dram_bytes`` counts each sector once a launch,
what would be moved if the caches kept everything); what a compiler saves (two loads of the same element in one thread
are two requests here; a local array that lives in registers counts as memory). Each array begins at a multiple of 256
bytes, as cuda.to_device makes it; a slice of one where it begins.

Sources: CUDA C++ Best Practices Guide, "Coalesced Access to Global Memory" and "Shared Memory and Memory Banks"; Nsight
Compute, Kernel Profiling Guide, "Metrics Decoder"; Williams, Waterman and Patterson 2009, "Roofline".
"""

import argparse
import contextlib
import linecache
import os
import runpy
import sys

from . import BACKEND, BackendError

# An H100 SXM as measured for chapter 5, in benchmarks/results/h100/ch05.json: best multiply-add chain, and copy.
PEAK_FLOPS = 55.4e12  # float32 operations a second
PEAK_BYTES = 2733e9  # bytes a second to and from DRAM
WIDTH = 120


class Report:
    """What a ``with memory_report()`` has counted. Numbers grow with every launch in the block.

    peak_flops: operations a second, peak_bytes: bytes a second, of the device whose roofline is shown.
    """

    def __init__(self, session, peak_flops, peak_bytes):
        self._session, self.peak_flops, self.peak_bytes = session, peak_flops, peak_bytes

    @property
    def lines(self):
        """A list of `Line`: one for each line, array and kind of access, sorted by kernel and line."""
        order = list(self._session.kernels)
        return sorted(
            (x for x in self._session.lines.values() if x.requests),
            key=lambda x: (order.index(x.kernel), x.file, x.line, x.array, x.access),
        )

    @property
    def divergence(self):
        """A list of `Branch`: the ``if``, ``while`` and ``for`` that warps came to, and how often lanes disagreed."""
        return sorted(
            (b for b in self._session.branches.values() if b.executions), key=lambda b: (b.kernel, b.file, b.line)
        )

    @property
    def operations(self):
        """Float operations of all threads by type: {"float32": n, …, "math": calls of exp, sqrt and the like}."""
        found = {}
        for (*_, what), count in self._session.counters.items():
            if what != "barrier":
                found[what] = found.get(what, 0) + count
        return found

    launches = property(lambda self: self._session.launches, doc="Launches in the block.")
    notices = property(lambda self: self._session.notices, doc="What could not be counted exactly, a list of str.")

    @property
    def barriers(self):
        """Barriers that blocks came to: one ``syncthreads`` in a kernel of 10 blocks is 10."""
        return sum(count for (*_, what), count in self._session.counters.items() if what == "barrier")

    @property
    def flops(self):
        """Float additions, multiplications, divisions …, of all types; a fused multiply-add is two. No math calls."""
        return sum(count for what, count in self.operations.items() if what != "math")

    def _total(self, name, space="global"):
        return sum(getattr(x, name) for x in self._session.lines.values() if x.space == space)

    @property
    def bytes(self):
        """Bytes of global memory that threads ask for."""
        return self._total("bytes")

    @property
    def sectors(self):
        """Sectors of 32 bytes of global memory, moved for the warps' requests; caches may hold some of them."""
        return self._total("sectors")

    @property
    def dram_bytes(self):
        """Bytes of global memory that no cache can save: each sector read once and written once a launch."""
        return 32 * (self._session.read_sectors + self._session.written_sectors)

    @property
    def conflicts(self):
        """Turns that shared memory takes because of bank conflicts."""
        return self._total("conflicts", "shared")

    @property
    def intensity(self):
        """Float operations a byte of DRAM traffic (`dram_bytes`): at best, with caches that keep everything."""
        return self.flops / self.dram_bytes if self.dram_bytes else 0.0

    @property
    def uncached_intensity(self):
        """Float operations a byte if every sector of every request came from DRAM: the other end."""
        return self.flops / (32 * self.sectors) if self.sectors else 0.0

    def roofline(self, intensity=None):
        """Operations a second that the device can reach at an intensity (by default the report's own)."""
        return min(self.peak_flops, self.peak_bytes * (self.intensity if intensity is None else intensity))

    # -- as text
    def __str__(self):
        parts = [text for kernel in self._session.kernels for text in self._kernel(kernel)]
        parts += self._totals()
        parts += [f"note: {notice}" for notice in self.notices]
        return "\n".join(part[: WIDTH - 1] + "…" if len(part) > WIDTH else part for part in parts)

    def _repr_pretty_(self, printer, cycle):
        printer.text(str(self))

    def _kernel(self, kernel):
        launches, grid, block = self._session.kernels[kernel]
        yield f"{kernel}: {_count(launches, 'launch')}{' (the last one' if launches > 1 else ', '}" + (
            f"{': ' if launches > 1 else ''}grid {_dims(grid)}, block {_dims(block)}{')' if launches > 1 else ''}"
        )
        yield (
            f"  {'array':<14} {'memory':<7}{'access':<8}{'requests':>11} {'sectors':>11} {'a request':>10}"
            f" {'at best':>8} {'used':>6} {'turns':>11} {'bank ways':>10}"
        )
        rows = {}
        for x in self.lines:
            if x.kernel == kernel:
                rows.setdefault((x.file, x.line), []).append(self._row(x))
        for b in self.divergence:
            if b.kernel == kernel and b.diverged:
                rows.setdefault((b.file, b.line), []).append(
                    f"  {'branch:':<14} {_number(b.executions)} executions by warps, lanes disagree in "
                    f"{_number(b.diverged)} ({_percent(b.diverged / b.executions)})"
                )
        for (name, file, line, what), count in self._session.counters.items():
            if name == kernel and what == "barrier" and count:
                rows.setdefault((file, line), []).append(f"  {'barrier:':<14} {_number(count)} times by a block")
        for file, line in sorted(rows):
            yield f"{os.path.basename(file)}:{line} | {linecache.getline(file, line).strip()}"
            yield from rows[file, line]
        yield ""

    @staticmethod
    def _row(x):
        text = f"  {x.array:<14} {x.space:<7}{x.access:<8}{_number(x.requests):>11} "
        if x.space == "shared":
            return text + f"{'':>11} {'':>10} {'':>8} {'':>6} {_number(x.wavefronts):>11} {x.ways:>10.1f}"
        return text + (
            f"{_number(x.sectors):>11} {x.sectors_per_request:>10.1f} {x.ideal_sectors / x.requests:>8.1f}"
            f" {_percent(x.efficiency):>6}"
        )

    def _totals(self):
        moved, used = 32 * self.sectors, self._total("used")
        yield f"in all ({_count(self.launches, 'launch')}):"
        yield (
            f"  global memory   {_size(self.bytes)} asked for, {_size(moved)} in sectors"
            + (f" ({_percent(used / moved)} used)" if moved else "")
            + f", {_size(self.dram_bytes)} if each sector moves once"
        )
        requests = self._total("requests", "shared")
        if requests:
            turns = self._total("wavefronts", "shared")
            yield (
                f"  shared memory   {_number(requests)} requests, {_number(turns)} turns, "
                f"{_number(self.conflicts)} of them for bank conflicts"
            )
        if self._total("requests", "local"):
            yield (
                f"  local memory    threads ask for {_size(self._total('bytes', 'local'))}, "
                f"{_size(32 * self._total('sectors', 'local'))} in sectors, unless the compiler keeps it in registers"
            )
        diverged, executions = (sum(getattr(b, k) for b in self.divergence) for k in ("diverged", "executions"))
        yield f"  control flow    {_count(self.barriers, 'barrier')}; lanes disagree in {_number(diverged)} of " + (
            f"{_number(executions)} branches"
        )
        operations = sorted(self.operations.items())
        kinds = ", ".join(f"{_number(n)} {'math calls' if what == 'math' else what}" for what, n in operations if n)
        yield f"  arithmetic      {_number(self.flops)} float operations" + (f" ({kinds})" if kinds else "")
        if self.flops and self.dram_bytes:
            yield (
                f"  intensity       {self.intensity:.3g} operations a byte if each sector moves once, "
                f"{self.uncached_intensity:.3g} without caches"
            )
            reach, ridge = self.roofline(), self.peak_flops / self.peak_bytes
            bound = f"memory-bound below {ridge:.3g}" if self.intensity < ridge else f"compute-bound above {ridge:.3g}"
            yield (
                f"  roofline        at most {_number(round(reach / 1e9))} GFLOP/s "
                f"({_percent(reach / self.peak_flops)} of {self.peak_flops / 1e12:.3g} TFLOP/s), "
                f"at {_number(round(self.peak_bytes / 1e9))} GB/s: {bound}"
            )

    # -- as a picture
    def picture(self, line, warp=0, request=0, array=None, access=None, axes=None):
        """A matplotlib figure of one request: the lanes of a warp against the addresses that they touch.

        line: the number of a line, or a part of its text. warp: of the first 8 of the launch, counted over blocks.
        request: which of the warp's first requests of that line, from 0 on. array, access ("read", "write", "atomic"):
        if the line has several. axes: draw into these, instead of a new figure.

        Each dot is a lane. Global memory: one colour a sector of 32 bytes, and a grey band for each sector moved.
        Shared memory: one colour a bank, and for each lane the bank; equal banks with different words wait for each
        other. Raises KeyError if there is no such request, with a list of what there is.
        """
        import matplotlib.pyplot as plt

        found = [
            x
            for x in self.lines
            if (x.line == line if isinstance(line, int) else line in linecache.getline(x.file, x.line))
            and array in (None, x.array)
            and access in (None, x.access)
        ]
        if not found:
            known = "; ".join(
                f"{x.line}: {x.array} ({x.access}), {linecache.getline(x.file, x.line).strip()}" for x in self.lines
            )
            raise KeyError(f"no access to memory was counted on line {line!r}; there are: {known}")
        x = found[0]
        key = x.kernel, x.file, x.line, x.array, x.space, x.access
        by_warp = self._session.requests.get(key, {})
        kept = [r for _, r in sorted(by_warp.get(warp, {}).items())]
        if not 0 <= request < len(kept):
            have = {w: len(r) for w, r in sorted(by_warp.items())}
            raise KeyError(f"request {request} of warp {warp} was not kept; requests kept, by warp: {have}")
        asked = kept[request]
        if axes is None:
            _, axes = plt.subplots(figsize=(9, 3.4), layout="constrained")
        (_draw_banks if x.space == "shared" else _draw_sectors)(axes, asked)
        source = linecache.getline(x.file, x.line).partition("  #")[0].strip()
        axes.set_title(f"{x.array} ({x.space}, {x.access})   {source[:80]}\n{_summary(x.space, asked)}", fontsize=9)
        return axes.figure


def _words(request, size):
    """[(lane, byte address of each ``size`` bytes that it touches)]"""
    return [
        (lane, byte)
        for lane, first in zip(request.lanes, request.addresses)
        for byte in range(first // size * size, first + request.size, size)
    ]


def _draw_sectors(axes, request):
    pieces = _words(request, 32)
    sectors = sorted({byte // 32 for _, byte in pieces})
    base = sectors[0] * 32
    # distances between sectors may be large: what is not touched is left out, and shown as a gap
    place, previous, x = {}, None, 0
    for s in sectors:
        x += 0 if previous is None else 32 if s == previous + 1 else 48
        place[s], previous = x, s
        axes.axvspan(x, x + 32, color="0.93" if len(place) % 2 else "0.86", lw=0)
    colours = {s: f"C{k % 10}" for k, s in enumerate(sectors)}
    for lane, first in zip(request.lanes, request.addresses):
        for byte in range(first, first + request.size, min(4, request.size)):
            s = byte // 32
            axes.plot(place[s] + byte % 32 + min(4, request.size) / 2, lane, "s", ms=4, color=colours[s])
    step = -(-len(sectors) // 16)
    axes.set_xticks([place[s] for s in sectors[::step]], [str(s * 32 - base) for s in sectors[::step]], fontsize=7)
    axes.set_xlabel("address in bytes, from the first sector on (a band is a sector of 32 bytes)")
    _lanes(axes)


def _draw_banks(axes, request):
    import matplotlib.pyplot as plt

    colours = plt.get_cmap("hsv")
    depth = {}
    for lane, byte in _words(request, 4):
        bank, word = byte // 4 % 32, byte // 4
        depth.setdefault(bank, {}).setdefault(word, len(depth.get(bank, {})))
        axes.plot(bank, lane, "s", ms=5, color=colours(bank / 32))
    deepest = max(map(len, depth.values()))
    axes.set_xlim(-0.7, 31.7)
    axes.set_xticks(range(0, 32, 2))
    axes.set_xlabel(f"bank (the fullest one holds {deepest} different word{'s' * (deepest > 1)} of this request)")
    _lanes(axes)


def _lanes(axes):
    axes.set_ylim(32, -1)
    axes.set_yticks(range(0, 33, 8))
    axes.set_ylabel("lane")


def _summary(space, request):
    lanes = f"warp {request.warp}, {_count(len(request.lanes), 'lane')} of {request.size} bytes"
    if space == "shared":
        words = {byte // 4 for _, byte in _words(request, 4)}
        return f"{lanes}: {_count(len(words), 'different word')} in {_count(len({w % 32 for w in words}), 'bank')}"
    return f"{lanes}: {_count(len({byte for _, byte in _words(request, 32)}), 'sector')}"


def _number(n):
    return f"{n:,}".replace(",", " ")


def _count(n, what):
    return f"{_number(n)} {what}{'' if n == 1 else 'es' if what.endswith('ch') else 's'}"


def _percent(share):
    return f"{100 * share:.0f} %"


def _size(n):
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n >= size:
            return f"{n / size:.4g} {unit}"
    return f"{n} bytes"


def _dims(dims):
    last = max(k for k in range(3) if dims[k] > 1 or k == 0)
    return " x ".join(map(str, dims[: last + 1]))


@contextlib.contextmanager
def memory_report(blocks=None, peak_flops=PEAK_FLOPS, peak_bytes=PEAK_BYTES):
    """Count what the kernels launched in the ``with`` block ask of memory. Gives a `Report`.

    blocks: look at no more than so many blocks of each launch, evenly spread, and scale up (all blocks run, so results
    are complete); None looks at all. peak_flops (operations a second) and peak_bytes (bytes a second): of the device
    whose roofline is shown, by default an H100 as measured for chapter 5.

    Launches run one block after the other. Inner ``with`` blocks have reports of their own. Raises BackendError on the
    GPU backend, where it cannot work; ValueError if ``blocks`` is less than 1. A launch raises OutOfBoundsError where a
    kernel leaves an array.
    """
    if BACKEND != "cpu":
        raise BackendError(
            "memory_report is a mode of the CPU backend, and this process runs on the GPU: start it with "
            "MINI_BACKEND=cpu, or use NVIDIA's Nsight Compute (ncu)"
        )
    if blocks is not None and blocks < 1:
        raise ValueError(f"blocks = {blocks}: at least one block must be looked at")
    from .cpu import launch
    from .cpu.memory_session import Session

    session, outer = Session(blocks), launch._sanitizer
    launch._sanitizer = session
    try:
        yield Report(session, peak_flops, peak_bytes)
    finally:
        launch._sanitizer = outer


def main(argv=None):
    """``python -m common.memory script.py …``: run a program, then print the report; exit code: the program's own."""
    parser = argparse.ArgumentParser(prog="python -m common.memory", description=__doc__.split("\n")[0])
    parser.add_argument("--blocks", type=int, help="look at so many blocks of each launch, and scale up")
    parser.add_argument("script", help="a Python program")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="its arguments")
    options = parser.parse_args(argv)
    if not os.path.isfile(options.script):
        parser.error(f"there is no file {options.script}")
    sys.argv = [options.script, *options.arguments]
    sys.path.insert(0, os.path.dirname(os.path.abspath(options.script)))
    code = 0
    try:
        with memory_report(options.blocks) as report:
            try:
                runpy.run_path(options.script, run_name="__main__")
            except SystemExit as stop:
                code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except (BackendError, ValueError) as error:
        parser.error(str(error))
    print(report, file=sys.stderr)
    raise SystemExit(code)


if __name__ == "__main__":
    os.environ.setdefault("MINI_BACKEND", "cpu")
    main()
