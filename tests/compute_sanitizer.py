"""NVIDIA's compute-sanitizer over the chapters' tests, one size for each kernel: what the GPU itself has to say.

    python tests/compute_sanitizer.py [--tools memcheck racecheck] [--tests ch04 ch06/test_ch06_kernels.py]
                                      [--jobs 8] [--seconds 500] [--json FILE]

Needs a GPU and compute-sanitizer, which comes with the CUDA toolkit. *memcheck* finds reads and writes outside of
arrays and misaligned ones; *racecheck* finds two threads at one place of shared memory without a barrier between;
*synccheck* finds barriers that not all threads reach; *initcheck* reads of device memory that nothing has written.
Each test file is a process of its own. ``--seconds`` bounds the whole run: what has not ended by then is told as such;
with ``--json`` a second run adds its rows to those of the first. Exit codes: 0 no finding and all tests passed, 1
otherwise, 2 there is no compute-sanitizer.
"""

import argparse
import json
import os
import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "planted_bugs"))
from on_gpu import find_tool, read_report, under  # noqa: E402
from on_gpu import run as run_in_group  # noqa: E402


def examine(tool_path, tool, file, deadline):
    """Run one test file under one tool: a dict of ``tool, tests, findings, passed, failed, seconds, text``.

    ``findings`` is None where the tool printed no summary: it was stopped at the deadline, or it broke.
    """
    row = {"tool": tool, "tests": file, "findings": None, "passed": 0, "failed": 0, "seconds": 0.0}
    start = time.monotonic()
    if start >= deadline:
        return row | {"text": "not begun: the time was over"}
    # not what launches wrongly on purpose, nor what asks how long a launch takes: a tool makes it long
    selection = ["--one-size", "-k", "not refuse and not time_right"]
    pytest = ["-m", "pytest", "-p", "no:cacheprovider", "--durations=5", *selection]
    command = under(tool_path, tool, *pytest, f"tests/{file}")
    text, code, seconds = run_in_group(command, deadline - start, os.environ | {"MINI_BACKEND": "gpu"})
    if code is None:
        return row | {"seconds": round(seconds, 1), "text": text + f"\nstopped after {seconds:.0f} seconds"}
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|error)", text)}
    return row | {
        "findings": read_report(text)[0],
        "passed": counts.get("passed", 0),
        "failed": counts.get("failed", 0) + counts.get("error", 0),
        "seconds": round(seconds, 1),
        "text": text,
    }


def test_files(names):
    """The test files that names such as ``ch04`` or ``ch04/test_transpose.py`` stand for, under ``tests/``."""
    folder = ROOT / "tests"
    found = [path for name in names for path in (sorted((folder / name).glob("test_*.py")) or [folder / name])]
    if missing := [str(path.relative_to(folder)) for path in found if not path.is_file()]:
        raise FileNotFoundError(f"no such tests: {', '.join(missing)}")
    return [str(path.relative_to(folder)) for path in found]


def main(argv=None):
    parser = argparse.ArgumentParser(prog="tests/compute_sanitizer.py", description=__doc__.split("\n")[0])
    parser.add_argument("--tools", nargs="+", default=["memcheck", "racecheck"], metavar="TOOL")
    chapters = sorted(path.name for path in (ROOT / "tests").glob("ch??") if path.name != "ch14")
    default = [*chapters, "ch14/test_small_step.py"]  # of the capstone one prompt and three steps
    parser.add_argument("--tests", nargs="+", default=default, metavar="NAME", help="chNN or chNN/test_FILE.py")
    parser.add_argument("--jobs", type=int, default=4, help="processes at a time (4)")
    parser.add_argument("--seconds", type=float, default=7200, help="for the whole run (7200)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the table to this file, or add to it")
    options = parser.parse_args(argv)
    tool_path = find_tool()
    if tool_path is None:
        parser.error("compute-sanitizer is not on PATH; it comes with NVIDIA's CUDA toolkit")
    try:
        files = test_files(options.tests)
    except FileNotFoundError as error:
        parser.error(str(error))
    deadline = time.monotonic() + options.seconds
    found = []
    print(f"{'tool':<12}{'tests':<32}{'passed':>8}{'failed':>8}{'findings':>10}{'seconds':>9}")
    with ThreadPoolExecutor(options.jobs) as pool:
        tasks = [pool.submit(examine, tool_path, tool, file, deadline) for tool in options.tools for file in files]
        for task in as_completed(tasks):
            one = task.result()
            seen = "none told" if one["findings"] is None else one["findings"]
            print(
                f"{one['tool']:<12}{one['tests']:<32}{one['passed']:>8}{one['failed']:>8}{seen:>10}{one['seconds']:>9}"
            )
            found.append(one)
    # a file may hold nothing but tests for a machine without a GPU: no test passes there, and none fails
    bad = [one for one in found if one["findings"] != 0 or one["failed"]]
    for one in bad:
        telling = re.compile(r"^=====|Error|assert|s (call|setup)|stopped")
        lines = [line for line in one["text"].splitlines() if telling.search(line)]
        print(f"\n--- {one['tool']} {one['tests']}\n" + "\n".join((lines or one["text"].splitlines())[-40:]))
    for tool in options.tools:
        rows = [one for one in found if one["tool"] == tool]
        told = [one for one in rows if one["findings"] is not None]
        print(
            f"{tool}: {sum(one['findings'] for one in told)} findings in {sum(one['passed'] for one in told)} tests "
            f"of {len(told)} files; {len(rows) - len(told)} files did not end"
        )
    if options.json:
        rows = [{name: one[name] for name in one if name != "text"} for one in found]
        key = lambda row: (row["tool"], row["tests"])
        before = json.loads(options.json.read_text(encoding="utf-8")) if options.json.is_file() else []
        merged = {key(row): row for row in before} | {key(row): row for row in rows if row["findings"] is not None}
        options.json.write_text(json.dumps([merged[k] for k in sorted(merged)], indent=1) + "\n", encoding="utf-8")
    raise SystemExit(1 if bad or not sum(one["passed"] for one in found) else 0)


if __name__ == "__main__":
    main()
