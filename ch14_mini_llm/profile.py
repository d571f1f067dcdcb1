"""Where the time of one forward pass goes: every kernel on a timeline, and the largest of them by name.

    python ch14_mini_llm/profile.py
    python ch14_mini_llm/profile.py --length=512 --save timeline.svg
    python ch14_mini_llm/profile.py --with=nsys

The pass is run once before (that compiles the kernels), then measured:

- ``trace``: our own, `common.trace`, on any machine; the median of three passes. On a GPU the device is held until a
  pass is queued (chapter 5), so that short kernels are timed and not the gaps that Python leaves between launches;
- ``nsys``, ``ncu``: NVIDIA's Nsight Systems and Nsight Compute, where they are installed and a GPU is the backend.
  The program starts itself again under the tool and matches the tool's launches with its own, in their order;
- ``auto`` (the default): nsys, else ncu, else trace.

Exit codes: 0 done; 2 a mistake in the arguments, the environment, the weights, the backend or the tool, or an output
that cannot be written (one line says which); 130 interrupted; 141 whoever read the output has gone.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if sys.path and sys.path[0] and Path(sys.path[0]).resolve() == ROOT / "ch14_mini_llm":
    sys.path[0] = str(ROOT)  # started as a script: from the repository, and Python's own `profile` stays to be found

import argparse  # noqa: E402
import csv  # noqa: E402
import importlib.util  # noqa: E402
import json  # noqa: E402
import shutil  # noqa: E402
import statistics  # noqa: E402
import subprocess  # noqa: E402
import tempfile  # noqa: E402
import time  # noqa: E402
from dataclasses import asdict  # noqa: E402

from ch14_mini_llm.cli import Parser, integer, run_program  # noqa: E402
from ch14_mini_llm.engine.request import RequestError, check_request  # noqa: E402
from ch14_mini_llm.files import FileError, check_output, write_text  # noqa: E402
from ch14_mini_llm.model.layout import WeightsError  # noqa: E402
from ch14_mini_llm.model.weights import default_weights, load_weights  # noqa: E402
from ch14_mini_llm.run import BackendProblem, describe, pick_backend, prompt_tokens, say, shown, upload  # noqa: E402
from ch14_mini_llm.timeline import Slice, as_slice, draw, format_profile  # noqa: E402
from ch14_mini_llm.tokenizer.bpe import TokenizerError  # noqa: E402

PASSES = 3  # of our own trace: other programs disturb, and rarely at the same launch
TOOLS = ("nsys", "ncu")
PICTURES = (".svg", ".png")
NANOSECONDS = {"ns": 1, "nsecond": 1, "us": 1e3, "usecond": 1e3, "ms": 1e6, "msecond": 1e6, "s": 1e9, "second": 1e9}


class ToolError(Exception):
    """A profiler that is not there, failed, or answered what we do not understand."""


def main(argv: list[str] | None = None) -> int:
    """Run the program; returns its exit code."""
    mistakes = (WeightsError, TokenizerError, BackendProblem, ToolError, FileError)
    return run_program("profile.py", lambda: run(build_parser().parse_args(argv)), mistakes)


def build_parser() -> Parser:
    """The command line."""
    parser = Parser(
        prog="profile.py", description="Where the time of one forward pass of GPT-2 goes.", allow_abbrev=False
    )
    add = parser.add_argument
    add("--tokens", metavar="IDS", help="the prompt as token ids, such as 15496,11,612,318 (that is the default)")
    add("--prompt", metavar="TEXT", help="the prompt as text, instead of --tokens")
    add("--length", metavar="N", type=integer, help="repeat or cut the prompt to N tokens")
    add("--weights", metavar="FILE", help="a weight file (default: data/gpt2-small.bin if there, else the tiny model)")
    add("--with", dest="tool", metavar="TOOL", default="auto", help="auto (default), trace, nsys or ncu")
    add("--save", metavar="FILE", help="draw the timeline to FILE.svg or FILE.png as well (needs matplotlib)")
    add("--child", metavar="FILE", help=argparse.SUPPRESS)  # what a tool starts: the launches go to FILE as JSON
    return parser


def run(options: argparse.Namespace) -> None:
    """Measure one forward pass and show it: the program without its error handling."""
    path = check_usage(options)
    config, tensors = load_weights(path)
    tokens = prompt_tokens(options)
    if options.length is not None:
        if options.length >= config.n_ctx:  # before so many are in memory
            raise RequestError(f"--length is {options.length}; this model's context (n_ctx) leaves room for 1 to "
                               f"{config.n_ctx - 1} prompt tokens")  # fmt: skip
        tokens = (tokens * options.length)[: options.length]
    check_request(config, tokens, 1, None)
    backend, device, reason = pick_backend()
    if options.child:
        write_child(upload(config, tensors, len(tokens)), tokens, options.child)
        return
    say(f"weights: {shown(path)} ({describe(config)})")
    say(f"backend: {backend}, {device} ({reason})")
    tool = pick_tool(options.tool, backend)
    if tool != "trace":
        try:
            slices = measure_with(tool, path, tokens)
        except ToolError as error:
            if options.tool != "auto":
                raise
            say(f"{error}; taking our own event trace instead")
            tool = "trace"
    if tool == "trace":
        slices = measure(upload(config, tensors, len(tokens)), tokens)
    title = f"one forward pass of GPT-2 over {len(tokens)} token{'' if len(tokens) == 1 else 's'}"
    how = f"{device}, timed by {'our own event trace' if tool == 'trace' else tool}"
    if options.save:
        draw(slices, f"{title}\n{describe(config)}\n{how}", options.save)
        say(f"written: {options.save}")
    print(f"{title}: {shown(path)}, {how}\n")
    print(format_profile(slices))


def check_usage(options: argparse.Namespace) -> Path:
    """The path of the weights; raises `RequestError` for whatever is wrong without looking into them."""
    if options.weights == "":
        raise RequestError("--weights is empty; give the path of a weight file, or leave it out")
    if options.tool not in ("auto", "trace", *TOOLS):
        raise RequestError(f"--with={options.tool}: it is auto, trace, nsys or ncu")
    if options.length is not None and options.length < 1:
        raise RequestError(f"--length is {options.length}; give at least 1")
    weights = Path(options.weights or default_weights())
    if options.save is not None:
        picture = Path(options.save)
        if picture.suffix not in PICTURES:
            raise RequestError(f"--save={options.save}: the name must end in {' or '.join(PICTURES)}")
        check_output(options.save, "--save", [weights])
        if importlib.util.find_spec("matplotlib") is None:
            raise RequestError("--save draws with matplotlib, which is not installed: pip install matplotlib")
    return weights


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


# --- measuring -------------------------------------------------------------------------------------------------------


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
            sys.executable, str(Path(__file__).resolve()), f"--weights={Path(weights).resolve()}",
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


if __name__ == "__main__":
    sys.exit(main())
