"""See every kernel launch: what ran, in which order, with which grid and block, and how long it took.

    from common.trace import format_table, trace

    with trace() as launches:
        model.forward(tokens)
    print(format_table(launches))

Works the same on both backends. On the CPU backend ``ms`` is the wall time of the launch, compiling not counted. On a
GPU it is the time between two events around the launch; the queue is not drained in between, so a kernel that runs
longer than the launch of the next takes (some 20 µs from Python) is timed alone, while for a shorter one the
gap before it counts too. A first launch also compiles: run once before you trace.
"""

import linecache
import threading
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from . import BACKEND

ROOT = Path(__file__).resolve().parent.parent

_lock = threading.RLock()


@dataclass(eq=False)
class Launch:
    """One launch. ``kernel`` is the very object that ``@cuda.jit`` made; ``grid`` and ``block`` are 3 ints each.

    ``ms`` is the time in milliseconds; on a GPU it is None until the ``with`` block has ended. ``arguments``: what the
    kernel was called with, arrays as their shapes.
    """

    kernel: object
    grid: tuple
    block: tuple
    ms: float | None = None
    arguments: tuple = ()

    @property
    def name(self):
        """The kernel's name, such as ``"matmul_kernel"``."""
        return self.kernel.py_func.__name__

    @property
    def defined_at(self):
        """Where the kernel is defined, such as ``"chapters/ch06_shared_tile/kernels.py:42"``: see `defined_at`."""
        return defined_at(self.kernel)


@contextmanager
def trace():
    """A context manager that gives a list to which every launch within it adds a `Launch`, in order of launch.

    Traces may be nested: a launch is in the lists of all that are open. Launches of other threads count too.
    """
    launches = []
    with _lock:  # one thread at a time may open or close a trace
        stop = _trace_gpu(launches) if BACKEND == "gpu" else _trace_cpu(launches)
    try:
        yield launches
    finally:
        with _lock:
            stop()


def defined_at(kernel):
    """``"file:line"`` of a kernel's ``def``, the file relative to the repository if it lies in it."""
    code = kernel.py_func.__code__
    line = code.co_firstlineno  # of the first decorator
    for number in range(line, line + 20):
        if linecache.getline(code.co_filename, number).lstrip().startswith(f"def {code.co_name}"):
            line = number
            break
    path = Path(code.co_filename)
    if path.is_absolute() and path.resolve().is_relative_to(ROOT):
        path = path.resolve().relative_to(ROOT)
    return f"{path.as_posix()}:{line}"


def summarize(launches):
    """The launches grouped by kernel: a list of ``(Launch of the first, count, ms in all)``, most time first."""
    groups = {}
    for launch in launches:
        first, count, ms = groups.get(launch.kernel, (launch, 0, 0.0))
        groups[launch.kernel] = first, count + 1, ms + (launch.ms or 0.0)
    return sorted(groups.values(), key=lambda group: -group[2])


def format_table(launches):
    """Two tables as text: every launch in order, then the time of each kernel, largest first."""
    if not launches:
        return "no kernel was launched"
    rows = [("#", "kernel", "grid", "block", "ms", "defined at")]
    for number, one in enumerate(launches, 1):
        rows.append((number, one.name, _dims(one.grid), _dims(one.block), f"{one.ms or 0:.3f}", one.defined_at))
    groups = summarize(launches)
    total = sum(ms for _, _, ms in groups)
    sums = [("kernel", "launches", "ms", "share", "defined at")]
    for first, count, ms in groups:
        sums.append((first.name, count, f"{ms:.3f}", _percent(ms, total), first.defined_at))
    sums.append(("all", len(launches), f"{total:.3f}", _percent(total, total), ""))
    largest, _, ms = groups[0]
    verdict = f"largest: {largest.name} with {ms:.3f} of {total:.3f} ms ({_percent(ms, total)})"
    return "\n".join([*_align(rows, right={0, 4}), "", *_align(sums, right={1, 2, 3}), verdict])


def _arguments(values):
    return tuple(tuple(value.shape) if hasattr(value, "shape") and value.shape else value for value in values)


def _percent(part, whole):
    return f"{100 * part / whole:.1f} %" if whole else "-"


def _dims(dims):
    """``(24, 2, 1)`` as ``"24 x 2"``: trailing ones say nothing."""
    dims = list(dims)
    while len(dims) > 1 and dims[-1] == 1:
        dims.pop()
    return " x ".join(map(str, dims))


def _align(rows, right):
    """Lines of text with the cells of each column below each other; columns in ``right`` are right-aligned."""
    rows = [[str(cell) for cell in row] for row in rows]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        lines.append("  ".join(cells).rstrip())
    return lines


class _CpuRecorder:
    """What the CPU backend's launcher appends to: turns its tuples into `Launch` objects."""

    def __init__(self, launches, outer):
        self.launches, self.outer = launches, outer

    def append(self, item):
        kernel, grid, block, seconds, values = item
        self.launches.append(Launch(kernel, grid, block, seconds * 1e3, _arguments(values)))
        if self.outer is not None:
            self.outer.append(item)


def _trace_cpu(launches):
    """Start recording on the CPU backend; returns the function that stops it."""
    from .cpu import launch as launcher

    outer = launcher._trace
    launcher._trace = _CpuRecorder(launches, outer)

    def stop():
        launcher._trace = outer

    return stop


def _trace_gpu(launches):
    """Start recording on numba-cuda; returns the function that stops it and reads the times."""
    from numba import cuda

    from .launching import watched

    open_events = []

    def before(stream):
        start = cuda.event()
        start.record(stream)
        return start

    def after(start, kernel, grid, block, stream, args):
        end = cuda.event()
        end.record(stream)
        launches.append(Launch(kernel, grid, block, arguments=_arguments(args)))
        open_events.append((launches[-1], start, end))

    watching = watched(before, after)
    watching.__enter__()

    def stop():
        watching.__exit__(None, None, None)
        for launch, start, end in open_events:
            end.synchronize()
            launch.ms = cuda.event_elapsed_time(start, end)

    return stop
