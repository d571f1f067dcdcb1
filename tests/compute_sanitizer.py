"""NVIDIA's compute-sanitizer over the chapters' tests, one size for each kernel: what the GPU itself has to say.

    python tests/compute_sanitizer.py [--tools memcheck racecheck] [--chapters ch04 ch06] [--jobs 8] [--json FILE]

Needs a GPU and compute-sanitizer, which comes with the CUDA toolkit. *memcheck* finds reads and writes outside of
arrays and misaligned ones; *racecheck* finds two threads at one place of shared memory without a barrier between;
*synccheck* finds barriers that not all threads reach; *initcheck* reads of device memory that nothing has written.
Each chapter is a process of its own. Exit codes: 0 no finding and all tests passed, 1 otherwise, 2 there is no
compute-sanitizer.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PLACES = ("/usr/local/cuda/bin", "/usr/local/cuda/compute-sanitizer")


def examine(tool_path, tool, chapter, timeout):
    """Run one chapter's tests under one tool: a dict of ``tool, chapter, findings, passed, failed, text``."""
    command = [tool_path, "--tool", tool, "--report-api-errors", "no", "--target-processes", "all"]
    # the tests that launch wrongly on purpose are about the error, not about the memory
    pytest = ["-m", "pytest", "-p", "no:cacheprovider", "--one-size", "-k", "not refuse", f"tests/{chapter}"]
    options = {"cwd": ROOT, "env": os.environ | {"MINI_BACKEND": "gpu"}, "capture_output": True, "text": True}
    try:
        run = subprocess.run([*command, sys.executable, *pytest], timeout=timeout, **options)
        text = run.stdout + run.stderr
    except subprocess.TimeoutExpired as error:
        text = (error.stdout or b"").decode(errors="replace") + f"\nstopped after {timeout} seconds"
    summary = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)", text)
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|error)", text)}
    findings = sum(map(int, summary)) if summary else None
    return {"tool": tool, "chapter": chapter, "findings": findings, "passed": counts.get("passed", 0),
            "failed": counts.get("failed", 0) + counts.get("error", 0), "text": text}  # fmt: skip


def main(argv=None):
    parser = argparse.ArgumentParser(prog="tests/compute_sanitizer.py", description=__doc__.split("\n")[0])
    parser.add_argument("--tools", nargs="+", default=["memcheck", "racecheck"], metavar="TOOL")
    chapters = sorted(path.name for path in (ROOT / "tests").glob("ch??"))
    parser.add_argument("--chapters", nargs="+", default=chapters, metavar="CH")
    parser.add_argument("--jobs", type=int, default=4, help="processes at a time (4)")
    parser.add_argument("--timeout", type=float, default=1800, help="seconds for one chapter under one tool (1800)")
    parser.add_argument("--json", type=Path, help="write the table to this file")
    options = parser.parse_args(argv)
    tool_path = shutil.which("compute-sanitizer", path=os.pathsep.join([os.environ.get("PATH", ""), *PLACES]))
    if tool_path is None:
        parser.error("compute-sanitizer is not on PATH; it comes with NVIDIA's CUDA toolkit")
    tasks = [(tool_path, tool, chapter, options.timeout) for tool in options.tools for chapter in options.chapters]
    with ThreadPoolExecutor(options.jobs) as pool:
        found = list(pool.map(lambda task: examine(*task), tasks))
    print(f"{'tool':<12}{'tests of':<10}{'passed':>8}{'failed':>8}{'findings':>10}")
    for one in found:
        seen = "none told" if one["findings"] is None else one["findings"]
        print(f"{one['tool']:<12}{one['chapter']:<10}{one['passed']:>8}{one['failed']:>8}{seen:>10}")
    bad = [one for one in found if one["findings"] != 0 or one["failed"] or not one["passed"]]
    for one in bad:
        telling = re.compile(r"^=====|Error|assert")
        lines = [line for line in one["text"].splitlines() if telling.search(line)]
        print(f"\n--- {one['tool']} {one['chapter']}\n" + "\n".join((lines or one["text"].splitlines())[-40:]))
    if options.json:
        rows = [{name: one[name] for name in ("tool", "chapter", "passed", "failed", "findings")} for one in found]
        options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    raise SystemExit(1 if bad else 0)


if __name__ == "__main__":
    main()
