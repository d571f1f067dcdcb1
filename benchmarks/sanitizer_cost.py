"""What the teaching sanitizer costs: every version of every ladder, plain and sanitized, on the CPU backend.

    python benchmarks/sanitizer_cost.py [--chapters 06 09] [--out benchmarks/results/cpu/sanitizer.json]

Runs each at the size of its chapter's demo (``make chNN``), the matmul also at larger ones, and checks that the
sanitizer finds nothing. Prints times, how many times slower a sanitized launch is, and the accesses looked at in a
second; writes all of it. Each time is the best of several: a sanitized launch is compiled before.
"""

import argparse
import importlib
import json
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["MINI_BACKEND"] = "cpu"

import common  # noqa: E402  (before numba.cuda)

# isort: split
import numpy as np  # noqa: E402
from tqdm import tqdm  # noqa: E402

from benchmarks.ladders import benchable  # noqa: E402
from ch14_mini_llm.files import FileError, make_output, write_text  # noqa: E402
from common.bench import device_name, on_device  # noqa: E402

PLAIN_SECONDS, SANITIZED_SECONDS = 0.1, 0.5  # spent on the repeats of a launch, about
MORE = {"matmul": [(256, 256, 256), (512, 512, 512), (1024, 1024, 1024)]}


def best(launch, seconds):
    """The least seconds of a launch, over at least three and about ``seconds`` of them."""
    times = []
    while len(times) < 3 or sum(times) < seconds and len(times) < 100:
        start = time.perf_counter()
        launch()
        times.append(time.perf_counter() - start)
    return min(times)


def cost(ladder, name, size):
    """A row: seconds of a plain and a sanitized run of one version at one size, accesses, findings."""
    arrays = on_device(SimpleNamespace(**ladder.make(np.random.default_rng(0), size)))
    launch = ladder.versions[name]
    launch(arrays)  # compiles
    plain = best(lambda: launch(arrays), PLAIN_SECONDS)
    with common.sanitize() as report:
        launch(arrays)
        before = report.accesses
        launch(arrays)
        accesses = report.accesses - before
        sanitized = best(lambda: launch(arrays), SANITIZED_SECONDS)
    return {
        "ladder": ladder.name, "version": name, "size": ladder.label(size), "plain_s": plain, "sanitized_s": sanitized,
        "slower": sanitized / plain, "accesses": accesses, "findings": len(report.findings),
    }  # fmt: skip


def main(argv=None):
    parser = argparse.ArgumentParser(prog="benchmarks/sanitizer_cost.py", description=__doc__.split("\n")[0])
    known = benchable()
    parser.add_argument("--chapters", nargs="+", default=list(known), choices=list(known), metavar="CH")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "cpu" / "sanitizer.json")
    options = parser.parse_args(argv)
    try:
        make_output(options.out, "--out")
    except FileError as error:
        parser.error(str(error))
    tasks = []
    for chapter in options.chapters:
        module = importlib.import_module(known[chapter])
        quick = getattr(module, "QUICK", {})
        for ladder in module.LADDERS:
            sizes = (quick.get(ladder.name) or ladder.sizes["cpu"])[:1] + MORE.get(ladder.name, [])
            tasks += [(chapter, ladder, name, size) for size in sizes for name in ladder.versions
                      if ladder.fits(name, size)]  # fmt: skip
    rows = []
    for chapter, ladder, name, size in tqdm(tasks, desc="launches", mininterval=5):
        rows.append({"chapter": chapter} | cost(ladder, name, size))
    print(f"{device_name()}\n")
    print(f"{'version':<30}{'size':<24}{'plain ms':>10}{'sanitized ms':>14}{'times':>8}{'10⁶ accesses/s':>16}")
    for row in sorted(rows, key=lambda row: -row["slower"]):
        speed = row["accesses"] / row["sanitized_s"] / 1e6
        print(f"{row['version']:<30}{row['size']:<24}{1e3 * row['plain_s']:>10.3f}{1e3 * row['sanitized_s']:>14.2f}"
              f"{row['slower']:>8.0f}{speed:>16.0f}{'  FINDINGS' if row['findings'] else ''}")  # fmt: skip
    write_text(options.out, json.dumps({"device": device_name(), "rows": rows}, indent=1) + "\n")
    raise SystemExit(1 if any(row["findings"] for row in rows) else 0)


if __name__ == "__main__":
    main()
