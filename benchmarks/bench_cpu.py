"""The CPU backend beside its peers, in one run: NumPy for throughput, Numba's simulator for the tiled matmul.

    python benchmarks/bench_cpu.py [--out benchmarks/results/cpu/bench.json] [--no-simulator] [--repeat 15]

Prints a table and writes the raw figures. Every kernel is the chapter's own, and its result is checked against NumPy
after it was timed. Ratios above 1 mean that our kernel is faster. Throughput counts the bytes an ideal kernel moves
(each input read once, each output written once), or 2·M·N·K operations for the matmul.

Times are medians over interleaved rounds (ours, NumPy, ours, NumPy …), so that a slow moment of the machine meets both.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("MINI_BACKEND", "cpu")

import common  # noqa: E402  (before numba.cuda)

# isort: split
import numba  # noqa: E402
import numpy as np  # noqa: E402
from numba import cuda  # noqa: E402
from tqdm import tqdm  # noqa: E402

from ch14_mini_llm.files import FileError, make_output, write_text  # noqa: E402
from chapters.ch03_indexing import kernels as ch03  # noqa: E402
from chapters.ch06_shared_tile import kernels as ch06  # noqa: E402
from chapters.ch07_warp_reduce import kernels as ch07  # noqa: E402
from chapters.ch07_warp_reduce import norms  # noqa: E402
from chapters.ch10_softmax import kernels as ch10  # noqa: E402
from common.cpu import machine  # noqa: E402
from common.cpu.launch import workers  # noqa: E402

BARS = {"matmul": (0.15, 0.3), "vector add": (0.6, 1), "row softmax": (0.6, 1), "layernorm": (1, 1), "sum": (0.15, 1)}

SIMULATOR = """
import importlib.util, json, sys, time
import numpy as np
spec = importlib.util.spec_from_file_location("kernels", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
n = int(sys.argv[2])
rng = np.random.default_rng(0)
a, b = rng.standard_normal((2, n, n), dtype=np.float32)
c = np.zeros((n, n), np.float32)
start = time.perf_counter()
module.matmul_kernel[module.matmul_launch(n, n)](a, b, c, n, n, n)
seconds = time.perf_counter() - start
assert np.abs(c - a @ b).max() < 1e-3
print(json.dumps(seconds))
"""


def interleaved(ours, theirs, repeat):
    """Median seconds of two functions run in turn, after three warm-up rounds of each."""
    for _ in range(3):
        ours()
        theirs()
    times = [], []
    for _ in range(repeat):
        for f, kept in zip((ours, theirs), times):
            start = time.perf_counter()
            f()
            kept.append(time.perf_counter() - start)
    return [statistics.median(t) for t in times]


def cases():
    """Yields (name, unit, amount, ours, theirs, check): ``amount`` in 1e9 bytes or operations."""
    rng = np.random.default_rng(1)

    n = 1024
    a, b = rng.standard_normal((2, n, n), dtype=np.float32)
    ours, theirs = np.zeros((n, n), np.float32), np.zeros((n, n), np.float32)
    launch = ch06.matmul_kernel[ch06.matmul_launch(n, n)]
    yield (
        "matmul",
        "GFLOP/s",
        2 * n**3 / 1e9,
        lambda: launch(a, b, ours, n, n, n),
        lambda: np.matmul(a, b, out=theirs),
        lambda: np.abs(ours - theirs).max() < 1e-3,
    )

    n2 = 1 << 24
    x, y = rng.standard_normal((2, n2), dtype=np.float32)
    out, expected = np.zeros(n2, np.float32), np.zeros(n2, np.float32)
    launch2 = ch03.residual_add[ch03.blocks_1d(n2)]
    yield (
        "vector add",
        "GB/s",
        12 * n2 / 1e9,
        lambda: launch2(x, y, out, n2),
        lambda: np.add(x, y, out=expected),
        lambda: np.array_equal(out, expected),
    )

    rows, cols = 4096, 1024
    z = rng.standard_normal((rows, cols), dtype=np.float32)
    s_out, s_ref = np.zeros_like(z), [None]

    def numpy_softmax():
        e = np.exp(z - z.max(1, keepdims=True))
        s_ref[0] = e / e.sum(1, keepdims=True)

    launch3 = ch10.softmax_row[ch10.softmax_launch(rows)]
    yield (
        "row softmax",
        "GB/s",
        8 * z.size / 1e9,
        lambda: launch3(z, s_out, cols),
        numpy_softmax,
        lambda: np.abs(s_out - s_ref[0]).max() < 1e-6,
    )

    w, bias = rng.standard_normal((2, cols), dtype=np.float32)
    l_out, l_ref = np.zeros_like(z), [None]

    def numpy_layernorm():
        centred = z - z.mean(1, keepdims=True)
        l_ref[0] = centred / np.sqrt((centred**2).mean(1, keepdims=True) + np.float32(1e-5)) * w + bias

    launch4 = norms.layernorm_row[norms.layernorm_launch(rows, cols)]
    eps = np.float32(1e-5)
    yield (
        "layernorm",
        "GB/s",
        8 * z.size / 1e9,
        lambda: launch4(z, w, bias, l_out, cols, eps),
        numpy_layernorm,
        lambda: np.abs(l_out - l_ref[0]).max() < 1e-4,
    )

    total = np.zeros(1, np.float32)
    t_ref = [None]

    def our_sum():
        total[0] = 0
        ch07.sum_v3_warp_then_block[ch07.sum_launch(n2)](x, total, n2)

    def numpy_sum():
        t_ref[0] = x.sum()

    yield ("sum", "GB/s", 4 * n2 / 1e9, our_sum, numpy_sum, lambda: abs(total[0] - t_ref[0]) < 1)


def launch_overhead(repeat=2000):
    """Median microseconds of a launch of one block of 32 threads with device arrays, everything warm."""
    x = cuda.to_device(np.zeros(32, np.float32))
    launch = ch03.residual_add[1, 32]
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        launch(x, x, x, 32)
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e6


def compile_times():
    """Seconds to get each capstone kernel ready in a fresh process: cold, then from the disk cache."""
    script = ROOT / "benchmarks" / "compile_times.py"
    with tempfile.TemporaryDirectory() as folder:
        env = {**os.environ, "MINI_CACHE_DIR": folder, "MINI_BACKEND": "cpu"}
        runs = [
            subprocess.run([sys.executable, script], env=env, capture_output=True, text=True, check=True) for _ in "ab"
        ]
    return [json.loads(r.stdout) for r in runs]


def simulator(n=64):
    """Seconds of one tiled matmul n x n x n: (ours, Numba's simulator in a process of its own)."""
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, n, n), dtype=np.float32)
    c = np.zeros((n, n), np.float32)
    launch = ch06.matmul_kernel[ch06.matmul_launch(n, n)]
    ours, _ = interleaved(lambda: launch(a, b, c, n, n, n), lambda: None, 200)
    env = {**os.environ, "NUMBA_ENABLE_CUDASIM": "1"}
    run = subprocess.run(
        [sys.executable, "-c", SIMULATOR, ch06.__file__, str(n)], env=env, capture_output=True, text=True
    )
    if run.returncode:
        sys.exit(f"the simulator run failed:\n{run.stderr}")
    return ours, float(run.stdout)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "cpu" / "bench.json")
    parser.add_argument("--repeat", type=int, default=15)
    parser.add_argument("--no-simulator", action="store_true", help="leave out the simulator (it takes 10 s)")
    options = parser.parse_args()
    if options.repeat < 1:
        parser.error(f"--repeat={options.repeat}: at least 1")
    try:
        make_output(options.out, "--out")
    except FileError as error:
        parser.error(str(error))
    if common.BACKEND != "cpu":
        sys.exit("bench_cpu.py measures the CPU backend: run it with MINI_BACKEND=cpu")
    result = {
        "machine": machine.device_name(),
        "workers": workers(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "numba": numba.__version__,
        "date": time.strftime("%Y-%m-%d"),
        "openblas_coretype": os.environ.get("OPENBLAS_CORETYPE"),
        "kernels": {},
    }
    rows = []
    for name, unit, amount, ours, theirs, check in tqdm(list(cases()), desc="kernels", file=sys.stderr):
        mine, peer = interleaved(ours, theirs, options.repeat)
        if not check():
            sys.exit(f"{name}: the result is wrong")
        bar, aim = BARS[name]
        result["kernels"][name] = {
            "unit": unit,
            "ours": amount / mine,
            "numpy": amount / peer,
            "ratio": peer / mine,
            "bar": bar,
            "aim": aim,
        }
        rows.append((name, f"{amount / mine:8.1f} {unit}", f"{amount / peer:8.1f}", f"{peer / mine:6.2f}", f">= {bar}"))
    result["launch_us"] = launch_overhead()
    rows.append(("small launch", f"{result['launch_us']:8.1f} µs", "", "", "<= 60 µs"))
    cold, warm = compile_times()
    result["compile_s"], result["load_s"] = cold, warm
    slowest = max(cold, key=cold.get)
    rows.append(("first compile, slowest", f"{cold[slowest]:8.2f} s", slowest, "", "<= 3 s"))
    slow_load = max(warm, key=warm.get)
    rows.append(("from disk, slowest", f"{warm[slow_load]:8.3f} s", slow_load, "", "<= 0.15 s"))
    if not options.no_simulator:
        mine, peer = simulator()
        result["simulator"] = {"ours_s": mine, "simulator_s": peer, "ratio": peer / mine}
        rows.append(
            ("matmul 64³, simulator", f"{mine * 1e6:8.1f} µs", f"{peer:8.2f} s", f"{peer / mine:.0f}", ">= 100000")
        )
    write_text(options.out, json.dumps(result, indent=1) + "\n")
    print(f"{result['machine']}, {result['workers']} workers, numpy {result['numpy']}")
    print(f"{'kernel':24} {'ours':>18} {'peer':>12} {'ratio':>8}  bar")
    for name, ours, peer, ratio, bar in rows:
        print(f"{name:24} {ours:>18} {peer:>12} {ratio:>8}  {bar}")
    print(f"written: {options.out}")


if __name__ == "__main__":
    main()
