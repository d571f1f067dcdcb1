"""NVIDIA's compute-sanitizer over the bank of planted bugs, beside what our own sanitizer says.

    python tests/planted_bugs/on_gpu.py [--json FILE] [--jobs 12] [--ours FILE] [--tools memcheck racecheck] [NAME ...]

Needs a GPU and compute-sanitizer, which comes with the CUDA toolkit. Each bug is a process of its own under each of
*memcheck*, *racecheck*, *synccheck* and *initcheck*, since a bug may end the process or, caught by a time limit, hang
it. Near misses run some together; where a tool has something to say about such a group, or it fails, each of its
cases runs again on its own. Our own findings come from ``--ours``, a file that ``python -m tests.planted_bugs --json
FILE`` wrote on the CPU backend; without it, that command is run here. Prints a table in Markdown and then who found
what. Exit codes: 0 the runs are complete, 1 some ended without a summary, 2 there is no compute-sanitizer.
"""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
PLACES = ("/usr/local/cuda/bin", "/usr/local/cuda/compute-sanitizer")
TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
GROUP = 9  # near misses in one process
CHATTER = re.compile(
    r"COMPUTE-SANITIZER|SUMMARY|Target application|No attachable process|Process didn't|Program hit|Saved host|"
    r"Host Frame|Device Frame|LEAK|This tool|\d+ errors? (was|were) not printed"
)


def find_tool():
    """Path of compute-sanitizer; None if there is none."""
    return shutil.which("compute-sanitizer", path=os.pathsep.join([os.environ.get("PATH", ""), *PLACES]))


def under(tool_path, tool, *arguments):
    """The command that runs Python with these arguments under one of the tools."""
    options = ["--tool", tool, "--report-api-errors", "no", "--target-processes", "all"]
    return [tool_path, *options, sys.executable, *arguments]


def read_report(text):
    """What a tool printed: the number in its summary (None if there is none), and its words, each once."""
    summary = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)", text)
    said = re.findall(r"^=========(?: (?:Error|Warning|ERROR|WARNING):)? (?! )(\S.*)$", text, re.MULTILINE)
    words = [re.sub(r"\s+", " ", one).strip() for one in said if not CHATTER.search(one)]
    return sum(map(int, summary)) if summary else None, list(dict.fromkeys(words))


def run(command, timeout, environ):
    """Run a command in a process group of its own: its output, its exit code (None: stopped) and the seconds."""
    start = time.perf_counter()
    process = subprocess.Popen(
        command, cwd=ROOT, env=environ, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, errors="replace", start_new_session=True,
    )  # fmt: skip
    try:
        text, _ = process.communicate(timeout=timeout)
        code = process.returncode
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # the tool's child is the one that hangs
        text, _ = process.communicate()
        code = None
    return text, code, time.perf_counter() - start


def examine(tool_path, tool, names, timeout):
    """Launch cases under one tool: a dict of ``findings, words, ended, seconds``, and ``text`` if there was no summary.

    ``ended`` is "well", "in an error" (which a bug may cause) or "by the time limit".
    """
    command = under(tool_path, tool, "-m", "tests.planted_bugs", "--plain", *names)
    text, code, seconds = run(command, timeout, os.environ | {"MINI_BACKEND": "gpu"})
    findings, words = read_report(text)
    ended = "by the time limit" if code is None else "in an error" if code else "well"
    answer = {"findings": findings, "words": words[:10], "ended": ended, "seconds": round(seconds, 1)}
    if findings is None or ended != "well":
        answer["text"] = text[-3000:]
    return answer


def our_findings(file):
    """What our sanitizer says, by case: from a file, or by running it here on the CPU backend."""
    if file is None:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "ours.json")
            command = [sys.executable, "-m", "tests.planted_bugs", "--json", str(file)]
            text, _, _ = run(command, None, os.environ | {"MINI_BACKEND": "cpu"})
            if not file.is_file():
                raise RuntimeError(f"our own sanitizer failed:\n{text[-3000:]}")
            return our_findings(file)
    return {one["case"]: one for one in json.loads(file.read_text(encoding="utf-8"))}


def all_cases():
    """The cases as the bank has them, asked on the CPU backend: this process stays free of CUDA."""
    os.environ["MINI_BACKEND"] = "cpu"
    sys.path.insert(0, str(ROOT))
    from tests.planted_bugs import BUGS, NEAR_MISSES

    return BUGS, NEAR_MISSES


# --- the table ------------------------------------------------------------------------------------------------------


def cell(answer):
    """One tool's answer in a few signs: the number of findings, – for none, and how the process ended if not well."""
    if answer["findings"] is None:
        return "hangs" if answer["ended"] == "by the time limit" else "?"
    found = str(answer["findings"]) if answer["findings"] else "–"
    return found + {"by the time limit": ", hangs", "in an error": ", error"}.get(answer["ended"], "")


def ours_cell(one):
    """Our sanitizer's answer: the kinds found, and ! where it is not what the bank expects."""
    if one is None:
        return "not run"
    kinds = ", ".join(dict.fromkeys(finding["kind"] for finding in one["findings"]))
    return (kinds or ("not looked at" if one["notices"] else "–")) + (" !" if one["disagreements"] else "")


def table(rows, tools):
    """The rows as a Markdown table."""
    lines = [f"| case | bug | {' | '.join(tools)} | ours |", "|---|---|" + "---|" * (len(tools) + 1)]
    for row in rows:
        cells = [cell(row["tools"][tool]) for tool in tools]
        planted = row["kind"] if row["bug"] else "none"
        lines.append(f"| {row['case']} | {planted} | {' | '.join(cells)} | {ours_cell(row['ours'])} |")
    return "\n".join(lines)


def found_by(row, tools):
    """The tools that reported something about a case."""
    return [tool for tool in tools if row["tools"][tool]["findings"]]


def summary(rows, tools):
    """By kind: how many bugs each tool and our sanitizer report; the near misses; and where the two differ."""
    lines = [f"| kind | bugs | {' | '.join(tools)} | any tool | ours |", "|---|---|" + "---|" * (len(tools) + 2)]
    kinds = list(dict.fromkeys(row["kind"] for row in rows if row["bug"]))
    for kind in (*kinds, None):
        some = [row for row in rows if (row["bug"] and row["kind"] == kind if kind else not row["bug"])]
        counts = [sum(tool in found_by(row, tools) for row in some) for tool in tools]
        counts.append(sum(bool(found_by(row, tools)) for row in some))
        counts.append(sum(bool(row["ours"] and row["ours"]["findings"]) for row in some))
        lines.append(f"| {kind or 'none (near misses)'} | {len(some)} | {' | '.join(map(str, counts))} |")
    ours_only, theirs_only, neither, alarms = [], [], [], []
    for row in rows:
        theirs, ours = found_by(row, tools), bool(row["ours"] and row["ours"]["findings"])
        if row["bug"] and not (theirs and ours):
            (ours_only if ours else theirs_only if theirs else neither).append(row["case"])
        if not row["bug"] and (theirs or ours):
            alarms.append(f"{row['case']} ({', '.join([*theirs, *['ours'] * ours])})")
    for title, names in (
        ("bugs that only our sanitizer reports", ours_only), ("bugs that only compute-sanitizer reports", theirs_only),
        ("bugs that neither reports", neither), ("near misses that are reported", alarms),
    ):  # fmt: skip
        lines.append(f"\n{title} ({len(names)}): {', '.join(names) or 'none'}")
    return "\n".join(lines)


def first_line(command):
    """The line of a command's output that holds a version or a name; "" if it does not run."""
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=60).stdout.splitlines()
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return next((line.strip() for line in said if re.search(r"\d", line) and "Copyright" not in line), "")


def main(argv=None):
    parser = argparse.ArgumentParser(prog="tests/planted_bugs/on_gpu.py", description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="cases; all by default")
    parser.add_argument("--tools", nargs="+", default=list(TOOLS), choices=TOOLS, metavar="TOOL")
    parser.add_argument("--jobs", type=int, default=12, help="processes at a time (12)")
    parser.add_argument("--timeout", type=float, default=60, help="seconds for one case under one tool (60)")
    parser.add_argument("--hang-timeout", type=float, default=30, help="the same for cases that may hang a GPU (30)")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no more cases after this time")
    parser.add_argument("--ours", type=Path, metavar="FILE", help="what `python -m tests.planted_bugs --json` wrote")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything to this file")
    options = parser.parse_args(argv)
    tool_path = find_tool()
    if tool_path is None:
        parser.error("compute-sanitizer is not on PATH; it comes with NVIDIA's CUDA toolkit")
    start = time.perf_counter()
    bugs, near = all_cases()
    if options.names:
        bugs, near = ([case for case in some if case.name in options.names] for some in (bugs, near))
    groups = [near[first : first + GROUP] for first in range(0, len(near), GROUP)]

    def on_its_own(tool, case):
        if time.perf_counter() - start > options.seconds:
            return case.name, tool, {"findings": None, "ended": "not begun", "text": ""}
        limit = options.hang_timeout if case.hangs_gpu else options.timeout
        return case.name, tool, examine(tool_path, tool, [case.name], limit)

    def together(tool, group):
        if time.perf_counter() - start > options.seconds:
            return [on_its_own(tool, case) for case in group]
        answer = examine(tool_path, tool, [case.name for case in group], options.timeout + 5 * len(group))
        if answer["findings"] or answer["findings"] is None or answer["ended"] != "well":
            return [on_its_own(tool, case) for case in group]
        return [(case.name, tool, answer) for case in group]

    answers = {case.name: {} for case in (*bugs, *near)}
    with ThreadPoolExecutor(options.jobs) as pool:
        ours = pool.submit(our_findings, options.ours)
        # what may take longest begins first
        slow_first = sorted(bugs, key=lambda case: not case.hangs_gpu)
        singles = [pool.submit(on_its_own, tool, case) for case in slow_first for tool in options.tools]
        grouped = [pool.submit(together, tool, group) for group in groups for tool in options.tools]
        for name, tool, answer in [one.result() for one in singles] + sum((one.result() for one in grouped), []):
            answers[name][tool] = answer
        ours = ours.result()
    rows = [
        {"case": case.name, "kind": case.kind, "bug": case.bug, "note": case.note, "tools": answers[case.name],
         "ours": ours.get(case.name)}
        for case in (*bugs, *near)
    ]  # fmt: skip
    facts = {
        "compute_sanitizer": first_line([tool_path, "--version"]),
        "device": first_line(["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]),
        "seconds": round(time.perf_counter() - start),
    }
    print(f"{facts['device']}; compute-sanitizer {facts['compute_sanitizer']}; {facts['seconds']} s\n")
    print(table(rows, options.tools) + "\n\n" + summary(rows, options.tools))
    if options.json:
        options.json.write_text(json.dumps(facts | {"cases": rows}, indent=1) + "\n", encoding="utf-8")
    lost = [
        f"{row['case']} ({tool})" for row in rows for tool in options.tools
        if row["tools"][tool]["findings"] is None
        and row["tools"][tool]["ended"] not in ("by the time limit", "not begun")
    ]  # fmt: skip
    if lost:
        print(f"\nended without a summary ({len(lost)}): {', '.join(lost)}")
        for row in rows:
            for tool in options.tools:
                answer = row["tools"][tool]
                if f"{row['case']} ({tool})" in lost[:3]:
                    print(f"\n--- {row['case']} {tool}\n{answer.get('text', '')[-1500:]}")
    raise SystemExit(1 if lost else 0)


if __name__ == "__main__":
    main()
