"""The measuring behind `profile.py`: one forward pass timed by our own trace, or by NVIDIA's tools."""

from __future__ import annotations

import csv
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

from ch14_mini_llm.files import write_text
from ch14_mini_llm.timeline import Slice, as_slice

PROGRAM = Path(__file__).resolve().with_name("profile.py")  # which a tool starts again
PASSES = 3  # of our own trace: other programs disturb, and rarely at the same launch
TOOLS = ("nsys", "ncu")
NANOSECONDS = {"ns": 1, "nsecond": 1, "us": 1e3, "usecond": 1e3, "ms": 1e6, "msecond": 1e6, "s": 1e9, "second": 1e9}


class ToolError(Exception):
    """A profiler that is not there, failed, or answered what we do not understand."""


def pick_tool(wish: str, backend: str) -> str:
    """The tool to measure with: "trace", "nsys" or "ncu"; raises `ToolError` for one that cannot be had."""
    if wish == "trace":
        return wish
    there = [tool for tool in TOOLS if backend == "gpu" and shutil.which(tool)]
    if wish == "auto":
        return there[0] if there else "trace"
    if backend != "gpu":
        raise ToolError(f"{wish} sees what runs on a GPU, and the backend is {backend}; use --with=trace")
    if wish not in there:
        raise ToolError(f"{wish} is not on PATH; install NVIDIA's Nsight tools or use --with=trace")
    return wish


def measure(model, tokens: list[int]) -> list[Slice]:
    """The launches of one forward pass after a warm-up, timed by `common.trace`: the median of `PASSES` passes."""
    from chapters.ch05_measuring.kernels import busy_kernel
    from chapters.ch05_measuring.timing import hold
    from common.trace import trace

    hold(1)  # measures itself, the first time
    for _ in range(2):  # the first compiles; the second tells how long launching takes
        start = time.perf_counter()
        model.forward(tokens)
        wall_ms = 1e3 * (time.perf_counter() - start)
    put = model.put

    def put_and_hold(tokens):
        """Copying the tokens waits for the device; what is queued behind `hold` does not."""
        n = put(tokens)
        hold(2 * wall_ms)
        return n

    passes = []
    model.put = put_and_hold
    try:
        for _ in range(PASSES):
            with trace() as launches:
                model.forward(tokens)
            passes.append([as_slice(launch) for launch in launches if launch.kernel is not busy_kernel])
    finally:
        model.put = put
    for slices in zip(*passes):
        slices[0].ms = statistics.median(one.ms for one in slices)
    return passes[0]


def write_child(model, tokens: list[int], path: str) -> None:
    """Under a tool: one forward pass between ``profile_start`` and ``profile_stop``; its launches go to `path`."""
    from numba import cuda

    from common.trace import trace

    model.forward(tokens)
    cuda.synchronize()
    cuda.profile_start()
    with trace() as launches:
        model.forward(tokens)
    cuda.synchronize()
    cuda.profile_stop()
    write_text(path, json.dumps([asdict(as_slice(launch)) for launch in launches]), "--child")


def measure_with(tool: str, weights: Path, tokens: list[int]) -> list[Slice]:
    """The launches of one forward pass with the times that nsys or ncu measured; raises `ToolError`."""
    with tempfile.TemporaryDirectory() as folder:
        own, report = Path(folder, "launches.json"), Path(folder, "report")
        program = [
            sys.executable, str(PROGRAM), f"--weights={Path(weights).resolve()}",
            f"--tokens={','.join(map(str, tokens))}", f"--child={own}",
        ]  # fmt: skip
        if tool == "nsys":
            call(tool, "profile", "--trace=cuda", "--sample=none", "--cpuctxsw=none", "--capture-range=cudaProfilerApi",
                 "--capture-range-end=stop", "--force-overwrite=true", f"--output={report}", *program)  # fmt: skip
            text = call(tool, "stats", "--report=cuda_gpu_trace", "--format=csv", "--output=-", f"{report}.nsys-rep")
            measured = read(read_nsys, text, tool)
        else:
            call(tool, "--csv", "--profile-from-start=off", "--metrics=gpu__time_duration.sum", f"--log-file={report}",
                 *program)  # fmt: skip
            text = report.read_text(encoding="utf-8", errors="replace") if report.exists() else ""
            measured = read(read_ncu, text, tool)
        if not own.exists():
            raise ToolError(f"{tool} ran, but the program under it wrote no launches")
        slices = [Slice(**one) for one in json.loads(own.read_text(encoding="utf-8"))]
    names = [name for name, _ in measured]
    if len(slices) != len(names) or not all(one.name in name for one, name in zip(slices, names)):
        raise ToolError(f"{tool} saw {len(names)} kernels where {len(slices)} were launched, or in another order")
    for one, (_, ms) in zip(slices, measured):
        one.ms = ms
    return slices


def call(*command: str) -> str:
    """Run a command; its standard output. Raises `ToolError` with its last words if it fails."""
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if done.returncode:
        words = (done.stderr.strip() or done.stdout.strip() or "it said nothing").splitlines()
        told = next((line for line in words if "ERR_" in line or "rror" in line), words[-1])
        raise ToolError(f"{' '.join(command[:2])} ended with code {done.returncode}: {told.strip()}")
    return done.stdout


def read(reader, text: str, tool: str) -> list[tuple[str, float]]:
    """What `reader` finds in a tool's table; raises `ToolError` where a column or a number is not as expected."""
    try:
        return reader(text)
    except (KeyError, TypeError, ValueError, csv.Error) as error:
        raise ToolError(f"{tool}'s table is not as expected ({error!r}); another version? use --with=trace") from None


def read_nsys(text: str) -> list[tuple[str, float]]:
    """(name, ms) of each kernel in the CSV of nsys's report cuda_gpu_trace, in order; copies are left out."""
    found = []
    for row in rows_of(text, "Start (ns)", "nsys"):
        if row.get("GrdX"):  # a copy has no grid
            found.append((float(row["Start (ns)"]), row["Name"], float(row["Duration (ns)"]) / 1e6))
    return [(name, ms) for _, name, ms in sorted(found)]


def read_ncu(text: str) -> list[tuple[str, float]]:
    """(name, ms) of each kernel in ncu's CSV, in order of their ids."""
    found = []
    for row in rows_of(text, '"ID"', "ncu"):
        if row.get("Metric Name") == "gpu__time_duration.sum":
            unit = NANOSECONDS.get(row["Metric Unit"])
            if unit is None:
                raise ToolError(f"ncu gave a time in {row['Metric Unit']!r}, a unit that is not known here")
            found.append((int(row["ID"]), row["Kernel Name"], float(row["Metric Value"].replace(",", "")) * unit / 1e6))
    return [(name, ms) for _, name, ms in sorted(found)]


def rows_of(text: str, header: str, tool: str) -> list[dict]:
    """The rows of a CSV table that begins with the line that starts with `header`; raises `ToolError` without one."""
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith(header)), None)
    if start is None:
        raise ToolError(f"{tool} gave no table of kernels; is profiling allowed here? --with=trace always is")
    return list(csv.DictReader(lines[start:]))
