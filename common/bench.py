"""Measure the versions of an op beside the library's, in one run: what ``make bench CH=04`` does.

A chapter's ``bench.py`` holds ``LADDERS``, a list of `Ladder`; `measure` runs them and gives plain dicts for JSON,
`format_table` makes the table that the command prints and `make plots` writes into the lesson.

How a time is taken:

- every version of a ladder and the library get the same inputs, and each result is checked against the reference
  *after* it was timed, so that a kernel which does half of the work is not a fast one;
- on a GPU a batch of launches is captured into a CUDA graph and replayed between two events: what Python needs to
  launch a kernel (some 20 µs, more than many kernels run) is not counted. Each launch of the batch takes another copy
  of the arrays, together larger than the cache, so that memory is measured and not the cache;
- on a CPU a batch is timed with ``perf_counter``, versions in turn, so that a slow moment of the machine meets all;
- the figure is the median of several batches; the fastest and the slowest are kept beside it.
"""

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace

from . import BACKEND, choice  # before numba.cuda

# isort: split
import numpy as np
from numba import cuda

from .graph import Graph

SECONDS = {"cpu": 0.15, "gpu": 0.02}  # how long one version is timed for at one size, about
ROUNDS = 7
COLD_BYTES = 256 << 20  # GPU: copies of the arrays take at least this much, several times an H100's 50 MB of L2
MAX_COPIES = 64
UNITS = {"GB/s": 1e9, "GFLOP/s": 1e9, "TFLOP/s": 1e12, "M/s": 1e6}


@dataclass(frozen=True)
class Ladder:
    """The versions of one op, what to run them on and what they must give.

    name: a word, such as "transpose"; title: the heading of its table. unit: "GB/s", "GFLOP/s", "TFLOP/s" or "M/s".
    sizes: {"cpu": [...], "gpu": [...]}, each size anything that the functions below take (an int, a tuple).
    make(rng, size) -> dict of name -> NumPy array or number: the arguments, made once a size; "out" is the result, and
    what it holds at first is put back before the launch that is checked (0 where atomics add up).
    work(size) -> float: bytes an ideal kernel moves, or operations.
    versions: name -> function(a) that launches, where ``a`` has the arguments as attributes (arrays on the device).
    expected(a) -> the array that ``a.out`` must be close to; ``a`` has NumPy arrays.
    library: backend -> (its name, function(a)), with NumPy arrays on the CPU and torch tensors on the GPU; optional. It
    fills ``a.out``, or puts a new tensor there where the library has no other way.
    fits(name, size) -> bool: False leaves a version out at a size; optional.
    tolerance: largest difference to the reference, relative to its largest value.
    share: what a figure is compared with in the table: "copy" (the device's copy bandwidth) or "library".
    """

    name: str
    title: str
    unit: str
    sizes: dict
    make: Callable
    work: Callable
    versions: dict
    expected: Callable
    library: dict = field(default_factory=dict)
    fits: Callable = lambda name, size: True
    tolerance: float = 1e-5
    share: str = "copy"
    label: Callable = lambda size: " × ".join(f"{n:,}".replace(",", " ") for n in np.atleast_1d(size))

    def __post_init__(self):
        if self.unit not in UNITS:
            raise ValueError(f"unit {self.unit!r} of ladder {self.name}: it must be one of {', '.join(UNITS)}")
        if self.share not in ("copy", "library"):
            raise ValueError(f"share {self.share!r} of ladder {self.name}: it must be 'copy' or 'library'")


class WrongResult(AssertionError):
    """A version gave another result than the reference. The message names the version, the size and the difference."""


def device_name():
    """The device that is measured, as people write it, such as ``"NVIDIA H200"``; the CPU's name on the CPU backend."""
    name = cuda.get_current_device().name
    return name.decode() if isinstance(name, bytes) else name


def measure(ladders, progress=lambda text: None, sizes=None, rounds=ROUNDS):
    """Time every version and library of ``ladders`` on this machine.

    progress(text): called before each measurement. sizes: ladder name -> list of sizes, instead of the ladder's own.
    rounds: batches timed a version. Returns a dict for JSON: ``device``, ``backend``, ``packages``, ``copy_gb_s`` (the
    device's own copy of one large array, bytes read plus bytes written) and ``ladders``, a list of dicts with
    ``name``, ``title``, ``unit``, ``share``, ``sizes`` (labels) and ``rows``; a row is ``{"name",
    "library": bool, "values": [one a size or None], "ms": [[median, min, max] or None], "error": [...]}``.
    Raises `WrongResult` if a version does not give what the reference gives.
    """
    progress("device copy")
    result = {"device": device_name(), "backend": BACKEND, "packages": _packages(), "copy_gb_s": copy_bandwidth()}
    result["ladders"] = []
    for ladder in ladders:
        own = (sizes or {}).get(ladder.name, ladder.sizes.get(BACKEND, []))
        rows = {name: _row(name, False) for name in ladder.versions}
        if BACKEND in ladder.library:
            rows["library"] = _row(ladder.library[BACKEND][0], True)
        for size in own:
            progress(f"{ladder.name} {ladder.label(size)}")
            times = _measure_size(ladder, size, rounds)
            for key, row in rows.items():
                found = times.get(key)
                row["ms"].append(found and [round(1e3 * t, 6) for t in found[0]])
                row["values"].append(found and float(f"{ladder.work(size) / found[0][0] / UNITS[ladder.unit]:.4g}"))
                row["error"].append(found and float(f"{found[1]:.2g}"))
        result["ladders"].append(
            {
                "name": ladder.name,
                "title": ladder.title,
                "unit": ladder.unit,
                "share": ladder.share,
                "sizes": [ladder.label(size) for size in own],
                "rows": list(rows.values()),
            }
        )
    return result


def _row(name, library):
    return {"name": name, "library": library, "values": [], "ms": [], "error": []}


def _packages():
    """Versions of what the figures depend on."""
    import importlib.metadata as metadata

    found = {}
    for name in ("numba", "numba-cuda", "numpy", "torch"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def copy_bandwidth(n_bytes=None):
    """GB/s of the device's own copy, bytes read plus bytes written: the ceiling for kernels that move memory.

    n_bytes: size of the array copied; by default 1 GiB on a GPU and 256 MiB on a CPU (``numpy.copyto``).
    """
    n = (n_bytes or (1 << 30 if BACKEND == "gpu" else 1 << 28)) // 4
    if BACKEND == "gpu":
        source, target = (cuda.device_array(n, np.float32) for _ in range(2))
        once = lambda: target.copy_to_device(source)
    else:
        source, target = np.ones(n, np.float32), np.zeros(n, np.float32)
        once = lambda: np.copyto(target, source)
    once()
    times = []
    for _ in range(5):
        start = _clock()
        for _ in range(4):
            once()
        times.append(start() / 4)
    return float(f"{8 * n / statistics.median(times) / 1e9:.4g}")


def _clock():
    """Starts a clock; calling what it returns gives the seconds since, all work on the device done."""
    if BACKEND != "gpu":
        begun = time.perf_counter()
        return lambda: time.perf_counter() - begun
    start, end = cuda.event(), cuda.event()
    start.record()

    def stop():
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    return stop


def _measure_size(ladder, size, rounds):
    """{version or "library": ((median, min, max) seconds, largest relative error)} of one ladder at one size."""
    host = SimpleNamespace(**ladder.make(np.random.default_rng(0), size))
    expected = np.asarray(ladder.expected(host), np.float64)
    n_bytes = sum(value.nbytes for value in vars(host).values() if isinstance(value, np.ndarray))
    copies = 1 if BACKEND == "cpu" else min(max(2, math.ceil(COLD_BYTES / max(1, n_bytes))), MAX_COPIES)
    sets = [on_device(host) for _ in range(copies)]
    runs = {}
    for name, launch in ladder.versions.items():
        if ladder.fits(name, size):
            runs[name] = _batch(launch, sets)
    if BACKEND in ladder.library:
        launch = ladder.library[BACKEND][1]
        if BACKEND == "gpu":
            torch_sets = [_as_tensors(host) for _ in range(copies)]
            runs["library"] = _torch_batch(launch, torch_sets)
        else:
            torch_sets = [_copies(host)]
            runs["library"] = _batch(launch, torch_sets)
    seconds = {name: [] for name in runs}
    for _ in range(rounds):
        for name, (run, amount) in runs.items():
            seconds[name].append(run() / amount)
    found = {}
    for name, times in seconds.items():
        arrays = torch_sets[0] if name == "library" else sets[0]
        _put(arrays, host.out)  # what the timed launches left must not pass for a result
        (ladder.library[BACKEND][1] if name == "library" else ladder.versions[name])(arrays)
        error = _error(arrays.out, expected)
        if not error <= ladder.tolerance:
            allowed = f"{error:.3g} (relative), allowed {ladder.tolerance}"
            raise WrongResult(f"{name} at {ladder.label(size)}: off by {allowed}")
        found[name] = (statistics.median(times), min(times), max(times)), error
    return found


def _put(arrays, out):
    """Puts the NumPy array ``out`` into ``arrays.out``, a device array, tensor or NumPy array."""
    if hasattr(arrays.out, "copy_to_device"):
        arrays.out.copy_to_device(out)
    elif hasattr(arrays.out, "cpu"):
        import torch

        arrays.out.copy_(torch.from_numpy(out))
    else:
        arrays.out[...] = out


def _error(out, expected):
    """Largest difference between a device array, tensor or NumPy array and the reference, relative to its largest."""
    if hasattr(out, "copy_to_host"):
        out = out.copy_to_host()
    elif hasattr(out, "cpu"):
        out = out.cpu().numpy()
    out = np.asarray(out, np.float64).reshape(expected.shape)
    return float(np.abs(out - expected).max() / max(np.abs(expected).max(), 1e-30))


def _copies(host):
    return SimpleNamespace(**{k: v.copy() if isinstance(v, np.ndarray) else v for k, v in vars(host).items()})


def on_device(host):
    """The arguments of a ladder (a namespace, see `Ladder`) with its NumPy arrays copied to the device."""
    return SimpleNamespace(**{k: cuda.to_device(v) if isinstance(v, np.ndarray) else v for k, v in vars(host).items()})


def _as_tensors(host):
    import torch

    return SimpleNamespace(
        **{k: torch.from_numpy(v).cuda() if isinstance(v, np.ndarray) else v for k, v in vars(host).items()}
    )


def _batch(launch, sets):
    """(function that runs a batch and returns its seconds, launches in it), compiled and warmed up."""
    for arrays in sets:
        launch(arrays)
    start = _clock()
    launch(sets[0])
    once = max(start(), 1e-6)
    amount = min(max(1, round(SECONDS[BACKEND] / ROUNDS / once)), 1000)
    if BACKEND == "gpu":
        amount = len(sets) * max(1, round(amount / len(sets)))
        # Not as dependents: the next launch is to begin when this one has ended, and not before.
        graph = Graph(lambda: [launch(sets[i % len(sets)]) for i in range(amount)], warm=True, dependent=False)
        graph.seconds()
        return graph.seconds, amount

    def run():
        clock = _clock()
        for i in range(amount):
            launch(sets[i % len(sets)])
        return clock()

    return run, amount


def _torch_batch(launch, sets):
    """Like `_batch`, for torch: its kernels are captured and replayed by torch's own graph."""
    import torch

    torch.backends.cuda.matmul.allow_tf32 = False  # full float32, as our kernels compute
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for arrays in sets:
            launch(arrays)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        launch(sets[0])
        end.record()
        end.synchronize()
    once = max(start.elapsed_time(end) / 1e3, 1e-6)
    amount = min(max(1, round(SECONDS["gpu"] / ROUNDS / once)), 1000)
    amount = len(sets) * max(1, round(amount / len(sets)))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(amount):
            launch(sets[i % len(sets)])
    graph.replay()
    torch.cuda.synchronize()

    def run():
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    return run, amount


# --- tables ----------------------------------------------------------------------------------------------------------


def table_rows(result, ladder):
    """The table of one measured ladder as lists of text: a header, then a row for each version and the library.

    result: what `measure` returned. ladder: one of its ``ladders``. A figure is followed by its share of the device's
    copy bandwidth or of the library, in percent.
    """
    rows = [["kernel", *(f"{size}" for size in ladder["sizes"])]]
    library = next((row for row in ladder["rows"] if row["library"]), None)
    for row in ladder["rows"]:
        cells = []
        for i, value in enumerate(row["values"]):
            whole = result["copy_gb_s"] if ladder["share"] == "copy" else library and library["values"][i]
            if value is None:
                cells.append("–")
            elif not whole:
                cells.append(f"{short(value)}")
            else:
                cells.append(f"{short(value)} ({100 * value / whole:.0f} %)")
        rows.append([row["name"], *cells])
    return rows


def caption(result, ladder):
    """One line that says what the figures of a ladder's table are."""
    if ladder["share"] == "copy":
        whole = f"the device's own copy ({short(result['copy_gb_s'])} GB/s)"
    else:
        whole = "the library" if any(row["library"] for row in ladder["rows"]) else None
    return f"{result['device']}, {ladder['unit']}" + (f", in brackets the share of {whole}" if whole else "")


def format_table(result, ladder):
    """The table of one measured ladder for a terminal, with a caption."""
    rows = table_rows(result, ladder)
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [ladder["title"], caption(result, ladder)]
    for row in rows:
        lines.append("  " + row[0].ljust(widths[0]) + "".join(f"  {c.rjust(w)}" for c, w in zip(row[1:], widths[1:])))
    return "\n".join(lines)


def markdown_table(result, ladder):
    """The table of one measured ladder in Markdown, with its caption below."""
    rows = [[f"`{row[0]}`" if i and not ladder["rows"][i - 1]["library"] else row[0], *row[1:]]
            for i, row in enumerate(table_rows(result, ladder))]  # fmt: skip
    lines = ["| " + " | ".join(rows[0]) + " |", "|---|" + "---:|" * (len(rows[0]) - 1)]
    lines += ["| " + " | ".join(row) + " |" for row in rows[1:]]
    return "\n".join([*lines, "", f"*{caption(result, ladder)}.*"])


def short(value):
    """A figure in three digits, or all before the point."""
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def show(ladders, sizes=None, rounds=3):
    """Measure ``ladders`` quickly and print their tables: the end of a chapter's demo (``make ch04``)."""
    result = measure(ladders, sizes=sizes, rounds=rounds)
    if choice.device:
        print(f"measured now on {result['device']}; `make bench` measures with more care")
    for ladder in result["ladders"]:
        print()
        print(format_table(result, ladder))
