"""The bank of planted bugs under our sanitizer.

    python -m tests.planted_bugs [--json FILE]        every case: what was expected, what was found, what disagrees
    python -m tests.planted_bugs NAME ...             these cases, with what the sanitizer says about them in full
    python -m tests.planted_bugs --plain NAME ...     these cases launched without the sanitizer (always so on a GPU)

A bug launched without the sanitizer does what the bug does: it reads or writes outside of arrays, or hangs. Exit code
1 if a case is not found as expected, or a near miss gives wrong results.
"""

import argparse
import json
import os
import sys
from pathlib import Path

import numpy as np

import common

from . import BUGS, CASES, NEAR_MISSES, disagreements

# isort: split
from numba import cuda

ROOT = Path(__file__).resolve().parent.parent.parent


def right(case, result):
    """Whether a near miss computed what it should; True for a bug, of which nothing can be expected."""
    return case.bug or np.array_equal(*result)


def plain(case):
    """Launch a case as it is; True if the results are right."""
    result = case.run()
    cuda.synchronize()
    print(f"{case.name}: {'launched' if case.bug else 'right' if right(case, result) else 'WRONG'}", flush=True)
    return right(case, result)


def examine(case):
    """A case under our sanitizer: the report, and what is wrong as a list of sentences."""
    try:
        with common.sanitize() as report:
            result = case.run()
    except Exception as error:  # one case that cannot be run must not hide the others
        return None, [f"{type(error).__name__}: {error}"]
    return report, disagreements(case, report) + ([] if right(case, result) else ["the results are wrong"])


def row(case, report, wrong):
    """A case and its report as JSON takes it."""
    findings = [] if report is None else [
        {
            "kind": one.kind, "place": _place(one.file, one.line), "access": one.access, "array": one.array,
            "index": one.index and [int(i) for i in one.index], "block": one.block, "thread": one.thread,
            "other_place": _place(one.other_file or one.file, one.other_line), "other_access": one.other_access,
            "other_block": one.other_block, "other_thread": one.other_thread, "count": int(one.count),
            "message": _from_root(one.message),
        }
        for one in report.findings
    ]  # fmt: skip
    return {
        "case": case.name, "kind": case.kind, "bug": case.bug, "note": case.note, "findings": findings,
        "notices": [] if report is None else [_from_root(n) for n in report.notices], "disagreements": wrong,
    }  # fmt: skip


def _from_root(text):
    """A message that is the same wherever the repository lies."""
    return text.replace(f"{ROOT}{os.sep}", "")


def _place(file, line):
    return None if line is None else f"{Path(file).name}:{line}"


def show_all(file):
    """All cases as a table; returns the rows."""
    rows = []
    print(f"{'case':<40}{'expected':<23}{'found':<23}{'as expected'}")
    for case in (*BUGS, *NEAR_MISSES):
        report, wrong = examine(case)
        rows.append(row(case, report, wrong))
        found = ", ".join(dict.fromkeys(one["kind"] for one in rows[-1]["findings"]))
        found = found or ("not looked at" if rows[-1]["notices"] else "nothing")
        expected = case.kind if case.bug else "nothing"
        print(f"{case.name:<40}{expected:<23}{found:<23}{'NO: ' + wrong[0] if wrong else 'yes'}", flush=True)
    for name, cases in (("bugs found", BUGS), ("near misses silent", NEAR_MISSES)):
        names = {case.name for case in cases}
        good = sum(one["case"] in names and not one["disagreements"] for one in rows)
        print(f"{name}: {good} of {len(cases)}")
    if file:
        file.write_text(json.dumps(rows, indent=1, default=int) + "\n", encoding="utf-8")
    return rows


def main(argv=None):
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.planted_bugs", description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="cases; all by default")
    parser.add_argument("--plain", action="store_true", help="launch without the sanitizer")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all findings to this file")
    options = parser.parse_args(argv)
    unknown = [name for name in options.names if name not in CASES]
    if unknown:
        parser.error(f"no such case: {', '.join(unknown)}")
    on_cpu = common.BACKEND == "cpu"
    if options.plain or not on_cpu:
        if not options.names:
            parser.error("without the sanitizer, name the cases: bugs can end or hang the process")
        return 1 - min([plain(CASES[name]) for name in options.names])
    if not options.names:
        return int(any(one["disagreements"] for one in show_all(options.json)))
    bad = False
    for name in options.names:
        report, wrong = examine(CASES[name])
        print(f"--- {name}: {CASES[name].note}\n{report}\n" + "\n".join(f"DISAGREES: {text}" for text in wrong))
        bad |= bool(wrong)
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())
