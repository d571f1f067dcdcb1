"""Does the memory report tell the truth? What it predicts without a GPU, beside what a GPU's own counters say.

    python benchmarks/memory_model.py predict  [--out build/memory_model/predicted.json]     # CPU backend
    python benchmarks/memory_model.py measure  [--out build/memory_model/measured.json]      # a GPU, and ncu
    python benchmarks/memory_model.py compare  [--results benchmarks/results]                # anywhere

``CASES`` are launches of the book's kernels, good and bad variants. *predict* runs each under ``common.memory_report``.
*measure* runs each once under NVIDIA's Nsight Compute (``ncu``, on PATH or in NSIGHT_COMPUTE, or where the toolkit puts
it), in a few processes (``--split``), and writes what it has after each. No kernel is warmed up: how many sectors and
turns its requests take does not depend on what ran before, and ncu empties the caches before each launch. *compare*
joins the two, prints a table, and writes ``<results>/<device>/memory_model.json``.

Exit codes: 0 all is there (compare: and within the limits: 2 % for sectors, 10 % for bank conflicts), 1 something is
missing or outside, 2 bad usage or no ncu.
"""

import argparse
import csv
import glob
import io
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from ch14_mini_llm.files import FileError, make_output, write_text  # noqa: E402

BUILD = ROOT / "build" / "memory_model"
PLACES = ("/usr/local/cuda/bin/ncu", "/opt/nvidia/nsight-compute/*/ncu", "/usr/local/cuda*/nsight-compute-*/ncu")
SECTOR_LIMIT, CONFLICT_LIMIT = 0.02, 0.10
L1 = "l1tex__"
METRICS = {  # what we call it -> ncu's metrics, added up
    "sectors_read": [L1 + "t_sectors_pipe_lsu_mem_global_op_ld.sum"],
    "sectors_written": [L1 + "t_sectors_pipe_lsu_mem_global_op_st.sum"],
    "requests_read": [L1 + "t_requests_pipe_lsu_mem_global_op_ld.sum"],
    "requests_written": [L1 + "t_requests_pipe_lsu_mem_global_op_st.sum"],
    "conflicts_read": [L1 + "data_bank_conflicts_pipe_lsu_mem_shared_op_ld.sum"],
    "conflicts_written": [L1 + "data_bank_conflicts_pipe_lsu_mem_shared_op_st.sum"],
    "turns_read": [L1 + "data_pipe_lsu_wavefronts_mem_shared_op_ld.sum"],
    "turns_written": [L1 + "data_pipe_lsu_wavefronts_mem_shared_op_st.sum"],
    "shared_read": ["smsp__inst_executed_op_shared_ld.sum"],
    "shared_written": ["smsp__inst_executed_op_shared_st.sum"],
    "local_read": [L1 + "t_sectors_pipe_lsu_mem_local_op_ld.sum"],
    "local_written": [L1 + "t_sectors_pipe_lsu_mem_local_op_st.sum"],
    "dram_read": ["dram__bytes_read.sum"],
    "adds": ["smsp__sass_thread_inst_executed_op_fadd_pred_on.sum"],
    "products": ["smsp__sass_thread_inst_executed_op_fmul_pred_on.sum"],
    "fused": ["smsp__sass_thread_inst_executed_op_ffma_pred_on.sum"],
}
COMPARED = {  # what is compared -> (heading, limit)
    "sectors_read": ("global sectors read", SECTOR_LIMIT),
    "sectors_written": ("global sectors written", SECTOR_LIMIT),
    "conflicts_read": ("conflicts, shared reads", CONFLICT_LIMIT),
    "conflicts_written": ("conflicts, shared writes", CONFLICT_LIMIT),
}


# --- the launches ----------------------------------------------------------------------------------------------------

N = 1 << 20
SIDE = 512  # of the matrices that are transposed
PRODUCT = 256
ROWS, COLUMNS = 256, 1024  # of the matrices that softmax goes over


def cases():
    """{name: (kernel, function(floats) -> (launch, arguments))}; ``floats(*shape)`` makes an array on the device."""
    from chapters.ch03_indexing.kernels import blocks_1d
    from chapters.ch04_memory import kernels as ch04
    from chapters.ch04_memory import transpose as turn
    from chapters.ch06_shared_tile import kernels as ch06
    from chapters.ch07_warp_reduce import kernels as ch07
    from chapters.ch10_softmax import kernels as ch10

    found = {
        "copy_v1_element": (ch04.copy_v1_element, lambda f: (blocks_1d(N), (f(N), f(N), N))),
        "copy_v2_float4": (ch04.copy_v2_float4, lambda f: (ch04.copy_float4_launch(N), (f(N), f(N), N))),
    }
    for stride in (2, 8, 32):
        found[f"copy_strided, stride {stride}"] = (
            ch04.copy_strided,
            lambda f, s=stride: (blocks_1d(N // 4), (f(N // 4 * s), f(N // 4), N // 4, s)),
        )
    found |= {
        "copy_offset, offset 1": (ch04.copy_offset, lambda f: (blocks_1d(N), (f(N + 1), f(N), N, 1))),
        "kinetic_energy_aos": (
            ch04.kinetic_energy_aos,
            lambda f: (blocks_1d(N // 4), (f(N // 4, 8), f(N // 4), N // 4)),
        ),
        "kinetic_energy_soa": (
            ch04.kinetic_energy_soa,
            lambda f: (blocks_1d(N // 4), (f(8, N // 4), f(N // 4), N // 4)),
        ),
        "split_qkv": (
            ch04.split_qkv,
            lambda f: (
                ch04.split_qkv_launch(256, 768),
                (f(256, 3 * 768), *[f(12, 256, 64) for _ in range(3)], 256, 12, 64),
            ),
        ),
    }
    small = turn.transpose_v1_naive, turn.transpose_v2_tile, turn.transpose_v3_padded, turn.transpose_v4_unrolled
    for kernel in small:
        found[kernel.__name__] = (
            kernel,
            lambda f: (turn.transpose_launch(SIDE, SIDE), (f(SIDE, SIDE), f(SIDE, SIDE), SIDE, SIDE)),
        )
    found["transpose_v5_float4"] = (
        turn.transpose_v5_float4,
        lambda f: (turn.transpose_float4_launch(SIDE, SIDE), (f(SIDE, SIDE), f(SIDE, SIDE), SIDE, SIDE)),
    )
    products = (ch06.matmul_v1_naive, PRODUCT), (ch06.matmul_v2_tiled, PRODUCT), (ch06.matmul_v3_any_shape, 250)
    for kernel, n in products:
        found[f"{kernel.__name__}, {n}³"] = (
            kernel,
            lambda f, n=n: (ch06.matmul_launch(n, n), (f(n, n), f(n, n), f(n, n), n, n, n)),
        )
    for kernel in (ch07.sum_v1_shared_tree, ch07.sum_v2_warp_shuffle, ch07.sum_v3_warp_then_block, ch07.sum_v4_float4):
        found[kernel.__name__] = (kernel, lambda f: (ch07.sum_launch(N), (f(N), f(1), N)))
    for kernel in (ch10.softmax_v1_naive, ch10.softmax_v2_stable, ch10.softmax_v3_online):
        found[kernel.__name__] = (
            kernel,
            lambda f: (ch10.softmax_launch(ROWS), (f(ROWS, COLUMNS), f(ROWS, COLUMNS), COLUMNS)),
        )
    found["softmax_v4_warp_per_row"] = (
        ch10.softmax_v4_warp_per_row,
        lambda f: (ch10.softmax_warp_launch(ROWS), (f(ROWS, COLUMNS), f(ROWS, COLUMNS), COLUMNS)),
    )
    found["softmax_v5_registers"] = (
        ch10.softmax_v5_registers,
        lambda f: (ch10.softmax_registers_launch(ROWS, COLUMNS), (f(ROWS, COLUMNS), f(ROWS, COLUMNS), COLUMNS)),
    )
    return found


def device_floats(*shape):
    import numpy as np
    from numba import cuda

    return cuda.to_device(np.full(shape, 0.5, np.float32))


def say(text):
    print(text, file=sys.stderr, flush=True)


def write(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(data, indent=1, ensure_ascii=False) + "\n")


# --- predict ---------------------------------------------------------------------------------------------------------


def predict(options):
    os.environ["MINI_BACKEND"] = "cpu"
    import common

    found = {}
    for name, (kernel, prepare) in chosen(cases(), options).items():
        start = time.perf_counter()
        launch, arguments = prepare(device_floats)
        with common.memory_report() as report:
            kernel[launch](*arguments)
        found[name] = {"kernel": kernel.__name__, **counted(report)}
        say(f"{name}: {time.perf_counter() - start:.1f} s")
        write(options.out, {"cases": found})
    say(f"{len(found)} predictions are in {options.out}")
    return 0


def counted(report):
    """What a report says, under the names of METRICS."""
    total = lambda what, space, access: sum(
        getattr(x, what) for x in report.lines if (x.space, x.access) == (space, access)
    )
    found = {}
    for access, suffix in (("read", "read"), ("write", "written")):
        found[f"sectors_{suffix}"] = total("sectors", "global", access)
        found[f"requests_{suffix}"] = total("requests", "global", access)
        found[f"conflicts_{suffix}"] = total("conflicts", "shared", access)
        found[f"turns_{suffix}"] = total("wavefronts", "shared", access)
        found[f"shared_{suffix}"] = total("requests", "shared", access)
        found[f"local_{suffix}"] = total("sectors", "local", access)
    found["dram_bytes"], found["operations"] = report.dram_bytes, report.operations
    return found


def chosen(all_cases, options):
    if not options.only:
        return all_cases
    return {name: case for name, case in all_cases.items() if any(word in name for word in options.only)}


# --- measure ---------------------------------------------------------------------------------------------------------


def launch(options):
    """What runs under ncu: each case once. Its progress goes to a file, so that a failure does not shift the others."""
    os.environ["MINI_BACKEND"] = "gpu"
    from common.bench import device_name  # common first, then numba.cuda

    # isort: split
    from numba import cuda

    done = {"device": device_name(), "launched": [], "failed": {}}
    write(options.progress, done)
    for name, (kernel, prepare) in cases().items():
        if options.cases and name not in options.cases:
            continue
        start = time.perf_counter()
        try:
            shape, arguments = prepare(device_floats)
            kernel[shape](*arguments)
            cuda.synchronize()
            done["launched"].append([name, kernel.__name__])
        except Exception as error:
            done["failed"][name] = f"{type(error).__name__}: {error}"[:500]
        write(options.progress, done)
        say(f"{name}: {time.perf_counter() - start:.1f} s {done['failed'].get(name, '')}")
    return 0


def find_ncu():
    named = os.environ.get("NSIGHT_COMPUTE")
    places = [path for place in PLACES for path in sorted(glob.glob(place), reverse=True)]
    places = [named] if named else [shutil.which("ncu"), *places]
    return next((p for p in places if p and os.access(p, os.X_OK)), None)


def measure(options):
    ncu = find_ncu()
    if ncu is None:
        say(f"error: ncu is neither on PATH nor in {', '.join(PLACES)}; NSIGHT_COMPUTE=/path/to/ncu names it")
        return 2
    start = time.perf_counter()
    names = list(chosen(cases_names(), options))
    size = -(-len(names) // max(1, options.split))
    result = {"device": None, "ncu": ncu, "version": version(ncu), "cases": {}, "problems": [], "missing_metrics": []}
    metrics = [metric for group in METRICS.values() for metric in group]
    for first in range(0, len(names), size):
        left = options.limit - (time.perf_counter() - start)
        if left < 5:
            result["problems"].append(f"no time left for {', '.join(names[first:])}")
            break
        metrics = profile(ncu, names[first : first + size], metrics, left, result)
        write(options.out, result)
        say(f"{len(result['cases'])} of {len(names)} cases after {time.perf_counter() - start:.0f} s")
    write(options.out, result)
    for problem in result["problems"]:
        say(f"problem: {problem}")
    say(f"{len(result['cases'])} of {len(names)} cases are in {options.out}")
    return 0 if len(result["cases"]) == len(names) else 1


def cases_names():
    """The cases, without starting CUDA in this process."""
    os.environ["MINI_BACKEND"] = "cpu"
    import common  # noqa: F401  (before numba.cuda)

    return cases()


def version(ncu):
    shown = subprocess.run([ncu, "--version"], capture_output=True, text=True, check=False).stdout
    return next((line for line in shown.splitlines() if line.startswith("Version")), shown[-200:])


def profile(ncu, names, metrics, seconds, result):
    """Run some cases under ncu and put what it counted into ``result``. Returns the metrics that ncu knows."""
    BUILD.mkdir(parents=True, exist_ok=True)
    progress = BUILD / "progress.json"
    deadline = time.perf_counter() + seconds
    while True:
        progress.unlink(missing_ok=True)
        command = [ncu, "--clock-control", "none", "--csv", "--page", "raw", "--print-units", "base", "--metrics",
                   ",".join(metrics), sys.executable, str(Path(__file__).resolve()), "launch",
                   "--progress", str(progress), "--cases", *names]  # fmt: skip
        try:
            left = max(1, deadline - time.perf_counter())
            run = subprocess.run(command, capture_output=True, text=True, timeout=left, check=False, cwd=ROOT,
                                 env=os.environ | {"MINI_BACKEND": "gpu"})  # fmt: skip
            output, code = run.stdout + "\n" + run.stderr, run.returncode
        except subprocess.TimeoutExpired as error:
            parts = [part.decode(errors="replace") if isinstance(part, bytes) else part or ""
                     for part in (error.stdout, error.stderr)]  # fmt: skip
            output, code = "\n".join(parts), "timeout"
        (BUILD / "ncu.txt").write_text(output, encoding="utf-8")
        complaints = [text for text in output.splitlines() if "error" in text.lower() and "metric" in text.lower()]
        unknown = [m for m in metrics if any(m in text for text in complaints)]
        if not unknown or len(unknown) == len(metrics):
            break
        say(f"ncu does not know {', '.join(unknown)}: again without")
        result["missing_metrics"] += unknown
        metrics = [m for m in metrics if m not in unknown]
    done = json.loads(progress.read_text()) if progress.exists() else {"device": None, "launched": [], "failed": {}}
    result["device"] = result["device"] or done["device"]
    result["problems"] += [f"{name} was not launched: {why}" for name, why in done["failed"].items()]
    rows = kernel_rows(output)
    found = match(rows, done["launched"])
    result["cases"] |= found
    lost = [name for name in names if name not in found]
    if lost or code not in (0,):
        tail = "\n".join(output.strip().splitlines()[-40:])[-6000:]
        say(f"ncu ended with {code}; {len(rows)} rows of {len(names)} kernels; without figures: {lost}")
        say(f"--- its output, in {BUILD / 'ncu.txt'}, ends:\n{tail}\n---")
        result["problems"].append(f"ncu ended with {code}; no figures for {lost}: {tail[-1500:]}")
    return metrics


def kernel_rows(output):
    """[{column: text}] of ncu's raw page in CSV, whatever else the output holds."""
    rows, header = [], None
    for line in output.splitlines():
        if not line.startswith('"'):
            continue
        cells = next(csv.reader(io.StringIO(line)))
        if "Kernel Name" in cells:
            header = cells
        elif header and len(cells) == len(header) and cells[header.index("Kernel Name")]:  # the row of units has none
            rows.append(dict(zip(header, cells)))
    return rows


def match(rows, launched):
    """{case: figures}: the rows of each kernel, in the order in which its cases were launched."""
    kernels = sorted({kernel for _, kernel in launched}, key=len, reverse=True)
    queues = {kernel: [] for kernel in kernels}
    for row in rows:
        kernel = next((k for k in kernels if k in row["Kernel Name"]), None)
        if kernel:
            queues[kernel].append(row)
    found = {}
    for name, kernel in launched:
        if queues[kernel]:
            row = queues[kernel].pop(0)
            found[name] = {"kernel": kernel} | {
                what: sum(values) if None not in values else None
                for what, group in METRICS.items()
                for values in [[number(row.get(metric)) for metric in group]]
            }
    return found


def number(text):
    try:
        value = float(text.replace(",", ""))
    except (AttributeError, ValueError):
        return None
    return int(value) if value == int(value) else value


# --- compare ---------------------------------------------------------------------------------------------------------


def compare(options):
    predicted = json.loads(options.predicted.read_text(encoding="utf-8"))["cases"]
    measured = json.loads(options.measured.read_text(encoding="utf-8"))
    rows = []
    for name, ours in predicted.items():
        counters = measured["cases"].get(name)
        for what, (_, limit) in COMPARED.items():
            if counters is None or counters[what] is None:
                rows.append({"case": name, "what": what, "predicted": ours[what], "counter": None, "ok": None})
                continue
            a, b = ours[what], counters[what]
            # counters of conflicts are never quite 0: what is below a turn in a hundred is none
            slack = 0.01 * max(counters.get(what.replace("conflicts", "turns")) or 0, 1) if "conflicts" in what else 0
            difference = (a - b) / b if b else 0.0 if a == 0 else None
            ok = abs(a - b) <= max(limit * b, slack)
            rows.append({"case": name, "what": what, "predicted": a, "counter": b, "difference": difference, "ok": ok})
    words = re.sub(r"NVIDIA|GeForce|Tesla|Quadro|\d+GB|HBM\d\w*|PCIe|SXM\d*", " ", measured["device"] or "unknown")
    path = options.results / "-".join(re.findall(r"[a-z0-9]+", words.lower())) / "memory_model.json"
    ncu = {key: measured[key] for key in ("device", "version", "missing_metrics", "problems")}
    write(path, {**ncu, "compared": rows, "predicted": predicted, "counters": measured["cases"]})
    print(table(rows))
    bad = [r for r in rows if not r["ok"]]
    print(f"{len(rows) - len(bad)} of {len(rows)} figures are within the limits; all are in {path}")
    return 1 if bad else 0


def table(rows):
    """As text, a line a case and figure; those that are 0 on both sides are left out."""
    lines = [f"{'launch':<28}{'':<26}{'predicted':>12}{'counter':>12}{'difference':>12}"]
    for row in rows:
        if not row["predicted"] and not row["counter"] and row["ok"]:
            continue
        difference = row.get("difference")
        shown = "missing" if row["counter"] is None else "–" if difference is None else f"{100 * difference:+.2f} %"
        counter = "–" if row["counter"] is None else f"{row['counter']}"
        lines.append(
            f"{row['case']:<28}{COMPARED[row['what']][0]:<26}{row['predicted']:>12}{counter:>12}{shown:>12}"
            + ("" if row["ok"] else "  <--")
        )
    return "\n".join(lines)


def main(argv=None):
    parser = argparse.ArgumentParser(prog="benchmarks/memory_model.py", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(required=True)
    for function, out in ((predict, "predicted.json"), (measure, "measured.json")):
        command = commands.add_parser(function.__name__)
        command.add_argument("--out", type=Path, default=BUILD / out, help=f"default: build/memory_model/{out}")
        command.add_argument("--only", nargs="+", default=[], metavar="WORD", help="cases with this in their name")
        command.set_defaults(function=function)
    command.add_argument("--split", type=int, default=3, help="processes of ncu, one after the other (3)")
    command.add_argument("--limit", type=float, default=85, help="seconds for all of it (85)")
    command = commands.add_parser("launch", help="for `measure`: what runs under ncu")
    command.add_argument("--cases", nargs="+", default=[])
    command.add_argument("--progress", type=Path, required=True)
    command.set_defaults(function=launch)
    command = commands.add_parser("compare")
    command.add_argument("--predicted", type=Path, default=BUILD / "predicted.json")
    command.add_argument("--measured", type=Path, default=BUILD / "measured.json")
    command.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    command.set_defaults(function=compare)
    options = parser.parse_args(argv)
    try:
        if "out" in options:
            make_output(options.out, "--out")
    except FileError as error:
        parser.error(str(error))
    return options.function(options)


if __name__ == "__main__":
    sys.exit(main())
