"""Where the time of a step is, kernel by kernel, as its CUDA graph is replayed on a GPU.

    python benchmarks/step_profile.py [--sequences 1,32,256] [--repeats 5] [--out benchmarks/results]

GPT-2's size (124M) with random weights on the level ``fast``, half of `benchmarks/engine.py`'s new tokens made. Times
come from CUPTI, by way of torch's profiler. Kernels of a graph overlap (a dependent launch begins early and waits), so
of each what counts is the time from the end of the one in front to its own end: these add up to the step.

Prints a table and writes ``<out>/<device>/step_profile.json``; `engine_plot.py` has it in chapter 14's page of graphs.

Exit codes: 0 measured; 1 there is no GPU, or CUPTI reports nothing; 2 bad arguments.
"""

import argparse
import json
import re
import statistics
import sys
from collections import Counter, defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import common  # noqa: E402  (before numba.cuda)

# isort: split
import torch  # noqa: E402
from numba import cuda  # noqa: E402

from benchmarks.engine import SIZES, Bench  # noqa: E402
from benchmarks.gpt2 import GPT2_124M, _digits, _numbers, weight_bytes  # noqa: E402
from benchmarks.ladders import RESULTS, device_folder  # noqa: E402
from benchmarks.random_gpt2 import random_weights  # noqa: E402
from ch14_mini_llm.files import FileError, make_output, write_text  # noqa: E402
from common import bench  # noqa: E402


def kernel_name(symbol):
    """The name of a kernel's function in what CUPTI reports; of another symbol, the symbol."""
    found = re.match(r"(?:\w+::)*(\w+)\[abi:", symbol)
    return found[1] if found else symbol


def steps_of(b, n, repeats):
    """What each kernel adds to a step of ``n`` sequences: [(name, microseconds), …] of each of ``repeats`` replays.

    Raises RuntimeError if the profiler does not report the same kernels each time.
    """
    engine, requests = b.engine(max_batch=n), b.requests(n)
    b.timed(engine, requests)
    shapes, run_shape, made = [], engine.runner.run, 0
    engine.runner.run = lambda shape, *rest: shapes.append(shape) or run_shape(shape, *rest)
    for request in requests:
        engine.submit(request)
    while made < n * requests[0].max_new // 2:
        made += sum(len(output.tokens) for output in engine.step())
    cuda.synchronize()
    graph, found = engine.runner._graphs[shapes[-1]], []
    for _ in range(1 + repeats):  # each moves the rows on
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
            graph.replay()
            cuda.synchronize()
        events = [event for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA]
        spans = [(event.time_range.start, event.time_range.end, event.name) for event in events]
        spans.sort(key=lambda span: span[1])
        ends = [spans[0][0], *(end for _, end, _ in spans)] if spans else []
        found.append([(kernel_name(name), end - before) for before, (_, end, name) in zip(ends, spans)])
    found = found[1:]  # the first has set the profiler up
    if not found[0] or any([name for name, _ in one] != [name for name, _ in found[0]] for one in found):
        raise RuntimeError(f"the profiler reports {[len(one) for one in found]} kernels; is CUPTI there?")
    return found


def row_of(b, n, repeats):
    """A row of the table: the step, its kernels (how often, microseconds), and the floor."""
    found = steps_of(b, n, repeats)
    medians, times = [statistics.median(one[i][1] for one in found) for i in range(len(found[0]))], defaultdict(float)
    for (name, _), us in zip(found[0], medians):
        times[name] += us
    counts, size = Counter(name for name, _ in found[0]), b.sizes["decode"]
    cached = (size["prompt"] + size["new"] / 2) * 2 * b.config.n_layer * b.model.n_kv_head * b.model.head_dim * 2
    kernels = [{"name": name, "launches": counts[name], "us": _digits(us)} for name, us in times.items()]
    return {
        "sequences": n, "us": _digits(sum(medians)), "kernels": kernels,
        "weights_us": _digits(weight_bytes(b.config) / b.copy / 1e3), "cache_us": _digits(n * cached / b.copy / 1e3),
    }  # fmt: skip


def main(argv=None):
    parser = argparse.ArgumentParser(prog="benchmarks/step_profile.py", description=__doc__.split("\n")[0])
    parser.add_argument("--sequences", type=_numbers, default=(1, 32, 256), metavar="N,…", help="default 1,32,256")
    parser.add_argument("--repeats", type=int, default=5, help="replays of each (5)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results (benchmarks/results)")
    options = parser.parse_args(argv)
    if options.repeats < 1:
        parser.error(f"--repeats={options.repeats}: at least 1")
    if common.BACKEND != "gpu":
        raise SystemExit("step_profile.py: there is no GPU here, and without one no graph whose kernels could be timed")
    path = options.out / device_folder() / "step_profile.json"
    try:
        make_output(path, "--out")
    except FileError as error:
        parser.error(str(error))
    b = Bench(GPT2_124M, random_weights(GPT2_124M), "fast", SIZES["gpu"])
    rows = [row_of(b, n, options.repeats) for n in options.sequences]
    result = {"device": bench.device_name(), "repeats": options.repeats, "copy_gb_s": b.copy, "rows": rows}
    write_text(path, json.dumps(result, indent=1) + "\n")
    for row in rows:
        print(f"\n{row['sequences']} sequences: {row['us']} µs; weights {row['weights_us']}, cache {row['cache_us']}")
        for kernel in sorted(row["kernels"], key=lambda kernel: -kernel["us"]):
            print(f"  {kernel['name']:26}{kernel['launches']:4} x {kernel['us'] / kernel['launches']:8.2f} = "
                  f"{kernel['us']:8.1f} µs")  # fmt: skip
    print(f"\nwritten: {path}")


if __name__ == "__main__":
    main()
